//! Combined adapters, read back as a LoRA, beside sums of whole matrices in `f64`.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Arc;

use peft_core::kernels::FrozenWeight;
use peft_core::kernels::testing::randn;
use peft_core::{
    AdapterConfig, AdapterFolder, BaseLayer, FrozenEmbedding, FrozenLinear, SiteId, SiteKind, SiteTable, write_adapter,
};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

const Q: &str = "model.layers.0.self_attn.q_proj";
const UP: &str = "model.layers.0.mlp.up_proj";
const TABLE: &str = "model.embed_tokens";

/// A model of two linear layers and a table.
struct Toy {
    sites: Arc<SiteTable>,
    linear: Vec<FrozenLinear>,
    table: FrozenEmbedding,
}

const SHAPES: [(&str, (usize, usize)); 2] = [(Q, (7, 5)), (UP, (9, 5))];
const VOCAB: (usize, usize) = (11, 5);

impl Toy {
    fn new() -> Self {
        let mut sites = SiteTable::new();
        let mut linear = Vec::new();
        for (i, (path, (out, inp))) in SHAPES.into_iter().enumerate() {
            let id = sites.register(path, SiteKind::Linear { in_features: inp, out_features: out, bias: false }, 1);
            let weight = FrozenWeight::dense(&randn(100 + i as u64, (out, inp), 0.5).unwrap()).unwrap();
            linear.push(FrozenLinear::new(id, path, weight, None).unwrap());
        }
        let id = sites.register(TABLE, SiteKind::Embedding { vocab: VOCAB.0, dim: VOCAB.1 }, 0);
        let table = FrozenWeight::dense(&randn(99, VOCAB, 0.5).unwrap()).unwrap();
        Self { sites: Arc::new(sites), linear, table: FrozenEmbedding::new(id, TABLE, table, DType::F32) }
    }

    /// `[out, in]`, or the table's transpose.
    fn weight(&self, path: &str) -> Tensor {
        source::weight_of(self, path).unwrap().to_dtype(DType::F64).unwrap()
    }
}

impl BaseModel for Toy {
    fn sites(&self) -> &Arc<SiteTable> {
        &self.sites
    }
    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>> {
        Ok(self.linear.get(site.index()).map_or(BaseLayer::Embedding(&self.table), BaseLayer::Linear))
    }
    fn model_type(&self) -> &str {
        "toy"
    }
    fn device(&self) -> &Device {
        &Device::Cpu
    }
    fn dtype(&self) -> DType {
        DType::F32
    }
    fn tied_embedding(&self) -> Option<&str> {
        None
    }
}

/// A LoRA folder with random factors, at `sites` of the toy or of other shapes.
struct Lora {
    _dir: tempfile::TempDir,
    files: AdapterFolder,
}

#[derive(Clone)]
struct Site {
    path: String,
    out: usize,
    inp: usize,
    r: usize,
}

fn site(path: &str, r: usize) -> Site {
    let (out, inp) = SHAPES.iter().find(|(p, _)| *p == path).map_or((VOCAB.1, VOCAB.0), |(_, s)| *s);
    Site { path: path.to_owned(), out, inp, r }
}

/// Keys of the config over `{"peft_type": "LORA"}`; ranks come from the sites.
fn lora(seed: u64, sites: &[Site], config: Value) -> Lora {
    let mut map = Map::from_iter([("peft_type".to_owned(), Value::from("LORA"))]);
    let ranks: Map<String, Value> = sites.iter().map(|s| (s.path.clone(), s.r.into())).collect();
    map.insert("rank_pattern".into(), ranks.into());
    map.insert("target_modules".into(), sites.iter().map(|s| s.path.clone()).collect::<Vec<_>>().into());
    map.extend(config.as_object().unwrap().clone());
    let flag = |key: &str| map.get(key) == Some(&Value::Bool(true));
    let mut tensors = Vec::new();
    for (i, s) in sites.iter().enumerate() {
        let seed = seed * 1000 + 10 * i as u64;
        let (a, b) =
            if s.path == TABLE { ("lora_embedding_A", "lora_embedding_B") } else { ("lora_A.weight", "lora_B.weight") };
        tensors.push((parameter_name(&s.path, a), randn(seed, (s.r, s.inp), 0.6).unwrap()));
        tensors.push((parameter_name(&s.path, b), randn(seed + 1, (s.out, s.r), 0.6).unwrap()));
        if flag("use_dora") {
            let magnitude = (randn(seed + 2, s.out, 0.2).unwrap() + 1.3).unwrap();
            tensors.push((parameter_name(&s.path, "lora_magnitude_vector"), magnitude));
        }
        if flag("lora_bias") {
            tensors.push((parameter_name(&s.path, "lora_B.bias"), randn(seed + 3, s.out, 0.6).unwrap()));
        }
    }
    written(map, &tensors)
}

