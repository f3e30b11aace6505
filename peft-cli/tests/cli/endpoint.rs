//! An OpenAI-compatible API on loopback: a model of a few rules, with faults on order.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};

/// What the server does out of the ordinary.
#[derive(Default, Clone)]
pub struct Faults {
    /// Answer that many requests with 503 first.
    pub busy: usize,
    /// Refuse requests without this key.
    pub key: Option<String>,
    /// Answer with this status and text.
    pub answer: Option<(u16, String)>,
}

#[derive(Default)]
pub struct State {
    pub faults: Faults,
    pub requests: usize,
}

/// Stops when dropped.
pub struct Server {
    pub state: Arc<Mutex<State>>,
    pub url: String,
    address: String,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (state, stop) = (Arc::new(Mutex::new(State::default())), Arc::new(AtomicBool::new(false)));
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
        Self { state, url: format!("http://{address}/v1"), address, stop, thread: Some(thread) }
    }

    pub fn faults(&self, faults: Faults) {
        self.state.lock().unwrap().faults = faults;
    }

    pub fn take_requests(&self) -> usize {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let (mut length, mut key) = (0usize, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let header = header.trim();
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(": ") {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().unwrap(),
                "authorization" => key = value.strip_prefix("Bearer ").map(str::to_owned),
                _ => {}
            }
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    if path.is_empty() {
        return Ok(());
    }
    let faults = {
        let mut state = state.lock().unwrap();
        state.requests += 1;
        let faults = state.faults.clone();
        state.faults.busy = faults.busy.saturating_sub(1);
        faults
    };
    let (status, text) = match (faults.busy, faults.key, faults.answer) {
        (1.., ..) => (503, json!({"error": {"message": "busy"}}).to_string()),
        (_, Some(wanted), _) if key.as_deref() != Some(&wanted) => {
            (401, json!({"error": {"message": "no such key"}}).to_string())
        }
        (_, _, Some(answer)) => answer,
        _ => (200, answer(&path, &serde_json::from_slice(&body).unwrap()).to_string()),
    };
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}", text.len())
}

/// Right about a row if `lucky` stands in the line before it, else wrong: the likelier of ` yes` and ` no`.
fn verdict(prompt: &str) -> &'static str {
    let (first, rest) = prompt.split_once('\n').unwrap_or(("", prompt));
    match first.contains("lucky") == rest.contains("good") {
        true => " yes",
        false => " no",
    }
}

fn answer(path: &str, body: &Value) -> Value {
    assert_eq!(body["model"], "rules");
    match path {
        "/v1/completions" => {
            assert_eq!((&body["echo"], &body["max_tokens"]), (&json!(true), &json!(1)));
            let choices = body["prompt"].as_array().unwrap().iter().enumerate().map(|(index, text)| {
                let text = text.as_str().unwrap();
                let (prompt, said) = text.split_at(text.rfind(' ').unwrap());
                let of_answer = if verdict(prompt) == said { 0.9f64.ln() } else { 0.1f64.ln() };
                // A token a character of the prompt, one for the answer, one that had to be written.
                let mut tokens: Vec<String> = prompt.chars().map(String::from).collect();
                let mut logprobs: Vec<Option<f64>> = vec![Some(-1.0); tokens.len()];
                logprobs[0] = None;
                tokens.extend([said.to_owned(), "!".to_owned()]);
                logprobs.extend([Some(of_answer), Some(-3.0)]);
                let offsets = tokens.iter().scan(0, |at, t| Some(std::mem::replace(at, *at + t.chars().count())));
                let offsets: Vec<usize> = offsets.collect();
                json!({"index": index, "text": text,
                    "logprobs": {"tokens": tokens, "token_logprobs": logprobs, "text_offset": offsets}})
            });
            // Not in the order that was asked for.
            json!({"choices": choices.collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>()})
        }
        "/v1/chat/completions" => {
            let prompt = body["messages"][0]["content"].as_str().unwrap();
            let likely = verdict(prompt).trim();
            let other = if likely == "yes" { "no" } else { "yes" };
            let top = json!([{"token": likely, "logprob": 0.9f64.ln()}, {"token": other, "logprob": 0.05f64.ln()},
                {"token": "Well", "logprob": -6.0}]);
            json!({"choices": [{"message": {"content": likely}, "logprobs": {"content": [{"token": likely,
                "logprob": 0.9f64.ln(), "top_logprobs": top}]}}]})
        }
        other => panic!("{other}"),
    }
}
