#!/usr/bin/env python3
"""Hold peft-cli against transformers + HF PEFT on heads of their own: regression, several classes a row, tokens, answers.

    $(scripts/python-env.sh) interop/heads.py PEFT_CLI [--seed 0] [--only CASE,…]

Of each case, on a tiny random model of transformers' class: peft-cli computes the loss that the class itself returns, of the base and with
an adapter that PEFT saved (relative 1e-4); trains with the losses of torch's AdamW (1e-3) to its weights (2 % of the way); and what it
writes has the keys that PEFT writes, and loads in PEFT with the same loss. `fresh` makes the head for an encoder without one. `texts`
compares rows of words and of questions with transformers' preprocessing, and the scores of answers with SQuAD's definition. Where padding
would take part in a loss (answers: transformers' softmax is over padding too), rows go through torch one by one. Prints a line a case,
then `N passed, N failed`; exit 1 if any failed.
"""
import collections
import json
import pathlib
import random
import re
import string
import tempfile

import cases
import peft
import torch
import transformers
from check import Short, near
from safetensors.torch import load_file
from tally import Tally, options
from training import same_weights

ROWS, STEPS, BATCH_ROWS, LEARNING_RATE = 16, 5, 4, 5e-3
# How transformers' classes begin, and the shape of their models.
FAMILIES = {
    "bert": ("Bert", cases.ENCODER),
    "roberta": ("Roberta", dict(cases.ENCODER, pad_token_id=5)),
    "xlm_roberta": ("XLMRoberta", dict(cases.ENCODER, pad_token_id=1)),
    "distilbert": ("DistilBert", dict(dim=48, hidden_dim=80, n_layers=3, n_heads=4, pad_token_id=0)),
    "llama": ("Llama", dict(cases.SHAPE, **cases.DECODER)),
    "qwen3": ("Qwen3", dict(cases.SHAPE, **cases.DECODER, head_dim=8)),
    "gpt2": ("GPT2", cases.GPT2),
    "gpt_neox": ("GPTNeoX", dict(cases.DECODER, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)),
    "falcon": ("Falcon", dict(cases.DECODER, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)),
}
# The name in recipes, how the class ends, PEFT's task, and settings.
KINDS = {
    "regression": ("regression", "ForSequenceClassification", "SEQ_CLS", dict(num_labels=1)),
    "regression_3": ("regression", "ForSequenceClassification", "SEQ_CLS", dict(num_labels=3, problem_type="regression")),
    "multi_label": ("multi_label", "ForSequenceClassification", "SEQ_CLS", dict(num_labels=4, problem_type="multi_label_classification")),
    "tokens": ("token_classification", "ForTokenClassification", "TOKEN_CLS", dict(num_labels=5)),
    "answers": ("question_answering", "ForQuestionAnswering", "QUESTION_ANS", dict(num_labels=2)),
}
LORA = dict(r=4, lora_alpha=12)
HEADS = ["classifier", "score", "qa_outputs", "pre_classifier"]
METHODS = {
    "lora": lambda task, family: peft.LoraConfig(task_type=task, target_modules=["q_lin", "v_lin"] if family == "distilbert" else None, **LORA),
    # PEFT takes the head for a target, and then cannot train it whole.
    "all_linear": lambda task, _: peft.LoraConfig(task_type=task, target_modules="all-linear", exclude_modules=HEADS, **LORA),
    "ia3": lambda task, _: peft.IA3Config(task_type=task),
    "prefix": lambda task, _: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4),
}
ENCODERS = ["bert", "roberta", "xlm_roberta", "distilbert"]
PLAN = (
    [(family, kind, "lora") for family in ENCODERS for kind in KINDS]
    + [(family, kind, "all_linear") for family in ("bert", "roberta", "distilbert") for kind in ("regression", "tokens", "answers")]
    + [("bert", "tokens", "ia3"), ("bert", "tokens", "prefix"), ("roberta", "answers", "prefix"), ("bert", "regression", "prefix")]
    + [("llama", kind, "lora") for kind in ("regression", "regression_3", "multi_label", "tokens")]
    + [(family, "tokens", "all_linear") for family in ("llama", "qwen3", "gpt2")]
    + [("gpt_neox", "tokens", "lora"), ("falcon", "tokens", "lora"), ("gpt2", "regression", "lora")]
)


