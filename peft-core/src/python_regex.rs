//! Python regular expressions, as PEFT's configs contain them, run by `fancy-regex`.
//!
//! Where the two dialects differ the pattern is rewritten, and what Python's `re` refuses is refused here too, so
//! that a pattern accepted here means the same in PEFT. Anchoring is built around the whole pattern, alternation
//! included: `q|v` as a full match is `\A(?:q|v)\z`.

use crate::error::{Error, Result};

/// One compiled pattern with the config key that it stands in.
#[derive(Debug, Clone)]
pub struct PythonRegex {
    regex: fancy_regex::Regex,
    key: String,
    pattern: String,
}

impl PythonRegex {
    /// `re.fullmatch(pattern, …)`; `key` is the config key that the pattern stands in.
    ///
    /// # Errors
    /// A pattern that Python refuses too.
    pub fn fullmatch(key: &str, pattern: &str) -> Result<Self> {
        let translated = translate(pattern, true).map_err(|message| bad_pattern(key, pattern, &message))?;
        let (verbose_end, body) = (if translated.verbose { "\n" } else { "" }, &translated.body);
        Self::compile(key, pattern, &format!(r"\A(?:{}{body}{verbose_end})\z", translated.flags))
    }

    /// `re.match(before + pattern + after, …)`, where `before` and `after` are in the Rust dialect and form the same
    /// expression as in PEFT: an alternation in `pattern` reaches over them exactly as it does there.
    pub(crate) fn match_within(key: &str, before: &str, pattern: &str, after: &str) -> Result<Self> {
        let translated =
            translate(pattern, before.is_empty()).map_err(|message| bad_pattern(key, pattern, &message))?;
        Self::compile(key, pattern, &format!(r"\A(?:{}{before}{}{after})", translated.flags, translated.body))
    }

    fn compile(key: &str, pattern: &str, rust: &str) -> Result<Self> {
        let regex =
            fancy_regex::Regex::new(rust).map_err(|error| bad_pattern(key, pattern, &one_line(&error.to_string())))?;
        Ok(Self { regex, key: key.to_owned(), pattern: pattern.to_owned() })
    }

    /// Whether `text` matches.
    ///
    /// # Errors
    /// When the pattern backtracks without end on this text.
    pub fn is_match(&self, text: &str) -> Result<bool> {
        self.regex.is_match(text).map_err(|error| self.runtime(text, &error))
    }

    /// If `text` matches: the text of named group `group`, or `None` where the match went around that group.
    pub(crate) fn capture<'t>(&self, text: &'t str, group: &str) -> Result<Option<Option<&'t str>>> {
        let captures = self.regex.captures(text).map_err(|error| self.runtime(text, &error))?;
        Ok(captures.map(|captures| captures.name(group).map(|found| found.as_str())))
    }

    fn runtime(&self, text: &str, error: &fancy_regex::Error) -> Error {
        Error::config(
            &self.key,
            format!(
                "pattern `{}` could not be matched against `{text}`: {}",
                self.pattern,
                one_line(&error.to_string())
            ),
        )
    }
}

