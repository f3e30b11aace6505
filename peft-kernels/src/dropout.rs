//! Dropout whose mask is a function of (seed, step, site, element).
use crate::philox::Stream;
use candle_core::{Result, Tensor};
/// Temporary until the ops branch lands.
pub fn dropout(x: &Tensor, p: f32, stream: Stream) -> Result<Tensor> {
    let mut v = x.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    apply_in_place(&mut v, p, stream)?;
    Tensor::from_vec(v, x.shape(), x.device())?.to_dtype(x.dtype())
}
pub(crate) fn apply_in_place(x: &mut [f32], p: f32, stream: Stream) -> Result<()> {
    let threshold = (f64::from(p) * 4294967296.0) as u32;
    for (i, v) in x.iter_mut().enumerate() {
        *v = if stream.word(i as u64) >= threshold { *v / (1.0 - p) } else { 0.0 };
    }
    Ok(())
}
