//! Several methods as one adapter: Mix-And-Match (He et al. 2021, arXiv:2110.04366), UniPELT (Mao et al. 2022, arXiv:2110.07577),
//! and any others that do not change the same site.

use peft_core::config_keys::peft_defaults;
use peft_core::{Adapter, AdapterFolder, BaseModel, ConfigKeys, Error, Result, UNION, UNION_PARTS as PARTS};
use serde_json::{Map, Value, json};

use super::{Config, METHODS, Made, MethodInfo};

const PRESET: &str = "preset";

/// The methods of a preset.
fn preset(name: &Value) -> Result<Value> {
    match name.as_str() {
        // AdapterHub's `MAMConfig` and `UniPELTConfig`, whose defaults are the papers'.
        Some("mam") => Ok(json!([
            {"type": "prefix", "num_virtual_tokens": 30, "prefix_projection": true, "encoder_hidden_size": 800,
                "moves_positions": false},
            {"type": "bottleneck", "preset": "par_bn"}
        ])),
        Some("unipelt") => Ok(json!([
            {"type": "prefix", "num_virtual_tokens": 10, "prefix_projection": true, "encoder_hidden_size": 512,
                "moves_positions": false, "use_gating": true},
            {"type": "bottleneck", "preset": "seq_bn", "use_gating": true},
            {"type": "lora", "r": 8, "lora_alpha": 2, "use_gating": true}
        ])),
        _ => Err(Error::config(PRESET, format!("{name} is not one of mam, unipelt"))),
    }
}

fn list(value: Option<&Value>) -> Result<Vec<&Map<String, Value>>> {
    let tables: Option<Vec<_>> = value.and_then(Value::as_array).and_then(|l| l.iter().map(Value::as_object).collect());
    tables.filter(|tables| !tables.is_empty()).ok_or_else(|| {
        let message = "is a list of tables of methods: methods = [{type = \"prefix\", num_virtual_tokens = 8}, {type = \"lora\"}]";
        Error::config(PARTS, message)
    })
}

fn refuse(info: &MethodInfo) -> Result<()> {
    if ["union", "full"].contains(&info.name) {
        return Err(Error::config(PARTS, format!("`{}` cannot be one of several methods", info.name)));
    }
    Ok(())
}

fn in_part(i: usize, e: &Error) -> Error {
    Error::config(PARTS, format!("of number {}: {e}", i + 1))
}

/// The tables of the parts in a recipe's `[method]` table.
pub(super) fn tables(keys: &Map<String, Value>) -> Result<Vec<Map<String, Value>>> {
    let given = match (keys.get(PRESET), keys.get(PARTS)) {
        (Some(name), None) => preset(name)?,
        (None, Some(parts)) => parts.clone(),
        (Some(_), Some(_)) => return Err(Error::config(PRESET, "is a list of `methods` itself: give one of the two")),
        (None, None) => Value::Null,
    };
    Ok(list(Some(&given))?.into_iter().cloned().collect())
}

/// The parts of a recipe's `[method]` table.
pub(super) fn of_recipe(keys: &Map<String, Value>) -> Result<Vec<Config>> {
    let known = Map::from_iter([PARTS, PRESET].map(|key| (key.to_owned(), Value::Null)));
    ConfigKeys(keys).refuse_unknown("union", &known)?;
    let part = |table: &Map<String, Value>| {
        let (config, info) = Config::of_recipe_part(table)?;
        refuse(info).map(|()| config)
    };
    tables(keys)?.iter().enumerate().map(|(i, table)| part(table).map_err(|e| in_part(i, &e))).collect()
}

/// The parts of an `adapter_config.json`.
pub(super) fn of_file(keys: &Map<String, Value>) -> Result<Vec<Config>> {
    let parts = list(keys.get(PARTS))?.into_iter().enumerate().map(|(i, config)| {
        let peft_type = config.get("peft_type").and_then(Value::as_str).unwrap_or("");
        let Some(info) = METHODS.iter().find(|m| m.peft_type == peft_type) else {
            return Err(Error::config(PARTS, format!("of number {}: peft_type `{peft_type}` is not known", i + 1)));
        };
        refuse(info)?;
        Config::of_file_part(info, config).map_err(|e| in_part(i, &e))
    });
    parts.collect()
}

/// A fresh adapter.
pub(super) fn create(parts: &[Config], base: &dyn BaseModel, seed: u64) -> Result<Made> {
    // Methods that draw for the same site by the same seed would start alike.
    let made = |(i, part): (usize, &Config)| {
        part.create(base, seed.wrapping_add((i as u64) << 32)).map_err(|e| in_part(i, &e))
    };
    whole(parts.iter().enumerate().map(made).collect::<Result<_>>()?, base)
}

/// An adapter for the values in `files`.
pub(super) fn open(parts: &[Config], base: &dyn BaseModel, files: &AdapterFolder) -> Result<Made> {
    whole(parts.iter().map(|part| part.open(base, files)).collect::<Result<_>>()?, base)
}

fn whole(made: Vec<Made>, base: &dyn BaseModel) -> Result<Made> {
    let parts: Vec<Adapter> = made.into_iter().map(|(adapter, _)| adapter).collect();
    let mut config = peft_defaults(UNION, json!({}));
    config.insert("task_type".into(), base.task().peft_name().into());
    // Where rows are cut, and by other programs, it is looked for here.
    if let Some(tokens) = parts.iter().find_map(Adapter::virtual_tokens) {
        config.insert("num_virtual_tokens".into(), tokens.count.into());
    }
    Ok((Adapter::union(parts, config, base.sites())?, None))
}
