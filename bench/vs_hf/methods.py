"""The methods that are compared. Another one is another line."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """`config` is the peer's config class with its keys, `peft_type` what it is called in our catalogue (`peft-cli methods`). Both
    sides start from the one adapter that the peer makes and saves, so our `[method]` is what its adapter_config.json says.
    The peer is PEFT, or with `adapterhub` AdapterHub's `adapters`, for what PEFT does not have."""

    config: tuple[str, dict]
    peft_type: str
    adapterhub: bool = False


LORA = dict(r=16, lora_alpha=32, target_modules="all-linear")
METHODS = {
    "lora": Method(("LoraConfig", LORA), "LORA"),
    "dora": Method(("LoraConfig", {**LORA, "use_dora": True}), "LORA"),
    "ia3": Method(("IA3Config", {}), "IA3"),
    "prefix": Method(("PrefixTuningConfig", dict(num_virtual_tokens=20)), "PREFIX_TUNING"),
    "bottleneck": Method(("SeqBnConfig", dict(reduction_factor=16)), "BOTTLENECK", adapterhub=True),
}
