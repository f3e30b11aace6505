#!/usr/bin/env bash
# Makes the Python that the interop suites compare with (torch, transformers, peft on the CPU), and prints its interpreter.
#
#     python=$(scripts/python-env.sh)
#
# It stands in target/venv (or $PYTHON_ENV_DIR) and is made once: a stamp over this script, the pins in
# scripts/python-requirements.txt and the interpreter's version says whether it is still the right one.
#
# The torch wheel on PyPI for x86-64 Linux is a CUDA build that wants 4 GB of NVIDIA libraries and triton, none of which
# runs here. So packages are installed without their dependencies (the pins name each one that is needed). Of the CUDA
# libraries only libcudart and libcupti are real (they act when torch is loaded); the others are linked here from the
# names that torch's own libraries ask for, and every function in them returns an error. Nothing calls them on a machine
# without a GPU; do not use this environment on one with a GPU.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
env_dir=${PYTHON_ENV_DIR:-$root/target/venv}
pins=$root/scripts/python-requirements.txt
base_python=${PYTHON:-python3}

say() { echo "python-env: $*" >&2; }
command -v "$base_python" >/dev/null || { say "needs python3 (apt-get install python3 python3-venv)"; exit 1; }

stamp=$env_dir/.stamp
want=$({ cat "$0" "$pins"; "$base_python" -VV; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    echo "$env_dir/bin/python"
    exit 0
fi

say "making $env_dir (about 1.9 GB, a download of about 0.6 GB)"
rm -rf "$env_dir"
mkdir -p "$(dirname "$env_dir")"
"$base_python" -m venv "$env_dir"
python=$env_dir/bin/python
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@" >&2; }

if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
    pip install --requirement "$pins" # there PyPI's wheel is a CPU build
else
    for tool in gcc nm; do
        command -v $tool >/dev/null || { say "needs $tool (apt-get install gcc binutils)"; exit 1; }
    done
    # No byte code: only a few of the modules are ever imported, and those are compiled then.
    pip install --no-deps --no-compile --requirement "$pins" \
        nvidia-cuda-runtime==13.2.86 nvidia-cuda-cupti==13.2.86
    "$python" - "$env_dir" >&2 <<'PY'
"""Link stand-ins for the CUDA libraries that torch's shared objects need and that are not installed."""
import collections, glob, pathlib, re, subprocess, sys, sysconfig, tempfile

site = pathlib.Path(sysconfig.get_path("purelib"))
torch_lib = site / "torch" / "lib"
present = {pathlib.Path(p).name for p in glob.glob(f"{site}/nvidia/**/*.so*", recursive=True)}
# Libraries without symbol versions: their functions are told by prefix.
prefixes = {"cuFile": "libcufile.so.0", "cusparseLt": "libcusparseLt.so.0", "nccl": "libnccl.so.2"}

needed, names, version_of = set(), collections.defaultdict(set), {}
for lib in sorted(torch_lib.glob("*.so*")):
    dynamic = subprocess.run(["readelf", "-dW", lib], capture_output=True, text=True, check=True).stdout
    needed |= set(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nccl|nv)[^\]]*)\]", dynamic))
    wanted = subprocess.run(["readelf", "-VW", lib], capture_output=True, text=True, check=True).stdout
    for soname, entries in re.findall(r"File: (\S+)\s+Cnt: \d+\n((?:.*Name: .*\n)*)", wanted):
        version_of.update((version, soname) for version in re.findall(r"Name: (\S+)", entries))
    undefined = subprocess.run(["nm", "-D", "--undefined-only", lib], capture_output=True, text=True, check=True).stdout
    for name, version in re.findall(r" U (\w+)(?:@(\S+))?", undefined):
        owner = version_of.get(version) or next((so for p, so in prefixes.items() if name.startswith(p)), None)
        if owner:
            names[owner].add(name)

for soname in sorted(needed - present):
    functions = sorted(names[soname])
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        version = next((v for v, so in version_of.items() if so == soname), "")
        body = "".join(f".globl {n}\n.type {n},@function\n{n}:\nmov $1,%eax\nret\n" for n in functions)
        (work / "s.s").write_text(f'.text\n{body}.section .note.GNU-stack,"",@progbits\n')
        (work / "s.map").write_text(f"{version} {{ global: *; }};\n")
        subprocess.run(["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{soname}", f"-Wl,--version-script,{work}/s.map",
                        "-o", torch_lib / soname, work / "s.s"], check=True)
    print(f"python-env: stand-in {soname}: {len(functions)} functions", file=sys.stderr)
PY
fi

"$python" - >&2 <<'PY'
import torch, transformers, peft
a = torch.randn(8, 8, requires_grad=True)
torch.linalg.svd(a)[1].sum().backward()
assert not torch.cuda.is_available()
print(f"python-env: torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
PY
echo "$want" >"$stamp"
echo "$python"
