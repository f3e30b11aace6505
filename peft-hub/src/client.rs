//! The hub's HTTP side: what a repository holds, what a file's content is called, and its bytes from an offset.
//!
//! hf-hub's own transfer (0.5) is not used for file bodies: it appends a 200 answer to a partial file when a server
//! ignores `Range`, asks for `bytes=size-` for ever once a partial file is complete, takes an ETag as a path unchecked,
//! and asserts or unwraps on malformed answers. Its types and its cache layout are.

use std::io::Read;
use std::time::Duration;

use hf_hub::api::RepoInfo;
use ureq::http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, LOCATION, RANGE,
};
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

use crate::error::{HubError, Result};
use crate::options::{Event, Options};
use crate::spec::{HubId, is_safe_file};

const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");
const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
/// A repository's listing; the largest on the hub are a few megabytes.
const MAX_LISTING: u64 = 64 << 20;
const MAX_REDIRECTS: usize = 8;

/// What the hub says about one file.
#[derive(Debug)]
pub(crate) struct Metadata {
    /// Names the content; for large files its SHA-256 in hex.
    pub(crate) etag: String,
    /// Bytes, where the server says so.
    pub(crate) size: Option<u64>,
}

/// Bytes of a file.
pub(crate) struct Bytes {
    /// The offset that the first byte has; 0 where the server did not honour the range.
    pub(crate) start: u64,
    pub(crate) reader: Box<dyn Read>,
}

/// A connection to one hub.
pub(crate) struct Client<'a> {
    agent: Agent,
    pub(crate) options: &'a Options,
}

#[derive(Clone, Copy)]
enum Verb {
    Get,
    Head,
}

