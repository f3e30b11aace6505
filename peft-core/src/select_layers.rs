//! `layers_to_transform`: which layer a module is in.

use crate::error::Result;
use crate::python_regex::PythonRegex;
use crate::select_spec::TargetSpec;

/// `layers_to_transform` and `layers_pattern`, compiled.
pub(crate) struct LayerFilter {
    pub(crate) indices: Vec<i64>,
    patterns: Vec<PythonRegex>,
}

impl LayerFilter {
    pub(crate) fn new(spec: &TargetSpec) -> Result<Option<Self>> {
        let Some(indices) = spec.layers_to_transform.as_ref().filter(|indices| !indices.is_empty()) else {
            return Ok(None);
        };
        const KEY: &str = "layers_pattern";
        let after = r"\.(?P<idx>\d+)\.";
        let patterns = if spec.layers_pattern.is_empty() {
            vec![PythonRegex::match_within(KEY, "", r".*?\.[^.]*\.(?P<idx>\d+)\.", "")?]
        } else {
            spec.layers_pattern
                .iter()
                .map(|pattern| PythonRegex::match_within(KEY, r"(?:^|.*?\.)", pattern, after))
                .collect::<Result<_>>()?
        };
        Ok(Some(Self { indices: indices.clone(), patterns }))
    }

    /// Layer number of a module: the first number found by the first pattern that matches at all.
    pub(crate) fn layer(&self, path: &str) -> Result<Option<i64>> {
        for pattern in &self.patterns {
            if let Some(index) = pattern.capture(path, "idx")? {
                return Ok(index.and_then(|digits| digits.parse().ok()));
            }
        }
        Ok(None)
    }
}