def make_model(family, kind, folder, **more):
    prefix, shape = FAMILIES[family]
    _, ending, _, settings = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**{"vocab_size": cases.VOCABULARY, "max_position_embeddings": 128, **shape, **settings, **more})
    model = getattr(transformers, prefix + ending)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 if parameter.dim() == 1 else 0.15) * torch.randn_like(parameter)
    model.save_pretrained(folder)


def make_rows(rng, kind):
    rows = []
    for _ in range(ROWS):
        n = rng.randrange(3, 40)
        row = dict(input_ids=[rng.randrange(6, cases.VOCABULARY) for _ in range(n)])
        if kind == "regression":
            row["label"] = round(rng.uniform(-3, 5), 3)
        elif kind == "regression_3":
            row["label"] = [round(rng.gauss(0, 2), 3) for _ in range(3)]
        elif kind == "multi_label":
            row["labels"] = [rng.randrange(2) for _ in range(4)]
        elif kind == "tokens":
            row["labels"] = [rng.choice([-100, 0, 1, 2, 3, 4]) for _ in range(n - 1)] + [rng.randrange(5)]
        else:
            row["start_positions"] = rng.randrange(n)
            row["end_positions"] = rng.randrange(row["start_positions"], n)
        rows.append(row)
    return rows


def summed_loss(model, kind, rows):
    """The loss that the class returns, times the number of what it is a mean over, and that number."""
    if kind == "answers" and len(rows) > 1:
        parts = [summed_loss(model, kind, [row]) for row in rows]
        return sum(loss for loss, _ in parts), len(rows)
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, fill: values + [fill] * (width - len(values))
    inputs = dict(
        input_ids=torch.tensor([pad(row["input_ids"], model.config.pad_token_id or 0) for row in rows]),
        attention_mask=torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
    )
    if any("token_type_ids" in row for row in rows):
        inputs["token_type_ids"] = torch.tensor([pad(row["token_type_ids"], 0) for row in rows])
    count = len(rows)
    if kind == "tokens":
        inputs["labels"] = torch.tensor([pad(row["labels"], -100) for row in rows])
        count = int((inputs["labels"] != -100).sum())
    elif kind == "answers":
        inputs |= {name: torch.tensor([row[name] for row in rows]) for name in ("start_positions", "end_positions")}
    else:
        inputs["labels"] = torch.tensor([row.get("label", row.get("labels")) for row in rows], dtype=torch.float32)
    return model(**inputs).loss * count, count


@torch.no_grad()
def mean_loss(model, kind, rows):
    parts = [summed_loss(model.eval(), kind, rows[i : i + BATCH_ROWS]) for i in range(0, len(rows), BATCH_ROWS)]
    return sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts)


def steps(model, kind, rows):
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        start = step * BATCH_ROWS % len(rows)
        loss, count = summed_loss(model, kind, rows[start : start + BATCH_ROWS])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item() / count


