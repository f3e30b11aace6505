//! The head that a `config.json` names: `architectures`, `problem_type`, and `id2label`, `label2id` and `num_labels` (transformers
//! `configuration_utils.py`).

use peft_core::HeadKind;
use serde_json::{Map, Value, json};

use super::ConfigError;
use super::keys::Keys;

/// More classes than this are a mistake in the file.
const MOST_CLASSES: usize = 1 << 20;

/// The head of the class that `architectures` names, where it is not a language model's. Of heads that read a whole sequence it says
/// classification; `problem_type` and the number of outputs say which.
pub(crate) fn named_head(map: &Map<String, Value>) -> Option<HeadKind> {
    let names = map.get("architectures").and_then(Value::as_array)?;
    let of = |name: &str| HeadKind::ALL.into_iter().find(|kind| name.ends_with(kind.architecture()));
    names.iter().filter_map(Value::as_str).find_map(of)
}

/// The kind of a head, and the names of its outputs by their number. Where the file has none, they are `LABEL_0`, `LABEL_1`, … as in
/// transformers, two of them if it does not say how many. One output alone is a regression, if `problem_type` says nothing.
///
/// # Errors
/// Numbers with gaps, an unknown `problem_type`, and a number of outputs that the kind cannot have.
pub(super) fn head(keys: &Keys<'_>) -> Result<(HeadKind, Vec<String>), ConfigError> {
    let labels = match keys.value("id2label") {
        Some(map) => named(keys, map)?,
        None => default_labels(keys, keys.count("num_labels")?.unwrap_or(2))?,
    };
    let known = || HeadKind::ALL.into_iter().filter_map(HeadKind::problem_type);
    let kind = match (named_head(keys.map).unwrap_or_default(), keys.text("problem_type")?) {
        (kind, _) if kind.is_of_tokens() => kind,
        (_, None) if labels.len() == 1 => HeadKind::Regression,
        (_, None) => HeadKind::Classification,
        (_, Some(name)) => {
            let of = HeadKind::ALL.into_iter().find(|kind| kind.problem_type() == Some(name));
            of.ok_or_else(|| {
                let known: Vec<_> = known().collect();
                keys.invalid("problem_type", format!("`{name}` is not known (known: {})", known.join(", ")))
            })?
        }
    };
    check_outputs(kind, labels.len()).map_err(|why| keys.invalid("id2label", why))?;
    Ok((kind, labels))
}

/// Refuses a number of outputs that a head of this kind cannot have, in words.
pub(crate) fn check_outputs(kind: HeadKind, outputs: usize) -> Result<(), String> {
    match (kind, outputs) {
        (_, 0) => Err("names no class".into()),
        (HeadKind::Classification, 1) => Err(
            "names one class, and one is not enough for classification: two at least; one number a row is a regression"
                .into(),
        ),
        (HeadKind::QuestionAnswering, n) if n != 2 => {
            Err(format!("names {n} outputs, and question answering has two: the start and the end of an answer"))
        }
        _ => Ok(()),
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
pub(super) fn insert_labels(map: &mut Map<String, Value>, kind: HeadKind, labels: &[String]) {
    // Classification is what several outputs are for where nothing is said.
    if let Some(name) =
        kind.problem_type().filter(|_| kind != HeadKind::Classification || map.contains_key("problem_type"))
    {
        map.insert("problem_type".into(), json!(name));
    }
    let numbered = || labels.iter().enumerate();
    map.insert(
        "id2label".into(),
        numbered().map(|(i, name)| (i.to_string(), json!(name))).collect::<Map<_, _>>().into(),
    );
    map.insert("label2id".into(), numbered().map(|(i, name)| (name.clone(), json!(i))).collect::<Map<_, _>>().into());
    map.remove("num_labels");
}
