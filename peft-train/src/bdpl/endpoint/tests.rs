//! What answers mean, and which are refused. Requests, retries and keys are tested through the program (`peft-cli/tests/cli`).
#![allow(clippy::unwrap_used)]
use super::*;

fn answer(tokens: &[&str], logprobs: &[Option<f64>], offsets: &[usize]) -> TokenLogprobs {
    TokenLogprobs {
        tokens: tokens.iter().map(ToString::to_string).collect(),
        token_logprobs: logprobs.to_vec(),
        text_offset: offsets.to_vec(),
    }
}

#[test]
fn an_answer_is_scored_by_its_own_tokens() {
    let logprobs = [None, Some(-1.0), Some(-2.0), Some(-0.5), Some(-7.0)];
    // The last token is the one that the server had to write.
    let plain = answer(&["Is", " it", " so", "?", " yes"], &logprobs, &[0, 2, 5, 8, 9]);
    assert_eq!(score("Is it", " so?", &plain).unwrap(), Score { nll: 2.5, nll_of_text: 2.5, tokens: 2 });
    // A begin token that is spelled out, and offsets that count it or do not.
    for offsets in [vec![0, 3, 5, 8, 11], vec![0, 0, 2, 5, 8], vec![]] {
        let begun = answer(&["<s>", "Is", " it", " so", "?"], &logprobs, &offsets);
        assert_eq!(score("Is it", " so?", &begun).unwrap().nll, 0.5 + 7.0, "{offsets:?}");
    }
    // A token across the boundary belongs to the answer; parts of characters are placed by their offsets.
    let across = answer(&["Is", " it so", "?"], &[None, Some(-3.0), Some(-0.5)], &[0, 2, 8]);
    assert_eq!(score("Is it", " so?", &across).unwrap(), Score { nll: 3.5, nll_of_text: 3.5, tokens: 2 });
    let bytes = answer(&["é", "bytes:\\xc3", "bytes:\\xa9"], &[None, Some(-1.0), Some(-2.0)], &[0, 1, 2]);
    assert_eq!(score("é", "é", &bytes).unwrap().tokens, 1);
}

#[test]
fn hostile_answers_are_refused_by_name() {
    let says = |tokens: &[&str], logprobs: &[Option<f64>], offsets: &[usize]| {
        score("ab", "cd", &answer(tokens, logprobs, offsets)).unwrap_err()
    };
    assert!(says(&[], &[], &[]).contains("0 tokens"));
    assert!(says(&["ab", "cd"], &[None], &[0, 2]).contains("2 tokens with 1"));
    assert!(says(&["ab", "cd"], &[None, None], &[0, 2]).contains("\"cd\" has no log-probability"));
    assert!(says(&["ab", "cd"], &[None, Some(0.7)], &[0, 2]).contains("0.7"));
    assert!(says(&["ab", "cd"], &[None, Some(f64::NAN)], &[0, 2]).contains("NaN"));
    // Another text, without places or with places that go back; a server that gives only what it wrote.
    assert!(says(&["xy", "cd"], &[None, Some(-1.0)], &[]).contains("text_offset"));
    assert!(says(&["xy", "cd", "e"], &[None, Some(-1.0), Some(-1.0)], &[0, 5, 2]).contains("text_offset"));
    assert!(says(&[" yes"], &[Some(-1.0)], &[4]).contains("echo"));
    assert!(says(&["xy"], &[Some(-1.0)], &[usize::MAX]).contains("echo"));
}

#[test]
fn the_first_token_of_a_chat_tells_answers_apart() {
    let top = |pairs: &[(&str, f64)]| -> Vec<TopLogprob> {
        pairs.iter().map(|(token, logprob)| TopLogprob { token: token.to_string(), logprob: *logprob }).collect()
    };
    let answers = [" positive", " negative", " neither"].map(String::from);
    let found = top(&[("pos", 0.5f64.ln()), (" positive", 0.25f64.ln()), ("negative", 0.125f64.ln()), ("The", -4.0)]);
    let scores = first_tokens(&answers, &found).unwrap();
    assert!((scores[0].nll + 0.75f64.ln()).abs() < 1e-12 && (scores[1].nll - 8f64.ln()).abs() < 1e-12);
    assert_eq!((scores[2].nll, scores[2].tokens), (4.0, 1));
    let e = first_tokens(&answers, &top(&[("ne", -1.0)])).unwrap_err();
    assert!(e.contains("negative") && e.contains("neither") && e.contains("completions"), "{e}");
    assert!(first_tokens(&answers, &top(&[("pos", 1.0)])).unwrap_err().contains("pos"));
}

#[test]
fn a_table_is_checked_and_the_key_is_shown_nowhere() {
    let table = EndpointTable {
        url: Some("http://localhost:1/v1/".into()),
        model: Some("m".into()),
        api_key_env: Some("KEY".into()),
        ..EndpointTable::default()
    };
    let variable = |name: &str| (name == "KEY").then(|| "secret-key".to_owned());
    let options = EndpointOptions::of_table(&table, variable).unwrap();
    assert_eq!((options.url.as_str(), options.key.as_deref()), ("http://localhost:1/v1", Some("secret-key")));
    let shown = format!("{options:?} {:?}", Endpoint::new(options.clone()));
    assert!(!shown.contains("secret"), "{shown}");
    let e = |table: EndpointTable| EndpointOptions::of_table(&table, variable).unwrap_err().to_string();
    assert!(e(EndpointTable { url: Some("localhost".into()), ..table.clone() }).contains("endpoint.url"));
    assert!(e(EndpointTable { url: None, ..table.clone() }).contains("endpoint.url"));
    assert!(e(EndpointTable { model: None, ..table.clone() }).contains("endpoint.model"));
    assert!(e(EndpointTable { api: "chats".into(), ..table.clone() }).contains("did you mean `chat`"));
    assert!(e(EndpointTable { timeout: f64::NAN, ..table.clone() }).contains("endpoint.timeout"));
    let unset = e(EndpointTable { api_key_env: Some("OTHER".into()), ..table });
    assert!(unset.contains("OTHER") && unset.contains("not set"), "{unset}");
}
