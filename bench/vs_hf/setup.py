"""What a benchmark begins with: programs, models, and the facts that its figures cannot be read without."""
import datetime
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def output_of(*command):
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout.strip()


def machine(python, program):
    """What figures of bench/`program` cannot be read without."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    field = lambda key: next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith(key)), "")
    vectors = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in field("flags").split()]
    memory = next(int(line.split()[1]) for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    versions = "import torch, transformers, peft; print(*(f'{m.__name__} {m.__version__}' for m in (torch, transformers, peft)), sep=', ')"
    changed = " with changes" if output_of("git", "status", "--porcelain") else ""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": f"{os.cpu_count()} cores of {field('model name')} ({', '.join(vectors)}), {memory / 1e6:.0f} GB",
        "commit": output_of("git", "rev-parse", "--short", "HEAD") + changed,
        "versions": output_of(python, "-c", versions),
        "command": " ".join([f"bench/{program}", *sys.argv[1:]]),
    }


def binaries_of(*packages):
    """The folder of these packages' programs, built in release."""
    output_of("cargo", "build", "--release", "--quiet", *(part for package in packages for part in ("-p", package)))
    return ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release"


def prepare(name, python):
    """The folder of the model that is called so, made once."""
    folder = ROOT / "target/bench/models" / name
    if folder.exists():
        return folder
    print(f"making {folder.relative_to(ROOT)}", file=sys.stderr)
    if name == "minilm":
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(pathlib.Path(output_of("scripts/fetch-models.sh", "minilm")).resolve())
        return folder
    gguf = ["--gguf", output_of("scripts/fetch-models.sh", "smollm2")] if name == "smollm2" else []
    output_of(python, "bench/vs_hf/models.py", name, folder, *gguf)
    return folder
