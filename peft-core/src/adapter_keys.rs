//! Tensor names in adapter files: old spellings, and what to say when names do not fit a model.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::suggest::nearest;

/// What PEFT puts in front of a module's path in adapter files.
pub const KEY_PREFIX: &str = "base_model.model.";
/// What it puts there for a soft prompt, which is no wrapper around the layers of the model.
pub const SOFT_PROMPT_KEY_PREFIX: &str = "base_model.";
/// How many names of a kind a message lists.
const LISTED: usize = 10;

/// The name under which today's PEFT saves what an older version saved as `key`; `None` for a tensor that is only a
/// copy of the base (`original_module`).
///
/// Old files carry the adapter's name (`lora_A.default.weight`), the wrapper of `modules_to_save`
/// (`lm_head.modules_to_save.default.weight`), `_orig_mod` of compiled models, and DoRA's magnitude with `.weight`.
pub(crate) fn canonical(key: &str) -> Option<String> {
    let mut out: Vec<&str> = Vec::new();
    let mut segments = key.split('.').peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "original_module" => return None,
            "_orig_mod" => {}
            "modules_to_save" if segments.peek().is_some() => {
                segments.next();
            }
            "default" if out.last().is_some_and(|last| is_adapter_part(last)) => {}
            "weight" if out.last() == Some(&"lora_magnitude_vector") => {}
            other => out.push(other),
        }
    }
    Some(out.join("."))
}

/// Names of adapter parameters, after which old files put the adapter's name.
fn is_adapter_part(segment: &str) -> bool {
    const PREFIXES: [&str; 16] = [
        "lora_",
        "ia3_",
        "hada_",
        "lokr_",
        "oft_",
        "boft_",
        "vera_",
        "randlora_",
        "ln_tuning",
        "trainable_tokens_",
        "hra_",
        "miss_",
        "c3a_",
        "fourierft_",
        "shira_",
        "vblora_",
    ];
    PREFIXES.iter().any(|prefix| segment.starts_with(prefix))
}

/// How an adapter file's tensors differ from what the model and the config ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyMismatch {
    /// Asked for and not in the file.
    pub missing: Vec<String>,
    /// In the file and not asked for.
    pub unexpected: Vec<String>,
    /// In both, with another shape: name, shape in the file, shape asked for.
    pub wrong_shape: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl KeyMismatch {
    pub(crate) fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.wrong_shape.is_empty()
    }

    /// The known cause behind the differences, if one explains most of them.
    fn hint(&self) -> Option<String> {
        let all =
            |test: &dyn Fn(&str) -> bool| !self.unexpected.is_empty() && self.unexpected.iter().all(|key| test(key));
        if all(&|key| key.ends_with(".lora_a") || key.ends_with(".lora_b")) {
            return Some("it is an MLX adapter; convert it to PEFT's format first".to_owned());
        }
        if all(&|key| key.contains("lora_down.") || key.contains("lora_up.") || key.ends_with(".alpha")) {
            return Some("it is a kohya-style adapter; convert it to PEFT's format first".to_owned());
        }
        let mut by_rest: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for key in &self.missing {
            let (prefix, rest) = split_prefix(key);
            by_rest.entry(rest).or_default().push(prefix);
        }
        let mut pairs: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for key in &self.unexpected {
            let (prefix, rest) = split_prefix(key);
            for wanted in by_rest.get(rest).into_iter().flatten() {
                *pairs.entry((prefix, wanted)).or_default() += 1;
            }
        }
        let ((found, wanted), count) = pairs.into_iter().max_by_key(|(_, count)| *count)?;
        if 2 * count < self.unexpected.len() {
            return None;
        }
        let shown = |prefix: &str| if prefix.is_empty() { "nothing".to_owned() } else { format!("`{prefix}`") };
        let why = match (found.contains("language_model."), wanted.contains("language_model.")) {
            (true, false) => "; it was made for the multimodal version of the model",
            (false, true) => "; it was made for the text-only version of the model",
            _ if !found.starts_with(KEY_PREFIX) => "; it was not saved by PEFT's save_pretrained",
            _ if wanted.len() > found.len() => "; it was made for the bare model without a head",
            _ => "; it was made for the model with a head",
        };
        Some(format!("{count} names would fit if they began with {} instead of {}{why}", shown(wanted), shown(found)))
    }
}

/// Splits a name into the wrapper segments in front and the rest.
fn split_prefix(key: &str) -> (&str, &str) {
    let mut rest = key;
    while let Some((segment, after)) = rest.split_once('.') {
        if !matches!(segment, "base_model" | "model" | "language_model" | "text_model" | "transformer" | "module") {
            break;
        }
        rest = after;
    }
    key.split_at(key.len() - rest.len())
}

