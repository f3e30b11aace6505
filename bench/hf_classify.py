#!/usr/bin/env python3
"""Fine-tunes an encoder to classify with Hugging Face PEFT on the CPU: what `peft-cli train` does on the same rows.

    python=$(scripts/python-env.sh)
    $python bench/hf_classify.py --model target/models/all-MiniLM-L6-v2 --train rows.jsonl --test test.jsonl

Rows are {"text", "label"} with labels that are names. LoRA on all linear layers, AdamW, a cosine schedule with a warm-up of 3 %,
gradients clipped at 1, no dropout in the frozen base: the defaults of `peft-cli train`. Prints one line of JSON.
"""
import argparse
import json
import math
import pathlib
import random
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def read(path, tokenizer, classes, max_length):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
    return [(i, classes.index(row["label"])) for i, row in zip(ids, rows)]


def collate(rows, padding):
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [padding] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return dict(input_ids=ids, attention_mask=mask, labels=torch.tensor([label for _, label in rows]))


@torch.no_grad()
def evaluate(model, rows, padding):
    model.eval()
    right = loss = 0.0
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64], padding)
        out = model(**batch)
        right += (out.logits.argmax(-1) == batch["labels"]).sum().item()
        loss += out.loss.item() * len(batch["labels"])
    return loss / len(rows), right / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--train", type=pathlib.Path, required=True)
    parser.add_argument("--test", type=pathlib.Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    order = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    classes = sorted({json.loads(line)["label"] for line in args.train.read_text().splitlines()})
    train = read(args.train, tokenizer, classes, args.max_length)
    test = read(args.test, tokenizer, classes, args.max_length)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(classes), dtype=torch.float32)
    lora = LoraConfig(task_type="SEQ_CLS", r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = get_peft_model(model, lora)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    steps = args.epochs * math.ceil(len(train) / args.batch)
    warmup = math.ceil(0.03 * steps)
    rate = lambda s: min(1, (s + 1) / warmup) if s < warmup else 0.5 * (1 + math.cos(math.pi * (s - warmup) / max(1, steps - warmup)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    started = time.perf_counter()
    for _ in range(args.epochs):
        model.train()
        order.shuffle(train)
        for start in range(0, len(train), args.batch):
            loss = model(**collate(train[start : start + args.batch], tokenizer.pad_token_id)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    loss, accuracy = evaluate(model, test, tokenizer.pad_token_id)
    print(json.dumps(dict(loss=loss, accuracy=accuracy, steps=steps, seconds=round(seconds, 1))))


if __name__ == "__main__":
    main()
