#!/usr/bin/env python3
"""Hold peft-cli against AdapterHub's `adapters` package, on tiny random models and with that package's own files.

    $(scripts/adapterhub-env.sh) interop/adapterhub.py PEFT_CLI [--seed 0] [--only MODEL[/VARIANT],…]

For each model and variant, with an adapter that `adapters` made and saved:
  eval     peft-cli computes the loss that `adapters` computes (relative 1e-5), and logits of one place, seen as log
           probabilities of single labels
  train    from there, peft-cli and torch's AdamW on the same rows have the same losses, step by step
  head     a class head of AdapterHub's own kind, beside the adapter, is read as the layers that it stands for
  weights  of LoRA, (IA)³, prefixes and unions, that training moves the parameters as torch's AdamW does (within 2 % in the L2 norm)
  convert  what peft-cli trained, converted to AdapterHub's files, loads with no tensor missing or left over and gives the
           loss that peft-cli reports for it
  preset   a union of one of peft-cli's presets has the config of `adapters`
And of adapters that are put together, whose folders `adapters` made:
  eval, train, convert   as above, of a fusion or a stack; what is trained is the fusion
  beside   a fusion's own folder is read with those of its adapters beside it
  compose  a stack or a mean that peft-cli makes of single adapters is the one of `adapters`
Prints a line a case, then `N passed, N failed`; exit 1 if any failed.
"""
import json
import logging
import pathlib
import random
import sys
import tempfile
import types

import adapters
import cases
import torch
from adapters import (
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DiReftConfig,
    DoubleSeqBnConfig,
    DynamicAdapterFusionConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    ReftConfig,
    SeqBnConfig,
    StaticAdapterFusionConfig,
    UniPELTConfig,
)
from adapters.composition import Average, Fuse, Stack
from adapters.methods import modeling
from check import Short, near, train
from safetensors.torch import load_file, save_file
from tally import Tally, options
from training import same_weights, steps

