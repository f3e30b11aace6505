#![allow(clippy::unwrap_used)]
use std::io::{Read, Write};

use peft_train::checkpoint::write_adapter_files;

use super::*;

fn ask(address: std::net::SocketAddr, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_writes_through_what_is_published() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quickstart/base");
    let model = ModelFiles::open(&base).unwrap().load_decoder(&Placement::cpu(None), 0).unwrap();
    // An adapter that takes all logits another way: its last norm is negative.
    let table = serde_json::json!({"type": "ln", "target_modules": ["norm"]});
    let adapter = methods::create(table.as_object().unwrap(), &model, 0).unwrap().adapter;
    for p in adapter.parameters() {
        p.set(&p.value().neg().unwrap()).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    write_adapter_files(&dir.path().join("odd"), &adapter).unwrap();

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router(app(&base).unwrap())).await });
    tokio::task::spawn_blocking(move || {
        let prompt = "Once upon a time there was a brave dog named Rex.";
        let (status, plain) = ask(address, "POST", "/base", prompt);
        assert!(status == 200 && plain.len() > 20, "{status} {plain}");
        assert_eq!(ask(address, "POST", "/odd", prompt).0, 404);
        let folder = dir.path().join("odd").display().to_string();
        assert_eq!(ask(address, "PUT", "/odd", &folder).0, 200);
        let (status, odd) = ask(address, "POST", "/odd", prompt);
        assert!(status == 200 && odd != plain, "{status} {odd}");
        assert_eq!(ask(address, "POST", "/base", prompt), (200, plain));
        assert_eq!(ask(address, "POST", "/base", "").0, 400);
        assert_eq!(ask(address, "PUT", "/bad", "/nowhere").0, 400);
    })
    .await
    .unwrap();
}
