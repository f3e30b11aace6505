//! Texts of which a part is hidden: nothing is lost, what counts is what was hidden, and the seed decides.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod data_support;

use data_support::{Folder, tokenizer};
use peft_train::data::{
    Corruption, DataError, DataSpec, Dataset, DecoderInputs, EncodeOptions, FillInTheMiddle, Format, HfTextTokenizer,
    SpanCorruption, TextTokenizer,
};
use serde_json::json;
use tokenizers::AddedToken;

const TEXT: &str = "def add(a, b):\n    return a + b  # é, 好\n";
const MARKS: [&str; 3] = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"];

fn with_tokens(tokens: &[String]) -> HfTextTokenizer {
    let mut inner = tokenizers::Tokenizer::clone(tokenizer(None).inner());
    inner.add_special_tokens(tokens.iter().map(|t| AddedToken::from(t.clone(), true))).unwrap();
    HfTextTokenizer::new(inner, Some("<s>".into()), Some("</s>".into()), None).unwrap()
}

fn load(text: &str, tokenizer: &HfTextTokenizer, options: &EncodeOptions) -> Result<Dataset, DataError> {
    let folder = Folder::new();
    let path = folder.write("rows.jsonl", json!({"text": text}).to_string());
    Dataset::load(&DataSpec::from(path.as_path()), Some(options.format), Some(tokenizer), options).map(|(d, _)| d)
}

fn middle(how: FillInTheMiddle, seed: u64) -> EncodeOptions {
    EncodeOptions { corruption: Some(Corruption::Middle(how)), seed, ..EncodeOptions::new(Format::Text) }
}

/// Prefix, middle and suffix of a row, and whether the suffix stands first, which nobody sees where the prefix is empty, unless `never`.
fn taken_apart(ids: &[u32], tokenizer: &HfTextTokenizer, never: bool) -> Option<([String; 3], bool)> {
    let [before, hole, behind] = MARKS.map(|mark| tokenizer.encode(mark, false).unwrap()[0]);
    let at = |id: u32| ids.iter().position(|i| *i == id);
    let (before, hole, behind) = (at(before)?, at(hole)?, at(behind)?);
    assert_eq!((ids[0], before), (tokenizer.encode("<s>", false).unwrap()[0], 1), "its front token stays in front");
    assert_eq!(ids.last().copied(), tokenizer.eos_id());
    let text = |part: &[u32]| tokenizer.inner().decode(part, false).unwrap();
    let (end, first) = (ids.len() - 1, !never && behind == before + 1);
    let parts = match first {
        // SPM: the prefix and the middle are one text.
        true => [&ids[hole + 1..end], &[], &ids[behind + 1..hole]],
        false => [&ids[before + 1..behind], &ids[hole + 1..end], &ids[behind + 1..hole]],
    };
    Some((parts.map(text), first))
}

#[test]
fn a_text_with_its_middle_last_is_still_the_text() {
    let tokenizer = with_tokens(&MARKS.map(String::from));
    let (mut plain, mut suffix_first, mut cuts) = (0, 0, std::collections::BTreeSet::new());
    for seed in 0..200 {
        let d = load(TEXT, &tokenizer, &middle(FillInTheMiddle::default(), seed)).unwrap();
        assert_eq!(d.labels(0).iter().filter(|l| **l == -100).count(), 0, "all of it counts");
        match taken_apart(d.input_ids(0), &tokenizer, false) {
            None => plain += 1,
            Some(([prefix, middle, suffix], first)) => {
                assert_eq!(format!("{prefix}{middle}{suffix}"), TEXT);
                suffix_first += usize::from(first);
                cuts.insert((prefix.len(), suffix.len()));
            }
        }
        let again = load(TEXT, &tokenizer, &middle(FillInTheMiddle::default(), seed)).unwrap();
        assert_eq!(again.input_ids(0), d.input_ids(0));
    }
    assert!((70..130).contains(&plain) && (30..70).contains(&suffix_first), "{plain} {suffix_first}");
    assert!(cuts.len() > 60, "{cuts:?}");
    let never = FillInTheMiddle { rate: 0.0, ..FillInTheMiddle::default() };
    let d = load(TEXT, &tokenizer, &middle(never, 0)).unwrap();
    assert_eq!(d.input_ids(0), load(TEXT, &tokenizer, &EncodeOptions::new(Format::Text)).unwrap().input_ids(0));
}

#[test]
fn the_middle_alone_may_count_and_what_is_farthest_is_cut() {
    let tokenizer = with_tokens(&MARKS.map(String::from));
    let always = FillInTheMiddle { rate: 1.0, spm_rate: 0.0, middle_only: true, ..FillInTheMiddle::default() };
    for seed in 0..40 {
        let d = load(TEXT, &tokenizer, &middle(always.clone(), seed)).unwrap();
        let ([_, middle, _], _) = taken_apart(d.input_ids(0), &tokenizer, true).unwrap();
        let counted: Vec<u32> = d.labels(0).into_iter().filter_map(|l| u32::try_from(l).ok()).collect();
        assert_eq!(counted.last().copied(), tokenizer.eos_id());
        assert_eq!(tokenizer.inner().decode(&counted[..counted.len() - 1], false).unwrap(), middle);

        let short = EncodeOptions { max_length: Some(14), ..middle_options(&always, seed) };
        let d = load(TEXT, &tokenizer, &short).unwrap();
        assert!(d.input_ids(0).len() <= 14);
        let ([prefix, kept, suffix], _) = taken_apart(d.input_ids(0), &tokenizer, true).unwrap();
        assert!(middle.starts_with(kept.trim_end_matches('\u{fffd}')), "{kept:?} of {middle:?}");
        assert!(prefix.is_empty() || suffix.is_empty() || kept == middle);
    }
}

