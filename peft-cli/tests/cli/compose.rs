//! Adapters made of others: `fusion`, `composition`, `xlora`, `union`, and `compose`.

use serde_json::json;

use crate::harness::{Dir, Ran, base, eval_loss, rows, steps};

/// Trains with these keys of `[method]` into `name`.
fn train(dir: &Dir, name: &str, method: &str, more: &[&str]) -> Ran {
    dir.write("rows.jsonl", &rows());
    let recipe = format!(
        "[model]\npath = {:?}\n[method]\n{method}\n[data]\ntrain = \"rows.jsonl\"\nformat = \"completion\"\n[train]\n\
         batch_size = 4\nlearning_rate = 3e-2\nmax_steps = 12\n[output]\ndir = {name:?}\nsave_every = 5\n",
        base().display().to_string()
    );
    dir.write("recipe.toml", &recipe);
    dir.run(&[&["train", "recipe.toml"], more].concat())
}

/// Two bottleneck adapters, `a` and `b`.
fn two() -> Dir {
    let dir = Dir::new();
    train(&dir, "a", "type = \"bottleneck\"\nreduction_factor = 4", &[]).ok();
    train(&dir, "b", "type = \"bottleneck\"\nreduction_factor = 8\nnon_linearity = \"tanh\"", &[]).ok();
    dir
}

fn falls(dir: &Dir, name: &str) {
    let losses: Vec<f64> = steps(dir, name).iter().filter_map(|step| step["loss"].as_f64()).collect();
    assert!(losses[8..].iter().sum::<f64>() < losses[..4].iter().sum::<f64>(), "{name}: {losses:?}");
}

#[test]
fn a_fusion_is_trained_resumed_and_exchanged() {
    let (dir, model) = (two(), base().display().to_string());
    let fusion = "type = \"fusion\"\nadapters = [\"a\", \"b\"]\ndropout_prob = 0.1";
    train(&dir, "fused", fusion, &[]).ok();
    falls(&dir, "fused");
    // Half of the run again from its checkpoint: the same bits.
    let whole = dir.read("fused/adapter_model.safetensors");
    std::fs::remove_dir_all(dir.path("fused/checkpoints/step-12")).ok();
    std::fs::remove_file(dir.path("fused/adapter_model.safetensors")).unwrap();
    train(&dir, "fused", fusion, &["--resume"]).ok();
    assert!(dir.read("fused/adapter_model.safetensors") == whole, "a resumed fusion differs");

    for part in ["a", "b"] {
        std::fs::rename(dir.path(part), dir.path(&format!("{part}-elsewhere"))).unwrap();
    }
    let loss = eval_loss(&dir, &model, Some("fused"));
    dir.run(&["convert", "--adapter", "fused", "--to", "adapterhub", "--output", "hub", "--model", &model]).ok();
    for file in
        ["adapter_setup.json", "a/adapter.safetensors", "b/adapter_config.json", "a,b/model_adapter_fusion.safetensors"]
    {
        assert!(dir.path("hub").join(file).is_file(), "hub lacks {file}");
    }
    assert_eq!(eval_loss(&dir, &model, Some("hub")), loss);
    let facts = dir.run(&["inspect", "hub", "--json"]).json();
    assert_eq!(facts["method"], "ADAPTER_FUSION", "{facts}");
    std::fs::rename(dir.path("hub/a,b"), dir.path("hub/fusion")).unwrap();
    std::fs::remove_file(dir.path("hub/adapter_setup.json")).unwrap();
    assert_eq!(eval_loss(&dir, &model, Some("hub/fusion")), loss, "with the adapters beside it");
    train(&dir, "again", "init_from = \"hub/fusion\"", &[]).ok();

    std::fs::remove_dir_all(dir.path("hub/b")).unwrap();
    let eval = |adapter: &str| dir.run(&["eval", "--model", &model, "--adapter", adapter, "--data", "rows.jsonl"]);
    eval("hub/fusion").fails(&["`b` is missing", "hub"]);
}

