//! What holds for every method, on every kind of frozen weight: see `cases.rs` for the list, to which a further method
//! is added.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod cases;
mod model;
mod refusals;
mod table;

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::testing::{close, max_difference, randn};
use peft_core::{
    Adapter, AdapterSet, BaseModel, Ctx, Delta, Error, FrozenLinear, Parameter, PeftModule, Result, Role, Route,
    SiteAdapter, SiteModule, StepRng,
};
use peft_models::Decoder;
use peft_models::generate::{GenerateOptions, Request, generate};
use peft_train::audit::{AuditEntry, audit_gradients};
use peft_train::checkpoint::{self, TrainerState, write_adapter_files};
use peft_train::data::Batch;
use peft_train::methods::METHODS;
use peft_train::optim::{self, OptimizerKind, OptimizerOptions};
use peft_train::{Checkpointing, Grads, Keep, UpdateRule, evaluate, forward_backward, methods, opt_params};
use serde_json::{Map, Value, json};

use crate::cases::{Case, cases};
use crate::model::{KINDS, Kind, base, batch, eval, hash, logits, merged, one_task, sequence, trained};
use crate::table::{Answer, Property};

type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

fn create(method: &Value, base: &Decoder, seed: u64) -> Result<Adapter> {
    let Value::Object(table) = method else { panic!("a method is a table") };
    Ok(methods::create_on(table, base, seed, batch)?.adapter)
}

