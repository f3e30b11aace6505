//! The program as its users run it: the binary, its files, its messages and its exit status.
#![allow(missing_docs, unreachable_pub, missing_debug_implementations)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod blackbox;
mod byte_tokenizer;
mod combine;
mod compose;
mod embed;
mod endpoint;
mod harness;
mod heads;
mod methods;
mod mezo;
mod preferences;
mod resume;
mod road;
mod serve;
mod wrong_input;
