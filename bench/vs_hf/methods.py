"""The methods that are compared. Another one is another line."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """`peft` is PEFT's config class with its keys, `peft_type` what it is called in our catalogue (`peft-cli methods`). Both sides
    start from the one adapter that PEFT makes and saves, so our `[method]` is what its adapter_config.json says."""

    peft: tuple[str, dict]
    peft_type: str


LORA = dict(r=16, lora_alpha=32, target_modules="all-linear")
METHODS = {
    "lora": Method(("LoraConfig", LORA), "LORA"),
    "dora": Method(("LoraConfig", {**LORA, "use_dora": True}), "LORA"),
    "ia3": Method(("IA3Config", {}), "IA3"),
    "prefix": Method(("PrefixTuningConfig", dict(num_virtual_tokens=20)), "PREFIX_TUNING"),
}
