#!/usr/bin/env bash
# Black-Box Tuning and Black-Box Prompt Learning on a binary choice: accuracy before and after a budget of forward calls.
#
#     bench/blackbox.sh bbt|bbt-deep|bdpl TRAIN.jsonl TEST.jsonl [table.key=value]...
#
# Rows are {"prompt", "completion"}; the completions that occur are the choices. SmolLM2-135M from its .gguf in f32; further settings go
# to `train --set`. The best of the evaluations on the last 200 rows of TRAIN, which are not trained on, is measured on TEST.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1 train=$(realpath "$2") test=$(realpath "$3")
shift 3
model=${MODEL:-$(scripts/fetch-models.sh smollm2)}
[ -n "${CLI:-}" ] || cargo build --release --quiet -p peft-cli
cli=${CLI:-${CARGO_TARGET_DIR:-target}/release/peft-cli}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
head -n -200 "$train" > "$out/train.jsonl"
tail -n 200 "$train" > "$out/dev.jsonl"

text="Is the opinion of the review positive or negative?"
common=(model.dtype=f32 train.objective=t_few train.unlikelihood=0 train.length_normalised=100 train.batch_size=16
    train.metric=eval_accuracy train.eval_batch_size=16)
case $kind in
bbt) settings=(train.optimizer=bbt method.type=prompt method.num_virtual_tokens=12 method.prompt_tuning_init=TEXT
    "method.prompt_tuning_init_text=$text" train.bbt_dim=64 train.bbt_population=12 train.max_steps=40 output.eval_every=10) ;;
bbt-deep) settings=(train.optimizer=bbt method.type=prefix method.num_virtual_tokens=12 "train.bbt_init_text=$text"
    train.bbt_dim=64 train.bbt_population=8 train.max_steps=60 output.eval_every=15) ;;
bdpl) settings=(train.optimizer=bdpl train.bdpl_length=6 train.bdpl_samples=12 train.learning_rate=0.15 train.scheduler=constant
    train.max_steps=40 output.eval_every=10) ;;
*) echo "$kind is none of bbt, bbt-deep, bdpl" >&2; exit 2 ;;
esac

mapfile -t choices < <(python3 -c 'import json,sys; print(*sorted({json.loads(l)["completion"] for l in open(sys.argv[1])}), sep="\n")' "$test")
list=$(printf '"%s",' "${choices[@]}")
evaluate() { "$cli" eval --model "$model" --data "$test" --format completion --dtype f32 --batch-size 16 --json "${choices[@]/#/--choice=}" "$@" | tail -n 1; }
all=("${common[@]}" "${settings[@]}" "$@")
train=("$cli" train --model "$model" --data "$out/train.jsonl" --format completion --output "$out/run" --json
    --set "data.eval=$out/dev.jsonl" --set "data.choices=[${list%,}]" "${all[@]/#/--set=}")

before=$(evaluate)
plan=$("${train[@]}" --dry-run | tail -n 1)
result=$("${train[@]}" | tail -n 1)
best=$(evaluate --adapter "$out/run/best")
last=$(evaluate --adapter "$out/run")
grep eval_loss "$out/run/metrics.jsonl" >&2
[ ! -f "$out/run/best/prompt.txt" ] || cat "$out/run/best/prompt.txt" >&2
python3 - "$kind" "$before" "$plan" "$result" "$best" "$last" <<'PY'
import json, sys

kind = sys.argv[1]
before, plan, result, best, last = map(json.loads, sys.argv[2:])
print(f"{kind}: accuracy {before['accuracy']:.1%} before; {best['accuracy']:.1%} with the best of the evaluations (step "
      f"{result['best']['step']}, {result['best']['value']:.1%} of the held-out rows), {last['accuracy']:.1%} after the last step")
print(f"{plan['steps']} steps, {plan['forward_calls']} forward calls of 16 rows, {result['seconds']:.0f} s")
PY
