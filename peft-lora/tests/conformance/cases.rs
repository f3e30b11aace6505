//! The methods and variants that every test of the suite runs over. A further one is one entry more.

use serde_json::{Value, json};

use crate::model::Shape;

/// One method with one set of keys.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// The `[method]` table.
    pub(crate) method: Value,
    /// The model it is tried on.
    pub(crate) shape: Shape,
    /// Whether a fresh adapter changes nothing.
    pub(crate) identity: bool,
    /// Ends of parameter names whose gradient leaves a path out on purpose, so that differences of the loss say another
    /// thing (DoRA's norm is a constant to A and B).
    pub(crate) partial_gradient: &'static [&'static str],
}

const UNTIED: Shape = Shape { tied: false, attention_bias: false };
const TIED: Shape = Shape { tied: true, attention_bias: false };
const BIASED: Shape = Shape { tied: false, attention_bias: true };
const DORA: &[&str] = &["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"];

fn case(name: &'static str, shape: Shape, method: Value) -> Case {
    let dora = method.get("use_dora") == Some(&Value::Bool(true));
    let identity = method.get("init_lora_weights") != Some(&Value::Bool(false));
    Case { name, method, shape, identity, partial_gradient: if dora { DORA } else { &[] } }
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
        case("full", BIASED, json!({"type": "full"})),
        case("full, tied", TIED, json!({"type": "full"})),
    ]
}