#[test]
fn experts_are_weighed_resumed_and_written_with_their_mixture() {
    let (dir, model) = (two(), base().display().to_string());
    train(&dir, "first", "r = 4\ntarget_modules = [\"q_proj\", \"down_proj\"]", &[]).ok();
    train(&dir, "second", "r = 2\ntarget_modules = \"all-linear\"\nlora_dropout = 0.1", &[]).ok();
    let xlora = "type = \"xlora\"\nadapters = [\"first\", \"second\"]\nxlora_depth = 2\nxlora_size = 8";
    train(&dir, "mixed", xlora, &[]).ok();
    // Half of the run again from its checkpoint: the same bits.
    let whole = dir.read("mixed/adapter_model.safetensors");
    std::fs::remove_dir_all(dir.path("mixed/checkpoints/step-12")).ok();
    std::fs::remove_file(dir.path("mixed/adapter_model.safetensors")).unwrap();
    train(&dir, "mixed", xlora, &["--resume"]).ok();
    assert!(dir.read("mixed/adapter_model.safetensors") == whole, "a resumed mixture differs");
    for (expert, folder) in [("first", "mixed/0"), ("second", "mixed/1")] {
        assert_eq!(eval_loss(&dir, &model, Some(expert)), eval_loss(&dir, &model, Some(folder)), "{expert}");
        std::fs::rename(dir.path(expert), dir.path(&format!("{expert}-elsewhere"))).unwrap();
    }
    let loss = eval_loss(&dir, &model, Some("mixed"));
    assert!(eval_loss(&dir, &model, Some("mixed/checkpoints/step-10")) != loss, "two steps change nothing");
    let experts = ["mixed/0", "mixed/1"].map(|expert| eval_loss(&dir, &model, Some(expert)));
    assert!(experts.iter().all(|alone| (alone - loss).abs() > 1e-4), "{loss} and {experts:?}");
    let mezo = |name: &str, method: &str| train(&dir, name, method, &["--set", "train.optimizer=mezo"]);
    mezo("again", "type = \"xlora\"\nadapters = {0 = \"mixed/0\", 1 = \"first-elsewhere\"}").ok();
    mezo("wrong", "type = \"xlora\"\nadapters = [\"mixed/0\", \"first-elsewhere\"]\nxlora_depth = 2")
        .fails(&["xlora_dropout_p", "without dropout"]);

    let prompt = ["--prompt", "the", "--max-new-tokens", "4"];
    let generate = |more: &[&str]| dir.run(&[&["generate", "--model", &model], more, &prompt].concat());
    generate(&["--adapter", "mixed", "--adapter", "mixed/0"]).ok();
    let facts = dir.run(&["inspect", "mixed", "--json"]).json();
    assert_eq!((&facts["method"], &facts["ranks"]), (&json!("XLORA"), &json!([2, 4])), "{facts}");
    let merge = dir.run(&["merge", "--model", &model, "--adapter", "mixed", "--output", "merged"]);
    merge.fails(&["cannot be merged", "combine"]);
    std::fs::remove_dir_all(dir.path("mixed/1")).unwrap();
    dir.run(&["eval", "--model", &model, "--adapter", "mixed", "--data", "rows.jsonl"])
        .fails(&["no folder `1`", "mixed"]);

    let wrong = "type = \"xlora\"\nadapters = [\"first-elsewhere\", \"a\"]";
    train(&dir, "wrong", wrong, &[]).fails(&["BOTTLENECK", "LoRA adapters"]);
    train(&dir, "dora", "r = 2\ntarget_modules = [\"q_proj\"]\nuse_dora = true", &[]).ok();
    let dora = "type = \"xlora\"\nadapters = [\"first-elsewhere\", \"dora\"]";
    train(&dir, "wrong", dora, &[]).fails(&["expert 1", "q_proj", "DoRA"]);
    let union =
        "type = \"union\"\nmethods = [{type = \"xlora\", adapters = [\"first-elsewhere\", \"second-elsewhere\"]}]";
    train(&dir, "wrong", union, &[]).fails(&["XLORA", "first pass"]);
    assert!(!dir.path("wrong").join("adapter_config.json").exists());
}

