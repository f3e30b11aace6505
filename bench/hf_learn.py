#!/usr/bin/env python3
"""A short fine-tune and its accuracy in Hugging Face PEFT on the CPU, the other side of bench/learning.sh; prints a line of JSON.

    $(scripts/python-env.sh) bench/hf_learn.py --model MODEL.gguf --train train.jsonl --test test.jsonl

Rows are {"prompt", "completion"}; the completions of the test rows are the choices. Rows are shuffled and batches padded, as
transformers' Trainer does.
"""
import argparse
import json
import pathlib
import random
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def encode(tokenizer, prompt, completion):
    """The whole text's tokens; those of the prompt alone are not counted."""
    start, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
    return ids, [-100] * len(start) + ids[len(start) :]


def collate(rows):
    width = max(len(ids) for ids, _ in rows)
    pad = lambda values, fill: values + [fill] * (width - len(values))
    return dict(
        input_ids=torch.tensor([pad(ids, 0) for ids, _ in rows]),
        labels=torch.tensor([pad(labels, -100) for _, labels in rows]),
        attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
    )


@torch.no_grad()
def accuracy(model, tokenizer, rows):
    model.eval()
    choices = sorted({row["completion"] for row in rows})
    hits = 0
    for at in range(0, len(rows), 25):
        part = rows[at : at + 25]
        scores = []
        for choice in choices:
            batch = collate([encode(tokenizer, row["prompt"], choice) for row in part])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
            scores.append(-nll.sum(1))
        best = torch.stack(scores).argmax(0)
        hits += sum(choices[b] == row["completion"] for b, row in zip(best, part))
    return hits / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a .gguf file")
    parser.add_argument("--train", type=pathlib.Path, required=True)
    parser.add_argument("--test", type=pathlib.Path, required=True)
    args = parser.parse_args()
    source = dict(gguf_file=args.model.name)
    tokenizer = AutoTokenizer.from_pretrained(args.model.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(args.model.parent, dtype=torch.float32, **source)
    train, test = read(args.train), read(args.test)
    before = accuracy(model, tokenizer, test)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    rows = [encode(tokenizer, row["prompt"], row["completion"]) for row in train]
    random.Random(0).shuffle(rows)
    batches = [rows[at : at + 16] for at in range(0, len(rows), 16)]
    schedule = get_linear_schedule_with_warmup(optimizer, 10, len(batches))
    started = time.perf_counter()
    model.train()
    for batch in batches:
        loss = model(**collate(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    print(json.dumps({"before": before, "after": accuracy(model, tokenizer, test), "training_seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
