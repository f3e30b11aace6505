//! A running server on a loopback port, and what clients send.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peft_models::Decoder;
use peft_models::generate::GenerateOptions;
use peft_models::tokenizer::Tokenizer;
use peft_serve::http::{Parts, Server, ServerOptions};
use peft_serve::{Engine, EngineOptions, Registry};
use serde_json::{Value, json};

use crate::base::{alone, base_with, kinds, registry, write};
use crate::byte_tokenizer::write_tokenizer;

pub(crate) const ADMIN: &str = "admin-key";

/// A running server with two adapters, `style` and `other`, which goes down with it.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) model: Arc<Decoder>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) engine: Engine,
    pub(crate) stop: Option<tokio::sync::oneshot::Sender<()>>,
    pub(crate) thread: Option<std::thread::JoinHandle<()>>,
}

impl Running {
    pub(crate) fn start(change: impl FnOnce(&mut ServerOptions, &mut EngineOptions)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_tokenizer(dir.path());
        let tokenizer = Arc::new(Tokenizer::from_folder(dir.path()).unwrap());
        let model = base_with(json!({"vocab_size": 257, "max_position_embeddings": 2048}));
        let registry = Arc::new(registry(&model, None));
        for (name, seed) in [("style", 1), ("other", 2)] {
            registry.load(name, &write(&dir.path().join(name), &kinds()[0].1, &model, seed)).unwrap();
        }
        let mut options = ServerOptions { admin_key: Some(ADMIN.into()), ..ServerOptions::new("base") };
        let mut engine_options =
            EngineOptions { max_rows: 4, cache_tokens: 8192, queue: 8, ..EngineOptions::default() };
        change(&mut options, &mut engine_options);
        let engine = Engine::start(model.clone(), Some(tokenizer.clone()), engine_options).unwrap();
        let parts = Parts {
            engine: engine.clone(),
            registry: registry.clone(),
            tokenizer: tokenizer.clone(),
            chat: Some(Box::new(|messages, _| {
                let mut text = String::new();
                for m in messages {
                    if m["role"] == "unheard-of" {
                        return Err("the template knows no such role".into());
                    }
                    writeln!(text, "{}: {}", m["role"].as_str().unwrap(), m["content"].as_str().unwrap()).unwrap();
                }
                Ok(text)
            })),
            locate: Box::new(|path| Ok(PathBuf::from(path))),
        };
        let server = Server::new(parts, options);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime.block_on(server.serve(listener, async { drop(stopped.await) })).unwrap();
        });
        Self { address, dir, model, tokenizer, registry, engine, stop: Some(stop), thread: Some(thread) }
    }

    /// Sends bytes as they are, and reads until the server closes.
    pub(crate) fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        // A server that has seen enough closes before all is written.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    pub(crate) fn send(&self, method: &str, path: &str, key: Option<&str>, body: &str) -> (u16, String) {
        let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
        let answer = self.raw(
            format!(
                "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{key}Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        );
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        (status, if chunked { dechunk(body) } else { body.to_owned() })
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, body) = self.send("POST", path, Some(ADMIN), &body.to_string());
        (status, serde_json::from_str(&body).unwrap_or_else(|e| panic!("{e}: {body}")))
    }

    /// The events of a stream, without the last one, `[DONE]`.
    pub(crate) fn events(&self, path: &str, body: &Value) -> Vec<Value> {
        let (status, body) = self.send("POST", path, Some(ADMIN), &body.to_string());
        assert_eq!(status, 200, "{body}");
        let data: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.last(), Some(&"[DONE]"), "{body}");
        data[..data.len() - 1].iter().map(|d| serde_json::from_str(d).unwrap()).collect()
    }

    /// What the model alone writes behind a text.
    pub(crate) fn expected(&self, adapter: Option<&str>, prompt: &str, max_new_tokens: usize) -> String {
        let leased = adapter.map(|name| self.registry.lease(name).unwrap());
        let ids = self.tokenizer.encode(prompt, true).unwrap();
        let options = GenerateOptions { max_new_tokens, stop: vec![0], ..GenerateOptions::default() };
        let written = alone(&self.model, leased.as_ref().map(|a| a.adapter()), &ids, &options);
        self.tokenizer.decode(&written, true).unwrap()
    }

    pub(crate) fn finish(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.thread.take().unwrap().join().unwrap();
        assert!(!self.engine.is_running());
        let stats = self.engine.stats();
        assert_eq!((stats.waiting, stats.running, stats.cache_used), (0, 0, 0), "{stats:?}");
    }

    pub(crate) fn wait_until(&self, what: &str, holds: impl Fn(&peft_serve::EngineStats) -> bool) {
        let began = Instant::now();
        while !holds(&self.engine.stats()) {
            assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", self.engine.stats());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

pub(crate) fn dechunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole.push_str(&rest[..size]);
        body = rest[size..].strip_prefix("\r\n").unwrap();
    }
    whole
}

pub(crate) fn error(answer: &(u16, Value)) -> (u16, String) {
    let error = &answer.1["error"];
    assert!(error["message"].is_string() && error["type"].is_string(), "{answer:?}");
    (answer.0, format!("{} {} {}", error["param"], error["code"], error["message"]))
}

pub(crate) const COMPLETIONS: &str = "/v1/completions";
pub(crate) const CHAT: &str = "/v1/chat/completions";
