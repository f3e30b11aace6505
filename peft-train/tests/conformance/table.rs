//! The table of `docs/conformance.md`: what holds for which method. It is made of the answers in `cases.rs`, and every answer is held to
//! what the checks find, exceptions too.

use std::fmt::Write as _;

use peft_train::methods::METHODS;

use crate::cases::cases;

/// A column: what a check asks of every case on every kind of weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Property {
    Fresh,
    Gradient,
    Files,
    Merged,
    Mixed,
    Quantised,
    Written,
    Resumed,
}

/// Whether a property holds for a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Holds,
    /// It does within the bounds that are said.
    Partly(&'static str),
    /// It cannot, and why.
    Never(&'static str),
}

const COLUMNS: [(Property, &str); 8] = [
    (Property::Fresh, "fresh = base"),
    (Property::Gradient, "gradients"),
    (Property::Files, "save, load"),
    (Property::Merged, "merged"),
    (Property::Mixed, "mixed batch"),
    (Property::Quantised, "quantised base"),
    (Property::Written, "written with a cache"),
    (Property::Resumed, "resumed"),
];

const HEAD: &str = "\
# Conformance

What holds for which method. Every line stands for all variants of the method that `peft-train/tests/conformance/cases.rs` lists, each on
a small Llama whose weights are `f32`, `bf16` and GGUF's `Q8_0`. The page is made from that list, and the suite fails where the list
or the page says another thing than the checks find:

```sh
cargo test -p peft-train --test conformance                     # the checks
UPDATE_PAGE=1 cargo test -p peft-train --test conformance page  # this page, after a change of the list
```

| column | holds when |
|---|---|
| fresh = base | a new adapter moves no logit by more than 1e-6 (4e-6 where a start cancels against what it subtracts), a trained one does |
| gradients | those of every parameter agree with central differences of the loss in `f64` sums (2 %), whatever is recomputed; records in `bf16` move them by less than 2 % of their length |
| save, load | logits are the same to the bit, and a second save gives the same bytes |
| merged | logits of the merged model within 1e-4 |
| mixed batch | rows of a batch through base, two adapters of the method and a DoRA, within 1e-5 of the same rows alone |
| quantised base | all of this over weights that stay `Q8_0` |
| written with a cache | greedy tokens are those of passes over the whole text |
| resumed | an AdamW run that goes on from its checkpoint has the same bits as one that was not interrupted |

";

/// The page.
fn page() -> String {
    let mut notes: Vec<&str> = Vec::new();
    let mut page = HEAD.to_string();
    let titles = COLUMNS.map(|(_, title)| title).join(" | ");
    let _ = writeln!(page, "| method | variants | {titles} |\n|---|---{}|", "|---".repeat(COLUMNS.len()));
    let cases = cases();
    for method in METHODS {
        let own: Vec<_> = cases.iter().filter(|case| case.catalogue_name() == method.name).collect();
        let _ = write!(page, "| `{}` | {}", method.name, own.len());
        for (property, _) in COLUMNS {
            let answers = own.iter().map(|case| case.answer(property));
            let never = answers.clone().all(|answer| matches!(answer, Answer::Never(_)));
            let mut numbers: Vec<usize> = Vec::new();
            for why in answers.filter_map(|answer| match answer {
                Answer::Holds => None,
                Answer::Partly(why) | Answer::Never(why) => Some(why),
            }) {
                let at = notes.iter().position(|note| *note == why).unwrap_or_else(|| {
                    notes.push(why);
                    notes.len() - 1
                });
                if !numbers.contains(&(at + 1)) {
                    numbers.push(at + 1);
                }
            }
            let numbers: String = numbers.iter().map(|n| format!(" [{n}]")).collect();
            let _ = write!(page, " | {}{numbers}", if never { "–" } else { "✓" });
        }
        page.push_str(" |\n");
    }
    page.push_str(
        "\nA ✓ with a note holds for the variants that the note does not speak of, or within what it says.\n\n",
    );
    for (i, note) in notes.iter().enumerate() {
        let _ = writeln!(page, "{}. {note}", i + 1);
    }
    page
}

#[test]
fn the_page_is_made_of_this_list() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/conformance.md");
    if std::env::var_os("UPDATE_PAGE").is_some() {
        std::fs::write(path, page()).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(written == page(), "docs/conformance.md is not what cases.rs says: make it again with UPDATE_PAGE=1");
}