STEPS, BATCH_ROWS, LEARNING_RATE = 5, 4, 2e-3
LOGITS = 6
MODELS = ["llama", "head_dim_small", "mistral", "gpt2", "bert", "roberta", "xlm_roberta", "distilbert", "t5", "llama_classes", "gpt2_classes"]
VARIANTS = {
    "seq_bn": SeqBnConfig(reduction_factor=8),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor={"0": 4, "default": 12}, leave_out=[1]),
    "par_bn": ParBnConfig(reduction_factor=6, mh_adapter=True),
    "scaled_par_bn": ParBnConfig(reduction_factor=3, scaling="learned"),
    "own_norm": SeqBnConfig(reduction_factor=6, scaling="channel", ln_after=True, adapter_residual_before_ln=True, non_linearity="gelu"),
    "cross": SeqBnConfig(reduction_factor=8, cross_adapter=True, mh_adapter=True),
    "adapter_plus": AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0, leave_out=[0]),
    "compacter": CompacterConfig(reduction_factor=8, phm_dim=3, phm_rank=2, phm_c_init="uniform"),
    "compacter_shared": CompacterPlusPlusConfig(reduction_factor=6, phm_dim=4, shared_W_phm=True),
    "compacter_own": CompacterPlusPlusConfig(
        reduction_factor=8, phm_dim=2, factorized_phm_W=False, shared_phm_rule=False, factorized_phm_rule=True, phm_bias=False
    ),
    "gated": DoubleSeqBnConfig(reduction_factor=6, use_gating=True),
    "gated_parallel": ParBnConfig(reduction_factor=6, use_gating=True, init_weights="bert"),
    "stochastic": AdapterPlusConfig(reduction_factor=8),
    "loreft": LoReftConfig(r=3, dropout=0.0),
    "noreft": NoReftConfig(r=2, prefix_positions=2, suffix_positions=2, dropout=0.0, layers=[0, 2], non_linearity="tanh"),
    "direft": DiReftConfig(r=2, suffix_positions=1, tied_weights=True, dropout=0.0),
    "last_tokens": LoReftConfig(r=2, prefix_positions=0, suffix_positions=2, dropout=0.0),
    "input_residual": DoubleSeqBnConfig(reduction_factor=6, original_ln_before=True, residual_before_ln=False, non_linearity="tanh"),
}
# Adapters to put together, and how: the setup, and the config of its fusion.
PARTS = {
    "a": SeqBnConfig(reduction_factor=8),
    "b": SeqBnConfig(reduction_factor=4, non_linearity="tanh", scaling=2.0, original_ln_before=False),
    "c": SeqBnConfig(reduction_factor=6, non_linearity="gelu", residual_before_ln=False, ln_after=True),
    "lang": SeqBnConfig(reduction_factor=6, original_ln_before=False),
    "wide": DoubleSeqBnConfig(reduction_factor=6),
}
MEAN = [3.0, 1.0]
SETUPS = {
    "fusion": (Fuse("a", "b", "c"), DynamicAdapterFusionConfig()),
    "fusion_static": (Fuse("c", "a"), StaticAdapterFusionConfig(query_before_ln=True)),
    "fusion_late_value": (Fuse("a", "b"), DynamicAdapterFusionConfig(value_before_softmax=False, value_initialized=False, query=False)),
    "fusion_residual_before": (Fuse("b", "a"), DynamicAdapterFusionConfig(residual_before=True, regularization=False)),
    "fusion_of_stack": (Fuse(Stack("b", "c"), "a"), DynamicAdapterFusionConfig(key=False)),
    "fusion_on_stack": (Stack("lang", Fuse("a", "b")), DynamicAdapterFusionConfig()),
    "stack": (Stack("wide", "b", "a"), None),
    # The package divides by the number of adapters once more.
    "average": (Average("a", "b", weights=[2 * w / sum(MEAN) for w in MEAN], normalize_weights=False), None),
}
# Methods that PEFT has too, and unions. A prefix that a network makes is read as what the network makes, and not trained as it.
FLAT = PrefixTuningConfig(flat=True, prefix_length=4)
METHODS = {
    "lora": LoRAConfig(r=4, alpha=6, attn_matrices=["q", "k", "v"], intermediate_lora=True, leave_out=[1]),
    "lora_gated": LoRAConfig(r=3, alpha=6, output_lora=True, use_gating=True),
    "lora_others": LoRAConfig(r=3, alpha=6, selfattn_lora=False, attn_matrices=[], intermediate_lora=True, output_lora=True),
    "ia3": IA3Config(output_lora=True),
    "prefix": PrefixTuningConfig(prefix_length=5, bottleneck_size=12, non_linearity="gelu"),
    "prefix_gated": FLAT.replace(use_gating=True, shared_gating=False),
    "mam": ConfigUnion(FLAT, ParBnConfig(reduction_factor=6)),
    "mam_network": MAMConfig(PrefixTuningConfig(prefix_length=3, bottleneck_size=20)),
    "unipelt": UniPELTConfig(FLAT, SeqBnConfig(reduction_factor=8), LoRAConfig(r=4, alpha=2)),
    "unipelt_ia3": ConfigUnion(FLAT, SeqBnConfig(reduction_factor=8, ln_before=True), IA3Config(intermediate_lora=False)),
}
PRESETS = {"preset mam": MAMConfig(), "preset unipelt": UniPELTConfig()}
# Where not all of them are.
SOME_METHODS = {
    # Whose window the package keeps from no prefix; peft-cli refuses rows for which that matters.
    "mistral": ["lora", "ia3"],
    "gpt2": ["mam", "prefix_gated", "lora_others"],
    "gpt2_classes": ["mam"],
    "roberta": ["unipelt"],
    "distilbert": ["unipelt", "ia3", "lora"],
    "t5": ["lora", "lora_gated", "ia3"],
    "llama_classes": ["unipelt", "lora", "prefix_gated"],
}
# All variants on one model of each kind, the first two on the others.
EVERYTHING = ["llama", "bert"]
# Only where a decoder attends to an encoder.
CROSS = "cross"
# Class heads of AdapterHub's own that have the layers of a transformers class.
HEADS = {
    "bert": [dict(layers=1, use_pooler=True), dict(layers=2)],
    "roberta": [dict(layers=2)],
    "distilbert": [dict(layers=2, activation_function="relu")],
}


class Identity(torch.nn.Module):
    """Stochastic depth in evaluation, for which the package wants torchvision."""

    def __init__(self, **_):
        super().__init__()

    def forward(self, x):
        return x


