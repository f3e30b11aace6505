//! LoKr (Yeh et al. 2023, arXiv:2309.14859; PEFT `tuners/lokr`): a Kronecker product, its factors low-rank where that is
//! smaller.

use candle_core::Tensor;
use peft_core::{Error, Result, Role};
use serde_json::{Value, json};

use super::{Kind, MOST, Made, Method, size};
use crate::change::{Change, Formula};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "lokr",
    peft_type: "LOKR",
    label: "LoKr",
    keys: || {
        json!({"alpha": 8, "alpha_pattern": {}, "decompose_both": false, "decompose_factor": -1, "exclude_modules": null,
            "init_weights": true, "layers_pattern": null, "layers_to_transform": null, "module_dropout": 0.0, "r": 8,
            "rank_dropout": 0.0, "rank_dropout_scale": false, "rank_pattern": {}, "use_effective_conv2d": false})
    },
    only_default: &["module_dropout", "rank_dropout"],
    patterns: &[],
    read: |keys| {
        let zero = match keys.get("init_weights") {
            Some(Value::String(s)) if s == "lycoris" => Zero::Second,
            _ if keys.flag("init_weights", true)? => Zero::First,
            _ => Zero::Neither,
        };
        let factor = match keys.get("decompose_factor").and_then(Value::as_i64) {
            Some(-1) => None,
            _ => keys.count("decompose_factor", MOST)?,
        };
        let (r, alpha) = (size(keys, "r", 8)?, keys.number("alpha", 8.0)?);
        Ok(Box::new(LoKr { r, alpha, both: keys.flag("decompose_both", false)?, factor, zero }))
    },
};

/// Which factor of the product starts at zero.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Zero {
    First,
    Second,
    Neither,
}

#[derive(Debug)]
struct LoKr {
    r: usize,
    alpha: f64,
    /// Whether the first factor may be low-rank too.
    both: bool,
    factor: Option<usize>,
    zero: Zero,
}

impl Method for LoKr {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), r) = (start.dims(), start.rank.unwrap_or(self.r));
        let scale = start.alpha.unwrap_or(self.alpha) / r as f64;
        let ((a, b), (c, d)) = (factorization(out, self.factor), factorization(inp, self.factor));
        let low_rank = |rows: usize, columns: usize| 2 * r < rows.max(columns);
        let split = (self.both && low_rank(a, c), low_rank(b, d));
        // While one factor is zero the other has no gradient; inside a low-rank factor likewise.
        let role = |other: bool| if other { Role::ZeroAtStart } else { Role::Plain };
        let (first, second) = (self.zero == Zero::First, self.zero == Zero::Second);
        match (split.0, first) {
            (false, true) => start.constant("lokr_w1", 0.0, (a, c), Role::Plain)?,
            (false, false) => start.kaiming("lokr_w1", (a, c), role(second))?,
            (true, _) => {
                match first {
                    true => start.constant("lokr_w1_a", 0.0, (a, r), Role::Plain)?,
                    false => start.kaiming("lokr_w1_a", (a, r), role(second))?,
                }
                start.kaiming("lokr_w1_b", (r, c), role(first || second))?;
            }
        }
        match (split.1, second) {
            (false, true) => start.constant("lokr_w2", 0.0, (b, d), Role::Plain)?,
            (false, false) => start.kaiming("lokr_w2", (b, d), role(first))?,
            (true, _) => {
                start.kaiming("lokr_w2_a", (b, r), role(first || second))?;
                match second {
                    true => start.constant("lokr_w2_b", 0.0, (r, d), Role::Plain)?,
                    false => start.kaiming("lokr_w2_b", (r, d), role(first))?,
                }
            }
        }
        Ok((start.finish(Kronecker { scale, split }, 0.0), Vec::new()))
    }
}

/// Two factors of `n`, the smaller first: `factor` and the rest where it divides `n`, else those nearest to each other
/// (with the smaller at most `factor`).
fn factorization(n: usize, factor: Option<usize>) -> (usize, usize) {
    if let Some(m) = factor.filter(|m| n.is_multiple_of(*m)) {
        return (m, n / m);
    }
    let most = factor.unwrap_or(n);
    let smaller = (1..=n.isqrt()).rev().find(|m| *m <= most && n.is_multiple_of(*m)).unwrap_or(1);
    (smaller, n / smaller)
}

/// `s·(w₁ ⊗ w₂)`; a factor that is split is the product of two parameters.
#[derive(Debug)]
struct Kronecker {
    scale: f64,
    split: (bool, bool),
}

impl Formula for Kronecker {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let (w1, w2) = match (self.split, parameters) {
            ((false, false), [w1, w2]) => (w1.clone(), w2.clone()),
            ((true, false), [a, b, w2]) => (a.matmul(b)?, w2.clone()),
            ((false, true), [w1, a, b]) => (w1.clone(), a.matmul(b)?),
            ((true, true), [a, b, c, d]) => (a.matmul(b)?, c.matmul(d)?),
            _ => return Err(Error::msg(format!("{} parameters for LoKr", parameters.len()))),
        };
        let ((a, c), (b, d)) = (w1.dims2()?, w2.dims2()?);
        let blocks = w1.reshape((a, 1, c, 1))?.broadcast_mul(&w2.reshape((1, b, 1, d))?)?;
        Ok(Change::Dense((blocks.reshape((a * b, c * d))? * self.scale)?))
    }
}

#[cfg(test)]
mod tests {
    use super::factorization;

    /// The examples of PEFT's documentation.
    #[test]
    fn factors_are_those_of_peft() {
        let cases = [(256, None, (16, 16)), (128, None, (8, 16)), (127, None, (1, 127)), (128, Some(4), (4, 32))];
        for (n, factor, expected) in cases {
            assert_eq!(factorization(n, factor), expected);
        }
        assert_eq!(factorization(48, Some(5)), (4, 12));
    }
}
