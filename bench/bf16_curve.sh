#!/usr/bin/env bash
# The loss curve of a bf16 base beside that of f32, same recipe, rows and start: how far apart they are.
#
#     bench/bf16_curve.sh TRAIN.jsonl TEST.jsonl        # rows in any format that train reads
#
# SmolLM2-135M from its .gguf, LoRA of rank 16 on all linear layers, one epoch, batch 16, learning rate 2e-4, linear with
# 10 steps of warm-up (as bench/learning.sh). Losses of single steps, means over ten, and the loss on TEST at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
train=$(realpath "$1") test=$(realpath "$2")
model=$(scripts/fetch-models.sh smollm2)
cargo build --release --quiet -p peft-cli
cli=${CARGO_TARGET_DIR:-target}/release/peft-cli
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

for dtype in f32 bf16; do
    "$cli" train --model "$model" --data "$train" --output "$out/$dtype" --json \
        --set model.dtype=$dtype --set method.r=16 --set method.lora_alpha=16 --set method.target_modules=all-linear \
        --set data.eval="$test" --set train.batch_size=16 --set train.learning_rate=2e-4 --set train.scheduler=linear \
        --set train.warmup_steps=10 --set output.save_every=0 >"$out/result" 2>"$out/log" ||
        { tail -1 "$out/log" >&2; exit 1; }
done
python3 - "$out" <<'PY'
import json, pathlib, statistics, sys

rows = lambda dtype: [json.loads(line) for line in (pathlib.Path(sys.argv[1]) / dtype / "metrics.jsonl").read_text().splitlines()]
steps = {dtype: [row for row in rows(dtype) if "loss" in row] for dtype in ("f32", "bf16")}
curves = {dtype: [row["loss"] for row in made] for dtype, made in steps.items()}
assert len(curves["f32"]) == len(curves["bf16"]) > 10, "the runs have no steps to compare"
tens = lambda curve: [statistics.mean(curve[i : i + 10]) for i in range(0, len(curve) - 9, 10)]
for what, (a, b) in {"steps": curves.values(), "means of ten steps": map(tens, curves.values())}.items():
    apart = [abs(bf16 - f32) / f32 for f32, bf16 in zip(a, b)]
    print(f"{what}: {len(apart)}, apart {statistics.median(apart):.2%} in the median, {max(apart):.2%} at most")
for dtype, made in steps.items():
    speed = statistics.median(row["tokens"] / row["seconds"] for row in made)
    held_out = [row["eval_loss"] for row in rows(dtype) if "eval_loss" in row][-1:]
    print(f"{dtype}: loss {curves[dtype][0]:.4f} to {tens(curves[dtype])[-1]:.4f}, held out {held_out}, {speed:.0f} tokens/s in the median")
PY
