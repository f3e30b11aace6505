#!/usr/bin/env python3
"""Hold peft-cli against the cases of interop/cases.py. Prints a line a case, then `N passed, N failed`; exit 1 if any failed.

    interop/check.py PEFT_CLI CASES [--only MODEL[/VARIANT],…] [--steps eval,merge,train,accumulate,reload,weights] [--rtol 1e-4]

eval        losses, counted tokens, rows (and accuracy) of the base and of base + adapter
merge       peft-cli's merged model: its loss in peft-cli, and in transformers, which must find every tensor and no other;
            what peft cannot merge is refused with a message and leaves nothing behind
train       the loss of each step of a run started from the adapter (rtol × 10)
accumulate  the same again with micro-batches of one row
reload      HF PEFT loads what `train` wrote, with exactly the keys that it writes itself, and computes the loss that
            peft-cli reports for it
weights     what `train` moved the parameters by is what torch's AdamW moved them by (within 2 % in the L2 norm)
"""
import argparse
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import traceback

STEPS = ["eval", "merge", "train", "accumulate", "reload", "weights"]
TIMEOUT = 180

RECIPE = """\
[model]
path = {base}
dtype = "f32"
[method]
{method}
[data]
train = {rows}
format = "tokens"
shuffle = false
[train]
max_steps = {steps}
batch_size = {batch_size}
gradient_accumulation = {accumulation}
learning_rate = {learning_rate}
scheduler = "constant"
warmup_steps = 0
weight_decay = 0.0
max_grad_norm = 0.0
optimizer = "adamw"
[output]
dir = {out}
"""


class Short(Exception):
    """A result that falls short of what is expected."""