#[test]
fn adapters_are_stacked_and_averaged() {
    let (dir, model) = (two(), base().display().to_string());
    let compose = |setup: &str, adapters: &[&str], output: &str| {
        let mut args = vec!["compose", "--setup", setup, "--model", &model, "--output", output, "--json"];
        args.extend(adapters.iter().flat_map(|adapter| ["--adapter", *adapter]));
        dir.run(&args)
    };
    let [a, b] = ["a", "b"].map(|name| eval_loss(&dir, &model, Some(name)));
    // One whole and the other not at all is the one.
    let facts = compose("average", &["a=1", "b=0"], "mean").json();
    assert_eq!((&facts["places"], &facts["adapters"][1]["weight"]), (&json!(2), &json!(0.0)), "{facts}");
    assert!((eval_loss(&dir, &model, Some("mean")) - a).abs() < 1e-5);
    compose("stack", &["a", "b"], "stack").ok();
    let stack = eval_loss(&dir, &model, Some("stack"));
    assert!(stack != a && stack != b, "{stack}, {a}, {b}");
    compose("stack", &["a", "b=0.5"], "no").fails(&["weights go with --setup average"]);
    compose("average", &["a", "b=-1"], "no").fails(&["weights"]);
    compose("stack", &["a"], "no").fails(&["adapters", "two or more"]);
    compose("stack", &["a", "c"], "no").fails(&["c"]);
    assert!(!dir.path("no").exists());
    // Nothing in it is trained.
    train(&dir, "on", "init_from = \"stack\"", &[]).fails(&["nothing to train"]);
    train(&dir, "on", "type = \"composition\"\nadapters = [\"a\", \"b\"]", &[]).fails(&["nothing would be trained"]);
    train(&dir, "on", "type = \"composition\"\nadapters = [\"a\", {preset = \"seq_bn\", reduction_factor = 4}]", &[])
        .ok();
    falls(&dir, "on");

    // Several adapters on one prompt, in one batch.
    let written = |more: &[&str]| {
        let args =
            [&["generate", "--model", &model, "--prompt", "say a ", "--max-new-tokens", "6", "--json"], more].concat();
        dir.run(&args).json()
    };
    let both = written(&["--adapter", "a", "--adapter", "stack"]);
    for (i, name) in ["a", "stack"].into_iter().enumerate() {
        assert_eq!(both["answers"][i]["adapter"], name);
        assert_eq!(both["answers"][i]["text"], written(&["--adapter", name])["text"]);
    }
}

