//! One file a command.

use anyhow::Result;
use clap::CommandFactory;

use crate::args::{Args, Command};

mod combine;
mod compose;
mod convert;
mod doctor;
mod embed;
mod eval;
mod generate;
mod inspect;
mod merge;
mod methods;
mod replay;
mod serve;
mod train;

/// Runs the command.
pub(crate) fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Train(a) => train::run(&a),
        Command::Replay(a) => replay::run(&a),
        Command::Eval(a) => eval::run(&a),
        Command::Generate(a) => generate::run(&a),
        Command::Serve(a) => serve::run(&a),
        Command::Merge(a) => merge::run(&a),
        Command::Combine(a) => combine::run(&a),
        Command::Compose(a) => compose::run(&a),
        Command::Convert(a) => convert::run(&a),
        Command::Embed(a) => embed::run(&a),
        Command::Inspect(a) => inspect::run(&a),
        Command::Methods(a) => methods::run(&a),
        Command::Doctor(a) => doctor::run(&a),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "peft-cli", &mut script);
            out_part!("{}", String::from_utf8_lossy(&script));
            Ok(())
        }
    }
}
