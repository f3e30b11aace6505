#!/usr/bin/env bash
# Makes the Python with TRL and sentence-transformers that the interop suite compares preference objectives and embeddings with, and prints
# its interpreter.
#
#     python=$(scripts/trl-env.sh)
#
# It stands in target/venv-trl (or $TRL_ENV_DIR), holds the packages of scripts/trl-requirements.txt, and finds everything else, torch,
# transformers and peft above all, in PEFT's environment (scripts/python-env.sh). It takes 400 MB beside it.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
env_dir=${TRL_ENV_DIR:-$root/target/venv-trl}
pins=$root/scripts/trl-requirements.txt
base=$("$root/scripts/python-env.sh")

stamp=$env_dir/.stamp
want=$({ cat "$0" "$pins" "$root/scripts/python-requirements.txt"; "$base" -VV; echo "$base"; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    echo "$env_dir/bin/python"
    exit 0
fi

echo "trl-env: making $env_dir" >&2
rm -rf "$env_dir"
"$base" -m venv "$env_dir"
python=$env_dir/bin/python
"$python" -m pip --disable-pip-version-check --quiet install --no-deps --no-compile --requirement "$pins" >&2
# A folder in a .pth file comes behind the environment's own packages.
site_packages='import sysconfig; print(sysconfig.get_path("purelib"))'
"$base" -c "$site_packages" >"$("$python" -c "$site_packages")/python-env.pth"

"$python" - >&2 <<'PY'
import torch, transformers, trl
from trl import DPOTrainer, KTOTrainer
print(f"trl-env: torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}")
PY
echo "$want" >"$stamp"
echo "$python"