fn written(map: Map<String, Value>, tensors: &[(String, Tensor)]) -> Lora {
    let dir = tempfile::tempdir().unwrap();
    write_adapter(dir.path(), &AdapterConfig::new(map).unwrap(), tensors.iter().map(|(k, t)| (k.as_str(), t))).unwrap();
    let files = AdapterFolder::open(dir.path()).unwrap();
    Lora { _dir: dir, files }
}

/// The result as files.
fn reopened(combined: &Combined) -> Lora {
    written(combined.config.clone(), &combined.tensors)
}

/// What a LoRA folder makes of a weight, less the weight, by the formulas of PEFT's `lora/layer.py` and `lora/dora.py`.
fn delta(files: &AdapterFolder, path: &str, base: &Toy) -> Option<Tensor> {
    let low_rank = low_rank(files, path)?;
    let Some(g) = gain(files, path, base) else { return Some(low_rank) };
    let w = base.weight(path);
    Some(((&w + low_rank).unwrap().broadcast_mul(&g.unsqueeze(1).unwrap()).unwrap() - w).unwrap())
}

fn get(files: &AdapterFolder, path: &str, suffix: &str) -> Option<Tensor> {
    let key = parameter_name(path, suffix);
    files.contains(&key).then(|| files.tensor(&key, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap())
}

fn low_rank(files: &AdapterFolder, path: &str) -> Option<Tensor> {
    let a = get(files, path, "lora_A.weight").or_else(|| get(files, path, "lora_embedding_A"))?;
    let b = get(files, path, "lora_B.weight").or_else(|| get(files, path, "lora_embedding_B"))?;
    Some((b.matmul(&a).unwrap() * LoraConfigOf(files).scale(path, a.dim(0).unwrap())).unwrap())
}

/// What DoRA multiplies each output with.
fn gain(files: &AdapterFolder, path: &str, base: &Toy) -> Option<Tensor> {
    let m = get(files, path, "lora_magnitude_vector")?;
    let sum = (base.weight(path) + low_rank(files, path)?).unwrap();
    Some((m / sum.sqr().unwrap().sum(1).unwrap().sqrt().unwrap()).unwrap())
}

/// How much of an output of the base is left, at least: of `1 + Σ wᵢ(gᵢ − 1)`.
fn least_left(loras: &[(f64, &Lora)], path: &str, base: &Toy) -> f64 {
    let terms = loras.iter().filter_map(|(w, l)| Some(((gain(&l.files, path, base)? - 1.0).unwrap() * *w).unwrap()));
    let sum = terms.reduce(|sum, term| (sum + term).unwrap());
    sum.map_or(1.0, |sum| (sum + 1.0).unwrap().abs().unwrap().min_all().unwrap().to_scalar().unwrap())
}

struct LoraConfigOf<'a>(&'a AdapterFolder);

impl LoraConfigOf<'_> {
    fn scale(&self, path: &str, r: usize) -> f64 {
        let map = self.0.config().map();
        let own = map.get("alpha_pattern").and_then(|p| p.get(path)).or_else(|| map.get("lora_alpha"));
        let alpha = own.and_then(Value::as_f64).unwrap_or(8.0);
        if map.get("use_rslora") == Some(&Value::Bool(true)) { alpha / (r as f64).sqrt() } else { alpha / r as f64 }
    }
}

