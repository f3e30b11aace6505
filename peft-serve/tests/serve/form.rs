//! Answers of a form, from a model that knows none.

use peft_models::generate::GenerateOptions;
use peft_serve::{FinishReason, Grammar, Request};
use serde_json::{Value, json};

use crate::base::alone;
use crate::running::{CHAT, COMPLETIONS, Running, error};

/// The answers of `n` seeds at a temperature at which all that may come does come.
fn answers(server: &Running, n: usize, fields: &Value) -> Vec<(String, String)> {
    let mut request = json!({"model": "style", "prompt": "x", "max_tokens": 400, "temperature": 1.5});
    request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let answer = |seed: usize| {
        request["seed"] = json!(seed);
        request["model"] = json!(if seed.is_multiple_of(2) { "base" } else { "style" });
        let (status, answer) = server.post(COMPLETIONS, &request);
        assert_eq!(status, 200, "{answer}");
        let choice = &answer["choices"][0];
        (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
    };
    (0..n).map(answer).collect()
}

#[test]
fn a_schema_is_kept_to() {
    let server = Running::start(|_, _| {});
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"$ref": "#/$defs/age"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
        "$defs": {"age": {"type": "integer", "minimum": 0, "maximum": 150}}
    });
    let openai =
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}});
    let ours = json!({"grammar": {"type": "json_schema", "value": schema}});
    for (text, reason) in [answers(&server, 12, &openai), answers(&server, 2, &ours)].concat() {
        assert_eq!(reason, "stop", "{text}");
        let person: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert_eq!(person.as_object().unwrap().len(), 3, "{text}");
        assert!(person["name"].as_str().unwrap().chars().count() <= 8, "{text}");
        assert!((0..=150).contains(&person["age"].as_i64().unwrap()), "{text}");
        let tags = person["tags"].as_array().unwrap();
        assert!(tags.len() <= 3 && tags.iter().all(|tag| *tag == "a" || *tag == "b"), "{text}");
    }
    server.finish();
}

#[test]
fn other_forms_are_kept_to_and_chats_have_them_too() {
    let server = Running::start(|_, _| {});
    for (text, reason) in answers(&server, 6, &json!({"response_format": {"type": "json_object"}})) {
        assert!(text.starts_with('{'), "{text}");
        // A model that knows nothing may go on with a text for ever, and writes numbers that no machine holds.
        let holds = serde_json::from_str::<Value>(&text)
            .map_or_else(|e| e.to_string().contains("out of range"), |v| v.is_object());
        assert!(reason == "length" || holds, "{reason} {text}");
    }
    for (text, reason) in answers(&server, 6, &json!({"grammar": {"type": "regex", "value": "[0-9]{3}-[a-c]+x"}})) {
        let (digits, rest) = text.split_at(4.min(text.len()));
        assert!(digits.ends_with('-') && digits[..3].chars().all(|c| c.is_ascii_digit()), "{text}");
        let letters = rest.strip_suffix('x').unwrap_or(rest);
        assert!(letters.chars().all(|c| ('a'..='c').contains(&c)), "{text}");
        assert!(reason == "length" || (rest.ends_with('x') && !letters.is_empty()), "{reason} {text}");
    }
    let said = answers(&server, 12, &json!({"grammar": {"type": "lark", "value": "start: \"yes\" | \"no\""}}));
    assert!(said.iter().all(|(text, reason)| (text == "yes" || text == "no") && reason == "stop"), "{said:?}");
    assert!(said.iter().any(|(text, _)| text == "yes") && said.iter().any(|(text, _)| text == "no"), "{said:?}");

    let request = json!({"model": "base", "messages": [{"role": "user", "content": "?"}], "n": 2, "logprobs": true,
        "grammar": {"type": "lark", "value": "start: \"yes\" | \"no\""}});
    let (status, answer) = server.post(CHAT, &request);
    assert_eq!(status, 200, "{answer}");
    for choice in answer["choices"].as_array().unwrap() {
        assert!(["yes", "no"].contains(&choice["message"]["content"].as_str().unwrap()), "{answer}");
        // The model's own, of all tokens.
        assert!(choice["logprobs"]["content"][0]["logprob"].as_f64().unwrap() < -0.01, "{answer}");
    }
    let text = json!({"model": "base", "prompt": "x", "max_tokens": 3, "response_format": {"type": "text"}});
    assert_eq!(server.post(COMPLETIONS, &text).0, 200);
    server.finish();
}

#[test]
fn rows_beside_one_of_a_form_are_what_they_are_alone() {
    let server = Running::start(|_, _| {});
    let options = GenerateOptions { max_new_tokens: 40, ..GenerateOptions::default() };
    let prompts: Vec<Vec<u32>> = (1..4u32).map(|i| (0..5).map(|j| i * 40 + j).collect()).collect();
    let yes = server.engine.constraint(&Grammar::Regex("(yes ){9}".into())).unwrap();
    let mut formed = Request::new(prompts[0].clone(), 60);
    formed.constraint = Some(yes);
    let formed = server.engine.submit(formed).unwrap();
    let plain: Vec<_> =
        prompts.iter().map(|prompt| server.engine.submit(Request::new(prompt.clone(), 40)).unwrap()).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let formed = runtime.block_on(formed.complete()).unwrap();
    assert_eq!((formed.text.as_str(), formed.reason), ("yes yes yes yes yes yes yes yes yes ", FinishReason::Stop));
    for (answer, prompt) in plain.into_iter().zip(&prompts) {
        let written: Vec<u32> = runtime.block_on(answer.complete()).unwrap().ids;
        assert_eq!(written, alone(&server.model, None, prompt, &options));
    }
    server.finish();
}

#[test]
fn what_is_wrong_with_a_form_is_said() {
    let server = Running::start(|_, _| {});
    let wrong = |fields: Value, names: &str, says: &str| {
        let mut request = json!({"model": "base", "prompt": "x", "max_tokens": 4});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (status, message) = error(&server.post(COMPLETIONS, &request));
        assert!(status == 400 && message.contains(names) && message.contains(says), "{status} {message}");
    };
    let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    wrong(schema(json!({"type": "nothing"})), "response_format", "nothing");
    wrong(schema(json!({"$ref": "#/$defs/absent"})), "response_format", "absent");
    wrong(schema(json!(3)), "response_format", "3");
    wrong(json!({"response_format": {"type": "xml"}}), "response_format", "xml");
    wrong(json!({"response_format": {"type": "json_schema"}}), "response_format", "json_schema");
    wrong(json!({"grammar": {"type": "regex", "value": "("}}), "grammar", "(");
    wrong(json!({"grammar": {"type": "lark", "value": "start: nobody"}}), "grammar", "nobody");
    wrong(json!({"grammar": {"type": "lark", "value": ""}}), "grammar", "");
    let both = json!({"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "json_object"}});
    wrong(both, "grammar", "one form");
    server.finish();
}
