//! `peft-cli methods`: the catalogue.

use anyhow::Result;
use peft_train::methods::METHODS;

use crate::args::MethodsArgs;

pub(crate) fn run(args: &MethodsArgs) -> Result<()> {
    if args.json {
        out!("{}", serde_json::to_string(METHODS)?);
        return Ok(());
    }
    let yes = |b: bool| if b { "yes" } else { "no" };
    out!("{:<16} {:<16} {:<10} {:<10} {:<9} paper", "name", "peft_type", "trainable", "mergeable", "servable");
    for m in METHODS {
        let flags = (yes(m.trainable), yes(m.mergeable), yes(m.servable));
        out!("{:<16} {:<16} {:<10} {:<10} {:<9} {}", m.name, m.peft_type, flags.0, flags.1, flags.2, m.paper);
        if !m.variants.is_empty() {
            out!("{:<16} keys: {}", "", m.variants);
        }
    }
    Ok(())
}
