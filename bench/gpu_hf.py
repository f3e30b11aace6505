#!/usr/bin/env python3
"""One measurement of Hugging Face PEFT for bench/gpu: LoRA on all linear layers, a process of its own that prints one line of JSON.

    gpu_hf.py --model DIR --device cuda:0 --dtype bf16 --tokens 2048 --batch 1 --steps 8 [--flash] [--compile] [--checkpointing]

DIR has weights, or a config alone, whose weights are then random. The seconds of a step end when the device has nothing left to do.
"""
import argparse
import json
import pathlib
import time

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", choices=("f32", "bf16"), required=True)
    for number in "tokens", "batch", "steps", "rank":
        parser.add_argument(f"--{number}", type=int, required=True)
    for flag in "flash", "compile", "checkpointing":
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()

    dtype, device = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype], torch.device(args.device)
    attention = dict(attn_implementation="sdpa" if args.flash else "eager")
    if list(args.model.glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **attention).to(device)
    else:
        with device:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=dtype, **attention)
    model.config.use_cache = False
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = peft.get_peft_model(model, lora).train()
    run = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0, fused=True)
    on_card = device.type == "cuda"
    sync = (lambda: torch.cuda.synchronize(device)) if on_card else (lambda: None)
    torch.manual_seed(0)
    seconds, losses = [], []
    for _ in range(args.steps):
        ids = torch.randint(0, model.config.vocab_size, (args.batch, args.tokens)).to(device)
        sync()
        began = time.perf_counter()
        backend = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION) if args.flash and on_card else None
        with backend or torch.enable_grad():
            loss = run(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        sync()
        seconds.append(time.perf_counter() - began)
    allocated = torch.cuda.max_memory_allocated(device) if on_card else None
    print(json.dumps({"step_seconds": seconds, "losses": losses, "allocated_bytes": allocated}))


main()
