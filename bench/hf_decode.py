#!/usr/bin/env python3
"""What `peft-bench decode` measures, with transformers' `generate` on the CPU; prints the same line of JSON.

    $(scripts/python-env.sh) bench/hf_decode.py --model target/models/SmolLM2-135M-Instruct.Q4_1.gguf --batch 8
"""
import argparse
import json
import pathlib
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

from hf_step import peak_rss_mb, random_tokens

RUNS = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a model folder or a .gguf file")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--adapter", action="append", default=[], help="an adapter's folder; the sequences take them in turn")
    args = parser.parse_args()

    if args.model.suffix == ".gguf":
        source, extra = args.model.parent, {"gguf_file": args.model.name}
    else:
        source, extra = args.model, {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)
    routed = {}
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter[0], adapter_name="0")
        for i, path in enumerate(args.adapter[1:], 1):
            model.load_adapter(path, adapter_name=str(i))
        if len(args.adapter) > 1:
            routed = {"adapter_names": [str(i % len(args.adapter)) for i in range(args.batch)]}
    model.eval()
    ids = torch.tensor(random_tokens(args.batch * args.prompt_tokens, model.config.vocab_size))
    ids = ids.view(args.batch, args.prompt_tokens)

    def timed(new):
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                                 min_new_tokens=new, max_new_tokens=new, pad_token_id=0, **routed)
        seconds = time.perf_counter() - started
        assert out.shape[1] == args.prompt_tokens + new
        return seconds, out[0, args.prompt_tokens:].tolist()

    timed(2)
    first, whole = [], []
    for _ in range(RUNS):
        first.append(timed(1)[0])
        seconds, tokens = timed(args.new_tokens)
        whole.append(seconds)
    first, whole = statistics.median(first), statistics.median(whole)
    print(json.dumps({
        "tokens_per_second": round(args.batch * args.new_tokens / whole, 2),
        "prefill_ms": round(1e3 * first, 2),
        "step_ms": round(1e3 * (whole - first) / (args.new_tokens - 1), 2),
        "peak_rss_mb": peak_rss_mb(),
        "tokens": tokens[:8],
    }))


if __name__ == "__main__":
    main()
