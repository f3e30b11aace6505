//! The candidates for a place of the prompt: n-grams of the training texts that belong together (the paper's section 3.1).

use std::collections::HashMap;

/// What candidates are taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VocabularyConfig {
    /// Candidates (`bdpl_vocabulary`).
    pub size: usize,
    /// Words of the longest (`bdpl_ngram`).
    pub longest: usize,
    /// Pointwise mutual information, in nats, from which two neighbours stay together (`bdpl_pmi`).
    pub pmi: f64,
}

/// The most frequent n-grams of `texts`, most frequent first and in order of the alphabet where that is the same. A text is cut
/// between two words whose pointwise mutual information `ln(c(ab)·N / (c(a)·c(b)))` is below the threshold (so that words that meet
/// by chance part), where it holds one end of a sentence, and after the longest n-gram's number of words.
#[must_use]
pub fn ngrams(texts: &[String], config: VocabularyConfig) -> Vec<String> {
    let sentences: Vec<Vec<&str>> = texts.iter().flat_map(|text| sentences(text)).collect();
    let mut words: HashMap<&str, u64> = HashMap::new();
    let mut pairs: HashMap<(&str, &str), u64> = HashMap::new();
    for sentence in &sentences {
        sentence.iter().for_each(|word| *words.entry(word).or_default() += 1);
        sentence.windows(2).for_each(|pair| {
            if let [a, b] = pair {
                *pairs.entry((a, b)).or_default() += 1;
            }
        });
    }
    let total: u64 = words.values().sum();
    let count = |word: &str| words.get(word).copied().unwrap_or(0) as f64;
    let together = |a: &str, b: &str| {
        let both = pairs.get(&(a, b)).copied().unwrap_or(0) as f64;
        (both * total as f64 / (count(a) * count(b))).ln() >= config.pmi
    };
    let mut found: HashMap<String, u64> = HashMap::new();
    for sentence in &sentences {
        let mut ngram: Vec<&str> = Vec::new();
        for word in sentence {
            let joined = ngram.last().is_none_or(|last| together(last, word));
            if !(joined && ngram.len() < config.longest.max(1)) {
                *found.entry(ngram.join(" ")).or_default() += 1;
                ngram.clear();
            }
            ngram.push(word);
        }
        if !ngram.is_empty() {
            *found.entry(ngram.join(" ")).or_default() += 1;
        }
    }
    let mut ranked: Vec<(String, u64)> = found.into_iter().collect();
    ranked.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    ranked.into_iter().take(config.size).map(|(ngram, _)| ngram).collect()
}

/// Words between ends of sentences, without the punctuation around them.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    let mut all = vec![Vec::new()];
    for piece in text.split_whitespace() {
        let word = piece.trim_matches(|c: char| !c.is_alphanumeric());
        if let (false, Some(sentence)) = (word.is_empty(), all.last_mut()) {
            sentence.push(word);
        }
        if piece.ends_with(['.', '!', '?', ':', ';', ',']) {
            all.push(Vec::new());
        }
    }
    all.retain(|sentence| !sentence.is_empty());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pmi: f64) -> VocabularyConfig {
        VocabularyConfig { size: 6, longest: 3, pmi }
    }

    /// By hand: 11 words, `new york` 3 times of 3 and 3 (PMI ln(3·11/9) = 1.30), `the new` twice of 3 and 3 (ln(2·11/9) = 0.89).
    #[test]
    fn words_that_belong_together_stay_together() {
        let texts = ["new york the city", "the new york, the new york!", "city"].map(String::from);
        assert_eq!(ngrams(&texts, config(1.0)), ["new york", "the", "city"]);
        let all = ngrams(&texts, config(f64::NEG_INFINITY));
        assert!(all.contains(&"the new york".to_string()) && all.iter().all(|n| n.split(' ').count() <= 3), "{all:?}");
        let single = ngrams(&texts, VocabularyConfig { longest: 1, ..config(1.0) });
        assert_eq!(single, ["new", "the", "york", "city"]);
        assert_eq!(ngrams(&texts, VocabularyConfig { size: 1, ..config(1.0) }), ["new york"]);
    }

    #[test]
    fn what_has_no_words_gives_none() {
        assert!(ngrams(&["... — !".into(), String::new()], config(0.0)).is_empty());
        assert!(ngrams(&[], config(f64::NAN)).is_empty());
    }
}
