//! The modules of a model as target matching sees them.

use std::collections::BTreeSet;

use crate::select::{Candidate, ModuleKind};

/// All modules: the candidates, then the containers that their paths imply.
pub(crate) struct Modules<'a> {
    pub(crate) candidates: &'a [Candidate<'a>],
    pub(crate) containers: Vec<&'a str>,
}

impl<'a> Modules<'a> {
    pub(crate) fn new(candidates: &'a [Candidate<'a>]) -> Self {
        let known: BTreeSet<&str> = candidates.iter().map(|candidate| candidate.path).collect();
        let mut containers = BTreeSet::new();
        for candidate in candidates {
            for (dot, _) in candidate.path.match_indices('.') {
                if let Some(prefix) = candidate.path.get(..dot).filter(|prefix| !known.contains(prefix)) {
                    containers.insert(prefix);
                }
            }
        }
        Self { candidates, containers: containers.into_iter().collect() }
    }

    pub(crate) fn paths(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.candidates.iter().map(|candidate| candidate.path).chain(self.containers.iter().copied())
    }

    /// What `all-linear` stands for: every linear layer but the language-model head or, where there is none, the
    /// model's own head.
    pub(crate) fn all_linear(&self, task_type: Option<&str>) -> BTreeSet<String> {
        let has_head = self.candidates.iter().any(|candidate| candidate.is_output_head);
        // PEFT leaves out that of SEQ_CLS alone; heads of the others are trained whole as well.
        let has_class_head = ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"].map(Some).contains(&task_type);
        let class_head = if !has_head && has_class_head {
            ["score", "classifier", "qa_outputs"].into_iter().find(|name| self.paths().any(|path| path == *name))
        } else {
            None
        };
        self.candidates
            .iter()
            .filter(|c| c.kind == ModuleKind::Linear && !c.is_output_head && Some(c.path) != class_head)
            .map(|c| c.path.to_owned())
            .collect()
    }

    /// Short names for suggestions: the last and the last two segments of every candidate.
    pub(crate) fn short_names(&self) -> BTreeSet<&'a str> {
        let mut names = BTreeSet::new();
        for candidate in self.candidates {
            let mut dots = candidate.path.rmatch_indices('.').map(|(dot, _)| dot + 1);
            names.extend(dots.next().map_or(Some(candidate.path), |start| candidate.path.get(start..)));
            names.extend(dots.next().and_then(|start| candidate.path.get(start..)));
        }
        names
    }
}
