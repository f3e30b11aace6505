#!/usr/bin/env bash
# The loss curve of a bf16 base beside that of f32, same weights, recipe, rows and starts: how far apart they are.
#
#     bench/bf16_curve.sh TRAIN.jsonl TEST.jsonl [SEED...]       # rows in any format that train reads; seeds 0 1 2 if left out
#     CLI=path/to/peft-cli bench/bf16_curve.sh …                 # another build than this tree's
#
# SmolLM2-135M as a folder in bf16, which f32 widens without a change, as users' checkpoints are; LoRA of rank 16 on all linear layers,
# one epoch, batch 16, learning rate 2e-4, linear with 10 steps of warm-up. A seed draws the start of
# the adapter and the order of the rows. The loss of a step is a mean over few counted tokens, so steps are compared by tens, by
# seed and as the mean of all seeds, and so is the loss on TEST at the end. The f32 curves of two seeds show beside it
# how far curves are apart for other reasons.
set -euo pipefail
cd "$(dirname "$0")/.."
train=$(realpath "$1") test=$(realpath "$2")
shift 2
seeds=("$@")
[ $# -gt 0 ] || seeds=(0 1 2)
gguf=$(scripts/fetch-models.sh smollm2)
python=$(scripts/python-env.sh)
model=target/bench/models/smollm2
"$python" bench/vs_hf/models.py smollm2 "$model" --gguf "$gguf"
[ -n "${CLI:-}" ] || cargo build --release --quiet -p peft-cli
cli=${CLI:-${CARGO_TARGET_DIR:-target}/release/peft-cli}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

for seed in "${seeds[@]}"; do
    for dtype in f32 bf16; do
        "$cli" train --model "$model" --data "$train" --output "$out/$seed/$dtype" --json --set train.seed="$seed" \
            --set model.dtype=$dtype --set method.r=16 --set method.lora_alpha=16 --set method.target_modules=all-linear \
            --set data.eval="$test" --set train.batch_size=16 --set train.learning_rate=2e-4 --set train.scheduler=linear \
            --set train.warmup_steps=10 --set output.save_every=0 >"$out/result" 2>"$out/log" ||
            { tail -1 "$out/log" >&2; exit 1; }
    done
done
python3 - "$out" "${seeds[@]}" <<'PY'
import json, pathlib, statistics, sys

folder, *seeds = sys.argv[1:]


def run(seed, dtype):
    rows = [json.loads(line) for line in (pathlib.Path(folder) / seed / dtype / "metrics.jsonl").read_text().splitlines()]
    steps = [row["loss"] for row in rows if "loss" in row]
    assert len(steps) >= 20, "the runs are too short to be compared"
    tens = [statistics.mean(steps[i : i + 10]) for i in range(0, len(steps) - 9, 10)]
    return {"steps": steps, "tens": tens, "held out": [row["eval_loss"] for row in rows if "eval_loss" in row][-1:]}


def mean(curves):
    return [statistics.mean(values) for values in zip(*curves, strict=True)]


def apart(f32, bf16):
    each = [abs(b - a) / a for a, b in zip(f32, bf16, strict=True)]
    return f"{statistics.median(each):.2%} in the median, {max(each):.2%} at most"


runs = {(seed, dtype): run(seed, dtype) for seed in seeds for dtype in ("f32", "bf16")}
for seed in seeds:
    f32, bf16 = runs[seed, "f32"], runs[seed, "bf16"]
    print(f"seed {seed}: {len(f32['tens'])} means of ten steps, {f32['tens'][0]:.4f} to {f32['tens'][-1]:.4f} in f32, apart {apart(f32['tens'], bf16['tens'])}")
    print(f"  single steps: apart {apart(f32['steps'], bf16['steps'])}; held out {f32['held out'][0]:.5f} and {bf16['held out'][0]:.5f}")
if len(seeds) > 1:
    of = lambda what, dtype: mean([runs[seed, dtype][what] for seed in seeds])
    print(f"mean of {len(seeds)} seeds: means of ten steps apart {apart(of('tens', 'f32'), of('tens', 'bf16'))}; held out {apart(of('held out', 'f32'), of('held out', 'bf16'))}")
    print(f"for comparison, f32 of seed {seeds[0]} and of seed {seeds[1]}: apart {apart(runs[seeds[0], 'f32']['tens'], runs[seeds[1], 'f32']['tens'])}")
PY
