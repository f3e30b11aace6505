#!/usr/bin/env python3
"""Hold peft-cli against LLM-Adapters' formulas (Hu et al. 2023, arXiv:2304.01933), written again here in PyTorch, on a tiny random
model and with files as its fork of PEFT has them.

    $(scripts/python-env.sh) interop/llm_adapters.py PEFT_CLI [--seed 0]

For a series, a parallel and a learned-scale adapter: peft-cli computes the loss (relative 1e-5), and trains with the losses of
torch's AdamW (1e-4). Prints a line a case, then `N passed, N failed`; exit 1 if any failed.
"""
import json
import pathlib
import random
import tempfile

import cases
import torch
from check import near, train
from safetensors.torch import save_file
from tally import Tally, options
from training import steps

STEPS, BATCH_ROWS, LEARNING_RATE, SIZE = 5, 4, 2e-3, 6
SERIES = dict(target_modules=["gate_proj", "up_proj", "down_proj"], use_parallel_adapter=False, scaling=1.0, non_linearity="tanh")
PARALLEL = dict(target_modules=["v_proj", "down_proj"], use_parallel_adapter=True, scaling=4.0, non_linearity="relu")
CASES = {"series": SERIES, "parallel": PARALLEL, "learned": dict(SERIES, scaling="learned"), "biases": dict(PARALLEL, biases=True)}
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


class Adapted(torch.nn.Module):
    """A linear layer with an adapter in front (series, inner layers), behind (series, the last) or beside."""

    def __init__(self, layer, side, config):
        super().__init__()
        self.layer, self.side, self.act = layer, side, ACTIVATIONS[config["non_linearity"]]
        inputs = layer.out_features if side == "behind" else layer.in_features
        outputs = layer.in_features if side == "front" else layer.out_features
        bias = config.get("biases", False)
        self.adapter_down = torch.nn.Linear(inputs, SIZE, bias=bias)
        self.adapter_up = torch.nn.Linear(SIZE, outputs, bias=bias)
        learned = config["scaling"] == "learned"
        self.adapter_scaling = torch.nn.Parameter(torch.full((1,), 1.3)) if learned else config["scaling"]

    def forward(self, x):
        change = lambda h: self.adapter_up(self.act(self.adapter_down(h))) * self.adapter_scaling
        if self.side == "front":
            return self.layer(x + change(x))
        y = self.layer(x)
        return y + change(y if self.side == "behind" else x)


def adapted(base, config, out):
    """The model with adapters, and their files in `out`."""
    model = cases.load_base(base).requires_grad_(False)
    tensors = {}
    for path, layer in list(model.named_modules()):
        name = path.split(".")[-1]
        if name in config["target_modules"]:
            side = "beside" if config["use_parallel_adapter"] else "behind" if name == "down_proj" else "front"
            module = Adapted(layer, side, config)
            setattr(model.get_submodule(path[: -len(name) - 1]), name, module)
            for key, value in module.named_parameters():
                if key.startswith("adapter_"):
                    tensors[f"base_model.model.{path}.{key}"] = value
    out.mkdir()
    keys = {key: value for key, value in config.items() if key != "biases"}
    more = dict(peft_type="BOTTLENECK", bottleneck_size=SIZE, adapter_dropout=0.0, bias="none", init_weights="bert", task_type="CAUSAL_LM")
    (out / "adapter_config.json").write_text(json.dumps(keys | more | dict(base_model_name_or_path=str(base), inference_mode=True)))
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, out / "adapter_model.safetensors")
    return model.eval(), list(tensors.values())


def check(cli, base, rows, rows_file, config, out):
    model, trained = adapted(base, config, out / "theirs")
    near("loss", cli.eval(base, rows_file, out / "theirs")["loss"], cases.mean_loss(model, rows), 1e-5)
    method = f"init_from = {json.dumps(str(out / 'theirs'))}"
    ours = train(cli, out / "trained", method, STEPS, BATCH_ROWS, LEARNING_RATE, base=base, rows=rows_file)
    theirs = steps(model, rows, STEPS, BATCH_ROWS, LEARNING_RATE, trained)
    for step, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        near(f"loss of step {step}", got, want, 1e-4)
    near("loss after training", cli.eval(base, rows_file, out / "trained")["loss"], cases.mean_loss(model, rows), 1e-4)


def main():
    given, tally = options(__doc__), Tally()
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        base, rows_file = work / "base", work / "rows.jsonl"
        base.mkdir()
        cases.make_model("llama", base)
        rows = cases.make_rows(random.Random(given.seed), 0, False)
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, config in CASES.items():
            out = work / name
            out.mkdir()
            with tally.case(f"llm-adapters/{name}"):
                check(given.cli, base, rows, rows_file, config, out)
    tally.end()

if __name__ == "__main__":
    main()