fn bad_pattern(key: &str, pattern: &str, message: &str) -> Error {
    Error::config(key, format!("`{pattern}` is not a valid Python regular expression: {message}"))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

struct Translated {
    /// Global flags such as `(?i)` at the start, in the Rust dialect.
    flags: String,
    body: String,
    verbose: bool,
}

/// Rewrites a Python pattern for fancy-regex. `at_start`: whether the pattern stands at the start of the whole
/// expression; Python allows global flags only there.
fn translate(pattern: &str, at_start: bool) -> std::result::Result<Translated, String> {
    let chars: Vec<char> = pattern.chars().collect();
    let mut out = Translated { flags: String::new(), body: String::with_capacity(pattern.len() + 8), verbose: false };
    let at = |i: usize| chars.get(i).copied();
    let mut i = 0;
    while let Some(c) = at(i) {
        match c {
            '\\' => i = escape(&chars, i, false, &mut out.body)?,
            '[' => i = class(&chars, i, &mut out.body)?,
            '(' if at(i + 1) == Some('?') => i = group(&chars, i, at_start, &mut out)?,
            '(' if at(i + 1) == Some('*') => return Err("nothing to repeat after `(`".to_owned()),
            '{' => match repeat(&chars, i) {
                Some((text, next)) => {
                    out.body.push_str(&text);
                    i = next;
                }
                None => {
                    out.body.push_str(r"\{");
                    i += 1;
                }
            },
            '}' => {
                out.body.push_str(r"\}");
                i += 1;
            }
            other => {
                out.body.push(other);
                i += 1;
            }
        }
    }
    Ok(out)
}

/// A backslash escape at `chars[i]`; returns the index after it.
fn escape(chars: &[char], i: usize, in_class: bool, out: &mut String) -> std::result::Result<usize, String> {
    let Some(&c) = chars.get(i + 1) else {
        return Err("bad escape (end of pattern)".to_owned());
    };
    let hex = |from: usize, count: usize| -> std::result::Result<(char, usize), String> {
        let digits: String = chars.iter().skip(from).take(count).collect();
        let value = u32::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == count && !digits.starts_with('+'));
        value
            .and_then(char::from_u32)
            .map(|c| (c, from + count))
            .ok_or_else(|| format!("incomplete escape \\{c}{digits}"))
    };
    let push_char = |out: &mut String, value: char| out.push_str(&format!(r"\x{{{:X}}}", u32::from(value)));
    match c {
        'x' | 'u' | 'U' => {
            let (value, next) = hex(
                i + 2,
                if c == 'x' {
                    2
                } else if c == 'u' {
                    4
                } else {
                    8
                },
            )?;
            push_char(out, value);
            return Ok(next);
        }
        '0' => {
            // Octal: up to two more octal digits.
            let digits: String = chars.iter().skip(i + 2).take(2).take_while(|c| ('0'..='7').contains(*c)).collect();
            let value = u32::from_str_radix(&digits, 8).unwrap_or(0);
            push_char(out, char::from_u32(value).unwrap_or('\0'));
            return Ok(i + 2 + digits.len());
        }
        'd' | 'D' | 's' | 'S' | 'w' | 'W' | 'a' | 'f' | 'n' | 'r' | 't' | 'v' => {
            out.push('\\');
            out.push(c);
        }
        'b' if in_class => out.push_str(r"\x{8}"),
        'A' | 'b' | 'B' if !in_class => {
            out.push('\\');
            out.push(c);
        }
        'Z' if !in_class => out.push_str(r"\z"),
        '1'..='9' if !in_class => {
            // A back-reference of one or two digits; the group around it keeps a following digit apart.
            let digits: String = chars.iter().skip(i + 1).take(2).take_while(|c| c.is_ascii_digit()).collect();
            out.push_str(&format!(r"(?:\{digits})"));
            return Ok(i + 1 + digits.len());
        }
        c if c.is_ascii_alphanumeric() => return Err(format!("bad escape \\{c}")),
        c if c.is_ascii() && !c.is_ascii_control() => {
            out.push('\\');
            out.push(c);
        }
        other => push_char(out, other),
    }
    Ok(i + 2)
}

/// A character class at `chars[i]`; returns the index after it. `[`, `&&`, `~~`, `--` have no meaning in Python.
fn class(chars: &[char], start: usize, out: &mut String) -> std::result::Result<usize, String> {
    let mut i = start + 1;
    out.push('[');
    if chars.get(i) == Some(&'^') {
        out.push('^');
        i += 1;
    }
    let first = i;
    loop {
        match chars.get(i) {
            None => return Err(format!("unterminated character set at position {start}")),
            Some(']') if i > first => {
                out.push(']');
                return Ok(i + 1);
            }
            Some('\\') => i = escape(chars, i, true, out)?,
            Some(c @ ('[' | ']' | '&' | '~')) => {
                out.push('\\');
                out.push(*c);
                i += 1;
            }
            Some('-') if chars.get(i + 1) == Some(&'-') && i > first => {
                out.push_str(r"-\-");
                i += 2;
            }
            Some(c) => {
                out.push(*c);
                i += 1;
            }
        }
    }
}

