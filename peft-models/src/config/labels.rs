//! The classes of a `*ForSequenceClassification`: `id2label`, `label2id` and `num_labels` of a `config.json`
//! (transformers `configuration_utils.py`).

use serde_json::{Map, Value, json};

use super::ConfigError;
use super::keys::Keys;

/// More classes than this are a mistake in the file.
const MOST_CLASSES: usize = 1 << 20;

/// Whether the file describes a model with a head over classes.
pub(super) fn reads_classes(keys: &Keys<'_>) -> bool {
    let architectures = keys.value("architectures").and_then(Value::as_array);
    architectures
        .is_some_and(|a| a.iter().filter_map(Value::as_str).any(|name| name.ends_with("ForSequenceClassification")))
}

/// Names of the classes, by their number. Where the file has none, they are `LABEL_0`, `LABEL_1`, … as in transformers,
/// two of them if it does not say how many.
///
/// # Errors
/// Numbers with gaps, one class alone (which transformers takes for a regression), and a `problem_type` other than
/// `single_label_classification`.
pub(super) fn class_labels(keys: &Keys<'_>) -> Result<Vec<String>, ConfigError> {
    match keys.text("problem_type")? {
        None | Some("single_label_classification") => {}
        Some(other) => {
            return Err(keys.invalid(
                "problem_type",
                format!("`{other}` is not supported: a class head is trained with one label a row (single_label_classification)"),
            ));
        }
    }
    let labels = match keys.value("id2label") {
        Some(map) => named(keys, map)?,
        None => default_labels(keys, keys.count("num_labels")?.unwrap_or(2))?,
    };
    match labels.len() {
        0 => Err(keys.invalid("id2label", "names no class".into())),
        1 => Err(keys.invalid(
            "id2label",
            "names one class, which transformers takes for a regression; that is not supported: use two classes or more"
                .into(),
        )),
        _ => Ok(labels),
    }
}

fn default_labels(keys: &Keys<'_>, classes: usize) -> Result<Vec<String>, ConfigError> {
    if classes > MOST_CLASSES {
        return Err(keys.invalid("num_labels", format!("{classes} is more than {MOST_CLASSES}")));
    }
    Ok((0..classes).map(|i| format!("LABEL_{i}")).collect())
}

fn named(keys: &Keys<'_>, map: &Value) -> Result<Vec<String>, ConfigError> {
    let wrong = || keys.wrong("id2label", map, "an object of class number to name, from 0 without gaps");
    let map = map.as_object().ok_or_else(wrong)?;
    let mut labels = vec![None; map.len()];
    for (number, name) in map {
        let place = number.parse::<usize>().ok().and_then(|n| labels.get_mut(n)).ok_or_else(wrong)?;
        *place = Some(name.as_str().map_or_else(|| name.to_string(), str::to_owned));
    }
    labels.into_iter().collect::<Option<Vec<_>>>().ok_or_else(wrong)
}

/// Writes the classes in the place of whatever the map says of them.
pub(super) fn insert_labels(map: &mut Map<String, Value>, labels: &[String]) {
    let numbered = || labels.iter().enumerate();
    map.insert(
        "id2label".into(),
        numbered().map(|(i, name)| (i.to_string(), json!(name))).collect::<Map<_, _>>().into(),
    );
    map.insert("label2id".into(), numbered().map(|(i, name)| (name.clone(), json!(i))).collect::<Map<_, _>>().into());
    map.remove("num_labels");
}
