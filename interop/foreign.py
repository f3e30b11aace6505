#!/usr/bin/env python3
"""Hold peft-cli's reading of other programs' LoRA files against Hugging Face PEFT, on tiny random models.

    interop/foreign.py PEFT_CLI [--seed 0] [--only NAME,…]

A LoRA that PEFT saved is written again here as mlx-lm, torchtune and kohya's sd-scripts write theirs, by what is known of these
programs. For each
eval      peft-cli's loss of the folder is PEFT's loss of the adapter
convert   `convert --to peft` writes a folder that PEFT loads without a missing or an unexpected key, with that loss
refuse    a tensor more, one of another shape, one without its partner, and a config without the scale are refused by name
Prints a line a case, then `N passed, N failed`; exit 1 if any failed.
"""
import json
import pathlib
import random
import re
import shutil
import tempfile
import warnings

import cases
import torch
from check import Short, near
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tally import Tally, options

ATTENTION, LINEARS = cases.ATTENTION, cases.LINEARS
PREFIX = "base_model.model."
SETTINGS = {
    "plain": dict(r=4, lora_alpha=12, target_modules=LINEARS),
    "dora": dict(r=3, lora_alpha=5, target_modules=ATTENTION, use_dora=True),
    "patterns": dict(r=4, lora_alpha=6, target_modules=LINEARS, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 9}),
    "one_scale": dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"], layers_to_transform=[0, 2]),
    "embeddings": dict(r=4, lora_alpha=6, target_modules=["embed_tokens", "v_proj"]),
    "head": dict(r=4, lora_alpha=6, target_modules=["lm_head", "k_proj"]),
}


