//! The page about methods has all of them.

#![allow(missing_docs)]

use peft_train::methods::METHODS;

#[test]
fn every_method_is_on_the_page_with_its_papers() {
    let page = include_str!("../../docs/methods.md");
    let missing: Vec<_> = METHODS.iter().map(|m| m.name).filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/methods.md has no `{missing:?}`");
    let papers = METHODS.iter().flat_map(|m| m.paper.split([' ', ';', ',']).filter(|word| word.starts_with("arXiv:")));
    let missing: Vec<_> = papers.filter(|paper| !page.contains(paper)).collect();
    assert!(missing.is_empty(), "docs/methods.md does not cite {missing:?}");
}
