//! Names, generations, budgets.

use std::sync::Arc;

use peft_serve::RegistryError;

use crate::base::{Numbers, base, kinds, registry, trained, write};

#[test]
fn a_lease_keeps_the_generation_that_it_began_with() {
    let (model, dir) = (base(), tempfile::tempdir().unwrap());
    let (lora, ia3) = (&kinds()[0].1, &kinds()[4].1);
    let one = write(&dir.path().join("one"), lora, &model, 1);
    let two = write(&dir.path().join("two"), ia3, &model, 2);
    let registry = registry(&model, None);
    registry.load("a", &one).unwrap();
    let first = registry.lease("a").unwrap();
    registry.load("a", &two).unwrap();
    let second = registry.lease("a").unwrap();
    assert_ne!(first.hash(), second.hash());
    assert_eq!((first.adapter().peft_type(), second.adapter().peft_type()), ("LORA", "IA3"));
    // The same content is the same generation, whatever the folder; what stands beside it does not matter.
    crate::registry::copy(&one, &dir.path().join("three"));
    std::fs::write(dir.path().join("three/README.md"), "hello").unwrap();
    assert_eq!(registry.load("b", &dir.path().join("three")).unwrap().hash(), first.hash());
    assert!(registry.unload("a") && !registry.unload("a"));
    assert_eq!(second.adapter().peft_type(), "IA3");
    let error = registry.lease("a").unwrap_err();
    assert!(matches!(error, RegistryError::Unknown { .. }), "{error}");
    let kept = registry.insert("kept", Arc::new(trained(lora, &model, 3))).unwrap();
    assert_eq!(registry.lease("kept").unwrap().hash(), kept.hash());
    assert!(registry.lease("kep").unwrap_err().to_string().contains("did you mean `kept`"));
}

pub(crate) fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_thousand_names_cost_nothing_and_the_budget_holds() {
    let (model, dir) = (base(), tempfile::tempdir().unwrap());
    let lora = &kinds()[0].1;
    let folders: Vec<_> = (0..6).map(|i| write(&dir.path().join(i.to_string()), lora, &model, i)).collect();
    let sized = registry(&model, None);
    let bytes = sized.load("a", &folders[0]).unwrap().bytes();
    let budget = 3 * bytes + bytes / 2;
    let registry = registry(&model, Some(budget));
    let names = |n: usize| (0..n).map(|i| (format!("n{i}"), folders[i % folders.len()].clone()));
    registry.register(names(3000)).unwrap();
    assert_eq!((registry.stats().registered, registry.stats().opened), (3000, 0));
    let mut numbers = Numbers(5);
    for _ in 0..60 {
        let i = numbers.below(9);
        let leased = registry.lease(&format!("n{i}")).unwrap();
        let same = registry.lease(&format!("n{i}")).unwrap();
        assert!(Arc::ptr_eq(&leased, &same), "what is used last stays");
        let stats = registry.stats();
        assert!(stats.bytes <= budget && stats.resident <= 3, "{stats:?}");
    }
    let stats = registry.stats();
    assert!(stats.evicted > 0 && stats.opened == stats.evicted + stats.resident as u64, "{stats:?}");
    // The one that was used longest ago goes.
    for i in [100, 101, 102, 100, 103] {
        registry.lease(&format!("n{i}")).unwrap();
    }
    assert!(registry.resident("n100").is_some() && registry.resident("n101").is_none());
}

#[test]
fn files_that_changed_under_a_name_are_refused_until_they_are_published() {
    let (model, dir) = (base(), tempfile::tempdir().unwrap());
    let lora = &kinds()[0].1;
    let folder = write(&dir.path().join("a"), lora, &model, 1);
    let other = write(&dir.path().join("b"), lora, &model, 2);
    let registry = registry(&model, Some(1));
    let first = registry.load("a", &folder).unwrap();
    registry.load("b", &other).unwrap();
    assert!(registry.resident("a").is_none(), "the budget of one byte holds the newest alone");
    // Written again with the same bytes, it is the same generation.
    std::fs::remove_dir_all(&folder).unwrap();
    write(&folder, lora, &model, 1);
    assert_eq!(registry.lease("a").unwrap().hash(), first.hash());
    registry.lease("b").unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    write(&folder, lora, &model, 9);
    let error = registry.lease("a").unwrap_err();
    assert!(matches!(error, RegistryError::Changed { .. }), "{error}");
    let second = registry.load("a", &folder).unwrap();
    assert_ne!(second.hash(), first.hash());
    assert_eq!(registry.lease("a").unwrap().hash(), second.hash());
}

#[test]
fn a_broken_adapter_leaves_what_was_published() {
    let (model, dir) = (base(), tempfile::tempdir().unwrap());
    let lora = &kinds()[0].1;
    let folder = write(&dir.path().join("a"), lora, &model, 1);
    let broken = write(&dir.path().join("b"), lora, &model, 2);
    let weights = broken.join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let registry = registry(&model, None);
    let good = registry.load("a", &folder).unwrap();
    let error = registry.load("a", &broken).unwrap_err().to_string();
    assert!(error.contains("`a`") && error.contains("adapter_model.safetensors"), "{error}");
    assert_eq!(registry.lease("a").unwrap().hash(), good.hash());
    // Registered unopened, it is refused on its use, and each time.
    registry.register([("b".to_string(), broken)]).unwrap();
    assert!(registry.lease("b").is_err() && registry.lease("b").is_err());
    for name in ["", "a/b", "a b", "é", &"x".repeat(129)] {
        assert!(matches!(registry.load(name, &folder), Err(RegistryError::Name(_))), "{name}");
    }
    assert!(registry.register([("c".to_string(), dir.path().join("nowhere"))]).is_err());
    assert!(!registry.contains("c"));
}
