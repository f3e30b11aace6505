//! What tests of the models have in common: adapters on them and gradients of one batch.

#![allow(clippy::unwrap_used)]
// Each test takes what it needs.
#![allow(dead_code)]

pub(crate) mod encoders;

use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use peft_core::kernels::testing::randn;
use peft_core::{Adapter, AdapterSet, Ctx, Parameter, Route, Segmented, StepRng};
use peft_train::checkpoint::write_adapter_files;
use peft_train::data::Batch;
use peft_train::{Checkpointing, Grads, forward_backward, methods};
use serde_json::{Value, json};

pub(crate) fn adapter(model: &impl Segmented, method: &Value) -> Adapter {
    methods::create(method.as_object().unwrap(), model, 1).unwrap().adapter
}

/// An adapter away from its start.
pub(crate) fn moved(model: &impl Segmented, method: &Value) -> Arc<Adapter> {
    let adapter = adapter(model, method);
    for (i, p) in adapter.parameters().into_iter().enumerate() {
        p.set(&(p.value() + randn(i as u64, p.value().dims().to_vec(), 0.2).unwrap()).unwrap()).unwrap();
    }
    Arc::new(adapter)
}

/// X-LoRA over `experts`, LoRA adapters whose folders are made in `dir`.
pub(crate) fn mixture(model: &impl Segmented, experts: &[Value], dir: &Path) -> Value {
    let folders = experts.iter().enumerate().map(|(i, expert)| {
        let folder = dir.join(i.to_string());
        write_adapter_files(&folder, &moved(model, expert)).unwrap();
        folder
    });
    json!({"type": "xlora", "xlora_dropout_p": 0.0, "adapters": folders.collect::<Vec<_>>()})
}

/// The gradient of each parameter.
pub(crate) fn gradients(
    model: &impl Segmented,
    adapter: &Arc<Adapter>,
    batch: &Batch,
    checkpointing: Checkpointing,
) -> Vec<Option<Tensor>> {
    let parameters: Vec<Parameter> = adapter.parameters().into_iter().cloned().collect();
    let set = AdapterSet::one("a", adapter.clone());
    let route = Route::Uniform(0);
    let ctx = Ctx::train(&set, &route, StepRng::default());
    let mut grads = Grads::new(&parameters.iter().collect::<Vec<_>>());
    let lowest = adapter.lowest_segment(model.sites()).unwrap();
    forward_backward(model, batch, &ctx, lowest, checkpointing, 1.0, &mut grads).unwrap();
    grads.into_vec()
}
