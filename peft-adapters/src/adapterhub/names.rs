//! How AdapterHub calls the places of each family of models (`adapters/models/*/mixin_*.py`, 1.3).

use peft_core::suggest::did_you_mean;
use peft_core::{Error, Result};

use crate::phm::SHARED;

/// A module of the model's that ends a sublayer, and the one under which AdapterHub keeps the adapters behind it.
struct Place {
    /// End of the path of the sublayer's last layer.
    layer: &'static str,
    /// What stands there instead in AdapterHub's names.
    module: &'static str,
    /// Beginning of the paths that this holds for.
    within: &'static str,
    /// Whether the block ends there, which is the place of ReFT.
    ends_block: bool,
}

/// Families whose modules are called the same.
pub(super) struct Family {
    /// `model_type`, and what the names of transformers' classes begin with.
    models: &'static [(&'static str, &'static str)],
    /// The model without its head, which a file saved from that model leaves out.
    pub(super) body: &'static str,
    places: &'static [Place],
    /// Where LoRA may be: what a config calls it, and the end of the layer's path.
    pub(super) lora: &'static [(&'static str, &'static str)],
    /// Where prefixes stand.
    pub(super) prefix: Option<PrefixPlace>,
    /// The layers of the class head in the order of the forward pass, and the activation between them.
    pub(super) class_head: &'static [&'static str],
    pub(super) head_activation: Option<&'static str>,
}

/// The attentions of a family, which have prefixes.
pub(super) struct PrefixPlace {
    /// Path of an attention, before the number of its layer and behind it.
    path: [&'static str; 2],
    /// What AdapterHub calls the place.
    pub(super) location: &'static str,
}

impl PrefixPlace {
    /// The path of the attention of a layer.
    pub(super) fn attention(&self, layer: &str) -> String {
        let [before, behind] = self.path;
        format!("{before}{layer}{behind}")
    }

