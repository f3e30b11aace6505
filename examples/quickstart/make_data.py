#!/usr/bin/env python3
"""Writes the quickstart's text: the pretraining corpus and the rows of the three tasks. Standard library only.

    python3 make_data.py             # data/*.jsonl, a few hundred rows each (these are in the repository)
    python3 make_data.py --pretrain  # and ../../target/quickstart/pretrain.jsonl, about 13 MB (this one is not)

The output is the same bytes on every machine; SHA-256 sums are printed.
"""

import argparse
import hashlib
import json
from pathlib import Path

import stories
import tasks
from world import Rng

HERE = Path(__file__).resolve().parent
PRETRAIN = HERE.parent.parent / "target" / "quickstart" / "pretrain.jsonl"
END = "<|endoftext|>"


def chat_text(turns):
    """A conversation as the tokenizer's chat template writes it."""
    return "".join(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n" for user, assistant in turns)


def reading_text(rng):
    text, pairs = stories.reading(rng)
    if rng.chance(30):
        return "Story: " + text + "\n" + questions_text(rng, pairs)
    return text + "\n" + questions_text(rng, pairs)


def questions_text(rng, pairs):
    if rng.chance(30):
        return "\n".join(f"Question: {asked}\nAnswer: {answer}" for asked, answer in pairs)
    return "\n".join(f"{asked} {answer}" for asked, answer in pairs)


KINDS = [
    (34, stories.full_story),
    (16, lambda rng: chat_text(stories.chat(rng))),
    (6, lambda rng: " ".join(stories.fact(rng) for _ in range(3 + rng.below(5)))),
    (5, lambda rng: questions_text(rng, [stories.question(rng) for _ in range(2 + rng.below(4))])),
    (13, reading_text),
    (5, stories.lesson),
    (5, stories.dialogue),
    (2, stories.listing),
    (2, stories.letter),
    (12, lambda rng: "\n".join(tasks.rated(rng) for _ in range(2 + rng.below(3)))),
    (4, stories.pirates),
    (1, stories.rhyme),
]


DRILLS = 2400


def pretrain_rows(rng, count):
    """Drills first, then everything mixed: the order matters, pretrain.toml keeps it."""
    for _ in range(DRILLS):
        yield {"text": stories.drill(rng) + END}
    for _ in range(count - DRILLS):
        yield {"text": rng.weighted(KINDS)(rng) + END}


def distinct(make, count, seen):
    """`count` rows whose prompts are new."""
    rows = []
    while len(rows) < count:
        row = make()
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            rows.append(row)
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(data)
    print(f"{hashlib.sha256(data).hexdigest()}  {len(data):>9} bytes  {path}")


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--pretrain", action="store_true", help="write the pretraining corpus too")
    args.add_argument("--rows", type=int, default=50_000, help="documents in the pretraining corpus")
    args = args.parse_args()

    for at, (name, train, test, make) in enumerate([
        ("style", 400, 60, lambda rng, _: tasks.style_row(rng)),
        ("sentiment", 1200, 200, tasks.sentiment_row),
        ("qa", 450, 100, tasks.qa_row),
    ]):
        rng, seen = Rng(1000 + at), set()
        write(HERE / "data" / f"{name}.train.jsonl", distinct(lambda: make(rng, False), train, seen))
        write(HERE / "data" / f"{name}.test.jsonl", distinct(lambda: make(rng, True), test, seen))
    if args.pretrain:
        write(PRETRAIN, pretrain_rows(Rng(1), args.rows))


if __name__ == "__main__":
    main()
