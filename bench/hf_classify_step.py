#!/usr/bin/env python3
"""The step of a classifier that `peft-bench step` measures, in Hugging Face PEFT on the CPU; prints the same line of JSON.

    $(scripts/python-env.sh) bench/hf_classify_step.py --model target/models/all-MiniLM-L6-v2
    peft-bench step --model target/models/all-MiniLM-L6-v2 --batch 32 --seq 64
"""
import argparse
import json
import pathlib
import resource
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification


def random_tokens(n, vocab):
    """As `peft_bench::random_tokens`."""
    state, ids = 0, []
    for _ in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocab)
    return ids


def peak_rss_mb():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 // 10**6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a model folder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps; the first is not timed")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()

    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model, lora)
    model.train()
    for module in model.modules():
        # The frozen base runs without dropout here too, which costs the peer nothing and spares it time.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0)
    ids = torch.tensor(random_tokens(args.batch * args.seq, model.config.vocab_size)).view(args.batch, args.seq)
    labels = torch.arange(args.batch) % model.config.num_labels

    losses, seconds = [], []
    for _ in range(args.steps):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    timed = seconds[1:] or seconds
    speed = args.batch * args.seq * len(timed) / sum(timed)
    print(json.dumps({"tokens_per_second": round(speed, 1), "peak_rss_mb": peak_rss_mb(), "loss": losses[0],
                      "last_loss": losses[-1]}))


if __name__ == "__main__":
    main()