fn wanted(loras: &[(f64, &Lora)], path: &str, base: &Toy) -> Tensor {
    let terms = loras.iter().filter_map(|(w, l)| Some((delta(&l.files, path, base)? * *w).unwrap()));
    terms.reduce(|sum, term| (sum + term).unwrap()).unwrap()
}

fn norm(t: &Tensor) -> f64 {
    t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

/// How far the result is from the sum, as a share of it, at one site.
fn apart_from(result: &Lora, loras: &[(f64, &Lora)], path: &str, base: &Toy) -> f64 {
    let wanted = wanted(loras, path, base);
    norm(&(delta(&result.files, path, base).unwrap() - &wanted).unwrap()) / norm(&wanted).max(1e-9)
}

fn sources<'a>(loras: &[(f64, &'a Lora)], base: Option<&'a dyn BaseModel>) -> Result<Vec<Source<'a>>> {
    let names = ["A", "B", "C", "D"];
    loras.iter().zip(names).map(|((w, l), name)| Source::of_folder(name, *w, &l.files, base)).collect()
}

fn run(loras: &[(f64, &Lora)], options: CombineOptions, base: Option<&Toy>) -> Result<Combined> {
    let base = base.map(|b| b as &dyn BaseModel);
    combine(&sources(loras, base)?, &options, base)
}

/// Ranks and seeds of which the sum's small factor is one that nalgebra alone decomposes 1.3 % wrong.
#[test]
fn a_sum_that_is_combined_again_is_itself() {
    let toy = Toy::new();
    let of = |seed, ranks: [usize; 2], config| lora(seed, &[site(Q, ranks[0]), site(UP, ranks[1])], config);
    let a = of(557, [1, 2], json!({"lora_alpha": 12, "use_rslora": true, "alpha_pattern": {Q: 3.5}}));
    let b = of(558, [1, 6], json!({"lora_alpha": 13, "use_rslora": false, "alpha_pattern": {Q: 3.5}}));
    let linear = || CombineOptions::new(CombineType::Linear);
    let weighted = [(1.773_454_678_549_892, &a), (0.096_735_668_464_064_62, &b)];
    let result = reopened(&run(&weighted, linear(), None).unwrap());
    let again = reopened(&run(&[(1.0, &result)], linear(), None).unwrap());
    for path in [Q, UP] {
        assert!(apart_from(&result, &weighted, path, &toy) < 2e-6);
        assert!(apart_from(&again, &[(1.0, &result)], path, &toy) < 2e-6);
    }
}

