"""What is compared: each case measures its sides, makes sure that they did the same, and says which ratios the table shows."""
import dataclasses
import json
import random
import shutil

from vs_hf.measure import Failed, measure
from vs_hf.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Model:
    """A base model, the size of its training step, and which groups of cases it gets by default."""

    name: str
    batch: int
    seq: int
    groups: tuple[str, ...]
    # Of a new head on an encoder; 0 for a language model.
    classes: int = 0


MODELS = {
    "smollm2": Model("smollm2", 4, 256, ("f32", "checkpointing", "bf16", "methods", "decode", "start", "merge")),
    # f32 weights alone are 4.9 GB here and the peer's step 2 GB more, so the batch is small.
    "llama-1b": Model("llama-1b", 1, 256, ("f32", "checkpointing", "bf16", "decode")),
    "minilm": Model("minilm", 32, 64, ("encoder",), classes=2),
}
GROUPS = sorted({group for model in MODELS.values() for group in model.groups})


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A line of the table: `key` of one of our sides over that of the peer (or over `over` of our own side), and the goal."""

    what: str
    key: str
    goal: str = ""
    side: str = "ours"
    over: str = "hf"


class Bench:
    """Where programs, models and results are, and how much is measured."""

    def __init__(self, root, pythons, binaries, options):
        """`pythons` are those of the peers: with PEFT, and with AdapterHub's package."""
        self.root, self.pythons, self.binaries, self.options = root, pythons, binaries, options
        self.work = root / "target/bench"
        self.tmp = self.work / "tmp"
        self.tmp.mkdir(parents=True, exist_ok=True)

    def folder(self, model):
        return self.work / "models" / model.name

    def ours(self, program, *arguments):
        return measure([self.binaries / program, *arguments], self.tmp / "ours.log")

    def peer(self, *arguments, method="lora"):
        python = self.pythons[METHODS[method].adapterhub]
        return measure([python, self.root / "bench/vs_hf/peer.py", *arguments], self.tmp / "hf.log")

    def rows(self, model, batch, seq, name):
        """`batch` rows of `seq` random tokens; both sides read them from this file."""
        vocabulary = json.loads((self.folder(model) / "config.json").read_text())["vocab_size"]
        draw = random.Random(0)
        rows = [[draw.randrange(vocabulary) for _ in range(seq)] for _ in range(batch)]
        target = lambda i, ids: {"label": i % model.classes} if model.classes else {"labels": ids}
        path = self.tmp / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"input_ids": ids, **target(i, ids)}) + "\n" for i, ids in enumerate(rows)))
        return path

    def adapter(self, model, method, dtype="f32", random=False):
        """An adapter that the peer made, made once."""
        folder = self.tmp / f"adapter-{model.name}-{method}-{dtype}{'-random' if random else ''}"
        if not folder.exists():
            self.peer(
                "adapter", "--model", self.folder(model), "--classes", model.classes, "--method", method, "--dtype", dtype,
                "--output", folder, *(["--random"] if random else []), method=method,
            )
        return folder


def settings(**keys):
    """`--set` arguments; `_` between table and key is written `__`."""
    pairs = (f"{key.replace('__', '.')}={value}" for key, value in keys.items())
    return [part for pair in pairs for part in ("--set", pair)]


