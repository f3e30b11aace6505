//! How adapters are put together, as AdapterHub's package writes it (`to_dict` in `adapters/composition.py`, 1.3).

use peft_core::{Error, Result};
use serde_json::{Value, json};

/// The key of a config that holds a setup.
pub(crate) const SETUP: &str = "setup";

/// Adapters, put together. The leaves are their names.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Setup {
    One(String),
    /// One behind the other.
    Stack(Vec<Setup>),
    /// The mean of what they make, each with its weight; the weights sum to 1.
    Average(Vec<(f64, Setup)>),
    /// Attention to what they make.
    Fuse(Vec<Setup>),
}

/// `weights`, divided by their sum.
///
/// # Errors
/// What is no weight, or a sum that nothing can be divided by.
pub(crate) fn normalised(weights: &[f64]) -> Result<Vec<f64>> {
    let sum: f64 = weights.iter().sum();
    if !weights.iter().all(|w| w.is_finite()) || !sum.is_finite() || sum.abs() < 1e-9 {
        return Err(Error::config("weights", format!("{weights:?} are no numbers with a sum to divide by")));
    }
    Ok(weights.iter().map(|w| w / sum).collect())
}

impl Setup {
    /// Reads AdapterHub's form.
    ///
    /// # Errors
    /// Another kind of composition, one inside another that AdapterHub does not allow there, or an adapter that occurs twice.
    pub(crate) fn from_json(value: &Value) -> Result<Self> {
        let setup = Self::read(value, 0)?;
        let mut names = setup.names();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        if names.len() < all || setup.fuses() > 1 {
            return Err(wrong(
                "names an adapter twice or has two fusions; each adapter once, and one fusion, can be read",
            ));
        }
        Ok(setup)
    }

    fn read(value: &Value, depth: usize) -> Result<Self> {
        let kind = value.get("type").and_then(Value::as_str).unwrap_or("");
        let Some(list) = value.get("children").and_then(Value::as_array).filter(|list| !list.is_empty()) else {
            return Err(wrong(&format!("{value} has no `children`")));
        };
        if kind == "single" {
            return match list.as_slice() {
                [Value::String(name)] if !name.is_empty() => Ok(Self::One(name.clone())),
                _ => Err(wrong(&format!("{value} is not the name of one adapter"))),
            };
        }
        // AdapterHub has no more than two kinds inside each other, and in the inner a stack at most.
        if depth > 2 {
            return Err(wrong("is deeper than AdapterHub allows"));
        }
        let children = list.iter().map(|child| Self::read(child, depth + 1)).collect::<Result<Vec<_>>>()?;
        let plain = |child: &Self| matches!(child, Self::One(_));
        let plain_or_stack = |child: &Self| match child {
            Self::One(_) => true,
            Self::Stack(parts) => parts.iter().all(plain),
            _ => false,
        };
        match kind {
            "Stack" if depth == 0 || children.iter().all(plain) => Ok(Self::Stack(children)),
            "Fuse" if children.iter().all(plain_or_stack) && children.len() > 1 => Ok(Self::Fuse(children)),
            "Average" if children.iter().all(plain_or_stack) => {
                let given = value.get("kwargs").and_then(|kwargs| kwargs.get("weights")).filter(|w| !w.is_null());
                let weights = match given {
                    None => vec![1.0; children.len()],
                    Some(given) => numbers(given, children.len())?,
                };
                Ok(Self::Average(normalised(&weights)?.into_iter().zip(children).collect()))
            }
            "Stack" | "Fuse" | "Average" => {
                Err(wrong(&format!("{value} holds what cannot stand in it, or too little of it")))
            }
            "Parallel" | "BatchSplit" | "MultiTask" => Err(wrong(&format!(
                "{kind} sends rows through several adapters, which a batch of several adapters does: give each its own"
            ))),
            other => Err(wrong(&format!("`{other}` is not one of Stack, Average, Fuse"))),
        }
    }

