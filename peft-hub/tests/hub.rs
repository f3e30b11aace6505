//! `resolve` against a hub on loopback: what is downloaded, what is not, and what happens when things go wrong.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod common;

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{COMMIT, Hub, sha256};
use peft_hub::{Event, HubError, Kind, Location, Options, resolve};

const SPEC: &str = "org/name";

struct Desk {
    hub: Hub,
    options: Options,
    cache: PathBuf,
    events: Arc<Mutex<Vec<String>>>,
    _folder: tempfile::TempDir,
}

impl Desk {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let hub = Hub::new(files);
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("hub");
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = events.clone();
        let mut options = Options::from_variables(|_| None).with_progress(move |event| {
            sink.lock().unwrap().push(match event {
                Event::Start { file, size, have } => format!("start {file} {have}/{size:?}"),
                Event::Advance { .. } => return,
                Event::Done { file } => format!("done {file}"),
                Event::Note { message } => format!("note {message}"),
                _ => return,
            });
        });
        options.endpoint = format!("http://{}", hub.address);
        options.cache = Some(cache.clone());
        options.retry_wait = Duration::from_millis(1);
        Self { hub, options, cache, events, _folder: folder }
    }

    fn model(&self) -> Result<Location, HubError> {
        resolve(SPEC, Kind::Model, &self.options)
    }

    fn error(&self, spec: &str) -> String {
        resolve(spec, Kind::Model, &self.options).unwrap_err().to_string()
    }

    fn events(&self) -> Vec<String> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    fn blobs(&self) -> PathBuf {
        self.cache.join("models--org--name/blobs")
    }
}

fn weights() -> Vec<u8> {
    (0..700_001_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn model(weights: &[u8]) -> Desk {
    Desk::new(&[
        ("config.json", b"{\"model_type\":\"llama\"}"),
        ("tokenizer.json", b"{}"),
        ("README.md", b"# not needed"),
        ("pytorch_model.bin", b"not needed"),
        ("onnx/model.onnx", b"not needed"),
        ("model.safetensors", weights),
    ])
}

#[test]
fn a_model_comes_with_what_it_needs_and_no_more() {
    let weights = weights();
    let desk = model(&weights);
    let Location::Folder(folder) = desk.model().unwrap() else {
        panic!("a folder");
    };
    let mut names: Vec<String> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights);
    // the layout that huggingface_hub reads
    assert!(folder.ends_with(format!("models--org--name/snapshots/{COMMIT}")));
    assert_eq!(fs::read_to_string(desk.cache.join("models--org--name/refs/main")).unwrap(), COMMIT);
    assert_eq!(fs::read(desk.blobs().join(sha256(&weights))).unwrap(), weights);
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(folder.join("config.json")).unwrap().parent().unwrap(),
        std::path::Path::new("../../blobs")
    );
    assert!(desk.events().contains(&"done model.safetensors".to_owned()));

    // again: one question about the commit, no file
    desk.hub.take_log();
    desk.model().unwrap();
    assert_eq!(desk.hub.take_log(), ["GET /api/models/org/name/revision/main"]);
    // by its commit: no question at all
    resolve(&format!("{SPEC}@{COMMIT}"), Kind::Model, &desk.options).unwrap();
    assert!(desk.hub.take_log().is_empty());
}

#[test]
fn a_sharded_model_follows_its_index() {
    let index = br#"{"metadata":{},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors","c":"model-00001-of-00002.safetensors"}}"#;
    let desk = Desk::new(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("model-00001-of-00002.safetensors", b"one"),
        ("model-00002-of-00002.safetensors", b"two"),
        ("consolidated.safetensors", b"not needed"),
    ]);
    let folder = desk.model().unwrap();
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("model-00001-of-00002.safetensors"), b"one");
    assert_eq!(read("model-00002-of-00002.safetensors"), b"two");
    assert!(!folder.path().join("consolidated.safetensors").exists());
}

