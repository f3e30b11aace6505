#!/usr/bin/env bash
# Every check of the project, in order, stopping at the first that fails:
#
#   fmt       cargo fmt --check
#   clippy    cargo clippy --workspace --all-targets -- -D warnings
#   test      cargo test --workspace (unit, conformance, command line and documentation tests)
#   doc       cargo doc --no-deps with warnings as errors
#   release   cargo build --release -p peft-cli
#   models    tests that need a real model (marked #[ignore]), then interop/real_model.py; scripts/fetch-models.sh fetches it
#   interop   interop/run.sh: peft-cli beside Hugging Face PEFT; scripts/python-env.sh makes the Python (1.4 GB)
#   cuda      scripts/check-cuda.sh: the cuda feature type-checked without CUDA, our own kernels compiled by nvcc (105 MB, once)
#
#     scripts/test.sh                     all of them, as CI does
#     scripts/test.sh fmt clippy test     these only
#     SKIP=models,interop scripts/test.sh all but these
#
# models and interop download from PyPI (0.7 GB in all, once); everything is kept in target/.
# The last line is `N passed, N failed`, counting stages.
set -uo pipefail
cd "$(dirname "$0")/.."

all=(fmt clippy test doc release models interop cuda)
stages=("$@")
[ $# -gt 0 ] || stages=("${all[@]}")
for stage in "${stages[@]}" ${SKIP:+${SKIP//,/ }}; do
    case " ${all[*]} " in
        *" $stage "*) ;;
        *) echo "test.sh: no stage is called $stage; there are ${all[*]}" >&2; exit 2 ;;
    esac
done
export CARGO_TERM_PROGRESS_WHEN=never

fmt() { cargo fmt --all --check; }
clippy() { cargo clippy --workspace --all-targets -- -D warnings; }
test_() { cargo test --workspace; }
doc() { RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps; }
release() { cargo build --release -p peft-cli; }
models() {
    local smollm2 python
    smollm2=$(scripts/fetch-models.sh smollm2) && python=$(scripts/python-env.sh) || return
    PEFT_GGUF=$smollm2 cargo test --workspace --tests -- --ignored &&
        "$python" interop/real_model.py "$(release_cli)" "$smollm2"
}
interop() { interop/run.sh "$(release_cli)"; }
cuda() {
    # In CI's fresh clone nothing was built with a real nvcc, so what clippy compiled can be used again: 5 minutes less.
    CHECK_CUDA_KERNELS=${CHECK_CUDA_KERNELS:-1} CUDA_CHECK_TARGET=${CUDA_CHECK_TARGET:-$([ -n "${CI:-}" ] && echo "$target" || echo "$target/check-cuda")} \
        scripts/check-cuda.sh
}
target=${CARGO_TARGET_DIR:-target}
release_cli() { echo "$target/release/peft-cli"; }

passed=0 failed=0
summary=
for stage in "${stages[@]}"; do
    case ",${SKIP:-}," in
        *",$stage,"*) summary+=$(printf '\n  %-8s skipped' "$stage"); continue ;;
    esac
    printf '\n=== %s ===\n' "$stage"
    began=$SECONDS
    case $stage in
        test) run=test_ ;;
        *) run=$stage ;;
    esac
    if $run; then
        passed=$((passed + 1)) result=passed
    else
        failed=$((failed + 1)) result=FAILED
    fi
    took=$((SECONDS - began))
    printf '=== %s %s after %d s ===\n' "$stage" "$result" "$took"
    summary+=$(printf '\n  %-8s %s %5d s' "$stage" "$result" "$took")
    [ $failed = 0 ] || break
done
printf '\nstages, %d s in all:%s\n%d passed, %d failed\n' "$SECONDS" "$summary" "$passed" "$failed"
[ $failed = 0 ]
