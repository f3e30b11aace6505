#!/usr/bin/env bash
# Black-Box Tuning and Black-Box Prompt Learning on a binary choice: accuracy before and after a budget of forward calls.
#
#     bench/blackbox.sh bbt|bbt-deep|bdpl TRAIN.jsonl TEST.jsonl [table.key=value]...
#
# Rows are {"prompt", "completion"}; the completions that occur are the choices. SmolLM2-135M from its .gguf in f32; further settings go
# to `train --set`. Black-Box Tuning sees the first 16 rows of each completion in every step, as in the paper. The best of the evaluations
# on the last 200 rows of TRAIN, which are not trained on, is measured on TEST, too.
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
if [ "$kind" != bdpl ]; then
    python3 - "$out/train.jsonl" > "$out/few.jsonl" <<'PY'
import collections, json, sys

seen = collections.Counter()
for line in open(sys.argv[1]):
    completion = json.loads(line)["completion"]
    seen[completion] += 1
    if seen[completion] <= 16:
        print(line, end="")
PY
    mv "$out/few.jsonl" "$out/train.jsonl"
fi
tail -n 200 "$train" > "$out/dev.jsonl"

text="Is the opinion of the review positive or negative?"
common=(model.dtype=f32 train.objective=t_few train.unlikelihood=0 train.length_normalised=100 train.metric=eval_accuracy
    train.eval_batch_size=16)
case $kind in
bbt) settings=(train.optimizer=bbt method.type=prompt method.num_virtual_tokens=10 method.prompt_tuning_init=TEXT
    "method.prompt_tuning_init_text=$text" train.batch_size=32 train.bbt_dim=10 train.bbt_population=8 train.bbt_alpha=0.5
    train.max_steps=14) ;;
bbt-deep) settings=(train.optimizer=bbt method.type=prefix method.num_virtual_tokens=10 "train.bbt_init_text=$text"
    train.batch_size=32 train.bbt_dim=10 train.bbt_population=8 train.bbt_alpha=0.5 train.max_steps=30) ;;
bdpl) settings=(train.optimizer=bdpl train.bdpl_length=5 train.bdpl_samples=8 train.bdpl_vocabulary=50 train.batch_size=8
    train.learning_rate=0.3 train.scheduler=constant train.warmup_ratio=0 train.max_steps=14) ;;
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
print(f"{plan['steps']} steps, {plan['forward_calls']} forward calls, {result['seconds']:.0f} s")
PY