    /// AdapterHub's form.
    pub(crate) fn to_json(&self) -> Value {
        let children = |list: &[Self]| list.iter().map(Self::to_json).collect::<Vec<_>>();
        match self {
            Self::One(name) => json!({"type": "single", "children": [name]}),
            Self::Stack(list) => json!({"type": "Stack", "children": children(list)}),
            Self::Fuse(list) => json!({"type": "Fuse", "children": children(list)}),
            Self::Average(list) => {
                let (weights, list): (Vec<f64>, Vec<Self>) = list.iter().cloned().unzip();
                json!({"type": "Average", "children": children(&list), "kwargs": {"weights": weights}})
            }
        }
    }

    /// The names of the adapters, in order.
    pub(crate) fn names(&self) -> Vec<&str> {
        match self {
            Self::One(name) => vec![name],
            Self::Stack(list) | Self::Fuse(list) => list.iter().flat_map(Self::names).collect(),
            Self::Average(list) => list.iter().flat_map(|(_, part)| part.names()).collect(),
        }
    }

    fn fuses(&self) -> usize {
        match self {
            Self::One(_) => 0,
            Self::Stack(list) => list.iter().map(Self::fuses).sum(),
            Self::Fuse(list) => 1 + list.iter().map(Self::fuses).sum::<usize>(),
            Self::Average(list) => list.iter().map(|(_, part)| part.fuses()).sum(),
        }
    }

    /// What AdapterHub calls the fusion in it: the last adapters of its parts, with commas.
    pub(crate) fn fusion_name(&self) -> Option<String> {
        match self {
            Self::One(_) => None,
            Self::Stack(list) => list.iter().find_map(Self::fusion_name),
            Self::Average(list) => list.iter().find_map(|(_, part)| part.fusion_name()),
            Self::Fuse(list) => {
                Some(list.iter().filter_map(|part| part.names().last().copied()).collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// A list of `n` numbers.
pub(crate) fn numbers(list: &Value, n: usize) -> Result<Vec<f64>> {
    let found: Option<Vec<f64>> = list.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
    found
        .filter(|weights| weights.len() == n)
        .ok_or_else(|| Error::config("weights", format!("{list} is not a list of {n} numbers, one for each adapter")))
}

fn wrong(message: &str) -> Error {
    Error::config(SETUP, message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_setup_goes_both_ways() {
        let one = |name: &str| json!({"type": "single", "children": [name]});
        let fuse = json!({"type": "Fuse", "children": [{"type": "Stack", "children": [one("a"), one("b")]}, one("c")]});
        let setup = json!({"type": "Stack", "children": [one("z"), fuse]});
        let read = Setup::from_json(&setup).unwrap();
        assert_eq!((read.names(), read.fusion_name().unwrap().as_str()), (vec!["z", "a", "b", "c"], "b,c"));
        assert_eq!(read.to_json(), setup);
        let average = json!({"type": "Average", "children": [one("a"), one("b")], "kwargs": {"weights": [1.0, 3.0]}});
        let read = Setup::from_json(&average).unwrap();
        assert_eq!(read, Setup::Average(vec![(0.25, Setup::One("a".into())), (0.75, Setup::One("b".into()))]));
        assert_eq!(Setup::from_json(&read.to_json()).unwrap(), read);
    }

    #[test]
    fn what_is_no_setup_is_refused() {
        let one = |name: &str| json!({"type": "single", "children": [name]});
        for (setup, expect) in [
            (json!({}), "children"),
            (json!({"type": "single", "children": [3]}), "name of one adapter"),
            (json!({"type": "Stack", "children": [one("a"), one("a")]}), "twice"),
            (json!({"type": "Stak", "children": [one("a")]}), "`Stak`"),
            (json!({"type": "Parallel", "children": [one("a"), one("b")]}), "give each its own"),
            (json!({"type": "Fuse", "children": [one("a")]}), "too little"),
            (
                json!({"type": "Average", "children": [{"type": "Fuse", "children": [one("a"), one("b")]}]}),
                "cannot stand",
            ),
            (json!({"type": "Average", "children": [one("a")], "kwargs": {"weights": [1, 2]}}), "list of 1"),
            (json!({"type": "Average", "children": [one("a"), one("b")], "kwargs": {"weights": [1, -1]}}), "sum"),
        ] {
            let e = Setup::from_json(&setup).unwrap_err().to_string();
            assert!(e.contains(expect), "{setup}: {e}");
        }
    }
}