/// Runs `check` for every case on every kind of weight and lists all that fail. `CONFORMANCE_CASES=poly,ia3` runs those alone
/// whose names begin so.
fn for_all(check: impl Fn(&Case, &Decoder) -> Outcome) {
    let mut failures = Vec::new();
    let only = std::env::var("CONFORMANCE_CASES").unwrap_or_default();
    let chosen = |case: &Case| only.split(',').any(|start| case.name.starts_with(start));
    for case in cases().into_iter().filter(chosen) {
        for kind in KINDS {
            if let Err(e) = check(&case, &base(case.shape, kind)) {
                failures.push(format!("{} on {kind:?}: {e}", case.name));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

fn ensure(holds: bool, what: impl Into<String>) -> Outcome {
    if holds { Ok(()) } else { Err(what.into().into()) }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_a_trained_one_does() {
    for_all(|case, model| {
        let plain = eval(model, None)?;
        let fresh = Arc::new(create(&case.method, model, 1)?);
        let difference = max_difference(&eval(model, Some(&fresh))?, &plain)?;
        // Some starts cancel only up to rounding: PiSSA and OLoRA against what they subtract, orthogonal ones in BA, pairs of
        // reflections in HRA.
        let is = |key: &str, value: &str| case.method.get(key) == Some(&json!(value));
        let cancels = !fresh.frozen().is_empty() || is("init_lora_weights", "orthogonal") || is("type", "hra");
        let tolerance = if cancels { 4e-6 } else { 1e-6 };
        ensure(
            (difference <= tolerance) == (case.answer(Property::Fresh) == Answer::Holds),
            format!("fresh differs by {difference:.1e}"),
        )?;
        let trained = trained(create(&case.method, model, 1)?, 2)?;
        let difference = max_difference(&eval(model, Some(&trained))?, &plain)?;
        ensure(difference > 1e-3, format!("trained differs by {difference:.1e} only"))?;
        // The base is as it was.
        Ok(close("base", &eval(model, None)?, &plain, 0.0)?)
    });
}

#[test]
fn every_method_of_the_catalogue_is_tested() {
    for method in METHODS {
        let cases = cases().into_iter().filter(|case| case.catalogue_name() == method.name);
        let can: Vec<bool> = cases.map(|case| !matches!(case.answer(Property::Merged), Answer::Never(_))).collect();
        assert!(!can.is_empty(), "cases.rs has no case for {}", method.name);
        assert_eq!(can.contains(&true), method.mergeable, "{}: what the catalogue says of merging", method.name);
    }
}

#[test]
fn merged_equals_unmerged() {
    for_all(|case, model| {
        let whole = trained(create(&case.method, model, 1)?, 2)?;
        if whole.tasks().is_some() {
            let refusal = merged(model, &whole).err().map(|e| e.to_string()).unwrap_or_default();
            let says = if whole.virtual_tokens().is_some() { "virtual tokens" } else { "task" };
            ensure(refusal.contains("cannot be merged") && refusal.contains(says), format!("of no task: {refusal}"))?;
        }
        let adapter = one_task(whole)?;
        let mergeable = !matches!(case.answer(Property::Merged), Answer::Never(_));
        let merged = match merged(model, &adapter) {
            Err(e) if !mergeable => return ensure(e.to_string().contains("cannot be merged"), e.to_string()),
            merged => merged?,
        };
        ensure(mergeable, "was merged, and cases.rs says that it cannot be")?;
        Ok(close("logits", &eval(&merged, None)?, &eval(model, Some(&adapter))?, 1e-4)?)
    });
}

#[test]
fn saving_is_stable_and_loading_gives_the_same_logits() {
    for_all(|case, model| {
        let adapter = trained(create(&case.method, model, 1)?, 2)?;
        let dir = tempfile::tempdir()?;
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        write_adapter_files(&first, &adapter)?;
        let loaded = Arc::new(methods::open(&first, model)?.adapter);
        let tolerance = if case.answer(Property::Files) == Answer::Holds { 0.0 } else { 1e-5 };
        close("logits", &eval(model, Some(&loaded))?, &eval(model, Some(&adapter))?, tolerance)?;
        ensure(
            loaded.frozen().iter().all(|p| p.name() == "cpt_center"),
            "an exported file still has a start to subtract",
        )?;
        write_adapter_files(&second, &loaded)?;
        let files = ["adapter_model.safetensors", "adapter_config.json"].map(String::from);
        let of_part = files.iter().map(|file| format!("0/{file}")).filter(|file| first.join(file).exists());
        for file in files.clone().into_iter().chain(of_part) {
            let file = file.as_str();
            ensure(std::fs::read(first.join(file))? == std::fs::read(second.join(file))?, format!("{file} changed"))?;
        }
        Ok(())
    });
}

#[test]
fn a_run_that_goes_on_from_its_checkpoint_has_every_bit_of_one_that_was_not_interrupted() {
    for_all(|case, model| {
        let mut whole = Training::new(model, create(&case.method, model, 1)?)?;
        (0..2).try_for_each(|step| whole.step(step))?;
        let dir = tempfile::tempdir()?;
        let state = TrainerState { step: 2, ..TrainerState::default() };
        let folder = checkpoint::save(dir.path(), &state, &whole.run.adapter, &whole.rule, 0)?;
        // A checkpoint is itself an adapter that can be opened.
        let opened = Arc::new(methods::open(&folder, model)?.adapter);
        close("opened", &eval(model, Some(&opened))?, &eval(model, Some(&whole.run.adapter))?, 0.0)?;

        // Another seed: nothing may be left of the new start, not even a randomised PiSSA's.
        let mut resumed = Training::new(model, create(&case.method, model, 99)?)?;
        ensure(checkpoint::load(&folder, &resumed.run.adapter, &mut resumed.rule, "")? == state, "another state")?;
        (2..4).try_for_each(|step| whole.step(step).and_then(|()| resumed.step(step)))?;
        let (whole, resumed) = (whole.run.adapter, resumed.run.adapter);
        for ((name, a), (other, b)) in resumed.tensors().iter().zip(&whole.tensors()) {
            ensure(name == other, format!("{name} and {other}"))?;
            close(name, a, b, 0.0)?;
        }
        Ok(close("logits", &eval(model, Some(&resumed))?, &eval(model, Some(&whole))?, 0.0)?)
    });
}

/// Steps of AdamW, as the trainer makes them.
struct Training<'a> {
    run: Run<'a>,
    rule: UpdateRule,
}

impl<'a> Training<'a> {
    fn new(model: &'a Decoder, adapter: Adapter) -> Result<Self> {
        let optimizer = optim::build(OptimizerKind::AdamW, &OptimizerOptions::default());
        let rule = optimizer.map_err(|e| Error::msg(e.to_string()))?.into();
        Ok(Self { run: Run::new(model, Arc::new(adapter)), rule })
    }

    fn step(&mut self, step: u32) -> Outcome {
        let parameters: Vec<Parameter> = self.run.adapter.parameters().into_iter().cloned().collect();
        let grads = self.run.gradients(step, Checkpointing::Off)?;
        let UpdateRule::Gradient(optimizer) = &mut self.rule else { return Err("no optimiser".into()) };
        optimizer.step(&opt_params(&parameters, 0.01, 1.0), &grads, 1e-2)?;
        if let Some(hook) = self.run.adapter.training_hook() {
            let named = parameters.iter().zip(&grads).filter_map(|(p, g)| Some((p.name(), g.as_ref()?)));
            hook.after_step(u64::from(step), &named.collect())?;
        }
        Ok(())
    }
}

struct Run<'a> {
    model: &'a Decoder,
    set: AdapterSet,
    adapter: Arc<Adapter>,
}

impl<'a> Run<'a> {
    fn new(model: &'a Decoder, adapter: Arc<Adapter>) -> Self {
        Self { model, set: AdapterSet::one("a", adapter.clone()), adapter }
    }

    fn ctx(&self, step: u32) -> Ctx<'_> {
        let rng = StepRng { seed: 7, step, run: 0 };
        Ctx::train(&self.set, &Route::Uniform(0), rng)
    }

    fn gradients(&self, step: u32, keep: impl Into<Keep>) -> Result<Vec<Option<Tensor>>> {
        let parameters = self.adapter.parameters();
        let mut grads = Grads::new(&parameters);
        let lowest = self.adapter.lowest_segment(self.model.sites()).unwrap_or(0);
        let scale = 1.0 / batch().targets().ids.len() as f64;
        forward_backward(self.model, &batch(), &self.ctx(step), lowest, keep, scale, &mut grads)?;
        Ok(grads.into_vec())
    }

    /// The mean loss in training mode, with the masks of step 3.
    fn loss(&self) -> Result<f64> {
        let measured = evaluate(self.model, &batch(), &self.ctx(3))?;
        Ok(measured.nll / measured.counted as f64)
    }
}

/// The end of a parameter's name, which says what it is.
fn group(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    parts[parts.len().saturating_sub(2)..].join(".")
}

fn dot(a: &[Tensor], b: &[Tensor]) -> Result<f64> {
    let one = |(a, b): (&Tensor, &Tensor)| -> Result<f64> {
        Ok(a.to_dtype(DType::F64)?.mul(&b.to_dtype(DType::F64)?)?.sum_all()?.to_scalar::<f64>()?)
    };
    a.iter().zip(b).map(one).sum()
}

#[test]
fn gradients_are_those_of_the_loss_whatever_is_recomputed() {
    for_all(|case, model| {
        let run = Run::new(model, trained(create(&case.method, model, 1)?, 2)?);
        let kept_in = |records| -> Result<Vec<Tensor>> {
            let keep = |checkpointing| Keep { checkpointing, records };
            let kept = run.gradients(3, keep(Checkpointing::Off))?;
            for other in [Checkpointing::Full, Checkpointing::KeepTop(1)] {
                for ((p, a), b) in run.adapter.parameters().iter().zip(&kept).zip(run.gradients(3, keep(other))?) {
                    match (a, b) {
                        (Some(a), Some(b)) => close(&format!("{} {records:?} {other:?}", p.name()), a, &b, 0.0)?,
                        _ => return Err(Error::msg(format!("{}: no gradient", p.name()))),
                    }
                }
            }
            Ok(kept.into_iter().flatten().collect())
        };
        let (grads, rounded) = (kept_in(DType::F32)?, kept_in(DType::BF16)?);
        // Eight significant bits in what was kept and in what goes into a block: half of the last is one part in 512 each, of
        // which some cancel.
        let apart = grads.iter().zip(&rounded).map(|(a, b)| Ok((a - b)?)).collect::<Result<Vec<_>>>()?;
        let relative = (dot(&apart, &apart)? / dot(&grads, &grads)?).sqrt();
        if relative.is_nan() || relative >= 2e-2 {
            return Err(format!("records in bf16 move the gradients by {relative:.1e} of their length").into());
        }
        let mut groups: BTreeMap<String, Vec<(&Parameter, Tensor)>> = BTreeMap::new();
        let parameters = run.adapter.parameters();
        for (p, g) in parameters.into_iter().zip(grads) {
            if !case.partial_gradient.iter().any(|end| p.name().ends_with(end)) {
                groups.entry(group(p.name())).or_default().push((p, g));
            }
        }
        for (name, members) in groups {
            compare_with_differences(&run, &name, &members)?;
        }
        Ok(())
    });
}

/// Moves all parameters of a group along directions that are half gradient, half random.
fn compare_with_differences(run: &Run<'_>, name: &str, members: &[(&Parameter, Tensor)]) -> Outcome {
    const STEP: f64 = 1e-2;
    let start = members.iter().map(|(p, _)| Ok(p.value().copy()?)).collect::<Result<Vec<_>>>()?;
    let gradient: Vec<Tensor> = members.iter().map(|(_, g)| g.clone()).collect();
    let length = dot(&gradient, &gradient)?.sqrt().max(1e-12);
    for seed in 0..2 {
        let noise = members.iter().map(|(p, g)| Ok(randn(hash(p.name()) ^ seed, g.shape(), 1.0)?));
        let noise = noise.collect::<Result<Vec<_>>>()?;
        let noise_length = dot(&noise, &noise)?.sqrt();
        let direction = gradient.iter().zip(&noise);
        let direction =
            direction.map(|(g, n)| Ok(((g / length)? + (n / noise_length)?)?)).collect::<Result<Vec<_>>>()?;
        let at = |h: f64| -> Result<f64> {
            for (((p, _), s), d) in members.iter().zip(&start).zip(&direction) {
                p.set(&(s + (d * h)?)?)?;
            }
            run.loss()
        };
        let central = |h: f64| -> Result<f64> { Ok((at(h)? - at(-h)?) / (2.0 * h)) };
        // Extrapolated to h = 0: the loss curves much where singular vectors meet.
        let numeric = (4.0 * central(STEP / 2.0)? - central(STEP)?) / 3.0;
        let analytic = dot(&gradient, &direction)?;
        for ((p, _), s) in members.iter().zip(&start) {
            p.set(s)?;
        }
        let allowed = 2e-2 * numeric.abs().max(analytic.abs()) + 3e-4;
        ensure(
            (numeric - analytic).abs() <= allowed,
            format!("gradient of {name}: {analytic:.6} by backward, {numeric:.6} by differences"),
        )?;
    }
    Ok(())
}

#[test]
fn a_batch_that_mixes_adapters_equals_single_runs() {
    for_all(|case, model| {
        let partner = if case.shape.experts > 0 {
            json!({"r": 3, "target_modules": ["q_proj", "v_proj", "o_proj"], "use_dora": true, "modules_to_save": ["norm"]})
        } else if case.shape.tied {
            json!({"r": 3, "target_modules": "all-linear", "use_dora": true, "modules_to_save": ["norm"]})
        } else {
            json!({"r": 3, "target_modules": "all-linear", "use_dora": true, "modules_to_save": ["lm_head"]})
        };
        let set = AdapterSet::one("a", trained(create(&case.method, model, 1)?, 2)?)
            .with("b", trained(create(&case.method, model, 3)?, 4)?)
            .with("partner", trained(create(&partner, model, 5)?, 6)?);
        let slots = [None, Some(0), Some(1), Some(2), Some(0)];
        let batch = batch();
        let route = Route::rows(&batch.bounds, &slots);
        let mixed = logits(model, &batch, &Ctx::eval(&set, &route))?;
        for (i, slot) in slots.iter().enumerate() {
            let route = slot.map_or(Route::Base, Route::Uniform);
            let single = logits(model, &sequence(&batch, i), &Ctx::eval(&set, &route))?;
            let rows = mixed.narrow(0, batch.bounds[i], batch.bounds[i + 1] - batch.bounds[i])?;
            close(&format!("sequence {i} through {slot:?}"), &rows, &single, 1e-5)?;
        }
        Ok(())
    });
}

/// The likeliest next token by a pass over the whole text, without a cache.
fn next_token(model: &Decoder, text: &[u32], ctx: &Ctx<'_>) -> Result<u32> {
    let batch = Batch {
        input_ids: text.to_vec(),
        position_ids: (0..text.len() as u32).collect(),
        bounds: vec![0, text.len()],
        ..Batch::default()
    };
    let logits = logits(model, &batch, ctx)?;
    Ok(logits.narrow(0, text.len() - 1, 1)?.argmax(1)?.to_vec1::<u32>()?[0])
}

#[test]
fn writing_with_a_cache_equals_passes_over_the_whole_text() {
    for_all(|case, model| {
        let set = AdapterSet::one("a", one_task(trained(create(&case.method, model, 1)?, 2)?)?)
            .with("b", one_task(trained(create(&case.method, model, 3)?, 4)?)?);
        let requests: Vec<Request> = [(None, 4), (Some(1), 1), (Some(0), 6), (Some(1), 3)]
            .map(|(slot, n)| Request { prompt: (0..n).map(|i| (i * 7 + n) % 48).collect(), slot })
            .to_vec();
        let options = GenerateOptions { max_new_tokens: 5, ..GenerateOptions::default() };
        let written = generate(model, &set, &requests, &options, |_, _| true)?;
        let looks_ahead = case.answer(Property::Written) != Answer::Holds;
        for (request, written) in requests.iter().zip(written) {
            let route = request.slot.map_or(Route::Base, Route::Uniform);
            let mut text = request.prompt.clone();
            ensure(written.len() == 5, "it ended early")?;
            let compared = if looks_ahead && request.slot.is_some() { 1 } else { written.len() };
            for token in written.into_iter().take(compared) {
                let expected = next_token(model, &text, &Ctx::eval(&set, &route))?;
                ensure(
                    token == expected,
                    format!("{:?} after {} tokens: {token}, not {expected}", request.slot, text.len()),
                )?;
                text.push(token);
            }
        }
        Ok(())
    });
}

/// `method` with its dropout off, where it or a part of it has some.
fn without_dropout(method: &Value) -> Option<Value> {
    let mut without = method.clone();
    let mut found = false;
    let mut off = |table: &mut Value| {
        // PEFT counts dropout among a classifier's layers, so that without any they are called otherwise.
        let off =
            ["lora_dropout", "dropout", "adapter_dropout", "stochastic_depth", "dropout_prob"].map(|key| (key, 0.0));
        for (key, other) in off.into_iter().chain([("xlora_dropout_p", 0.1)]) {
            if let Some(p) = table.get_mut(key).filter(|p| p.as_f64().is_some_and(|p| p > 0.0)) {
                *p = json!(other);
                found = true;
            }
        }
    };
    off(&mut without);
    without.get_mut("methods").and_then(Value::as_array_mut).into_iter().flatten().for_each(off);
    found.then_some(without)
}

#[test]
fn dropout_acts_in_training_only_and_repeats() {
    for_all(|case, model| {
        let adapter = trained(create(&case.method, model, 1)?, 2)?;
        let run = Run::new(model, adapter.clone());
        let train = |step| logits(model, &batch(), &run.ctx(step).untracked());
        let still = eval(model, Some(&adapter))?;
        close("same step", &train(0)?, &train(0)?, 0.0)?;
        // Poly draws the weights of its skills.
        if case.method.get("type") == Some(&json!("poly")) {
            ensure(max_difference(&train(0)?, &still)? > 1e-4, "nothing is drawn in training")?;
            return ensure(max_difference(&train(0)?, &train(1)?)? > 1e-4, "two steps draw the same");
        }
        let Some(without) = without_dropout(&case.method) else {
            return Ok(close("training without dropout", &train(0)?, &still, 1e-5)?);
        };
        ensure(max_difference(&train(0)?, &still)? > 1e-3, "no dropout in training")?;
        ensure(max_difference(&train(0)?, &train(1)?)? > 1e-3, "two steps share a mask")?;
        let without = trained(create(&without, model, 1)?, 2)?;
        Ok(close("evaluation", &still, &eval(model, Some(&without))?, 0.0)?)
    });
}

/// As the trainer does on its first step.
fn audit(run: &Run<'_>) -> Outcome {
    let grads = run.gradients(3, Checkpointing::Full)?;
    let parameters = run.adapter.parameters();
    let entries = parameters.iter().zip(&grads).map(|(p, g)| AuditEntry {
        name: p.name(),
        grad: g.as_ref(),
        allow_zero: p.role() == Role::ZeroAtStart,
    });
    Ok(audit_gradients(entries)?)
}

#[test]
fn every_fresh_adapter_passes_the_gradient_audit() {
    for_all(|case, model| audit(&Run::new(model, Arc::new(create(&case.method, model, 1)?))));
}

/// A method with the mistake that the audit is for: its forward pass cuts the graph.
#[derive(Debug)]
struct Broken {
    weight: Parameter,
}

impl PeftModule for Broken {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let weight = self.weight.get(ctx).detach();
        Ok((base.base(x)? + peft_core::kernels::trainable_linear(x, &weight)?)?)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.weight]
    }

    fn delta(&self, _: &FrozenLinear) -> Result<Delta> {
        Ok(Delta::Add { weight: self.weight.value(), bias: None })
    }

    fn lower(&self, _: &FrozenLinear) -> Result<Option<peft_core::kernels::ServingForm>> {
        Ok(None)
    }
}

