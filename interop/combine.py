#!/usr/bin/env python3
"""Hold `peft-cli combine` and `convert --to lora` against Hugging Face PEFT, on tiny random models.

    interop/combine.py PEFT_CLI [--seed 0] [--only NAME,…]

exact      merged by PEFT, what `combine` wrote changes every weight by Σ wᵢ·ΔWᵢ, where W + ΔWᵢ is what PEFT merges adapter i
           to: LoRA of unequal ranks, sites, scales and signs of the weights, rsLoRA, DoRA, embeddings, Conv1D, lora_bias, biases
           and modules saved whole
peft       the same weights as PEFT's add_weighted_adapter, for svd, cat and the types on whole changes, and with
           --peft-compatible for the types on A and B apart and for IA3
convert    merged by PEFT, the LoRA that `convert --to lora` wrote is the adapter of another method; its error falls with the rank
           and is what `--json` says
Every result is loaded by PEFT without a missing or an unexpected key, and has the loss there that `peft-cli eval` gives.
Prints a line a case, then `N passed, N failed`; exit 1 if any failed.
"""
import json
import pathlib
import random
import tempfile

import cases
import torch
from check import Short, near
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tally import Tally, options

ATTENTION, LINEARS = cases.ATTENTION, cases.LINEARS
# Adapters by name: a variant of cases.py, or the settings of a LoRA.
ADAPTERS = {
    "a": dict(r=4, lora_alpha=12, target_modules=ATTENTION),
    "b": dict(r=4, lora_alpha=6, target_modules=ATTENTION),
    "wide": dict(r=6, lora_alpha=3, target_modules=LINEARS, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 9}, alpha_pattern={"down_proj": 32}),
    "rs": dict(r=6, lora_alpha=9, use_rslora=True, target_modules=["v_proj", "down_proj"]),
    "regex": dict(r=3, target_modules=r".*\.(0|2)\.mlp\.(up|down)_proj"),
    "one_layer": dict(r=3, target_modules=ATTENTION, layers_to_transform=[1]),
    "dora": dict(r=3, lora_alpha=6, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "dora_rs": dict(r=5, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=ATTENTION),
    "table": dict(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
    "table_dora": dict(r=2, target_modules=["embed_tokens", "v_proj"], use_dora=True),
    "bias": dict(r=4, lora_alpha=6, lora_bias=True, target_modules=ATTENTION),
    "bias_all": dict(r=4, target_modules=["q_proj", "down_proj"], bias="all"),
    "bias_all_b": dict(r=2, target_modules=["v_proj"], bias="all"),
    "saved": dict(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"]),
    "saved_norm": dict(r=2, target_modules=["v_proj"], modules_to_save=["lm_head", "post_attention_layernorm"]),
    "conv": dict(r=4, lora_alpha=7, target_modules="all-linear"),
    "conv_b": dict(r=2, target_modules=["c_attn", "mlp.c_proj"]),
    "conv_dora": dict(r=2, target_modules=["c_attn"], use_dora=True),
    "ia3": ("IA3Config", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3_b": ("IA3Config", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3_some": ("IA3Config", dict(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
}

# name: model, adapters with weights, further arguments
EXACT = {
    "linear": ("llama", dict(a=0.7, b=-0.4), ["--type", "linear"]),
    "cat": ("llama", dict(a=0.7, b=-0.4), ["--type", "cat"]),
    "svd_full": ("llama", dict(a=0.7, b=-0.4), ["--svd-rank", "8"]),
    "one": ("llama", dict(wide=-1.5), ["--type", "linear"]),
    "unequal": ("llama", dict(a=0.7, wide=1.2, rs=-0.5), ["--type", "linear"]),
    "unequal_cat": ("llama", dict(a=0.7, wide=1.2, rs=-0.5), ["--type", "cat"]),
    "rslora": ("llama", dict(rs=2.0), ["--type", "svd"]),
    "other_targets": ("llama", dict(regex=0.5, one_layer=0.5, a=1.0), ["--type", "linear"]),
    "embeddings": ("llama", dict(table=0.6, a=1.1), ["--type", "linear"]),
    "dora": ("llama", dict(dora=0.6, dora_rs=0.5), ["--type", "linear", "--model"]),
    "dora_cat": ("llama", dict(dora=0.6, dora_rs=-0.2, a=0.8), ["--type", "cat", "--model"]),
    "dora_embeddings": ("llama", dict(table_dora=0.6, table=0.5), ["--type", "linear", "--model"]),
    "lora_bias": ("biased", dict(bias=0.6, a=0.5), ["--type", "linear"]),
    "bias_all": ("biased", dict(bias_all=0.6, bias_all_b=0.5), ["--type", "linear", "--model"]),
    "saved": ("llama", dict(saved=0.6, saved_norm=0.5), ["--type", "linear", "--model"]),
    "conv1d": ("gpt2", dict(conv=0.6, conv_b=-0.5), ["--type", "linear"]),
    "conv1d_dora": ("gpt2", dict(conv=0.6, conv_dora=0.5), ["--type", "linear", "--model"]),
    "tied": ("tied", dict(a=0.6, rs=0.5), ["--type", "cat"]),
    # class heads, which are trained with every adapter, and an encoder-decoder
    "classes": ("bert", dict(bert_lora=0.6, bert_rslora=0.7), ["--type", "linear", "--model"]),
    "seq2seq": ("t5", dict(t5_lora=0.6, t5_regex=-0.7), ["--type", "linear"]),
    "bf16_base": ("bf16", dict(dora=0.6, a=0.5), ["--type", "linear", "--model"]),
    "ia3": ("llama", dict(ia3=0.6, ia3_some=0.9), []),
    "ia3_and_lora": ("llama", dict(ia3=0.6, a=0.9), ["--svd-rank", "48", "--model"]),
    # all elements stay, so that whole changes are summed and decomposed again
    "dora_whole": ("llama", dict(dora=0.6, a=0.9), ["--type", "magnitude_prune", "--density", "1", "--svd-rank", "48", "--model"]),
}

PEFT = {
    "svd": ("svd", {}),
    "svd_rank": ("svd", dict(svd_rank=3)),
    "cat": ("cat", {}),
    "ties_svd": ("ties_svd", dict(density=0.4)),
    "ties_svd_frequency": ("ties_svd", dict(density=0.6, majority_sign_method="frequency")),
    "magnitude_prune_svd": ("magnitude_prune_svd", dict(density=0.3, svd_rank=5)),
    "linear_apart": ("linear", {}),
    "ties_apart": ("ties", dict(density=0.4)),
    "ties_apart_frequency": ("ties", dict(density=0.5, majority_sign_method="frequency")),
    "magnitude_prune_apart": ("magnitude_prune", dict(density=0.3)),
}
# On a Llama, on a Conv1D, and with an embedding.
PEFT_ON = [("llama", dict(a=0.7, b=0.4)), ("llama", dict(a=0.7, b=-0.4)), ("gpt2", dict(conv_b=0.7, conv_c=0.4))]
ADAPTERS["conv_c"] = dict(r=2, lora_alpha=3, target_modules=["c_attn", "mlp.c_proj"])

CONVERT = ["dora", "table_dora", "ia3", "bias", "saved"] + [
    "loha", "lokr", "vera", "adalora", "hra", "oft", "boft", "miss", "road", "delora", "gralora", "fourierft", "shira", "randlora", "vblora"
]


class World:
    """Models and adapters, made once each."""

    def __init__(self, cli, work, seed):
        self.cli, self.work, self.seed = cli, work, seed

    def base(self, model):
        folder = self.work / model / "base"
        if not folder.exists():
            torch.manual_seed(self.seed)
            cases.make_model(model, folder)
            base = cases.load_base(folder)
            rows = cases.make_rows(random.Random(self.seed), base.config.num_labels if cases.has_classes(base) else 0, cases.has_targets(base))
            (folder.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def rows(self, model):
        return self.base(model).parent / "rows.jsonl"

    def adapter(self, model, name):
        base = self.base(model)
        folder = base.parent / name
        if not folder.exists():
            if name in ADAPTERS:
                cases.VARIANTS[name] = ADAPTERS[name]
            torch.manual_seed(self.seed + sum(name.encode()))
            adapted = cases.load_base(base)
            adapted = get_peft_model(adapted, cases.config_of(name, cases.task_type(adapted)))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn_like(parameter)
            adapted.save_pretrained(folder)
        return folder

    def merged(self, model, adapter=None):
        """The weights that peft merges an adapter to, and the loss before."""
        base = cases.load_base(self.base(model))
        if adapter is None:
            return untied(base.state_dict()), None
        loaded = PeftModel.from_pretrained(base, adapter).eval()
        loss = cases.mean_loss(loaded, [json.loads(line) for line in self.rows(model).read_text().splitlines()])
        return untied(loaded.merge_and_unload().state_dict()), loss

    def strictly(self, model, adapter):
        """peft has a tensor for every key of the file, and the file has every key that peft would write."""
        loaded = PeftModel.from_pretrained(cases.load_base(self.base(model)), adapter)
        with tempfile.TemporaryDirectory() as again:
            loaded.save_pretrained(again)
            theirs = load_file(pathlib.Path(again) / "adapter_model.safetensors")
        ours = load_file(adapter / "adapter_model.safetensors")
        # peft writes the table of an adapted embedding whenever it sees one among the targets
        keys = lambda tensors: {key for key in tensors if not key.endswith("base_layer.weight")}
        if keys(ours) != keys(theirs):
            raise Short(f"keys: too many {sorted(keys(ours) - keys(theirs))[:3]}, missing {sorted(keys(theirs) - keys(ours))[:3]}")
        for key in keys(ours):
            if ours[key].shape != theirs[key].shape or not torch.equal(ours[key].float(), theirs[key].float()):
                raise Short(f"{key} is not in peft's model as it is in the file")

    def holds(self, model, adapter, wanted, rtol=1e-5):
        """Merged by peft, the adapter makes the weights `wanted`, and it has the same loss in peft and here."""
        self.strictly(model, adapter)
        got, loss = self.merged(model, adapter)
        start, _ = self.merged(model)
        changed = sum(float((wanted[key].double() - start[key].double()).square().sum()) for key in start) ** 0.5
        for key, weight in wanted.items():
            apart = float((got[key].double() - weight.double()).norm())
            if not apart <= rtol * max(changed, 1.0):
                raise Short(f"{key} is {apart:.2e} away; all changes together are {changed:.2e}")
        near("loss", self.cli.eval(self.base(model), self.rows(model), adapter)["loss"], loss)

    def combine(self, model, weights, out, *arguments):
        adapters = [argument for name, weight in weights.items() for argument in ("--adapter", f"{self.adapter(model, name)}={weight}")]
        arguments = list(arguments)
        if arguments and arguments[-1] == "--model":
            arguments.append(self.base(model))
        self.cli.run("combine", *adapters, *arguments, "--output", out)
        return out


def untied(state):
    return {key: tensor.clone() for key, tensor in state.items()}


def exact(world, work, model, weights, arguments):
    out = world.combine(model, weights, work / "out", *arguments)
    start, _ = world.merged(model)
    wanted = {key: tensor.double() for key, tensor in start.items()}
    for name, weight in weights.items():
        merged, _ = world.merged(model, world.adapter(model, name))
        for key, tensor in start.items():
            # merging puts a bias where lora_bias needs one
            wanted[key] += weight * (merged[key].double() - tensor.double())
    world.holds(model, out, wanted, 1e-3 if model == "bf16" else 1e-5)


def like_peft(world, work, model, weights, kind, settings):
    arguments = ["--type", kind]
    for key, value in settings.items():
        arguments += [f"--{key.replace('_', '-')}", value]
    out = world.combine(model, weights, work / "out", *arguments, "--peft-compatible")
    names = list(weights)
    loaded = PeftModel.from_pretrained(cases.load_base(world.base(model)), world.adapter(model, names[0]), adapter_name=names[0])
    for name in names[1:]:
        loaded.load_adapter(world.adapter(model, name), adapter_name=name)
    loaded.add_weighted_adapter(names, list(weights.values()), "sum", combination_type=kind, **settings)
    loaded.set_adapter("sum")
    world.holds(model, out, untied(loaded.merge_and_unload().state_dict()))


def ia3_like_peft(world, work):
    weights = dict(ia3=0.7, ia3_b=0.6)
    out = world.combine("llama", weights, work / "out", "--peft-compatible")
    loaded = PeftModel.from_pretrained(cases.load_base(world.base("llama")), world.adapter("llama", "ia3"), adapter_name="ia3")
    loaded.load_adapter(world.adapter("llama", "ia3_b"), adapter_name="ia3_b")
    loaded.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    loaded.set_adapter("sum")
    world.holds("llama", out, untied(loaded.merge_and_unload().state_dict()))


def convert(world, work, name):
    model = "biased" if name == "bias" else "llama"
    adapter = world.adapter(model, name)
    wanted, _ = world.merged(model, adapter)
    start, _ = world.merged(model)

    def run(*arguments):
        out = work / "-".join(map(str, arguments)).strip("-")
        text = world.cli.run("convert", "--adapter", adapter, "--to", "lora", "--model", world.base(model), *arguments, "--output", out, "--json")
        return out, json.loads(text.splitlines()[-1])

    out, facts = run("--max-error", "0")
    world.holds(model, out, wanted, 2e-5)
    if not facts["relative_error"] <= 1e-6:
        raise Short(f"without loss, the error is {facts['relative_error']}")
    last = 2.0
    for rank in (1, 4, 12):
        out, facts = run("--rank", rank)
        world.strictly(model, out)
        if json.loads((out / "adapter_config.json").read_text())["r"] != rank:
            raise Short(f"r is not {rank}")
        got, _ = world.merged(model, out)
        low_rank = [f"{site['site']}.weight" for site in facts["sites"]]
        total = lambda of: sum(float(of(key).square().sum()) for key in low_rank) ** 0.5
        error = total(lambda key: got[key].double() - wanted[key].double()) / total(lambda key: wanted[key].double() - start[key].double())
        if abs(error - facts["relative_error"]) > 1e-4 or error > last + 1e-6:
            raise Short(f"rank {rank}: the error is {error:.6f}, reported as {facts['relative_error']:.6f}, after {last:.6f}")
        last = error


def main():
    given, tally = options(__doc__, only="comma-separated names"), Tally()
    tests = {f"exact/{name}": (exact, *case) for name, case in EXACT.items()}
    for number, (model, weights) in enumerate(PEFT_ON):
        for name, case in PEFT.items():
            tests[f"peft/{name}/{number}"] = (like_peft, model, weights, *case)
    tests["peft/ia3"] = (ia3_like_peft,)
    tests |= {f"convert/{name}": (convert, name) for name in CONVERT}
    with tempfile.TemporaryDirectory() as folder:
        world = World(given.cli, pathlib.Path(folder), given.seed)
        for name, (test, *arguments) in tests.items():
            if given.only and not any(name == o or name.startswith(o + "/") for o in given.only):
                continue
            with tally.case(f"combine/{name}"), tempfile.TemporaryDirectory() as work:
                test(world, pathlib.Path(work), *arguments)
    tally.end()

if __name__ == "__main__":
    main()
