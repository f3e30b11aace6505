#!/usr/bin/env python3
"""Write a base model that both sides load, as a Hugging Face folder in bf16; does nothing where it stands already.

    $(scripts/python-env.sh) bench/vs_hf/models.py smollm2 OUT --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    $(scripts/python-env.sh) bench/vs_hf/models.py llama-1b OUT

`smollm2` is the .gguf's weights, widened and rounded to bf16 once: the form in which transformers loads a model fastest (reading
the .gguf itself takes it ten times as long), so that start-up is compared at its best. `llama-1b` has the shape of Llama 3.2 1B and
random weights, written in shards with one layer in memory at a time; it has no tokenizer.
"""
import argparse
import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

LAYERS_A_SHARD = 4


def smollm2(folder, gguf):
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from a .gguf counts as quantised and is not saved, so its values go into one that does not.
    config = LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "dtype")})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def llama_1b(folder, _):
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, max_position_embeddings=131072, tie_word_embeddings=True,
        bos_token_id=128000, eos_token_id=128001, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16,
        rope_parameters=dict(rope_theta=500000.0, rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=8192),
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.empty(shape, dtype=torch.bfloat16).normal_(0, config.initializer_range, generator=generator)
    ones = lambda n: torch.ones(n, dtype=torch.bfloat16)
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def layer(i):
        shapes = {"self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
                  "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                  "mlp.down_proj": (hidden, inner)}
        tensors = {f"{name}.weight": noise(*shape) for name, shape in shapes.items()}
        tensors |= {f"{name}.weight": ones(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
        return {f"model.layers.{i}.{name}": tensor for name, tensor in tensors.items()}

    shards = -(-config.num_hidden_layers // LAYERS_A_SHARD) + 1
    places, size = {}, 0

    def shard(number, tensors):
        nonlocal size
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))
        size += sum(t.numel() * t.element_size() for t in tensors.values())

    shard(1, {"model.embed_tokens.weight": noise(config.vocab_size, hidden), "model.norm.weight": ones(hidden)})
    for number, first in enumerate(range(0, config.num_hidden_layers, LAYERS_A_SHARD), start=2):
        layers = range(first, min(first + LAYERS_A_SHARD, config.num_hidden_layers))
        shard(number, {name: tensor for i in layers for name, tensor in layer(i).items()})
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = {"smollm2": smollm2, "llama-1b": llama_1b}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--gguf", type=pathlib.Path)
    args = parser.parse_args()
    if args.out.exists():
        return
    unfinished = args.out.with_name(args.out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    kinds[args.kind](unfinished, args.gguf)
    unfinished.rename(args.out)


if __name__ == "__main__":
    main()
