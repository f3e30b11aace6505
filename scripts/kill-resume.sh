#!/usr/bin/env bash
# Kills a training run (SIGKILL) at random moments, resumes it each time, and compares the adapter with an undisturbed
# run's, byte by byte. The base is a small random one with the quickstart's tokenizer, the rows are the quickstart's.
#
#     scripts/kill-resume.sh [KILLS=50] [CLI=target/release/peft-cli]
#
# Runs start anew until KILLS kills have happened. The last line is `KILLS kills, identical`. A difference, a resumed run
# that fails, or a lost or doubled row of metrics.jsonl ends the script with status 1.
set -euo pipefail
cli=$(realpath -m "${2:-${CARGO_TARGET_DIR:-$(dirname "$0")/../target}/release/peft-cli}")
cd "$(dirname "$0")/.."

kills=${1:-50} steps=${STEPS:-48}
[ -x "$cli" ] || { echo "kill-resume.sh: $cli is not there; cargo build --release -p peft-cli" >&2; exit 2; }
work=$(mktemp -d)
child=
trap '[ -z "$child" ] || kill -9 "$child" 2>/dev/null || true; rm -rf "$work"' EXIT
fail() { echo "kill-resume.sh: $*" >&2; cat "$work/log" >&2; exit 1; }

cp -r examples/quickstart/base "$work/base"
sed -i -e 's/"hidden_size": .*/"hidden_size": 64,/' -e 's/"intermediate_size": .*/"intermediate_size": 128,/' \
    -e 's/"num_hidden_layers": .*/"num_hidden_layers": 2,/' -e 's/"head_dim": .*/"head_dim": 16,/' "$work/base/config.json"
head -n 64 examples/quickstart/data/style.train.jsonl >"$work/train.jsonl"

# Dropout, accumulation and shuffling are on: each has state that a resumed run must find again.
train=("$cli" train --model "$work/base" --data "$work/train.jsonl" --format completion --method lora --set model.init=random
    --set method.r=4 --set method.lora_dropout=0.1 --set 'method.target_modules="all-linear"' --set data.max_length=64
    --set train.max_steps="$steps" --set train.batch_size=2 --set train.gradient_accumulation=2
    --set train.learning_rate=3e-3 --set output.save_every=2)
milliseconds() { echo $(($(date +%s%N) / 1000000)); }
steps_of() { sed -n 's/.*"step": *\([0-9]*\).*/\1/p' "$1/metrics.jsonl"; }

began=$(milliseconds)
"${train[@]}" --output "$work/whole" >"$work/log" 2>&1 || fail "the undisturbed run failed"
whole=$(($(milliseconds) - began))
echo "undisturbed: $steps steps in $whole ms" >&2

killed=0 runs=0
while [ "$killed" -lt "$kills" ]; do
    runs=$((runs + 1)) out=$work/run finished=
    rm -rf "$out"
    until [ -n "$finished" ]; do
        "${train[@]}" --output "$out" --resume >"$work/log" 2>&1 &
        child=$!
        if [ "$killed" -lt "$kills" ]; then
            # Anywhere in a start-up or in the first half of what a whole run takes: the run still gets on.
            delay=$(((RANDOM * 32768 + RANDOM) % (whole / 2 + 1)))
            sleep "$(printf '%d.%03d' $((delay / 1000)) $((delay % 1000)))"
            kill -9 "$child" 2>/dev/null || true
        fi
        status=0
        wait "$child" 2>/dev/null || status=$?
        child=
        case $status in
            0) finished=1 ;;
            137) killed=$((killed + 1)) ;;
            *) fail "run $runs ended with status $status after $killed kills" ;;
        esac
    done
    cmp "$work/whole/adapter_model.safetensors" "$out/adapter_model.safetensors" || fail "run $runs differs"
    [ "$(steps_of "$out")" = "$(seq "$steps")" ] || fail "run $runs: metrics.jsonl has not one row a step"
    echo "run $runs: identical after $killed kills" >&2
done
echo "$killed kills, identical"