/// A group that starts with `(?` at `chars[i]`; writes its opening and returns the index after that.
fn group(chars: &[char], i: usize, at_start: bool, out: &mut Translated) -> std::result::Result<usize, String> {
    let rest: String = chars.iter().skip(i + 2).take(3).collect();
    let mut copy = |text: &str| {
        out.body.push_str(text);
        Ok(i + text.chars().count())
    };
    let unknown = || Err(format!("unknown extension ?{} at position {}", rest.trim_end(), i + 1));
    match rest.chars().next() {
        None => Err("unexpected end of pattern".to_owned()),
        Some(c @ (':' | '=' | '!' | '>' | '(')) => copy(&format!("(?{c}")),
        Some('<') if rest.starts_with("<=") || rest.starts_with("<!") => copy(&format!("(?{}", &rest[..2])),
        Some('P') if rest.starts_with("P<") || rest.starts_with("P=") => copy(&format!("(?{}", &rest[..2])),
        Some('#') => match chars.iter().skip(i).position(|c| *c == ')') {
            Some(length) => Ok(i + length + 1),
            None => Err("missing ), unterminated comment".to_owned()),
        },
        Some(c) if c.is_ascii_alphabetic() || c == '-' => {
            let mut flags = String::new();
            let mut j = i + 2;
            loop {
                match chars.get(j) {
                    Some(flag @ ('i' | 'm' | 's' | 'x' | '-')) => flags.push(*flag),
                    Some('u') => {}
                    Some(flag @ ('a' | 'L')) => {
                        return Err(format!("the flag `{flag}` is not supported here"));
                    }
                    Some(end @ (')' | ':')) => {
                        let global = *end == ')';
                        if global && (!at_start || i != 0) {
                            return Err("global flags not at the start of the expression".to_owned());
                        }
                        if global && flags.contains('-') {
                            return Err("missing : after flags".to_owned());
                        }
                        if global {
                            out.verbose = flags.contains('x');
                            if !flags.is_empty() {
                                out.flags = format!("(?{flags})");
                            }
                        } else {
                            out.body.push_str(&format!("(?{flags}:"));
                        }
                        return Ok(j + 1);
                    }
                    _ => return unknown(),
                }
                j += 1;
            }
        }
        Some(_) => unknown(),
    }
}

