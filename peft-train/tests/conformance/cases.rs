//! The methods and variants that every test of the suite runs over. A further one is one entry more.

use std::path::PathBuf;
use std::sync::LazyLock;

use peft_train::checkpoint::write_adapter_files;
use serde_json::{Value, json};

use crate::model::{Kind, Shape, base, trained};
use crate::table::{Answer, Property};

/// One method with one set of keys.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// The `[method]` table.
    pub(crate) method: Value,
    /// The model it is tried on.
    pub(crate) shape: Shape,
    /// Ends of parameter names of which differences of the loss say another thing: their gradient leaves a path out on
    /// purpose (DoRA's norm is a constant to A and B), or a step moves them over kinks (two layers of ReLU on a few units) or to another
    /// choice (VB-LoRA's vectors with the largest logits, X-LoRA's experts).
    pub(crate) partial_gradient: &'static [&'static str],
    /// What does not hold for it, or not quite; everything else does.
    pub(crate) answers: Vec<(Property, Answer)>,
}

impl Case {
    /// Whether a property holds for it.
    pub(crate) fn answer(&self, property: Property) -> Answer {
        self.answers.iter().find(|(p, _)| *p == property).map_or(Answer::Holds, |(_, answer)| *answer)
    }

    /// The method's name in the catalogue.
    pub(crate) fn catalogue_name(&self) -> &str {
        self.method.get("type").and_then(Value::as_str).unwrap_or("lora")
    }
}

const UNTIED: Shape = Shape { tied: false, attention_bias: false, experts: 0 };
const TIED: Shape = Shape { tied: true, ..UNTIED };
const BIASED: Shape = Shape { attention_bias: true, ..UNTIED };
const MIXTURE: Shape = Shape { experts: 2, ..UNTIED };
/// Without a choice, which a difference of what all tokens read would change.
const ALL_EXPERTS: Shape = Shape { experts: 4, ..UNTIED };
const RELU: &[&str] =
    &["embedding.weight", "mlp_head.0.weight", "mlp_head.0.bias", "mlp_head.2.weight", "mlp_head.2.bias"];
const CHOICE: &[&str] = &["vblora_logits_A", "vblora_logits_B"];
const EXPERT: &[&str] = &["classifier.layers.0.weight", "classifier.layers.0.bias"];
const DORA: &[&str] = &["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"];

