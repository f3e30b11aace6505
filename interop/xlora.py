#!/usr/bin/env python3
"""Hold peft-cli against HF PEFT's X-LoRA on tiny random models.

    $(scripts/python-env.sh) interop/xlora.py PEFT_CLI [--seed 0]

Of each case: peft-cli computes the loss that PEFT does (relative 1e-5), trains with the losses of torch's AdamW (1e-4) to its weights (2 %
of the way), and what it writes is loaded by PEFT, from the folder as the card says, with the same loss. PEFT loses a part of the classifier
when it saves, so the files to start from are made of its state_dict here; what it saved itself is refused with the reason. Its loader of
experts knows no models whose body is not called `model`, so another stands in its place for these. Prints a line a case, then `N passed,
N failed`; exit 1 if any failed.
"""
import contextlib
import json
import pathlib
import random
import shutil
import tempfile

import cases
import peft
import torch
from check import Short, near, train
from peft.tuners.xlora import model as xlora_model
from safetensors.torch import load_file, save_file
from tally import Tally, options
from training import same_weights, steps

STEPS, BATCH_ROWS, LEARNING_RATE = 5, 4, 5e-3
TARGETS = {
    "llama": [["q_proj", "down_proj"], ["q_proj", "v_proj"], cases.LINEARS],
    "gpt2": [["c_attn"], ["c_attn", "c_fc"], ["c_fc"]],
    "phi3": [["qkv_proj", "o_proj"], ["o_proj", "down_proj"], ["qkv_proj", "gate_up_proj"]],
    "bert": [["query", "value"], ["query", "output.dense"], ["value"]],
}
# The base, and PEFT's keys. Dropout is in the way of comparing steps; in the last case it is there, and only the loss is compared.
CASES = {
    "plain": ("llama", dict()),
    "deep, layer by layer": ("llama", dict(xlora_depth=3, xlora_size=16, xlora_dropout_p=0.0, layerwise_scalings=True, softmax_temperature=0.5)),
    "two of three": ("llama", dict(top_k_lora=2)),
    "softmax of two": ("llama", dict(top_k_lora=2, enable_softmax_topk=True, global_scaling_weight=1.5)),
    "no softmax": ("llama", dict(enable_softmax=False, layerwise_scalings=True)),
    "trained experts": ("llama", dict(use_trainable_adapters=True)),
    "gpt2": ("gpt2", dict(layerwise_scalings=True)),
    "phi3": ("phi3", dict(layerwise_scalings=True)),
    "bert": ("bert", dict(layerwise_scalings=True)),
    "dropout": ("llama", dict(xlora_depth=2, xlora_size=16, xlora_dropout_p=0.4)),
}


def load_expert(lora_model, adapter_name, model_id, **_):
    """PEFT's `_load_adapter_into_lora_model` for any model."""
    config = peft.LoraConfig.from_pretrained(model_id)
    config.inference_mode = False
    lora_model.peft_config[adapter_name] = config
    lora_model.inject_adapter(lora_model.model, adapter_name)
    weights = {key.removeprefix("base_model."): value for key, value in peft.utils.load_peft_weights(model_id).items()}
    found = peft.set_peft_model_state_dict(lora_model, weights, adapter_name)
    assert not found.unexpected_keys, found.unexpected_keys


