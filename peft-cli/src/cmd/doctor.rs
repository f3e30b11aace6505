//! `peft-cli doctor`: this machine, and how the tool would use it.

use anyhow::Result;
use serde_json::json;

use crate::args::DoctorArgs;
use crate::sample;

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
    let devices = devices();
    let hub = peft_hub::Options::from_env();
    let facts = json!({
        "version": env!("CARGO_PKG_VERSION"), "threads": peft_core::kernels::threads(), "cpu": cpu_features(),
        "memory_available": sample::available_memory(), "features": features, "devices": devices,
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
    out!("devices           {}", devices.join(", "));
    out!("hub               {}{}", hub.endpoint, if hub.offline { " (offline)" } else { "" });
    if let Some(cache) = &hub.cache {
        out!("hub cache         {}", cache.display());
    }
    Ok(())
}

fn devices() -> Vec<String> {
    let mut found = vec!["cpu".to_string()];
    if cfg!(feature = "cuda") {
        match candle_core::Device::new_cuda(0) {
            Ok(_) => found.push("cuda:0".into()),
            Err(e) => found.push(format!("cuda: {}", e.to_string().lines().next().unwrap_or_default())),
        }
    }
    if cfg!(feature = "metal") {
        match candle_core::Device::new_metal(0) {
            Ok(_) => found.push("metal".into()),
            Err(e) => found.push(format!("metal: {}", e.to_string().lines().next().unwrap_or_default())),
        }
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