fn case(name: &'static str, shape: Shape, method: Value) -> Case {
    let of = |names: &[&str]| names.contains(&method.get("type").and_then(Value::as_str).unwrap_or("lora"));
    let is = |key: &str, value: Value| method.get(key) == Some(&value);
    let preset = method.get("preset").and_then(Value::as_str).unwrap_or_default();
    let mut answers = Vec::new();
    let mut not = |property, answer| answers.push((property, answer));

    let soft_prompt = of(&["prefix", "prompt", "p_tuning", "multitask_prompt", "cpt"]);
    if soft_prompt {
        not(Property::Fresh, Answer::Never("virtual tokens stand in front from the first step on"));
        not(Property::Merged, Answer::Never("virtual tokens are no change of a weight; `merge` refuses"));
    }
    // With a projection of zeros, and nothing behind it, a bottleneck is nothing.
    let random = of(&["c3a", "vblora", "reft"])
        || (of(&["bottleneck"]) && !preset.ends_with("par_bn"))
        || (of(&["llm_adapter"]) && !is("init_weights", json!("mam_adapter")))
        || (of(&["fourierft"]) && !is("init_weights", json!(true)));
    if of(&["fusion", "composition", "union"]) {
        not(Property::Fresh, Answer::Never("it is what its parts are"));
    } else if of(&["xlora"]) {
        not(Property::Fresh, Answer::Never("its experts act from the first step on"));
    } else if random {
        not(Property::Fresh, Answer::Never("it starts from small random values, as its authors have it"));
    } else if ["init_lora_weights", "init_ia3_weights", "init_weights"].iter().any(|key| is(key, json!(false))) {
        not(Property::Fresh, Answer::Never("the recipe may ask for a start at random"));
    }

    if of(&["adaption_prompt"]) && shape.attention_bias {
        let why = "PEFT runs its tokens' part through the attention's last layer, whose bias then counts twice";
        not(Property::Fresh, Answer::Never(why));
    }

    let dora = is("use_dora", json!(true));
    let mlp = of(&["p_tuning"]) && !is("encoder_reparameterization_type", json!("LSTM"));
    let chooses = of(&["vblora"]) && method.get("topk") != method.get("num_vectors");
    let chooses_experts = of(&["xlora"]) && method.get("top_k_lora").is_some();
    let (partial_gradient, why) = if dora {
        (DORA, "the norm in DoRA is a constant to A and B, as in the paper; the magnitude is compared")
    } else if mlp {
        (RELU, "but for layers under a ReLU of few units, over whose kinks a difference steps")
    } else if chooses {
        (CHOICE, "but for the logits that choose vectors, whose choice a difference changes")
    } else if chooses_experts {
        (EXPERT, "but for the classifier that chooses experts, whose choice a difference changes")
    } else {
        (&[][..], "")
    };
    if !partial_gradient.is_empty() {
        not(Property::Gradient, Answer::Partly(why));
    }

    // A part of a union counts, too.
    let text = method.to_string();
    if text.contains("pissa") || text.contains("olora") {
        not(
            Property::Files,
            Answer::Partly("PiSSA and OLoRA become LoRA of twice the rank, whose sums round otherwise"),
        );
    }
    if of(&["bottleneck", "llm_adapter", "reft", "adaption_prompt", "fusion", "composition"]) {
        not(Property::Merged, Answer::Never("it is no change of a weight; `merge` refuses"));
    } else if of(&["union"]) {
        not(
            Property::Merged,
            Answer::Never("those of its parts that could be are merged by themselves; `merge` refuses"),
        );
    } else if of(&["xlora"]) {
        not(Property::Merged, Answer::Never("it weighs its experts anew for every token; `merge` refuses"));
    } else if of(&["poly"]) {
        not(Property::Merged, Answer::Partly("as one of its tasks"));
    } else if is("add_biases", json!(true)) {
        not(
            Property::Merged,
            Answer::Never("biases that were added have no place in the model's files; `merge` refuses"),
        );
    }
    if text.contains("\"use_gating\":true") || method.get("suffix_positions").is_some() {
        let why = "the first token: gates and last positions of a text are others when it goes on";
        not(Property::Written, Answer::Partly(why));
    }
    Case { name, method, shape, partial_gradient, answers }
}

/// The folder of a trained adapter that others are made of.
fn part(name: &str, method: &Value) -> PathBuf {
    let model = base(UNTIED, Kind::F32);
    // Each process its own, since several may run at once.
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("parts-{}", std::process::id())).join(name);
    write_adapter_files(&folder, &trained(crate::create(method, &model, 7).unwrap(), 8).unwrap()).unwrap();
    folder
}

/// Folders of bottleneck adapters.
static PARTS: LazyLock<[PathBuf; 2]> = LazyLock::new(|| {
    [("one", "gelu"), ("other", "tanh")].map(|(name, non_linearity)| {
        part(name, &bottleneck("seq_bn", json!({"non_linearity": non_linearity, "init_weights": "houlsby"})))
    })
});

/// Folders of LoRA adapters at layers of which some are the same.
static EXPERTS: LazyLock<[PathBuf; 4]> = LazyLock::new(|| {
    let lora = |name, r: usize, alpha: usize, targets: Value| {
        let method = json!({"r": r, "lora_alpha": alpha, "target_modules": targets, "init_lora_weights": false});
        part(name, &method)
    };
    [
        lora("first", 3, 6, json!(["q_proj", "down_proj"])),
        lora("second", 2, 4, json!(["q_proj", "v_proj"])),
        lora("third", 4, 4, json!("all-linear")),
        lora("head", 2, 4, json!(["v_proj", "lm_head"])),
    ]
});

