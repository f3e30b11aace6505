#!/usr/bin/env bash
# Makes the Python with OpenAI's client, schemathesis and selenium, with which interop/openai_client.py, openapi.py and page.py ask the
# server, and prints its interpreter.
#
#     python=$(scripts/openai-env.sh)
#
# It needs nothing of the large environment of scripts/python-env.sh: 140 MB in target/venv-openai (or $OPENAI_ENV_DIR), made once
# for the pins of scripts/openai-requirements.txt.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
env_dir=${OPENAI_ENV_DIR:-$root/target/venv-openai}
pins=$root/scripts/openai-requirements.txt
base_python=${PYTHON:-python3}
command -v "$base_python" >/dev/null || { echo "openai-env: needs python3 (apt-get install python3 python3-venv)" >&2; exit 1; }

stamp=$env_dir/.stamp
want=$({ cat "$0" "$pins"; "$base_python" -VV; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    echo "$env_dir/bin/python"
    exit 0
fi

echo "openai-env: making $env_dir" >&2
rm -rf "$env_dir"
mkdir -p "$(dirname "$env_dir")"
"$base_python" -m venv "$env_dir"
python=$env_dir/bin/python
"$python" -m pip --disable-pip-version-check --quiet install --no-deps --requirement "$pins" >&2
"$python" -c 'import openai, schemathesis, sys; print(f"openai-env: openai {openai.__version__}", file=sys.stderr)'
echo "$want" >"$stamp"
echo "$python"