fn exact() -> [CombineOptions; 3] {
    let svd = CombineOptions { rank: Some(RankRule::Fixed(12)), ..CombineOptions::new(CombineType::Svd) };
    [CombineOptions::new(CombineType::Cat), CombineOptions::new(CombineType::Linear), svd]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Unequal ranks, rsLoRA, patterns of alpha, sites of some adapters only, weights below zero, ranks beyond the shape.
    #[test]
    fn sums_are_exact(
        ranks in proptest::collection::vec(proptest::collection::vec(0usize..8, 3), 1..4),
        weights in proptest::collection::vec(-2.0f64..2.0, 3),
        rslora in any::<bool>(),
        alpha in 1u32..20,
        seed in 0u64..1000,
    ) {
        let toy = Toy::new();
        let mut loras = Vec::new();
        for (i, ranks) in ranks.iter().enumerate() {
            let sites: Vec<Site> = [Q, UP, TABLE].iter().zip(ranks).filter(|(_, r)| **r > 0).map(|(p, r)| site(p, *r)).collect();
            prop_assume!(!sites.is_empty());
            let config = json!({"lora_alpha": alpha + i as u32, "use_rslora": rslora == (i % 2 == 0), "alpha_pattern": {Q: 3.5}});
            loras.push(lora(seed + i as u64, &sites, config));
        }
        let weighted: Vec<(f64, &Lora)> = weights.iter().copied().zip(&loras).collect();
        for options in exact() {
            let combined = run(&weighted, options, None).unwrap();
            let result = reopened(&combined);
            for site in &combined.sites {
                let apart = apart_from(&result, &weighted, &site.path, &toy);
                prop_assert!(apart < 2e-6, "{:?} {}: {apart}", options.kind, site.path);
                prop_assert!(site.relative_error() < 1e-6);
            }
            // The result is a LoRA like any other: alone with the weight 1 it is itself.
            let again = reopened(&run(&[(1.0, &result)], CombineOptions::new(CombineType::Linear), None).unwrap());
            for site in &combined.sites {
                prop_assert!(apart_from(&again, &[(1.0, &result)], &site.path, &toy) < 2e-6);
            }
        }
    }

    /// DoRA with DoRA and with plain LoRA, on layers and tables, is a DoRA that is exact.
    #[test]
    fn sums_of_dora_are_exact(weights in proptest::collection::vec(0.1f64..1.0, 3), seed in 0u64..1000, ranks in proptest::collection::vec(1usize..5, 3)) {
        let toy = Toy::new();
        let a = lora(seed, &[site(Q, ranks[0]), site(TABLE, 2)], json!({"use_dora": true, "lora_alpha": 5}));
        let b = lora(seed + 1, &[site(Q, ranks[1]), site(UP, 2)], json!({"use_dora": true, "use_rslora": true}));
        let c = lora(seed + 2, &[site(UP, ranks[2]), site(TABLE, 1)], json!({"lora_alpha": 3}));
        let weighted = [(weights[0], &a), (weights[1], &b), (weights[2], &c)];
        // Others are refused (below).
        prop_assume!([Q, UP, TABLE].iter().all(|path| least_left(&weighted, path, &toy) > 1e-6));
        for options in exact() {
            let combined = run(&weighted, options, Some(&toy)).unwrap();
            prop_assert_eq!(&combined.config["use_dora"], &json!(true));
            let result = reopened(&combined);
            for path in [Q, UP, TABLE] {
                let apart = apart_from(&result, &weighted, path, &toy);
                prop_assert!(apart < 5e-6, "{:?} {path}: {apart}", options.kind);
            }
        }
    }
}

/// Half of an output's length, twice: nothing of the base's own is left.
#[test]
fn a_dora_cannot_take_an_output_away() {
    let toy = Toy::new();
    let a = lora(3, &[site(Q, 2)], json!({"use_dora": true}));
    let lengths =
        (toy.weight(Q) + low_rank(&a.files, Q).unwrap()).unwrap().sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
    let key = parameter_name(Q, "lora_magnitude_vector");
    let tensor = |name: &String| match *name == key {
        true => (&lengths * 0.5).unwrap().to_dtype(DType::F32).unwrap(),
        false => a.files.tensor(name, &Device::Cpu).unwrap(),
    };
    let names = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"].map(|suffix| parameter_name(Q, suffix));
    let tensors: Vec<(String, Tensor)> = names.iter().map(|name| (name.clone(), tensor(name))).collect();
    let halved = written(a.files.config().map().clone(), &tensors);
    assert!(least_left(&[(2.0, &halved)], Q, &toy) < 1e-6);
    let e = run(&[(2.0, &halved)], CombineOptions::new(CombineType::Linear), Some(&toy)).unwrap_err();
    assert!(e.to_string().contains("take away an output"), "{e}");
    assert!(run(&[(1.0, &halved)], CombineOptions::new(CombineType::Linear), Some(&toy)).is_ok());
}

