#!/usr/bin/env python3
"""Hugging Face's side of bench/methods: a process of its own that prints one line of JSON.

    peer.py tokens --model DIR --rows ROWS.jsonl --output TOKENS.jsonl       rows as token ids; both sides train on this file
    peer.py start  --model DIR --line lora --output DIR                      the adapter that both sides start from
    peer.py train  --model DIR --line lora --rows TOKENS.jsonl --start DIR --output DIR …

Rows are {"prompt", "completion"} for a language model and {"text", "label"} with a class's number for an encoder.
"""
import argparse
import json
import math
import pathlib
import time

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lines import LINES


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_encoder(folder):
    return AutoConfig.from_pretrained(folder).model_type == "bert"


def load(folder):
    if not is_encoder(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.config.use_cache = False
        return model
    # Ours runs the frozen base without dropout.
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32, **dropout)


def tokens(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = read(args.rows)
    if is_encoder(args.model):
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=128)["input_ids"]
        made = [{"input_ids": i, "label": row["label"]} for i, row in zip(ids, rows, strict=True)]
    else:
        texts = lambda key: tokenizer([row[key] for row in rows], add_special_tokens=False)["input_ids"]
        end = [tokenizer.eos_token_id]
        made = [
            {"input_ids": prompt + completion + end, "labels": [-100] * len(prompt) + completion + end}
            for prompt, completion in zip(texts("prompt"), texts("completion"), strict=True)
        ]
    args.output.write_text("".join(json.dumps(row) + "\n" for row in made))
    return {}


def start(args):
    torch.manual_seed(args.seed)
    kind, keys = LINES[args.line].peer
    task = "SEQ_CLS" if is_encoder(args.model) else "CAUSAL_LM"
    peft.get_peft_model(load(args.model), getattr(peft, kind)(task_type=task, **keys)).save_pretrained(args.output)
    return {}


def collate(rows, padding):
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, fill: values + [fill] * (width - len(values))
    mask = [pad([1] * len(row["input_ids"]), 0) for row in rows]
    labels = [pad(row["labels"], -100) if "labels" in row else row["label"] for row in rows]
    ids = [pad(row["input_ids"], padding) for row in rows]
    return {key: torch.tensor(value) for key, value in dict(input_ids=ids, attention_mask=mask, labels=labels).items()}


def opened(base, folder):
    """The adapter in a folder, to be trained. PEFT opens no soft prompt that way: a new one takes its values."""
    config = peft.PeftConfig.from_pretrained(folder)
    if not config.is_prompt_learning:
        return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    config.inference_mode = False
    model = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


def train(args):
    """As `peft-cli train` with the settings of bench/methods: AdamW, linear with a warm-up of a tenth, gradients clipped at 1."""
    rows = read(args.rows)
    padding = getattr(AutoConfig.from_pretrained(args.model), "pad_token_id", None) or 0
    model = opened(load(args.model), args.start).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)
    batches = [rows[at : at + args.batch] for at in range(0, len(rows), args.batch)]
    steps = args.epochs * len(batches)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * steps), steps)
    losses, started = [], time.perf_counter()
    for _ in range(args.epochs):
        for batch in batches:
            loss = model(**collate(batch, padding)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    seconds = time.perf_counter() - started
    model.save_pretrained(args.output)
    return {"losses": losses, "seconds": seconds, "trainable_parameters": sum(p.numel() for p in parameters)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for run, paths in ((tokens, ("model", "rows", "output")), (start, ("model", "output")), (train, ("model", "rows", "start", "output"))):
        sub = commands.add_parser(run.__name__)
        sub.set_defaults(run=run)
        for path in paths:
            sub.add_argument(f"--{path}", type=pathlib.Path, required=True)
        if run is not tokens:
            sub.add_argument("--line", choices=LINES, required=True)
            sub.add_argument("--seed", type=int, default=0)
        if run is train:
            sub.add_argument("--batch", type=int, required=True)
            sub.add_argument("--epochs", type=int, required=True)
            sub.add_argument("--learning-rate", type=float, required=True)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    main()
