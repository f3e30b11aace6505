#!/usr/bin/env bash
# Preference objectives on a binary choice: rewards, their margin and the accuracy of choosing, before and after.
#
#     bench/preferences.sh TRAIN.jsonl TEST.jsonl [OBJECTIVE,…] [table.key=value]...
#
# Rows {"prompt", "completion"} become pairs: the right completion is chosen, the other one rejected. The objectives are dpo and kto if left
# out. SmolLM2-135M from its .gguf in f32, LoRA of rank 8 on all linear layers; further settings go to `train --set`. Prints a line for
# every evaluation of the held-out pairs, then how often the right completion is the likelier one.
set -euo pipefail
cd "$(dirname "$0")/.."
train=$(realpath "$1") test=$(realpath "$2")
shift 2
objectives=dpo,kto
case "${1-}" in *=* | "") ;; *) objectives=$1; shift ;; esac
model=${MODEL:-$(scripts/fetch-models.sh smollm2)}
if [ -z "${PEFT_CLI-}" ]; then
    cargo build --release --quiet -p peft-cli
    PEFT_CLI=${CARGO_TARGET_DIR:-target}/release/peft-cli
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
settings=(model.dtype=f32 method.r=8 method.lora_alpha=16 method.target_modules=all-linear train.batch_size=8 train.max_steps=40
    train.learning_rate=5e-5 train.scheduler=constant train.warmup_ratio=0 train.eval_batch_size=16 output.eval_every=10 "$@")

for part in train test; do
    python3 - "${!part}" "$out/$part.jsonl" <<'PY'
import json, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
answers = sorted({row["completion"] for row in rows})
with open(sys.argv[2], "w") as out:
    for row in rows:
        wrong = next(answer for answer in answers if answer != row["completion"])
        out.write(json.dumps({"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong}) + "\n")
PY
done
mapfile -t choices < <(python3 -c 'import json,sys; print(*sorted({json.loads(l)["completion"] for l in open(sys.argv[1])}), sep="\n")' "$test")
accuracy() {
    "$PEFT_CLI" eval --model "$model" --data "$test" --format completion --dtype f32 --batch-size 16 --json "${choices[@]/#/--choice=}" "$@" |
        python3 -c 'import json,sys; print("{:.1%}".format(json.load(sys.stdin)["accuracy"]))'
}
before=$(accuracy)
for objective in ${objectives//,/ }; do
    "$PEFT_CLI" train --model "$model" --data "$out/train.jsonl" --output "$out/run" --set train.objective="$objective" \
        --set data.eval="$out/test.jsonl" "${settings[@]/#/--set=}" 2>"$out/log" || { tail -1 "$out/log" >&2; exit 1; }
    python3 - "$objective" "$out/run/metrics.jsonl" <<'PY'
import json, sys

for row in map(json.loads, open(sys.argv[2])):
    if "eval_objective" in row:
        print(f"{sys.argv[1]} step {row['step']:3}: objective {row['eval_objective']:.4f}, rewards {row['eval_rewards_chosen']:+.3f} "
              f"{row['eval_rewards_rejected']:+.3f}, margin {row['eval_rewards_margin']:.3f}, accuracy {row['eval_rewards_accuracy']:.1%}")
PY
    echo "$objective: the right completion is the likelier one of $before of the rows before, of $(accuracy --adapter "$out/run") after"
done