def make_expert(base, number, targets, folder):
    config = peft.LoraConfig(r=2 + number, lora_alpha=3 + number, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(cases.load_base(base), config).save_pretrained(folder)


def load_base(base):
    model = cases.load_base(base)
    model.config.use_cache = False
    return model


def mixture(base, name, keys, experts):
    """PEFT's X-LoRA of `experts`, with a classifier whose choices differ from token to token."""
    model = load_base(base)
    task = cases.task_type(model)
    config = peft.XLoraConfig(
        task_type=task, hidden_size=model.config.hidden_size, adapters={str(i): str(folder) for i, folder in enumerate(experts)}, **keys
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.base_model.internal_xlora_classifier.parameters():
            parameter.mul_(3)
    return model.eval()


def write(model, experts, out):
    """Its files with everything in them."""
    out.mkdir()
    state = model.state_dict()
    save_file({key: value.contiguous() for key, value in state.items() if "internal_xlora_classifier" in key}, out / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(out)
    for number, folder in enumerate(experts):
        shutil.copytree(folder, out / str(number))


def tensors(folder, experts):
    """All tensors of a folder: the classifier's, and those of experts with their number."""
    found = load_file(folder / "adapter_model.safetensors")
    for number in range(experts):
        found |= {f"{number} {key}": value for key, value in load_file(folder / str(number) / "adapter_model.safetensors").items()}
    return found


def tensors_of(model, experts):
    """The same of PEFT's model."""
    found = {}
    for key, value in model.state_dict().items():
        if "internal_xlora_classifier" in key:
            found[key] = value
        for number in range(experts):
            for part in ("lora_A", "lora_B"):
                if key.endswith(f".{part}.{number}.weight"):
                    path = key.removeprefix("base_model.lora_model.model.").removesuffix(f".{part}.{number}.weight")
                    found[f"{number} base_model.model.{path}.{part}.weight"] = value
    return {key: value.detach().clone() for key, value in found.items()}


def reload(cli, base, rows, rows_file, folder):
    """PEFT opens the folder from within, and computes our loss."""
    with contextlib.chdir(folder):
        model = peft.PeftModel.from_pretrained(load_base(base), ".")
    near("loss in HF PEFT", cases.mean_loss(model.eval(), rows), cli.eval(base, rows_file, folder)["loss"], 1e-5)


def check(cli, base, rows, rows_file, name, keys, experts, out):
    out.mkdir()
    model = mixture(base, name, keys, experts)
    write(model, experts, out / "theirs")
    plain = cases.mean_loss(cases.load_base(base), rows)
    loss = cases.mean_loss(model, rows)
    if not abs(loss - plain) > 1e-3:
        raise Short(f"the case shows nothing: {loss} with experts and {plain} without")
    near("loss", cli.eval(base, rows_file, out / "theirs")["loss"], loss, 1e-5)
    if keys.get("xlora_dropout_p"):
        return
    method = f"init_from = {json.dumps(str(out / 'theirs'))}"
    ours = train(cli, out / "trained", method, STEPS, BATCH_ROWS, LEARNING_RATE, base=base, rows=rows_file)
    start = tensors_of(model, len(experts))
    for step, (got, want) in enumerate(zip(ours, steps(model, rows, STEPS, BATCH_ROWS, LEARNING_RATE), strict=True)):
        near(f"loss of step {step}", got, want, 1e-4)
    wanted, got = tensors_of(model, len(experts)), tensors(out / "trained", len(experts))
    same_weights(start, got, wanted)
    still = [key for key in start if key[0].isdigit() and torch.equal(start[key], got[key])]
    if bool(still) == keys.get("use_trainable_adapters", False):
        raise Short(f"{len(still)} tensors of experts stayed")
    reload(cli, base, rows, rows_file, out / "trained")


def check_recipe(cli, base, rows, rows_file, experts, out):
    """Experts beside the recipe, and what comes of them."""
    out.parent.mkdir()
    for number, folder in enumerate(experts):
        shutil.copytree(folder, out.parent / f"expert-{number}")
    method = 'type = "xlora"\nxlora_depth = 2\nxlora_size = 8\nadapters = {0 = "expert-0", 1 = "expert-1", 2 = "expert-2"}'
    losses = train(cli, out, method, STEPS, BATCH_ROWS, LEARNING_RATE, base=base, rows=rows_file)
    if len(set(losses)) < STEPS:
        raise Short(f"losses {losses}")
    for number in range(len(experts)):
        shutil.rmtree(out.parent / f"expert-{number}")
    reload(cli, base, rows, rows_file, out)


def check_lossy(cli, base, rows_file, experts, out):
    mixture(base, "llama", dict(xlora_depth=2), experts).save_pretrained(out)
    try:
        cli.eval(base, rows_file, out)
    except Short as error:
        if "internal_xlora_classifier.layers.0.weight" not in str(error) or "PEFT" not in str(error):
            raise
    else:
        raise Short("what PEFT saved without a part of its classifier was read")


def main():
    given, tally = options(__doc__), Tally()
    theirs = xlora_model._load_adapter_into_lora_model
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        bases = {}
        for name, targets in TARGETS.items():
            base, rows_file = work / name, work / f"{name}.jsonl"
            base.mkdir()
            cases.make_model(name, base)
            model = cases.load_base(base)
            rows = cases.make_rows(random.Random(given.seed), model.config.num_labels if cases.has_classes(model) else 0, False)
            rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            experts = [work / f"{name}-{number}" for number in range(len(targets))]
            for number, folder in enumerate(experts):
                make_expert(base, number, targets[number], folder)
            bases[name] = base, rows, rows_file, experts
        for label, (name, keys) in CASES.items():
            base, rows, rows_file, experts = bases[name]
            xlora_model._load_adapter_into_lora_model = load_expert if name in ("gpt2", "bert") else theirs
            with tally.case(f"xlora/{label}"):
                check(given.cli, base, rows, rows_file, name, keys, experts, work / f"case-{label}".replace(" ", "_"))
        base, rows, rows_file, experts = bases["llama"]
        xlora_model._load_adapter_into_lora_model = theirs
        with tally.case("xlora/a recipe"):
            check_recipe(given.cli, base, rows, rows_file, experts, work / "recipe" / "out")
        with tally.case("xlora/what PEFT loses"):
            check_lossy(given.cli, base, rows_file, experts, work / "lossy")
    tally.end()


if __name__ == "__main__":
    main()
