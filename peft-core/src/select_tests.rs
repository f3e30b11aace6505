#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use serde_json::Value;
use std::collections::HashMap;

struct Model {
    model_type: String,
    modules: Vec<(String, ModuleKind, bool)>,
}

impl Model {
    fn candidates(&self) -> Vec<Candidate<'_>> {
        self.modules.iter().map(|(path, kind, head)| Candidate { path, kind: *kind, is_output_head: *head }).collect()
    }
}

fn fixture() -> (HashMap<String, Model>, Value) {
    let fixture: Value = serde_json::from_str(include_str!("../tests/fixtures/select.json")).unwrap();
    let models = fixture["models"].as_object().unwrap();
    let models = models
        .iter()
        .map(|(name, model)| {
            let modules = model["modules"].as_array().unwrap();
            let modules = modules
                .iter()
                .map(|m| {
                    let kind = match m[1].as_str().unwrap() {
                        "linear" => ModuleKind::Linear,
                        "embedding" => ModuleKind::Embedding,
                        "norm" => ModuleKind::Norm,
                        _ => ModuleKind::Other,
                    };
                    (m[0].as_str().unwrap().to_owned(), kind, m[2].as_bool().unwrap())
                })
                .collect();
            (name.clone(), Model { model_type: model["model_type"].as_str().unwrap().to_owned(), modules })
        })
        .collect();
    (models, fixture)
}

const AS_PEFT: SelectRules<'static> = SelectRules { unmatched: Unmatched::Report, ..SelectRules::LORA };

fn spec_of(case: &Value, model: &Model) -> Result<TargetSpec> {
    let mut spec = TargetSpec::from_config(case["config"].as_object().unwrap())?;
    spec.fill_default_targets("LORA", &model.model_type)?;
    Ok(spec)
}

#[test]
fn selects_what_peft_selects() {
    let (models, fixture) = fixture();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 100);
    for case in cases {
        let model = &models[case["model"].as_str().unwrap()];
        // As PEFT lists modules, and as our models do: without containers and activations.
        let all = model.candidates();
        let weights: Vec<_> = all.iter().copied().filter(|c| c.kind != ModuleKind::Other).collect();
        for candidates in [all, weights] {
            let name = format!("{} {}", case["model"], case["config"]);
            let ours = spec_of(case, model).and_then(|spec| Ok((select(&spec, &candidates, &AS_PEFT)?, spec)));
            if let Some(error) = case["error"].as_str() {
                let ours =
                    ours.err().unwrap_or_else(|| panic!("{name}: PEFT refuses with {error} {}", case["message"]));
                assert!(!ours.to_string().contains('\n'), "{ours}");
                continue;
            }
            let (selection, spec) = ours.unwrap_or_else(|error| panic!("{name}: {error}"));
            let mut found: Vec<_> = selection
                .sites
                .iter()
                .map(|site| {
                    (candidates[site.index].path.to_owned(), site.rank.unwrap_or(8) as f64, site.alpha.unwrap_or(16.0))
                })
                .collect();
            let mut expected: Vec<_> = case["sites"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(path, v)| (path.clone(), v[0].as_f64().unwrap(), v[1].as_f64().unwrap()))
                .collect();
            found.sort_by(|a, b| a.0.cmp(&b.0));
            expected.sort_by(|a, b| a.0.cmp(&b.0));
            assert_eq!(found, expected, "{name}");

            let mut saved: Vec<_> = selection.saved.iter().map(|module| module.path.as_str()).collect();
            let mut expected: Vec<_> = case["saved"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
            saved.sort_unstable();
            expected.sort_unstable();
            assert_eq!(saved, expected, "{name}");

            let mut written = saved_target_modules(&spec, "LORA", &candidates).unwrap().to_json();
            if let Some(list) = written.as_array_mut() {
                list.dedup();
            }
            assert_eq!(written, case["saved_targets"], "{name}");
            let hits: usize = selection.hits.iter().filter(|h| h.key == "target_modules").map(|h| h.hits).sum();
            assert_eq!(hits, selection.sites.len(), "{name}: every site is counted once");
        }
    }
}

