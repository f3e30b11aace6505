#!/usr/bin/env python3
"""Make cases that peft-cli is compared with Hugging Face PEFT on: tiny random models, adapters of every kind.

    interop/cases.py OUT [--seed 0] [--only MODEL[/VARIANT],…]

OUT/MODEL/base/               the model as transformers saves it
OUT/MODEL/rows.jsonl          {"input_ids", "labels"}; labels are aligned with input_ids, -100 is not counted;
                              {"input_ids", "label"} for models with a class head; labels are the target of an
                              encoder-decoder
OUT/MODEL/VARIANT/adapter/    the adapter as peft saves it, moved away from its initial values
OUT/MODEL/VARIANT/trained/    the same adapter after STEPS steps of AdamW
OUT/MODEL/VARIANT/expected.json
    base_loss, loss, merged_loss   mean negative log likelihood a counted token (a row, with a class head), over all rows;
                                   merged_loss is null where peft cannot merge
    accuracy                       share of rows whose class is the likeliest, with a class head
    tokens, rows                   how many count
    train_losses, trained_loss     loss of each step (before its update), and over all rows after the last; null where peft
                                   does not train what is in the file
    batch_rows, learning_rate
    draws                          whether a step draws random numbers by the rows of a batch
Runs on the CPU, without a network; the same seed gives the same cases.
"""
import argparse
import json
import os
import pathlib
import random
import shutil
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch
import transformers
import peft
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 101
ROWS, BATCH_ROWS, STEPS, LEARNING_RATE = 24, 4, 6, 2e-3

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEARS = ATTENTION + MLP

# What differs from a small model with grouped-query attention; `file` keys are about how it is written.
SHAPE = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)
MODELS = {
    "llama": {},
    "tied": dict(tie_word_embeddings=True, rope_theta=5e5),
    "biased": dict(attention_bias=True, mlp_bias=True),
    "mqa": dict(num_key_value_heads=1, rms_norm_eps=1e-5),
    "mha": dict(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2),
    # heads that do not add up to the hidden size, both ways
    "head_dim": dict(head_dim=16, hidden_size=42),
    "head_dim_small": dict(head_dim=6, tie_word_embeddings=True),
    # scalings that reach into the bands that rows of this length use
    "rope_llama3": dict(rope=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32), rope_theta=1e3),
    "rope_yarn": dict(rope=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "rope_linear": dict(rope=dict(rope_type="linear", factor=2.5)),
    # config.json as it was before transformers 5
    "rope_llama3_old_file": dict(rope=dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32), rope_theta=1e3, file="old"),
    "rope_yarn_old_file": dict(rope=dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0), file="old"),
    "bf16": dict(file="bf16"),
    "f16_tied": dict(file="f16", tie_word_embeddings=True),
    "sharded": dict(file="sharded"),
    # class heads: on the first token of an encoder, on the last of a decoder
    "bert": dict(family="bert"),
    "bert_no_types": dict(family="bert", hidden_act="gelu_new", num_attention_heads=3, type_vocab_size=1, num_labels=2, layer_norm_eps=1e-5),
    "bert_bf16": dict(family="bert", file="bf16"),
    "roberta": dict(family="roberta", pad_token_id=5),
    "xlm_roberta": dict(family="xlm_roberta"),
    "distilbert": dict(family="distilbert"),
    "llama_classes": dict(family="llama_classes"),
    # other decoders: windows and tables of positions that the lengths of the rows reach
    "mistral": dict(family="mistral", sliding_window=12),
    "qwen2": dict(family="qwen2", tie_word_embeddings=True),
    "qwen2_window": dict(family="qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=9),
    "qwen3": dict(family="qwen3", head_dim=16),
    "phi3": dict(family="phi3"),
    # the long factors at every length: transformers takes them by the longest row of a batch
    "phi4": dict(family="phi3", tie_word_embeddings=True, original_max_position_embeddings=4, rope_parameters=dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, short_factor=[1.0, 1.2, 1.5], long_factor=[1.5, 3.0, 5.0])),
    "gemma": dict(family="gemma", head_dim=16, num_key_value_heads=1),
    "gemma2": dict(family="gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2_classes": dict(family="gemma2_classes", final_logit_softcapping=3.0),
    "gemma3": dict(family="gemma3", layer_types=["sliding_attention", "full_attention", "sliding_attention"], rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e4), sliding_attention=dict(rope_type="default", rope_theta=1e2))),
    "gpt2": dict(family="gpt2"),
    "gpt2_classes": dict(family="gpt2_classes"),
    "gpt_neox": dict(family="gpt_neox"),
    "gpt_neox_sequential": dict(family="gpt_neox", use_parallel_residual=False, attention_bias=False, num_attention_heads=3),
    "olmo2": dict(family="olmo2"),
    "stablelm": dict(family="stablelm", use_qkv_bias=True),
    "smollm3": dict(family="smollm3", no_rope_layer_interval=2),
    "opt": dict(family="opt"),
    "falcon": dict(family="falcon"),
    "falcon_grouped": dict(family="falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, bias=True),
    "falcon_two_norms": dict(family="falcon", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=80),
    "qwen3_classes": dict(family="qwen3_classes"),
    # mixtures of experts: more than a row reaches, layers without, weights that do not add up to one, a window
    "mixtral": dict(family="mixtral", sliding_window=12),
    "mixtral_fused": dict(family="mixtral", num_local_experts=3, num_experts_per_tok=3, tie_word_embeddings=True, file="fused"),
    "qwen3_moe": dict(family="qwen3_moe", head_dim=16, num_hidden_layers=4, mlp_only_layers=[1], norm_topk_prob=True),
    "qwen3_moe_sparse": dict(family="qwen3_moe", head_dim=16, decoder_sparse_step=2, num_experts=20, num_experts_per_tok=1, use_sliding_window=True, sliding_window=9),
    "qwen2_moe": dict(family="qwen2_moe"),
    "olmoe": dict(family="olmoe", norm_topk_prob=True),
    "mixtral_classes": dict(family="mixtral_classes"),
    # encoder-decoders: heads that do not add up to the hidden size, stacks of unequal depth, distances beyond the last bucket
    "t5": dict(family="t5", d_kv=10, num_decoder_layers=3, relative_attention_num_buckets=8, relative_attention_max_distance=20),
    "t5_prompts": dict(family="t5", num_layers=3),
    # v1.1 as its files were before transformers 5: a head of its own, which is not scaled
    "t5_v1_1": dict(family="t5", feed_forward_proj="gated-gelu", file="untied"),
    "t5_unscaled": dict(family="t5", feed_forward_proj="gated-silu", tie_word_embeddings=False, relative_attention_num_buckets=12),
    "mt5": dict(family="mt5", d_kv=7),
    "bart": dict(family="bart"),
    "bart_scaled": dict(family="bart", scale_embedding=True, encoder_layers=1, decoder_layers=1, activation_function="relu"),
}

