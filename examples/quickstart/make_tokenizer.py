#!/usr/bin/env python3
"""Trains the quickstart's tokenizer on its own text: a byte-level BPE with a ChatML chat template.

    pip install tokenizers            # the only package needed
    python3 make_data.py --pretrain   # writes what it is trained on
    python3 make_tokenizer.py         # writes base/tokenizer.json and its two companions
"""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from make_data import HERE, PRETRAIN

VOCAB = 2048
# Their ids are their places: 0, 1, 2, 3.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
SPECIAL_TEXT = re.compile("|".join(re.escape(token) for token in SPECIAL))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def texts():
    for line in PRETRAIN.read_text(encoding="utf-8").splitlines():
        yield SPECIAL_TEXT.sub("", json.loads(line)["text"])


def save(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts(), trainer)

    base = HERE / "base"
    base.mkdir(exist_ok=True)
    tokenizer.save(str(base / "tokenizer.json"))
    roles = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    save(base / "special_tokens_map.json", roles | {"additional_special_tokens": SPECIAL[1:3]})
    added = {str(at): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
             for at, token in enumerate(SPECIAL)}
    save(base / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, "add_bos_token": False, "add_prefix_space": False,
        "bos_token": None, **roles, "unk_token": None, "additional_special_tokens": SPECIAL[1:3],
        "clean_up_tokenization_spaces": False, "model_max_length": 256, "chat_template": CHAT_TEMPLATE,
    })
    print(f"{tokenizer.get_vocab_size()} tokens, {(base / 'tokenizer.json').stat().st_size} bytes")


if __name__ == "__main__":
    main()
