#!/usr/bin/env bash
# Compares peft-cli with Hugging Face PEFT: makes the cases of interop/cases.py (once a seed), then runs interop/check.py;
# without options of that, interop/inits.py, combine.py, foreign.py, experts.py, llm_adapters.py, xlora.py and heads.py too, interop/adapterhub.py (AdapterHub's
# package), interop/preference.py (TRL's trainers), interop/embeddings.py (sentence-transformers on MiniLM), interop/openai_client.py (OpenAI's client asks `peft-cli serve`), interop/openapi.py
# (the server beside its own description) and interop/page.py (its page in a headless Chromium: apt-get install chromium chromium-driver).
#
#     interop/run.sh [PEFT_CLI] [options of check.py]      PEFT_CLI: target/release/peft-cli
#
# INTEROP_SEED (0) makes other weights and rows; INTEROP_DIR (target/interop) is where cases go.
set -euo pipefail
cd "$(dirname "$0")/.."

program=target/release/peft-cli
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    program=$1
    shift
fi
[ -x "$program" ] || { echo "interop: no $program; cargo build --release -p peft-cli" >&2; exit 1; }

python=$(scripts/python-env.sh)
seed=${INTEROP_SEED:-0}
cases=${INTEROP_DIR:-target/interop}
# Threads that wait for each other make tiny tensors slower, not faster.
export OMP_NUM_THREADS=1

stamp=$(cat interop/cases.py scripts/python-requirements.txt <(echo "seed $seed") | sha256sum | cut -d' ' -f1)
if [ "$(cat "$cases/.stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$cases"
    SECONDS=0
    "$python" interop/cases.py "$cases" --seed "$seed"
    echo "$stamp" >"$cases/.stamp"
    echo "interop: made the cases in $SECONDS s" >&2
fi
"$python" interop/check.py "$program" "$cases" "$@"
if [ $# = 0 ]; then
    "$python" interop/inits.py "$program" --seed "$seed"
    "$python" interop/combine.py "$program" --seed "$seed"
    "$python" interop/foreign.py "$program" --seed "$seed"
    "$python" interop/experts.py "$program" --seed "$seed"
    "$python" interop/llm_adapters.py "$program" --seed "$seed"
    "$python" interop/xlora.py "$program" --seed "$seed"
    "$python" interop/heads.py "$program" --seed "$seed"
    "$(scripts/adapterhub-env.sh)" interop/adapterhub.py "$program" --seed "$seed"
    "$(scripts/trl-env.sh)" interop/preference.py "$program" --seed "$seed"
    "$(scripts/trl-env.sh)" interop/embeddings.py "$program" "$(scripts/fetch-models.sh minilm)"
    "$(scripts/openai-env.sh)" interop/openai_client.py "$program"
    "$(scripts/openai-env.sh)" interop/openapi.py "$program"
    if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
        "$(scripts/openai-env.sh)" interop/page.py "$program"
    else
        echo "interop: NOT RUN: page.py, which needs a browser (apt-get install chromium chromium-driver)" >&2
    fi
fi
