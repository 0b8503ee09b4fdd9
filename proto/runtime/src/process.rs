//! The frame of a process: settings in, exit code out. 0 done, 1 failed, 2 bad usage or configuration.
use std::{fmt::Display, process::ExitCode};

use crate::settings::{Invocation, Problems, Program, Settings};

/// Reads the command line, the environment and the file; then `serve`s, unless only a check or the help was asked for.
pub fn run<C, E: Display>(
    program: &Program,
    read: impl FnOnce(Settings) -> Result<C, Problems>,
    serve: impl FnOnce(C) -> Result<(), E>,
) -> ExitCode {
    let (settings, only_check) = match program.invoke() {
        Invocation::Exit { text, code } => {
            if code == 0 {
                print!("{text}")
            } else {
                eprint!("{text}")
            }
            return ExitCode::from(code);
        }
        Invocation::Run(settings) => (settings, false),
        Invocation::Check(settings) => (settings, true),
    };
    let config = match read(settings) {
        Ok(config) => config,
        Err(problems) => {
            eprintln!("{problems}");
            return ExitCode::from(2);
        }
    };
    if only_check {
        println!("the configuration is right");
        return ExitCode::SUCCESS;
    }
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error:#}", program.name);
            ExitCode::FAILURE
        }
    }
}
