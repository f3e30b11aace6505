//! LoRA and (IA)³ in AdapterHub's files (`LoRAConfig` and `IA3Config` in `adapter_config.py`, `methods/lora.py`): what a layer has of
//! them stands under `loras`. LoRA of several matrices in one layer (GPT-2's `c_attn`) has factors of its own kind there, which are not
//! read.

use std::collections::{BTreeMap, BTreeSet};

use peft_core::{AdapterFolder, ConfigKeys, Error, Result};
use serde_json::{Map, Value, json};

use super::names::Family;

/// `peft_type` of LoRA and of (IA)³.
pub(super) const LORA: &str = "LORA";
pub(super) const IA3: &str = "IA3";
/// The keys of a config that say of layers outside of attention whether they are adapted, as [`Family::lora`] names these layers.
const OTHER_LAYERS: [&str; 2] = ["intermediate_lora", "output_lora"];

fn known() -> Map<String, Value> {
    let keys = json!({
        "alpha": 8, "attn_matrices": ["q", "v"], "composition_mode": "add", "dropout": 0.0, "dtype": null, "init_weights": "lora",
        "init_weights_seed": null, "intermediate_lora": false, "leave_out": [], "output_lora": false, "r": 8, "selfattn_lora": true,
        "use_dora": false, "use_gating": false, "vera_b": null, "vera_d": null
    });
    keys.as_object().cloned().unwrap_or_default()
}

/// Our settings for AdapterHub's, without the layers: those are the ones that the file has tensors for.
pub(super) fn ours(own: &Map<String, Value>) -> Result<Map<String, Value>> {
    let keys = ConfigKeys(own);
    keys.refuse_unknown("lora of AdapterHub's", &known())?;
    let refused = |key: &str, why: &str| Err(Error::config(key, format!("{why} is not read here")));
    if keys.flag("use_dora", false)? {
        return refused("use_dora", "DoRA, whose norm is another in AdapterHub's package,");
    }
    if let Some(key) = ["vera_d", "vera_b"].into_iter().find(|key| keys.get(key).is_some()) {
        return refused(key, "VeRA");
    }
    let (alpha, gated) = (keys.number("alpha", 8.0)?, keys.flag("use_gating", false)?);
    let settings = match keys.text("composition_mode")?.unwrap_or("add") {
        "add" => json!({
            "peft_type": LORA, "r": keys.count("r", 1 << 16)?.unwrap_or(8), "lora_alpha": own.get("alpha").cloned().unwrap_or(8.into()),
            "lora_dropout": keys.number("dropout", 0.0)?, "use_gating": gated
        }),
        "scale" if gated => return refused("use_gating", "(IA)³ with a gate"),
        "scale" if alpha != 1.0 => return refused("alpha", "(IA)³ with another scale than 1"),
        "scale" => json!({"peft_type": IA3, "feedforward_modules": []}),
        other => return Err(Error::config("composition_mode", format!("`{other}` is neither add nor scale"))),
    };
    let mut settings = settings.as_object().cloned().unwrap_or_default();
    settings.insert("inference_mode".into(), true.into());
    if !gated {
        settings.remove("use_gating");
    }
    Ok(settings)
}

/// Names of a layer's tensors, ours and AdapterHub's.
const TENSORS: [(&str, &str); 5] = [
    ("lora_A.weight", "lora_A"),
    ("lora_B.weight", "lora_B"),
    ("ia3_l", "lora_B"),
    ("gate.weight", "gate.weight"),
    ("gate.bias", "gate.bias"),
];

/// The layer and the name of a tensor for AdapterHub's name of it in the adapter `name`; (IA)³ with `scales`. `None` for what is no
/// tensor of these methods, or of a layer that is adapted otherwise there.
pub(super) fn our_tensor(family: &Family, key: &str, name: &str, scales: bool) -> Option<(String, &'static str)> {
    let (layer, theirs) = key.split_once(&format!(".loras.{name}."))?;
    let layer = family.whole(layer);
    family.lora_layer(&layer)?;
    let (ours, _) = TENSORS
        .into_iter()
        .find(|(ours, other)| *other == theirs && (*other != "lora_B" || (*ours == "ia3_l") == scales))?;
    Some((layer, ours))
}

