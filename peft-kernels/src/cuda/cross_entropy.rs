//! Cross-entropy of rows of logits.

use candle_core::cuda::cudarc::driver::DevicePtr;
use candle_core::{Result, Tensor};
use peft_cuda::cross_entropy::Chunk;

use super::with;
use crate::cross_entropy::{Gradient, Scored};

/// Losses of untracked contiguous `logits`, whose targets are checked; waits for them.
pub(crate) fn score(
    logits: &Tensor,
    targets: &[u32],
    scale: f64,
    softcap: Option<f64>,
    want: Gradient,
) -> Result<Option<Scored>> {
    if with(&[logits], |_| Ok(Some(())))?.is_none() {
        return Ok(None);
    }
    let logits = if want == Gradient::Copy { logits.copy()? } else { logits.clone() };
    let scored = with(&[&logits], |views| {
        let [x] = views else { return Ok(None) };
        let (rows, vocab) = x.shape.dims2()?;
        let ids = x.upload(targets)?;
        let (nll, hits) = (x.device.alloc_zeros::<f32>(rows)?, x.device.alloc_zeros::<u32>(rows)?);
        {
            let (targets, _ids) = ids.device_ptr(ids.stream());
            let (to_nll, _nll) = nll.device_ptr(nll.stream());
            let (to_hits, _hits) = hits.device_ptr(hits.stream());
            let chunk = Chunk { logits: x.operand, rows, vocab, targets, weights: 0 };
            let scale = (want != Gradient::None).then_some(scale as f32);
            x.run(&[chunk.losses(to_nll, to_hits, scale, softcap.map(|cap| cap as f32))], &mut [])?;
        }
        Ok(Some((x.device.clone_dtoh(&nll)?, x.device.clone_dtoh(&hits)?)))
    })?;
    Ok(scored.map(|(nll, hits)| Scored {
        nll: nll.into_iter().map(f64::from).collect(),
        hits: hits.into_iter().map(|hit| hit as usize).sum(),
        grad: (want != Gradient::None).then_some(logits),
    }))
}