    /// The layer whose attention has this path.
    pub(super) fn layer(&self, path: &str) -> Option<usize> {
        let [before, behind] = self.path;
        path.strip_prefix(before)?.strip_suffix(behind)?.parse().ok()
    }
}

const fn prefix(before: &'static str, behind: &'static str, location: &'static str) -> Option<PrefixPlace> {
    Some(PrefixPlace { path: [before, behind], location })
}

const fn place(layer: &'static str, module: &'static str) -> Place {
    Place { layer, module, within: "", ends_block: false }
}

/// The last sublayer of a block.
const fn last(layer: &'static str, module: &'static str) -> Place {
    Place { layer, module, within: "", ends_block: true }
}

/// What holds the ReFT of a block, and what the names of its tensors begin with.
const REFT: &str = "reft_layer.refts";
const REFT_UNITS: &str = "units.";
const BEHIND_ATTENTION: &str = "attention_adapters";
const BEHIND_FEED_FORWARD: &str = "output_adapters";

/// The more special place first: the end of one is the end of another.
const BERT: &[Place] = &[place("attention.output.dense", "attention.output"), last("output.dense", "output")];

const LORA_OF_BERT: &[(&str, &str)] = &[
    ("q", "attention.self.query"),
    ("k", "attention.self.key"),
    ("v", "attention.self.value"),
    ("intermediate_lora", "intermediate.dense"),
    ("output_lora", "output.dense"),
];

static FAMILIES: [Family; 6] = [
    Family {
        models: &[("llama", "Llama"), ("mistral", "Mistral")],
        body: "model",
        places: &[place("self_attn.o_proj", BEHIND_ATTENTION), last("mlp.down_proj", BEHIND_FEED_FORWARD)],
        // The package has these two the other way round than in other families.
        lora: &[
            ("q", "self_attn.q_proj"),
            ("k", "self_attn.k_proj"),
            ("v", "self_attn.v_proj"),
            ("intermediate_lora", "mlp.down_proj"),
            ("output_lora", "mlp.up_proj"),
        ],
        prefix: prefix("model.layers.", ".self_attn", "self_prefix"),
        class_head: &["score"],
        head_activation: None,
    },
    Family {
        models: &[("gpt2", "GPT2")],
        body: "transformer",
        places: &[place("attn.c_proj", BEHIND_ATTENTION), last("mlp.c_proj", BEHIND_FEED_FORWARD)],
        lora: &[("intermediate_lora", "mlp.c_fc"), ("output_lora", "mlp.c_proj")],
        prefix: prefix("transformer.h.", ".attn", "self_prefix"),
        class_head: &["score"],
        head_activation: None,
    },
    Family {
        models: &[("bert", "Bert")],
        body: "bert",
        places: BERT,
        lora: LORA_OF_BERT,
        prefix: prefix("bert.encoder.layer.", ".attention.self", "self_prefix"),
        class_head: &["bert.pooler.dense", "classifier"],
        head_activation: Some("tanh"),
    },
    Family {
        models: &[("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta")],
        body: "roberta",
        places: BERT,
        lora: LORA_OF_BERT,
        prefix: prefix("roberta.encoder.layer.", ".attention.self", "self_prefix"),
        class_head: &["classifier.dense", "classifier.out_proj"],
        head_activation: Some("tanh"),
    },
    Family {
        models: &[("distilbert", "DistilBert")],
        body: "distilbert",
        places: &[place("attention.out_lin", BEHIND_ATTENTION), last("ffn.lin2", BEHIND_FEED_FORWARD)],
        lora: &[
            ("q", "attention.q_lin"),
            ("k", "attention.k_lin"),
            ("v", "attention.v_lin"),
            ("intermediate_lora", "ffn.lin1"),
            ("output_lora", "ffn.lin2"),
        ],
        prefix: prefix("distilbert.transformer.layer.", ".attention", "self"),
        class_head: &["pre_classifier", "classifier"],
        head_activation: Some("relu"),
    },
    Family {
        models: &[("t5", "T5"), ("mt5", "MT5")],
        body: "",
        places: &[
            place("layer.0.SelfAttention.o", "layer.0"),
            Place { within: "encoder.", ..last("layer.1.DenseReluDense.wo", "layer.1") },
            Place { within: "decoder.", ..place("layer.1.EncDecAttention.o", "layer.1") },
            Place { within: "decoder.", ..last("layer.2.DenseReluDense.wo", "layer.2") },
        ],
        lora: &[
            ("q", "SelfAttention.q"),
            ("k", "SelfAttention.k"),
            ("v", "SelfAttention.v"),
            ("q", "EncDecAttention.q"),
            ("k", "EncDecAttention.k"),
            ("v", "EncDecAttention.v"),
            ("intermediate_lora", "DenseReluDense.wi"),
            ("intermediate_lora", "DenseReluDense.wi_1"),
            ("output_lora", "DenseReluDense.wo"),
        ],
        prefix: None,
        class_head: &[],
        head_activation: None,
    },
];

/// The family of a `model_type`.
///
/// # Errors
/// AdapterHub's package has no bottleneck adapters for it, or has them where they act otherwise than ours.
pub(super) fn family(model_type: &str) -> Result<&'static Family> {
    let known = || FAMILIES.iter().flat_map(|f| f.models).map(|(name, _)| *name);
    FAMILIES.iter().find(|f| f.models.iter().any(|(name, _)| *name == model_type)).ok_or_else(|| {
        let near = did_you_mean(model_type, known());
        let list = known().collect::<Vec<_>>().join(", ");
        Error::config("model_type", format!("AdapterHub's files are not known for `{model_type}`{near}; known: {list}"))
    })
}

impl Family {
    /// The class of transformers' for a model of this type with the head of `task_type`.
    pub(super) fn model_class(&self, model_type: &str, task_type: &str) -> String {
        let stem = self.models.iter().find(|(name, _)| *name == model_type).map_or("", |(_, stem)| stem);
        match (task_type, stem) {
            ("SEQ_CLS", _) => format!("{stem}ForSequenceClassification"),
            ("SEQ_2_SEQ_LM", _) => format!("{stem}ForConditionalGeneration"),
            (_, "GPT2") => "GPT2LMHeadModel".to_owned(),
            _ => format!("{stem}ForCausalLM"),
        }
    }

    /// AdapterHub's key of the adapter `name` for ours, which is a layer's path and the tensor's name behind it.
    pub(super) fn their_key(&self, key: &str, name: &str) -> Option<String> {
        if let Some(tensor) = key.strip_prefix(SHARED).and_then(|rest| rest.strip_prefix('.')) {
            return Some(format!("{}.{SHARED}.{name}.{tensor}", self.body));
        }
        self.places.iter().filter(|place| key.starts_with(place.within)).find_map(|place| {
            let (block, tensor) = key.split_once(&format!(".{}.", place.layer))?;
            if tensor.starts_with(REFT_UNITS) {
                return place.ends_block.then(|| format!("{block}.{REFT}.{name}.{tensor}"));
            }
            Some(format!("{block}.{}.adapters.{name}.{tensor}", place.module))
        })
    }

    /// A path with the model's body in front, which a file saved from the body leaves out.
    pub(super) fn whole(&self, path: &str) -> String {
        if self.body.is_empty() || path.starts_with(&format!("{}.", self.body)) {
            path.to_owned()
        } else {
            format!("{}.{path}", self.body)
        }
    }