impl<'a> Client<'a> {
    pub(crate) fn new(options: &'a Options) -> Result<Self> {
        let endpoint: Option<Uri> = options.endpoint.parse().ok();
        if !endpoint.is_some_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some()) {
            return Err(HubError::Setting {
                name: "HF_ENDPOINT",
                why: format!("`{}` is not an address; give one such as https://huggingface.co", options.endpoint),
            });
        }
        if let Some(token) = &options.token
            && !token.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(HubError::Setting { name: "HF_TOKEN", why: "holds characters that no token has".to_owned() });
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0) // followed here: the first answer's headers are needed, and the token stays at home
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .user_agent(concat!("peft-hub/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Ok(Self { agent, options })
    }

    /// The files of a repository at a revision, and the commit that this is.
    pub(crate) fn listing(&self, id: &HubId) -> Result<RepoInfo> {
        let url =
            format!("{}/api/models/{}/revision/{}", self.options.endpoint, id.repo, id.revision.replace('/', "%2F"));
        let mut response = self.follow(Verb::Get, &url, None, |_| false)?;
        self.accept(&response, &url, id, None)?;
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_LISTING)
            .read_to_string()
            .map_err(|error| connection(&url, &error))?;
        serde_json::from_str(&text).map_err(|error| HubError::Protocol { url, why: error.to_string() })
    }

    /// A file's content name and size.
    pub(crate) fn metadata(&self, id: &HubId, commit: &str, file: &str) -> Result<Metadata> {
        let url = self.file_url(id, commit, file);
        let response = self.follow(Verb::Head, &url, None, |headers| headers.contains_key(LINKED_ETAG))?;
        if !response.status().is_redirection() {
            self.accept(&response, &url, id, Some(file))?;
        }
        let headers = response.headers();
        let etag = text(headers, &LINKED_ETAG)
            .or_else(|| text(headers, &ETAG))
            .map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        // It becomes a file name.
        let Some(etag) = etag
            .filter(|etag| etag.len() <= 128 && is_safe_file(etag) && !etag.contains('/') && !etag.starts_with('.'))
        else {
            return Err(HubError::Protocol { url, why: "no usable ETag".to_owned() });
        };
        let size = text(headers, &LINKED_SIZE)
            .or_else(|| (!response.status().is_redirection()).then(|| text(headers, &CONTENT_LENGTH)).flatten());
        Ok(Metadata { etag, size: size.and_then(|size| size.parse().ok()) })
    }

    /// A file's bytes from `start` on. `None` where the server says that no byte lies there.
    pub(crate) fn bytes(&self, id: &HubId, commit: &str, file: &str, start: u64) -> Result<Option<Bytes>> {
        let url = self.file_url(id, commit, file);
        let response = self.follow(Verb::Get, &url, Some(start), |_| false)?;
        let start = match response.status().as_u16() {
            206 => {
                let range = text(response.headers(), &CONTENT_RANGE).unwrap_or_default();
                let first =
                    range.trim_start_matches("bytes").trim().split('-').next().and_then(|first| first.parse().ok());
                if first != Some(start) {
                    return Err(HubError::Protocol {
                        url,
                        why: format!("asked for bytes from {start}, got `{range}`"),
                    });
                }
                start
            }
            416 => return Ok(None),
            _ => {
                self.accept(&response, &url, id, Some(file))?;
                0
            }
        };
        let reader = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(Some(Bytes { start, reader: Box::new(reader) }))
    }

    fn file_url(&self, id: &HubId, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.options.endpoint, id.repo, encode(file))
    }

    /// Send a request and follow redirects until `stop` likes a redirect's headers. Statuses of 500 and above and 429 are
    /// tried again.
    fn follow(
        &self,
        verb: Verb,
        url: &str,
        start: Option<u64>,
        stop: impl Fn(&HeaderMap) -> bool,
    ) -> Result<Response<Body>> {
        let mut tries = 0;
        loop {
            let response = self.follow_once(verb, url, start, &stop)?;
            let status = response.status().as_u16();
            if tries >= self.options.retries.min(3) || !(status >= 500 || status == 429) {
                return Ok(response);
            }
            self.wait(tries, &format!("{url}: HTTP {status}"));
            tries += 1;
        }
    }

    fn follow_once(
        &self,
        verb: Verb,
        url: &str,
        start: Option<u64>,
        stop: &impl Fn(&HeaderMap) -> bool,
    ) -> Result<Response<Body>> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(verb, &url, start)?;
            if !response.status().is_redirection() || stop(response.headers()) {
                return Ok(response);
            }
            let location = text(response.headers(), &LOCATION).ok_or_else(|| HubError::Protocol {
                url: url.clone(),
                why: "a redirect without an address".to_owned(),
            })?;
            url = absolute(&url, &location)
                .ok_or_else(|| HubError::Protocol { url: url.clone(), why: format!("a redirect to `{location}`") })?;
        }
        Err(HubError::Protocol { url, why: format!("more than {MAX_REDIRECTS} redirects") })
    }

    fn send(&self, verb: Verb, url: &str, start: Option<u64>) -> Result<Response<Body>> {
        let mut request = match verb {
            Verb::Get => self.agent.get(url),
            Verb::Head => self.agent.head(url),
        };
        if let Some(token) = &self.options.token
            && same_origin(url, &self.options.endpoint)
        {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if matches!(verb, Verb::Head) || start.is_some() {
            request = request.header(ACCEPT_ENCODING, "identity");
        }
        if let Some(start) = start.filter(|start| *start > 0) {
            request = request.header(RANGE, format!("bytes={start}-"));
        }
        request.call().map_err(|error| connection(url, &error))
    }

    /// Turn an unwelcome status into the error that says what to do.
    fn accept(&self, response: &Response<Body>, url: &str, id: &HubId, file: Option<&str>) -> Result<()> {
        let status = response.status().as_u16();
        if response.status().is_success() {
            return Ok(());
        }
        let repo = id.repo.clone();
        let endpoint = self.options.endpoint.clone();
        let code = text(response.headers(), &ERROR_CODE).unwrap_or_default();
        Err(match (status, code.as_str(), file) {
            (_, "RepoNotFound", _) => HubError::NoSuchRepo { repo, endpoint },
            (_, "RevisionNotFound", _) => self.no_such_revision(id),
            (401 | 403, code, _) => {
                let why = match (code, &self.options.token) {
                    ("GatedRepo", None) => format!(
                        "it is gated; accept its terms at {endpoint}/{repo}, then set HF_TOKEN to a token of that account"
                    ),
                    ("GatedRepo", Some(_)) => {
                        format!("it is gated; accept its terms at {endpoint}/{repo} with the token's account")
                    }
                    (_, None) => {
                        "it is private, gated or does not exist; set HF_TOKEN to a token that may read it"
                            .to_owned()
                    }
                    (_, Some(_)) if status == 401 => {
                        "the token in HF_TOKEN is not valid there (expired, or for another hub), or the repository does not exist"
                            .to_owned()
                    }
                    (_, Some(_)) => {
                        "the token in HF_TOKEN may not read it; give the token access to this repository"
                            .to_owned()
                    }
                };
                HubError::Refused { repo, endpoint, status, why }
            }
            (404, _, Some(file)) => HubError::MissingFile {
                repo,
                revision: id.revision.clone(),
                file: file.to_owned(),
                hint: String::new(),
            },
            (404, _, None) if id.revision != "main" => self.no_such_revision(id),
            (404, _, None) => HubError::NoSuchRepo { repo, endpoint },
            _ => HubError::Status {
                url: url.to_owned(),
                status,
                hint: match status {
                    429 => "; too many requests, wait a while or set HF_TOKEN",
                    500.. => "; the hub has trouble, try again later",
                    _ => "",
                }
                .to_owned(),
            },
        })
    }

    fn no_such_revision(&self, id: &HubId) -> HubError {
        HubError::NoSuchRevision {
            repo: id.repo.clone(),
            revision: id.revision.clone(),
            endpoint: self.options.endpoint.clone(),
        }
    }

    /// Pause before try number `tries + 1`, and say why there is one.
    pub(crate) fn wait(&self, tries: u32, why: &str) {
        let wait = self.options.retry_wait * (1 << tries.min(6));
        self.options.tell(Event::Note { message: &format!("{why}; trying again in {:.1} s", wait.as_secs_f64()) });
        std::thread::sleep(wait);
    }
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn connection(url: &str, error: &ureq::Error) -> HubError {
    HubError::Connection { url: url.to_owned(), why: error.to_string() }
}

fn same_origin(url: &str, other: &str) -> bool {
    match (url.parse::<Uri>(), other.parse::<Uri>()) {
        (Ok(a), Ok(b)) => a.scheme() == b.scheme() && a.authority() == b.authority(),
        _ => false,
    }
}

/// The address that a `Location` header means, seen from `base`. Never from https to http.
fn absolute(base: &str, location: &str) -> Option<String> {
    let base_uri: Uri = base.parse().ok()?;
    let (scheme, authority) = (base_uri.scheme_str()?, base_uri.authority()?);
    let url = if location.contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = base_uri.path().rsplit_once('/').map_or("", |(f, _)| f);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let target: Uri = url.parse().ok()?;
    target.host()?;
    match (scheme, target.scheme_str()?) {
        (_, "https") | ("http", "http") => Some(url),
        _ => None,
    }
}

/// Percent-encode a path, slashes kept.
fn encode(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn redirect_addresses() {
        let base = "http://h:1/a/b";
        let to = |location| absolute(base, location);
        assert_eq!(to("/x?y=1").as_deref(), Some("http://h:1/x?y=1"));
        assert_eq!(to("x").as_deref(), Some("http://h:1/a/x"));
        assert_eq!(to("//other/x").as_deref(), Some("http://other/x"));
        assert_eq!(to("https://cdn/x").as_deref(), Some("https://cdn/x"));
        assert_eq!(to("ftp://cdn/x"), None);
        assert_eq!(absolute("https://h/a", "http://h/a"), None);
    }

    #[test]
    fn the_token_stays_with_the_endpoint() {
        assert!(same_origin("http://h:1/a/b?c", "http://h:1"));
        assert!(!same_origin("http://h:2/a", "http://h:1"));
        assert!(!same_origin("https://h:1/a", "http://h:1"));
        assert!(!same_origin("http://h:1.evil.com/a", "http://h:1"));
    }

    #[test]
    fn paths_are_encoded() {
        assert_eq!(encode("a b/ü#?.gguf"), "a%20b/%C3%BC%23%3F.gguf");
    }
}
