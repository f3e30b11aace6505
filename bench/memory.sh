#!/usr/bin/env bash
# One LoRA training step, measured alternately in this project, in naive candle and in Hugging Face PEFT:
#
#     bench/memory.sh                                   # SmolLM2-135M, batch 4 × 256, rank 16, 3 rounds
#     MODEL=path ROUNDS=1 STEPS=3 BATCH=2 bench/memory.sh
#     WITHOUT=hf,naive bench/memory.sh                  # leave some out
#
# Each measurement is a process of its own. Prints every line as it comes, then the median of each kind and its ratio to
# `ours`. Needs the model (scripts/fetch-models.sh) and, for HF, the Python of scripts/python-env.sh or $PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."

without=",${WITHOUT:-},"
model=${MODEL:-$(scripts/fetch-models.sh smollm2)}
options=(--model "$model" --batch "${BATCH:-4}" --seq "${SEQ:-256}" --steps "${STEPS:-4}" --rank "${RANK:-16}")
hf_python=${PYTHON:-}
[[ $without == *,hf,* || -n $hf_python ]] || hf_python=$(scripts/python-env.sh)
cargo build --release --quiet -p peft-bench
bench=${CARGO_TARGET_DIR:-target}/release/peft-bench
results=$(mktemp)
trap 'rm -f "$results"' EXIT

one() { # KIND COMMAND...
    local kind=$1
    shift
    [[ $without != *,${kind%%-*},* ]] || return 0
    printf '%s\t%s\n' "$kind" "$("$@" 2>/dev/null || echo null)" | tee -a "$results"
}
for _ in $(seq "${ROUNDS:-3}"); do
    one ours "$bench" step "${options[@]}"
    one ours-keep-12 "$bench" step "${options[@]}" --keep 12
    one ours-checkpointing "$bench" step "${options[@]}" --checkpointing
    one ours-stored "$bench" step "${options[@]}" --checkpointing --stored
    one naive "$bench" naive "${options[@]}"
    one hf "$hf_python" bench/hf_step.py "${options[@]}"
    one hf-checkpointing "$hf_python" bench/hf_step.py "${options[@]}" --checkpointing
done

python3 - "$results" <<'PY'
import collections, json, statistics, sys

runs = collections.defaultdict(list)
for line in open(sys.argv[1]):
    kind, result = line.rstrip("\n").split("\t")
    if json.loads(result):
        runs[kind].append(json.loads(result))
    else:
        print(f"{kind}: failed; run it by hand to see why", file=sys.stderr)
median = {k: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for k, rs in runs.items()}
if "ours" not in median:
    sys.exit("ours was not measured: no ratios")
ours = median["ours"]
print(f"\n{'':<20}{'tokens/s':>10}{'of ours':>9}{'peak MB':>10}{'of ours':>9}{'loss':>12}")
for kind, m in median.items():
    speed, memory = m["tokens_per_second"], m["peak_rss_mb"]
    print(f"{kind:<20}{speed:>10.1f}{speed / ours['tokens_per_second']:>9.2f}"
          f"{memory:>10.0f}{memory / ours['peak_rss_mb']:>9.2f}{m['loss']:>12.6f}")
PY