/// Eckart–Young: the rest of the singular values is the smallest error that the rank has, and it is what is reported.
#[test]
fn a_given_rank_is_the_best_of_that_rank() {
    let toy = Toy::new();
    let (a, b) = (lora(1, &[site(UP, 3)], json!({})), lora(2, &[site(UP, 2)], json!({"lora_alpha": 3})));
    let weighted = [(0.7, &a), (-0.4, &b)];
    let all = crate::linalg::svd(&wanted(&weighted, UP, &toy), 5).unwrap().s;
    for rank in 1..=5 {
        let options = CombineOptions { rank: Some(RankRule::Fixed(rank)), ..CombineOptions::new(CombineType::Svd) };
        let combined = run(&weighted, options, None).unwrap();
        let apart = apart_from(&reopened(&combined), &weighted, UP, &toy);
        let least = (all[rank..].iter().map(|s| s * s).sum::<f64>() / all.iter().map(|s| s * s).sum::<f64>()).sqrt();
        assert!((apart - least).abs() < 1e-5, "{rank}: {apart} {least}");
        assert!((combined.relative_error() - least).abs() < 1e-5, "{rank}: {} {least}", combined.relative_error());
        assert_eq!(combined.config["r"], rank);
        // The rank that an error asks for is that rank.
        let within = CombineOptions { rank: Some(RankRule::WithinError(least + 1e-6)), ..options };
        assert_eq!(run(&weighted, within, None).unwrap().sites[0].rank, rank);
    }
    // PEFT's rank, the largest, where none is given.
    assert_eq!(run(&weighted, CombineOptions::new(CombineType::Svd), None).unwrap().config["r"], 3);
}

#[test]
fn ranks_add_up_or_are_the_smallest() {
    let (a, b) = (lora(1, &[site(Q, 2), site(UP, 3)], json!({})), lora(2, &[site(UP, 4)], json!({})));
    let cat = run(&[(1.0, &a), (1.0, &b)], CombineOptions::new(CombineType::Cat), None).unwrap();
    assert_eq!((&cat.config["r"], &cat.config["lora_alpha"]), (&json!(7), &json!(7)));
    assert_eq!((&cat.config["rank_pattern"], &cat.config["alpha_pattern"]), (&json!({Q: 2}), &json!({Q: 2})));
    // An adapter and itself, taken away again: one direction of zeros.
    let linear = CombineOptions::new(CombineType::Linear);
    let twice = run(&[(1.0, &a), (0.5, &a)], linear, None).unwrap();
    assert_eq!(twice.sites.iter().map(|s| s.rank).collect::<Vec<_>>(), [3, 2]);
    let nothing = run(&[(1.0, &a), (-1.0, &a)], linear, None).unwrap();
    assert!(nothing.sites.iter().all(|s| s.rank == 1 && s.error <= 1e-12), "{:?}", nothing.sites);
    assert_eq!(nothing.relative_error(), 0.0);
}

/// TIES and pruning on whole changes beside a dense reference that sorts.
#[test]
fn elements_are_those_of_whole_changes() {
    let toy = Toy::new();
    let (a, b) =
        (lora(1, &[site(Q, 2)], json!({"lora_alpha": 3})), lora(2, &[site(Q, 3)], json!({"use_rslora": true})));
    let weighted = [(0.7, &a), (1.4, &b)];
    let pruned: Vec<Vec<f64>> = weighted
        .iter()
        .map(|(_, l)| {
            let mut x: Vec<f64> = delta(&l.files, Q, &toy).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let mut sorted: Vec<f64> = x.iter().map(|v| v.abs()).collect();
            sorted.sort_by(|p, q| q.total_cmp(p));
            // int(0.3 · 35) = 10 stay
            x.iter_mut().for_each(|v| *v *= f64::from(v.abs() >= sorted[9]));
            x
        })
        .collect();
    let elementwise = |f: &dyn Fn(f64, f64) -> f64| -> Tensor {
        let values: Vec<f64> = pruned[0].iter().zip(&pruned[1]).map(|(x, y)| f(*x, *y)).collect();
        Tensor::from_vec(values, (7, 5), &Device::Cpu).unwrap()
    };
    let ties = |x: f64, y: f64| {
        let sign = if x + y >= 0.0 { 1.0 } else { -1.0 };
        let kept: Vec<f64> = [(0.7, x), (1.4, y)].iter().filter(|(_, v)| v * sign > 0.0).map(|(w, v)| w * v).collect();
        kept.iter().sum::<f64>() / kept.len().max(1) as f64
    };
    for (kind, reference) in [
        (CombineType::Ties { of_whole: false }, elementwise(&ties)),
        (CombineType::MagnitudePrune { of_whole: true }, elementwise(&|x, y| 0.7 * x + 1.4 * y)),
    ] {
        let options = CombineOptions { rank: Some(RankRule::Fixed(5)), density: 0.3, ..CombineOptions::new(kind) };
        let result = reopened(&run(&weighted, options, None).unwrap());
        let apart = norm(&(delta(&result.files, Q, &toy).unwrap() - &reference).unwrap()) / norm(&reference);
        assert!(apart < 1e-5, "{kind:?}: {apart}");
    }
    let dare = CombineOptions { density: 0.3, ..CombineOptions::new(CombineType::DareTies { of_whole: false }) };
    let values = |seed| {
        delta(&reopened(&run(&weighted, CombineOptions { seed, ..dare }, None).unwrap()).files, Q, &toy).unwrap()
    };
    let list = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    assert_eq!(list(values(1)), list(values(1)));
    assert_ne!(list(values(1)), list(values(2)));
}

