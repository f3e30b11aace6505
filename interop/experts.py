#!/usr/bin/env python3
"""Hold peft-cli's reading of adapters on single experts against Hugging Face PEFT, on tiny random mixtures.

    interop/experts.py PEFT_CLI [--seed 0] [--only NAME,…]

Before transformers 5 each expert had layers of its own, and adapters have their factors: `block_sparse_moe.experts.3.w1.lora_A`. PEFT makes
those of today's parameters of them when it loads such a folder. For each
eval      peft-cli's loss of the folder is PEFT's
merge     the merged model's loss in transformers is that, too
convert   `convert --to peft` writes a folder that PEFT loads without a missing or an unexpected key, with that loss
Prints a line a case, then `N passed, N failed`; exit 1 if any failed.
"""
import json
import pathlib
import random
import tempfile
import warnings

import cases
import torch
from check import Short, near
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from tally import Tally, options

CASES = {
    "mixtral": ("mixtral", "block_sparse_moe", ["w1", "w2", "w3"], ["q_proj"]),
    "mixtral_router": ("mixtral", "block_sparse_moe", ["w1", "w2", "w3"], ["q_proj", "gate"]),
    "qwen3_moe": ("qwen3_moe", "mlp", ["gate_proj", "up_proj", "down_proj"], ["o_proj"]),
}
R, ALPHA = 3, 7


def old_adapter(model, module, parts, others, folder):
    """A LoRA of rank R on the layers of every expert and on `others`, as PEFT wrote it with transformers 4."""
    config = model.config
    hidden, experts = config.hidden_size, config.num_experts
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    tensors = {}

    def add(path, inp, out):
        tensors[f"base_model.model.{path}.lora_A.weight"] = 0.3 * torch.randn(R, inp)
        tensors[f"base_model.model.{path}.lora_B.weight"] = 0.3 * torch.randn(out, R)

    for number, layer in enumerate(model.model.layers):
        for other in others:
            if other != "gate":
                linear = getattr(layer.self_attn, other)
                add(f"model.layers.{number}.self_attn.{other}", linear.in_features, linear.out_features)
        if not hasattr(layer.mlp, "experts"):
            continue
        if "gate" in others:
            add(f"model.layers.{number}.{module}.gate", hidden, experts)
        for expert in range(experts):
            for part in parts:
                down = part in ("w2", "down_proj")
                add(f"model.layers.{number}.{module}.experts.{expert}.{part}", *((width, hidden) if down else (hidden, width)))
    folder.mkdir()
    LoraConfig(task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, target_modules=parts + others, inference_mode=True).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def loaded(base, folder):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(cases.load_base(base), folder).eval()
    if said := [str(w.message) for w in heard if "missing" in str(w.message) or "unexpected" in str(w.message)]:
        raise Short(f"PEFT complains of {folder.name}: {said[0][:200]}")
    return model


def check(cli, name, seed, work):
    model, module, parts, others = CASES[name]
    torch.manual_seed(seed)
    rng = random.Random(seed)
    base = work / "base"
    cases.make_model(model, base)
    rows = cases.make_rows(rng)
    path = work / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = cases.load_base(base)
    folder = work / "old"
    old_adapter(plain, module, parts, others, folder)
    want = cases.mean_loss(loaded(base, folder), rows)
    if abs(want - cases.mean_loss(plain, rows)) < 1e-2:
        raise Short("the adapter changes nothing")
    near("loss", cli.eval(base, path, folder)["loss"], want)
    merged = work / "merged"
    cli.run("merge", "--model", base, "--adapter", folder, "--output", merged, "--dtype", "f32")
    near("merged loss in transformers", cases.mean_loss(cases.load_base(merged), rows), want)
    out = work / "peft"
    cli.run("convert", "--adapter", folder, "--to", "peft", "--model", base, "--output", out)
    near("loss of the converted adapter in PEFT", cases.mean_loss(loaded(base, out), rows), want)
    near("loss of the converted adapter", cli.eval(base, path, out)["loss"], want)


def main():
    given, tally = options(__doc__, only="comma-separated names"), Tally()
    for name in CASES:
        if given.only and name not in given.only:
            continue
        with tally.case(name), tempfile.TemporaryDirectory() as work:
            check(given.cli, name, given.seed, pathlib.Path(work))
    tally.end()


if __name__ == "__main__":
    main()