def read_steps(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


class Case:
    """One comparison. `sides` are measured one after another in every round; `hf` is the peer."""

    name: str
    method: str | None = None
    ratios: tuple[Ratio, ...]
    sides: tuple[str, ...] = ("hf", "ours")

    def run(self, bench, side, found):
        """Measure `side`; `found` holds what the sides of the first round gave."""
        raise NotImplementedError

    def check(self, ours, hf):
        """Raise `Failed` unless both did the same work."""
        raise NotImplementedError


def losses_agree(ours, hf, tolerance, later):
    """The first loss is before any update; later ones also depend on gradients and the optimiser."""
    for step, (a, b) in enumerate(zip(ours["losses"], hf["losses"], strict=True), start=1):
        limit = tolerance if step == 1 else later
        if not abs(a - b) <= limit * abs(b):
            raise Failed(f"the loss of step {step} is {a:.6f} here and {b:.6f} there: more than {limit:g} apart")


class Train(Case):
    """A training step on random tokens; the first step is not timed."""

    def __init__(self, model, name, title, method="lora", dtype="f32", checkpointing=False, part=None, goals=("≥ 1.5", "")):
        """With `part` there is a third side, `budget`: ours, told to keep to the `part`th part of the peer's memory; and with
        f32 a fourth, `narrow`: within that budget activations wait for the backward pass in bf16."""
        self.model, self.name, self.method, self.dtype, self.checkpointing = model, name, method, dtype, checkpointing
        self.part = part
        self.sides = ("hf", "ours", *(("budget",) if part else ()), *(("narrow",) if part and dtype == "f32" else ()))
        titles = {"ours": title, "budget": f"{title}, 1/{part} of the memory"}
        titles["narrow"] = f"{titles['budget']}, activations kept in bf16"
        self.ratios = tuple(
            Ratio(f"{titles[side]}, {what}", key, goal, side)
            for side in self.sides[1:]
            for what, key, goal in zip(("tokens/s", "peak memory"), ("tokens_per_second", "peak_bytes"), goals)
        )

    def run(self, bench, side, found):
        model, options = self.model, bench.options
        batch, seq = options.batch or model.batch, options.seq or model.seq
        rows, steps = bench.rows(model, batch, seq, "train"), options.steps
        if side == "hf":
            result = bench.peer(
                "train", "--model", bench.folder(model), "--classes", model.classes, "--rows", rows, "--dtype", self.dtype,
                "--method", self.method, "--steps", steps, *(["--checkpointing"] if self.checkpointing else []), method=self.method,
            )
            seconds, tokens = result["step_seconds"], result["tokens"]
        else:
            output = bench.tmp / "out"
            shutil.rmtree(output, ignore_errors=True)
            memory = {"train__gradient_checkpointing": "true" if self.checkpointing else "false"}
            if side in ("budget", "narrow"):
                # A quick run's peak is mostly weights, of which a part holds nothing.
                part = 1 if options.quick else self.part
                budget = f"{found['hf']['peak_bytes'] / part / 1e6:.0f}MB"
                memory = {"train__gradient_checkpointing": "auto", "train__memory_budget": budget}
            if side == "narrow":
                memory["train__activation_dtype"] = "bf16"
            head = {"data__labels": json.dumps([str(i) for i in range(model.classes)])} if model.classes else {}
            result = bench.ours(
                "peft-cli", "train", "--model", bench.folder(model), "--adapter", bench.adapter(model, self.method, self.dtype),
                "--data", rows, "--format", "tokens", "--output", output, "--json",
                *settings(
                    model__dtype=self.dtype, data__shuffle="false", data__max_length=seq, train__batch_size=batch,
                    train__max_steps=steps, train__learning_rate=2e-4, train__scheduler="constant", train__warmup_steps=0,
                    train__max_grad_norm=0, **memory, **head,
                ),
            )
            made = read_steps(output)
            result["losses"] = [row["loss"] for row in made]
            seconds, tokens = [row["seconds"] for row in made], made[0]["tokens"]
        timed = seconds[1:] or seconds
        return {**result, "tokens_per_second": tokens * len(timed) / sum(timed), "batch": batch, "seq": seq}

    def check(self, ours, hf):
        # The peer's bf16 rounds activations too.
        losses_agree(ours, hf, *((2e-4, 2e-3) if self.dtype == "f32" else (2e-2, 5e-2)))


class Decode(Case):
    """Greedy tokens after a random prompt, the prompt's own pass included, by the base alone in f32."""

    PROMPT, AGREE = 32, 8

    def __init__(self, model, batch):
        self.model, self.batch, self.name = model, batch, f"decode-{batch}"
        self.ratios = (Ratio(f"greedy decode, batch {batch}, tokens/s", "tokens_per_second", "≥ 2"),)

    def run(self, bench, side, found):
        rows, new = bench.rows(self.model, self.batch, self.PROMPT, "prompts"), 8 if bench.options.quick else 128
        common = ("decode", "--model", bench.folder(self.model), "--rows", rows, "--new-tokens", new)
        # Weights as peft-cli holds them: as they lie in the file.
        result = bench.peer(*common) if side == "hf" else bench.ours("peft-bench", *common, "--stored")
        return {**result, "tokens_per_second": self.batch * new / result["seconds"]}

    def check(self, ours, hf):
        # Further on two probabilities may be so close that rounding decides.
        first = lambda side: [row[: self.AGREE] for row in side["tokens"]]
        if first(ours) != first(hf):
            raise Failed(f"the first tokens are {first(ours)} here and {first(hf)} there")


class Start(Case):
    """From the start of the process to the end of its first step: imports, load, 10,000 rows as tokens, audit. A step of one row:
    what steps cost is measured elsewhere."""

    ROWS = 10_000

    def __init__(self, model):
        self.model, self.name = model, "start"
        self.ratios = (
            Ratio("start to first step, seconds", "seconds", "≤ 0.3"),
            Ratio("start to first step, peak memory", "peak_bytes"),
        )

    def rows(self, bench):
        data = bench.root / "examples/quickstart/data"
        texts = [json.loads(line) for path in sorted(data.glob("*.train.jsonl")) for line in path.read_text().splitlines()]
        rows = [{"prompt": f"{i}. {texts[i % len(texts)]['prompt']}", "completion": texts[i % len(texts)]["completion"]}
                for i in range(self.ROWS)]
        path = bench.tmp / "texts.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    def run(self, bench, side, found):
        rows = self.rows(bench)
        if side == "hf":
            result = bench.peer("start", "--model", bench.folder(self.model), "--rows", rows)
            done_at = result["done_at"]
        else:
            output = bench.tmp / "out"
            shutil.rmtree(output, ignore_errors=True)
            result = bench.ours(
                "peft-cli", "train", "--model", bench.folder(self.model), "--adapter", bench.adapter(self.model, "lora"),
                "--data", rows, "--format", "completion", "--output", output, "--json",
                *settings(model__dtype="f32", data__shuffle="false", train__batch_size=1, train__max_steps=1),
            )
            result["losses"] = [row["loss"] for row in read_steps(output)]
            # The line of step 1 is the file's last write.
            done_at = (output / "metrics.jsonl").stat().st_mtime
        return {**result, "seconds": done_at - result["began_at"]}

    def check(self, ours, hf):
        losses_agree(ours, hf, 2e-4, 2e-4)


class Merge(Case):
    """An adapter into its base, from folder to folder, the whole process; the model is bf16 and stays so."""

    def __init__(self, model):
        self.model, self.name = model, "merge"
        self.ratios = (
            Ratio("merge, seconds", "wall_seconds", "≤ 0.3"),
            Ratio("merge, peak memory", "peak_bytes"),
            Ratio("merge, peak memory over the model's size", "peak_bytes", "≤ 1.2", over="model_bytes"),
        )

    def run(self, bench, side, found):
        base, output = bench.folder(self.model), bench.tmp / f"merged-{side}"
        shutil.rmtree(output, ignore_errors=True)
        common = ("merge", "--model", base, "--adapter", bench.adapter(self.model, "lora", random=True), "--output", output)
        result = bench.peer(*common, "--dtype", "bf16") if side == "hf" else bench.ours("peft-cli", *common, "--json")
        result["model_bytes"] = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        if side == "ours" and (bench.tmp / "merged-hf").exists():
            result |= bench.peer("differ", output, bench.tmp / "merged-hf") | {k: result[k] for k in ("wall_seconds", "peak_bytes")}
        return result

    def check(self, ours, hf):
        # The peer rounds the change to bf16 before it adds it; that is one part in 128 of the largest value at most.
        if "difference" in ours and not (ours["difference"] is not None and ours["difference"] <= 1 / 64):
            raise Failed(f"the merged models differ: {ours['difference']}, {ours.get('names', '')}")


def cases(model, catalogue):
    """All cases of `model` with their groups, those methods left out whose `peft_type` the `catalogue` lacks."""
    if model.classes:
        return [("encoder", Train(model, "encoder", f"encoder classification, {model.batch} × {model.seq}"))]
    found = [
        ("f32", Train(model, "f32", "f32 train", part=4, goals=("≥ 1.5", "≤ 0.25"))),
        ("checkpointing", Train(model, "checkpointing", "f32 train, checkpointing", checkpointing=True, goals=("", ""))),
        ("bf16", Train(model, "bf16", "bf16 base train", dtype="bf16", part=5, goals=("≥ 1.5", "≤ 0.2"))),
    ]
    for name, method in METHODS.items():
        if name != "lora" and method.peft_type in catalogue:
            beside = " beside AdapterHub's" if method.adapterhub else ""
            found.append(("methods", Train(model, name, f"{name} train{beside}", method=name)))
    found += [("decode", Decode(model, batch)) for batch in (1, 8)]
    found += [("start", Start(model)), ("merge", Merge(model))]
    return found
