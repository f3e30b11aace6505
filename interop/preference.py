#!/usr/bin/env python3
"""Hold peft-cli's preference objectives against TRL's trainers on a tiny random llama with LoRA.

    $(scripts/trl-env.sh) interop/preference.py PEFT_CLI [--seed 0] [--only dpo,kto]

TRL's own trainers run their own loop: DPOTrainer (DPO and its variants, IPO), KTOTrainer, ORPOTrainer, and CPOTrainer with `loss_type =
"simpo"` and without its likelihood term. peft-cli reads the tokens that the trainer made of the texts, starts from the same adapter, and has
to show the same loss (relative 1e-4) and margin of rewards (absolute 1e-4) in every step, and to arrive at the same weights (2 % of the
way). Prints a line a case, then `N passed, N failed`; exit 1 if any failed.
"""
import json
import logging
import os
import random
import tempfile
import pathlib
import warnings

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1")
warnings.filterwarnings("ignore")

import cases
import datasets
import peft
import tokenizers
import transformers
from check import Short, near
from safetensors.torch import load_file
from tally import Tally, options
from training import same_weights

STEPS, BATCH_ROWS, LEARNING_RATE = 6, 4, 5e-3

RECIPE = """\
[model]
path = {base}
dtype = "f32"
[method]
init_from = {adapter}
[data]
train = {rows}
eval = {rows}
shuffle = false
max_length = 128
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
{settings}
[output]
dir = {out}
"""

# Trainer, its settings, ours, and how the adapter begins: as nothing, or away from it.
# TRL compares a PEFT model that it is given with a copy of its adapter, as it was; without the copy, with the base.
CASES = {
    "dpo": ("dpo", dict(), dict(objective="dpo"), "nothing"),
    "dpo, beta": ("dpo", dict(beta=0.6), dict(objective="dpo", beta=0.6), "nothing"),
    "dpo, from an adapter": ("dpo", dict(beta=0.3), dict(objective="dpo", beta=0.3, reference="init_from"), "copy"),
    "dpo, from an adapter, against the base": ("dpo", dict(beta=0.3), dict(objective="dpo", beta=0.3), "base"),
    "dpo, hinge": ("dpo", dict(loss_type=["hinge"], beta=0.7), dict(objective="dpo", beta=0.7, loss_type="hinge"), "base"),
    "dpo, robust": (
        "dpo",
        dict(loss_type=["robust"], label_smoothing=0.2, beta=0.5),
        dict(objective="dpo", beta=0.5, loss_type="robust", label_smoothing=0.2),
        "base",
    ),
    "ipo": ("dpo", dict(loss_type=["ipo"]), dict(objective="ipo"), "nothing"),
    "ipo, from an adapter": ("dpo", dict(loss_type=["ipo"], beta=0.4), dict(objective="ipo", beta=0.4), "base"),
    "kto": ("kto", dict(), dict(objective="kto"), "nothing"),
    "kto, weights": (
        "kto",
        dict(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7),
        dict(objective="kto", beta=0.5, desirable_weight=1.5, undesirable_weight=0.7),
        "base",
    ),
    "orpo": ("orpo", dict(), dict(objective="orpo"), "nothing"),
    "orpo, lambda": ("orpo", dict(beta=0.9), dict(objective="orpo", beta=0.9), "base"),
    "simpo": ("simpo", dict(), dict(objective="simpo"), "nothing"),
    "simpo, gamma": (
        "simpo",
        dict(beta=2.0, simpo_gamma=1.2, label_smoothing=0.1),
        dict(objective="simpo", beta=2.0, simpo_gamma=1.2, label_smoothing=0.1),
        "base",
    ),
}


def make_tokenizer():
    """A word is a token: `t7` is token 7."""
    words = {f"t{i}": i for i in range(cases.VOCABULARY)}
    words = {"<pad>" if i == 0 else "<s>" if i == 1 else "</s>" if i == 2 else word: i for word, i in words.items()}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_texts(rng, single):
    """Rows of many lengths; answers begin with a space."""
    def words(least, most):
        return " ".join(f"t{rng.randrange(3, cases.VOCABULARY)}" for _ in range(rng.randrange(least, most)))

    rows = []
    for i in range(STEPS * BATCH_ROWS):
        row = {"prompt": words(2, 12)}
        if single:
            # Of one step all are of one kind.
            row |= {"completion": " " + words(1, 9), "label": i // BATCH_ROWS == 2 or rng.random() < 0.5}
        else:
            row |= {"chosen": " " + words(1, 9), "rejected": " " + words(1, 9)}
        rows.append(row)
    return rows


def make_trainer(kind, model, texts, settings, out):
    """TRL's trainer for a kind of objective, to run as peft-cli does."""
    common = dict(
        output_dir=str(out), per_device_train_batch_size=BATCH_ROWS, max_steps=STEPS, learning_rate=LEARNING_RATE, max_grad_norm=0.0,
        lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch", logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, train_sampling_strategy="sequential", max_length=128, disable_tqdm=True,
    )
    given = dict(model=model, train_dataset=datasets.Dataset.from_list(texts), processing_class=make_tokenizer())
    if kind == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(args=DPOConfig(**common, **settings), **given)
    if kind == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer(args=KTOConfig(**common, **settings), **given)
    if kind == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(args=ORPOConfig(**common, **settings), **given)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer(args=CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, **settings), **given)


