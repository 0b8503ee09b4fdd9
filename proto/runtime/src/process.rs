//! The frame of a process: settings in, exit code out. 0 done, 1 failed, 2 bad usage or configuration.
use std::{
    env,
    fmt::Display,
    io,
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use crate::settings::{Invocation, Problems, Program, Settings};

/// Puts a new process of the same program, with the same arguments and variables, in this one's place: the process id and the
/// parent stay, every thread ends, every socket is closed. Returns only if the system refuses.
pub fn start_again() -> io::Error {
    again().exec()
}

/// Starts again with `name` set to `value` if it isn't set to anything: for libraries that read their variables while they are
/// loaded, before `main`. Call it before anything else.
///
/// # Errors
/// The system's, if it refuses; everything goes on without the variable then.
pub fn with_variable(name: &str, value: &str) -> io::Result<()> {
    match env::var_os(name) {
        Some(_) => Ok(()),
        None => Err(again().env(name, value).exec()),
    }
}

fn again() -> Command {
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_default();
    let program = match env::current_exe() {
        // A program that was replaced or removed meanwhile is still there under this name.
        Ok(program) if program.exists() => program,
        Ok(_) | Err(_) => "/proc/self/exe".into(),
    };
    let mut command = Command::new(program);
    command.arg0(name).args(arguments);
    command
}

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
