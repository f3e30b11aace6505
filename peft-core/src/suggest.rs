//! Nearest known names for a name that is not known, for messages.

/// At most this many names are suggested.
const MAX_SUGGESTIONS: usize = 3;
/// Names longer than this many bytes are not compared: edit distance is quadratic.
const MAX_LENGTH: usize = 256;
/// Similarity (0 to 1) below which a name is not worth suggesting.
const THRESHOLD: f64 = 0.6;
/// A name further than this behind the best one is not suggested.
const SPREAD: f64 = 0.15;

/// The known names most like `wanted`, best first, at most three; empty if none is near.
///
/// Compared are the whole names and their last dotted segments, ignoring case; a known name that ends with
/// `.wanted`, or that `wanted` ends with, counts as near.
pub fn nearest<I>(wanted: &str, known: I) -> Vec<String>
where
    I: IntoIterator,
    I::Item: AsRef<str>,
{
    if wanted.is_empty() || wanted.len() > MAX_LENGTH {
        return Vec::new();
    }
    let wanted = wanted.to_lowercase();
    let mut scored: Vec<(f64, String)> = Vec::new();
    for name in known {
        let name = name.as_ref();
        if name.is_empty() || name.len() > MAX_LENGTH {
            continue;
        }
        let score = similarity(&wanted, &name.to_lowercase());
        if score >= THRESHOLD && !scored.iter().any(|(_, seen)| seen == name) {
            scored.push((score, name.to_owned()));
        }
    }
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let best = scored.first().map_or(0.0, |(score, _)| *score);
    scored
        .into_iter()
        .take_while(|(score, _)| best - score <= SPREAD)
        .take(MAX_SUGGESTIONS)
        .map(|(_, name)| name)
        .collect()
}

/// `; did you mean `a`, `b` or `c`?`, or nothing when no known name is near: to append to a message.
pub fn did_you_mean<I>(wanted: &str, known: I) -> String
where
    I: IntoIterator,
    I::Item: AsRef<str>,
{
    match nearest(wanted, known).as_slice() {
        [] => String::new(),
        [one] => format!("; did you mean `{one}`?"),
        [head @ .., last] => {
            let head: Vec<String> = head.iter().map(|name| format!("`{name}`")).collect();
            format!("; did you mean {} or `{last}`?", head.join(", "))
        }
    }
}

fn similarity(wanted: &str, name: &str) -> f64 {
    if wanted == name {
        return 1.0;
    }
    let ends = |long: &str, short: &str| long.strip_suffix(short).is_some_and(|rest| rest.ends_with('.'));
    if ends(name, wanted) || ends(wanted, name) {
        return 0.95;
    }
    let last = |dotted: &str| dotted.rsplit('.').next().map(str::to_owned).unwrap_or_default();
    let (wanted_last, name_last) = (last(wanted), last(name));
    let whole = strsim::normalized_damerau_levenshtein(wanted, name);
    let segment = strsim::normalized_damerau_levenshtein(&wanted_last, &name_last);
    let contained =
        if wanted.len().min(name.len()) >= 3 && (name.contains(wanted) || wanted.contains(name)) { 0.7 } else { 0.0 };
    // Underscores and hyphens are often left out or added: `qproj`, `q-proj`.
    let squeeze = |text: &str| text.chars().filter(|c| !matches!(c, '_' | '-' | ' ')).collect::<String>();
    let squeezed = if squeeze(wanted) == squeeze(name) { 0.98 } else { 0.0 };
    whole.max(0.92 * segment).max(contained).max(squeezed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 9] =
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"];

    #[test]
    fn finds_typos_suffixes_and_case() {
        assert_eq!(nearest("q_prjo", NAMES).first().map(String::as_str), Some("q_proj"));
        assert_eq!(nearest("Q_PROJ", NAMES)[0], "q_proj");
        assert_eq!(nearest("qproj", NAMES)[0], "q_proj");
        assert_eq!(nearest("embed", NAMES), ["embed_tokens"]);
        assert_eq!(nearest("gate_project", NAMES)[0], "gate_proj");
        assert_eq!(nearest("head", NAMES), ["lm_head"]);
        let paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"];
        assert_eq!(nearest("self_attn.q_proj", paths), ["model.layers.0.self_attn.q_proj"]);
        assert!(nearest("zzzzzz", NAMES).is_empty());
        assert!(nearest("", NAMES).is_empty());
        assert!(nearest("q", Vec::<String>::new()).is_empty());
        assert!(nearest(&"q".repeat(100_000), NAMES).is_empty());
    }

    #[test]
    fn phrase_reads_well() {
        assert_eq!(did_you_mean("lm_haed", NAMES), "; did you mean `lm_head`?");
        assert_eq!(did_you_mean("zzz", NAMES), "");
        assert_eq!(did_you_mean("aab", ["aac", "aad"]), "; did you mean `aac` or `aad`?");
    }
}