# configuration and class in transformers, and what every model of the family has
ENCODER = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_labels=3, pad_token_id=0)
DECODER = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
WINDOWED = dict(SHAPE, **DECODER, head_dim=16, sliding_window=9, query_pre_attn_scalar=24)
GPT2 = dict(DECODER, hidden_size=48, num_hidden_layers=3, num_attention_heads=3)
T5 = dict(d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
FAMILIES = {
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(SHAPE, **DECODER)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", dict(SHAPE, **DECODER)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(SHAPE, **DECODER)),
    "qwen3_classes": ("Qwen3Config", "Qwen3ForSequenceClassification", dict(SHAPE, **DECODER, head_dim=8, num_labels=3)),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(SHAPE, **DECODER, num_local_experts=6)),
    "mixtral_classes": ("MixtralConfig", "MixtralForSequenceClassification", dict(SHAPE, **DECODER, num_local_experts=4, num_labels=3)),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(SHAPE, **DECODER, moe_intermediate_size=20, num_experts=5, num_experts_per_tok=2)),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", dict(SHAPE, **DECODER, moe_intermediate_size=20, shared_expert_intermediate_size=28, num_experts=5, num_experts_per_tok=3)),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", dict(SHAPE, **DECODER, num_experts=7, num_experts_per_tok=3)),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", dict(SHAPE, **DECODER)),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", dict(SHAPE, **DECODER)),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", WINDOWED),
    "gemma2_classes": ("Gemma2Config", "Gemma2ForSequenceClassification", dict(WINDOWED, num_labels=3)),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", WINDOWED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt2_classes": ("GPT2Config", "GPT2ForSequenceClassification", dict(GPT2, num_labels=3)),
    # a quarter of these heads is an odd number of dimensions
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", dict(DECODER, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", dict(SHAPE, **DECODER)),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", dict(SHAPE, **DECODER)),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", dict(SHAPE, **DECODER)),
    "opt": ("OPTConfig", "OPTForCausalLM", dict(DECODER, hidden_size=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=4)),
    "falcon": ("FalconConfig", "FalconForCausalLM", dict(DECODER, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)),
    "llama": ("LlamaConfig", "LlamaForCausalLM", SHAPE),
    "llama_classes": ("LlamaConfig", "LlamaForSequenceClassification", dict(SHAPE, num_labels=3)),
    "bert": ("BertConfig", "BertForSequenceClassification", ENCODER),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", ENCODER),
    "xlm_roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", dict(ENCODER, pad_token_id=1)),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", T5),
    "bart": ("BartConfig", "BartForConditionalGeneration", dict(d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", dict(dim=48, hidden_dim=80, n_layers=3, n_heads=4, num_labels=3, pad_token_id=0)),
}

VARIANTS = {
    "lora": dict(r=4, lora_alpha=12, target_modules=ATTENTION),
    "default_targets": dict(r=2),
    "all_linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
    "regex": dict(r=4, target_modules=r".*\.(0|2)\.(mlp\.(up|down)|self_attn\.[qv])_proj"),
    "full_names": dict(r=4, target_modules=["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]),
    "exclude": dict(r=4, target_modules=LINEARS, exclude_modules=r".*layers\.1\..*|.*\.down_proj"),
    "exclude_list": dict(r=4, target_modules=LINEARS, exclude_modules=["k_proj", "layers.2.mlp.gate_proj"]),
    "layers": dict(r=4, target_modules=ATTENTION, layers_to_transform=[1]),
    "layers_pattern": dict(r=4, target_modules=MLP, layers_to_transform=[0, 2], layers_pattern="layers"),
    "rank_pattern": dict(r=4, lora_alpha=8, target_modules=LINEARS, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6}, alpha_pattern={"down_proj": 32, r"^model\.layers\.0\..*v_proj": 5}),
    "rslora": dict(r=6, lora_alpha=9, use_rslora=True, target_modules=LINEARS),
    "rslora_rank_pattern": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=ATTENTION, rank_pattern={"v_proj": 9}),
    "dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=ATTENTION),
    "dora_all": dict(r=3, lora_alpha=6, use_dora=True, target_modules=LINEARS, use_rslora=True),
    "dora_rank_pattern": dict(r=4, lora_alpha=8, use_dora=True, target_modules=LINEARS, rank_pattern={"o_proj": 1, "gate_proj": 7}, alpha_pattern={"k_proj": 2}),
    "lora_bias": dict(r=4, lora_alpha=6, lora_bias=True, target_modules=ATTENTION),
    "bias_lora_only": dict(r=4, target_modules=["q_proj", "down_proj"], bias="lora_only"),
    "bias_all": dict(r=4, target_modules=["q_proj", "down_proj"], bias="all"),
    "embeddings": dict(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
    "embeddings_dora": dict(r=4, lora_alpha=6, target_modules=["embed_tokens", "v_proj"], use_dora=True),
    "head": dict(r=4, lora_alpha=6, target_modules=["lm_head", "q_proj"]),
    "head_dora": dict(r=4, target_modules=["lm_head"], use_dora=True),
    "save_head": dict(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"]),
    "save_embeddings": dict(r=4, target_modules=ATTENTION, modules_to_save=["embed_tokens"]),
    "save_norm": dict(r=4, target_modules=["v_proj"], modules_to_save=["post_attention_layernorm"]),
    "tokens": dict(r=4, target_modules=ATTENTION, trainable_token_indices=[3, 7, 11]),
    "rank_1": dict(r=1, lora_alpha=1, target_modules=["o_proj"]),
    "rank_over_width": dict(r=64, lora_alpha=32, target_modules=["k_proj", "up_proj"]),
}

# Other methods than LoRA: peft's class, then its settings.
VARIANTS |= {
    "ia3": ("IA3Config", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3_defaults": ("IA3Config", dict()),
    "ia3_patterns": ("IA3Config", dict(target_modules=r".*\.(0|2)\..*_proj", feedforward_modules=r".*(up|o)_proj", exclude_modules=["k_proj"])),
    "ia3_random": ("IA3Config", dict(target_modules=LINEARS, feedforward_modules=["gate_proj", "q_proj"], init_ia3_weights=False)),
    "ia3_save_norm": ("IA3Config", dict(target_modules=ATTENTION, feedforward_modules=[], modules_to_save=["post_attention_layernorm"])),
    "prefix": ("PrefixTuningConfig", dict(num_virtual_tokens=5)),
    "prefix_zero": ("PrefixTuningConfig", dict(num_virtual_tokens=1, init_weights="zero")),
    "prefix_projected": ("PrefixTuningConfig", dict(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=11)),
    "prompt": ("PromptTuningConfig", dict(num_virtual_tokens=5)),
    "prompt_vocabulary": ("PromptTuningConfig", dict(num_virtual_tokens=7, prompt_tuning_init="SAMPLE_VOCAB")),
    "p_tuning": ("PromptEncoderConfig", dict(num_virtual_tokens=3, encoder_hidden_size=11)),
    "p_tuning_lstm": ("PromptEncoderConfig", dict(num_virtual_tokens=3, encoder_hidden_size=5, encoder_reparameterization_type="LSTM")),
    "prefix_save": ("PrefixTuningConfig", dict(num_virtual_tokens=4, modules_to_save=["lm_head", "embed_tokens"])),
    "prompt_save": ("PromptTuningConfig", dict(num_virtual_tokens=4, modules_to_save=["lm_head", "post_attention_layernorm"])),
    "adaption_prompt": ("AdaptionPromptConfig", dict(adapter_len=5, adapter_layers=2)),
    "adaption_prompt_top": ("AdaptionPromptConfig", dict(adapter_len=1, adapter_layers=1)),
    "ln": ("LNTuningConfig", dict()),
    "ln_some": ("LNTuningConfig", dict(target_modules=["input_layernorm", "model.norm"])),
    "trainable_tokens": ("TrainableTokensConfig", dict(token_indices=[3, 7, 11])),
    "trainable_tokens_head": ("TrainableTokensConfig", dict(token_indices=[9, 2], target_modules=["embed_tokens", "lm_head"])),
    "vera": ("VeraConfig", dict(r=6, target_modules=["q_proj", "o_proj"])),
    "vera_not_saved": ("VeraConfig", dict(r=6, target_modules=["v_proj", "up_proj"], projection_prng_key=3, save_projection=False)),
    "loha": ("LoHaConfig", dict(r=4, alpha=6, target_modules=ATTENTION)),
    "lokr": ("LoKrConfig", dict(r=3, alpha=6, target_modules=LINEARS)),
    "adalora": ("AdaLoraConfig", dict(target_modules=ATTENTION, init_r=6, target_r=4, total_step=100, tinit=10, tfinal=10, orth_reg_weight=1e-12)),
    # the whole schedule within the steps of a case, and the regulariser
    "adalora_allocated": ("AdaLoraConfig", dict(target_modules=["q_proj", "v_proj", "down_proj"], init_r=6, target_r=3, total_step=6, tinit=1, tfinal=1, orth_reg_weight=0.3)),
    "adalora_intervals": ("AdaLoraConfig", dict(target_modules=ATTENTION, init_r=4, target_r=2, total_step=7, tfinal=2, deltaT=2, beta1=0.7, beta2=0.6, orth_reg_weight=0.01)),
    "hra": ("HRAConfig", dict(r=4, target_modules=ATTENTION)),
    "oft": ("OFTConfig", dict(oft_block_size=8, target_modules=ATTENTION)),
    "boft": ("BOFTConfig", dict(boft_block_size=4, target_modules=ATTENTION)),
    "miss": ("MissConfig", dict(r=8, target_modules=["q_proj", "v_proj"])),
    "road": ("RoadConfig", dict(group_size=8, target_modules=["q_proj", "v_proj"])),
    "delora": ("DeloraConfig", dict(r=4, target_modules=["q_proj", "v_proj"])),
    "gralora": ("GraloraConfig", dict(r=8, target_modules=["q_proj", "v_proj"])),
    "shira": ("ShiraConfig", dict(r=2, target_modules=["q_proj", "down_proj"])),
    "randlora": ("RandLoraConfig", dict(r=5, randlora_alpha=20, target_modules=["q_proj", "v_proj", "down_proj"])),
    "randlora_not_saved": ("RandLoraConfig", dict(r=8, randlora_alpha=20, projection_prng_key=7, save_projection=False, target_modules=["k_proj", "up_proj"])),
    "randlora_sparse": ("RandLoraConfig", dict(r=8, randlora_alpha=20, sparse=True, save_projection=False, target_modules=["o_proj", "up_proj"])),
    "randlora_very_sparse": ("RandLoraConfig", dict(r=8, randlora_alpha=20, very_sparse=True, save_projection=False, target_modules=["o_proj"])),
    "vblora": ("VBLoRAConfig", dict(r=4, num_vectors=12, vector_length=8, target_modules=["q_proj", "v_proj", "down_proj"])),
    "vblora_only_topk": ("VBLoRAConfig", dict(r=4, num_vectors=300, vector_length=16, topk=3, save_only_topk_weights=True, target_modules=["q_proj", "v_proj"])),
    "fourierft": ("FourierFTConfig", dict(n_frequency=20, target_modules=["q_proj", "down_proj"])),
    "fourierft_many": ("FourierFTConfig", dict(n_frequency=700, scaling=40.0, random_loc_seed=5, n_frequency_pattern={"v_proj": 3}, target_modules=["v_proj", "up_proj"])),
}

# Another thing for each task: rows name theirs.
TASKS = 3
VARIANTS |= {
    "poly": ("PolyConfig", dict(r=3, n_tasks=TASKS, target_modules=ATTENTION)),
    "poly_heads": ("PolyConfig", dict(r=4, n_tasks=TASKS, n_skills=3, n_splits=4, init_weights=False, target_modules=["q_proj", "v_proj", "down_proj"])),
    # two examples of template, input, template, label, and a row's template in front
    "cpt": ("CPTConfig", dict(cpt_token_ids=[5, 17, 42, 6, 7, 60, 5, 33, 6, 61, 5], cpt_tokens_type_mask=[1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9])),
    "cpt_decay": ("CPTConfig", dict(cpt_token_ids=[5, 17, 6, 60, 62, 5, 33, 6, 61], cpt_tokens_type_mask=[1, 2, 3, 4, 4, 5, 6, 7, 8], opt_weighted_loss_type="decay", opt_loss_decay_factor=0.7, opt_projection_epsilon=0.4, opt_projection_format_epsilon=0.05)),
    "multitask_prompt": ("MultitaskPromptTuningConfig", dict(num_virtual_tokens=4, num_tasks=TASKS, num_ranks=2)),
}

# The same kinds on the layers that BERT and RoBERTa have, and on DistilBERT's.
BERT_ATTENTION = ["query", "key", "value"]
BERT_LINEARS = BERT_ATTENTION + ["intermediate.dense", "output.dense"]
VARIANTS |= {
    "bert_lora": dict(r=4, lora_alpha=12, target_modules=BERT_ATTENTION),
    "bert_regex": dict(r=4, target_modules=r".*\.1\..*(query|intermediate\.dense)"),
    "bert_rank_pattern": dict(r=4, lora_alpha=8, target_modules=BERT_LINEARS, rank_pattern={"query": 2}, alpha_pattern={"intermediate.dense": 32}),
    "bert_rslora": dict(r=6, lora_alpha=9, use_rslora=True, target_modules=BERT_LINEARS),
    "bert_dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=BERT_LINEARS),
    "bert_lora_bias": dict(r=4, lora_bias=True, target_modules=BERT_ATTENTION),
    "bert_layers": dict(r=4, target_modules=BERT_ATTENTION, layers_to_transform=[1]),
    "bert_bias_all": dict(r=4, target_modules=BERT_ATTENTION, bias="all"),
    "bert_bias_lora_only": dict(r=4, target_modules=BERT_LINEARS, bias="lora_only"),
    "bert_embeddings": dict(r=4, target_modules=["word_embeddings", "query"]),
    "bert_ia3": ("IA3Config", dict(target_modules=["key", "value", "intermediate.dense"], feedforward_modules=["intermediate.dense"])),
    "bart_ia3": ("IA3Config", dict(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"])),
    "bart_ln": ("LNTuningConfig", dict(target_modules=["layernorm_embedding", "self_attn_layer_norm", "final_layer_norm"])),
    # one norm for attention and MLP
    "falcon_ln": ("LNTuningConfig", dict(target_modules=["input_layernorm"])),
    "falcon_ia3": ("IA3Config", dict(target_modules=["query_key_value", "dense_4h_to_h"], feedforward_modules=["dense_4h_to_h"])),
    "bert_ln": ("LNTuningConfig", dict(target_modules=["LayerNorm"])),
    "bert_oft": ("OFTConfig", dict(oft_block_size=4, target_modules=BERT_ATTENTION)),
    "bert_save_norms": dict(r=4, target_modules=BERT_ATTENTION, modules_to_save=["LayerNorm"]),
    "bert_save_pooler": dict(r=4, target_modules=BERT_ATTENTION, modules_to_save=["pooler"]),
    "distilbert_lora": dict(r=4, lora_alpha=12, target_modules=["q_lin", "k_lin", "v_lin"]),
    "distilbert_dora": dict(r=4, use_dora=True, target_modules=["q_lin", "out_lin", "lin1", "lin2"]),
    # peft refuses all-linear here: `pre_classifier` ends like `classifier`, so it is saved whole
    "distilbert_all_linear": dict(r=3, target_modules="all-linear", exclude_modules=["pre_classifier"]),
    "distilbert_bias_all": dict(r=4, target_modules=["q_lin", "v_lin"], bias="all"),
    # peft does not know the names that DistilBERT's configuration has for its sizes, and has no place for a prefix
    "distilbert_prompt": ("PromptTuningConfig", dict(num_virtual_tokens=5, token_dim=48, num_layers=3, num_attention_heads=4)),
    "distilbert_p_tuning": ("PromptEncoderConfig", dict(num_virtual_tokens=3, encoder_hidden_size=11, token_dim=48, num_layers=3, num_attention_heads=4)),
    "bert_prefix_save": ("PrefixTuningConfig", dict(num_virtual_tokens=4, prefix_projection=True, modules_to_save=["pooler"])),
}

# What fits every decoder, and what fits those with other names of layers.
VARIANTS |= {
    "any_tokens": dict(r=3, target_modules="all-linear", trainable_token_indices=[3, 7, 11]),
    "any_bias_all": dict(r=3, target_modules="all-linear", bias="all"),
    "any_dora": dict(r=3, target_modules="all-linear", use_dora=True),
    "gpt2_save": dict(r=4, target_modules=["c_attn"], modules_to_save=["c_fc", "wpe"]),
    "gpt2_positions": dict(r=4, lora_alpha=6, target_modules=["wpe", "mlp.c_proj"]),
    # PEFT's own default scales by 640 / r: softmaxes saturate, and gradients are what rounding leaves
    "any_randlora": ("RandLoraConfig", dict(r=5, randlora_alpha=5, target_modules="all-linear")),
    "phi3_dora": dict(r=4, use_dora=True, target_modules=["qkv_proj", "gate_up_proj"]),
    "neox_save_head": dict(r=4, target_modules=["query_key_value", "dense"], modules_to_save=["embed_out", "lm_head"]),
    "head_norms": dict(r=4, target_modules=["v_proj"], modules_to_save=["q_norm", "k_norm"]),
    "ia3_neox": ("IA3Config", dict(target_modules=["query_key_value", "dense_4h_to_h"], feedforward_modules=["dense_4h_to_h"])),
}

# On mixtures of experts. peft takes the old names of their layers for the parameters that hold them now.
VARIANTS |= {
    "moe_parameters": dict(r=3, lora_alpha=7, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], target_modules=["q_proj", "v_proj"]),
    "moe_gate_up": dict(r=2, lora_alpha=5, use_rslora=True, target_parameters=["gate_up_proj"]),
    "moe_down_and_router": dict(r=2, lora_alpha=6, target_parameters=["experts.down_proj", "gate.weight"], rank_pattern={"down_proj": 3, "gate.weight": 1}, alpha_pattern={r".*experts\.down_proj": 2}),
    "moe_layer_weight": dict(r=2, target_parameters=["q_proj.weight", "layers.0.mlp.experts.down_proj"]),
    "moe_regex": dict(r=2, target_modules=r".*\.(q_proj|down_proj|gate)"),
    "moe_old_names": dict(r=2, lora_alpha=6, target_modules=["w1", "w2", "w3", "k_proj"]),
    "moe_names": dict(r=2, lora_alpha=6, target_modules=MLP + ["gate", "o_proj"]),
    "moe_save_router": dict(r=4, target_modules=ATTENTION, modules_to_save=["mlp.gate"]),
    "moe_dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=ATTENTION),
    "moe_ia3": ("IA3Config", dict(target_modules=ATTENTION, feedforward_modules=[])),
    "moe_ln": ("LNTuningConfig", dict(target_modules=["input_layernorm", "post_attention_layernorm"])),
    "moe_bias": dict(r=4, target_modules=["q_proj"], bias="all"),
}

# On the layers that T5 has.
VARIANTS |= {
    "t5_lora": dict(r=4, lora_alpha=12, target_modules=["q", "k", "v", "o"]),
    "t5_regex": dict(r=4, target_modules=r"decoder.*(EncDecAttention\.[kv]|wo)"),
    "t5_dora": dict(r=4, use_dora=True, target_modules=["q", "v", "wo"]),
    "t5_tables": dict(r=4, lora_alpha=6, target_modules=["relative_attention_bias", "q"]),
    "t5_save": dict(r=4, target_modules=["q"], modules_to_save=["final_layer_norm"]),
    "t5_save_head": dict(r=4, target_modules=["q", "v"], modules_to_save=["lm_head"]),
    "t5_prompt_save": ("PromptTuningConfig", dict(num_virtual_tokens=3, modules_to_save=["lm_head", "final_layer_norm"])),
    "t5_oft": ("OFTConfig", dict(oft_block_size=8, target_modules=["q", "v"])),
    "t5_poly": ("PolyConfig", dict(r=2, n_tasks=TASKS, n_splits=2, target_modules=["q", "v", "wo"])),
    "t5_road": ("RoadConfig", dict(group_size=8, target_modules=["k", "v"])),
}

# The plain model gets every variant; the others those that their peculiarity can spoil.
PLAN = {
    "llama": [name for name in VARIANTS if not name.startswith(("bert_", "distilbert_", "any_", "gpt2_", "phi3_", "neox_", "ia3_neox", "head_norms", "t5_", "bart_", "falcon_", "moe_"))],
    "tied": ["lora", "all_linear", "dora", "tokens", "embeddings", "save_head", "save_embeddings", "ia3_defaults", "prefix", "prefix_save", "prompt", "prompt_save", "p_tuning", "ln", "trainable_tokens"],
    "biased": ["lora", "dora_all", "lora_bias", "bias_lora_only", "bias_all", "rank_pattern", "all_linear", "ia3", "ia3_random", "prefix", "adaption_prompt"],
    "mqa": ["all_linear", "dora", "prefix", "prefix_projected", "adaption_prompt"],
    "mha": ["lora", "save_norm", "adaption_prompt"],
    "head_dim": ["all_linear", "dora_all", "prefix", "prompt"],
    "head_dim_small": ["lora", "tokens"],
    "rope_llama3": ["lora"],
    "rope_yarn": ["lora", "prefix", "prompt"],
    "rope_linear": ["lora"],
    "rope_llama3_old_file": ["lora"],
    "rope_yarn_old_file": ["lora"],
    "bf16": ["all_linear", "dora", "embeddings", "save_head", "ia3", "prefix", "prompt", "adaption_prompt", "ln"],
    "f16_tied": ["lora", "tokens"],
    "sharded": ["lora", "save_head"],
    "bert": ["default_targets", "all_linear", "any_randlora", "prefix", "prompt", "multitask_prompt", "p_tuning"] + [name for name in VARIANTS if name.startswith("bert_")],
    "bert_no_types": ["bert_lora", "all_linear", "prefix_projected", "prompt_vocabulary", "p_tuning_lstm"],
    "bert_bf16": ["bert_lora", "bert_dora", "prefix", "prompt"],
    "roberta": ["bert_lora", "bert_dora", "bert_bias_all", "all_linear", "prefix", "prompt", "p_tuning"],
    "xlm_roberta": ["default_targets", "all_linear", "prefix_zero", "prompt", "p_tuning"],
    "distilbert": [name for name in VARIANTS if name.startswith("distilbert_")],
    "llama_classes": ["lora", "adaption_prompt", "all_linear", "multitask_prompt", "dora", "bias_all", "default_targets", "save_norm", "prefix", "prefix_projected", "prompt", "p_tuning"],
    "mistral": ["default_targets", "all_linear", "ia3_defaults", "prefix", "adaption_prompt"],
    "qwen2": ["any_bias_all", "tokens", "prompt"],
    "qwen2_window": ["all_linear", "prefix"],
    "qwen3": ["any_dora", "head_norms", "ia3_defaults", "prompt", "ln"],
    "phi3": ["phi3_dora", "prefix"],
    "phi4": ["all_linear", "prompt"],
    "gemma": ["any_tokens", "embeddings", "ln"],
    "gemma2": ["all_linear", "embeddings_dora", "save_embeddings", "prompt", "ln"],
    "gemma3": ["any_dora", "head_norms", "prefix", "ln"],
    "gpt2": ["default_targets", "any_bias_all", "any_dora", "any_tokens", "any_randlora", "gpt2_save", "gpt2_positions", "ia3_defaults", "prefix", "prompt", "adaption_prompt", "ln", "trainable_tokens"],
    "gemma2_classes": ["all_linear", "prefix", "prompt"],
    "gpt2_classes": ["all_linear", "prefix", "prompt", "p_tuning"],
    "gpt_neox": ["default_targets", "any_bias_all", "neox_save_head", "ia3_neox", "prefix", "prompt"],
    "gpt_neox_sequential": ["any_dora"],
    "olmo2": ["any_dora", "head_norms", "prompt"],
    "stablelm": ["all_linear", "bias_lora_only", "prefix"],
    "smollm3": ["all_linear", "prefix", "prompt"],
    "opt": ["default_targets", "all_linear", "any_dora", "any_tokens", "prefix", "prompt"],
    "falcon": ["default_targets", "any_dora", "falcon_ia3", "falcon_ln", "prompt"],
    "falcon_grouped": ["all_linear", "any_bias_all", "prompt"],
    "falcon_two_norms": ["all_linear", "any_dora", "prompt"],
    "qwen3_classes": ["all_linear", "prefix", "prompt", "p_tuning"],
    "t5": ["default_targets", "all_linear", "any_randlora", "t5_poly", "t5_lora", "t5_regex", "t5_dora", "ia3_defaults", "t5_tables", "t5_save", "ln", "t5_oft"],
    "t5_prompts": ["all_linear", "t5_save_head", "prefix", "prefix_zero", "prefix_projected", "prompt", "t5_prompt_save", "p_tuning", "p_tuning_lstm"],
    "t5_v1_1": ["all_linear", "t5_tables", "t5_save_head", "ia3_defaults", "prefix", "prompt"],
    "t5_unscaled": ["all_linear", "t5_road", "prompt"],
    "mt5": ["default_targets", "all_linear", "ia3_defaults", "prompt"],
    "bart": ["default_targets", "all_linear", "any_dora", "bart_ia3", "bart_ln", "prefix", "prompt", "p_tuning"],
    "bart_scaled": ["all_linear", "prompt"],
    "mixtral": ["all_linear", "moe_parameters", "moe_gate_up", "moe_down_and_router", "moe_layer_weight", "moe_regex", "moe_old_names", "moe_save_router", "moe_dora", "moe_bias", "moe_ia3", "ia3_defaults", "moe_ln", "prefix", "prompt"],
    "mixtral_fused": ["all_linear", "moe_gate_up", "prompt"],
    "mixtral_classes": ["all_linear", "moe_parameters", "prefix"],
    "qwen3_moe": ["all_linear", "moe_parameters", "moe_down_and_router", "moe_regex", "moe_names", "moe_save_router", "moe_dora", "moe_ln", "prefix", "head_norms"],
    "qwen3_moe_sparse": ["all_linear", "moe_gate_up", "moe_down_and_router", "prompt"],
    "qwen2_moe": ["all_linear", "exclude", "moe_parameters", "moe_bias"],
    "olmoe": ["all_linear", "moe_parameters", "moe_dora"],
}


def make_model(name, folder):
    """Write a random model, and return it as it is read back (bf16 files as f32)."""
    special = dict(MODELS[name])
    family, file, rope = special.pop("family", "llama"), special.pop("file", ""), special.pop("rope", None)
    config_class, model_class, shape = FAMILIES[family]
    settings = {"vocab_size": VOCABULARY, **shape}
    if shape is not T5:
        settings["max_position_embeddings"] = 128
    if family.startswith("llama"):
        theta = special.pop("rope_theta", 1e4)
        settings |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        settings["rope_parameters"] = {"rope_theta": theta, **(rope or {"rope_type": "default"})}
    config = getattr(transformers, config_class)(**{**settings, **special})
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that adapters matter; norms away from 1 and biases away from 0.
            parameter += (0.1 if parameter.dim() == 1 else 0.15) * torch.randn_like(parameter)
    if file in ("bf16", "f16"):
        model.to(torch.bfloat16 if file == "bf16" else torch.float16)
    model.save_pretrained(folder, max_shard_size="60KB" if file == "sharded" else "1GB")
    if file == "fused":
        # As transformers has it in memory, with the experts of a layer in one tensor.
        save_file({key: tensor.contiguous().clone() for key, tensor in model.state_dict().items() if key != "lm_head.weight"}, folder / "model.safetensors", metadata={"format": "pt"})
    if file == "untied":
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = 0.3 * torch.randn_like(state["shared.weight"])
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.pop("scale_decoder_outputs", None)
        path.write_text(json.dumps(config | dict(tie_word_embeddings=False), indent=2))
    if file == "old":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        parameters = config.pop("rope_parameters")
        config["rope_theta"] = parameters.pop("rope_theta")
        config["rope_scaling"] = parameters
        config["torch_dtype"] = config.pop("dtype", "float32")
        path.write_text(json.dumps(config, indent=2))


def load_base(folder, **more):
    """The model in a folder, as the class that its config.json names."""
    architecture = json.loads((pathlib.Path(folder) / "config.json").read_text())["architectures"][0]
    loaded = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32, **more)
    return (loaded[0].eval(), *loaded[1:]) if isinstance(loaded, tuple) else loaded.eval()


def has_classes(model):
    return "Classification" in (model.config.architectures or [""])[0]


def has_tasks(model):
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.peft_type in (peft.PeftType.POLY, peft.PeftType.MULTITASK_PROMPT_TUNING)


def has_targets(model):
    return bool(model.config.is_encoder_decoder)


def task_type(model):
    return "SEQ_CLS" if has_classes(model) else "SEQ_2_SEQ_LM" if has_targets(model) else "CAUSAL_LM"


def make_rows(rng, classes=0, targets=False):
    """Rows of many lengths, each of a task."""
    return [row | dict(task_id=number * 7 % 5 % TASKS) for number, row in enumerate(make_plain_rows(rng, classes, targets))]


def make_plain_rows(rng, classes, targets):
    """Whole rows counted, prompts masked, holes in the middle. With `classes`, one of them a row; with `targets`, a sequence of
    its own a row."""
    rows = []
    if targets:
        for number in range(ROWS):
            ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 61))]
            labels = [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 40))] + [1]
            if number % 5 == 0:
                labels[rng.randrange(len(labels) - 1)] = -100
            rows.append(dict(input_ids=ids, labels=labels))
        return rows
    if classes:
        for _ in range(ROWS):
            ids = [rng.randrange(6, VOCABULARY) for _ in range(rng.randrange(1, 61))]
            rows.append(dict(input_ids=ids, label=rng.randrange(classes)))
        return rows
    for number in range(ROWS):
        ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(5, 61))]
        labels = list(ids)
        if number % 4:
            labels = [-100] * rng.randrange(1, len(ids) - 2) + labels
            labels = labels[: len(ids)] if number % 2 else labels[-len(ids):]
            kept = sum(label != -100 for label in labels)
            cut = len(ids) - kept
            labels = [-100] * cut + ids[cut:]
        if number % 5 == 0 and len(ids) > 8:
            hole = rng.randrange(2, len(ids) - 3)
            labels[hole] = labels[hole + 1] = -100
        rows.append(dict(input_ids=ids, labels=labels))
    return rows


