//! JSON as Python's `json.dumps(value, indent=2, sort_keys=True)` lays it out: escapes beyond ASCII, floats as
//! `repr` writes them. PEFT's files come out byte for byte.

use std::io;

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value};

/// Serialises `map` with sorted keys. The tables under `keep_order` keep their order, because it carries meaning
/// (PEFT's patterns: the first match wins).
///
/// # Errors
/// None in practice; JSON that cannot be written.
pub fn to_python_json(map: &Map<String, Value>, keep_order: &[&str]) -> Result<String, serde_json::Error> {
    let mut top: Vec<(&String, &Value)> = map.iter().collect();
    top.sort_by(|a, b| a.0.cmp(b.0));
    let sorted: Map<String, Value> = top
        .into_iter()
        .map(|(key, value)| (key.clone(), if keep_order.contains(&key.as_str()) { value.clone() } else { sort(value) }))
        .collect();
    let mut bytes = Vec::new();
    let formatter = PythonFormatter { pretty: PrettyFormatter::with_indent(b"  ") };
    sorted.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn sort(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(&String, &Value)> = map.iter().collect();
            entries.sort_by(|a, b| a.0.cmp(b.0));
            Value::Object(entries.into_iter().map(|(key, value)| (key.clone(), sort(value))).collect())
        }
        Value::Array(list) => Value::Array(list.iter().map(sort).collect()),
        other => other.clone(),
    }
}

struct PythonFormatter {
    pretty: PrettyFormatter<'static>,
}

impl Formatter for PythonFormatter {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(python_repr(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        for c in fragment.chars() {
            if (' '..='~').contains(&c) {
                writer.write_all(&[c as u8])?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.begin_array(writer)
    }
    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.end_array(writer)
    }
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.pretty.begin_array_value(writer, first)
    }
    fn end_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.end_array_value(writer)
    }
    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.begin_object(writer)
    }
    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.end_object(writer)
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.pretty.begin_object_key(writer, first)
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.begin_object_value(writer)
    }
    fn end_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.end_object_value(writer)
    }
}

/// `repr(float)`: shortest digits that read back; exponent form below 1e-4 and from 1e16 on.
fn python_repr(value: f64) -> String {
    if !value.is_finite() {
        return "null".to_owned();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) || value == 0.0 {
        let plain = format!("{value}");
        if plain.contains('.') { plain } else { format!("{plain}.0") }
    } else {
        format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn floats_as_python_writes_them() {
        // Printed by CPython's json.dumps.
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (6e-5, "6e-05"),
            (1.5e-7, "1.5e-07"),
            (123456789012345.0, "123456789012345.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.2345e22, "1.2345e+22"),
            (1e100, "1e+100"),
            (5e-324, "5e-324"),
            (1.7976931348623157e308, "1.7976931348623157e+308"),
            (0.30000000000000004, "0.30000000000000004"),
        ] {
            assert_eq!(python_repr(value), text);
        }
    }

    #[test]
    fn layout_escapes_and_order() {
        let value: Value = serde_json::from_str(
            r#"{"z": [], "a": {}, "b": {"y": 1, "x": [1, {"d": null, "c": true}]}, "rank_pattern": {"q": 1, "a": 2},
                "s": "ü\u0000\n\t\"\\/\u007f😀", "f": 1e-5, "big": 18446744073709551615}"#,
        )
        .unwrap();
        let text = to_python_json(value.as_object().unwrap(), &["rank_pattern"]).unwrap();
        // CPython's output for the same value (with rank_pattern in the order given).
        let expected = r#"{
  "a": {},
  "b": {
    "x": [
      1,
      {
        "c": true,
        "d": null
      }
    ],
    "y": 1
  },
  "big": 18446744073709551615,
  "f": 1e-05,
  "rank_pattern": {
    "q": 1,
    "a": 2
  },
  "s": "\u00fc\u0000\n\t\"\\/\u007f\ud83d\ude00",
  "z": []
}"#;
        assert_eq!(text, expected);
    }
}
