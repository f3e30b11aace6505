/*!
Soft prompts: virtual tokens in front of every sequence, the base untouched. With PEFT's config keys and files.

* [`PrefixConfig`]: prefix tuning (Li & Liang 2021, arXiv:2101.00190; P-tuning v2, arXiv:2110.07602), keys and values in
  front of each layer's own, trained as they are or through a network.
* [`PromptConfig`]: prompt tuning (Lester et al. 2021, arXiv:2104.08691), embeddings in front of each sequence's own.
* [`MultitaskConfig`]: multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861), one prompt times a factor for each task.
* [`CptConfig`]: context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222), the tokens of examples, moved a little.
* [`PTuningConfig`]: P-tuning (Liu et al. 2021, arXiv:2103.10385), such embeddings made by a network.
* [`AdaptionConfig`]: Llama-Adapter (Zhang et al. 2023, arXiv:2303.16199), tokens beside the sequence in the last layers, with a softmax
  of their own and a gate. They are no virtual tokens: nothing stands in front of the sequence, and its positions are as they were.

What `modules_to_save` names is trained whole beside them, and on a classifier the head, as PEFT has it. A prompt stands in front
of an encoder's `[CLS]` too, and the class is read from the prompt's first row; a decoder's is read from the last token either way.

PEFT stores what the network makes and drops the network, so its files cannot be trained further there. Checkpoints here hold
the network, and a run goes on bit by bit; from an adapter file, training goes on with the virtual tokens themselves.
*/

mod adaption;
mod cpt;
mod keys;
mod multitask;
mod network;
mod p_tuning;
mod prefix;
mod prompt;

pub use adaption::AdaptionConfig;
pub use cpt::CptConfig;
pub use keys::word_embedding;
pub use multitask::MultitaskConfig;
pub use p_tuning::PTuningConfig;
pub use prefix::PrefixConfig;
pub use prompt::{PromptConfig, PromptStart};

/// The key of every method's tensor in PEFT's adapter files.
pub const PROMPT_EMBEDDINGS: &str = "prompt_embeddings";

/// What an adapter folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// The virtual tokens, as PEFT writes them.
    Flat,
    /// What is trained, as our checkpoints hold it.
    Trained,
}
