//! What the devices of this machine are, how much of their memory is free, and how fast they are.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};

use crate::sample;

/// A CUDA card.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub(crate) struct Card {
    pub(crate) name: String,
    /// `8.0` is an A100, `9.0` an H100.
    pub(crate) compute_capability: String,
    /// Bytes.
    pub(crate) memory: u64,
    /// Bytes that no process holds.
    pub(crate) free: u64,
    /// The newest CUDA that the driver runs, `13.0`.
    pub(crate) driver: String,
}

/// A device, where `open` finds it. The CUDA bindings panic where a library is absent; that is an error like any other here.
///
/// # Errors
/// The first line of what the driver, or its absence, says.
pub(crate) fn opened(open: impl FnOnce() -> Result<Device> + std::panic::UnwindSafe) -> anyhow::Result<Device> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let opened = std::panic::catch_unwind(open);
    std::panic::set_hook(hook);
    let why = match opened {
        Ok(Ok(device)) => return Ok(device),
        Ok(Err(e)) => e.to_string(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a driver library is missing").to_owned()
        }
    };
    Err(anyhow::Error::msg(why.lines().next().unwrap_or_default().to_owned()))
}

/// Bytes of a device's memory that are free: of the card, or of the machine where the system tells it.
pub(crate) fn free_memory(device: &Device) -> Option<u64> {
    if device.is_cuda() { card(device).map(|card| card.free) } else { sample::available_memory() }
}

#[cfg(feature = "cuda")]
pub(crate) fn card(device: &Device) -> Option<Card> {
    use candle_core::cuda_backend::cudarc::driver::sys;
    let context = device.as_cuda_device().ok()?.cuda_stream().context().clone();
    let (major, minor) = context.compute_capability().ok()?;
    let (free, memory) = context.mem_get_info().ok()?;
    let mut version = 0;
    #[allow(unsafe_code)]
    // SAFETY: the call writes one integer to where it is told to.
    unsafe {
        sys::cuDriverGetVersion(&raw mut version).result().ok()?;
    }
    Some(Card {
        name: context.name().ok()?,
        compute_capability: format!("{major}.{minor}"),
        memory: memory as u64,
        free: free as u64,
        driver: format!("{}.{}", version / 1000, version % 1000 / 10),
    })
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn card(_: &Device) -> Option<Card> {
    None
}

/// How fast a device is at what training spends its time on.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Speed {
    /// Floating-point operations a second, in products of square `f32` matrices.
    pub(crate) f32_flops: f64,
    /// The same in `bf16`, where the device has it.
    pub(crate) bf16_flops: Option<f64>,
    /// Bytes a second, read and written, in sums of long vectors.
    pub(crate) bandwidth: f64,
}

/// Measures for about three seconds.
///
/// # Errors
/// When an operation fails, or the device has no room for 200 MB.
pub(crate) fn measure(device: &Device) -> Result<Speed> {
    let n = if device.is_cpu() { 1024 } else { 8192 };
    let flops = |dtype| {
        let a = Tensor::rand(-1f32, 1f32, (n, n), device)?.to_dtype(dtype)?;
        let seconds = seconds_of(device, || a.matmul(&a).map(drop))?;
        Ok::<_, candle_core::Error>(2.0 * (n as f64).powi(3) / seconds)
    };
    let length = if device.is_cpu() { 8 << 20 } else { 64 << 20 };
    let x = Tensor::zeros(length, DType::F32, device)?;
    let seconds = seconds_of(device, || (&x + &x).map(drop))?;
    let bandwidth = 3.0 * 4.0 * length as f64 / seconds;
    let bf16_flops = if !device.is_cpu() && device.supports_bf16() { Some(flops(DType::BF16)?) } else { None };
    Ok(Speed { f32_flops: flops(DType::F32)?, bf16_flops, bandwidth })
}

/// The fastest of the runs of a second.
fn seconds_of(device: &Device, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    device.synchronize()?;
    let (began, mut best) = (Instant::now(), f64::INFINITY);
    while began.elapsed() < Duration::from_secs(1) {
        let one = Instant::now();
        run()?;
        device.synchronize()?;
        best = best.min(one.elapsed().as_secs_f64());
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_missing_driver_is_an_error_of_one_line() {
        assert!(opened(|| Ok(Device::Cpu)).unwrap().is_cpu());
        let refused = opened(|| Err(candle_core::Error::Msg("no such card\nbacktrace".into())));
        assert_eq!(refused.unwrap_err().to_string(), "no such card");
        // What cudarc does.
        let absent =
            opened(|| panic!("Unable to dynamically load the \"cuda\" shared library\nsearched for libcuda.so"));
        assert_eq!(absent.unwrap_err().to_string(), "Unable to dynamically load the \"cuda\" shared library");
    }
}