def without_torchvision():
    modeling.is_torchvision_available = lambda: True
    depth = types.ModuleType("torchvision.ops.stochastic_depth")
    depth.StochasticDepth = Identity
    sys.modules |= {"torchvision": types.ModuleType("torchvision"), "torchvision.ops": types.ModuleType("torchvision.ops"), depth.__name__: depth}


def parts(config):
    return config.configs if isinstance(config, ConfigUnion) else [config]


def of_theirs(base, load=None, config=None):
    """AdapterHub's model: the base with a new adapter moved away from its start, or with the one in a folder, of such a config."""
    # Of torch's own attention the package asks a causal mask from the first key on, which may be a prefix's.
    has_prefix = any(isinstance(part, PrefixTuningConfig) for part in parts(config or load))
    model = cases.load_base(base, **(dict(attn_implementation="eager") if has_prefix else {}))
    adapters.init(model)
    if isinstance(load, pathlib.Path):
        info = {}
        model.load_adapter(str(load), load_as="a", set_active=True, loading_info=info, use_safetensors=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            raise Short(f"adapters finds {info} in what was converted")
        return model.eval()
    model.add_adapter("a", config=load)
    model.train_adapter("a")
    for name, parameter in model.named_parameters():
        if name.startswith("lm_head"):
            parameter.requires_grad = False  # an output layer is the base's; a class head goes with the adapter
        if parameter.requires_grad:
            noise = 0.1 * torch.randn_like(parameter)
            # The diagonal of an orthogonal parametrisation is signs, which the package cuts to whole numbers.
            parameter.data += noise.fill_diagonal_(0) if name.endswith("weight.original") else noise
    return model.eval()


def single_labels(row, model):
    """Copies of a row where one label counts, each another: their losses are the logits of one place but for a constant."""
    if cases.has_classes(model):
        return [dict(row, label=label) for label in range(model.config.num_labels)]
    ids = row["input_ids"]
    of_place = lambda label: [-100] * (len(ids) - 1) + [label]
    return [dict(input_ids=ids, labels=of_place(label)) for label in range(3, cases.VOCABULARY, cases.VOCABULARY // LOGITS)]


def near_logits(cli, base, adapter, model, row, out):
    for number, single in enumerate(single_labels(row, model)):
        rows_file = out / "single.jsonl"
        rows_file.write_text(json.dumps(single) + "\n")
        near(f"log probability of label {number}", cli.eval(base, rows_file, adapter)["loss"], cases.mean_loss(model, [single]), 1e-5)


def save(model, folder):
    """Saves the adapter. The package cannot write as .safetensors what several layers share; this is what peft-cli says of a pickle."""
    model.save_adapter(str(folder), "a")
    for pickle, wanted in [("pytorch_adapter.bin", "adapter.safetensors"), ("pytorch_model_head.bin", "model_head.safetensors")]:
        if (folder / pickle).exists():
            tensors = {key: value.clone() for key, value in torch.load(folder / pickle, weights_only=True).items()}
            save_file(tensors, folder / wanted, metadata={"format": "pt"})
            (folder / pickle).unlink()


def check(cli, base, rows, rows_file, config, out):
    model = of_theirs(base, config)
    saved = out / "theirs"
    save(model, saved)
    is_reft = isinstance(config, ReftConfig)
    if is_reft and not config.subtract_projection:
        # The package does not write this key: what it saves of a DiReFT is a NoReFT to itself. We read it.
        settings = json.loads((saved / "adapter_config.json").read_text())
        settings["config"]["subtract_projection"] = False
        (saved / "adapter_config.json").write_text(json.dumps(settings))
    near("loss", cli.eval(base, rows_file, saved)["loss"], cases.mean_loss(model, rows), 1e-5)
    near_logits(cli, base, saved, model, rows[0], out)

    trained = out / "trained"
    method = f"init_from = {json.dumps(str(saved))}"
    ours = train(cli, trained, method, STEPS, BATCH_ROWS, LEARNING_RATE, base=base, rows=rows_file)
    alone = is_reft or any(part.use_gating or isinstance(part, PrefixTuningConfig) for part in parts(config))
    changes = any(getattr(part, "stochastic_depth", 0) or not getattr(part, "flat", True) for part in parts(config))
    if not changes:
        for step, (got, want) in enumerate(zip(ours, steps(model, rows, STEPS, BATCH_ROWS, LEARNING_RATE, alone=alone), strict=True)):
            near(f"loss of step {step}", got, want, 1e-4)

    if model.config.model_type == "t5" and isinstance(config, LoRAConfig):
        return  # read and not written
    converted = out / "converted"
    cli.run("convert", "--adapter", trained, "--to", "adapterhub", "--output", converted, "--model", base, "--name", "a")
    if not changes and any(config is method for method in METHODS.values()):
        same_weights(load_file(saved / "adapter.safetensors"), load_file(converted / "adapter.safetensors"), model.state_dict())
    loaded = of_theirs(base, converted, config)
    near("loss in adapters", cases.mean_loss(loaded, rows), cli.eval(base, rows_file, trained)["loss"], 1e-5)
    near_logits(cli, base, trained, loaded, rows[0], out)
    # and back, under another name
    cli.run("convert", "--adapter", converted, "--to", "peft", "--output", out / "back")
    near("loss of what came back", cli.eval(base, rows_file, out / "back")["loss"], cli.eval(base, rows_file, trained)["loss"], 1e-6)


def put_together(base, setup, fusion=None, load=None):
    """AdapterHub's model with adapters in a setup, moved away from their start and the fusion set to be trained; or with the setup
    of a folder."""
    model = cases.load_base(base)
    adapters.init(model)
    if load:
        model.load_adapter_setup(str(load), set_active=True, use_safetensors=True)
        return model.eval()
    for name in sorted(setup.flatten()):
        model.add_adapter(name, config=PARTS[name])
    # So that all of them are moved, and a head with them.
    model.train_adapter(Stack(*sorted(setup.flatten())))
    move(model)
    if fusion:
        fuse = setup if isinstance(setup, Fuse) else setup[-1]
        model.add_adapter_fusion(fuse.name.split(","), fusion)
        model.train_adapter_fusion(setup)
        move(model)
    model.set_active_adapters(setup)
    return model.eval()


def move(model):
    for name, parameter in model.named_parameters():
        if name.startswith("lm_head"):
            parameter.requires_grad = False
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def check_setup(cli, base, rows, rows_file, setup, fusion, out):
    model = put_together(base, setup, fusion)
    saved, beside = out / "theirs", out / "beside"
    has_classes = cases.has_classes(model)
    model.save_adapter_setup(str(saved), setup, head_setup=has_classes or None, use_safetensors=True)
    want = cases.mean_loss(model, rows)
    near("loss", cli.eval(base, rows_file, saved)["loss"], want, 1e-5)
    near_logits(cli, base, saved, model, rows[0], out)
    beside.mkdir()
    for name in setup.flatten():
        model.save_adapter(str(beside / name), name, use_safetensors=True)
    if not fusion:
        # The package's mean has the weights of its files divided by their sum, as we have.
        weights = MEAN if isinstance(setup, Average) else [1] * len(setup)
        parts = [part for name, weight in zip(setup, weights) for part in ("--adapter", f"{beside / name}={weight}")]
        kind = "average" if isinstance(setup, Average) else "stack"
        ours = out / "ours"
        cli.run("compose", "--setup", kind, *parts, "--model", base, "--output", ours)
        near("loss of ours", cli.eval(base, rows_file, ours)["loss"], want, 1e-5)
        near_logits(cli, base, ours, model, rows[0], out)
    else:
        if isinstance(setup, Fuse) and all(isinstance(part, str) for part in setup):
            model.save_adapter_fusion(str(beside / "fusion"), setup, use_safetensors=True)
            near("loss with adapters beside", cli.eval(base, rows_file, beside / "fusion")["loss"], want, 1e-5)
        ours = out / "trained"
        losses = train(cli, ours, f"init_from = {json.dumps(str(saved))}", STEPS, BATCH_ROWS, LEARNING_RATE, base=base, rows=rows_file)
        penalty = model.base_model.get_fusion_regularization_loss if fusion.regularization else None
        expected = steps(model, rows, STEPS, BATCH_ROWS, LEARNING_RATE, penalty=penalty)
        for step, (got, expect) in enumerate(zip(losses, expected, strict=True)):
            near(f"loss of step {step}", got, expect, 1e-4)
        near("loss of what was trained", cli.eval(base, rows_file, ours)["loss"], cases.mean_loss(model, rows), 1e-4)
    converted = out / "converted"
    cli.run("convert", "--adapter", ours, "--to", "adapterhub", "--output", converted, "--model", base)
    if not isinstance(setup, Average):
        loaded = put_together(base, setup, load=converted)
        near("loss in adapters", cases.mean_loss(loaded, rows), cli.eval(base, rows_file, ours)["loss"], 1e-5)
    cli.run("convert", "--adapter", converted, "--to", "peft", "--output", out / "back")
    near("loss of what came back", cli.eval(base, rows_file, out / "back")["loss"], cli.eval(base, rows_file, ours)["loss"], 1e-6)


def check_preset(cli, base, rows, rows_file, name, config, out):
    start, converted = out / "start", out / "converted"
    train(cli, start, f'type = "union"\npreset = "{name}"', 1, BATCH_ROWS, LEARNING_RATE, base=base, rows=rows_file)
    cli.run("convert", "--adapter", start, "--to", "adapterhub", "--output", converted, "--model", base)
    model = of_theirs(base, converted, config)
    near("loss in adapters", cases.mean_loss(model, rows), cli.eval(base, rows_file, start)["loss"], 1e-5)
    got = ConfigUnion.from_dict(json.loads((converted / "adapter_config.json").read_text())["config"])
    # What made the prefix is not stored.
    of_network = ("flat", "bottleneck_size")
    for ours, theirs in zip(parts(got), parts(config), strict=True):
        for key, value in theirs.to_dict().items():
            if key not in of_network and ours.to_dict().get(key) != value:
                raise Short(f"{key} of {type(theirs).__name__} is {ours.to_dict().get(key)}, should be {value}")


def check_head(cli, base, rows, rows_file, settings, out):
    model = adapters.AutoAdapterModel.from_pretrained(str(base), dtype=torch.float32)
    model.add_adapter("a", config=SeqBnConfig(reduction_factor=8))
    model.add_classification_head("a", num_labels=3, **settings)
    model.train_adapter("a")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_adapter(str(out), "a", use_safetensors=True)
    model.config.architectures = ["ForSequenceClassification"]  # for the labels of the rows
    near("loss", cli.eval(base, rows_file, out)["loss"], cases.mean_loss(model.eval(), rows), 1e-5)


def main():
    given, tally = options(__doc__, only="MODEL or MODEL/VARIANT, several with commas"), Tally()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    without_torchvision()
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for name in MODELS:
            variants = [v for v in VARIANTS if v != CROSS] if name in EVERYTHING else list(VARIANTS)[:2]
            # What a T5's adapters share is lost where AdapterHub's package saves them.
            variants += [CROSS, "compacter_own", "adapter_plus"] * (name == "t5")
            variants += ["compacter"] * (name == "gpt2")
            # The package gives a T5's decoder the encoder's positions.
            variants += ["gated"] * (name == "t5") + ["gated", "loreft"] * (name in ("gpt2", "distilbert", "llama_classes"))
            variants += SETUPS if name in EVERYTHING else ["fusion", "stack"]
            variants += [*METHODS, *PRESETS] if name in EVERYTHING else SOME_METHODS.get(name, [])
            variants += [f"head {number}" for number in range(len(HEADS.get(name, [])))]
            variants = [v for v in variants if cases.wanted(given.only, name, v)]
            if not variants:
                continue
            base, rows_file = work / name / "base", work / name / "rows.jsonl"
            base.mkdir(parents=True)
            cases.make_model(name, base)
            model = cases.load_base(base)
            classes = model.config.num_labels if cases.has_classes(model) else 0
            rows = cases.make_rows(random.Random(given.seed), classes, cases.has_targets(model))
            rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            for variant in variants:
                out = work / name / variant
                out.mkdir()
                with tally.case(f"{name}/{variant}"):
                    if variant in VARIANTS:
                        check(given.cli, base, rows, rows_file, VARIANTS[variant], out)
                    elif variant in METHODS:
                        check(given.cli, base, rows, rows_file, METHODS[variant], out)
                    elif variant in PRESETS:
                        check_preset(given.cli, base, rows, rows_file, variant.split()[-1], PRESETS[variant], out)
                    elif variant in SETUPS:
                        check_setup(given.cli, base, rows, rows_file, *SETUPS[variant], out)
                    else:
                        check_head(given.cli, base, rows, rows_file, HEADS[name][int(variant.split()[-1])], out)
    tally.end()

if __name__ == "__main__":
    main()
