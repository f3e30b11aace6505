//! Chat rendering and label masks beside transformers' `apply_chat_template`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod data_support;

use data_support::{CHATML, fixture, jsonl, parts, tokenizer};
use peft_train::data::{ChatTemplate, EncodeOptions, Encoder, Format, Location, Row};
use serde_json::{Map, Value, json};

fn encode(template: &str, messages: &Value, tools: &Value) -> Result<(Vec<u32>, Vec<i32>), String> {
    let tokenizer = tokenizer(Some(template));
    let encoder = Encoder::new(Some(&tokenizer), &EncodeOptions::new(Format::Chat)).map_err(|e| e.to_string())?;
    let mut fields = Map::new();
    fields.insert("messages".into(), messages.clone());
    fields.insert("tools".into(), tools.clone());
    let at = Location::line(&std::path::Path::new("t.jsonl").into(), 3);
    let example = encoder.encode(&Row { fields, at }).map_err(|e| e.to_string())?;
    Ok((example.input_ids, example.labels))
}

#[test]
fn text_tokens_and_masks_equal_transformers() {
    let fixture = fixture();
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 36);
    let mut wrong = Vec::new();
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let expected_ids: Vec<u32> = serde_json::from_value(case["input_ids"].clone()).unwrap();
        let mask: Vec<i32> = serde_json::from_value(case["mask"].clone()).unwrap();
        let messages = case["messages"].as_array().unwrap();
        let mut extra = Map::new();
        if !case["tools"].is_null() {
            extra.insert("tools".into(), case["tools"].clone());
        }
        for kind in ["template", "marked"] {
            let source = case[kind].as_str().unwrap();
            let template = ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap();
            assert_eq!(template.render(messages, &extra, false).unwrap(), case["text"], "{name} {kind}");
            if kind == "template" {
                assert_eq!(template.render(messages, &extra, true).unwrap(), case["prompt"], "{name}");
            }
            let (ids, labels) = encode(source, &case["messages"], &case["tools"]).unwrap();
            assert_eq!(ids, expected_ids, "{name} {kind}");
            let counted: Vec<i32> = labels.iter().map(|&l| i32::from(l != -100)).collect();
            if counted != mask {
                wrong.push(format!("{name} {kind}: {counted:?}, expected {mask:?}"));
            }
            assert!(labels.iter().zip(&ids).all(|(&l, &i)| l == -100 || l as u32 == i));
        }
    }
}

#[test]
fn conversations_are_messages() {
    let a = jsonl(
        r#"{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "fine"}]}"#,
        |_| {},
    )
    .unwrap();
    let b = jsonl(
        r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hello", "name": null}, {"role": "assistant", "content": "fine"}]}"#,
        |_| {},
    )
    .unwrap();
    assert_eq!(a.input_ids(0), b.input_ids(0));
    assert_eq!(a.labels(0), b.labels(0));
    let (context, counted) = parts(&a, 0);
    assert_eq!(counted, "fine<|im_end|>");
    assert_eq!(
        context,
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n\n"
    );
}

#[test]
fn a_turn_that_opens_the_conversation_counts() {
    let d =
        jsonl(r#"{"messages": [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "x"}]}"#, |_| {})
            .unwrap();
    assert_eq!(parts(&d, 0).1, "Hello<|im_end|>");
}

#[test]
fn template_from_a_file_or_text() {
    let folder = data_support::Folder::new();
    let path = folder.write("t.jinja", "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}");
    let row = r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}"#;
    let from_file = jsonl(row, |o| o.chat_template = Some(path.display().to_string())).unwrap();
    assert_eq!(parts(&from_file, 0), ("x</s>".into(), "y</s>".into()));
    let e = jsonl(row, |o| o.chat_template = Some("/nowhere.jinja".into())).unwrap_err();
    assert!(e.contains("data.chat_template: `/nowhere.jinja`"), "{e}");
    let e = jsonl(row, |o| o.chat_template = Some("{% for %}".into())).unwrap_err();
    assert!(e.contains("chat template") && e.contains("line 1"), "{e}");
}

#[test]
fn errors_name_line_and_way_out() {
    let chat = |messages: Value| jsonl(&format!("\n{}", json!({"messages": messages})), |_| {}).unwrap_err();
    for (messages, expected) in [
        (json!([]), "`messages` is empty"),
        (json!("hi"), "column `messages`: expected a list of {role, content}, found a string"),
        (json!([1]), "`messages` message 1: expected {role, content}, found a number"),
        (json!([{"content": "x"}]), "message 1: `role` is missing"),
        (json!([{"role": 3, "content": "x"}]), "`role`: expected a string, found a number"),
        (json!([{"role": "user"}]), "message 1: `content` is missing"),
        (json!([{"role": "user", "content": null}]), "`content`: expected a string, found null"),
        (json!([{"role": "user", "content": "x"}]), "no assistant turn"),
    ] {
        let e = chat(messages);
        assert!(e.contains("d.jsonl:2: ") && e.contains(expected), "{e}");
    }
    let e = jsonl(r#"{"conversations": [{"from": "martian", "value": "x"}]}"#, |_| {}).unwrap_err();
    assert!(e.contains("d.jsonl:1: ") && e.contains("unknown speaker `martian`"), "{e}");

    let two = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let e = encode("{{ raise_exception('no chat today') }}", &two, &Value::Null).unwrap_err();
    assert!(e.contains("t.jsonl:3: ") && e.contains("no chat today"), "{e}");
    // Nothing of the turn can be found again: each render shows only how many messages there are.
    let e = encode("{{ messages | length }} add_generation_prompt", &two, &Value::Null).unwrap_err();
    assert!(e.contains("t.jsonl:3: ") && e.contains("{% generation %}"), "{e}");
    let e = encode("{% generation %}{% endgeneration %}x", &two, &Value::Null).unwrap_err();
    assert!(e.contains("render nothing"), "{e}");
}

#[test]
fn a_tokenizer_without_template_says_what_to_do() {
    let plain = tokenizer(None);
    let e = Encoder::new(Some(&plain), &EncodeOptions::new(Format::Chat)).unwrap_err().to_string();
    assert!(e.contains("no chat template") && e.contains("data.chat_template"), "{e}");
    let mut options = EncodeOptions::new(Format::Chat);
    options.chat_template = Some(CHATML.into());
    assert!(Encoder::new(Some(&plain), &options).is_ok());
    options.template = Some("{{ x }}".into());
    assert!(Encoder::new(Some(&plain), &options).is_err());
}

#[test]
fn long_conversations_lose_context_then_later_turns() {
    let row = r#"{"messages": [{"role": "user", "content": "x x x x x x x x"}, {"role": "assistant", "content": "ab"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "cd"}]}"#;
    let whole = jsonl(row, |_| {}).unwrap();
    let cut = jsonl(row, |o| o.max_length = Some(8)).unwrap();
    assert_eq!(cut.row_length(0), 8);
    assert_eq!(parts(&whole, 0).1, "ab<|im_end|>cd<|im_end|>");
    assert_eq!(parts(&cut, 0).1, "ab<|im_end|>");
    let stats = cut.stats();
    assert_eq!((stats.truncated_prompts, stats.truncated_targets, stats.lost_targets), (1, 1, 1));
    assert!(stats.to_string().contains("1 later turns cut as a whole"), "{stats}");
}