def read(adapter):
    """PEFT's folder: its config, and {path: {part: tensor}}."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    layers = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        path, part = re.fullmatch(rf"{re.escape(PREFIX)}(.+?)\.(lora_.+?|base_layer)(?:\.weight)?", key).groups()
        if part != "base_layer":
            layers.setdefault(path, {})[part] = tensor
    return config, layers


def of_pattern(pattern, path, default):
    found = [value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)]
    return found[0] if found else default


def write(folder, name, tensors, config=None):
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))


def mlx(base, config, layers, folder):
    tensors = {}
    for path, parts in layers.items():
        for part, tensor in parts.items():
            if part == "lora_magnitude_vector":
                tensors[f"{path}.m"] = tensor
            else:
                tensors[f"{path}.lora_{part[-1].lower()}"] = tensor.T
    rank = config["r"]
    # mlx-lm keeps all arguments of its command, with the path of its own recipe among them.
    settings = dict(
        model="base", config=None, fine_tune_type="dora" if config["use_dora"] else "lora", num_layers=-1, seed=0,
        lora_parameters=dict(rank=rank, scale=config["lora_alpha"] / rank, dropout=0.0),
    )
    write(folder, "adapters.safetensors", tensors, settings)


TUNE = {"self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2", "mlp.up_proj": "mlp.w3"}


def torchtune(base, config, layers, folder):
    tensors = {}
    for path, parts in layers.items():
        if path == "lm_head":
            module = "output"
        else:
            number, own = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path).groups()
            module = f"layers.{number}.{TUNE.get(own, own.replace('self_attn', 'attn'))}"
        heads = {"q_proj": base.num_attention_heads, "k_proj": base.num_key_value_heads}.get(path.split(".")[-1])
        for part, tensor in parts.items():
            if heads and part != "lora_A" and base.model_type != "qwen2":
                # From halves of a head's rows to pairs of neighbours.
                halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
                tensor = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(tensor.shape)
            name = {"lora_A": "lora_a.weight", "lora_B": "lora_b.weight", "lora_magnitude_vector": "magnitude"}[part]
            tensors[f"{module}.{name}"] = tensor
    settings = dict(r=config["r"], lora_alpha=config["lora_alpha"], peft_type="LORA", target_modules=["q_proj", "output_proj"])
    write(folder, "adapter_model.safetensors", tensors, settings)


def kohya(base, config, layers, folder, prefix="lora_te_", cut="model."):
    tensors = {}
    for path, parts in layers.items():
        name = prefix + path.removeprefix(cut).replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = parts["lora_A"], parts["lora_B"]
        tensors[f"{name}.alpha"] = torch.tensor(float(of_pattern(config["alpha_pattern"], path, config["lora_alpha"])))
    write(folder, "trained.safetensors", tensors)


def lycoris(base, config, layers, folder):
    kohya(base, config, layers, folder, prefix="lycoris_", cut="")


# program, settings, model
CASES = {
    "mlx": (mlx, "plain", "llama"),
    "mlx_dora": (mlx, "dora", "llama"),
    "mlx_some_layers": (mlx, "one_scale", "tied"),
    "mlx_embeddings": (mlx, "embeddings", "llama"),
    "torchtune": (torchtune, "plain", "llama"),
    "torchtune_dora": (torchtune, "dora", "mqa"),
    "torchtune_head": (torchtune, "head", "llama"),
    "torchtune_qwen2": (torchtune, "one_scale", "qwen2"),
    "kohya": (kohya, "plain", "llama"),
    "kohya_patterns": (kohya, "patterns", "llama"),
    "lycoris": (lycoris, "patterns", "mqa"),
}


def refuses(cli, what, base, rows, folder, says):
    try:
        cli.eval(base, rows, folder)
    except Short as refusal:
        if says not in str(refusal):
            raise Short(f"{what}: the message does not say {says!r}: {refusal}")
    else:
        raise Short(f"{what} is read")


def spoiled(folder, work, change):
    """A copy of the folder with its tensors and config changed."""
    copy = work / "spoiled"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    weights, config = next(copy.glob("*.safetensors")), copy / "adapter_config.json"
    tensors = load_file(weights)
    settings = json.loads(config.read_text()) if config.exists() else None
    change(tensors, settings)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, weights)
    if settings is not None:
        config.write_text(json.dumps(settings))
    return copy


def refusals(cli, base, rows, folder, work):
    first = next(key for key in sorted(load_file(next(folder.glob("*.safetensors")))) if re.search(r"lora_(a|down)", key))
    strange = re.sub(r"(q|k|v|down)_proj|lm_head|embed_tokens|output\.", "nothing", first)

    def add(tensors, settings):
        tensors[strange] = tensors[first]

    def cut(tensors, settings):
        tensors[first] = tensors[first][:, :-1] if tensors[first].shape[0] > tensors[first].shape[1] else tensors[first][:-1]

    def halve(tensors, settings):
        del tensors[first]

    def nan(tensors, settings):
        tensors[first] = tensors[first] * float("nan")

    refuses(cli, "a tensor of no module", base, rows, spoiled(folder, work, add), "nothing")
    refuses(cli, "a factor of another shape", base, rows, spoiled(folder, work, cut), "do not fit")
    refuses(cli, "one factor of two", base, rows, spoiled(folder, work, halve), "one of the two factors")
    refuses(cli, "NaN", base, rows, spoiled(folder, work, nan), first)
    if (folder / "adapter_config.json").exists():
        def no_scale(tensors, settings):
            settings.pop("lora_alpha", None) or settings["lora_parameters"].pop("scale")

        refuses(cli, "a config without the scale", base, rows, spoiled(folder, work, no_scale), "scale")


def check(cli, name, seed, work):
    program, settings, model = CASES[name]
    torch.manual_seed(seed)
    rng = random.Random(seed)
    base = work / "base"
    cases.make_model(model, base)
    rows = cases.make_rows(rng)
    path = work / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = get_peft_model(cases.load_base(base), LoraConfig(task_type="CAUSAL_LM", **SETTINGS[settings]))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(work / "adapter")
    want = cases.mean_loss(tuned.eval(), rows)
    folder = work / name
    program(tuned.base_model.model.config, *read(work / "adapter"), folder)
    near("loss", cli.eval(base, path, folder)["loss"], want)

    out = work / "peft"
    cli.run("convert", "--adapter", folder, "--to", "peft", "--model", base, "--output", out)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(cases.load_base(base), out)
    if said := [str(w.message) for w in heard if "key" in str(w.message)]:
        raise Short(f"PEFT complains of the converted folder: {said[0][:200]}")
    near("loss of the converted adapter in PEFT", cases.mean_loss(loaded.eval(), rows), want)
    near("loss of the converted adapter", cli.eval(base, path, out)["loss"], want)
    cli.run("inspect", folder, "--model", base, "--json")
    refusals(cli, base, path, folder, work)


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