    /// What a config calls the LoRA on the layer at `path`, and the block, where blocks are counted once. `None` where the package has
    /// none like ours.
    pub(super) fn lora_layer(&self, path: &str) -> Option<(&'static str, Option<usize>)> {
        let Some(place) = &self.prefix else {
            let found = self.lora.iter().find(|(_, end)| path.ends_with(&format!(".{end}")));
            return found.map(|(kind, _)| (*kind, None));
        };
        let (block, layer) = path.strip_prefix(place.path[0])?.split_once('.')?;
        let (kind, _) = self.lora.iter().find(|(_, end)| *end == layer)?;
        Some((kind, Some(block.parse().ok()?)))
    }

    /// Our key for AdapterHub's of the adapter `name`; `None` for what is no bottleneck adapter's.
    pub(super) fn our_key(&self, key: &str, name: &str) -> Option<String> {
        if let Some((_, tensor)) = key.split_once(&format!("{SHARED}.{name}.")) {
            return Some(format!("{SHARED}.{tensor}"));
        }
        let reft = key.split_once(&format!(".{REFT}.{name}.")).filter(|(_, tensor)| tensor.starts_with(REFT_UNITS));
        let (module, tensor) = reft.or_else(|| key.split_once(&format!(".adapters.{name}.")))?;
        let module = self.whole(module);
        self.places.iter().filter(|place| module.starts_with(place.within)).find_map(|place| {
            if reft.is_some() {
                return place.ends_block.then(|| format!("{module}.{}.{tensor}", place.layer));
            }
            let block = module.strip_suffix(place.module)?.strip_suffix('.')?;
            Some(format!("{block}.{}.{tensor}", place.layer))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (model, ours, theirs) in [
            (
                "llama",
                "model.layers.3.mlp.down_proj.adapter_up.bias",
                "model.layers.3.output_adapters.adapters.a.adapter_up.bias",
            ),
            (
                "mistral",
                "model.layers.0.self_attn.o_proj.scaling",
                "model.layers.0.attention_adapters.adapters.a.scaling",
            ),
            ("gpt2", "transformer.h.1.attn.c_proj.scaling", "transformer.h.1.attention_adapters.adapters.a.scaling"),
            (
                "bert",
                "bert.encoder.layer.2.attention.output.dense.scaling",
                "bert.encoder.layer.2.attention.output.adapters.a.scaling",
            ),
            ("bert", "bert.encoder.layer.2.output.dense.scaling", "bert.encoder.layer.2.output.adapters.a.scaling"),
            (
                "distilbert",
                "distilbert.transformer.layer.0.ffn.lin2.scaling",
                "distilbert.transformer.layer.0.output_adapters.adapters.a.scaling",
            ),
            ("gpt2", "shared_parameters.phm_rule", "transformer.shared_parameters.a.phm_rule"),
            (
                "bert",
                "bert.encoder.layer.1.output.dense.units.0.learned_source.bias",
                "bert.encoder.layer.1.reft_layer.refts.a.units.0.learned_source.bias",
            ),
            (
                "t5",
                "encoder.block.1.layer.1.DenseReluDense.wo.units.1.projection.weight",
                "encoder.block.1.reft_layer.refts.a.units.1.projection.weight",
            ),
            (
                "t5",
                "decoder.block.1.layer.2.DenseReluDense.wo.units.1.projection.weight",
                "decoder.block.1.reft_layer.refts.a.units.1.projection.weight",
            ),
            ("t5", "encoder.block.0.layer.1.DenseReluDense.wo.scaling", "encoder.block.0.layer.1.adapters.a.scaling"),
            ("t5", "decoder.block.0.layer.2.DenseReluDense.wo.scaling", "decoder.block.0.layer.2.adapters.a.scaling"),
        ] {
            let family = family(model).unwrap();
            assert_eq!(family.their_key(ours, "a").as_deref(), Some(theirs));
            assert_eq!(family.our_key(theirs, "a").as_deref(), Some(ours));
        }
        let bare = family("bert").unwrap().our_key("encoder.layer.0.output.adapters.x.y.scaling", "x.y");
        assert_eq!(bare.as_deref(), Some("bert.encoder.layer.0.output.dense.scaling"));
        let cross = family("t5").unwrap().our_key("decoder.block.0.layer.1.adapters.a.scaling", "a");
        assert_eq!(cross.as_deref(), Some("decoder.block.0.layer.1.EncDecAttention.o.scaling"));
        assert_eq!(family("bert").unwrap().their_key("classifier.weight", "a"), None);
        assert!(family("lama").err().unwrap().to_string().contains("did you mean `llama`"));
    }
}
