//! What clients get, whatever they send.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use peft_serve::http::ApiKey;
use serde_json::{Value, json};

use crate::base::{base_with, kinds, write};
use crate::running::{ADMIN, CHAT, COMPLETIONS, Running, error};

#[test]
fn each_model_writes_what_it_writes_alone_whole_and_in_pieces() {
    let server = Running::start(|_, _| {});
    for (name, adapter) in [("base", None), ("style", Some("style")), ("other", Some("other"))] {
        let request = json!({"model": name, "prompt": "Once upon", "max_tokens": 12, "temperature": 0});
        let want = server.expected(adapter, "Once upon", 12);
        let (status, answer) = server.post(COMPLETIONS, &request);
        assert_eq!((status, answer["choices"][0]["text"].as_str().unwrap()), (200, want.as_str()), "{answer}");
        assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!(name)));
        let usage = &answer["usage"];
        assert_eq!((usage["prompt_tokens"].as_u64(), usage["completion_tokens"].as_u64()), (Some(9), Some(12)));

        let mut request = request.clone();
        request["stream"] = true.into();
        request["stream_options"] = json!({"include_usage": true});
        let mut events = server.events(COMPLETIONS, &request);
        assert_eq!(events.pop().unwrap()["usage"], *usage);
        let pieces: Vec<&Value> = events.iter().map(|e| &e["choices"][0]).collect();
        assert_eq!(pieces.iter().map(|p| p["text"].as_str().unwrap()).collect::<String>(), want);
        assert_eq!(pieces.last().unwrap()["finish_reason"], "length");
        assert!(pieces.len() > 3, "{events:?}");
    }
    assert_ne!(server.expected(Some("style"), "Once upon", 12), server.expected(None, "Once upon", 12));

    let messages = json!([{"role": "system", "content": "Be brief."},
                          {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]}]);
    let request = json!({"model": "style", "messages": messages, "max_tokens": 9, "temperature": 0});
    let want = server.expected(Some("style"), "system: Be brief.\nuser: Hi you\n", 9);
    let (status, answer) = server.post(CHAT, &request);
    let message = &answer["choices"][0]["message"];
    assert_eq!(
        (status, &message["role"], message["content"].as_str().unwrap()),
        (200, &json!("assistant"), want.as_str())
    );
    let mut request = request;
    request["stream"] = true.into();
    let events = server.events(CHAT, &request);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text = |e: &Value| e["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned();
    assert_eq!(events.iter().map(text).collect::<String>(), want);
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    server.finish();
}

#[test]
fn choices_stops_and_log_probabilities() {
    let server = Running::start(|_, _| {});
    let whole = server.expected(None, "abc", 20);
    // A stop string from the middle of the text, which is not in what is written.
    let middle: String = whole.chars().skip(6).take(2).collect();
    let at = whole.find(&middle).unwrap();
    let request =
        json!({"model": "base", "prompt": "abc", "max_tokens": 20, "temperature": 0, "stop": [middle, "never"]});
    let (_, answer) = server.post(COMPLETIONS, &request);
    let choice = &answer["choices"][0];
    assert_eq!((choice["text"].as_str().unwrap(), &choice["finish_reason"]), (&whole[..at], &json!("stop")));
    let mut streamed = request.clone();
    streamed["stream"] = true.into();
    let events = server.events(COMPLETIONS, &streamed);
    assert_eq!(events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect::<String>(), &whole[..at]);

    let request = json!({"model": "base", "prompt": ["abc", [67, 68]], "n": 2, "max_tokens": 5, "temperature": 1.2, "top_k": 40,
                         "seed": 5, "logprobs": 2});
    let (status, answer) = server.post(COMPLETIONS, &request);
    assert_eq!((status, answer["choices"].as_array().map(Vec::len)), (400, None), "a mixed list: {answer}");
    let request = json!({"model": "base", "prompt": ["abc", "de"], "n": 2, "max_tokens": 5, "temperature": 1.2, "top_k": 40,
                         "seed": 5, "logprobs": 2});
    let (_, answer) = server.post(COMPLETIONS, &request);
    let (_, again) = server.post(COMPLETIONS, &request);
    assert_eq!(answer["choices"], again["choices"], "a seed repeats");
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    let logprobs = &choices[0]["logprobs"];
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[key].as_array().unwrap().len(), 5, "{key}");
    }
    let request = json!({"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "logprobs": true,
                         "top_logprobs": 4, "temperature": 0});
    let (_, answer) = server.post(CHAT, &request);
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 3);
    for token in content {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["logprob"]), (4, &token["logprob"]));
        assert!(token["logprob"].as_f64().unwrap() < 0.0);
    }
    server.finish();
}