#[test]
fn minimal_suffixes_equal_those_of_peft() {
    let (_, fixture) = fixture();
    for case in fixture["minimal"].as_array().unwrap() {
        let strings = |key: &str| serde_json::from_value::<Vec<String>>(case[key].clone()).unwrap();
        let (targets, others) = (strings("targets"), strings("others"));
        let others: Vec<&str> = others.iter().map(String::as_str).collect();
        assert_eq!(minimal_target_modules(&targets, &others), strings("minimal"), "{targets:?} against {others:?}");
    }
}

fn names(list: &[&str]) -> Option<TargetModules> {
    Some(TargetModules::Names(list.iter().map(|name| (*name).to_owned()).collect()))
}

#[track_caller]
fn refused(spec: &TargetSpec) -> String {
    let (models, _) = fixture();
    let message = select(spec, &models["llama"].candidates(), &SelectRules::LORA).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn a_pattern_without_a_hit_is_refused_with_the_nearest_name() {
    let message = refused(&TargetSpec { target_modules: names(&["q_proj", "v_prjo"]), ..Default::default() });
    assert!(
        message.starts_with("`target_modules`: `v_prjo` matches no module; did you mean")
            && message.contains("`v_proj`"),
        "{message}"
    );

    let q = TargetSpec { target_modules: names(&["q_proj"]), ..Default::default() };
    let message = refused(&TargetSpec { exclude_modules: names(&["o_porj"]), ..q.clone() });
    assert!(message.contains("`exclude_modules`: `o_porj`") && message.contains("`o_proj`"), "{message}");
    let message = refused(&TargetSpec { exclude_modules: names(&["mlp"]), ..q.clone() });
    assert!(message.contains("group of modules") && message.contains(r"(.*\.)?mlp\..*"), "{message}");
    let message = refused(&TargetSpec { exclude_modules: Some(TargetModules::Regex("mlp".into())), ..q.clone() });
    assert!(message.contains("regular expression over the whole name"), "{message}");
    let message = refused(&TargetSpec { rank_pattern: vec![("q_prj".into(), 4)], ..q.clone() });
    assert!(message.contains("`rank_pattern`: `q_prj`") && message.contains("`q_proj`"), "{message}");
    let message = refused(&TargetSpec { alpha_pattern: vec![("up_proj".into(), 4.0)], ..q.clone() });
    assert!(
        message.contains("`alpha_pattern`: `up_proj` matches no module that `target_modules` selects"),
        "{message}"
    );
    let message = refused(&TargetSpec { modules_to_save: vec!["lm_haed".into()], ..q.clone() });
    assert!(message.contains("`modules_to_save`: `lm_haed`") && message.contains("`lm_head`"), "{message}");
    let message = refused(&TargetSpec { layers_to_transform: Some(vec![0, 40]), ..q.clone() });
    assert!(message.contains("`layers_to_transform`: `40`") && message.contains("0 to 1"), "{message}");
    let message =
        refused(&TargetSpec { layers_to_transform: Some(vec![0]), layers_pattern: vec!["h".into()], ..q.clone() });
    assert!(message.contains(r#"`layers_pattern` ["h"]"#) && message.contains("`layers`"), "{message}");
    let message =
        refused(&TargetSpec { target_modules: Some(TargetModules::Regex("q_proj".into())), ..Default::default() });
    assert!(message.contains(r#"give a list: ["q_proj"]"#), "{message}");

    // Everything that is wrong comes at once.
    let message = refused(&TargetSpec {
        target_modules: names(&["q_proj", "nope"]),
        modules_to_save: vec!["nada".into()],
        rank_pattern: vec![("kproj".into(), 2)],
        ..Default::default()
    });
    for part in ["`nope`", "`nada`", "`kproj`"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn unsupported_kinds_are_refused() {
    let message = refused(&TargetSpec { target_modules: names(&["norm"]), ..Default::default() });
    assert!(message.contains("`norm` matches model.norm, which is a norm"), "{message}");
    let message = refused(&TargetSpec { target_modules: names(&["mlp"]), ..Default::default() });
    assert!(message.contains("model.layers.0.mlp"), "{message}");
    // The same without containers among the candidates.
    let candidates = [Candidate { path: "m.layers.0.mlp.up", kind: ModuleKind::Linear, is_output_head: false }];
    let spec = TargetSpec { target_modules: names(&["mlp"]), ..Default::default() };
    let message = select(&spec, &candidates, &SelectRules::LORA).unwrap_err().to_string();
    assert!(message.contains("a group of modules") && message.contains("inside it are `up`"), "{message}");
    let norms = SelectRules { method: "LN tuning", supported: &[ModuleKind::Norm], unmatched: Unmatched::Error };
    let (models, _) = fixture();
    let spec = TargetSpec { target_modules: names(&["input_layernorm", "norm"]), ..Default::default() };
    assert_eq!(select(&spec, &models["llama"].candidates(), &norms).unwrap().sites.len(), 3);
}

#[test]
fn a_target_that_is_also_saved_whole_is_refused() {
    let message = refused(&TargetSpec {
        target_modules: names(&["lm_head"]),
        modules_to_save: vec!["head".into()],
        ..Default::default()
    });
    assert!(message.starts_with("lm_head: is both"), "{message}");
}

#[test]
fn heads_that_peft_adds_by_itself_may_be_absent() {
    let (models, _) = fixture();
    let spec = TargetSpec {
        target_modules: names(&["q_proj"]),
        modules_to_save: vec!["classifier".into(), "score".into()],
        task_type: Some("SEQ_CLS".into()),
        ..Default::default()
    };
    let selection = select(&spec, &models["llama_seq_cls"].candidates(), &SelectRules::LORA).unwrap();
    assert_eq!(selection.saved.len(), 1);
    assert_eq!(selection.saved[0].path, "score");
}

#[test]
fn long_lists_shrink_only_if_they_select_the_same() {
    let paths: Vec<String> = (0..30).map(|i| format!("a.{i}.q")).chain((0..30).map(|i| format!("b.{i}.q"))).collect();
    let candidates: Vec<_> =
        paths.iter().map(|path| Candidate { path, kind: ModuleKind::Linear, is_output_head: false }).collect();
    let spec = |list: &[String]| TargetSpec {
        target_modules: Some(TargetModules::Names(list.to_vec())),
        ..Default::default()
    };
    assert_eq!(saved_target_modules(&spec(&paths), "LORA", &candidates), names(&["q"]));
    let half = saved_target_modules(&spec(&paths[..30]), "LORA", &candidates).unwrap();
    let selection =
        select(&TargetSpec { target_modules: Some(half), ..Default::default() }, &candidates, &SelectRules::LORA);
    assert_eq!(selection.unwrap().sites.len(), 30);
    let TargetModules::Names(kept) = saved_target_modules(&spec(&paths), "IA3", &candidates).unwrap() else { panic!() };
    assert_eq!(kept.len(), 60);
}

proptest::proptest! {
    #[test]
    fn shortened_lists_select_the_same(
        chosen in proptest::collection::vec(proptest::bool::weighted(0.6), 48),
        shape in proptest::collection::vec((0usize..3, 0usize..4, 0usize..4), 48),
    ) {
        let paths: BTreeSet<String> =
            shape.iter().map(|(a, b, c)| format!("{}.{b}.{}", ["enc", "dec", "x.dec"][*a], ["q", "k", "q.lin", "o"][*c])).collect();
        let candidates: Vec<_> =
            paths.iter().map(|path| Candidate { path, kind: ModuleKind::Linear, is_output_head: false }).collect();
        let list: Vec<String> = paths.iter().zip(&chosen).filter(|(_, keep)| **keep).map(|(path, _)| path.clone()).collect();
        if !list.is_empty() {
            let spec = TargetSpec { target_modules: Some(TargetModules::Names(list)), ..Default::default() };
            let short = TargetSpec { target_modules: saved_target_modules(&spec, "LORA", &candidates), ..Default::default() };
            let sites = |spec: &TargetSpec| select(spec, &candidates, &AS_PEFT).map(|s| s.sites).map_err(|e| e.to_string());
            if let Ok(expected) = sites(&spec) {
                proptest::prop_assert_eq!(sites(&short), Ok(expected));
            }
        }
    }
}

/// One block of a mixture, as our models list it.
const MIXTURE: [Candidate<'static>; 6] = {
    const fn of(path: &'static str, kind: ModuleKind) -> Candidate<'static> {
        Candidate { path, kind, is_output_head: false }
    }
    [
        of("model.embed_tokens", ModuleKind::Embedding),
        of("model.layers.0.self_attn.q_proj", ModuleKind::Linear),
        of("model.layers.0.mlp.gate", ModuleKind::Router),
        of("model.layers.0.mlp.experts.gate_up_proj", ModuleKind::Experts),
        of("model.layers.0.mlp.experts.down_proj", ModuleKind::Experts),
        of("model.norm", ModuleKind::Norm),
    ]
};

fn of_mixture(config: Value, unmatched: Unmatched) -> Result<Selection> {
    let spec = TargetSpec::from_config(config.as_object().unwrap())?;
    select(&spec, &MIXTURE, &SelectRules { unmatched, ..SelectRules::LORA })
}

#[test]
fn weights_are_found_by_the_ends_of_their_names() {
    use serde_json::json;
    let found = of_mixture(
        json!({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "gate.weight", "gate_up_proj"],
            "rank_pattern": {r".*\.gate_up_proj": 4, "gate.weight": 2}, "alpha_pattern": {"down_proj": 3}}),
        Unmatched::Error,
    )
    .unwrap();
    let site = |index, rank, alpha| SelectedSite { index, rank, alpha };
    assert_eq!(found.sites, [site(1, None, None)]);
    assert_eq!(found.parameters, [site(2, Some(2), None), site(3, Some(4), None), site(4, None, Some(3.0))]);
    // Alone, and on a layer's own weight; what excludes modules does not act on parameters.
    let weight = json!({"target_parameters": ["q_proj.weight"], "exclude_modules": ["q_proj"]});
    let found = of_mixture(weight, Unmatched::Report).unwrap();
    assert_eq!((found.sites.len(), found.parameters), (0, vec![site(1, None, None)]));
}

#[test]
fn weights_that_are_not_there_name_the_nearest() {
    use serde_json::json;
    for (config, expect) in [
        (json!({"target_parameters": ["gate_up_prj"]}), "did you mean `gate_up_proj`"),
        (json!({"target_parameters": ["mlp.expert.down_proj"]}), "`mlp.experts.down_proj`"),
        (json!({"target_parameters": ["norm.weight"]}), "model.norm.weight, which is a norm"),
        (json!({"target_parameters": ["embed_tokens.weight"]}), "is an embedding"),
        (json!({"target_modules": ["down_proj"]}), "names the weights of experts"),
        (json!({"target_modules": ["gate"]}), "which is a router of experts"),
        (json!({"target_modules": "all-linear", "rank_pattern": {"down_proj": 2}}), "rank_pattern"),
    ] {
        let message = of_mixture(config.clone(), Unmatched::Error).unwrap_err().to_string();
        assert!(message.contains(expect), "{config}: {message}");
    }
    // In a file as well, where something else is found the rest is reported.
    assert!(of_mixture(json!({"target_modules": ["down_proj"]}), Unmatched::Report).is_err());
    let found = of_mixture(json!({"target_modules": ["down_proj", "q_proj"]}), Unmatched::Report).unwrap();
    assert_eq!((found.sites.len(), found.unmatched.len()), (1, 1));
}