/// `B` and `A` apart, each scaled by the root: PEFT's own numbers, with the terms of no adapter.
#[test]
fn factors_apart_where_peft_is_asked_for() {
    let toy = Toy::new();
    let (a, b) = (lora(1, &[site(Q, 2)], json!({"lora_alpha": 3})), lora(2, &[site(Q, 2)], json!({})));
    let options = CombineOptions { peft_compatible: true, ..CombineOptions::new(CombineType::Linear) };
    let result = reopened(&run(&[(0.7, &a), (-0.4, &b)], options, None).unwrap());
    let get = |l: &Lora, suffix| l.files.tensor(&parameter_name(Q, suffix), &Device::Cpu).unwrap();
    let root = |x: f64| x.abs().sqrt();
    let sum = |suffix, sign: f64| {
        let (x, y) = (get(&a, suffix) * root(0.7 * 1.5), get(&b, suffix) * (sign * root(0.4 * 4.0)));
        (x.unwrap() + y.unwrap()).unwrap()
    };
    let wanted = sum("lora_B.weight", 1.0).matmul(&sum("lora_A.weight", -1.0)).unwrap().to_dtype(DType::F64).unwrap();
    let got = delta(&result.files, Q, &toy).unwrap();
    assert!(norm(&(got - &wanted).unwrap()) < 1e-6 * norm(&wanted));
    let c = lora(3, &[site(Q, 3)], json!({}));
    let error = run(&[(0.7, &a), (0.4, &c)], options, None).unwrap_err().to_string();
    assert!(error.contains("equal ranks") && error.contains(Q), "{error}");
}

