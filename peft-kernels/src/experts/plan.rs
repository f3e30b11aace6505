//! Which experts each token goes to.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use crate::rows::select_rows;

/// The experts of the tokens of a batch. A *pair* is a token with one of its experts; pairs are sorted by expert and
/// then by token, so that the pairs of an expert are a range.
#[derive(Debug, Clone)]
pub struct ExpertPlan {
    experts: usize,
    top_k: usize,
    /// The token of each pair.
    tokens: Vec<u32>,
    /// The experts of each token, `[tokens · top_k]`, the likeliest first.
    chosen: Vec<u32>,
    /// The pair of each of them.
    places: Vec<u32>,
    /// The experts that have pairs, in order, and which.
    segments: Vec<(usize, Range<usize>)>,
}

impl ExpertPlan {
    /// The `top_k` experts with the largest `logits: [tokens, experts]` for each token; of equal ones the first.
    ///
    /// # Errors
    /// When there are fewer experts than `top_k`, or `top_k` is 0.
    pub fn new(logits: &Tensor, top_k: usize) -> Result<Self> {
        let (tokens, experts) = logits.dims2()?;
        if top_k == 0 || top_k > experts {
            candle_core::bail!("{top_k} experts a token of {experts}");
        }
        let pairs = tokens.checked_mul(top_k).filter(|pairs| u32::try_from(*pairs).is_ok());
        let Some(pairs) = pairs else { candle_core::bail!("{tokens} tokens of {top_k} experts each are too many") };
        let values = logits.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut chosen: Vec<u32> = Vec::with_capacity(pairs);
        let mut order: Vec<u32> = Vec::with_capacity(experts);
        for row in values.chunks_exact(experts) {
            order.clear();
            order.extend(0..experts as u32);
            let value = |expert: &u32| row.get(*expert as usize).copied().unwrap_or(f32::NEG_INFINITY);
            let before = |a: &u32, b: &u32| value(b).total_cmp(&value(a)).then(a.cmp(b));
            if top_k < experts {
                order.select_nth_unstable_by(top_k - 1, before);
            }
            order.truncate(top_k);
            order.sort_unstable_by(before);
            chosen.extend_from_slice(&order);
        }
        Ok(Self::of_choices(experts, top_k, chosen))
    }

    /// A counting sort of the pairs.
    fn of_choices(experts: usize, top_k: usize, chosen: Vec<u32>) -> Self {
        let mut starts = vec![0usize; experts + 1];
        for &expert in &chosen {
            starts[expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            starts[expert + 1] += starts[expert];
        }
        let segments = (0..experts).map(|expert| (expert, starts[expert]..starts[expert + 1]));
        let segments = segments.filter(|(_, range)| !range.is_empty()).collect();
        let mut next = starts;
        let (mut tokens, mut places) = (vec![0u32; chosen.len()], vec![0u32; chosen.len()]);
        for (at, &expert) in chosen.iter().enumerate() {
            let place = next[expert as usize];
            next[expert as usize] += 1;
            tokens[place] = (at / top_k) as u32;
            places[at] = place as u32;
        }
        Self { experts, top_k, tokens, chosen, places, segments }
    }

    /// How many experts there are.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// How many experts each token goes to.
    #[must_use]
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// How many pairs there are: `tokens · top_k`.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.tokens.len()
    }

    /// How many tokens there are.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.chosen.len().checked_div(self.top_k).unwrap_or(0)
    }

    /// The experts that have tokens, in order, and the range of their pairs.
    #[must_use]
    pub fn segments(&self) -> &[(usize, Range<usize>)] {
        &self.segments
    }

    /// The rows of `x: [tokens, width]`, one for each pair: `[pairs, width]`. The gradient of a row is the sum over its pairs.
    ///
    /// # Errors
    /// When there are fewer rows than tokens.
    pub fn gather(&self, x: &Tensor) -> Result<Tensor> {
        select_rows(x, &self.tokens)
    }

    pub(super) fn tokens_of_pairs(&self) -> &[u32] {
        &self.tokens
    }

    pub(super) fn chosen(&self) -> &[u32] {
        &self.chosen
    }

    pub(super) fn places(&self) -> &[u32] {
        &self.places
    }

    /// `x`'s rows have to be the pairs'.
    pub(super) fn check_pairs(&self, rows: usize, name: &str) -> Result<()> {
        if rows != self.pairs() {
            candle_core::bail!("{name}: {rows} rows for {} pairs of tokens and experts", self.pairs());
        }
        Ok(())
    }

    pub(super) fn index(values: &[u32], device: &Device) -> Result<Tensor> {
        Tensor::new(values, device)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pairs_are_sorted_by_expert() {
        let logits = [[0.1f32, 3.0, -1.0, 2.0], [5.0, 4.0, 4.0, -2.0], [f32::NEG_INFINITY, 0.0, 0.0, 0.0]];
        let plan = ExpertPlan::new(&Tensor::new(&logits, &Device::Cpu).unwrap(), 2).unwrap();
        // Of equal logits the first.
        assert_eq!(plan.chosen(), [1, 3, 0, 1, 1, 2]);
        assert_eq!(plan.segments(), [(0, 0..1), (1, 1..4), (2, 4..5), (3, 5..6)]);
        assert_eq!(plan.tokens_of_pairs(), [1, 0, 1, 2, 2, 0]);
        assert_eq!(plan.places(), [1, 5, 0, 2, 3, 4]);
        assert_eq!((plan.tokens(), plan.pairs(), plan.top_k(), plan.experts()), (3, 6, 2, 4));
        let x = Tensor::new(&[[0f32], [10.0], [20.0]], &Device::Cpu).unwrap();
        let rows = plan.gather(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(rows, [10.0, 0.0, 10.0, 20.0, 20.0, 0.0]);
    }

    #[test]
    fn an_expert_without_tokens_has_no_segment() {
        let plan = ExpertPlan::new(&Tensor::new(&[[0f32, 1.0, 9.0]; 5], &Device::Cpu).unwrap(), 1).unwrap();
        assert_eq!(plan.segments(), [(2, 0..5)]);
        let none = ExpertPlan::new(&Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap(), 2).unwrap();
        assert!(none.segments().is_empty() && none.tokens() == 0);
    }

    #[test]
    fn as_many_experts_as_there_are() {
        let logits = Tensor::new(&[[0f32, f32::NAN, 1.0]], &Device::Cpu).unwrap();
        assert_eq!(ExpertPlan::new(&logits, 3).unwrap().pairs(), 3);
        for top_k in [0, 4] {
            let message = ExpertPlan::new(&logits, top_k).unwrap_err().to_string();
            assert!(message.contains(&format!("{top_k} experts a token of 3")), "{message}");
        }
    }
}