/// AdapterHub's name in the adapter `name` for our `key`, where the layer in it is one of `layers`.
pub(super) fn their_key(layers: &BTreeSet<String>, key: &str, name: &str) -> Option<String> {
    TENSORS.into_iter().find_map(|(ours, theirs)| {
        let layer = key.strip_suffix(ours)?.strip_suffix('.')?;
        layers.contains(layer).then(|| format!("{layer}.loras.{name}.{theirs}"))
    })
}

/// The layers with LoRA or (IA)³ among our keys.
pub(super) fn layers<'a>(keys: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let layer = |key: &'a str| [".lora_A.weight", ".ia3_l"].into_iter().find_map(|end| key.strip_suffix(end));
    keys.filter_map(layer).map(str::to_owned).collect()
}

/// AdapterHub's settings for ours, of an adapter of these layers.
pub(super) fn theirs(
    config: &Map<String, Value>,
    layers: &BTreeSet<String>,
    family: &Family,
) -> Result<Map<String, Value>> {
    let keys = ConfigKeys(config);
    let is_ia3 = keys.text("peft_type")? == Some(IA3);
    for key in ["use_dora", "use_rslora", "lora_bias"] {
        if keys.flag(key, false)? {
            return Err(Error::config(key, "is none of what AdapterHub's files of a LoRA can say"));
        }
    }
    let is_nothing = |value: &Value| match value {
        Value::Object(table) => table.is_empty(),
        Value::String(text) => text == "none",
        _ => false,
    };
    for key in ["rank_pattern", "alpha_pattern", "bias", "trainable_token_indices"] {
        if keys.get(key).is_some_and(|value| !is_nothing(value)) {
            return Err(Error::config(key, "is none of what AdapterHub's files of a LoRA can say"));
        }
    }
    let mut of_block: BTreeMap<usize, BTreeSet<&'static str>> = BTreeMap::new();
    for layer in layers {
        let Some((kind, block)) = family.lora_layer(layer) else {
            let known: Vec<_> = family.lora.iter().map(|(_, end)| *end).collect();
            let message =
                format!("`{layer}` has no LoRA in AdapterHub's package, which has it on {}", known.join(", "));
            return Err(Error::config("target_modules", message));
        };
        let Some(block) = block else {
            let message = "LoRA of an encoder–decoder is read from AdapterHub's files, and not written";
            return Err(Error::config("target_modules", message));
        };
        of_block.entry(block).or_default().insert(kind);
    }
    let kinds: BTreeSet<&str> = of_block.values().flatten().copied().collect();
    if let Some((block, some)) = of_block.iter().find(|(_, some)| **some != kinds) {
        let message = format!(
            "AdapterHub's files name the same layers for all blocks, and block {block} has {some:?} where others have {kinds:?} too"
        );
        return Err(Error::config("target_modules", message));
    }
    let last = of_block.keys().last().copied().unwrap_or(0);
    let leave_out: Vec<usize> = (0..last).filter(|block| !of_block.contains_key(block)).collect();
    let attention: Vec<&str> = kinds.iter().copied().filter(|kind| !OTHER_LAYERS.contains(kind)).collect();
    let mut own = known();
    let mut set = |key: &str, value: Value| drop(own.insert(key.to_owned(), value));
    set("architecture", "lora".into());
    set("selfattn_lora", (!attention.is_empty()).into());
    set("attn_matrices", attention.into());
    for kind in OTHER_LAYERS {
        set(kind, kinds.contains(kind).into());
    }
    set("leave_out", leave_out.into());
    if is_ia3 {
        set("composition_mode", "scale".into());
        set("init_weights", "ia3".into());
        set("r", 1.into());
        set("alpha", 1.into());
    } else {
        set("r", config.get("r").cloned().unwrap_or(8.into()));
        set("alpha", config.get("lora_alpha").cloned().unwrap_or(8.into()));
        set("dropout", config.get("lora_dropout").cloned().unwrap_or(json!(0.0)));
        set("use_gating", keys.flag("use_gating", false)?.into());
    }
    Ok(own)
}

/// Refuses factors on a layer's input, which (IA)³ has here and in the paper and not in AdapterHub's package.
pub(super) fn check_written(adapter: &AdapterFolder, key: &str) -> Result<()> {
    match adapter.shape(key) {
        Some([_, 1]) | None => Ok(()),
        Some(_) if !key.ends_with(".ia3_l") => Ok(()),
        Some(_) => {
            let message =
                format!("`{key}` scales what a layer reads; in AdapterHub's package it is what a layer makes");
            Err(Error::config("feedforward_modules", message))
        }
    }
}
