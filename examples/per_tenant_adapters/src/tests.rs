#![allow(clippy::unwrap_used)]
use peft_train::checkpoint::write_adapter_files;

use super::*;

/// Twelve tenants in the memory of three, whose last norms tell them apart.
#[test]
fn each_tenant_has_its_own_answers_in_a_third_of_the_memory() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quickstart/base");
    let model = ModelFiles::open(&base).unwrap().load_decoder(&Placement::cpu(None), 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let table = serde_json::json!({"type": "ln", "target_modules": ["norm"]});
    for tenant in 0..12 {
        let adapter = methods::create(table.as_object().unwrap(), &model, 0).unwrap().adapter;
        for p in adapter.parameters() {
            // Some channels count more, others for each tenant.
            let values: Vec<f32> = p.value().to_vec1().unwrap();
            let changed: Vec<f32> =
                values.iter().enumerate().map(|(i, v)| if i % 12 == tenant { 4.0 * v } else { *v }).collect();
            p.set(&candle_core::Tensor::new(changed.as_slice(), &candle_core::Device::Cpu).unwrap()).unwrap();
        }
        write_adapter_files(&dir.path().join(format!("tenant{tenant}")), &adapter).unwrap();
    }
    let one = {
        let tenants = Tenants::open(&base, dir.path(), None).unwrap();
        tenants.registry.lease("tenant0").unwrap().bytes()
    };
    let prompt = "Once upon a time there was a brave dog named Rex.";
    let all = |budget: Option<u64>, rounds: usize| {
        let tenants = Tenants::open(&base, dir.path(), budget).unwrap();
        assert_eq!((tenants.registry.stats().registered, tenants.registry.stats().resident), (12, 0));
        let names: Vec<String> = (0..12 * rounds).map(|i| format!("tenant{}", i * 5 % 12)).collect();
        let asked: Vec<_> = names.iter().map(|name| tenants.ask(name, prompt).unwrap()).collect();
        let texts: Vec<_> = asked.into_iter().map(|answer| answer.complete_blocking().unwrap().text).collect();
        (names.into_iter().zip(texts).collect::<Vec<_>>(), tenants.registry.stats())
    };
    let (unbounded, stats) = all(None, 1);
    assert_eq!((stats.opened, stats.evicted), (12, 0));
    let texts: std::collections::BTreeSet<&String> = unbounded.iter().map(|(_, text)| text).collect();
    assert!(texts.len() > 6, "the tenants write different texts: {texts:?}");

    let (bounded, stats) = all(Some(3 * one), 3);
    assert!(stats.opened >= 36 - 3 && stats.evicted >= 30 && stats.bytes <= 3 * one, "{stats:?}");
    for (name, text) in &bounded {
        let (_, wanted) = unbounded.iter().find(|(n, _)| n == name).unwrap();
        assert_eq!(text, wanted, "{name}");
    }

    let tenants = Tenants::open(&base, dir.path(), None).unwrap();
    assert!(tenants.ask("tenant99", prompt).unwrap_err().to_string().contains("tenant99"));
    std::fs::write(dir.path().join("tenant1/adapter_model.safetensors"), b"torn").unwrap();
    assert!(tenants.ask("tenant1", prompt).unwrap_err().to_string().contains("tenant1"));
    assert!(tenants.ask("tenant2", prompt).unwrap().complete_blocking().is_ok());
}