fn middle_options(how: &FillInTheMiddle, seed: u64) -> EncodeOptions {
    middle(how.clone(), seed)
}

/// Letters as tokens with T5's frame and `sentinels` of them.
fn letters(sentinels: usize) -> HfTextTokenizer {
    let mut vocab = serde_json::Map::new();
    for (id, token) in ["<pad>", "</s>", "<unk>"].into_iter().enumerate() {
        vocab.insert(token.into(), json!(id));
    }
    for (i, letter) in ('a'..='z').enumerate() {
        vocab.insert(letter.into(), json!(3 + i));
    }
    let added: Vec<_> = (0..sentinels)
        .map(|i| json!({"id": 29 + i, "content": format!("<extra_id_{i}>"), "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false}))
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
        }
    });
    let inner = tokenizers::Tokenizer::from_bytes(tokenizer.to_string()).unwrap();
    HfTextTokenizer::new(inner, None, Some("</s>".into()), None).unwrap()
}

fn spans(seed: u64) -> EncodeOptions {
    EncodeOptions {
        corruption: Some(Corruption::Spans(SpanCorruption::default())),
        decoder: Some(DecoderInputs { start: 0, padding: 0 }),
        seed,
        ..EncodeOptions::new(Format::Text)
    }
}

#[test]
fn source_and_target_of_hidden_spans_are_the_text() {
    let tokenizer = letters(100);
    let text: Vec<String> = (0..60u32).map(|i| char::from(b'a' + (i * 7 % 26) as u8).to_string()).collect();
    let ids = tokenizer.encode(&text.join(" "), false).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..30 {
        let d = load(&text.join(" "), &tokenizer, &spans(seed)).unwrap();
        let source = &d.input_ids(0)[..d.source_tokens(0)];
        let target: Vec<u32> = d.labels(0).into_iter().filter_map(|l| u32::try_from(l).ok()).collect();
        assert_eq!((source.last(), target.last()), (Some(&1), Some(&1)), "both end with the end token");
        // The decoder reads its target one place later.
        let read = &d.input_ids(0)[d.source_tokens(0)..];
        assert_eq!((read[0], &read[1..]), (0, &target[..target.len() - 1]));
        // 15 % of 60 in spans of 3.
        let sentinel = |id: &&u32| **id >= 29;
        assert_eq!((source.iter().filter(sentinel).count(), target.len() - 1), (3, 9 + 3));
        assert!(source.iter().filter(sentinel).eq([29, 30, 31].iter()) && source[0] < 29 && target[0] == 29);
        let hidden = |id: u32| {
            target.iter().skip_while(move |t| **t != id).skip(1).take_while(|t| **t < 29 && **t != 1).copied()
        };
        let whole: Vec<u32> = source[..source.len() - 1]
            .iter()
            .flat_map(|&id| if id < 29 { vec![id] } else { hidden(id).collect() })
            .collect();
        assert_eq!(whole, ids);
        seen.insert(source.to_vec());
    }
    assert!(seen.len() > 25);
    let short = EncodeOptions { max_length: Some(20), ..spans(1) };
    let d = load(&text.join(" "), &tokenizer, &short).unwrap();
    assert!(d.source_tokens(0) <= 20 && d.stats().truncated_prompts == 1);
}

#[test]
fn what_cannot_be_hidden_is_said() {
    let fails = |result: Result<Dataset, DataError>, says: &str| {
        let message = result.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(says), "{message:?} does not say {says:?}");
    };
    let marked = with_tokens(&MARKS.map(String::from));
    let default = FillInTheMiddle::default;
    fails(load(TEXT, &tokenizer(None), &middle(default(), 0)), "none of the known tokens");
    let named = |name: &str| FillInTheMiddle {
        prefix: Some(name.into()),
        middle: Some(MARKS[1].into()),
        suffix: Some(MARKS[2].into()),
        ..default()
    };
    assert!(load(TEXT, &marked, &middle(named(MARKS[0]), 0)).is_ok());
    fails(load(TEXT, &marked, &middle(named("<begin here>"), 0)), "`<begin here>` is not one token");
    fails(
        load(TEXT, &marked, &middle(FillInTheMiddle { prefix: Some("a".into()), ..default() }, 0)),
        "or none of them",
    );
    fails(load(TEXT, &marked, &middle(FillInTheMiddle { rate: 1.5, ..default() }, 0)), "between 0 and 1");
    fails(load(TEXT, &marked, &EncodeOptions { format: Format::Completion, ..middle(default(), 0) }), "format text");
    let paired = EncodeOptions { decoder: Some(DecoderInputs { start: 0, padding: 0 }), ..middle(default(), 0) };
    fails(load(TEXT, &marked, &paired), "does not tell apart");
    fails(load(TEXT, &marked, &EncodeOptions { decoder: None, ..spans(0) }), "an encoder-decoder");
    fails(load("a b c", &letters(0), &spans(0)), "no sentinels");
    fails(load("a", &letters(3), &spans(0)), "nothing to hide");
    let density = EncodeOptions {
        corruption: Some(Corruption::Spans(SpanCorruption { density: 0.0, mean_length: 3.0 })),
        ..spans(0)
    };
    fails(load("a b c", &letters(3), &density), "density lies between 0 and 1");
}
