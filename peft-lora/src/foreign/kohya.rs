//! kohya's sd-scripts (`networks/lora.py`) and LyCORIS: a module's path with `_` for `.` behind a prefix, `lora_down`, `lora_up`, and
//! `alpha` beside each. The base's paths say which dots there were.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use peft_core::suggest::did_you_mean;
use peft_core::{AdapterFolder, BaseModel, Error, Result, SafetensorsFile, SiteKind};
use serde_json::Map;

use super::{Layers, needs_base, only_weights};

/// In front of a path, the longest first.
const PREFIXES: [&str; 8] =
    ["lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lycoris_", "lora_lm_", "lora_"];
const DOWN: &str = "lora_down.weight";
const UP: &str = "lora_up.weight";
const ALPHA: &str = "alpha";
/// What other methods of LyCORIS and of sd-scripts store.
const OTHERS: [(&str, &str); 6] = [
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("dora_scale", "LyCORIS's DoRA"),
    ("lora_mid", "a LoRA of convolutions"),
    ("oft_", "OFT"),
    ("diff", "whole weights"),
];

/// Whether a tensor is one of kohya's.
pub(super) fn is_own(name: &str) -> bool {
    let of_prefix = PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    of_prefix
        && name
            .split_once('.')
            .is_some_and(|(_, part)| part == DOWN || part == UP || OTHERS.iter().any(|(p, _)| part.starts_with(p)))
}

pub(super) fn open(dir: &Path, base: Option<&dyn BaseModel>) -> Result<AdapterFolder> {
    let Some(base) = base else {
        return Err(needs_base(dir, "is kohya's, whose names have lost the dots of the modules' paths"));
    };
    let Some(path) = only_weights(dir)? else {
        return Err(Error::file(dir, "does not hold one file of weights"));
    };
    let file = Arc::new(SafetensorsFile::open(&path)?);
    let paths = flattened(base);
    let mut layers = Layers::new(&file);
    for name in file.names() {
        let Some((module, part)) = name.split_once('.') else {
            return Err(layers.stranger(name, "is no factor of kohya's", ""));
        };
        if let Some((_, method)) = OTHERS.iter().find(|(start, _)| part.starts_with(start)) {
            let message = format!("is {method}, of which kohya's files are not read; LoRA's are");
            return Err(layers.stranger(name, &message, ""));
        }
        let mut forms = PREFIXES.iter().filter_map(|prefix| module.strip_prefix(prefix));
        let flat = forms.clone().find(|flat| paths.contains_key(*flat)).or_else(|| forms.next()).unwrap_or(module);
        let path = match paths.get(flat) {
            Some(Some(path)) => path.clone(),
            Some(None) => return Err(layers.stranger(name, "could be one of several modules of the base model", "")),
            None => {
                let near = did_you_mean(flat, paths.keys().map(String::as_str));
                return Err(layers.stranger(name, "is of no linear layer of the base model", &near));
            }
        };
        match part {
            DOWN => {
                layers.put(layers.layers.get(&path).and_then(|f| f.a.as_ref()), name)?;
                let a = layers.tensor(name, 2)?;
                layers.of(&path).a = Some(a);
            }
            UP => {
                layers.put(layers.layers.get(&path).and_then(|f| f.b.as_ref()), name)?;
                let b = layers.tensor(name, 2)?;
                layers.of(&path).b = Some(b);
            }
            ALPHA => {
                let value = file.tensor(name, &Device::Cpu)?;
                if value.elem_count() != 1 {
                    return Err(layers.stranger(
                        name,
                        &format!("has the shape {:?}, not one number", value.dims()),
                        "",
                    ));
                }
                let value = value.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                layers.of(&path).alpha = value.first().copied();
            }
            other => {
                let near = did_you_mean(other, [DOWN, UP, ALPHA]);
                return Err(layers.stranger(name, "is no factor of kohya's", &near));
            }
        }
    }
    // Without an alpha of its own, sd-scripts takes the rank.
    layers.folder(dir, file.clone(), |r| r as f64, Map::new())
}

/// Paths of the base's linear layers by what is left of them without dots, whole and without a leading `model.`; `None` for what
/// several share.
fn flattened(base: &dyn BaseModel) -> BTreeMap<String, Option<String>> {
    let mut paths: BTreeMap<String, Option<String>> = BTreeMap::new();
    for site in base.sites().iter().filter(|site| matches!(site.kind, SiteKind::Linear { .. })) {
        let whole = site.path.as_str();
        for form in [Some(whole), whole.strip_prefix("model.")].into_iter().flatten() {
            let known = paths.entry(form.replace('.', "_")).or_insert_with(|| Some(whole.to_owned()));
            if known.as_deref() != Some(whole) {
                *known = None;
            }
        }
    }
    paths
}
