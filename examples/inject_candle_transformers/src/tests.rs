#![allow(clippy::unwrap_used)]
use peft_core::kernels::testing::randn;
use peft_train::checkpoint::write_adapter_files;

use super::*;

#[test]
fn it_writes_through_what_is_swapped_in_and_as_before_without() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quickstart/base");
    let mut app = App::load(&base).unwrap();
    let table = serde_json::json!({"type": "lora", "r": 4, "target_modules": ["q_proj", "down_proj"]});
    let adapter = methods::create(table.as_object().unwrap(), &*app.base, 0).unwrap().adapter;
    for (i, p) in adapter.parameters().into_iter().enumerate() {
        p.set(&randn(i as u64, p.value().shape(), 0.3).unwrap()).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    write_adapter_files(&dir.path().join("odd"), &adapter).unwrap();

    let prompt = "Once upon a time there was a brave dog named Rex.";
    let plain = app.write(prompt, 16).unwrap();
    assert!(plain.len() > 20, "{plain}");
    app.swap(&dir.path().join("odd")).unwrap();
    assert_ne!(app.write(prompt, 16).unwrap(), plain);
    app.injected.swap(Vec::new()).unwrap();
    assert_eq!(app.write(prompt, 16).unwrap(), plain);
    assert!(app.swap(Path::new("/nowhere")).unwrap_err().to_string().contains("/nowhere"));
}