/// Wide enough that the small models have more than one unit in the bottleneck.
fn bottleneck(preset: &str, keys: Value) -> Value {
    let mut table = json!({"type": "bottleneck", "preset": preset, "reduction_factor": 4});
    if let (Value::Object(table), Value::Object(keys)) = (&mut table, keys) {
        table.extend(keys);
    }
    table
}

pub(crate) fn cases() -> Vec<Case> {
    let attention = ["q_proj", "k_proj", "v_proj", "o_proj"];
    vec![
        case("lora", UNTIED, json!({"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]})),
        case("all-linear", TIED, json!({"r": 3, "lora_alpha": 5, "target_modules": "all-linear"})),
        case("random", UNTIED, json!({"r": 4, "target_modules": ["q_proj"], "init_lora_weights": false})),
        case("gaussian", UNTIED, json!({"r": 4, "target_modules": ["up_proj"], "init_lora_weights": "gaussian"})),
        case("orthogonal", UNTIED, json!({"r": 4, "target_modules": "all-linear", "init_lora_weights": "orthogonal"})),
        case("pissa", UNTIED, json!({"r": 4, "target_modules": "all-linear", "init_lora_weights": "pissa"})),
        case(
            "pissa, iterated, patterns, rslora, dropout",
            BIASED,
            json!({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"], "use_rslora": true,
                "init_lora_weights": "pissa_niter_4", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 3},
                "lora_dropout": 0.2, "bias": "lora_only"}),
        ),
        case(
            "olora",
            TIED,
            json!({"r": 4, "target_modules": ["gate_proj", "o_proj"], "init_lora_weights": "olora", "modules_to_save": ["norm"]}),
        ),
        case(
            "pissa, dora",
            BIASED,
            json!({"r": 4, "target_modules": attention, "init_lora_weights": "pissa", "use_dora": true}),
        ),
        case(
            "olora, dora, dropout",
            UNTIED,
            json!({"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora", "use_dora": true,
                "lora_dropout": 0.3}),
        ),
        case("eva", BIASED, json!({"r": 3, "target_modules": "all-linear", "init_lora_weights": "eva"})),
        case(
            "eva, dora, some layers",
            UNTIED,
            json!({"r": 4, "target_modules": ["v_proj", "down_proj"], "init_lora_weights": "eva", "use_dora": true,
                "eva_config": {"rho": 1.5, "whiten": true, "use_label_mask": false, "adjust_scaling_factors": false}}),
        ),
        case("rslora", UNTIED, json!({"r": 4, "lora_alpha": 3, "use_rslora": true, "target_modules": "all-linear"})),
        case("dora", BIASED, json!({"r": 4, "use_dora": true, "target_modules": "all-linear"})),
        case("lora_bias", BIASED, json!({"r": 4, "lora_bias": true, "target_modules": attention})),
        case("bias all", BIASED, json!({"r": 4, "bias": "all", "target_modules": ["q_proj", "up_proj"]})),
        case("bias lora_only", BIASED, json!({"r": 4, "bias": "lora_only", "target_modules": ["k_proj", "o_proj"]})),
        case(
            "experts and router",
            MIXTURE,
            json!({"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "rank_pattern": {"gate.weight": 1},
                "target_parameters": ["gate_up_proj", "mlp.experts.down_proj", "gate.weight"]}),
        ),
        case(
            "some experts",
            MIXTURE,
            json!({"r": 3, "target_parameters": ["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj"],
                "init_lora_weights": "gaussian", "use_rslora": true, "modules_to_save": ["mlp.gate"]}),
        ),
        case("experts by their old names", MIXTURE, json!({"r": 2, "target_modules": "all-linear"})),
        case(
            "patterns",
            UNTIED,
            json!({"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
                "alpha_pattern": {"down_proj": 1.5}}),
        ),
        case("saved head", UNTIED, json!({"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})),
        case("saved table", UNTIED, json!({"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]})),
        case(
            "saved table, tied",
            TIED,
            json!({"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ),
        case("saved norm", UNTIED, json!({"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]})),
        case("embedding", UNTIED, json!({"r": 4, "target_modules": ["embed_tokens", "v_proj"]})),
        case("embedding, tied", TIED, json!({"r": 4, "target_modules": ["embed_tokens"]})),
        case("embedding, dora", UNTIED, json!({"r": 4, "target_modules": ["embed_tokens"], "use_dora": true})),
        case("head", UNTIED, json!({"r": 4, "target_modules": ["lm_head", "q_proj"]})),
        case("tokens", UNTIED, json!({"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 40, 7]})),
        case(
            "tokens, tied",
            TIED,
            json!({"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 3]}}),
        ),
        case("dropout", UNTIED, json!({"r": 4, "lora_dropout": 0.3, "target_modules": "all-linear"})),
        case(
            "dropout, dora",
            BIASED,
            json!({"r": 4, "lora_dropout": 0.3, "use_dora": true, "target_modules": attention}),
        ),
        case("ia3", UNTIED, json!({"type": "ia3"})),
        case(
            "ia3 beside experts",
            MIXTURE,
            json!({"type": "ia3", "target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
        ),
        case(
            "ia3, paper, saved head",
            TIED,
            json!({"type": "ia3", "target_modules": "paper", "modules_to_save": ["norm"]}),
        ),
        case(
            "ia3, random, all linears",
            BIASED,
            json!({"type": "ia3", "target_modules": "all-linear", "feedforward_modules": ["up_proj", "k_proj"],
                "init_ia3_weights": false}),
        ),
        case(
            "ia3, patterns",
            BIASED,
            json!({"type": "ia3", "target_modules": r".*\.1\..*_proj", "feedforward_modules": ".*(o|down)_proj",
                "exclude_modules": ["q_proj"]}),
        ),
        case("prefix beside experts", ALL_EXPERTS, json!({"type": "prefix", "num_virtual_tokens": 3})),
        case("prefix", UNTIED, json!({"type": "prefix", "num_virtual_tokens": 5})),
        case("prefix, zero", TIED, json!({"type": "prefix", "num_virtual_tokens": 1, "init_weights": "zero"})),
        case(
            "prefix, projected",
            BIASED,
            json!({"type": "prefix", "num_virtual_tokens": 3, "prefix_projection": true, "encoder_hidden_size": 7}),
        ),
        case(
            "prefix, projected, zero",
            UNTIED,
            json!({"type": "prefix", "num_virtual_tokens": 2, "prefix_projection": true, "init_weights": "zero"}),
        ),
        case(
            "prefix, saved head and table",
            TIED,
            json!({"type": "prefix", "num_virtual_tokens": 3, "modules_to_save": ["lm_head", "embed_tokens"]}),
        ),
        case("prompt", UNTIED, json!({"type": "prompt", "num_virtual_tokens": 4})),
        case(
            "prompt, saved head and norms",
            UNTIED,
            json!({"type": "prompt", "num_virtual_tokens": 2, "modules_to_save": ["lm_head", "norm"]}),
        ),
        case(
            "prompt, vocabulary",
            TIED,
            json!({"type": "prompt", "num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"}),
        ),
        case(
            "multitask prompt",
            UNTIED,
            json!({"type": "multitask_prompt", "num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2}),
        ),
        case(
            "multitask prompt, saved head",
            TIED,
            json!({"type": "multitask_prompt", "num_virtual_tokens": 2, "num_tasks": 5, "modules_to_save": ["lm_head"]}),
        ),
        case(
            "cpt",
            UNTIED,
            json!({"type": "cpt", "cpt_token_ids": [3, 40, 7, 9, 11, 12], "cpt_tokens_type_mask": [1, 2, 3, 1, 6, 7],
                "opt_projection_epsilon": 40.0, "opt_projection_format_epsilon": 40.0}),
        ),
        case("p_tuning", UNTIED, json!({"type": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 12})),
        case(
            "p_tuning, lstm",
            TIED,
            json!({"type": "p_tuning", "num_virtual_tokens": 3, "encoder_hidden_size": 5,
                "encoder_reparameterization_type": "LSTM"}),
        ),
        case("adaption prompt", UNTIED, json!({"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 2})),
        case(
            "adaption prompt, one layer, biases",
            BIASED,
            json!({"type": "adaption_prompt", "adapter_len": 5, "adapter_layers": 1}),
        ),
        case("ln", UNTIED, json!({"type": "ln"})),
        case(
            "ln, some, saved head",
            TIED,
            json!({"type": "ln", "target_modules": ["input_layernorm"], "modules_to_save": ["lm_head"]}),
        ),
        case("bitfit", BIASED, json!({"type": "bitfit"})),
        case(
            "bitfit, some, saved head",
            BIASED,
            json!({"type": "bitfit", "target_modules": ["q_proj", "layers.1.self_attn.o_proj"],
                "modules_to_save": ["lm_head"]}),
        ),
        case("bitfit, added", UNTIED, json!({"type": "bitfit", "add_biases": true})),
        case(
            "bitfit, added to some and the tied head",
            TIED,
            json!({"type": "bitfit", "add_biases": true, "target_modules": ["v_proj", "lm_head"]}),
        ),
        case("last layers", BIASED, json!({"type": "last_layers", "num_layers": 1})),
        case(
            "last layers, norm and head",
            TIED,
            json!({"type": "last_layers", "num_layers": 1, "final_norm": true, "output_head": true}),
        ),
        case(
            "last layers, all, some left out, saved head",
            UNTIED,
            json!({"type": "last_layers", "num_layers": 2, "exclude_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ),
        case("trainable tokens", UNTIED, json!({"type": "trainable_tokens", "token_indices": [3, 40, 7]})),
        case("trainable tokens, tied", TIED, json!({"type": "trainable_tokens", "token_indices": [7, 3]})),
        case(
            "trainable tokens, head",
            UNTIED,
            json!({"type": "trainable_tokens", "token_indices": [7, 9], "target_modules": ["embed_tokens", "lm_head"]}),
        ),
        case(
            "trainable tokens, head, tied, random",
            TIED,
            json!({"type": "trainable_tokens", "token_indices": [7, 9], "init_weights": false,
                "target_modules": ["embed_tokens", "lm_head"]}),
        ),
        case("bottleneck", UNTIED, bottleneck("seq_bn", json!({"non_linearity": "gelu"}))),
        case("bottleneck, double", BIASED, bottleneck("double_seq_bn", json!({"init_weights": "houlsby"}))),
        case(
            "bottleneck, parallel",
            TIED,
            bottleneck("par_bn", json!({"non_linearity": "tanh", "leave_out": [0], "mh_adapter": true})),
        ),
        case(
            "bottleneck, scaled, norms, dropout",
            UNTIED,
            bottleneck(
                "scaled_par_bn",
                json!({"non_linearity": "swish", "ln_before": true, "ln_after": true, "dropout": 0.3}),
            ),
        ),
        case(
            "bottleneck, norms of its own",
            BIASED,
            bottleneck(
                "seq_bn",
                json!({"non_linearity": "gelu", "scaling": "channel", "ln_after": true, "residual_before_ln": false,
                    "adapter_residual_before_ln": true, "original_ln_after": false, "mh_adapter": true}),
            ),
        ),
        case(
            "bottleneck, adapter+",
            BIASED,
            bottleneck("adapter_plus", json!({"leave_out": [1], "stochastic_depth": 0.4})),
        ),
        case("fusion", UNTIED, json!({"type": "fusion", "adapters": *PARTS})),
        case(
            "fusion, static, stacks, new parts, dropout",
            BIASED,
            json!({"type": "fusion", "preset": "static", "query_before_ln": true, "dropout_prob": 0.3, "residual_before": true,
                "adapters": [[PARTS[0], {"reduction_factor": 4, "non_linearity": "tanh"}], PARTS[1],
                    {"reduction_factor": 4, "non_linearity": "gelu", "original_ln_before": false, "residual_before_ln": false}]}),
        ),
        case(
            "fusion, value behind the softmax, no query",
            TIED,
            json!({"type": "fusion", "query": false, "value_before_softmax": false, "value_initialized": false, "adapters": *PARTS}),
        ),
        case(
            "composition, stack",
            UNTIED,
            json!({"type": "composition", "adapters": [PARTS[0], {"preset": "double_seq_bn", "reduction_factor": 4, "name": "task"}]}),
        ),
        case(
            "composition, mean",
            BIASED,
            json!({"type": "composition", "setup": "average", "weights": [3, 1],
                "adapters": [PARTS[0], {"reduction_factor": 4, "non_linearity": "tanh"}]}),
        ),
        case("xlora", UNTIED, json!({"type": "xlora", "adapters": EXPERTS[..3]})),
        case(
            "xlora, layer by layer, deep, dropout",
            BIASED,
            json!({"type": "xlora", "adapters": {"0": EXPERTS[1], "1": EXPERTS[0]}, "layerwise_scalings": true, "xlora_depth": 3,
                "xlora_size": 24, "xlora_dropout_p": 0.3, "softmax_temperature": 0.5, "global_scaling_weight": 2.0}),
        ),
        case(
            "xlora, two of three, trained experts, saved norm",
            TIED,
            json!({"type": "xlora", "adapters": EXPERTS[..3], "top_k_lora": 2, "enable_softmax_topk": true,
                "use_trainable_adapters": true, "modules_to_save": ["norm"]}),
        ),
        case(
            "xlora, one expert without a softmax, at the tied head too",
            TIED,
            json!({"type": "xlora", "adapters": [EXPERTS[3]], "enable_softmax": false}),
        ),
        case(
            "bottleneck, gated",
            UNTIED,
            bottleneck("double_seq_bn", json!({"use_gating": true, "original_ln_before": true, "ln_before": true})),
        ),
        case(
            "bottleneck, gated, parallel, dropout",
            BIASED,
            bottleneck("par_bn", json!({"use_gating": true, "non_linearity": "gelu", "dropout": 0.3})),
        ),
        case(
            "llm adapter, series",
            UNTIED,
            json!({"type": "llm_adapter", "bottleneck_size": 4, "scaling": 3.0, "adapter_dropout": 0.3}),
        ),
        case(
            "llm adapter, parallel, learned, zero",
            BIASED,
            json!({"type": "llm_adapter", "bottleneck_size": 3, "use_parallel_adapter": true, "scaling": "learned",
                "init_weights": "mam_adapter", "non_linearity": "gelu", "adapter_bias": true}),
        ),
        case(
            "llm adapter, series around attention",
            TIED,
            json!({"type": "llm_adapter", "bottleneck_size": 4, "scaling": 3.0, "target_modules": attention,
                "modules_to_save": ["norm"]}),
        ),
        case("reft, loreft, dropout", UNTIED, json!({"type": "reft", "r": 3, "dropout": 0.3})),
        case(
            "reft, noreft, last tokens",
            BIASED,
            json!({"type": "reft", "preset": "noreft", "r": 2, "dropout": 0.0, "prefix_positions": 1, "suffix_positions": 2,
                "non_linearity": "tanh", "layers": [1]}),
        ),
        case(
            "reft, direft, tied",
            TIED,
            json!({"type": "reft", "preset": "direft", "dropout": 0.0, "prefix_positions": 2, "suffix_positions": 1,
                "tied_weights": true, "modules_to_save": ["norm"]}),
        ),
        case(
            "reft, loreft, last tokens only",
            UNTIED,
            json!({"type": "reft", "r": 2, "dropout": 0.0, "prefix_positions": 0, "suffix_positions": 3}),
        ),
        // Wide starts: with the usual ones a fresh adapter is nothing but for rounding.
        case("compacter", UNTIED, bottleneck("compacter", json!({"phm_dim": 2, "phm_rank": 2, "phm_init_range": 0.3}))),
        case(
            "compacter++, everything shared",
            TIED,
            bottleneck(
                "compacter++",
                json!({"phm_dim": 2, "shared_W_phm": true, "phm_c_init": "uniform", "ln_before": true}),
            ),
        ),
        case(
            "compacter++, factored rules of its own",
            BIASED,
            bottleneck(
                "compacter++",
                json!({"phm_dim": 2, "factorized_phm_W": false, "shared_phm_rule": false, "factorized_phm_rule": true,
                    "phm_bias": false, "hypercomplex_nonlinearity": "normal", "phm_init_range": 2.0}),
            ),
        ),
        case("vera", UNTIED, json!({"type": "vera", "r": 6, "target_modules": ["q_proj", "o_proj"]})),
        case(
            "vera, projections made again",
            BIASED,
            json!({"type": "vera", "r": 5, "projection_prng_key": 8, "save_projection": false,
                "target_modules": ["k_proj", "up_proj"]}),
        ),
        case("loha", UNTIED, json!({"type": "loha", "r": 3, "alpha": 5, "target_modules": ["q_proj", "down_proj"]})),
        case("lokr", BIASED, json!({"type": "lokr", "r": 3, "alpha": 5, "target_modules": ["v_proj", "up_proj"]})),
        case(
            "lokr, both decomposed",
            UNTIED,
            json!({"type": "lokr", "r": 2, "decompose_both": true, "decompose_factor": 8, "target_modules": ["up_proj"]}),
        ),
        case(
            "adalora",
            UNTIED,
            json!({"type": "adalora", "init_r": 4, "target_r": 2, "total_step": 100, "target_modules": ["q_proj", "v_proj"]}),
        ),
        case(
            "adalora, ranks taken away, dropout",
            BIASED,
            json!({"type": "adalora", "init_r": 3, "total_step": 9, "target_modules": ["o_proj"], "lora_dropout": 0.3,
                "rank_pattern": {"model.layers.0.self_attn.o_proj.lora_E": [true, false, true],
                    "model.layers.1.self_attn.o_proj.lora_E": [false, false, true]}}),
        ),
        case("hra", UNTIED, json!({"type": "hra", "r": 4, "target_modules": ["q_proj", "k_proj"]})),
        case("oft", BIASED, json!({"type": "oft", "oft_block_size": 8, "target_modules": ["q_proj", "down_proj"]})),
        case("boft", UNTIED, json!({"type": "boft", "boft_block_size": 4, "target_modules": ["o_proj", "up_proj"]})),
        case("miss", UNTIED, json!({"type": "miss", "r": 8, "target_modules": ["q_proj", "down_proj"]})),
        case("c3a", UNTIED, json!({"type": "c3a", "block_size": 8, "target_modules": ["q_proj", "v_proj"]})),
        case("road", BIASED, json!({"type": "road", "group_size": 8, "target_modules": ["q_proj", "k_proj"]})),
        case("delora", UNTIED, json!({"type": "delora", "r": 4, "target_modules": ["q_proj", "down_proj"]})),
        case(
            "gralora",
            UNTIED,
            json!({"type": "gralora", "r": 8, "alpha": 16, "target_modules": ["q_proj", "up_proj"]}),
        ),
        case(
            "fourierft",
            UNTIED,
            json!({"type": "fourierft", "n_frequency": 7, "target_modules": ["q_proj", "down_proj"]}),
        ),
        case(
            "fourierft, many frequencies, zeros, patterns",
            BIASED,
            json!({"type": "fourierft", "n_frequency": 200, "init_weights": true, "scaling": 40,
                "n_frequency_pattern": {"v_proj": 3}, "target_modules": ["q_proj", "v_proj"]}),
        ),
        case("shira", UNTIED, json!({"type": "shira", "r": 2, "target_modules": ["q_proj", "down_proj"]})),
        case(
            "shira, random, a seed",
            BIASED,
            json!({"type": "shira", "r": 1, "random_seed": 5, "init_weights": false, "target_modules": ["v_proj"]}),
        ),
        case(
            "randlora",
            UNTIED,
            json!({"type": "randlora", "r": 5, "randlora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ),
        case(
            "randlora, sparse, made again",
            BIASED,
            json!({"type": "randlora", "r": 8, "randlora_alpha": 4, "sparse": true, "save_projection": false,
                "target_modules": ["k_proj", "up_proj"]}),
        ),
        case(
            "randlora, very sparse, random",
            TIED,
            json!({"type": "randlora", "r": 8, "randlora_alpha": 4, "very_sparse": true, "init_weights": false,
                "projection_prng_key": 4, "target_modules": ["o_proj"]}),
        ),
        case(
            "vblora",
            UNTIED,
            json!({"type": "vblora", "num_vectors": 5, "vector_length": 8, "topk": 2,
                "target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ),
        case(
            "vblora, all vectors, only the weights stored",
            BIASED,
            json!({"type": "vblora", "r": 2, "num_vectors": 3, "vector_length": 16, "topk": 3,
                "save_only_topk_weights": true, "target_modules": ["k_proj", "up_proj"]}),
        ),
        case(
            "vblora, many vectors, only the weights stored",
            TIED,
            json!({"type": "vblora", "num_vectors": 300, "vector_length": 4, "topk": 2, "save_only_topk_weights": true,
                "target_modules": ["o_proj"]}),
        ),
        case("poly", UNTIED, json!({"type": "poly", "r": 3, "n_tasks": 3, "target_modules": ["q_proj", "down_proj"]})),
        case(
            "poly, many heads, random",
            BIASED,
            json!({"type": "poly", "r": 2, "n_tasks": 4, "n_skills": 3, "n_splits": 4, "init_weights": false,
                "target_modules": ["k_proj", "up_proj"]}),
        ),
        case(
            "union, mix and match",
            UNTIED,
            json!({"type": "union", "methods": [
                {"type": "prefix", "num_virtual_tokens": 3, "prefix_projection": true, "encoder_hidden_size": 8},
                bottleneck("par_bn", json!({"non_linearity": "tanh"}))]}),
        ),
        case(
            "union of three",
            BIASED,
            json!({"type": "union", "methods": [{"r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"},
                {"type": "prompt", "num_virtual_tokens": 2}, bottleneck("double_seq_bn", json!({"init_weights": "houlsby"}))]}),
        ),
        case(
            "union, UniPELT",
            UNTIED,
            json!({"type": "union", "methods": [
                {"type": "prefix", "num_virtual_tokens": 3, "prefix_projection": true, "encoder_hidden_size": 8,
                    "use_gating": true, "moves_positions": false},
                bottleneck("seq_bn", json!({"use_gating": true, "non_linearity": "tanh"})),
                {"r": 3, "target_modules": ["q_proj", "v_proj"], "use_gating": true}]}),
        ),
        case(
            "union, two gates on the prefix, LoRA everywhere, dropout",
            BIASED,
            json!({"type": "union", "methods": [
                {"type": "prefix", "num_virtual_tokens": 2, "use_gating": true, "shared_gating": false},
                {"r": 2, "target_modules": "all-linear", "use_gating": true, "init_lora_weights": false,
                    "lora_dropout": 0.3}]}),
        ),
        case("full", BIASED, json!({"type": "full"})),
        case("full, tied", TIED, json!({"type": "full"})),
    ]
}
