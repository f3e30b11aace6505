"""The lines of the table: every method of the catalogue with its settings. Another one is another line.

Ranks and places are those in which papers and PEFT's examples use a method, weights everywhere where it changes weights. The learning
rate is the one that its paper or PEFT's example trains with, rounded to a digit. Three were chosen among two or three on this task, because at
theirs nothing was learned: RandLoRA's, P-tuning's, and DeLoRA's strength (`delora_lambda`).
"""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Line:
    """`method` is a recipe's `[method]` table, `rates` the learning rates on a language model and on an encoder. With `peer`, a PEFT
    config class with its keys, PEFT trains beside us from the same start on the same batches, and `method` is what PEFT saves."""

    rates: tuple[float, float]
    method: dict = dataclasses.field(default_factory=dict)
    peer: tuple[str, dict] | None = None
    # Keys that an encoder needs beside them.
    on_encoder: dict = dataclasses.field(default_factory=dict)
    # Names of models on which it has nothing to act on, and why.
    not_on: dict = dataclasses.field(default_factory=dict)


ALL = dict(target_modules="all-linear")
LORA = dict(r=16, lora_alpha=32, **ALL)


def linear(type_, *rates, **keys):
    """A method that changes the weights of all linear layers."""
    return Line(rates, dict(type=type_, **ALL, **keys))


LINES = {
    "lora": Line((5e-4, 1e-3), peer=("LoraConfig", LORA)),
    "lora, rsLoRA": Line((5e-4, 1e-3), dict(type="lora", use_rslora=True, **LORA)),
    "lora, DoRA": Line((5e-4, 1e-3), peer=("LoraConfig", {**LORA, "use_dora": True})),
    "lora, PiSSA": Line((2e-4, 5e-4), dict(type="lora", init_lora_weights="pissa", **LORA)),
    "adalora": linear("adalora", 1e-3, 2e-3, init_r=12, target_r=8, deltaT=2),
    "vera": linear("vera", 5e-3, 1e-2, r=256),
    "randlora": linear("randlora", 2e-4, 3e-4, r=32),
    "vblora": linear("vblora", 5e-3, 1e-2, r=4, num_vectors=256, vector_length=64),
    "delora": linear("delora", 1e-3, 1e-3, r=8, delora_lambda=1),
    "gralora": linear("gralora", 5e-4, 1e-3, r=32),
    "loha": linear("loha", 1e-3, 2e-3, r=8, alpha=8),
    "lokr": linear("lokr", 1e-3, 2e-3, r=8, alpha=8),
    "oft": linear("oft", 5e-4, 1e-3, oft_block_size=32),
    "boft": linear("boft", 1e-3, 2e-3, boft_block_size=4),
    "hra": linear("hra", 1e-3, 2e-3, r=8),
    "road": linear("road", 3e-3, 5e-3, group_size=64),
    "miss": linear("miss", 3e-4, 5e-4, r=64),
    "c3a": linear("c3a", 3e-2, 5e-2, block_size=64),
    "fourierft": linear("fourierft", 1e-2, 2e-2, n_frequency=1000, scaling=150.0),
    "shira": linear("shira", 5e-4, 1e-3, r=32),
    "ia3": Line((5e-3, 1e-2), peer=("IA3Config", {})),
    "bottleneck, seq_bn": Line((5e-4, 1e-3), dict(type="bottleneck", preset="seq_bn")),
    "bottleneck, double_seq_bn": Line((5e-4, 1e-3), dict(type="bottleneck", preset="double_seq_bn")),
    "bottleneck, scaled_par_bn": Line((5e-4, 1e-3), dict(type="bottleneck", preset="scaled_par_bn", reduction_factor=16)),
    "bottleneck, compacter++": Line((2e-3, 3e-3), dict(type="bottleneck", preset="compacter++", reduction_factor=16), on_encoder=dict(reduction_factor=32)),
    "llm_adapter, series": Line((5e-4, 1e-3), dict(type="llm_adapter"), not_on={"minilm": "has no default places in BERT"}),
    "llm_adapter, parallel": Line(
        (5e-4, 1e-3), dict(type="llm_adapter", use_parallel_adapter=True), not_on={"minilm": "has no default places in BERT"}
    ),
    "reft, loreft": Line((2e-3, 2e-3), dict(type="reft", r=4, prefix_positions=5, suffix_positions=5)),
    "reft, direft": Line((2e-3, 2e-3), dict(type="reft", preset="direft", r=4, prefix_positions=5, suffix_positions=5)),
    "prefix": Line((1e-2, 1e-2), peer=("PrefixTuningConfig", dict(num_virtual_tokens=20))),
    "prompt": Line((3e-2, 3e-2), dict(type="prompt", num_virtual_tokens=20)),
    "p_tuning": Line((3e-2, 3e-2), dict(type="p_tuning", num_virtual_tokens=20, encoder_hidden_size=128)),
    "adaption_prompt": Line(
        (9e-3, 9e-3), dict(type="adaption_prompt", adapter_len=10, adapter_layers=28), not_on={"minilm": "is for llama, mistral and gpt2"}
    ),
    "ln": Line((3e-3, 5e-3), dict(type="ln"), on_encoder=dict(target_modules=["LayerNorm"])),
    "bitfit": Line((3e-3, 5e-3), dict(type="bitfit"), not_on={"smollm2": "has no biases"}),
    "bitfit, added biases": Line((3e-3, 5e-3), dict(type="bitfit", add_biases=True), not_on={"minilm": "has biases"}),
    "union, mam": Line((1e-3, 2e-3), dict(type="union", preset="mam")),
    "union, unipelt": Line((1e-3, 2e-3), dict(type="union", preset="unipelt")),
    "last_layers": Line((1e-4, 5e-4), dict(type="last_layers", num_layers=2)),
    "full": Line((2e-5, 5e-5), dict(type="full")),
}

# Methods of the catalogue without a line.
LEFT_OUT = {
    "trainable_tokens": "it is for new tokens, and this task has none",
    "poly": "it is for several tasks",
    "multitask_prompt": "it is for several tasks",
    "cpt": "it is for a few examples in the prompt",
    "fusion": "it is made of adapters of other tasks",
    "composition": "it is made of other adapters",
    "xlora": "it is made of other adapters",
}
