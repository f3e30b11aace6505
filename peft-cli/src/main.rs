//! peft-cli
fn main() {}
