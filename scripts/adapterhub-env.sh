#!/usr/bin/env bash
# Makes the Python with AdapterHub's `adapters` that the interop suite compares with, and prints its interpreter.
#
#     python=$(scripts/adapterhub-env.sh)
#
# `adapters` pins an older transformers than PEFT's environment (scripts/python-env.sh) has. So this one, in target/venv-adapters (or
# $ADAPTERHUB_ENV_DIR), holds the packages of scripts/adapterhub-requirements.txt and finds everything else, torch above all, in that
# one. It takes 96 MB beside it.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
env_dir=${ADAPTERHUB_ENV_DIR:-$root/target/venv-adapters}
pins=$root/scripts/adapterhub-requirements.txt
base=$("$root/scripts/python-env.sh")

stamp=$env_dir/.stamp
want=$({ cat "$0" "$pins" "$root/scripts/python-requirements.txt"; "$base" -VV; echo "$base"; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    echo "$env_dir/bin/python"
    exit 0
fi

echo "adapterhub-env: making $env_dir" >&2
rm -rf "$env_dir"
"$base" -m venv "$env_dir"
python=$env_dir/bin/python
"$python" -m pip --disable-pip-version-check --quiet install --no-deps --no-compile --requirement "$pins" >&2
# A folder in a .pth file comes behind the environment's own packages.
site_packages='import sysconfig; print(sysconfig.get_path("purelib"))'
"$base" -c "$site_packages" >"$("$python" -c "$site_packages")/python-env.pth"

"$python" - >&2 <<'PY'
import adapters, torch, transformers
print(f"adapterhub-env: torch {torch.__version__}, transformers {transformers.__version__}, adapters {adapters.__version__}")
PY
echo "$want" >"$stamp"
echo "$python"
