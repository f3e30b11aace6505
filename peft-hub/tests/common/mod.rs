//! A hub on loopback: a repository in memory behind the parts of the hub's HTTP that downloads use, with faults on order.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does out of the ordinary.
#[derive(Debug, Default, Clone)]
pub struct Faults {
    /// Close the connection after that many bytes of a body, as many times as there are entries.
    pub cut_after: Vec<usize>,
    /// Answer ranges with the whole file.
    pub ignore_range: bool,
    /// Refuse requests without this token.
    pub token: Option<String>,
    /// Answer every request with this status (and `X-Error-Code`).
    pub status: Option<(u16, &'static str)>,
    /// Answer that many requests with 503 first.
    pub busy: usize,
    /// Flip a byte in bodies of safetensors files, that many times.
    pub damage: usize,
    /// Announce this ETag instead of the right one.
    pub etag: Option<String>,
    /// Redirects name no address.
    pub no_location: bool,
    /// Bodies without a length, ended by closing the connection.
    pub no_length: bool,
}

#[derive(Debug, Default)]
pub struct State {
    pub files: BTreeMap<String, Vec<u8>>,
    pub faults: Faults,
    /// `METHOD path [range] [token]` of every request.
    pub log: Vec<String>,
}

/// Stops when dropped.
#[derive(Debug)]
pub struct Hub {
    pub state: Arc<Mutex<State>>,
    pub address: String,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Hub {
    pub fn new(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State {
            files: files.iter().map(|(name, body)| ((*name).to_owned(), body.to_vec())).collect(),
            ..State::default()
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (state, stop) = (state.clone(), stop.clone());
            move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    // A client that hangs up early is part of the game.
                    let _ = serve(stream.unwrap(), &state);
                }
            }
        });
        Self { state, address, stop, thread: Some(thread) }
    }

    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state.lock().unwrap().faults);
    }

    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn sha256(body: &[u8]) -> String {
    Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn serve(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (Some(verb), Some(path)) = (words.next(), words.next()) else {
        return Ok(());
    };
    let (mut range, mut token) = (None, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let header = header.trim();
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(": ") {
            match name.to_ascii_lowercase().as_str() {
                "range" => range = Some(value.to_owned()),
                "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
                _ => {}
            }
        }
    }
    let state = &mut *state.lock().unwrap();
    state.log.push(
        [Some(verb), Some(path), range.as_deref(), token.as_deref()]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(" "),
    );
    answer(stream, state, verb, path, range, token)
}

fn head(out: &mut Vec<u8>, status: u16, headers: &[(&str, String)]) {
    out.extend_from_slice(format!("HTTP/1.1 {status} X\r\nConnection: close\r\n").as_bytes());
    for (name, value) in headers {
        out.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

fn answer(
    mut stream: TcpStream,
    state: &mut State,
    verb: &str,
    path: &str,
    range: Option<String>,
    token: Option<String>,
) -> std::io::Result<()> {
    let mut out = Vec::new();
    let faults = &mut state.faults;
    let fail = if faults.busy > 0 {
        faults.busy -= 1;
        Some((503, ""))
    } else if let Some(status) = faults.status {
        Some(status)
    } else if faults.token.is_some() && faults.token != token && !path.starts_with("/cdn/") {
        Some((401, ""))
    } else {
        None
    };
    if let Some((status, code)) = fail {
        let mut headers = vec![("Content-Length", "0".to_owned())];
        if !code.is_empty() {
            headers.push(("X-Error-Code", code.to_owned()));
        }
        head(&mut out, status, &headers);
        return stream.write_all(&out);
    }
    let not_found = |code: &str| {
        let mut out = Vec::new();
        head(&mut out, 404, &[("X-Error-Code", code.to_owned()), ("Content-Length", "0".to_owned())]);
        out
    };
    if let Some(rest) = path.strip_prefix("/api/models/org/") {
        let body = match rest {
            "name/revision/main" | "name/revision/v1.0" | "name/revision/refs%2Fpr%2F1" => {
                let siblings: Vec<String> =
                    state.files.keys().map(|name| format!("{{\"rfilename\":{name:?}}}")).collect();
                format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[{}]}}", siblings.join(","))
            }
            "renamed/revision/main" => {
                head(
                    &mut out,
                    307,
                    &[
                        ("Location", "/api/models/org/name/revision/main".to_owned()),
                        ("Content-Length", "0".to_owned()),
                    ],
                );
                return stream.write_all(&out);
            }
            rest if rest.starts_with("name/") => {
                return stream.write_all(&not_found("RevisionNotFound"));
            }
            _ => return stream.write_all(&not_found("RepoNotFound")),
        };
        head(&mut out, 200, &[("Content-Length", body.len().to_string())]);
        out.extend_from_slice(body.as_bytes());
        return stream.write_all(&out);
    }
    let prefixes =
        [format!("/org/name/resolve/{COMMIT}/"), format!("/org/renamed/resolve/{COMMIT}/"), "/cdn/".to_owned()];
    let Some(name) = prefixes.iter().find_map(|prefix| path.strip_prefix(prefix.as_str())) else {
        return stream.write_all(&not_found("EntryNotFound"));
    };
    let Some(body) = state.files.get(name) else {
        return stream.write_all(&not_found("EntryNotFound"));
    };
    let faults = &mut state.faults;
    let large = name.ends_with(".safetensors") || name.ends_with(".gguf");
    let etag = faults.etag.clone().unwrap_or_else(|| {
        let hash = sha256(body);
        if large { hash } else { hash[..40].to_owned() }
    });
    if large && !path.starts_with("/cdn/") {
        // As on the hub: the large file's content is elsewhere, its name and size are told here.
        let mut headers = vec![
            ("X-Linked-Etag", format!("\"{etag}\"")),
            ("X-Linked-Size", body.len().to_string()),
            ("Content-Length", "0".to_owned()),
        ];
        if !faults.no_location {
            headers.push(("Location", format!("/cdn/{name}")));
        }
        head(&mut out, 302, &headers);
        return stream.write_all(&out);
    }
    let mut body = body.clone();
    let whole = body.len();
    if large && faults.damage > 0 && verb == "GET" {
        faults.damage -= 1;
        body[whole / 2] ^= 1;
    }
    let start: usize = match &range {
        Some(range) if !faults.ignore_range => {
            range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap()
        }
        _ => 0,
    };
    if start > 0 && start >= whole {
        head(&mut out, 416, &[("Content-Length", "0".to_owned())]);
        return stream.write_all(&out);
    }
    let rest = &body[start..];
    let mut headers = vec![("ETag", format!("\"{etag}\""))];
    if !faults.no_length {
        headers.push(("Content-Length", rest.len().to_string()));
    }
    let status = if range.is_some() && !faults.ignore_range {
        headers.push(("Content-Range", format!("bytes {start}-{}/{whole}", whole - 1)));
        206
    } else {
        200
    };
    head(&mut out, status, &headers);
    stream.write_all(&out)?;
    if verb == "HEAD" {
        return Ok(());
    }
    if large && !faults.cut_after.is_empty() {
        let cut = faults.cut_after.remove(0).min(rest.len());
        stream.write_all(&rest[..cut])?;
        return stream.shutdown(std::net::Shutdown::Both);
    }
    stream.write_all(rest)
}