#[test]
fn the_audit_names_a_parameter_that_a_module_detaches() {
    let model = base(Default::default(), Kind::F32);
    for (path, alone) in [("model.layers.0.self_attn.q_proj", true), ("model.layers.1.mlp.up_proj", false)] {
        let table = json!({"r": 2, "target_modules": ["v_proj"]});
        let mut adapter =
            if alone { Adapter::new(Map::new(), model.sites()) } else { create(&table, &model, 1).unwrap() };
        let site = model.sites().find(path).unwrap();
        let peft_core::SiteKind::Linear { in_features, out_features, .. } = site.kind else { panic!("{path}") };
        let value = randn(1, (out_features, in_features), 0.1).unwrap();
        let weight = Parameter::new(format!("{path}.broken"), &value, Role::Plain).unwrap();
        let module = SiteModule::Linear(Arc::new(Broken { weight }));
        adapter.insert(site.id, SiteAdapter::new(Some(module), None)).unwrap();
        let text = audit(&Run::new(&model, Arc::new(adapter))).unwrap_err().to_string();
        assert!(text.contains(&format!("{path}.broken")) && text.contains("no backward pass"), "{text}");
        assert!(!text.contains("lora_"), "{text}");
    }
}

/// PEFT's own conversion: `lora_A = [A; A₀]`, `lora_B = [B, −B₀]`, twice the rank, the same scale.
#[test]
fn a_subtracted_start_is_exported_as_a_plain_lora() {
    let model = base(Default::default(), Kind::F32);
    let method = json!({"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": "pissa",
        "rank_pattern": {"layers.1.self_attn.q_proj": 2}});
    let adapter = trained(create(&method, &model, 1).unwrap(), 2).unwrap();
    let (config, tensors) = adapter.exported().unwrap();
    assert_eq!(config["init_lora_weights"], json!(true));
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(6), &json!(12)));
    assert_eq!(config["rank_pattern"], json!({"layers.1.self_attn.q_proj": 4}));
    let state: BTreeMap<String, Tensor> = adapter.tensors().into_iter().collect();
    for (name, value) in &tensors {
        let rank = if name.contains("layers.1") { 2 } else { 3 };
        let dim = usize::from(name.contains("lora_B"));
        let initial = &state[&name.replace(".weight", "_initial.weight")];
        let initial = if dim == 1 { initial.neg().unwrap() } else { initial.clone() };
        close(name, &value.narrow(dim, 0, rank).unwrap(), &state[name], 0.0).unwrap();
        close(name, &value.narrow(dim, rank, rank).unwrap(), &initial, 0.0).unwrap();
    }
    assert_eq!((tensors.len(), state.len()), (4, 8));
}

