//! Rows of every format as tokens and labels, and what unusable rows say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod data_support;

use data_support::{Folder, ids, jsonl, parts, tokenizer};
use peft_train::data::{DataSpec, Dataset, EncodeOptions, Encoder, Format, HfTextTokenizer, preview};

fn expect(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

fn labelled(context: &[u32], target: &[u32]) -> Vec<i32> {
    let masked = context.iter().map(|_| -100);
    masked.chain(target.iter().map(|&i| i as i32)).collect()
}

#[test]
fn text_counts_everything_and_has_no_end_token() {
    let d = jsonl(r#"{"text": "Hello there"}"#, |_| {}).unwrap();
    let expected = [ids("<s>"), ids("Hello there")].concat();
    assert_eq!(d.input_ids(0), expected);
    assert_eq!(d.labels(0), labelled(&[], &expected));
    let d = jsonl(r#"{"text": "Hello there"}"#, |o| o.text_eos = true).unwrap();
    assert_eq!(d.input_ids(0), [expected, ids("</s>")].concat());
}

#[test]
fn completion_is_tokenised_apart_and_closed() {
    let d =
        jsonl("{\"prompt\": \"Hel\", \"completion\": \"lo\"}\n{\"prompt\": \"a\", \"completion\": \"b</s>\"}", |_| {})
            .unwrap();
    assert_ne!([ids("Hel"), ids("lo")].concat(), ids("Hello"), "the case shows nothing");
    let (context, target) = ([ids("<s>"), ids("Hel")].concat(), [ids("lo"), ids("</s>")].concat());
    assert_eq!(d.input_ids(0), [context.clone(), target.clone()].concat());
    assert_eq!(d.labels(0), labelled(&context, &target));
    // An end token in the data is not doubled.
    assert_eq!(parts(&d, 1), ("<s>a".into(), "b</s>".into()));
}

#[test]
fn alpaca_prompts_with_and_without_input() {
    let d = jsonl(
        "{\"instruction\": \"Say {input}\", \"input\": \"{instruction}\", \"output\": \"yes\"}\n\
         {\"instruction\": \"Go\", \"input\": \"\", \"output\": \"ok\"}\n\
         {\"instruction\": \"Go\", \"input\": null, \"output\": \"ok\"}\n\
         {\"instruction\": \"Go\", \"output\": \"\"}",
        |_| {},
    )
    .unwrap();
    let (context, target) = parts(&d, 0);
    expect(
        &context,
        &["paired with an input", "### Instruction:\nSay {input}\n\n### Input:\n{instruction}\n\n### Response:\n"],
    );
    assert_eq!(target, "yes</s>");
    let (context, target) = parts(&d, 1);
    assert!(context.ends_with("### Instruction:\nGo\n\n### Response:\n") && !context.contains("Input"));
    assert_eq!(target, "ok</s>");
    assert_eq!(d.input_ids(1), d.input_ids(2));
    assert_eq!(parts(&d, 3).1, "</s>");
    let d = jsonl(r#"{"instruction": "Go", "output": "ok"}"#, |o| o.template = Some("Q: {{ instruction }}\nA:".into()))
        .unwrap();
    assert_eq!(parts(&d, 0), ("<s>Q: Go\nA:".into(), "ok</s>".into()));
}

#[test]
fn templates_render_text_or_prompt() {
    let t = |s: &str| Some(s.to_string());
    let d =
        jsonl(r#"{"title": "T", "n": 3}"#, |o| o.template = t("{{ title }} {{ n }}{% if x %}!{% endif %}\n")).unwrap();
    assert_eq!(parts(&d, 0).1, "<s>T 3\n");
    for target in ["completion", "output", "label"] {
        let row = format!(r#"{{"q": "Hello", "{target}": "fine"}}"#);
        let d = jsonl(&row, |o| o.template = t("{{ q | upper }}?")).unwrap();
        assert_eq!(parts(&d, 0), ("<s>HELLO?".into(), "fine</s>".into()));
    }
    let e = jsonl("{\"a\": \"x\"}\n{\"b\": \"y\"}", |o| o.template = t("{{ a }}")).unwrap_err();
    expect(&e, &["d.jsonl:2: ", "data.template needs column `a`", "the row has `b`"]);
    let e = jsonl(r#"{"a": null}"#, |o| o.template = t("{{ a }}")).unwrap_err();
    expect(&e, &["d.jsonl:1: ", "column `a`", "null"]);
    let e = jsonl(r#"{"a": "x"}"#, |o| o.template = t("{{ a ")).unwrap_err();
    expect(&e, &["data.template: ", "line 1"]);
    let e = jsonl(r#"{"a": "x", "label": "y"}"#, |o| o.template = t("{{ a }} {{ label }}")).unwrap_err();
    expect(&e, &["data.template reads column `label`", "the prompt only"]);
}

#[test]
fn classification_through_template_and_words() {
    let row = "{\"text\": \"good\", \"label\": \"positive\"}\n{\"text\": \"bad\", \"label\": 0}";
    let template = Some("Review: {{ text }}\nSentiment: ".to_string());
    let d = jsonl(row, |o| o.template = template.clone()).unwrap();
    // The space before the label is the label's.
    assert_eq!(parts(&d, 0), ("<s>Review: good\nSentiment:".into(), " positive</s>".into()));
    assert_eq!(parts(&d, 1).1, " 0</s>");
    let words = [("positive", "yes"), ("0", "no")].map(|(k, v)| (k.to_string(), v.to_string()));
    let d = jsonl(row, |o| (o.template, o.label_words) = (template.clone(), words.clone().into())).unwrap();
    assert_eq!((parts(&d, 0).1, parts(&d, 1).1), (" yes</s>".into(), " no</s>".into()));
    let e = jsonl(&row.replace("\"positive\"", "\"positiv\""), |o| {
        (o.template, o.label_words) = (template.clone(), words.into());
    })
    .unwrap_err();
    expect(&e, &["d.jsonl:1: ", "label `positiv` is not in", "did you mean `positive`?"]);
    let e = jsonl(row, |_| {}).unwrap_err();
    expect(&e, &["classification", "data.template", "format text"]);
}

#[test]
fn tokens_as_they_are() {
    let d = jsonl("{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, 3]}\n{\"input_ids\": [4, 5]}", |_| {}).unwrap();
    assert_eq!((d.input_ids(0), d.labels(0)), (&[1, 2, 3][..], vec![-100, -100, 3]));
    assert_eq!(d.labels(1), [4, 5]);
    // Needs no tokenizer.
    let f = Folder::new();
    let spec = DataSpec::Path(f.write("t.jsonl", r#"{"input_ids": [1, 2]}"#));
    let (d, format) = Dataset::load(&spec, None, None, &EncodeOptions::new(Format::Text)).unwrap();
    assert_eq!((d.len(), format), (1, Format::Tokens));

    for (row, expected) in [
        (r#"{"input_ids": [1, 2], "labels": [1]}"#, "`labels` has 1 entries, `input_ids` 2"),
        (r#"{"input_ids": [1, 10]}"#, "input_ids[1] is 10, outside the vocabulary (0 to 9)"),
        (r#"{"input_ids": [1, -2]}"#, "input_ids[1] is -2, outside"),
        (r#"{"input_ids": [1, 2], "labels": [-100, -1]}"#, "labels[1] is -1, outside"),
        (r#"{"input_ids": [1, 99999999999]}"#, "outside the vocabulary"),
        (r#"{"input_ids": [1, 2.5]}"#, "column `input_ids[1]`: expected an integer, found a number"),
        (r#"{"input_ids": "12"}"#, "column `input_ids`: expected an array of token ids, found a string"),
        (r#"{"input_ids": [1, 2], "labels": 3}"#, "`labels` is a class id"),
        (r#"{"input_ids": [1, 2], "label": 3}"#, "`label` is a class id"),
        (r#"{"input_ids": [1, 2], "labels": [-100, -100]}"#, "no token of this row counts"),
        (r#"{"input_ids": [1, 2], "labels": [1, -100]}"#, "that of the first token never counts"),
        (r#"{"input_ids": [1]}"#, "no token of this row counts: it has one token"),
        (r#"{"input_ids": []}"#, "it has no tokens"),
        (r#"{"input_ids": [1, 2], "attention_mask": [1, 0]}"#, "marks padding"),
    ] {
        let e = jsonl(&format!("{{\"input_ids\": [1, 2]}}\n{row}"), |o| o.vocab_size = Some(10)).unwrap_err();
        expect(&e, &["d.jsonl:2: ", expected]);
    }
}

#[test]
fn unusable_rows_name_line_and_columns() {
    for (rows, expected) in [
        ("{\"text\": \"a b\"}\n{\"text\": \"\"}", &["d.jsonl:2: the text is empty"][..]),
        (
            "{\"text\": \"a b\"}\n{\"txt\": \"a\"}",
            &["d.jsonl:2: column `text` is missing", "has `txt`", "did you mean `txt`?"],
        ),
        ("{\"text\": \"a b\"}\n{}", &["d.jsonl:2: column `text` is missing, the row has no columns"]),
        ("{\"text\": 5}", &["d.jsonl:1: column `text`: expected a string, found a number"]),
        (
            "{\"prompt\": \"a\", \"completion\": null}",
            &["d.jsonl:1: column `completion`: expected a string, found null"],
        ),
        (
            "{\"instruction\": \"a\", \"output\": \"b\", \"input\": []}",
            &["d.jsonl:1: column `input`: expected a string, found an array"],
        ),
        (
            "{\"question\": \"a\", \"answer\": \"b\"}",
            &["d.jsonl:1: no format fits the columns `question`, `answer`", "data.template"],
        ),
        ("{\"source\": \"a\", \"target\": \"b\"}", &["format seq2seq comes with encoder-decoder models", "`prompt`"]),
        (
            "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}",
            &["format preference comes with preference objectives"],
        ),
    ] {
        expect(&jsonl(rows, |_| {}).unwrap_err(), expected);
    }
    let e = jsonl(r#"{"text": "Hello"}"#, |o| o.vocab_size = Some(20)).unwrap_err();
    expect(&e, &["d.jsonl:1: ", "the model's vocabulary has 20", "do not belong together"]);
    // The first error of a file is the one that is told, whatever thread meets it.
    let many: String =
        (1..=5000).map(|i| if i == 1200 || i > 4000 { "{}\n" } else { "{\"text\": \"a b\"}\n" }).collect();
    expect(&jsonl(&many, |_| {}).unwrap_err(), &["d.jsonl:1200: "]);
}

#[test]
fn settings_that_do_not_fit() {
    let t = tokenizer(None);
    let check = |set: &dyn Fn(&mut EncodeOptions), format| {
        let mut options = EncodeOptions::new(format);
        set(&mut options);
        Encoder::new(Some(&t), &options).unwrap_err().to_string()
    };
    expect(&check(&|o| o.max_length = Some(1), Format::Text), &["data.max_length must be 2 or more"]);
    expect(&check(&|o| o.template = Some("x".into()), Format::Tokens), &["takes no `data.template`"]);
    expect(&check(&|o| _ = o.label_words.insert("a".into(), "b".into()), Format::Text), &["data.label_words"]);
    let e = Encoder::new(None, &EncodeOptions::new(Format::Text)).unwrap_err().to_string();
    expect(&e, &["needs a tokenizer", "tokenizer.json"]);
    let endless = HfTextTokenizer::new(t.inner().clone(), None, None, None).unwrap();
    let e = Encoder::new(Some(&endless), &EncodeOptions::new(Format::Completion)).unwrap_err().to_string();
    expect(&e, &["names none", "eos_token"]);
    assert!(Encoder::new(Some(&endless), &EncodeOptions::new(Format::Text)).is_ok());
    let e = HfTextTokenizer::new(t.inner().clone(), None, Some("<end>".into()), None).unwrap_err().to_string();
    expect(&e, &["eos_token `<end>` is not in"]);
}

#[test]
fn truncation_keeps_begin_token_and_target() {
    let row = r#"{"prompt": "abcdefgh", "completion": "xyz"}"#;
    let whole = jsonl(row, |_| {}).unwrap();
    let n = whole.row_length(0);
    let cut = jsonl(row, |o| o.max_length = Some(n - 3)).unwrap();
    assert_eq!(parts(&cut, 0), ("<s>defgh".into(), "xyz</s>".into()));
    assert_eq!((cut.stats().truncated_prompts, cut.stats().truncated_targets), (1, 0));
    let cut = jsonl(row, |o| o.max_length = Some(3)).unwrap();
    assert_eq!(parts(&cut, 0), ("<s>".into(), "xy".into()));
    assert_eq!((cut.stats().truncated_prompts, cut.stats().truncated_targets), (1, 1));
    let cut = jsonl(r#"{"text": "abcdefgh"}"#, |o| o.max_length = Some(4)).unwrap();
    assert_eq!(parts(&cut, 0).1, "<s>abc");
    let exact = jsonl(row, |o| o.max_length = Some(n)).unwrap();
    assert_eq!(exact.input_ids(0), whole.input_ids(0));
    assert_eq!(exact.stats().truncated_prompts, 0);
}

#[test]
fn the_tokenizers_own_truncation_and_padding_are_off() {
    let mut inner = tokenizers::Tokenizer::clone(tokenizer(None).inner());
    inner.with_truncation(Some(tokenizers::TruncationParams { max_length: 3, ..Default::default() })).unwrap();
    inner.with_padding(Some(tokenizers::PaddingParams {
        strategy: tokenizers::PaddingStrategy::Fixed(64),
        ..Default::default()
    }));
    let t = HfTextTokenizer::new(inner, None, Some("</s>".into()), None).unwrap();
    let f = Folder::new();
    let spec = DataSpec::Path(f.write("t.txt", "abcdefgh\n"));
    let (d, _) = Dataset::load(&spec, None, Some(&t), &EncodeOptions::new(Format::Text)).unwrap();
    assert_eq!(d.row_length(0), 9);
}

#[test]
fn preview_shows_tokens_and_mask() {
    let d = jsonl(r#"{"prompt": "a\nb", "completion": "xy"}"#, |_| {}).unwrap();
    let t = tokenizer(None);
    let decode = |ids: &[u32]| t.inner().decode(ids, false).unwrap();
    let rows = preview(&d, 3, &decode);
    assert_eq!((rows.len(), rows[0].counted()), (1, 3));
    let text = rows[0].to_string();
    expect(&text, &["d.jsonl:1  7 tokens, 3 counted", "<s>|a|\\n|b⟦x|y|</s>⟧"]);
    let long = format!("{{\"prompt\": \"{}\", \"completion\": \"x\"}}", "q".repeat(1000));
    let text = preview(&jsonl(&long, |_| {}).unwrap(), 1, &decode)[0].to_string();
    expect(&text, &["tokens) … ", "q⟦x|</s>⟧"]);
    assert!(text.len() < 700, "{text}");
    let d = jsonl(r#"{"text": "a"}"#, |_| {}).unwrap();
    // The first token never counts.
    expect(&preview(&d, 1, &decode)[0].to_string(), &["1 counted", "<s>⟦a⟧"]);
    expect(&d.stats().to_string(), &["1 rows, 2 tokens (1 counted), longest row 2"]);
}

#[test]
fn ten_thousand_rows_are_quick_and_in_order() {
    let content: String = (0..10_000)
        .map(|i| format!("{{\"prompt\": \"Hello, how are you today number {i}?\", \"completion\": \" {i}\"}}\n"))
        .collect();
    let start = std::time::Instant::now();
    let d = jsonl(&content, |_| {}).unwrap();
    let took = start.elapsed();
    assert_eq!(d.len(), 10_000);
    for row in [0, 2047, 2048, 9_999] {
        assert_eq!(parts(&d, row).1, format!(" {row}</s>"));
        assert!(d.source(row).unwrap().to_string().ends_with(&format!("d.jsonl:{}", row + 1)));
    }
    assert!(took.as_secs() < 20, "{took:?}");
}
