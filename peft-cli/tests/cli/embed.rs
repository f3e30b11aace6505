//! Texts as vectors.

use serde_json::{Value, json};

use crate::harness::{Dir, base, rows};

fn vectors(text: &str) -> Vec<Vec<f64>> {
    let vector = |line: &str| serde_json::from_str::<Value>(line).unwrap()["embedding"].clone();
    text.lines().map(|line| serde_json::from_value(vector(line)).unwrap()).collect()
}

fn furthest(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn each_text_has_its_vector_in_any_batch() {
    let dir = Dir::new();
    let texts = ["say a bbb!", "a", "say c ddd! and so on, for longer", "say a bbb!"];
    let rows: String = texts.iter().map(|text| json!({"text": text}).to_string() + "\n").collect();
    dir.write("texts.jsonl", &rows);
    let embed = |more: &[&str]| {
        let args = ["embed", "--model", base().to_str().unwrap(), "--data", "texts.jsonl"];
        vectors(&dir.run(&[&args[..], more].concat()).ok().stdout)
    };
    let all = embed(&[]);
    assert_eq!((all.len(), all[0].len()), (4, 32));
    assert!(all.iter().all(|v| (v.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5), "length 1");
    assert!(furthest(&all[0], &all[3]) < 1e-6 && furthest(&all[0], &all[1]) > 1e-2);
    for (together, alone) in all.iter().zip(embed(&["--batch-size", "1"])) {
        assert!(furthest(together, &alone) < 1e-5);
    }
    // The last token of a text that is cut is another one.
    let last = embed(&["--pooling", "lasttoken", "--no-normalize"]);
    assert!(furthest(&last[2], &embed(&["--pooling", "lasttoken", "--no-normalize", "--max-length", "5"])[2]) > 1e-2);
    assert_eq!(last[1], embed(&["--pooling", "cls", "--no-normalize"])[1], "one token is first and last");

    dir.train(&["--set", "train.max_steps=8", "--set", "method.target_modules=all-linear"]).ok();
    let adapted = embed(&["--adapter", "out"]);
    assert!(furthest(&adapted[0], &all[0]) > 1e-3);
    assert!(
        dir.run(&["embed", "--model", base().to_str().unwrap(), "--text", "a", "--output", "v.jsonl"]).json()["texts"]
            == 1
    );
    assert!(furthest(&vectors(std::str::from_utf8(&dir.read("v.jsonl")).unwrap())[0], &all[1]) < 1e-5);
}

#[test]
fn what_cannot_be_embedded_is_said() {
    let dir = Dir::new();
    let embed = |more: &[&str]| dir.run(&[&["embed", "--model", base().to_str().unwrap()][..], more].concat());
    embed(&[]).fails(&["--data", "--text"]);
    embed(&["--text", "a", "--pooling", "middle"]).fails(&["middle", "lasttoken"]);
    embed(&["--text", ""]).fails(&["text 1 has no tokens"]);
    embed(&["--data", "nowhere.jsonl"]).fails(&["nowhere.jsonl"]);
    dir.write("rows.jsonl", &rows());
    let train = [
        "train",
        "--model",
        base().to_str().unwrap(),
        "--data",
        "rows.jsonl",
        "--format",
        "completion",
        "--output",
        "out",
    ];
    let prompt = ["--method", "prompt", "--set", "method.num_virtual_tokens=2", "--set", "train.max_steps=2"];
    dir.run(&[&train[..], &prompt].concat()).ok();
    embed(&["--text", "a", "--adapter", "out"]).fails(&["--adapter", "prompt"]);
    let damaged = dir.copy_of_base("damaged");
    std::fs::write(
        damaged.join("modules.json"),
        r#"[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]"#,
    )
    .unwrap();
    dir.run(&["embed", "--model", "damaged", "--text", "a"]).fails(&["modules.json", "Dense"]);
}