/// Components of all layers compete for the sum of all ranks; layers that read the same tensor have the same directions.
#[test]
fn eva_moves_ranks_and_keeps_their_sum() {
    let model = base(Default::default(), Kind::F32);
    let eva = |config: Value| {
        let method = json!({"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": "eva",
            "eva_config": config});
        let adapter = Arc::new(create(&method, &model, 1).unwrap());
        let a = adapter.tensors().into_iter().filter(|(name, _)| name.ends_with("lora_A.weight"));
        (a.collect::<BTreeMap<String, Tensor>>(), adapter)
    };
    let (moved, adapter) = eva(json!({"rho": 1.5}));
    let ranks: Vec<usize> = moved.values().map(|a| a.dim(0).unwrap()).collect();
    assert_eq!(ranks.iter().sum::<usize>(), 14 * 4);
    assert!(ranks.iter().all(|r| *r <= 6) && ranks.iter().any(|r| *r != 4), "{ranks:?}");
    for (name, a) in &moved {
        let (path, r) =
            (name.trim_start_matches("base_model.model.").trim_end_matches(".lora_A.weight"), a.dim(0).unwrap());
        if r != 4 {
            assert_eq!(adapter.config["rank_pattern"][path], json!(r));
            assert_eq!(adapter.config["alpha_pattern"][path], json!(r as f64 * 1.5), "{path}");
        }
        let gram = a.matmul(&a.t().unwrap()).unwrap();
        close(name, &gram, &Tensor::eye(r, DType::F32, &Device::Cpu).unwrap(), 1e-4).unwrap();
    }

    let (still, adapter) = eva(json!({"rho": 1.0}));
    assert!(still.values().all(|a| a.dim(0).unwrap() == 4));
    assert_eq!(adapter.config["rank_pattern"], json!({}));
    let at = |name: &str| &still[&format!("base_model.model.model.layers.1.{name}.lora_A.weight")];
    close("q and v", at("self_attn.q_proj"), at("self_attn.v_proj"), 0.0).unwrap();
    assert!(max_difference(at("self_attn.q_proj"), at("mlp.up_proj")).unwrap() > 1e-2);

    let table = json!({"init_lora_weights": "eva", "target_modules": "all-linear"});
    let e = methods::create(table.as_object().unwrap(), &model, 1).unwrap_err().to_string();
    assert!(e.contains("training data"), "{e}");
}
