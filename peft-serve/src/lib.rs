/*!
Many adapters on one base: a [`Registry`] of adapters by name, an [`Engine`] that continues the texts of many requests in one
batch, each through its own adapter, and (feature `http`) the server of `peft-cli serve`.

A request leases a [`Generation`] of an adapter when it begins and ends with it: adapters may be published, replaced, unloaded and
put out of memory at any time. The engine's batch is not bound to the registry. It makes the set of adapters of each step from
the leases of its rows, so that generations of one name, and adapters of different methods, stand side by side.

This crate does not know how an adapter is opened: the registry is given a closure, mostly around `peft_train::methods::open`.
*/

mod arena;
mod content;
mod engine;
mod grammar;
mod handle;
#[cfg(feature = "http")]
pub mod http;
mod registry;
mod request;
mod row;
mod text;

pub use content::ContentHash;
pub use grammar::{Constraint, Grammar};
pub use handle::{Answer, Complete, Engine, EngineOptions, EngineStats};
pub use registry::{Generation, Listed, Opener, Registry, RegistryError, RegistryStats};
pub use request::{Event, FinishReason, Finished, Logprobs, Refused, Request, Token};