#[test]
fn what_is_wrong_is_said_with_its_status_and_field() {
    let server = Running::start(|options, _| {
        options.api_keys = ["one", "two"].map(ApiKey::new).into();
        options.max_body = 4096;
        options.max_tokens = 64;
    });
    let prompt = |more: Value| {
        let mut body = json!({"model": "base", "prompt": "a"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        error(&server.post(COMPLETIONS, &body))
    };
    for (more, status, names) in [
        (json!({"model": "stile"}), 404, "did you mean `style`"),
        (json!({"max_tokens": 0}), 400, "max_tokens"),
        (json!({"max_tokens": 65}), 400, "max_tokens"),
        (json!({"max_tokens": -1}), 400, "max_tokens"),
        (json!({"temperature": -0.5}), 400, "temperature"),
        (json!({"top_p": 0}), 400, "top_p"),
        (json!({"prompt": ""}), 400, "prompt"),
        (json!({"prompt": [300]}), 400, "vocabulary"),
        (json!({"prompt": 3}), 400, "prompt"),
        (json!({"prompt": null}), 400, "prompt"),
        (json!({"n": 0}), 400, "`n`"),
        (json!({"n": 99}), 400, "`n`"),
        (json!({"logprobs": 21}), 400, "logprobs"),
        (json!({"stop": [""]}), 400, "stop"),
        (json!({"logit_bias": {"x": 1}}), 400, "logit_bias"),
        (json!({"best_of": 2}), 400, "best_of"),
        (json!({"prompt": "x".repeat(3000)}), 400, "max_tokens"),
    ] {
        let (got, message) = prompt(more.clone());
        assert!(got == status && message.contains(names), "{more}: {got} {message}");
    }
    let chat = |messages: Value| error(&server.post(CHAT, &json!({"model": "base", "messages": messages})));
    for (messages, names) in [
        (json!([]), "messages"),
        (json!("hi"), "messages"),
        (json!([3]), "messages[0]"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (json!([{"role": "user", "content": "a"}, {"content": "a"}]), "messages[1].role"),
        (json!([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0]"),
        (json!([{"role": "unheard-of", "content": "a"}]), "no such role"),
    ] {
        let (got, message) = chat(messages.clone());
        assert!(got == 400 && message.contains(names), "{messages}: {got} {message}");
    }
    let status = |method: &str, path: &str, key: Option<&str>, body: &str| server.send(method, path, key, body).0;
    let good = json!({"model": "base", "prompt": "a", "max_tokens": 1}).to_string();
    assert_eq!(status("POST", COMPLETIONS, Some("one"), &good), 200);
    assert_eq!(status("POST", COMPLETIONS, None, &good), 401);
    assert_eq!(status("POST", COMPLETIONS, Some("three"), &good), 401);
    assert_eq!(status("GET", "/v1/models", Some("three"), ""), 401);
    assert_eq!(status("POST", COMPLETIONS, Some("one"), "{"), 400);
    assert_eq!(status("POST", COMPLETIONS, Some("one"), &" ".repeat(5000)), 413);
    assert_eq!(status("GET", COMPLETIONS, Some("one"), ""), 405);
    assert_eq!(status("GET", "/v1/nothing", Some("one"), ""), 404);
    // Without a length that says so before.
    let chunk = format!("{:x}\r\n{}\r\n", 5000, " ".repeat(5000));
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer one\r\n";
    assert!(
        server.raw(format!("{head}Transfer-Encoding: chunked\r\n\r\n{chunk}0\r\n\r\n").as_bytes()).contains(" 413 ")
    );
    assert!(server.raw(b"\x16\x03\x01 this is no HTTP\r\n\r\n").contains(" 400 "));
    assert_eq!(status("POST", COMPLETIONS, Some("one"), &good), 200);
    server.finish();
}

#[test]
fn adapters_come_and_go_behind_the_admin_key() {
    let server = Running::start(|options, _| options.api_keys = vec![ApiKey::new("user")]);
    let third = write(&server.dir.path().join("third"), &kinds()[11].1, &server.model, 5);
    let publish = json!({"name": "third", "path": third}).to_string();
    let status = |method: &str, path: &str, key: Option<&str>, body: &str| server.send(method, path, key, body).0;
    for key in [None, Some("user"), Some("guess")] {
        assert_eq!(status("POST", "/v1/adapters", key, &publish), 401);
        assert_eq!(status("DELETE", "/v1/adapters/style", key, ""), 401);
        assert_eq!(status("GET", "/v1/adapters", key, ""), 401);
    }
    let (got, adapter) = server.post("/v1/adapters", &json!({"name": "third", "path": third}));
    assert_eq!((got, adapter["hash"].as_str().map(str::len)), (200, Some(64)), "{adapter}");
    let request = json!({"model": "third", "prompt": "abc", "max_tokens": 6, "temperature": 0});
    let want = server.expected(Some("third"), "abc", 6);
    assert_eq!(server.post(COMPLETIONS, &request).1["choices"][0]["text"].as_str().unwrap(), want);
    let models: Value = serde_json::from_str(&server.send("GET", "/v1/models", Some("user"), "").1).unwrap();
    let ids: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["base", "other", "style", "third"]);
    assert_eq!(status("GET", "/v1/models/third", Some("user"), ""), 200);

    // What cannot be published leaves what is there.
    let weights = third.join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let broken = server.dir.path().join("broken");
    crate::registry::copy(&third, &broken);
    std::fs::write(broken.join("adapter_model.safetensors"), &bytes[..bytes.len() - 9]).unwrap();
    let wider = base_with(json!({"vocab_size": 257, "hidden_size": 48, "num_attention_heads": 6}));
    let foreign = write(&server.dir.path().join("foreign"), &kinds()[0].1, &wider, 1);
    for (name, path, field) in [
        ("third", broken.display().to_string(), "path"),
        ("third", foreign.display().to_string(), "path"),
        ("third", "/nowhere".into(), "path"),
        ("a/b", third.display().to_string(), "name"),
        ("base", third.display().to_string(), "name"),
    ] {
        let (got, message) = error(&server.post("/v1/adapters", &json!({"name": name, "path": path})));
        assert!(got == 400 && message.starts_with(&format!("\"{field}\"")), "{name} {path}: {got} {message}");
    }
    for (body, field) in [(json!({"name": "x"}), "path"), (json!({"name": 1, "path": "x"}), "name"), (json!([]), "")] {
        let (got, message) = error(&server.post("/v1/adapters", &body));
        assert!(got == 400 && message.contains(field), "{body}: {message}");
    }
    assert_eq!(server.post(COMPLETIONS, &request).1["choices"][0]["text"].as_str().unwrap(), want);
    assert_eq!(status("DELETE", "/v1/adapters/third", Some(ADMIN), ""), 200);
    assert_eq!(status("DELETE", "/v1/adapters/third", Some(ADMIN), ""), 404);
    let (got, message) = error(&server.post(COMPLETIONS, &request));
    assert!(got == 404 && message.contains("model_not_found"), "{message}");
    // A registered adapter whose files are bad is the server's failure, not the caller's.
    server.registry.register([("bad".to_string(), broken)]).unwrap();
    assert_eq!(server.post(COMPLETIONS, &json!({"model": "bad", "prompt": "a"})).0, 503);
    server.finish();
    let closed = Running::start(|options, _| options.admin_key = None);
    assert_eq!(closed.send("POST", "/v1/adapters", Some(ADMIN), &publish).0, 403);
    closed.finish();
}

/// A key for some models sees and asks for these alone; of others it is not told that they are there.
#[test]
fn a_key_has_its_models() {
    let server = Running::start(|options, _| {
        let only = |key: &str, models: &[&str]| ApiKey::new(key).only_for(models.iter().map(|m| m.to_string()));
        options.api_keys =
            vec![ApiKey::new("all"), only("style", &["style", "sty-*"]), only("rest", &["base", "oth*"])];
    });
    let get = |path: &str, key: &str| {
        let (status, body) = server.send("GET", path, Some(key), "");
        (status, serde_json::from_str::<Value>(&body).unwrap())
    };
    for (key, want) in [
        ("all", &["base", "other", "style"][..]),
        (ADMIN, &["base", "other", "style"]),
        ("style", &["style"]),
        ("rest", &["base", "other"]),
    ] {
        let (_, models) = get("/v1/models", key);
        let ids: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
        assert_eq!(ids, want, "{key}");
        // `styl` and `sty-x` are not there; the name that is near is not told to who may not know of it.
        for model in ["base", "other", "style", "styl", "sty-x"] {
            let body = json!({"model": model, "prompt": "a", "max_tokens": 1}).to_string();
            let (status, answer) = server.send("POST", COMPLETIONS, Some(key), &body);
            assert_eq!(status, if want.contains(&model) { 200 } else { 404 }, "{key} {model}: {answer}");
            assert_eq!(get(&format!("/v1/models/{model}"), key).0, status, "{key} {model}");
            if status == 404 {
                assert!(answer.contains("model_not_found"), "{answer}");
                let knows_all = ["all", ADMIN].contains(&key);
                assert_eq!(answer.contains("did you mean `style`"), knows_all, "{key}: {answer}");
            }
        }
    }
    server.finish();
}

/// Every operation of the description is there (schemathesis holds the answers against it, interop/openapi.py).
#[test]
fn the_description_names_what_is_there() {
    let server = Running::start(|_, _| {});
    let described: Value = serde_json::from_str(&server.send("GET", "/openapi.json", None, "").1).unwrap();
    assert_eq!(described["info"]["version"], env!("CARGO_PKG_VERSION"));
    let mut operations = 0;
    for (path, methods) in described["paths"].as_object().unwrap() {
        let path = path.replace("{model}", "style").replace("{name}", "nothing");
        for method in methods.as_object().unwrap().keys() {
            let (status, body) = server.send(&method.to_uppercase(), &path, Some(ADMIN), "");
            assert!(status != 405 && !body.contains("there is no"), "{method} {path}: {status} {body}");
            operations += 1;
        }
        assert_eq!(server.send("PATCH", &path, Some(ADMIN), "").0, 405, "{path}");
    }
    assert_eq!(operations, 10);
    server.finish();
}

/// Clients that go away, that are too many, that are slow, and a server that goes down while it answers.
#[test]
fn clients_that_vanish_wait_or_dawdle_cost_the_others_nothing() {
    let server = Running::start(|options, engine| {
        (engine.max_rows, engine.queue) = (1, 1);
        options.timeout = Duration::from_secs(20);
    });
    let long = |stream: bool| {
        // No end token, or the text would be over too soon.
        json!({"model": "style", "prompt": "abc", "max_tokens": 1000, "temperature": 0, "stream": stream,
               "logit_bias": {"0": -1e6}})
        .to_string()
    };
    let open = |body: &str| {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        stream
    };
    let running = open(&long(true));
    server.wait_until("one runs", |s| s.running == 1);
    let waiting = open(&long(false));
    server.wait_until("one waits", |s| s.waiting == 1);
    let (got, message) = error(&server.post(COMPLETIONS, &json!({"model": "base", "prompt": "a"})));
    assert!(got == 429 && message.contains("queue_full"), "{message}");
    drop((running, waiting));
    server.wait_until("both are forgotten", |s| s.running + s.waiting == 0 && s.cancelled == 2);
    // A client that sends half a body and waits has no place in the batch.
    let mut half = TcpStream::connect(server.address).unwrap();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{\"model\":").unwrap();
    let short = json!({"model": "base", "prompt": "a", "max_tokens": 3});
    assert_eq!(server.post(COMPLETIONS, &short).0, 200);
    let metrics = server.send("GET", "/metrics", None, "").1;
    for line in [
        "peft_sequences_cancelled_total 2",
        "peft_adapters_registered 2",
        "peft_http_requests_total{route=\"/v1/completions\",status=\"429\"} 1",
        "peft_first_token_seconds_count",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    assert_eq!(server.send("GET", "/health", None, "").0, 200);
    drop(half);
    // Its answer may be here before its place is free.
    server.wait_until("the short one is over", |s| s.running == 0);
    // It is finished before the server is.
    let mut last = open(&long(false).replace("1000", "300"));
    server.wait_until("it runs", |s| s.running == 1);
    server.finish();
    let mut answer = String::new();
    last.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 200 OK") && answer.contains("\"completion_tokens\":300"), "{answer}");
}

#[test]
fn what_takes_too_long_is_over() {
    let server = Running::start(|options, _| options.timeout = Duration::from_millis(30));
    let body = json!({"model": "base", "prompt": "abc", "max_tokens": 1000, "logit_bias": {"0": -1e6}});
    let (got, message) = error(&server.post(COMPLETIONS, &body));
    assert!(got == 408 && message.contains("timeout"), "{got} {message}");
    let mut streamed = body;
    streamed["stream"] = true.into();
    let (status, text) = server.send("POST", COMPLETIONS, None, &streamed.to_string());
    let last = text.lines().filter_map(|l| l.strip_prefix("data: ")).next_back().unwrap_or_default();
    assert!(status == 200 && last.contains("timeout_error"), "{text}");
    let mut half = TcpStream::connect(server.address).unwrap();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{").unwrap();
    let mut answer = String::new();
    half.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 408 "), "{answer}");
    server.wait_until("none is left", |s| s.running + s.waiting == 0 && s.cancelled == 2);
    server.finish();
}

/// The page's files, which only this server's may join (a headless Chromium uses it, interop/page.py).
#[test]
fn the_page_and_what_it_loads_are_there() {
    let server = Running::start(|_, _| {});
    let (status, page) = server.send("GET", "/", None, "");
    assert!(status == 200 && page.contains("<!doctype html>"), "{status} {page}");
    for (file, holds) in [("page.js", "fetch("), ("page.css", "body {")] {
        assert!(page.contains(file), "{page}");
        let (status, text) = server.send("GET", &format!("/{file}"), None, "");
        assert!(status == 200 && text.contains(holds), "{status} {text}");
    }
    assert!(
        !page.contains("<script>") && !page.contains("style="),
        "the policy allows no code or style in the page itself"
    );
    server.finish();
}