/// A quantifier `{m}`, `{m,}`, `{,n}`, `{m,n}` at `chars[i]`, or `None` where Python reads a literal brace.
fn repeat(chars: &[char], i: usize) -> Option<(String, usize)> {
    let close = chars.iter().skip(i).take(32).position(|c| *c == '}')? + i;
    let inner: String = chars.get(i + 1..close)?.iter().collect();
    let number = |text: &str| text.chars().all(|c| c.is_ascii_digit());
    let text = match inner.split_once(',') {
        None if !inner.is_empty() && number(&inner) => format!("{{{inner}}}"),
        Some((low, high)) if number(low) && number(high) => {
            format!("{{{},{high}}}", if low.is_empty() { "0" } else { low })
        }
        _ => return None,
    };
    Some((text, close + 1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[track_caller]
    fn full(pattern: &str, yes: &[&str], no: &[&str]) {
        let regex = PythonRegex::fullmatch("target_modules", pattern).unwrap();
        for text in yes {
            assert!(regex.is_match(text).unwrap(), "{pattern} should match {text}");
        }
        for text in no {
            assert!(!regex.is_match(text).unwrap(), "{pattern} should not match {text}");
        }
    }

    // Expectations below were checked with CPython's re.fullmatch.
    #[test]
    fn full_match_covers_alternations() {
        full("q|v", &["q", "v"], &["qv", "aq", "va", ""]);
        full("q|qv", &["q", "qv"], &["v"]);
        full(".*q_proj|.*v_proj", &["a.q_proj", "a.v_proj"], &["a.q_proj.x"]);
        full("", &[""], &["a"]);
    }

    #[test]
    fn dialect_differences() {
        full(r"a\Z", &["a"], &["a\n"]);
        full(r"(?P<n>a)(?P=n)", &["aa"], &["ab"]);
        full(r"(a)(b)\2\1", &["abba"], &["abab"]);
        full(r"[[a]", &["[", "a"], &["b"]);
        full(r"[a&&b]", &["a", "&", "b"], &["c"]);
        full(r"[]a]", &["]", "a"], &["[]"]);
        full(r"[^]a]", &["b"], &["]", "a"]);
        full(r"[+--]", &["+", ",", "-"], &["."]);
        full(r"[\w.]+", &["a.b_c"], &["a-b"]);
        full(r"x{,2}", &["", "x", "xx"], &["xxx"]);
        full(r"x{2}{", &["xx{"], &["xx"]);
        full(r"a{b}", &["a{b}"], &["ab"]);
        full(r"a{", &["a{"], &["a"]);
        full(r"{", &["{"], &[]);
        full(r"\u0041\x42\U00000043", &["ABC"], &[]);
        full(r"(?i)AB", &["ab", "AB"], &[]);
        full(r"(?i:A)b", &["ab", "Ab"], &["AB"]);
        full("(?x) a b # comment", &["ab"], &["a b"]);
        full("(?x)a|b#c", &["a", "b"], &[]);
        full(r"a(?#note)b", &["ab"], &[]);
        full(r"(?>a+)b", &["aab"], &[]);
        full(r"(?:a)?+b", &["ab", "b"], &[]);
        full(r"(a)?(?(1)b|c)", &["ab", "c"], &["b", "ac"]);
        full(r"model\.layers\.(?!0\.)\d+\.x", &["model.layers.10.x"], &["model.layers.0.x"]);
        full("ü.\u{1F600}", &["üx\u{1F600}"], &[]);
        full(r"[\]]", &["]"], &[]);
        full(r"[a\-z]", &["-", "z"], &["b"]);
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for pattern in [
            "(", "a)", "[a", "*a", r"\h", r"\K", r"\p{L}", r"\z", "(?<n>a)", "(?P>n)", "(?R)", "a(?i)b", r"(*FAIL)",
            "(?~a)", "\\", r"\x4", "(?P<n", "(?", "(?#", "[b-a]", r"\1", "(?y)a", r"\R", r"(?a)\w",
        ] {
            let error = PythonRegex::fullmatch("exclude_modules", pattern).expect_err(pattern).to_string();
            assert!(error.starts_with("`exclude_modules`: `"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        assert!(PythonRegex::match_within("rank_pattern", r"(.*\.)?(", "(?i)a", ")$").is_err());
    }

    #[test]
    fn endless_backtracking_is_an_error() {
        let regex = PythonRegex::fullmatch("target_modules", r"(?:a*)*(?=b)\Bb(?!c)c|(?=(a+)+\1c)x").unwrap();
        // Either answer is fine; it has to return.
        let _ = regex.is_match(&"a".repeat(40));
        let regex = PythonRegex::fullmatch("target_modules", r"((a|a)+)\1c").unwrap();
        let error = regex.is_match(&"a".repeat(60)).unwrap_err().to_string();
        assert!(error.contains("could not be matched"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn no_pattern_panics(pattern in r"[\\\[\](){}?*+|^$.,:=!<>#Pa-cix0-3&~-]{0,16}", text in "[abc.]{0,8}") {
            if let Ok(regex) = PythonRegex::fullmatch("target_modules", &pattern) {
                let _ = regex.is_match(&text);
            }
            let _ = PythonRegex::match_within("rank_pattern", r"(.*\.)?(", &pattern, ")$").map(|r| r.is_match(&text));
        }
    }
}
