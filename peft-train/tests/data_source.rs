//! Files, folders and mixtures: what is read, and what each fault says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod data_support;

use std::path::Path;
use std::sync::Arc;

use data_support::{Folder, load};
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use peft_train::data::source::{data_files, read_rows};
use peft_train::data::{DataSpec, Dataset, EncodeOptions, Format, Row};
use proptest::prelude::*;
use serde_json::{Value, json};

fn rows(path: &Path) -> Result<Vec<Row>, String> {
    read_rows(path).map_err(|e| e.to_string())?.collect::<Result<_, _>>().map_err(|e| e.to_string())
}

fn values(path: &Path) -> Vec<(String, Value)> {
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    rows(path)
        .unwrap()
        .into_iter()
        .map(|r| {
            let at = r.at.to_string();
            (at[at.find(&name).unwrap()..].to_string(), Value::Object(r.fields))
        })
        .collect()
}

fn failure(name: &str, content: impl AsRef<[u8]>) -> String {
    let folder = Folder::new();
    rows(&folder.write(name, content)).unwrap_err()
}

fn expect(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn jsonl_with_mark_crlf_blank_lines_and_no_last_newline() {
    let f = Folder::new();
    let path = f.write("a.jsonl", "\u{feff}{\"text\": \"ä\"}\r\n\r\n{\"text\": \"b\", \"n\": [1, null]}");
    assert_eq!(
        values(&path),
        [("a.jsonl:1".into(), json!({"text": "ä"})), ("a.jsonl:3".into(), json!({"text": "b", "n": [1, null]}))]
    );
}

#[test]
fn json_arrays_data_objects_and_lines() {
    let f = Folder::new();
    let path = f.write("a.json", "[\n  {\"text\": \"a\\n\"},\n\n  {\n \"text\": \"b\"}, {\"text\": \"c\"}]\n");
    assert_eq!(
        values(&path),
        [
            ("a.json:2".into(), json!({"text": "a\n"})),
            ("a.json:4".into(), json!({"text": "b"})),
            ("a.json:5".into(), json!({"text": "c"}))
        ]
    );
    let path = f.write("b.json", "{\"version\": 1,\n \"data\": [{\"text\": \"a\"}]}");
    assert_eq!(values(&path), [("b.json:2".into(), json!({"text": "a"}))]);
    let path = f.write("c.json", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n");
    assert_eq!(values(&path)[1], ("c.json:2".into(), json!({"text": "b"})));
}

#[test]
fn csv_and_text() {
    let f = Folder::new();
    let path = f.write("a.csv", "\u{feff}text,label\r\n\"a, \"\"b\"\"\nc\",1\r\nd,\r\n");
    assert_eq!(
        values(&path),
        [
            ("a.csv:2".into(), json!({"text": "a, \"b\"\nc", "label": "1"})),
            ("a.csv:4".into(), json!({"text": "d", "label": ""}))
        ]
    );
    let path = f.write("a.txt", "one\r\n\n  \n two");
    assert_eq!(
        values(&path),
        [("a.txt:1".into(), json!({"text": "one"})), ("a.txt:4".into(), json!({"text": " two"}))]
    );
}

/// Rows `{text, label, input_ids}`, two of them, the second label null.
fn parquet_bytes() -> Vec<u8> {
    let schema = "message m { required binary text (UTF8); optional int64 label; \
                  required group input_ids (LIST) { repeated group list { required int32 element; } } }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let mut out = Vec::new();
    let props = Arc::new(WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build());
    let mut writer = SerializedFileWriter::new(&mut out, schema, props).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let texts = [ByteArray::from("ä"), ByteArray::from("b")];
    column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[7], Some(&[1, 0]), None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int32Type>().write_batch(&[1, 2, 3], Some(&[1, 1, 1]), Some(&[0, 1, 0])).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    out
}

#[test]
fn parquet_columns_keep_their_types() {
    let f = Folder::new();
    let path = f.write("a.parquet", parquet_bytes());
    assert_eq!(
        values(&path),
        [
            ("a.parquet:row 1".into(), json!({"text": "ä", "label": 7, "input_ids": [1, 2]})),
            ("a.parquet:row 2".into(), json!({"text": "b", "label": null, "input_ids": [3]}))
        ]
    );
    let path = f.write("cut.parquet", &parquet_bytes()[..100]);
    expect(&rows(&path).unwrap_err(), &["cut.parquet", "not a readable Parquet file"]);
    let path = f.write("empty.parquet", b"");
    expect(&rows(&path).unwrap_err(), &["empty.parquet", "not a readable Parquet file"]);
}

#[test]
fn faults_name_file_and_line() {
    for (name, content, expected) in [
        ("a.jsonl", &b"{\"text\": 1}\n{\"text\": }\n"[..], &["a.jsonl:2: malformed JSON", "column 10"][..]),
        ("a.jsonl", b"{\"text\": 1} {\"text\": 2}", &["a.jsonl:1: malformed JSON", "trailing characters"]),
        ("a.jsonl", b"\n[1]\n", &["a.jsonl:2: expected an object", "found an array"]),
        ("a.jsonl", b"{\"a\":1}\n\xff\xfe\n", &["a.jsonl:2: byte 1 of the line is not UTF-8"]),
        ("a.jsonl", b"\xff\xfe{\0", &["a.jsonl:1: the file is UTF-16"]),
        ("a.jsonl", b"", &["a.jsonl:1: the file is empty"]),
        ("a.jsonl", b"\xef\xbb\xbf\r\n \n", &["a.jsonl:1: the file is empty"]),
        ("a.txt", b"\n\n", &["a.txt:1: the file is empty"]),
        ("a.txt", b"a\nb\xc3\n", &["a.txt:2: byte 2 of the line is not UTF-8"]),
        ("a.json", b"", &["a.json:1: the file is empty"]),
        ("a.json", b"[]", &["a.json:1: the file is empty"]),
        ("a.json", b"[\n{\"a\": 1},\n3]", &["a.json:3: expected an object", "found a number"]),
        ("a.json", b"[\n{\"a\": 1},\n{]", &["a.json:3: malformed JSON, expected an array of rows"]),
        ("a.json", b"{\"rows\": []}", &["a.json:1: expected an array of rows, or an object whose `data`"]),
        ("a.json", b"7", &["a.json:1: ", "expected an array of rows"]),
        ("a.json", b"[\n\"\xff\"]", &["a.json:2: ", "UTF-8"]),
        ("a.csv", b"", &["a.csv:1: the file is empty"]),
        ("a.csv", b"text\n", &["a.csv:1: the file is empty"]),
        ("a.csv", b"a,b\n1,2\n1\n", &["a.csv:3: the record has 1 fields, the header 2"]),
        ("a.csv", b"a,b\n1,\xff\n", &["a.csv:2: ", "UTF-8"]),
        ("a.csv", b"a,a\n1,2\n", &["a.csv:1: the header names column `a` twice"]),
    ] {
        expect(&failure(name, content), expected);
    }
    let deep = format!("{{\"a\": {}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
    expect(&failure("a.jsonl", deep), &["a.jsonl:1: malformed JSON", "recursion"]);
}

#[test]
fn folders_are_read_in_order_of_names() {
    let f = Folder::new();
    f.write("b.txt", "two");
    f.write("a.jsonl", "{\"text\": \"one\"}");
    f.write("notes.md", "no data");
    std::fs::create_dir(f.0.path().join("c.txt")).unwrap();
    let files = data_files(f.0.path()).unwrap();
    assert_eq!(files, [f.0.path().join("a.jsonl"), f.0.path().join("b.txt")]);
    let d = load(f.0.path(), &EncodeOptions::new(Format::Text), None).unwrap();
    assert_eq!(d.len(), 2);
    assert!(d.source(1).unwrap().to_string().ends_with("b.txt:1"));

    let empty = Folder::new();
    expect(&data_files(empty.0.path()).unwrap_err().to_string(), &["no data file in this folder", ".jsonl"]);
    expect(
        &data_files(&f.0.path().join("b.text")).unwrap_err().to_string(),
        &["b.text", "no such file", "did you mean `b.txt`?"],
    );
    expect(&data_files(&f.0.path().join("notes.md")).unwrap_err().to_string(), &["`md` is no data file type"]);
}

#[test]
fn mixtures() {
    let f = Folder::new();
    let one = f.write("one.txt", "a\nb\n");
    let two = f.write("two.txt", "c\n");
    let spec = |json: Value| serde_json::from_value::<DataSpec>(json);
    let t = data_support::tokenizer(None);
    let mixture = spec(json!([{"path": one, "weight": 2}, {"path": two}])).unwrap();
    let (d, format) = Dataset::load(&mixture, None, Some(&t), &EncodeOptions::new(Format::Text)).unwrap();
    assert_eq!((d.len(), format), (3, Format::Text));
    assert_eq!(d.parts(), [0..2, 2..3]);
    assert_eq!(d.weights(), Some(&[2.0, 1.0][..]));
    let (d, _) = Dataset::load(
        &spec(json!([{"path": one}, {"path": two}])).unwrap(),
        None,
        Some(&t),
        &EncodeOptions::new(Format::Text),
    )
    .unwrap();
    assert_eq!(d.weights(), None);
    for (json, expected) in [
        (json!([]), "mixture is empty"),
        (json!([{"path": one, "weight": 0}]), "weights are numbers above 0"),
        (json!([{"path": one, "weight": -1.5}]), "weight -1.5 of"),
    ] {
        let e = Dataset::load(&spec(json).unwrap(), None, Some(&t), &EncodeOptions::new(Format::Text))
            .unwrap_err()
            .to_string();
        expect(&e, &[expected]);
    }
    expect(&spec(json!([{"path": one, "wieght": 1}])).unwrap_err().to_string(), &["unknown field `wieght`"]);
    expect(&spec(json!(3)).unwrap_err().to_string(), &["a path, or a list of {path, weight}"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever lies on disk, reading ends in rows or one error, never in a panic.
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), which in 0usize..5) {
        let f = Folder::new();
        let path = f.write(["x.jsonl", "x.json", "x.csv", "x.parquet", "x.txt"][which], &bytes);
        let _ = rows(&path);
    }

    /// A Parquet file with flipped bytes gives rows or an error.
    #[test]
    fn damaged_parquet(at in 0usize..400, value in any::<u8>()) {
        let mut bytes = parquet_bytes();
        let at = at % bytes.len();
        bytes[at] = value;
        let f = Folder::new();
        let _ = rows(&f.write("x.parquet", bytes));
    }
}
