//! Where the hub and its cache are; read from the variables that Hugging Face's own tools use.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Something that a progress display wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A file starts, or starts again because the server could not resume it.
    Start {
        /// Path within the repository.
        file: &'a str,
        /// Bytes in all, where the server says so.
        size: Option<u64>,
        /// Bytes already here from an earlier try.
        have: u64,
    },
    /// More bytes of the current file are on disk.
    Advance {
        /// Path within the repository.
        file: &'a str,
        /// How many more.
        bytes: u64,
    },
    /// The file is complete and checked.
    Done {
        /// Path within the repository.
        file: &'a str,
    },
    /// Something worth a line: a retry, waiting for another process, falling back to the cache.
    Note {
        /// The line.
        message: &'a str,
    },
}

/// Called for every [`Event`] of a download.
pub type Progress = Arc<dyn Fn(Event<'_>) + Send + Sync>;

/// How to reach the hub.
#[derive(Clone)]
pub struct Options {
    /// The hub's address without a trailing slash (`HF_ENDPOINT`).
    pub endpoint: String,
    /// Access token (`HF_TOKEN`, or the file that `hf auth login` writes). Sent to the endpoint only.
    pub token: Option<String>,
    /// The cache's folder (`HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME/hub`, else `~/.cache/huggingface/hub`);
    /// `None` where no variable and no home folder says where.
    pub cache: Option<PathBuf>,
    /// Never use the network (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// How many times a broken download of one file is resumed before giving up.
    pub retries: u32,
    /// Wait before the first retry; doubled for each further one, at most 64 times that.
    pub retry_wait: Duration,
    /// Told about every step of a download.
    pub progress: Option<Progress>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("retries", &self.retries)
            .field("retry_wait", &self.retry_wait)
            .field("progress", &self.progress.as_ref().map(|_| "…"))
            .finish()
    }
}

impl Options {
    /// Options from this process's environment.
    #[must_use]
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// Options from the variables that `get` answers; an empty value counts as unset. The names and their order are those
    /// of `huggingface_hub/constants.py`.
    #[must_use]
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| get(name).filter(|value| !value.trim().is_empty());
        let path = |name: &str| get(name).map(PathBuf::from);
        let flag = |name: &str| {
            get(name)
                .is_some_and(|value| matches!(value.trim().to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        let home = path("HF_HOME").or_else(|| {
            path("XDG_CACHE_HOME")
                .or_else(|| path("HOME").or_else(|| path("USERPROFILE")).map(|home| home.join(".cache")))
                .map(|cache| cache.join("huggingface"))
        });
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.as_ref().map(|home| home.join("hub")));
        let token_file = path("HF_TOKEN_PATH").or_else(|| home.as_ref().map(|home| home.join("token")));
        let token = get("HF_TOKEN")
            .or_else(|| get("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| token_file.and_then(|file| std::fs::read_to_string(file).ok()))
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        Self {
            endpoint: get("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".to_owned())
                .trim()
                .trim_end_matches('/')
                .to_owned(),
            token,
            cache,
            offline: flag("HF_HUB_OFFLINE") || flag("TRANSFORMERS_OFFLINE"),
            retries: 8,
            retry_wait: Duration::from_millis(500),
            progress: None,
        }
    }

    /// The same options, with `progress` told about every step.
    #[must_use]
    pub fn with_progress(mut self, progress: impl Fn(Event<'_>) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    pub(crate) fn tell(&self, event: Event<'_>) {
        if let Some(progress) = &self.progress {
            progress(event);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Options {
        Options::from_variables(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn cache_follows_the_hubs_order() {
        let cache = |pairs: &[(&str, &str)]| from(pairs).cache.unwrap();
        assert_eq!(cache(&[("HOME", "/h")]), PathBuf::from("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), PathBuf::from("/x/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")]), PathBuf::from("/f/hub"));
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/old")]), PathBuf::from("/old"));
        assert_eq!(cache(&[("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/old")]), PathBuf::from("/c"));
        assert_eq!(from(&[]).cache, None);
    }

    #[test]
    fn endpoint_token_and_offline() {
        let options =
            from(&[("HF_ENDPOINT", "http://mirror:8080/"), ("HF_TOKEN", " secret\n"), ("HF_HUB_OFFLINE", "yes")]);
        assert_eq!(options.endpoint, "http://mirror:8080");
        assert_eq!(options.token.as_deref(), Some("secret"));
        assert!(options.offline);
        assert!(!format!("{options:?}").contains("secret"));
        let plain = from(&[("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", "")]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert!(!plain.offline);
    }

    #[test]
    fn token_file_of_the_login_command_is_read() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "from-file\n").unwrap();
        let options = from(&[("HF_HOME", home.path().to_str().unwrap())]);
        assert_eq!(options.token.as_deref(), Some("from-file"));
    }
}
