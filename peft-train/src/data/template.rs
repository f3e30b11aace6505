//! Jinja: the row template of `data.template`, and the engine for chat templates set up as transformers does it
//! (`utils/chat_template_utils.py`).

use std::collections::BTreeSet;
use std::fmt::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};

use super::error::DataError;
use super::source::Row;

/// Bounds what a template may compute for one row: hub templates are someone else's code.
const FUEL: u64 = 20_000_000;

const NAME: &str = "template";

fn engine(source: &str, syntax: SyntaxConfig) -> Result<Environment<'static>, String> {
    let mut env = Environment::new();
    env.set_syntax(syntax);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_fuel(Some(FUEL));
    env.add_filter("tojson", super::pyjson::tojson);
    env.add_template_owned(NAME, source.to_string()).map_err(|e| describe(&e))?;
    Ok(env)
}

fn syntax(set: impl FnOnce(&mut minijinja::syntax::SyntaxConfigBuilder)) -> Result<SyntaxConfig, String> {
    let mut builder = SyntaxConfig::builder();
    set(&mut builder);
    builder.build().map_err(|e| describe(&e))
}

/// A JSON value for a template.
pub(crate) fn json_value(value: &serde_json::Value) -> Value {
    Value::from(minijinja::value::Serde(value))
}

/// One line about a template failure, with the template's line.
pub(crate) fn describe(e: &Error) -> String {
    let reason = match e.detail() {
        Some(detail) => detail.to_string(),
        None => e.kind().to_string(),
    };
    match e.line() {
        Some(line) => format!("{reason} (line {line} of the template)"),
        None => reason,
    }
}

/// `data.template`: renders the columns of a row. A column that the template prints and the row lacks (or has as null)
/// is an error; `{% if column %}` may ask. White space stands as written, a newline at the end included.
#[derive(Debug)]
pub(crate) struct RowTemplate {
    env: Environment<'static>,
    variables: BTreeSet<String>,
}

impl RowTemplate {
    pub(crate) fn new(source: &str) -> Result<Self, DataError> {
        let build = || {
            let mut env = engine(
                source,
                syntax(|b| {
                    b.keep_trailing_newline(true);
                })?,
            )?;
            env.set_undefined_behavior(UndefinedBehavior::SemiStrict);
            let variables =
                env.get_template(NAME).map_err(|e| describe(&e))?.undeclared_variables(false).into_iter().collect();
            Ok(Self { env, variables })
        };
        build().map_err(|e: String| DataError::Config(format!("data.template: {e}")))
    }

    /// True if the template reads this column.
    pub(crate) fn reads(&self, column: &str) -> bool {
        self.variables.contains(column)
    }

    pub(crate) fn render(&self, row: &Row) -> Result<String, DataError> {
        let present = row.fields.iter().filter(|(_, v)| !v.is_null());
        let context = Value::from_pairs(present.map(|(k, v)| (k.as_str(), json_value(v))));
        self.env.get_template(NAME).and_then(|t| t.render(context)).map_err(|e| {
            let missing: Vec<String> = self
                .variables
                .iter()
                .filter(|v| row.fields.get(*v).is_none_or(|value| value.is_null()))
                .map(|v| format!("`{v}`"))
                .collect();
            let message = if e.kind() == ErrorKind::UndefinedError && !missing.is_empty() {
                format!(
                    "data.template needs column {}, which this row lacks or has as null; the row has {}",
                    missing.join(", "),
                    row.columns()
                )
            } else {
                format!("data.template: {}", describe(&e))
            };
            DataError::row(&row.at, message)
        })
    }
}

/// Compiled chat template in transformers' environment: `trim_blocks`, `lstrip_blocks`, loop controls, Python's string and
/// dict methods, `raise_exception`, `strftime_now`, and its `tojson`.
#[derive(Debug)]
pub(crate) struct ChatEngine {
    env: Environment<'static>,
}

impl ChatEngine {
    pub(crate) fn new(source: &str, generation_mark: Option<(char, char)>) -> Result<Self, String> {
        let mut env = engine(
            source,
            syntax(|b| {
                b.trim_blocks(true).lstrip_blocks(true);
            })?,
        )?;
        if let Some((open, close)) = generation_mark {
            env.add_filter(GENERATION_FILTER, move |body: String| format!("{open}{body}{close}"));
        }
        env.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", strftime_now);
        Ok(Self { env })
    }