def train(cli, base, rows_file, out, *more):
    sets = dict(max_steps=STEPS, batch_size=BATCH_ROWS, learning_rate=LEARNING_RATE, scheduler="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=0.0)
    arguments = [f"train.{key}={json.dumps(value)}" for key, value in sets.items()] + ["data.shuffle=false", "model.dtype=f32", *more]
    cli.run("train", "--model", base, "--data", rows_file, "--format", "tokens", "--output", out, *(part for setting in arguments for part in ("--set", setting)))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def check(cli, family, kind, method, out, seed):
    base, rows_file = out / "base", out / "rows.jsonl"
    make_model(family, kind, base)
    rows = make_rows(random.Random(seed), kind)
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = lambda adapter=None: cli.eval(base, rows_file, adapter)
    plain = evaluate()
    near("loss of the base", plain["loss"], mean_loss(cases.load_base(base), kind, rows))
    if plain["examples"] != ROWS:
        raise Short(f"{plain['examples']} rows")
    task = KINDS[kind][2]
    model = peft.get_peft_model(cases.load_base(base), METHODS[method](task, family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(out / "theirs")
    loss = mean_loss(model, kind, rows)
    if not abs(loss - plain["loss"]) > 1e-3:
        raise Short(f"the adapter shows nothing: {loss}")
    near("loss", evaluate(out / "theirs")["loss"], loss)
    if kind.startswith("regression"):
        scores(evaluate(out / "theirs"), model, rows)
    trained = model
    if method != "prefix":
        trained = peft.PeftModel.from_pretrained(cases.load_base(base), out / "theirs", is_trainable=True)
    start = load_file(out / "theirs" / "adapter_model.safetensors")
    ours = train(cli, base, rows_file, out / "ours", f"method.init_from={out / 'theirs'}")
    for step, (got, want) in enumerate(zip(ours, steps(trained, kind, rows), strict=True), 1):
        near(f"loss of step {step}", got, want, 1e-3)
    trained.save_pretrained(out / "after")
    got, want = (load_file(folder / "adapter_model.safetensors") for folder in (out / "ours", out / "after"))
    # All tokens' logits move by the bias of an answer's head: its gradient is 0 but for rounding, of which Adam makes whole steps.
    for tensors in (start, got, want):
        for key in [key for key in tensors if key.endswith("qa_outputs.bias")]:
            tensors[key] = torch.zeros_like(tensors[key])
    same_weights(start, got, want)
    again = peft.PeftModel.from_pretrained(cases.load_base(base), out / "ours")
    near("loss of what was trained, in HF PEFT", mean_loss(again, kind, rows), evaluate(out / "ours")["loss"])
    near("loss of what was trained", mean_loss(trained, kind, rows), evaluate(out / "ours")["loss"], 1e-3)


def scores(found, model, rows):
    with torch.no_grad():
        outputs = torch.stack([model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    values = torch.tensor([row["label"] for row in rows]).view(len(rows), -1)
    pairs = zip(outputs.double().T, values.double().T)
    pearson = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]
    near("pearson", found["pearson"], sum(pearson) / len(pearson))
    ranks = lambda column: column.argsort().argsort().double()
    pairs = zip(outputs.double().T, values.double().T)
    spearman = [torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item() for x, y in pairs]
    near("spearman", found["spearman"], sum(spearman) / len(spearman))
    near("mse", found["mse"], (outputs - values).pow(2).mean().item())


def check_fresh(cli, family, kind, out, seed):
    """The head of an encoder that has none: ours to make, PEFT's to load."""
    head, ending, _, settings = KINDS[kind]
    make_model(family, kind, out / "whole")
    prefix = FAMILIES[family][0]
    getattr(transformers, f"{prefix}Model").from_pretrained(out / "whole").save_pretrained(out / "base")
    config = json.loads((out / "base" / "config.json").read_text())
    for key in ("id2label", "label2id", "problem_type", "num_labels"):
        config.pop(key, None)
    (out / "base" / "config.json").write_text(json.dumps(config))
    rows, rows_file = make_rows(random.Random(seed), kind), out / "rows.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = train(cli, out / "base", rows_file, out / "ours", f"model.head={head}", "method.r=4", 'method.target_modules="all-linear"')
    if len(set(losses)) < STEPS:
        raise Short(f"losses {losses}")
    found = cli.eval(out / "base", rows_file, out / "ours")
    model = getattr(transformers, prefix + ending).from_pretrained(out / "base", **settings)
    model = peft.PeftModel.from_pretrained(model, out / "ours")
    near("loss in HF PEFT", mean_loss(model, kind, rows), found["loss"])
    cli.run("merge", "--model", out / "base", "--adapter", out / "ours", "--output", out / "merged")
    merged = cases.load_base(out / "merged")
    if type(merged).__name__ != prefix + ending:
        raise Short(f"merged to a {type(merged).__name__}")
    near("merged loss in transformers", mean_loss(merged, kind, rows), found["loss"])
    near("merged loss", cli.eval(out / "merged", rows_file)["loss"], found["loss"])


WORDS = "The Norman conquest of England in 1066 was led by William , duke of Normandy ; Harold died near Hastings ( Sussex ) .".split()
CONTEXT = (
    "The Norman conquest of England (in the year 1066) was led by William, duke of Normandy. Harold Godwinson, the last "
    "Anglo-Saxon king — crowned in Westminster — died near Hastings. Édouard's café stood in Sußex, they say; it was sold in 1901."
)
QUESTIONS = {
    "Who led the conquest?": ["William, duke of Normandy", "William"],
    "When?": ["1066"],
    "Who died?": ["Harold Godwinson"],
    "What was he?": ["the last Anglo-Saxon king"],
    "Where was the café?": ["Sußex"],
    "Where was he crowned?": ["Westminster"],
    "When was it sold?": ["1901."],
}


def tokenizer(kind, folder):
    """A tokenizer of a family's kind, written into a model's folder; as transformers uses it for words."""
    import tokenizers

    texts = [CONTEXT, " ".join(WORDS), *QUESTIONS] * 3
    if kind == "bert":
        trained = tokenizers.BertWordPieceTokenizer()
        trained.train_from_iterator(texts, vocab_size=200, min_frequency=1)
        fast = lambda **more: transformers.PreTrainedTokenizerFast(
            tokenizer_object=with_frame(trained._tokenizer), unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", **more
        )
        fast().save_pretrained(folder)
        return fast(), fast()
    # Words have a space in front, which the file does not say and transformers is told.
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=500, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    made = []
    for prefix_space in (False, True):
        inner = trained._tokenizer
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
        inner.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=prefix_space)
        inner = tokenizers.Tokenizer.from_str(inner.to_str())
        made.append(transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", cls_token="<s>", sep_token="</s>"))
    made[0].save_pretrained(folder)
    return made


def with_frame(tokenizer):
    """BERT's post-processor with token types."""
    import tokenizers

    ids = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return tokenizer


def eval_rows(cli, base, rows, out, format, *more):
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return json.loads(cli.run("eval", "--model", base, "--data", out, "--format", format, "--json", "--batch-size", "3", *more).splitlines()[-1])


def check_words(cli, family, out, seed):
    base, rng = out / "base", random.Random(seed)
    base.mkdir()
    _, fast = tokenizer(family, base)
    make_model(family, "tokens", base, vocab_size=len(fast), pad_token_id=fast.pad_token_id)
    rows, encoded = [], []
    for number in range(8):
        words = [rng.choice(WORDS) for _ in range(rng.randrange(1, 30))]
        row = dict(tokens=words, ner_tags=[rng.randrange(5) if rng.random() < 0.9 else -100 for _ in words[1:]] + [2])
        rows.append(row)
        for most in (16, 512):
            made = fast(words, is_split_into_words=True, truncation=True, max_length=most)
            ids, before = made.word_ids(), [None, *made.word_ids()]
            labels = [-100 if word is None or word == last else row["ner_tags"][word] for word, last in zip(ids, before)]
            encoded.append((most, dict(input_ids=made["input_ids"], labels=labels)))
    model = cases.load_base(base)
    for most in (16, 512):
        kept = [row for length, row in encoded if length == most]
        if any(all(label == -100 for label in row["labels"]) for row in kept):
            raise Short("a row counts nothing; choose another seed")
        found = eval_rows(cli, base, rows, out / "rows.jsonl", "token_classification", "--max-length", most)
        near(f"loss of at most {most} tokens", found["loss"], mean_loss(model, "tokens", kept))
        counted = sum(label != -100 for row in kept for label in row["labels"])
        if found["tokens"] != counted:
            raise Short(f"{found['tokens']} tokens count, should be {counted}")


def normalised(text):
    """SQuAD's `normalize_answer`, as its metric is defined."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(found, right):
    words = lambda text: normalised(text).split()
    right = [answer for answer in right if words(answer)] or [""]
    exact = max(float(normalised(found) == normalised(answer)) for answer in right)

    def f1(answer):
        if not words(answer) or not words(found):
            return float(words(answer) == words(found))
        shared = sum((collections.Counter(words(answer)) & collections.Counter(words(found))).values())
        return 2 * shared / (len(words(answer)) + len(words(found)))

    return exact, max(map(f1, right))


def check_questions(cli, family, out, seed, none):
    base = out / "base"
    base.mkdir()
    fast, _ = tokenizer(family, base)
    make_model(family, "answers", base, vocab_size=len(fast), pad_token_id=fast.pad_token_id)
    model = cases.load_base(base)
    rows = []
    for question, answers in QUESTIONS.items():
        rows.append(dict(question=question, context=CONTEXT, answers=dict(text=answers, answer_start=[CONTEXT.index(a) for a in answers])))
    if none:
        rows.append(dict(question="Why?", context=CONTEXT, answers=dict(text=[], answer_start=[])))
    for most in (45, 512):
        encoded, scores, lost = [], [], 0
        for row in rows:
            made = fast(row["question"], row["context"], truncation="only_second", max_length=most, return_offsets_mapping=True, return_token_type_ids=True)
            places = [t for t, part in enumerate(made.sequence_ids()) if part == 1]
            offsets, start, end = made["offset_mapping"], 0, 0
            if row["answers"]["text"]:
                first = row["answers"]["answer_start"][0]
                last = first + len(row["answers"]["text"][0])
                if offsets[places[0]][0] <= first and offsets[places[-1]][1] >= last:
                    start = max(t for t in places if offsets[t][0] <= first)
                    end = min(t for t in places if offsets[t][1] >= last)
                else:
                    lost += 1
            encoded.append(dict(made, start_positions=start, end_positions=end))
            inputs = {key: torch.tensor([made[key]]) for key in ("input_ids", "token_type_ids") if key in made}
            with torch.no_grad():
                given = model(**inputs)
            s, e = given.start_logits[0], given.end_logits[0]
            best = max((s[a].item() + e[b].item(), -a, -b) for a in places for b in places if a <= b < a + 30)
            text = row["context"][offsets[-best[1]][0] : offsets[-best[2]][1]]
            if none and s[0].item() + e[0].item() > best[0]:
                text = ""
            scores.append(answer_scores(text, row["answers"]["text"]))
        if bool(lost) != (most == 45):
            raise Short(f"{lost} answers are cut away at {most} tokens")
        found = eval_rows(cli, base, rows, out / "rows.jsonl", "question_answering", "--max-length", most)
        near(f"loss of at most {most} tokens", found["loss"], mean_loss(model, "answers", encoded))
        for name, column in (("exact_match", 0), ("f1", 1)):
            near(f"{name} of at most {most} tokens", found[name], sum(score[column] for score in scores) / len(scores))


def main():
    given, tally = options(__doc__, only="comma-separated names of cases, or their beginnings"), Tally()
    plan = [(f"heads/{family}/{kind}/{method}", check, (family, kind, method)) for family, kind, method in PLAN]
    plan += [(f"heads/{family}/{kind}/fresh", check_fresh, (family, kind)) for family, kind in [("bert", kind) for kind in KINDS] + [("roberta", "tokens"), ("distilbert", "answers")]]
    plan += [(f"heads/{family}/words/texts", check_words, (family,)) for family in ("bert", "roberta")]
    with tempfile.TemporaryDirectory() as work:
        for number, (label, run, arguments) in enumerate(plan):
            if given.only and not any(label.removeprefix("heads/").startswith(name) for name in given.only):
                continue
            out = pathlib.Path(work) / str(number)
            out.mkdir()
            torch.manual_seed(given.seed * 1000 + number)
            with tally.case(label):
                run(given.cli, *arguments, out, given.seed)
        for family in ("bert", "roberta"):
            for none in (False, True):
                label, out = f"heads/{family}/questions{'_or_none' * none}/texts", pathlib.Path(work) / f"{family}-{none}"
                if given.only and not any(label.removeprefix("heads/").startswith(name) for name in given.only):
                    continue
                out.mkdir()
                with tally.case(label):
                    check_questions(given.cli, family, out, given.seed, none)
    tally.end()


if __name__ == "__main__":
    main()
