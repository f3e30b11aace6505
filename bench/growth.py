#!/usr/bin/env python3
"""How the cost of a step grows: tokens a second and peak memory of `peft-bench step` over one dimension at a time.

    bench/growth.py MODEL [--bench target/release/peft-bench] [--only seq,batch,rank,threads]

Prints a table a dimension, for docs/benchmarks.md. The other dimensions stay at batch 1 (seq), 128 tokens (batch) or 4 × 256
tokens (rank, threads). `MB a token` is what memory grew by, per token more: constant where memory is linear.
"""
import argparse
import json
import os
import pathlib
import subprocess

SWEEPS = {
    "seq": [dict(batch=1, seq=seq) for seq in (128, 256, 512, 1024, 2048, 4096, 8192)],
    "batch": [dict(batch=batch, seq=128) for batch in (1, 2, 4, 8, 16, 32)],
    "rank": [dict(rank=rank) for rank in (1, 4, 16, 64, 256)],
    "threads": [dict(threads=threads) for threads in (1, 2)],
}
DEFAULTS = dict(batch=4, seq=256, rank=16, threads=0)


def measure(bench, model, settings):
    command = [bench, "step", "--model", model, "--steps", "2"]
    for key in ("batch", "seq", "rank"):
        command += [f"--{key}", str(settings[key])]
    env = {**os.environ, **({"RAYON_NUM_THREADS": str(settings["threads"])} if settings["threads"] else {})}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--bench", type=pathlib.Path, default="target/release/peft-bench")
    parser.add_argument("--only", default=",".join(SWEEPS))
    options = parser.parse_args()
    for name in options.only.split(","):
        print(f"\n| {name} | tokens/s | peak MB | MB a token |\n|---|---|---|---|", flush=True)
        before = None
        for point in SWEEPS[name]:
            settings = {**DEFAULTS, **point}
            result = measure(options.bench.resolve(), options.model, settings)
            tokens, peak = settings["batch"] * settings["seq"], result["peak_rss_mb"]
            slope = f"{(peak - before[1]) / (tokens - before[0]):.2f}" if before and tokens != before[0] else ""
            print(f"| {settings[name]} | {result['tokens_per_second']:.0f} | {peak:,} | {slope} |", flush=True)
            before = (tokens, peak)


if __name__ == "__main__":
    main()
