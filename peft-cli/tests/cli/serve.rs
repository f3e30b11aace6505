//! `serve` as a process: it answers, refuses what it cannot serve, and goes down with its requests done. What it answers over
//! HTTP is tested in peft-serve, and with OpenAI's client in interop/.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};

use serde_json::{Value, json};

use crate::harness::{Dir, base};

struct Server {
    process: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        // A test that failed leaves none behind.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn start(dir: &Dir, more: &[&str]) -> Server {
    let model = base().display().to_string();
    let args = [&["serve", "--model", &model, "--name", "base", "--port", "0"], more].concat();
    let mut process = dir.command(&args).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(process.stderr.take().unwrap());
    let mut line = String::new();
    let address = loop {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the server ended before it listened");
        if let Some(address) = line.trim().strip_prefix("listening on http://") {
            break address.to_owned();
        }
    };
    // What it has to say must not wait for a reader.
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    Server { process, address }
}

fn ask(address: &str, body: &Value) -> TcpStream {
    let body = body.to_string();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    stream
}

fn text(mut stream: TcpStream) -> String {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 "), "{answer}");
    serde_json::from_str::<Value>(body).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn it_answers_as_generate_does_and_finishes_what_runs() {
    let dir = Dir::new();
    dir.train(&[]).ok();
    let written = |more: &[&str]| {
        let model = base().display().to_string();
        let args = ["generate", "--model", &model, "--prompt", "say a ", "--max-new-tokens", "8", "--json"];
        dir.run(&[&args[..], more].concat()).json()["text"].as_str().unwrap().to_owned()
    };
    std::fs::create_dir(dir.path("more")).unwrap();
    crate::harness::copy(&dir.path("out"), &dir.path("more/lazy"));
    let mut server = start(&dir, &["--adapter", "ours=out", "--adapter-dir", "more"]);
    for (name, want) in [("base", written(&[])), ("ours", written(&["--adapter", "out"]))] {
        let request = json!({"model": name, "prompt": "say a ", "max_tokens": 8, "temperature": 0});
        assert_eq!(text(ask(&server.address, &request)), want, "{name}");
        if name == "ours" {
            let request = json!({"model": "lazy", "prompt": "say a ", "max_tokens": 8, "temperature": 0});
            assert_eq!(text(ask(&server.address, &request)), want);
        }
    }
    // It is told to end while it writes.
    let request = json!({"model": "ours", "prompt": "say a ", "max_tokens": 100, "logit_bias": {"0": -1e9}});
    let last = ask(&server.address, &request);
    std::thread::sleep(std::time::Duration::from_millis(100));
    let told = std::process::Command::new("kill").args(["-TERM", &server.process.id().to_string()]).status().unwrap();
    assert!(told.success());
    assert!(!text(last).is_empty());
    assert_eq!(server.process.wait().unwrap().code(), Some(0));
}

#[test]
fn what_cannot_be_served_is_refused_before_it_listens() {
    let dir = Dir::new();
    let model = base().display().to_string();
    let serve = |more: &[&str]| dir.run(&[&["serve", "--model", &model, "--port", "0"], more].concat());
    serve(&["--adapter", "a=nowhere"]).fails(&["nowhere"]);
    serve(&["--adapter-dir", "nowhere"]).fails(&["nowhere"]);
    serve(&["--max-batch", "0"]).fails(&["max_rows"]);
    serve(&["--host", "no.such.host.invalid"]).fails(&["cannot listen", "no.such.host.invalid"]);
    dir.run(&["serve", "--model", &model, "--port", "99999"]).misused(&["99999"]);
    dir.train(&[]).ok();
    serve(&["--adapter", "a/b=out"]).fails(&["a/b"]);
    serve(&["--name", "x", "--adapter", "x=out"]).fails(&["`x`", "--name"]);
    let weights = dir.path("out/adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 5]).unwrap();
    serve(&["--adapter", "a=out"]).fails(&["adapter_model.safetensors"]);
}