#[test]
fn a_hostile_index_is_refused() {
    for (index, text) in [
        (&b"{\"weight_map\":{\"a\":\"../../../x.safetensors\"}}"[..], "no safetensors file beside it"),
        (b"{\"weight_map\":{\"a\":7}}", "no safetensors file beside it"),
        (b"{\"weight_map\":{}}", "0 shards"),
        (b"{}", "no weight_map"),
        (b"{\"weight_map\":", "EOF"),
        (b"{\"weight_map\":{\"a\":\"gone.safetensors\"}}", "holds no gone.safetensors"),
    ] {
        let desk = Desk::new(&[("config.json", b"{}"), ("model.safetensors.index.json", index)]);
        let error = desk.error(SPEC);
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn an_adapter_is_two_files() {
    let desk = Desk::new(&[
        ("adapter_config.json", b"{}"),
        ("adapter_model.safetensors", b"weights"),
        ("tokenizer.json", b"not needed"),
    ]);
    let folder = resolve(SPEC, Kind::Adapter, &desk.options).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    assert!(desk.error(SPEC).contains("give it with --adapter"));

    let names =
        ["adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors", "README.md"];
    let desk = Desk::new(&names.map(|name| (name, &b"{}"[..])));
    let folder = resolve(SPEC, Kind::Adapter, &desk.options).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
    for pickle in ["adapter_model.bin", "pytorch_adapter.bin"] {
        let desk = Desk::new(&[("adapter_config.json", b"{}"), (pickle, b"")]);
        let error = resolve(SPEC, Kind::Adapter, &desk.options).unwrap_err().to_string();
        assert!(error.contains(pickle), "{error}");
    }
}

#[test]
fn gguf_repositories() {
    let one = Desk::new(&[("m-Q8_0.gguf", b"GGUF"), ("README.md", b"")]);
    let Location::Gguf(file) = one.model().unwrap() else {
        panic!("a file");
    };
    assert_eq!(fs::read(file).unwrap(), b"GGUF");

    let two = Desk::new(&[("a.gguf", b"a"), ("q/b.gguf", b"b")]);
    assert!(two.error(SPEC).contains("name one of its GGUF files"), "{}", two.error(SPEC));
    let Location::Gguf(file) = resolve("org/name/q/b.gguf@v1.0", Kind::Model, &two.options).unwrap() else {
        panic!("a file");
    };
    assert_eq!(fs::read(file).unwrap(), b"b");
    assert!(two.error("org/name/c.gguf").contains("a.gguf, q/b.gguf"));
}

#[test]
fn the_token_is_sent_to_the_endpoint_and_its_redirects_are_followed() {
    let mut desk = model(&weights());
    desk.hub.faults(|faults| faults.token = Some("secret".to_owned()));
    let error = desk.error(SPEC);
    assert!(error.contains("HTTP 401") && error.contains("set HF_TOKEN"), "{error}");
    desk.options.token = Some("wrong".to_owned());
    assert!(desk.error(SPEC).contains("token in HF_TOKEN is not valid"));
    desk.options.token = Some("secret".to_owned());
    desk.model().unwrap();
    // a renamed repository answers with a redirect
    resolve("org/renamed", Kind::Model, &desk.options).unwrap();
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let weights = weights();
    let desk = model(&weights);
    desk.hub.faults(|faults| faults.cut_after = vec![300_000, 0, 200_000]);
    let folder = desk.model().unwrap();
    assert_eq!(fs::read(folder.path().join("model.safetensors")).unwrap(), weights);
    let log = desk.hub.take_log();
    let ranges: Vec<u64> = log
        .iter()
        .filter_map(|line| line.strip_prefix("GET /cdn/model.safetensors bytes="))
        .map(|range| range.trim_end_matches('-').parse().unwrap())
        .collect();
    // each try asks for what is still missing: as much as had arrived, nothing more, then the rest
    assert_eq!(ranges.len(), 3, "{log:?}");
    assert!(ranges[0] > 0 && ranges[0] <= 300_000, "{ranges:?}");
    assert_eq!(ranges[1], ranges[0]);
    assert!(ranges[2] > ranges[1] && ranges[2] <= 500_000, "{ranges:?}");
}

#[test]
fn a_download_broken_too_often_is_resumed_by_the_next_run() {
    let weights = weights();
    let mut desk = model(&weights);
    desk.options.retries = 1;
    desk.hub.faults(|faults| faults.cut_after = vec![200_000; 2]);
    let error = desk.error(SPEC);
    assert!(error.contains("of 700001 bytes") && error.contains("again"), "{error}");
    desk.hub.take_log();
    desk.model().unwrap();
    let log = desk.hub.take_log();
    assert_eq!(log.iter().filter(|line| line.starts_with("GET /cdn/")).count(), 1);
    assert!(log.iter().any(|line| line.contains("bytes=")), "{log:?}");
}

#[test]
fn a_server_without_ranges_sends_all_again() {
    let weights = weights();
    let desk = model(&weights);
    desk.hub.faults(|faults| {
        faults.cut_after = vec![300_000];
        faults.ignore_range = true;
    });
    let folder = desk.model().unwrap();
    assert_eq!(fs::read(folder.path().join("model.safetensors")).unwrap(), weights);
}

#[test]
fn parts_of_an_earlier_run_are_checked() {
    let weights = weights();
    // complete, but never renamed; longer than the file; other bytes altogether
    for part in [weights.clone(), vec![0; 800_000], vec![7; 1000]] {
        let desk = model(&weights);
        fs::create_dir_all(desk.blobs()).unwrap();
        fs::write(desk.blobs().join(format!("{}.part", sha256(&weights))), &part).unwrap();
        let folder = desk.model().unwrap();
        assert_eq!(fs::read(folder.path().join("model.safetensors")).unwrap(), weights);
    }
}

#[test]
fn damage_is_noticed_once_forgiven_and_never_kept() {
    let weights = weights();
    let desk = model(&weights);
    desk.hub.faults(|faults| faults.damage = 1);
    desk.model().unwrap();

    let desk = model(&weights);
    desk.hub.faults(|faults| faults.damage = 2);
    let error = desk.error(SPEC);
    assert!(error.contains("SHA-256 differs"), "{error}");
    let left: Vec<_> = fs::read_dir(desk.blobs()).unwrap().collect();
    assert!(!desk.blobs().join(sha256(&weights)).exists(), "{left:?}");
}

#[test]
fn a_body_without_a_length_that_ends_early_is_not_taken_for_the_file() {
    let weights = weights();
    let mut desk = model(&weights);
    desk.options.retries = 0;
    desk.hub.faults(|faults| {
        faults.no_length = true;
        faults.cut_after = vec![1000];
    });
    assert!(desk.error(SPEC).contains("broke off at 1000 of 700001"));
    desk.options.retries = 1;
    desk.model().unwrap();
}

#[test]
fn what_does_not_exist() {
    let desk = model(b"w");
    let error = desk.error("org/nothing");
    assert!(error.contains("no such repository") && error.contains("no folder of that name"), "{error}");
    let error = desk.error("org/name@v9");
    assert!(error.contains("no revision `v9`"), "{error}");
    resolve("org/name@refs/pr/1", Kind::Model, &desk.options).unwrap();
    let bin = Desk::new(&[("config.json", b"{}"), ("pytorch_model.bin", b"")]);
    assert!(bin.error(SPEC).contains("only pickled weights"));
    let empty = Desk::new(&[]);
    assert!(empty.error(SPEC).contains("holds no config.json"));
}

#[test]
fn refusals_say_what_to_do() {
    for (status, code, text) in [
        (403, "GatedRepo", "accept its terms at"),
        (403, "", "set HF_TOKEN"),
        (401, "RepoNotFound", "no such repository"),
        (429, "", "too many requests"),
        (500, "", "the hub has trouble"),
        (418, "", "HTTP 418"),
    ] {
        let desk = model(b"w");
        desk.hub.faults(|faults| faults.status = Some((status, code)));
        let error = desk.error(SPEC);
        assert!(error.contains(text), "{status}: {error}");
    }
    let desk = model(b"w");
    desk.hub.faults(|faults| faults.busy = 2);
    desk.model().unwrap();
}

#[test]
fn offline_uses_the_cache_only_and_says_what_is_missing() {
    let mut desk = model(b"weights");
    desk.options.offline = true;
    let error = desk.error(SPEC);
    assert!(
        error.contains("offline")
            && error.contains("copy of this model")
            && error.contains(desk.cache.to_str().unwrap()),
        "{error}"
    );
    desk.options.offline = false;
    let online = desk.model().unwrap();
    desk.options.offline = true;
    desk.hub.take_log();
    assert_eq!(desk.model().unwrap(), online);
    assert!(desk.hub.take_log().is_empty());
    assert!(desk.error("org/name@v1.0").contains("copy of this model"));
    fs::remove_file(online.path().join("model.safetensors")).unwrap();
    assert!(desk.error(SPEC).contains("holds no model.safetensors"));
}

#[test]
fn an_unreachable_hub_falls_back_to_the_cache() {
    let mut desk = model(b"weights");
    let online = desk.model().unwrap();
    // a port that nobody listens on
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    desk.options.endpoint = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    desk.events();
    assert_eq!(desk.model().unwrap(), online);
    assert!(desk.events()[0].contains("using the copy of org/name in the cache"));
    let error = desk.error("org/other");
    assert!(error.contains("onnection refused") && error.contains("HF_HUB_OFFLINE=1"), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_called_one() {
    let weights = weights();
    let desk = model(&weights);
    fs::create_dir_all(desk.blobs()).unwrap();
    let part = desk.blobs().join(format!("{}.part", sha256(&weights)));
    std::os::unix::fs::symlink("/dev/full", part).unwrap();
    let error = desk.error(SPEC);
    assert!(error.contains("no space left on the disk"), "{error}");
}

#[test]
fn malformed_answers_are_errors() {
    for etag in ["../../escape", "", ".hidden", "a/b"] {
        let desk = model(b"w");
        desk.hub.faults(|faults| faults.etag = Some(etag.to_owned()));
        let error = desk.error(SPEC);
        assert!(error.contains("no usable ETag"), "{etag}: {error}");
    }
    let desk = model(b"w");
    desk.hub.faults(|faults| faults.no_location = true);
    assert!(desk.error(SPEC).contains("a redirect without an address"));
    let mut desk = model(b"w");
    desk.options.endpoint = "huggingface.co".to_owned();
    assert!(desk.error(SPEC).starts_with("HF_ENDPOINT: "));
    desk.options.endpoint = format!("http://{}", desk.hub.address);
    desk.options.token = Some("two\nlines".to_owned());
    assert!(desk.error(SPEC).starts_with("HF_TOKEN: "));
    desk.options.cache = None;
    assert!(desk.error(SPEC).starts_with("HF_HOME: "));
}

#[test]
fn two_processes_share_one_download() {
    let weights = weights();
    let desk = model(&weights);
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| desk.model().unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    let gets = desk.hub.take_log().iter().filter(|line| line.starts_with("GET /cdn/")).count();
    assert_eq!(gets, 1);
}

#[test]
fn a_mistyped_folder_never_reaches_the_hub() {
    let desk = model(b"w");
    let error = desk.error("./modle");
    assert!(error.starts_with("./modle: no such folder, and not a hub id"), "{error}");
    assert!(desk.hub.take_log().is_empty());
}
