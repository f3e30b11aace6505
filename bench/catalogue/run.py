"""One line of the table: training here (and in PEFT), the accuracy that came of it, and what it costs."""
import dataclasses
import json
import math
import random
import shutil
import struct

from catalogue.lines import LINES
from vs_hf.measure import Failed, measure

LABELS = ("negative", "positive")


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model and its budget: rows of TRAIN, passes over them, rows a step."""

    name: str
    index: int
    rows: int
    epochs: int
    batch: int
    encoder: bool = False


BASES = {
    "smollm2": Base("smollm2", 0, 512, 1, 16),
    "minilm": Base("minilm", 1, 2000, 2, 32, encoder=True),
}


def elements(folder):
    """How many numbers the safetensors files of a model hold: what their headers say."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


class Task:
    """The rows of one model, prepared once; both sides read the same tokens in the same order."""

    def __init__(self, base, folder, tmp, binaries, python, peer, train, test, options):
        self.base, self.folder, self.binaries, self.python, self.peer, self.options = base, folder, binaries, python, peer, options
        self.epochs, self.batch = options.epochs or base.epochs, options.batch or base.batch
        self.tmp = tmp / base.name
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(parents=True)
        draw = random.Random(options.seed)
        draw.shuffle(train)
        self.texts = self.write("test", test[: options.test_rows])
        rows = train[: options.rows or base.rows]
        self.train, self.steps = self.tokens("train", rows), self.epochs * math.ceil(len(rows) / self.batch)
        self.test = self.tokens("test", test[: options.test_rows]) if base.encoder else self.texts
        prompt = {"input_ids": json.loads(self.train.read_text().splitlines()[0])["input_ids"][:32]}
        self.prompt = self.tmp / "prompt.jsonl"
        self.prompt.write_text(json.dumps(prompt) + "\n")

    def row(self, row):
        if self.base.encoder:
            return {"text": row["text"], "label": LABELS.index(row["label"])}
        return {"prompt": f"Review: {row['text']}\nSentiment:", "completion": f" {row['label']}"}

    def write(self, name, rows):
        path = self.tmp / f"{name}.rows.jsonl"
        path.write_text("".join(json.dumps(self.row(row)) + "\n" for row in rows), encoding="utf-8")
        return path

    def tokens(self, name, rows):
        path = self.tmp / f"{name}.jsonl"
        self.call_peer("tokens", "--rows", self.write(name, rows), "--output", path)
        return path

    def call_peer(self, verb, *arguments):
        return measure([self.python, self.peer, verb, "--model", self.folder, *arguments], self.tmp / "peer.log")

    def ours(self, program, *arguments):
        return measure([self.binaries / program, *arguments], self.tmp / "ours.log")

    def accuracy(self, model, adapter):
        """Of an adapter of either side, or of the model alone."""
        adapted = ["--adapter", adapter] if adapter else []
        how = ["--format", "tokens"] if self.base.encoder else ["--format", "completion", *(f"--choice= {label}" for label in LABELS)]
        return self.ours("peft-cli", "eval", "--model", model, *adapted, "--data", self.test, *how, "--dtype", "f32", "--json")["accuracy"]

    def line(self, name):
        """{side: measurement} of the line that is called `name`."""
        start, sides = self.start(name), {}
        if start and self.options.peer:
            sides["hf"] = self.there(name, start)
        sides["ours"] = self.here(name, start)
        if "hf" in sides:
            ours, hf = (sides[side]["losses"][0] for side in ("ours", "hf"))
            if not abs(ours - hf) <= 1e-3 * hf:
                raise Failed(f"{name}: the first loss is {ours:.5f} here and {hf:.5f} there")
        return sides

    def start(self, name):
        """The adapter that both sides start from; none without a peer."""
        if not LINES[name].peer:
            return None
        start = self.tmp / "start"
        shutil.rmtree(start, ignore_errors=True)
        self.call_peer("start", "--line", name, "--output", start, "--seed", self.options.seed)
        return start

    def there(self, name, start):
        output = self.tmp / "hf"
        shutil.rmtree(output, ignore_errors=True)
        found = self.call_peer(
            "train", "--line", name, "--rows", self.train, "--start", start, "--output", output,
            "--batch", self.batch, "--epochs", self.epochs, "--learning-rate", LINES[name].rates[self.base.index],
        )
        return {**found, "accuracy": self.accuracy(self.folder, output)}

    def here(self, name, start):
        line, output = LINES[name], self.tmp / "ours"
        shutil.rmtree(output, ignore_errors=True)
        method = {"init_from": str(start)} if start else {**line.method, **(line.on_encoder if self.base.encoder else {})}
        if method.get("type") == "adalora":
            method |= {"total_step": self.steps, "tinit": self.steps // 6, "tfinal": self.steps // 3}
        settings = {
            **{f"method.{key}": value for key, value in method.items()},
            "model.dtype": "f32", "data.shuffle": False, "train.batch_size": self.batch, "train.epochs": self.epochs,
            "train.seed": self.options.seed, "train.learning_rate": line.rates[self.base.index], "train.scheduler": "linear",
            "train.warmup_ratio": 0.1, "output.save_every": 0, **({"data.labels": ["0", "1"]} if self.base.encoder else {}),
        }
        found = self.ours(
            "peft-cli", "train", "--model", self.folder, "--data", self.train, "--format", "tokens", "--output", output, "--json",
            *(part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")),
        )
        rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        found["losses"] = [row["loss"] for row in rows if "loss" in row]
        whole, trained = output / "model", found["trainable_parameters"]
        if whole.exists():
            size = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
            return {**found, "share": 1.0, "accuracy": self.accuracy(whole, None), "file_bytes": size}
        found["share"] = trained / (elements(self.folder) + trained)
        found["accuracy"] = self.accuracy(self.folder, output)
        found["file_bytes"] = (output / "adapter_model.safetensors").stat().st_size
        if not self.base.encoder:
            decoded = self.ours("peft-bench", "decode", "--model", self.folder, "--rows", self.prompt, "--adapter", output,
                                "--new-tokens", 64, "--stored")
            found["decode_overhead"] = decoded["overhead"]
        return found
