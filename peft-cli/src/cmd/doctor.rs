//! `peft-cli doctor`: this machine, and how the tool would use it.

use anyhow::Result;
use serde_json::json;

use crate::args::DoctorArgs;
use crate::device::{self, Card, Speed};
use crate::sample;

/// A device that can be used, or why it cannot.
struct Found {
    name: String,
    card: Option<Card>,
    speed: Option<Speed>,
    trouble: Option<String>,
}

pub(crate) fn run(args: &DoctorArgs) -> Result<()> {
    let mut features: Vec<&str> = Vec::new();
    for (on, name) in [
        (cfg!(feature = "cuda"), "cuda"),
        (cfg!(feature = "metal"), "metal"),
        (cfg!(feature = "accelerate"), "accelerate"),
        (cfg!(feature = "avx512"), "avx512"),
    ] {
        if on {
            features.push(name);
        }
    }
    let found = devices(args.quick);
    let described: Vec<_> =
        found.iter().map(|d| json!({"name": d.name, "card": d.card, "speed": d.speed, "trouble": d.trouble})).collect();
    let hub = peft_hub::Options::from_env();
    let facts = json!({
        "version": env!("CARGO_PKG_VERSION"), "threads": peft_core::kernels::threads(), "cpu": cpu_features(),
        "memory_available": sample::available_memory(), "features": features, "devices": described,
        "hub": hub.endpoint, "hub_cache": hub.cache, "offline": hub.offline
    });
    if args.json {
        out!("{facts}");
        return Ok(());
    }
    out!("peft-cli          {}", env!("CARGO_PKG_VERSION"));
    out!("built with        {}", features.join(", "));
    out!("threads           {} (RAYON_NUM_THREADS sets it)", peft_core::kernels::threads());
    out!("vector units      {}", cpu_features().join(", "));
    if let Some(bytes) = sample::available_memory() {
        out!("memory available  {:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    }
    for device in &found {
        out!("device            {}", device.describe());
    }
    out!("hub               {}{}", hub.endpoint, if hub.offline { " (offline)" } else { "" });
    if let Some(cache) = &hub.cache {
        out!("hub cache         {}", cache.display());
    }
    Ok(())
}

impl Found {
    fn of(name: &str, device: Result<candle_core::Device>, quick: bool) -> Self {
        let none = Self { name: name.to_owned(), card: None, speed: None, trouble: None };
        let device = match device {
            Ok(device) => device,
            Err(e) => return Self { trouble: Some(e.to_string()), ..none },
        };
        let card = device::card(&device);
        match quick {
            true => Self { card, ..none },
            false => match device::measure(&device) {
                Ok(speed) => Self { card, speed: Some(speed), ..none },
                Err(e) => {
                    let trouble = e.to_string().lines().next().map(str::to_owned);
                    Self { card, trouble, ..none }
                }
            },
        }
    }

    fn describe(&self) -> String {
        let mut parts = Vec::new();
        if let Some(Card { name, compute_capability, memory, free, driver }) = &self.card {
            let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
            parts.push(format!(
                "{name}, compute capability {compute_capability}, {:.1} of {:.1} GiB free, driver for CUDA {driver}",
                gib(*free),
                gib(*memory)
            ));
        }
        if let Some(Speed { f32_flops, bf16_flops, bandwidth }) = self.speed {
            parts.push(format!("{:.0} GFLOP/s in f32", f32_flops / 1e9));
            parts.extend(bf16_flops.map(|flops| format!("{:.0} in bf16", flops / 1e9)));
            parts.push(format!("{:.0} GB/s", bandwidth / 1e9));
        }
        parts.extend(self.trouble.clone());
        if parts.is_empty() { self.name.clone() } else { format!("{}: {}", self.name, parts.join(", ")) }
    }
}

/// The CPU, and what this binary was built for besides.
fn devices(quick: bool) -> Vec<Found> {
    let mut found = vec![Found::of("cpu", Ok(candle_core::Device::Cpu), quick)];
    if cfg!(feature = "cuda") {
        // The first that is not there ends the list; that there is none at all is worth a line.
        for index in 0.. {
            let device = device::opened(move || candle_core::Device::new_cuda(index));
            if index > 0 && device.is_err() {
                break;
            }
            let absent = device.is_err();
            found.push(Found::of(&format!("cuda:{index}"), device, quick));
            if absent {
                break;
            }
        }
    }
    if cfg!(feature = "metal") {
        found.push(Found::of("metal", device::opened(|| candle_core::Device::new_metal(0)), quick));
    }
    found
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    let all = [
        (is_x86_feature_detected!("avx2"), "avx2"),
        (is_x86_feature_detected!("fma"), "fma"),
        (is_x86_feature_detected!("avx512f"), "avx512f"),
        (is_x86_feature_detected!("avx512bf16"), "avx512bf16"),
        (is_x86_feature_detected!("avx512vnni"), "avx512vnni"),
    ];
    all.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<&'static str> {
    vec![std::env::consts::ARCH]
}