impl fmt::Display for KeyMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> = [
            (self.missing.len(), "missing"),
            (self.unexpected.len(), "unexpected"),
            (self.wrong_shape.len(), "of another shape"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
        write!(f, "does not fit this model and config ({})", counts.join(", "))?;
        if let Some(hint) = self.hint() {
            write!(f, "; {hint}")?;
        }
        let near = |key: &str, others: &[String]| -> String {
            let (_, rest) = split_prefix(key);
            let same = others.iter().find(|other| split_prefix(other).1 == rest);
            let near = same.cloned().or_else(|| nearest(key, others).into_iter().next());
            near.map_or(String::new(), |near| format!(" (near: {near})"))
        };
        for key in self.missing.iter().take(LISTED) {
            write!(f, "\n  missing: {key}{}", near(key, &self.unexpected))?;
        }
        more(f, self.missing.len(), "missing")?;
        for key in self.unexpected.iter().take(LISTED) {
            write!(f, "\n  unexpected: {key}{}", near(key, &self.missing))?;
        }
        more(f, self.unexpected.len(), "unexpected")?;
        for (key, found, wanted) in self.wrong_shape.iter().take(LISTED) {
            write!(f, "\n  shape: {key} is {found:?}, expected {wanted:?}")?;
        }
        more(f, self.wrong_shape.len(), "of another shape")
    }
}

fn more(f: &mut fmt::Formatter<'_>, count: usize, what: &str) -> fmt::Result {
    if count > LISTED { write!(f, "\n  and {} more {what}", count - LISTED) } else { Ok(()) }
}

/// Compares the file's tensors with the ones asked for.
pub(crate) fn compare(
    found: &BTreeMap<&str, &[usize]>,
    expected: &[super::adapter_file::ExpectedTensor],
) -> KeyMismatch {
    let mut mismatch = KeyMismatch::default();
    let mut asked = BTreeSet::new();
    for tensor in expected {
        asked.insert(tensor.key.as_str());
        match found.get(tensor.key.as_str()) {
            Some(shape) if *shape == tensor.shape => {}
            Some(shape) => mismatch.wrong_shape.push((tensor.key.clone(), shape.to_vec(), tensor.shape.clone())),
            None if tensor.optional => {}
            None => mismatch.missing.push(tensor.key.clone()),
        }
    }
    mismatch.unexpected = found.keys().filter(|key| !asked.contains(**key)).map(|key| (*key).to_owned()).collect();
    mismatch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_names_are_translated() {
        for (old, new) in [
            ("base_model.model.a.q_proj.lora_A.default.weight", "base_model.model.a.q_proj.lora_A.weight"),
            ("base_model.model.a.lora_B.default.bias", "base_model.model.a.lora_B.bias"),
            ("base_model.model.wte.lora_embedding_A.default", "base_model.model.wte.lora_embedding_A"),
            ("base_model.model.a.ia3_l.default", "base_model.model.a.ia3_l"),
            ("base_model.model.a.lora_magnitude_vector.default.weight", "base_model.model.a.lora_magnitude_vector"),
            ("base_model.model.a.lora_magnitude_vector", "base_model.model.a.lora_magnitude_vector"),
            ("base_model.model.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.weight"),
            ("base_model.model._orig_mod.a.lora_A.weight", "base_model.model.a.lora_A.weight"),
            ("base_model.model.default.lora_A.weight", "base_model.model.default.lora_A.weight"),
            ("prompt_embeddings", "prompt_embeddings"),
            ("", ""),
            ("a.modules_to_save", "a.modules_to_save"),
        ] {
            assert_eq!(canonical(old).as_deref(), Some(new), "{old}");
        }
        assert_eq!(canonical("base_model.model.lm_head.original_module.weight"), None);
    }

    #[test]
    fn prefix_slips_are_recognised() {
        let names =
            |prefix: &str| (0..3).map(|i| format!("{prefix}layers.{i}.q_proj.lora_A.weight")).collect::<Vec<_>>();
        for (found, wanted, says) in [
            (
                "base_model.model.",
                "base_model.model.model.",
                "`base_model.model.model.` instead of `base_model.model.`; it was made for the bare model",
            ),
            (
                "base_model.model.model.",
                "base_model.model.",
                "`base_model.model.` instead of `base_model.model.model.`; it was made for the model with a head",
            ),
            ("model.", "base_model.model.model.", "instead of `model.`; it was not saved by PEFT"),
            ("", "base_model.model.model.", "instead of nothing"),
            ("base_model.model.model.language_model.", "base_model.model.model.", "multimodal version"),
            ("base_model.model.language_model.model.", "base_model.model.model.", "multimodal version"),
            ("base_model.model.model.", "base_model.model.model.language_model.", "text-only version"),
        ] {
            let mismatch = KeyMismatch { missing: names(wanted), unexpected: names(found), wrong_shape: Vec::new() };
            let text = mismatch.to_string();
            assert!(text.contains("3 names would fit") && text.contains(says), "{text}");
            assert!(
                text.contains(&format!("missing: {wanted}layers.0.q_proj.lora_A.weight (near: {found}layers.0")),
                "{text}"
            );
        }
    }

    #[test]
    fn foreign_formats_are_named_and_lists_are_cut() {
        let mlx =
            KeyMismatch { missing: vec!["x".into()], unexpected: vec!["model.a.lora_a".into()], ..Default::default() };
        assert!(mlx.to_string().contains("MLX"));
        let kohya = KeyMismatch {
            unexpected: vec!["lora_te_a.lora_down.weight".into(), "lora_te_a.alpha".into()],
            ..Default::default()
        };
        assert!(kohya.to_string().contains("kohya"));
        let many = KeyMismatch { missing: (0..30).map(|i| format!("k{i}")).collect(), ..Default::default() };
        let text = many.to_string();
        assert_eq!(text.lines().count(), 12);
        assert!(
            text.starts_with("does not fit this model and config (30 missing)")
                && text.ends_with("and 20 more missing")
        );
    }
}