def reads_padding(model):
    """Whether the class of a padded row would be read from its padding. transformers looks for the last token among ids, and
    gets embeddings alone where peft puts a prompt in front."""
    config = getattr(model, "active_peft_config", None)
    is_prompt = config is not None and config.is_prompt_learning and config.peft_type != peft.PeftType.PREFIX_TUNING
    return is_prompt and has_classes(model) and hasattr(model.base_model, "score")


def summed_loss(model, rows):
    """Summed negative log likelihood of the counted tokens of a padded batch, and their number."""
    if len(rows) > 1 and reads_padding(model):
        parts = [summed_loss(model, [row]) for row in rows]
        return sum(loss for loss, _ in parts), sum(count for _, count in parts)
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, fill: values + [fill] * (width - len(values))
    padding = model.config.pad_token_id or 0
    ids = torch.tensor([pad(row["input_ids"], padding) for row in rows])
    mask = torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows])
    tasks = dict(task_ids=torch.tensor([row["task_id"] for row in rows])) if has_tasks(model) else {}
    if has_classes(model):
        logits = model(input_ids=ids, attention_mask=mask, **tasks).logits
        targets = torch.tensor([row["label"] for row in rows])
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), len(rows)
    if has_targets(model):
        longest = max(len(row["labels"]) for row in rows)
        targets = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows])
        logits = model(input_ids=ids, attention_mask=mask, labels=targets, **tasks).logits
        return cross_entropy(logits, targets)
    labels = torch.tensor([pad(row["labels"], -100) for row in rows])
    # Prompts put the logits of their virtual tokens in front.
    logits = model(input_ids=ids, attention_mask=mask, **tasks).logits[:, -width:][:, :-1]
    return cross_entropy(logits, labels[:, 1:])


