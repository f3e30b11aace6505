"""Vectors of `peft-cli embed` beside those of sentence-transformers, on a real model.

    python interop/embeddings.py target/release/peft-cli MINILM      # scripts/fetch-models.sh minilm

All ways of pooling, normalised or not, long texts cut, texts in one batch with others; then a LoRA of PEFT's on the same model.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import peft
import torch
from sentence_transformers import SentenceTransformer

TEXTS = [
    "A brave dog named Rex.", "a cat", "Über die Brücke, señor! 東京", "x", "It was a long film, and " * 60,
    "The soup was not good.", "Nobody knows; nobody cares, but the train leaves at 5:45 p.m. anyway.",
]
MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
checks, failed = 0, []


def compare(what, got, want, most=1e-5):
    global checks
    checks += 1
    far = (torch.tensor(got) - torch.tensor(want)).abs().max().item() / max(1.0, torch.tensor(want).abs().max().item())
    if not far <= most:
        failed.append(what)
        print(f"FAILED {what}: {far}")


def main():
    program, model = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    work = pathlib.Path(tempfile.mkdtemp())
    rows = work / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def ours(*more):
        out = work / "vectors.jsonl"
        done = subprocess.run([program, "embed", "--model", model, "--data", rows, "--output", out, *more], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"embeddings: {' '.join(map(str, more))}: {done.stderr}")
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["text"] for row in found] == TEXTS
        return [row["embedding"] for row in found]

    theirs = SentenceTransformer(str(model), device="cpu")
    compare("as the folder says", ours(), theirs.encode(TEXTS).tolist())
    compare("one at a time", ours("--batch-size", "1"), theirs.encode(TEXTS).tolist())
    pooling = theirs[1]
    for mode in MODES:
        pooled = type(pooling)(theirs[0].get_embedding_dimension() if hasattr(theirs[0], "get_embedding_dimension")
                               else theirs[0].get_word_embedding_dimension(), pooling_mode=mode)  # fmt: skip
        plain = SentenceTransformer(modules=[theirs[0], pooled], device="cpu")
        want = plain.encode(TEXTS)
        compare(mode, ours("--pooling", mode, "--no-normalize"), want.tolist())
        unit = plain.encode(TEXTS, normalize_embeddings=True)
        compare(f"{mode}, normalised", ours("--pooling", mode), unit.tolist())

    # An adapter of a classifier, whose names have the `bert.` that the model alone lacks.
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(work / "adapter")
    tokens = theirs.tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = adapted.base_model.model.bert(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    want = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    got = ours("--adapter", work / "adapter")
    compare("through PEFT's LoRA", got, want.tolist())
    checked = (torch.tensor(got) - torch.tensor(ours())).abs().max().item()
    if checked < 1e-2:
        failed.append("the adapter does nothing")
    print(f"embeddings: {checks - len(failed)} passed, {len(failed)} failed")
    sys.exit(bool(failed))


main()