class Cli:
    """The program under test."""

    def __init__(self, program):
        self.program = program

    def run(self, *arguments):
        command = [str(self.program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
        if done.returncode or "panicked at" in done.stderr:
            message = " | ".join(done.stderr.strip().splitlines()[-3:]) or "no message"
            raise Short(f"peft-cli {arguments[0]} ended with {done.returncode}: {message}")
        return done.stdout

    def eval(self, base, rows, adapter=None):
        more = ["--adapter", adapter] if adapter else []
        out = self.run("eval", "--model", base, *more, "--data", rows, "--format", "tokens", "--dtype", "f32", "--json")
        lines = out.strip().splitlines()
        if not lines:
            raise Short("peft-cli eval --json printed nothing")
        return json.loads(lines[-1])


def near(what, got, want, rtol=1e-4):
    if not (isinstance(got, (int, float)) and abs(got - want) <= rtol * max(1.0, abs(want))):
        raise Short(f"{what} is {got}, should be {want:.7f}")


def train(cli, out, method, steps, batch_size, learning_rate, accumulation=1, **paths):
    """Train as `[method]` says on the rows in their order; the loss of each step. `paths` are base and rows."""
    numbers = dict(steps=steps, batch_size=batch_size, accumulation=accumulation, learning_rate=learning_rate)
    quoted = {key: json.dumps(str(path)) for key, path in dict(paths, out=out).items()}
    recipe = out.with_name(f"{out.name}.toml")
    recipe.write_text(RECIPE.format(method=method, **numbers, **quoted))
    cli.run("train", recipe)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


class Case:
    """One case, and the checks on it."""

    def __init__(self, cli, folder, rtol, work):
        self.cli, self.folder, self.rtol, self.work = cli, folder, rtol, work
        self.base, self.rows, self.adapter = folder.parent / "base", folder.parent / "rows.jsonl", folder / "adapter"
        self.expected = json.loads((folder / "expected.json").read_text())

    def near(self, what, got, want, rtol=None):
        near(what, got, want, rtol or self.rtol)

    def eval(self):
        for name, adapter in [("base_loss", None), ("loss", self.adapter)]:
            got = self.cli.eval(self.base, self.rows, adapter)
            self.near(f"{name}", got["loss"], self.expected[name])
            self.near(f"perplexity for {name}", got["perplexity"], math.exp(self.expected[name]), self.rtol * 10)
            for key, want in [("tokens", "tokens"), ("examples", "rows")]:
                if got.get(key) != self.expected[want]:
                    raise Short(f"eval counts {got.get(key)} {key}, should be {self.expected[want]}")
        if self.expected["accuracy"] is not None:
            self.near("accuracy", got.get("accuracy"), self.expected["accuracy"])

    def merge(self):
        want = self.expected["merged_loss"]
        out = self.work / "merged"
        if want is None:
            return self.refuses_to_merge(out)
        self.cli.run("merge", "--model", self.base, "--adapter", self.adapter, "--output", out, "--dtype", "f32")
        self.near("merged loss", self.cli.eval(out, self.rows)["loss"], want)
        from cases import load_base, mean_loss

        model, info = load_base(out, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                raise Short(f"transformers finds {kind} in the merged model: {sorted(info[kind])[:4]}")
        self.near("merged loss in transformers", mean_loss(model, read_rows(self.rows)), want)

    def refuses_to_merge(self, out):
        try:
            self.cli.run("merge", "--model", self.base, "--adapter", self.adapter, "--output", out, "--dtype", "f32")
        except Short as refusal:
            if "cannot be merged" not in str(refusal):
                raise
            if out.exists():
                raise Short(f"{out} is there after a merge that was refused")
        else:
            raise Short("peft-cli merged what peft cannot")

    def run_training(self, name, batch_size, accumulation):
        out = self.work / name
        want = self.expected["train_losses"]
        losses = train(
            self.cli, out, f"init_from = {json.dumps(str(self.adapter))}", len(want), batch_size,
            self.expected["learning_rate"], accumulation, base=self.base, rows=self.rows,
        )
        if len(losses) != len(want):
            raise Short(f"{name}: {len(losses)} steps in metrics.jsonl, should be {len(want)}")
        for step, (got, loss) in enumerate(zip(losses, want), 1):
            self.near(f"{name}: loss of step {step}", got, loss, self.rtol * 10)
        return out

    def refuses_to_train(self):
        try:
            train(
                self.cli, self.work / "refused", f"init_from = {json.dumps(str(self.adapter))}", 1, 1,
                self.expected["learning_rate"], base=self.base, rows=self.rows,
            )
        except Short as refusal:
            if "not trained" not in str(refusal):
                raise
        else:
            raise Short("peft-cli trained what peft cannot")

    def train(self):
        if self.expected["train_losses"] is None:
            return None if self.expected["draws"] else self.refuses_to_train()
        self.trained = self.run_training("train", self.expected["batch_rows"], 1)

    def accumulate(self):
        # What is drawn depends on how rows are batched.
        if self.expected["train_losses"] is None or self.expected["draws"]:
            return
        self.run_training("accumulate", 1, self.expected["batch_rows"])

    def need_training(self):
        if not hasattr(self, "trained"):
            self.train()

    def reload(self):
        if self.expected["train_losses"] is None:
            return
        self.need_training()
        from cases import load_base, mean_loss
        from peft import PeftModel
        from safetensors.torch import load_file

        ours = load_file(self.trained / "adapter_model.safetensors")
        theirs = load_file(self.folder / "trained" / "adapter_model.safetensors")
        if ours.keys() != theirs.keys():
            more, less = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
            raise Short(f"keys differ from peft's: too many {more[:3]}, missing {less[:3]}")
        for key, tensor in ours.items():
            if tensor.shape != theirs[key].shape:
                raise Short(f"{key} has shape {list(tensor.shape)}, peft's has {list(theirs[key].shape)}")
        model = PeftModel.from_pretrained(load_base(self.base), self.trained)
        loss = mean_loss(model.eval(), read_rows(self.rows))
        self.near("loss of the trained adapter in HF PEFT", loss, self.cli.eval(self.base, self.rows, self.trained)["loss"])
        self.near("loss of the trained adapter", loss, self.expected["trained_loss"], self.rtol * 10)

    def weights(self):
        if self.expected["train_losses"] is None:
            return
        self.need_training()
        import torch
        from safetensors.torch import load_file

        name = "adapter_model.safetensors"
        start, ours, theirs = (load_file(folder / name) for folder in (self.adapter, self.trained, self.folder / "trained"))
        # A key's bias, without a rotary embedding, moves all logits of a query alike: its gradient is 0 but for rounding, of
        # which Adam makes whole steps.
        start = {key: tensor for key, tensor in start.items() if not GRADIENT_IS_ROUNDING.search(key)}
        for key in filter(FUSED_BIAS.search, start):
            for tensors in (start, ours, theirs):
                queries, _, values = tensors[key].chunk(3)
                tensors[key] = torch.cat([queries, values])
        # Ranks that AdaLoRA took away: there is nothing to compare with at the start.
        start = {key: tensor if tensor.shape == theirs[key].shape else torch.zeros_like(theirs[key]) for key, tensor in start.items()}
        norm = lambda tensors: math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
        moved = norm(theirs[key].double() - start[key].double() for key in start)
        apart = norm(ours[key].double() - theirs[key].double() for key in start)
        if not apart <= 0.02 * moved:
            worst = max(start, key=lambda key: float((ours[key].double() - theirs[key].double()).norm()))
            raise Short(f"the update is {apart / moved:.1%} away from torch's, most in {worst}")


GRADIENT_IS_ROUNDING = re.compile(r"\.(self\.key|k_lin)\..*bias$")
# Queries, keys and values in one layer (GPT-2).
FUSED_BIAS = re.compile(r"\.attn\.c_attn\..*bias$")


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("cases", type=pathlib.Path)
    parser.add_argument("--only", default="", help="comma-separated MODEL or MODEL/VARIANT")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--rtol", type=float, default=1e-4)
    options = parser.parse_args()
    steps = options.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"no step is called {sorted(unknown)[0]}; there are {', '.join(STEPS)}")
    only = set(filter(None, options.only.split(",")))
    cli = Cli(options.program.resolve())
    passed = failed = 0
    for expected in sorted(options.cases.resolve().glob("*/*/expected.json")):
        model, variant = expected.parts[-3:-1]
        name = f"{model}/{variant}"
        if only and not only & {model, name}:
            continue
        began = time.monotonic()
        short = []
        with tempfile.TemporaryDirectory() as work:
            case = Case(cli, expected.parent, options.rtol, pathlib.Path(work))
            for step in steps:
                try:
                    getattr(case, step)()
                except Exception as error:  # a case that breaks must not hide the others
                    short.append(f"{step}: {error}" if isinstance(error, Short) else f"{step}: {type(error).__name__}: {error}")
                    if not isinstance(error, (Short, OSError, KeyError, subprocess.TimeoutExpired)):
                        traceback.print_exc()
        passed, failed = passed + (not short), failed + bool(short)
        print(f"{'FAIL' if short else 'ok  '} {name} ({time.monotonic() - began:.1f} s)", *short, sep="\n     ", flush=True)
    if passed + failed == 0:
        sys.exit("no cases to check")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import cases  # noqa: F401  sets the environment up before torch is loaded

    cases.torch.set_num_threads(1)
    main()
