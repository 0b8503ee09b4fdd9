//! `cresset-prepare`: turns the demo models' fetched parts into a model repository (`make models`).
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use cresset_worker::engine::prepare::{Options, prepare_all};

const HELP: &str = "\
Prepares the demo models from what `make fetch` brought, and checks each of them.

Usage: cresset-prepare [OPTIONS]

Options:
  --home DIR        the folder of fetched things [default: .cresset]
  --templates DIR   the folder with NAME/config.pbtxt of each demo model [default: deploy/models]
  --force           prepare again what is up to date
  -h, --help        print this
  -V, --version     print the version
";

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => return ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("cresset-prepare: {problem}, see --help");
            return ExitCode::from(2);
        }
    };
    match prepare_all(&options, &mut |line| println!("prepare: {line}")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cresset-prepare: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The options, or `None` when the answer has been printed already.
fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options { home: PathBuf::from(".cresset"), templates: PathBuf::from("deploy/models"), force: false };
    while let Some(argument) = arguments.next() {
        let mut folder = || arguments.next().map(PathBuf::from).ok_or(format!("{argument} needs a folder"));
        match argument.as_str() {
            "--home" => options.home = folder()?,
            "--templates" => options.templates = folder()?,
            "--force" => options.force = true,
            "-h" | "--help" => {
                print!("{HELP}");
                return Ok(None);
            }
            "-V" | "--version" => {
                println!("cresset-prepare {}", env!("CARGO_PKG_VERSION"));
                return Ok(None);
            }
            _ => return Err(format!("unknown argument '{argument}'")),
        }
    }
    Ok(Some(options))
}