    pub(crate) fn render(&self, context: Value) -> Result<String, String> {
        self.env.get_template(NAME).and_then(|t| t.render(context)).map_err(|e| describe(&e))
    }
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    write!(out, "{}", chrono::Local::now().format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format `{format}`")))?;
    Ok(out)
}

/// Name of the filter that `{% generation %}` blocks become.
pub(crate) const GENERATION_FILTER: &str = "peft_generation_block";

/// Replaces transformers' `{% generation %} … {% endgeneration %}` by a filter block, which leaves white-space control as
/// it is. Returns the new source and whether there was such a block.
pub(crate) fn rewrite_generation_blocks(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(length) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (inside, after) = tag.split_at(length);
        let inside = inside.strip_prefix("{%").unwrap_or(inside);
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => Some(format!("filter {GENERATION_FILTER}")),
            "endgeneration" => Some("endfilter".to_string()),
            _ => None,
        };
        out.push_str("{%");
        match replacement {
            Some(new) => {
                found = true;
                out.push_str(&inside.replacen(word, &new, 1));
            }
            None => out.push_str(inside),
        }
        out.push_str("%}");
        rest = after.strip_prefix("%}").unwrap_or(after);
    }
    out.push_str(rest);
    (out, found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn render(source: &str, json: &str) -> Result<String, String> {
        let value: serde_json::Value = serde_json::from_str(json).unwrap();
        ChatEngine::new(source, None)?.render(json_value(&value))
    }

    #[test]
    fn tojson_is_pythons() {
        // Expected strings are what Python 3.12's json.dumps gives for the same values.
        let v = r#"{"v":{"b":[1,2.5,1e20,1e-7,[],{}],"a":"é\n\"<&>'","n":null,"t":true}}"#;
        assert_eq!(
            render("{{ v | tojson }}", v).unwrap(),
            r#"{"b": [1, 2.5, 1e+20, 1e-07, [], {}], "a": "é\n\"<&>'", "n": null, "t": true}"#
        );
        assert_eq!(render("{{ v.a | tojson(ensure_ascii=true) }}", v).unwrap(), r#""\u00e9\n\"<&>'""#);
        assert_eq!(
            render("{{ v | tojson(separators=(',', ':'), sort_keys=true) }}", v).unwrap(),
            r#"{"a":"é\n\"<&>'","b":[1,2.5,1e+20,1e-07,[],{}],"n":null,"t":true}"#
        );
        assert_eq!(
            render("{{ v | tojson(indent=2) }}", r#"{"v":{"a":[1,{"b":[]}],"c":{}}}"#).unwrap(),
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": []\n    }\n  ],\n  \"c\": {}\n}"
        );
    }

    #[test]
    fn python_manners() {
        let v = r#"{"s":" Ab ","l":[{"k":"x"},{"k":"y"}],"n":null,"f":1.0,"t":true}"#;
        for (source, expected) in [
            ("{{ s.strip() }}|{{ s|trim }}", "Ab|Ab"),
            ("{{ n }} {{ t }} {{ f }} {{ missing }}", "None True 1.0 "),
            ("{% for m in l[1:] %}{{ m.k }}{% endfor %}", "y"),
            ("{% for m in l %}{% if loop.first %}{% continue %}{% endif %}{{ m['k'] }}{% break %}{% endfor %}", "y"),
            ("{% set ns = namespace(x=1) %}{% for m in l %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}", "3"),
            ("  {% if true %}\nA\n  {% endif %}\nB\n", "A\nB"),
            ("{{ 'a' if s is string and l is not string and n is none else 'b' }}", "a"),
            ("{{ s.split('b')[0] + s.lower() ~ 1 }}", " A ab 1"),
        ] {
            assert_eq!(render(source, v).unwrap(), expected, "{source}");
        }
        let e = render("a\n{{ raise_exception('no system turns') }}", "{}").unwrap_err();
        assert_eq!(e, "no system turns (line 2 of the template)");
        assert_eq!(render("{{ strftime_now('%Y') | length }}", "{}").unwrap(), "4");
        assert!(render("{{ strftime_now('%!') }}", "{}").unwrap_err().contains("bad format"));
        let endless = "{% for a in range(100000) %}{% for b in range(100000) %}{{ b }}{% endfor %}{% endfor %}";
        assert!(render(endless, "{}").is_err());
    }

    #[test]
    fn generation_blocks_keep_white_space_control() {
        let source = "A\n  {%- generation -%}\n x \n{%- endgeneration %}\nB {% generation %}y{% endgeneration %}{% if a %}{% endif %} {% x";
        let (new, found) = rewrite_generation_blocks(source);
        assert!(found);
        assert_eq!(
            new,
            format!(
                "A\n  {{%- filter {GENERATION_FILTER} -%}}\n x \n{{%- endfilter %}}\nB {{% filter {GENERATION_FILTER} %}}y{{% endfilter %}}{{% if a %}}{{% endif %}} {{% x"
            )
        );
        assert!(!rewrite_generation_blocks("{{ generation }}").1);
    }
}