#[test]
fn methods_are_trained_as_one() {
    let (dir, model) = (Dir::new(), base().display().to_string());
    let mam = "type = \"union\"\nmethods = [{type = \"prefix\", num_virtual_tokens = 4, prefix_projection = true, encoder_hidden_size = 16}, \
               {type = \"bottleneck\", preset = \"par_bn\"}, {type = \"lora\", target_modules = [\"q_proj\"]}]";
    train(&dir, "out", mam, &[]).ok();
    falls(&dir, "out");
    let whole = dir.read("out/adapter_model.safetensors");
    std::fs::remove_dir_all(dir.path("out/checkpoints/step-12")).ok();
    std::fs::remove_file(dir.path("out/adapter_model.safetensors")).unwrap();
    train(&dir, "out", mam, &["--resume"]).ok();
    assert!(dir.read("out/adapter_model.safetensors") == whole, "a resumed union differs");
    assert!(eval_loss(&dir, &model, Some("out")) < eval_loss(&dir, &model, None));
    dir.run(&["merge", "--model", &model, "--adapter", "out", "--output", "merged"]).fails(&["cannot be merged"]);
    train(&dir, "gated", "type = \"union\"\npreset = \"unipelt\"", &[]).ok();
    falls(&dir, "gated");
    dir.run(&["merge", "--model", &model, "--adapter", "gated", "--output", "merged"]).fails(&["cannot be merged"]);
    // Both on the same rows, in one pass.
    let both = ["eval", "--model", &model, "--data", "rows.jsonl", "--adapter", "out", "--adapter", "gated", "--json"];
    let both = dir.run(&both).json();
    for (i, name) in ["out", "gated"].into_iter().enumerate() {
        let result = &both["results"][i];
        assert_eq!((&result["adapter"], &result["examples"]), (&json!(name), &json!(24)), "{both}");
        assert!((result["loss"].as_f64().unwrap() - eval_loss(&dir, &model, Some(name))).abs() < 1e-4, "{both}");
    }
    let choice =
        ["eval", "--model", &model, "--data", "rows.jsonl", "--adapter", "out", "--adapter", "gated", "--choice", "a"];
    dir.run(&choice).fails(&["--choice goes with one --adapter"]);
    for (method, expect) in [
        ("type = \"union\"", "methods"),
        (
            "type = \"union\"\nmethods = [{type = \"lora\"}, {type = \"ia3\", target_modules = [\"q_proj\"], feedforward_modules = []}]",
            "q_proj",
        ),
        ("type = \"union\"\nmethods = [{type = \"lora\", rr = 3}]", "number 1"),
        ("type = \"union\"\nmethods = [{type = \"full\"}]", "`full`"),
        ("type = \"lora\"\nuse_gating = true", "union"),
        ("type = \"prefix\"\nnum_virtual_tokens = 2\nmoves_positions = false", "union"),
        (
            "type = \"union\"\nmethods = [{type = \"lora\", target_modules = [\"lm_head\"], use_gating = true}]",
            "in the model's blocks",
        ),
        ("type = \"union\"\npreset = \"mam\"\nmethods = [{type = \"lora\"}]", "one of the two"),
        (
            "type = \"union\"\nmethods = [{type = \"prompt\", num_virtual_tokens = 2}, {type = \"prefix\", num_virtual_tokens = 2}]",
            "virtual tokens",
        ),
        ("type = \"union\"\nmethods = [{type = \"poly\", n_tasks = 2, target_modules = [\"q_proj\"]}]", "each task"),
    ] {
        train(&dir, "no", method, &[]).fails(&[expect]);
    }
}

#[test]
fn what_cannot_be_a_part_is_refused() {
    let dir = two();
    // Dropout is looked for in the parts, too.
    for (method, expect) in [
        ("type = \"fusion\"\nadapters = [\"a\", \"b\"]\npreset = \"static\"\ndropout_prob = 0.1", "dropout_prob"),
        ("type = \"composition\"\nadapters = [\"a\", {dropout = 0.2}]", "method.dropout"),
        ("type = \"union\"\nmethods = [{type = \"lora\", lora_dropout = 0.1}]", "lora_dropout"),
        ("type = \"fusion\"\nadapters = [\"a\", \"b\"]", "acts on gradients"),
    ] {
        train(&dir, "no", method, &["--set", "train.optimizer=mezo"]).fails(&[expect]);
    }
    train(&dir, "lora", "type = \"lora\"", &[]).ok();
    train(&dir, "more", "type = \"bottleneck\"\nmodules_to_save = [\"norm\"]", &[]).ok();
    train(&dir, "all", "type = \"bottleneck\"\nmh_adapter = true", &[]).ok();
    for (adapters, expect) in [
        ("[\"a\", \"lora\"]", "only bottleneck adapters"),
        ("[\"a\", \"more\"]", "norm"),
        ("[\"a\", \"all\"]", "do not all stand"),
        ("[\"a\", \"nowhere\"]", "nowhere"),
    ] {
        train(&dir, "no", &format!("type = \"fusion\"\nadapters = {adapters}"), &[]).fails(&[expect]);
        assert!(!dir.path("no/adapter_model.safetensors").exists());
    }
}
