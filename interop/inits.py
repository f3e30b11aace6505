#!/usr/bin/env python3
"""Hold adapters that peft-cli starts itself against Hugging Face PEFT: every `init_lora_weights`, on a tiny random Llama.

    interop/inits.py PEFT_CLI [--seed 0]

For each start, peft-cli trains some steps from it and
  loads     HF PEFT loads the result on the untouched base and computes the loss that peft-cli reports for it
  start     the loss of the first step is the base's, and what PiSSA and OLoRA take out of the base is what PEFT takes
  eva       ranks and subspaces are those of PEFT's initialize_lora_eva_weights on the same rows
Prints a line a start, then `N passed, N failed`; exit 1 if any failed.
"""
import json
import pathlib
import random
import tempfile

import cases
import torch
from check import Short, near, train
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file
from tally import Tally, options

R, ALPHA, STEPS = 4, 6, 5
STARTS = ["true", "gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora", "eva"]
PREFIX = "base_model.model."

METHOD = """\
type = "lora"
r = {r}
lora_alpha = {alpha}
target_modules = "all-linear"
init_lora_weights = {init}"""


def check_taken(start, base, ours):
    """What is taken out of the base is the second half of the exported factors, with B's sign turned."""
    config = LoraConfig(task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=start)
    model = get_peft_model(cases.load_base(base), config)
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        theirs = module.lora_B["default"].weight @ module.lora_A["default"].weight
        a, b = ours[f"{name}.lora_A.weight"], ours[f"{name}.lora_B.weight"]
        taken = -(b[:, R:] @ a[R:])
        if "niter" in start:
            # From another random start, the directions of a flat spectrum differ; how much of the weight they hold does not.
            if not taken.norm() > 0.98 * theirs.norm():
                raise Short(f"{name}: takes out {taken.norm():.4f} of the base, peft {theirs.norm():.4f}")
        elif not (apart := float((taken - theirs).norm() / theirs.norm())) <= 1e-3:
            raise Short(f"{name}: the part taken out of the base is {apart:.2%} away from peft's")


def check_eva(base, rows, ours, config):
    batch = collate(rows)
    eva = LoraConfig(task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig())
    model = get_peft_model(cases.load_base(base), eva)
    initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    theirs = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_A" in name}
    keys = {key for key in ours if "lora_A" in key}
    if keys != theirs.keys():
        raise Short(f"other layers than peft: {sorted(keys ^ theirs.keys())[:4]}")
    ranks = lambda tensors: {key: tensors[key].shape[0] for key in keys}
    if ranks(ours) != ranks(theirs):
        apart = {key: (r, ranks(theirs)[key]) for key, r in ranks(ours).items() if r != ranks(theirs)[key]}
        raise Short(f"other ranks than peft: {dict(list(apart.items())[:4])}")
    patterns = model.peft_config["default"]
    for key in ("rank_pattern", "alpha_pattern"):
        want = {name.removeprefix(PREFIX): value for name, value in getattr(patterns, key).items()}
        if config[key] != want:
            raise Short(f"{key} is {config[key]}, should be {want}")
    for key in keys:
        # ours has made some steps since, so the subspaces are close, not equal
        a, b = (torch.linalg.qr(t.T.double())[0] for t in (ours[key], theirs[key]))
        cosine = float(torch.linalg.svdvals(a.T @ b).min())
        if not cosine > 0.9:
            raise Short(f"{key}: the subspaces differ, smallest cosine {cosine:.3f}")


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda key, fill: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return dict(input_ids=pad("input_ids", 0), labels=pad("labels", -100), attention_mask=mask)


def check(cli, start, base, rows_file, rows, base_loss, out):
    method = METHOD.format(r=R, alpha=ALPHA, init="true" if start == "true" else json.dumps(start))
    losses = train(cli, out, method, STEPS, cases.ROWS, 5e-3, base=base, rows=rows_file)
    near("loss of the first step", losses[0], base_loss)
    if not losses[-1] < losses[0]:
        raise Short(f"the loss does not fall: {losses}")
    ours = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    model = PeftModel.from_pretrained(cases.load_base(base), out)
    loss = cases.mean_loss(model.eval(), rows)
    near("loss in HF PEFT", loss, cli.eval(base, rows_file, out)["loss"])
    if start.startswith("pissa") or start == "olora":
        check_taken(start, base, ours)
    if start == "eva":
        check_eva(base, rows, ours, config)


def main():
    given, tally = options(__doc__), Tally()
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        base, rows_file = work / "base", work / "rows.jsonl"
        cases.make_model("llama", base)
        rows = cases.make_rows(random.Random(given.seed))
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base_loss = cases.mean_loss(cases.load_base(base), rows)
        for start in STARTS:
            with tally.case(start):
                check(given.cli, start, base, rows_file, rows, base_loss, work / f"{start}.out")
    tally.end()

if __name__ == "__main__":
    main()
