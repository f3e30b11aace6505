#!/usr/bin/env bash
# MeZO on a binary choice: accuracy before and after, and the peak memory of training beside that of evaluation.
#
#     bench/mezo.sh TRAIN.jsonl TEST.jsonl [table.key=value]...   # rows {"prompt", "completion"}; the two completions are the choices
#
# SmolLM2-135M from its .gguf in f32; further settings go to `train --set`. Peaks are the resident memory that the system saw
# (ru_maxrss). Evaluation's is that of the same batch size with the trained adapter, over TEST, whose longest rows go together.
set -euo pipefail
cd "$(dirname "$0")/.."
train=$(realpath "$1") test=$(realpath "$2")
shift 2
model=${MODEL:-$(scripts/fetch-models.sh smollm2)}
cargo build --release --quiet -p peft-cli
cli=${CARGO_TARGET_DIR:-target}/release/peft-cli
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# Norms of the last block: few parameters, and all blocks below run once a step however many samples it takes.
settings=(model.dtype=f32 train.optimizer=mezo train.objective=t_few train.unlikelihood=0 train.length_normalised=100
    method.type=ln 'method.target_modules=["model.norm","layers.29.post_attention_layernorm"]'
    train.batch_size=16 train.max_steps=80 train.mezo_samples=48 train.mezo_eps=1e-2
    train.learning_rate=1e-3 train.scheduler=linear train.warmup_ratio=0 "$@")

mapfile -t choices < <(python3 -c 'import json,sys; print(*sorted({json.loads(l)["completion"] for l in open(sys.argv[1])}), sep="\n")' "$test")
list=$(printf '"%s",' "${choices[@]}")
# Runs a command and adds the peak of its resident memory, in MB, to the last line of its stdout, which is JSON.
peak() {
    python3 - "$@" <<'PY'
import json, resource, subprocess, sys

run = subprocess.run(sys.argv[1:], capture_output=True, text=True)
if run.returncode:
    sys.exit(run.stderr.strip().splitlines()[-1])
result = json.loads(run.stdout.splitlines()[-1])
print(json.dumps(result | {"peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}))
PY
}
field() { python3 -c 'import json,sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
evaluate() { peak "$cli" eval --model "$model" --data "$test" --format completion --dtype f32 --batch-size 16 --json "$@"; }

before=$(evaluate "${choices[@]/#/--choice=}" | field accuracy)
trained=$(peak "$cli" train --model "$model" --data "$train" --format completion --output "$out/run" --json \
    --set "data.choices=[${list%,}]" "${settings[@]/#/--set=}")
adapter=(--adapter "$out/run")
[ -d "$out/run/model" ] && adapter=()
[ -d "$out/run/model" ] && model=$out/run/model
after=$(evaluate "${adapter[@]}" "${choices[@]/#/--choice=}")
python3 - "$before" "$trained" "$after" "$(stat -c %s "$out/run/mezo.safetensors")" <<'PY'
import json, sys

before, trained, after, record = float(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
print(f"accuracy {before:.1%} before, {after['accuracy']:.1%} after {trained['steps']} steps ({trained['trainable_parameters']} parameters)")
print(f"peak {trained['peak_mb']:.0f} MB of training, {after['peak_mb']:.0f} MB of evaluation: {trained['peak_mb'] / after['peak_mb']:.3f} ×")
print(f"record of the run: {record / 1000:.1f} kB")
PY
