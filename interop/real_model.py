#!/usr/bin/env python3
"""Hold peft-cli against transformers and PEFT on a real model: SmolLM2-135M-Instruct out of its GGUF file.

    interop/real_model.py PEFT_CLI MODEL.gguf

Compares the loss on text as our own tokenizer cuts it, the loss with a LoRA adapter on every linear layer, the losses of
three training steps, what HF PEFT makes of the adapter that they left, and greedy generation. transformers reads the
same file and dequantises it to f32. Prints a line a check, then `N passed, N failed`.
"""
import json
import os
import pathlib
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import cases
import torch
from check import Cli, Short, train as train_with_cli
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

# Q4_1 weights in f32 arithmetic on both sides; sums of 49,152 logits differ in their last digits.
RTOL = 2e-3
STEPS, BATCH, LEARNING_RATE = 3, 4, 2e-4

TEXTS = [
    "The kettle whistled while rain ran down the window of the little station.",
    "Seven plus five is twelve, and twelve minus four is eight.",
    "Review: a slow start, but the last hour is wonderful.\nSentiment: positive",
    "def area(width, height):\n    return width * height\n",
    "Paris is the capital of France; Madrid is the capital of Spain.",
    "Gib mir bitte noch ein Stück Kuchen, sagte sie — und lachte.",
    "The committee met on Tuesday, argued until noon, and agreed on nothing at all.",
    "Water boils at 100 °C at sea level, but at a lower temperature on a mountain.",
    "One two three four five six seven eight nine ten.",
    "She opened the box, looked inside, and found another, smaller box.",
    "Review: dull, loud and far too long.\nSentiment: negative",
    "If the train is late again, we shall simply walk home along the river.",
]
PROMPTS = ["The capital of France is", "Once upon a time, there was a little"]


def near(what, got, want, rtol=RTOL):
    if not abs(got - want) <= rtol * max(1.0, abs(want)):
        raise Short(f"{what} is {got:.6f}, should be {want:.6f}")


def train(model, rows):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        loss, count = cases.summed_loss(model, rows[step * BATCH : (step + 1) * BATCH])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        losses.append(loss.item() / count)
    return losses


def main():
    program, gguf = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
    cli = Cli(program)
    load = lambda: AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = load()
    passed = failed = 0

    def check(name, function):
        nonlocal passed, failed
        try:
            detail = function()
            passed += 1
            print(f"ok   {name}: {detail}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL {name}: {type(error).__name__}: {error}", flush=True)

    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        rows = [dict(input_ids=ids, labels=ids) for ids in tokenizer(TEXTS)["input_ids"]]
        texts, tokens = work / "texts.jsonl", work / "tokens.jsonl"
        texts.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in TEXTS))
        tokens.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base_loss = cases.mean_loss(model, rows)

        def tokenizer_check():
            # The text format may close a row with the end token; the ids in front must be transformers'.
            got = json.loads(cli.run("eval", "--model", gguf, "--data", texts, "--format", "text", "--json").splitlines()[-1])
            least = sum(len(row["input_ids"]) - 1 for row in rows)
            if not least <= got["tokens"] <= least + len(rows):
                raise Short(f"{got['tokens']} tokens counted, transformers' tokenizer makes {least}")
            return f"{got['tokens']} tokens"

        def base_check():
            got = cli.eval(gguf, tokens)
            near("loss", got["loss"], base_loss)
            return f"{got['loss']:.5f}, transformers {base_loss:.5f}"

        def generate_check():
            for prompt in PROMPTS:
                ids = torch.tensor([tokenizer(prompt)["input_ids"]])
                with torch.no_grad():
                    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
                want = tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)
                out = cli.run("generate", "--model", gguf, "--prompt", prompt, "--max-new-tokens", 16, "--temperature", 0, "--json")
                got = json.loads(out.splitlines()[-1])["text"].removeprefix(prompt)
                # Two tokens may be equally likely; the first few may not differ.
                if got.strip()[:20] != want.strip()[:20]:
                    raise Short(f"{prompt!r} goes on {got!r}, in transformers {want!r}")
            return repr(want.strip())

        check("tokenizer", tokenizer_check)
        check("base", base_check)
        check("greedy generation", generate_check)

        adapter = work / "adapter"
        torch.manual_seed(0)
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=cases.LINEARS))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter += 0.01 * torch.randn_like(parameter)
        tuned.save_pretrained(adapter)
        tuned.eval()
        adapter_loss = cases.mean_loss(tuned, rows)
        losses = train(tuned, rows)
        after = cases.mean_loss(tuned, rows)

        def adapter_check():
            got = cli.eval(gguf, tokens, adapter)
            near("loss", got["loss"], adapter_loss)
            return f"{got['loss']:.5f}, PEFT {adapter_loss:.5f}"

        def train_check():
            method = f"init_from = {json.dumps(str(adapter))}"
            got = train_with_cli(cli, work / "out", method, STEPS, BATCH, LEARNING_RATE, base=gguf, rows=tokens)
            if len(got) != STEPS:
                raise Short(f"{len(got)} steps in metrics.jsonl, should be {STEPS}")
            for step, pair in enumerate(zip(got, losses), 1):
                near(f"loss of step {step}", *pair)
            return " ".join(f"{loss:.4f}" for loss in got)

        def reload_check():
            again = PeftModel.from_pretrained(load(), work / "out").eval()
            loss = cases.mean_loss(again, rows)
            near("loss in HF PEFT", loss, after)
            near("loss in peft-cli", cli.eval(gguf, tokens, work / "out")["loss"], loss)
            return f"{loss:.5f}, trained in torch {after:.5f}"

        check("adapter", adapter_check)
        check("training steps", train_check)
        check("reload in HF PEFT", reload_check)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
