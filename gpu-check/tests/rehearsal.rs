//! The program as a user runs it, on the CPU.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::{Command, Output};

fn gpu_check(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gpu-check")).args(args).output().unwrap()
}

#[test]
fn the_cpu_rehearsal_passes() {
    let out = gpu_check(&["--device", "cpu", "--small", "--repeat", "1"]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    assert!(text.contains(" 0 BAD"), "{text}");
    for op in ["frozen_linear gguf q4k", "attention cached", "linear_cross_entropy", "routed_linear", "step 10"] {
        assert!(text.matches(op).count() >= 3, "{op} is not checked in three types: {text}");
    }
}

#[test]
fn what_cannot_run_is_one_line_with_a_way_out() {
    for (args, say) in [
        (&["--device", "tpu"][..], "use cuda:0, metal or cpu"),
        (&["--device", "cuda:x"], "not a device number"),
        // Without the feature, or with it and no card at number 99.
        (&["--device", "cuda:99"], "--device cpu"),
        (&["--device", "metal"], "--device cpu"),
        (&["--device", "cpu", "--dtypes", "f8"], "use f32, bf16 or f16"),
        (&["--device", "cpu", "--small", "--only", "nothing"], "without --only"),
    ] {
        let out = gpu_check(args);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {text}");
        assert!(text.starts_with("error: ") && text.trim_end().lines().count() == 1 && text.contains(say), "{text}");
    }
}
