#!/usr/bin/env python3
"""One measurement of Hugging Face PEFT (of AdapterHub's `adapters` where the method is its own) on the CPU, for bench/vs_hf_peft: a
process of its own that prints one line of JSON.

    peer.py train --model DIR --rows ROWS.jsonl --method lora …     losses and seconds of each step
    peer.py decode --model DIR --rows PROMPTS.jsonl --new-tokens N  tokens of each row, seconds
    peer.py start --model DIR --rows TEXTS.jsonl …                  when the first step was done, its loss
    peer.py merge --model DIR --adapter DIR --output DIR
    peer.py adapter --model DIR --method lora --output DIR          the adapter that both sides start from
    peer.py differ FOLDER FOLDER                                    largest difference of two models' tensors
"""
import argparse
import json
import pathlib
import time

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from methods import METHODS

LEARNING_RATE = 2e-4


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(args):
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if not getattr(args, "classes", 0):
        config = AutoConfig.from_pretrained(args.model)
        # transformers 4, which AdapterHub's package needs, has another place for it.
        config.rope_theta = json.loads((args.model / "config.json").read_text())["rope_parameters"]["rope_theta"]
        return AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=dtype)
    # The head is new, and the same in every process; the base's own dropout would make losses incomparable.
    torch.manual_seed(1)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=args.classes, dtype=dtype, **dropout)


def attach(model, args, **changes):
    """The adapter of the method, the same in every process."""
    method = METHODS[args.method]
    kind, keys = method.config
    torch.manual_seed(0)
    if method.adapterhub:
        import adapters

        adapters.init(model)
        model.add_adapter("a", config=getattr(adapters, kind)(**keys))
        model.train_adapter("a")
        return model
    import peft

    task = "SEQ_CLS" if args.classes else "CAUSAL_LM"
    return peft.get_peft_model(model, getattr(peft, kind)(task_type=task, **{**keys, **changes}))


def optimizer_of(model):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def step(model, optimizer, **batch):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(args):
    model = load(args)
    if not args.classes:
        model.config.use_cache = False
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = attach(model, args).train()
    optimizer = optimizer_of(model)
    rows = read_rows(args.rows)
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = torch.tensor([row["label"] for row in rows]) if args.classes else ids
    losses, seconds = [], []
    for _ in range(args.steps):
        started = time.perf_counter()
        losses.append(step(model, optimizer, input_ids=ids, labels=labels))
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "step_seconds": seconds, "tokens": ids.numel()}


@torch.inference_mode()
def decode(args):
    model = load(args).eval()
    # Greedy, and to the end whatever is written.
    model.generation_config = transformers.GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    ids = torch.tensor([row["input_ids"] for row in read_rows(args.rows)])
    generate = lambda n: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n)
    generate(2)
    started = time.perf_counter()
    written = generate(args.new_tokens)[:, ids.shape[1] :]
    return {"seconds": time.perf_counter() - started, "tokens": written.tolist()}


def start(args):
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), load(args)
    model.config.use_cache = False
    model = attach(model, args).train()
    optimizer = optimizer_of(model)
    rows = read_rows(args.rows)
    texts = lambda key: tokenizer([row[key] for row in rows], add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    encoded = [
        (prompt + completion + [eos], [-100] * len(prompt) + completion + [eos])
        for prompt, completion in zip(texts("prompt"), texts("completion"), strict=True)
    ]
    ids, labels = encoded[0]
    loss = step(model, optimizer, input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
    return {"done_at": time.time(), "losses": [loss], "tokens": sum(len(ids) for ids, _ in encoded)}


def merge(args):
    import peft

    model = peft.PeftModel.from_pretrained(load(args), args.adapter)
    model.merge_and_unload().save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)
    return {}


def adapter(args):
    # Away from its start where it is to be merged: an untrained one changes nothing.
    changes = {"init_lora_weights": False} if args.random else {}
    model = attach(load(args), args, **changes)
    if METHODS[args.method].adapterhub:
        save_bottleneck(model, args.output)
    else:
        model.save_pretrained(args.output)
    return {}


def save_bottleneck(model, output):
    """Adapters behind MLPs in our folder: PEFT's two files, tensors under the linear layer that each stands behind."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in model.named_parameters():
        place, found, suffix = name.partition(".output_adapters.adapters.a.")
        if found:
            tensors[f"base_model.model.{place}.mlp.down_proj.{suffix}"] = tensor.detach().contiguous()
    config = model.adapters_config.get("a").to_dict()
    output.mkdir(parents=True)
    save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    (output / "adapter_config.json").write_text(json.dumps({"peft_type": "BOTTLENECK", "task_type": "CAUSAL_LM", **config}))


def differ(args):
    from safetensors import safe_open

    def tensors(folder):
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            found |= {name: (file, name) for name in file.keys()}
        return found

    a, b = (tensors(folder) for folder in args.folders)
    if a.keys() != b.keys():
        return {"difference": None, "names": sorted(a.keys() ^ b.keys())[:5]}
    get = lambda place: place[0].get_tensor(place[1]).float()
    differences = (((get(a[name]) - get(b[name])).abs().max() / get(b[name]).abs().max()).item() for name in a)
    return {"difference": max(differences)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def command(run, *options):
        sub = commands.add_parser(run.__name__)
        sub.set_defaults(run=run)
        for option in options:
            sub.add_argument(f"--{option}", type=pathlib.Path, required=True)
        return sub

    for sub in (command(train, "model", "rows"), command(start, "model", "rows"), command(adapter, "model", "output")):
        sub.add_argument("--method", choices=METHODS, default="lora")
        sub.add_argument("--steps", type=int, default=1)
        sub.add_argument("--checkpointing", action="store_true")
        sub.add_argument("--random", action="store_true")
        sub.add_argument("--classes", type=int, default=0, help="classes of a new head; 0 for a language model")
    command(decode, "model", "rows").add_argument("--new-tokens", type=int, required=True)
    command(merge, "model", "adapter", "output")
    command(differ).add_argument("folders", type=pathlib.Path, nargs=2)
    for sub in commands.choices.values():
        sub.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps({**args.run(args), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