def our_rows(dataset):
    """The trainer's tokens, as rows of peft-cli."""
    rows = []
    for row in dataset:
        if "chosen_labels" in row:
            # CPO's and ORPO's trainers keep whole sequences with a mask.
            of = {name: [i for i in row[f"{name}_labels"] if i != -100] for name in ("chosen", "rejected")}
            prompts = {tuple(row[f"{name}_input_ids"][: -len(of[name])]) for name in of}
            if len(prompts) != 1:
                raise Short("the two answers have other prompts")
            rows.append({"prompt_ids": list(prompts.pop()), "chosen_ids": of["chosen"], "rejected_ids": of["rejected"]})
        else:
            names = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label")
            rows.append({name: row[name] for name in names if name in row})
    return rows


def run_trainer(trainer):
    """Loss and margin of rewards of each step."""
    found, compute = [], trainer.compute_loss

    def compute_loss(*arguments, **named):
        loss = compute(*arguments, **named)
        metrics = getattr(trainer, "_stored_metrics", None) or trainer._metrics
        margins = metrics["train"].get("rewards/margins")
        found.append((loss.item(), margins[-1] if margins else None))
        return loss

    trainer.compute_loss = compute_loss
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return found


def weights(model):
    state = peft.get_peft_model_state_dict(model, adapter_name="default")
    return {key: value.detach().clone() for key, value in state.items()}


def train(cli, out, settings, accumulation=1, **paths):
    """What peft-cli's steps and its evaluation gave."""
    numbers = dict(steps=STEPS, batch_size=BATCH_ROWS // accumulation, accumulation=accumulation, learning_rate=LEARNING_RATE)
    quoted = {key: json.dumps(str(path)) for key, path in dict(paths, out=out).items()}
    recipe = out.with_name(f"{out.name}.toml")
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    recipe.write_text(RECIPE.format(settings=settings, **numbers, **quoted))
    cli.run("train", recipe)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def check(cli, base, name, seed, out):
    kind, theirs, ours, start = CASES[name]
    out.mkdir()
    texts = make_texts(random.Random(f"{seed} {kind}"), kind == "kto")
    # Only what begins as nothing has the base as the reference by itself.
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=cases.LINEARS, init_lora_weights=start == "nothing", task_type="CAUSAL_LM")
    model = peft.get_peft_model(cases.load_base(base), config)
    model.save_pretrained(out / "start")
    trainer = make_trainer(kind, model, texts, theirs, out / "trl")
    if start == "base" and "ref" in model.peft_config:
        model.delete_adapter("ref")
    begin = weights(model)
    rows = out / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in our_rows(trainer.train_dataset)))
    wanted = run_trainer(trainer)
    if len({round(loss, 5) for loss, _ in wanted}) < STEPS:
        raise Short(f"the case shows nothing: {wanted}")
    paths = dict(base=base, adapter=out / "start", rows=rows)
    steps, evals = train(cli, out / "trained", ours, **paths)
    for step, (got, (loss, margin)) in enumerate(zip(steps, wanted, strict=True)):
        near(f"loss of step {step}", got.get("objective"), loss, 1e-4)
        if margin is not None:
            near(f"margin of step {step}", got.get("rewards_margin"), margin, 1e-4)
    got = load_file(out / "trained" / "adapter_model.safetensors")
    same_weights(begin, got, weights(trainer.model))
    # Micro-batches are a matter of memory.
    again, _ = train(cli, out / "accumulated", ours, accumulation=2, **paths)
    for step, (got, (loss, _)) in enumerate(zip(again, wanted, strict=True)):
        near(f"loss of step {step} in micro-batches", got.get("objective"), loss, 1e-4)
    if not evals or "eval_rewards_margin" not in evals[-1]:
        raise Short("no margin was evaluated")
    if start != "copy":
        beta = ["--beta", str(ours["beta"])] if "beta" in ours else []
        found = cli.run("eval", "--model", base, "--adapter", out / "trained", "--data", rows, "--objective", ours["objective"], *beta, "--json")
        found = json.loads(found.strip().splitlines()[-1])
        near("margin of eval", found["rewards_margin"], evals[-1]["eval_rewards_margin"], 1e-5)


def main():
    given = options(__doc__, only="cases, by the beginning of their names")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    tally = Tally()
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        cases.make_model("llama", work / "base")
        for number, name in enumerate(CASES):
            if given.only and not any(name.startswith(only) for only in given.only):
                continue
            with tally.case(name):
                check(given.cli, work / "base", name, given.seed, work / str(number))
    tally.end()


if __name__ == "__main__":
    main()