def cross_entropy(logits, targets):
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100, reduction="sum"
    )
    return loss, int((targets != -100).sum())


@torch.no_grad()
def mean_loss(model, rows):
    sums = [summed_loss(model, [row]) for row in rows]
    return sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)


@torch.no_grad()
def accuracy(model, rows):
    if not has_classes(model):
        return None
    tasks = lambda row: dict(task_ids=torch.tensor([row["task_id"]])) if has_tasks(model) else {}
    predicted = [int(model(input_ids=torch.tensor([row["input_ids"]]), **tasks(row)).logits.argmax()) for row in rows]
    return sum(p == row["label"] for p, row in zip(predicted, rows)) / len(rows)


def is_cpt(model):
    return model.active_peft_config.peft_type == peft.PeftType.CPT


def cpt_loss(model, rows):
    """The loss that peft computes for CPT, of the labels in the prompt too. Labels are of kind 4, but for a row's first token, which
    peft-cli never counts."""
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, fill: torch.tensor(values + [fill] * (width - len(values)))
    last = max(model.active_peft_config.cpt_tokens_type_mask)
    kinds = [[4 - last % 4 if number and label != -100 else 0 for number, label in enumerate(row["labels"])] for row in rows]
    return model(
        input_ids=torch.stack([pad(row["input_ids"], 0) for row in rows]),
        attention_mask=torch.stack([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        labels=torch.stack([pad(row["labels"], -100) for row in rows]),
        input_type_mask=torch.stack([pad(kind, 0) for kind in kinds]),
    ).loss


def moves_ranks(model):
    return model.active_peft_config.peft_type == peft.PeftType.ADALORA


def regulariser(model):
    """AdaLoRA's term, which peft adds to the loss that the model itself returns. It is trained with, and not logged."""
    if not moves_ranks(model):
        return 0.0
    token = torch.tensor([[5, 6]])
    labels = torch.tensor([0]) if has_classes(model) else token
    plain = model.base_model.model
    return model(input_ids=token, labels=labels).loss - plain(input_ids=token, labels=labels).loss


def train(model, rows):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    losses = []
    for step in range(STEPS):
        draw(model, step)
        start = step * BATCH_ROWS % len(rows)
        loss, count = summed_loss(model, rows[start : start + BATCH_ROWS])
        loss = loss / count
        optimizer.zero_grad()
        lowered = cpt_loss(model, rows[start : start + BATCH_ROWS]) if is_cpt(model) else loss + regulariser(model)
        lowered.backward()
        optimizer.step()
        if moves_ranks(model):
            model.base_model.update_and_allocate(step)
        losses.append(loss.item())
    undraw(model)
    return losses


def philox(counter, key):
    """Philox4x32-10: the random words that peft-cli draws."""
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second & 0xFFFFFFFF, first >> 32 ^ counter[3] ^ key[1], first & 0xFFFFFFFF]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return counter


def draw(model, step):
    """Lets Poly's routers draw in a training step what peft-cli draws there, by seed 0, step, site and the place of the row in its
    batch. The distribution is torch's own (RelaxedBernoulli of temperature 1)."""
    if getattr(model.active_peft_config, "peft_type", None) != peft.PeftType.POLY:
        return
    layer = ["input_layernorm", *(f"self_attn.{name}" for name in ATTENTION), "post_attention_layernorm", *(f"mlp.{name}" for name in MLP)]
    for name, module in model.named_modules():
        if not name.endswith(".poly_router.default"):
            continue
        parts = name.removesuffix(".poly_router.default").split(".")
        site = 1 + int(parts[-3]) * len(layer) + layer.index(".".join(parts[-2:]))

        def forward(task_ids, input_ids, router=module, site=site):
            logits = router.module_logits[task_ids]
            words = [word for block in range(-(-logits.numel() // 4)) for word in philox([block, 0, step, site], [0, 0])]
            uniform = torch.tensor([(word >> 8) / 2**24 for word in words[: logits.numel()]]).view(logits.shape)
            eps = torch.finfo(torch.float32).eps
            uniform = uniform.clamp(eps, 1 - eps)
            shares = torch.sigmoid(logits + torch.log(uniform) - torch.log1p(-uniform)).view(-1, router.n_splits, router.n_skills)
            return shares / (shares.sum(dim=-1, keepdim=True) + 1e-12)

        module.forward = forward


def undraw(model):
    """Back to what routers give without chance."""
    for name, module in model.named_modules():
        if name.endswith(".poly_router.default"):
            module.__dict__.pop("forward", None)


def config_of(variant, task_type):
    kind, settings = VARIANTS[variant] if isinstance(VARIANTS[variant], tuple) else ("LoraConfig", VARIANTS[variant])
    # peft adds the names of a class head to this list itself.
    settings = {key: list(value) if key == "modules_to_save" else value for key, value in settings.items()}
    return getattr(peft, kind)(task_type=task_type, **settings)


def soft_prompt(model, adapter):
    """The soft prompt that `adapter` holds, to be trained as it is. peft itself does not train one that it has loaded."""
    loaded = PeftModel.from_pretrained(model, adapter)
    loaded.prompt_encoder["default"].requires_grad_(True)
    if is_cpt(loaded):
        # What moves is beside the embedding, and read in training alone.
        loaded.prompt_encoder["default"].embedding.requires_grad_(False)
        loaded.prompt_encoder["default"].set_updated_tokens()
        loaded.active_peft_config.inference_mode = False
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".modules_to_save.default." in name)
    return loaded.eval()


def save_trained(trained, start, folder):
    if not trained.active_peft_config.is_prompt_learning:
        return trained.save_pretrained(folder)
    # peft would run the network that made the prompt, which its file does not hold.
    folder.mkdir()
    shutil.copy(start / "adapter_config.json", folder)
    state = peft.get_peft_model_state_dict(trained)
    state["prompt_embeddings"] = trained.prompt_encoder["default"].embedding.weight
    if is_cpt(trained):
        state["prompt_embeddings"] = trained.get_prompt_embedding_to_save("default")
    state = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def make_case(model_name, variant, out, rows, base_loss):
    base = out / model_name / "base"
    folder = out / model_name / variant
    model = load_base(base)
    model = get_peft_model(model, config_of(variant, task_type(model)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter")

    load = lambda **more: PeftModel.from_pretrained(load_base(base), folder / "adapter", **more).eval()
    loss = mean_loss(load(), rows)
    if abs(loss - mean_loss(model.eval(), rows)) > 1e-5:
        raise AssertionError("peft's own saved adapter differs from the one in memory")
    try:
        merged_loss = mean_loss(load().merge_and_unload(), rows)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        print(f"{model_name}/{variant}: peft does not merge it: {error}", file=sys.stderr)
        merged_loss = None
    if merged_loss is not None and abs(merged_loss - loss) > 1e-3:
        # Merging into a tied embedding changes the head as well; what the adapter computes is right.
        print(f"{model_name}/{variant}: peft's merge gives {merged_loss:.5f}, the adapter {loss:.5f}", file=sys.stderr)
        merged_loss = loss
    is_soft_prompt = model.active_peft_config.is_prompt_learning
    train_losses = trained_loss = None
    draws = model.active_peft_config.peft_type == peft.PeftType.POLY
    # peft trains no logits that are infinite; where our sites lie is known for Llama
    if not getattr(model.active_peft_config, "save_only_topk_weights", False) and not (draws and model_name != "llama"):
        trained = soft_prompt(load_base(base), folder / "adapter") if is_soft_prompt else load(is_trainable=True)
        train_losses = train(trained, rows)
        trained_loss = mean_loss(trained, rows)
        save_trained(trained, folder / "adapter", folder / "trained")
    expected = dict(
        base_loss=base_loss, loss=loss, merged_loss=merged_loss, accuracy=accuracy(load(), rows), tokens=sum(summed_count(row, has_targets(model)) for row in rows), rows=len(rows),
        train_losses=train_losses, trained_loss=trained_loss, batch_rows=BATCH_ROWS, learning_rate=LEARNING_RATE,
        draws=draws,
    )
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))


def summed_count(row, is_target):
    if "label" in row:
        return 1
    return sum(label != -100 for label in row["labels"][0 if is_target else 1 :])


def wanted(only, model, variant=None):
    return not only or model in only or (f"{model}/{variant}" in only if variant else any(o.startswith(model + "/") for o in only))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="comma-separated MODEL or MODEL/VARIANT")
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    torch.set_num_threads(1)  # tensors are tiny, and threads that wait for one another on a busy machine cost minutes
    made = 0
    for number, (model, variants) in enumerate(PLAN.items()):
        if not wanted(only, model):
            continue
        shutil.rmtree(options.out / model, ignore_errors=True)
        # Each model has its own seed, so that --only makes the same cases as the whole run.
        torch.manual_seed(options.seed * 1000 + number)
        rng = random.Random(options.seed * 1000 + number)
        make_model(model, options.out / model / "base")
        base = load_base(options.out / model / "base")
        rows = make_rows(rng, base.config.num_labels if has_classes(base) else 0, has_targets(base))
        (options.out / model / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        base_loss = mean_loss(base, rows)
        for variant in variants:
            if wanted(only, model, variant):
                torch.manual_seed(options.seed * 1000 + number)
                make_case(model, variant, options.out, rows, base_loss)
                made += 1
    print(f"{made} cases in {options.out}", file=sys.stderr)
    if not made:
        sys.exit(f"no case is called {options.only}")


if __name__ == "__main__":
    main()
