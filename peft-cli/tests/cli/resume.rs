//! A run that was stopped ends as if it had not been.
#![cfg(unix)]

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{Dir, Ran, steps};

const STEPS: usize = 60;

fn settings() -> Vec<&'static str> {
    vec!["--set", "train.max_steps=60", "--set", "train.gradient_accumulation=2", "--set", "output.save_every=2"]
}

fn start(dir: &Dir, resume: bool) -> Child {
    let mut more = settings();
    if resume {
        more.push("--resume");
    }
    let args = dir.train_args(&more);
    let mut command = dir.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn rows(dir: &Dir) -> usize {
    std::fs::read(dir.path("out/metrics.jsonl")).map_or(0, |text| text.iter().filter(|&&b| b == b'\n').count())
}

/// Waits until `metrics.jsonl` has more than `beyond` rows; false if the run ended before.
fn wait_for_rows(dir: &Dir, child: &mut Child, beyond: usize) -> bool {
    let started = Instant::now();
    while rows(dir) <= beyond {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(started.elapsed() < Duration::from_secs(300), "no step for five minutes");
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

fn undisturbed() -> Vec<u8> {
    let dir = Dir::new();
    dir.train(&settings()).ok();
    dir.read("out/adapter_model.safetensors")
}

/// Trains to the end, and elsewhere again, where the result is lost and resumed from the checkpoint: it has to be the same.
/// Gives the first folder, and what the first run and the resumed one said.
fn whole_and_resumed(settings: &[&str]) -> (Dir, Ran, Ran) {
    let (whole, dir, file) = (Dir::new(), Dir::new(), "out/adapter_model.safetensors");
    let first = whole.train(settings).ok();
    dir.train(settings).ok();
    std::fs::remove_file(dir.path(file)).unwrap();
    let resumed = dir.train(&[settings, &["--resume"]].concat()).ok();
    assert!(dir.read(file) == whole.read(file), "the adapter differs");
    (whole, first, resumed)
}

fn assert_one_row_a_step(dir: &Dir) {
    let numbers: Vec<_> = steps(dir, "out").iter().map(|s| s["step"].as_u64().unwrap() as usize).collect();
    assert_eq!(numbers, (1..=STEPS).collect::<Vec<_>>());
}

#[test]
fn killed_at_random_moments() {
    let whole = undisturbed();
    let dir = Dir::new();
    let mut kills = 0;
    for i in 0..5 {
        let mut child = start(&dir, true);
        // The times differ from run to run: a little random, and nothing more is asked of it.
        let noise = u64::from(std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos());
        let beyond = rows(&dir) + (noise % 5) as usize;
        if i != 1 && !wait_for_rows(&dir, &mut child, beyond) {
            break;
        }
        std::thread::sleep(Duration::from_micros(noise % 20_000));
        child.kill().unwrap();
        kills += usize::from(child.wait().unwrap().code().is_none());
    }
    assert!(kills >= 3, "only {kills} kills before the run ended");
    let mut more = settings();
    more.push("--resume");
    let last = dir.train(&more).ok();
    assert!(last.stderr.contains("resuming after step"), "{}", last.stderr);
    assert!(dir.read("out/adapter_model.safetensors") == whole, "the adapter differs after {kills} kills");
    assert_one_row_a_step(&dir);
}

#[test]
fn interrupted_once() {
    let dir = Dir::new();
    let mut child = start(&dir, false);
    assert!(wait_for_rows(&dir, &mut child, 4), "the run was over before it could be interrupted");
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let out = child.wait_with_output().unwrap();
    let ran = Ran { code: out.status.code(), stdout: String::new(), stderr: String::from_utf8(out.stderr).unwrap() };
    ran.fails(&["interrupted", "--resume", "checkpoints/step-"]);
    assert!(!dir.path("out/adapter_model.safetensors").exists());

    let mut more = settings();
    more.push("--resume");
    dir.train(&more).ok();
    assert!(dir.read("out/adapter_model.safetensors") == undisturbed(), "the adapter differs");
    assert_one_row_a_step(&dir);
}

#[test]
fn a_checkpoint_of_another_recipe_is_refused() {
    let dir = Dir::new();
    dir.train(&["--set", "output.save_every=2"]).ok();
    dir.train(&["--resume", "--set", "output.save_every=2", "--set", "train.learning_rate=0.5"])
        .fails(&["step-4", "another run"]);
    // Resuming a finished run changes nothing.
    let before = dir.read("out/adapter_model.safetensors");
    dir.train(&["--resume", "--set", "output.save_every=2"]).ok();
    assert!(dir.read("out/adapter_model.safetensors") == before);
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let dir = Dir::new();
    dir.train(&["--set", "output.save_every=2"]).ok();
    let file = dir.path("out/checkpoints/step-4/adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    dir.train(&["--resume", "--set", "output.save_every=2"]).fails(&["step-4"]);
}

/// What AdaLoRA's allocator remembers is in the checkpoint, between two allocations as well.
#[test]
fn moving_ranks_resume() {
    let adalora = [
        "--set",
        "method.type=adalora",
        "--set",
        "method.init_r=4",
        "--set",
        "method.target_r=2",
        "--set",
        "method.total_step=6",
        "--set",
        "method.tfinal=1",
        "--set",
        "method.deltaT=2",
        "--set",
        "train.max_steps=6",
        "--set",
        "output.save_every=3",
    ];
    let (dir, ..) = whole_and_resumed(&adalora);
    let config: serde_json::Value = serde_json::from_slice(&dir.read("out/adapter_config.json")).unwrap();
    let flags = config["rank_pattern"].as_object().unwrap().values().flat_map(|kept| kept.as_array().unwrap());
    let (kept, dropped): (Vec<_>, Vec<_>) = flags.partition(|kept| kept.as_bool().unwrap());
    assert_eq!(kept.len(), dropped.len());
}

/// What EVA found in the data, ranks included, comes from the checkpoint: the data is not looked at again.
#[test]
fn a_start_from_data_resumes() {
    let eva = ["--set", "method.init_lora_weights=eva", "--set", "output.save_every=2"];
    let (_, first, resumed) = whole_and_resumed(&eva);
    assert!(first.stderr.contains("eva: principal components"), "{}", first.stderr);
    assert!(!resumed.stderr.contains("eva: principal components"), "{}", resumed.stderr);
}
