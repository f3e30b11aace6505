#!/usr/bin/env bash
# The same short fine-tune here and in Hugging Face PEFT, one after the other: accuracy before and after, seconds of training.
#
#     bench/learning.sh TRAIN.jsonl TEST.jsonl          # rows {"prompt", "completion"}; the two completions are the choices
#
# SmolLM2-135M from its .gguf in f32, LoRA of rank 16 on all linear layers, one epoch, batch 16, learning rate 2e-4, linear
# with 10 steps of warm-up.
set -euo pipefail
cd "$(dirname "$0")/.."
train=$(realpath "$1") test=$(realpath "$2")
model=$(scripts/fetch-models.sh smollm2)
python=$(scripts/python-env.sh)
cargo build --release --quiet -p peft-cli
cli=${CARGO_TARGET_DIR:-target}/release/peft-cli
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

mapfile -t choices < <(python3 -c 'import json,sys; print(*sorted({json.loads(l)["completion"] for l in open(sys.argv[1])}), sep="\n")' "$test")
evaluate() { # [--adapter DIR]
    "$cli" eval --model "$model" "$@" --data "$test" --format completion --dtype f32 --json "${choices[@]/#/--choice=}" 2>"$out/log" |
        tail -1 | python3 -c 'import json,sys; print(json.loads(sys.stdin.readline())["accuracy"])'
}
before=$(evaluate)
"$cli" train --model "$model" --data "$train" --format completion --output "$out/adapter" --json --set model.dtype=f32 \
    --set method.r=16 --set method.lora_alpha=16 --set method.target_modules=all-linear --set train.batch_size=16 \
    --set train.learning_rate=2e-4 --set train.scheduler=linear --set train.warmup_steps=10 --set train.weight_decay=0 \
    --set output.save_every=0 2>"$out/log" >"$out/result"
seconds=$(tail -1 "$out/result" | python3 -c 'import json,sys; print(round(json.loads(sys.stdin.readline())["seconds"], 1))')
echo "ours  {\"before\": $before, \"after\": $(evaluate --adapter "$out/adapter"), \"training_seconds\": $seconds}"
echo "hf    $("$python" bench/hf_learn.py --model "$model" --train "$train" --test "$test" 2>"$out/log")"