#[test]
fn biases_of_b_are_summed_with_their_scales() {
    let a = lora(1, &[site(Q, 2)], json!({"lora_bias": true, "lora_alpha": 3}));
    let b = lora(2, &[site(Q, 4), site(UP, 1)], json!({}));
    let combined = run(&[(0.5, &a), (2.0, &b)], CombineOptions::new(CombineType::Linear), None).unwrap();
    assert_eq!(combined.config["lora_bias"], true);
    let get = |path| {
        let key = parameter_name(path, "lora_B.bias");
        combined.tensors.iter().find(|(k, _)| *k == key).unwrap().1.to_vec1::<f32>().unwrap()
    };
    let own = a.files.tensor(&parameter_name(Q, "lora_B.bias"), &Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
    for (got, own) in get(Q).iter().zip(own) {
        assert!((got - 0.5 * 1.5 * own).abs() < 1e-6);
    }
    assert_eq!(get(UP), [0.0; 9]);
    let table = lora(3, &[site(TABLE, 1)], json!({}));
    let error = run(&[(1.0, &a), (1.0, &table)], CombineOptions::new(CombineType::Cat), None).unwrap_err().to_string();
    assert!(error.contains(TABLE), "{error}");
}

#[test]
fn what_cannot_be_combined_is_named() {
    let toy = Toy::new();
    let a = lora(1, &[site(Q, 2)], json!({}));
    let linear = CombineOptions::new(CombineType::Linear);
    let fails = |loras: &[(f64, &Lora)], options: CombineOptions, base: Option<&Toy>, names: &[&str]| {
        let error = run(loras, options, base).unwrap_err().to_string();
        names.iter().for_each(|name| assert!(error.contains(name), "`{name}` is not in {error}"));
    };
    let wider = lora(2, &[Site { inp: 6, ..site(Q, 2) }], json!({}));
    fails(&[(1.0, &a), (1.0, &wider)], linear, None, &[Q, "A", "B", "[7, 5]", "[7, 6]"]);
    fails(&[(1.0, &wider)], linear, Some(&toy), &[Q, "[7, 5]"]);
    let bare = lora(2, &[Site { path: "layers.0.self_attn.q_proj".into(), ..site(Q, 2) }], json!({}));
    fails(&[(1.0, &a), (1.0, &bare)], linear, None, &["layers.0.self_attn.q_proj", Q]);
    fails(&[(1.0, &bare)], linear, Some(&toy), &["has no such module", Q]);
    let dora = lora(2, &[site(Q, 2)], json!({"use_dora": true}));
    fails(&[(1.0, &a), (1.0, &dora)], linear, None, &["B", "use_dora", "--model"]);
    let compatible = CombineOptions { peft_compatible: true, ..linear };
    fails(&[(1.0, &a), (1.0, &dora)], compatible, Some(&toy), &["use_dora"]);
    let wrong_rank = lora(2, &[site(Q, 3)], json!({"rank_pattern": {}, "r": 2}));
    fails(&[(1.0, &wrong_rank)], linear, None, &[Q, "rank 3", "says 2"]);
    let pissa = lora(2, &[site(Q, 3)], json!({"init_lora_weights": "pissa"}));
    fails(&[(1.0, &pissa)], linear, None, &["init_lora_weights"]);
    let experts = lora(2, &[site(Q, 3)], json!({"target_parameters": ["mlp.experts"]}));
    fails(&[(1.0, &experts)], linear, None, &["target_parameters"]);
    let classes = lora(2, &[site(Q, 2)], json!({"task_type": "SEQ_CLS"}));
    let text = lora(3, &[site(Q, 2)], json!({"task_type": "CAUSAL_LM"}));
    fails(&[(1.0, &classes), (1.0, &text)], linear, None, &["task_type", "SEQ_CLS", "CAUSAL_LM"]);
    let ranked = CombineOptions { rank: Some(RankRule::Fixed(2)), ..CombineOptions::new(CombineType::Cat) };
    fails(&[(1.0, &a)], ranked, None, &["cat"]);
    fails(&[(1.0, &a)], CombineOptions { density: 0.0, ..linear }, None, &["density"]);

    let config = json!({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}).as_object().unwrap().clone();
    let of = |a: Tensor, b: Option<Tensor>, more: &str| {
        let mut tensors = vec![(parameter_name(Q, "lora_A.weight"), a)];
        tensors.extend(b.map(|b| (parameter_name(Q, "lora_B.weight"), b)));
        if !more.is_empty() {
            tensors.push((parameter_name(Q, more), randn(5, 3, 1.0).unwrap()));
        }
        written(config.clone(), &tensors)
    };
    let (good_a, good_b) = (randn(1, (2, 5), 1.0).unwrap(), randn(2, (7, 2), 1.0).unwrap());
    fails(&[(1.0, &of(good_a.clone(), None, ""))], linear, None, &["lora_A.weight", "no `", "lora_B.weight"]);
    fails(&[(1.0, &of(good_a.clone(), Some(randn(2, (7, 3), 1.0).unwrap()), ""))], linear, None, &["[7, 3]"]);
    fails(&[(1.0, &of(good_a.clone(), Some(good_b.clone()), "lora_E"))], linear, None, &["lora_E"]);
    fails(&[(1.0, &of(good_a.clone(), Some(good_b.clone()), "lora_magnitude_vector"))], linear, None, &["magnitude"]);
    for bad in [f32::NAN, f32::INFINITY] {
        let a = (good_a.clone() * f64::from(bad)).unwrap();
        fails(&[(1.0, &of(a, Some(good_b.clone()), ""))], linear, None, &["A: ", "lora_A.weight", "not finite"]);
    }
    // finite factors whose sum is none
    let huge = of((good_a * 1e38).unwrap(), Some((good_b * 1e38).unwrap()), "");
    fails(&[(1e300, &huge)], linear, None, &["model.layers.0"]);
}

/// A few kilobytes may claim a matrix of a terabyte, or ranks without end.
#[test]
fn claims_of_small_files_are_not_allocated() {
    let of = |out, inp, r| lora(1, &[Site { path: Q.to_owned(), out, inp, r }], json!({"r": r, "rank_pattern": {}}));
    let (wide, ranked) = (of(600_000, 600_000, 1), of(1, 1, 60_000));
    let ties = CombineOptions::new(CombineType::Ties { of_whole: false });
    let error = run(&[(1.0, &wide)], ties, None).unwrap_err().to_string();
    assert!(error.contains(Q) && error.contains("too large"), "{error}");
    assert_eq!(run(&[(1.0, &wide)], CombineOptions::new(CombineType::Linear), None).unwrap().sites[0].rank, 1);
    for kind in [CombineType::Cat, CombineType::Linear] {
        let sites = run(&[(1.0, &ranked)], CombineOptions::new(kind), None).unwrap().sites;
        assert_eq!(sites[0].rank, if kind == CombineType::Cat { 60_000 } else { 1 });
    }
}

/// Matrices too large to be decomposed whole: the error is that of the result, near the best one, and zero is no special case.
#[test]
fn large_changes_are_reduced_by_a_randomised_method() {
    let stream = Stream { seed: 3, step: 0, site: 1 };
    let (out, inp) = (410, 500);
    let falling: Vec<f32> = (0..out).map(|i| 0.8f32.powi(i as i32)).collect();
    let basis = |seed, n| crate::linalg::orthonormal_rows(&randn(seed, (out, n), 1.0).unwrap()).unwrap();
    let scales = Tensor::from_vec(falling.clone(), (out, 1), &Device::Cpu).unwrap();
    let m = basis(1, out).t().unwrap().matmul(&basis(2, inp).broadcast_mul(&scales).unwrap()).unwrap();
    let all: f32 = falling.iter().map(|s| s * s).sum();
    let rest = |k: usize| (falling[k..].iter().map(|s| s * s).sum::<f32>() / all).sqrt();
    let measured = |r: &Reduced| {
        let left =
            (&m - r.b.matmul(&r.a).unwrap()).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        (left / all).sqrt()
    };
    for (rule, rank) in
        [(RankRule::Fixed(10), 10), (RankRule::WithinError(0.012), 20), (RankRule::WithinError(2e-4), 39)]
    {
        let r = change::reduced_dense(&m, rule, stream).unwrap();
        let error = (r.error / r.norm) as f32;
        assert!(
            (error - measured(&r)).abs() < 1e-5 && (error - rest(rank)).abs() < 2e-5,
            "{rule:?}: {error} {}",
            rest(rank)
        );
        assert_eq!(r.rank(), rank, "{rule:?}");
    }
    let nothing = change::reduced_dense(&m.zeros_like().unwrap(), RankRule::Fixed(3), stream).unwrap();
    assert_eq!((nothing.rank(), nothing.error), (3, 0.0));
}

#[test]
fn names_go_both_ways() {
    for (name, kind) in CombineType::ALL {
        assert_eq!((CombineType::from_name(name).unwrap(), kind.name()), (kind, name));
    }
    let error = CombineType::from_name("tie").unwrap_err().to_string();
    assert!(error.contains("did you mean `ties`") && error.contains("dare_linear_svd"), "{error}");
}
