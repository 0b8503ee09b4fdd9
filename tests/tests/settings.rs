//! The three binaries' settings and exit codes: 0 done, 1 failed, 2 bad usage; every problem at once, by its name.

use std::fs;

use cresset_tests::harness::binaries::{self, Ran};

const BINARIES: [&str; 3] = ["cresset-coordinator", "cresset-worker", "cresset"];

fn run(program: &str, args: &[&str]) -> Ran {
    binaries::run(program, args).unwrap()
}

#[test]
fn help_and_version_are_done_and_nonsense_is_bad_usage() {
    for program in BINARIES {
        let help = run(program, &["--help"]);
        assert_eq!(help.code, Some(0), "{help:?}");
        assert!(help.stdout.contains("--check-config") && help.stdout.contains("CRESSET_"), "{help:?}");
        let version = run(program, &["--version"]);
        assert_eq!((version.code, version.stdout.trim()), (Some(0), format!("{program} {}", env!("CARGO_PKG_VERSION")).as_str()));
        let nonsense = run(program, &["--no-such-flag"]);
        assert_eq!(nonsense.code, Some(2), "{nonsense:?}");
        assert!(nonsense.stderr.contains("--no-such-flag") && nonsense.stdout.is_empty(), "{nonsense:?}");
    }
    assert_eq!(run("cresset", &[]).code, Some(2), "no command at all");
    assert_eq!(run("cresset", &["deploy"]).code, Some(2), "a command without its argument");
}

#[test]
fn every_problem_of_a_configuration_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wrong.toml");
    let path = file.display().to_string();
    let check = |program: &str, text: &str, args: &[&str], names: &[&str]| {
        fs::write(&file, text).unwrap();
        let with_file: Vec<&str> = ["--check-config", "--config", &path].iter().chain(args).copied().collect();
        let ran = run(program, &with_file);
        assert_eq!(ran.code, Some(2), "{program}: {ran:?}");
        for name in names {
            assert!(ran.stderr.lines().any(|line| line.contains(&format!("{name}:"))), "{program}: {name} in {}", ran.stderr);
        }
    };
    check(
        "cresset-coordinator",
        "tick-ms = \"soon\"\npeers = \"c1\"\ncolour = 1\n",
        &["--id", "seven"],
        &["tick-ms", "peers", "colour", "id", "cluster-id", "data-dir", "model-repository"],
    );
    check(
        "cresset-worker",
        "device = \"abacus\"\nqueue-requests-max = 0\ncolour = 1\n",
        &["--id", "a/b"],
        &["device", "queue-requests-max", "colour", "id", "coordinators", "model-repository"],
    );
    check(
        "cresset",
        "timeout = \"soon\"\nendpoints = \"nowhere\"\ncolour = 1\n[up]\nworkers = 0\n",
        &["--output", "xml"],
        &["timeout", "endpoints", "colour", "up.workers", "output"],
    );
    check("cresset", "timeout = = 3\n", &[], &["config"]);
    check("cresset-worker", "device = = 3\n", &[], &["config"]);
}

#[test]
fn flags_win_over_variables_and_variables_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cresset.toml");
    fs::write(&file, "timeout = \"1s\"\noutput = \"json\"\nendpoints = \"file:1\"\n").unwrap();
    let mut command = binaries::command("cresset");
    command.arg("--check-config").arg("--config").arg(&file).args(["--timeout", "3s"]);
    command.env("CRESSET_TIMEOUT", "2s").env("CRESSET_ENDPOINTS", "variable:1");
    let ran = binaries::finish(&mut command).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for line in ["timeout = \"3s\"", "endpoints = \"variable:1\"", "output = \"json\""] {
        assert!(ran.stdout.contains(line), "{line} in {}", ran.stdout);
    }
}

#[test]
fn the_servers_take_the_file_and_variables_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("worker.toml");
    let repository = folder.path().display().to_string();
    fs::write(&file, format!("id = \"from/file\"\ncoordinators = [\"127.0.0.1:1\"]\nmodel-repository = \"{repository}\"\n"))
        .unwrap();
    let check = |id: Option<&str>, args: &[&str]| {
        let mut command = binaries::command("cresset-worker");
        command.arg("--check-config").arg("--config").arg(&file).args(args);
        if let Some(id) = id {
            command.env("CRESSET_ID", id);
        }
        binaries::finish(&mut command).unwrap()
    };
    let wrong = check(None, &[]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("from/file") && wrong.stderr.contains("the file"), "{wrong:?}");
    let wrong = check(Some("from/variable"), &[]);
    assert!(wrong.stderr.contains("from/variable") && wrong.stderr.contains("CRESSET_ID"), "{wrong:?}");
    assert_eq!(check(Some("from/variable"), &["--id", "w1"]).code, Some(0));
}

#[test]
fn a_coordinator_whose_folder_cannot_be_used_fails_with_one_line() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (data, models) = (file.path().display().to_string(), file.path().parent().unwrap().display().to_string());
    let ran = run(
        "cresset-coordinator",
        &[
            "--id",
            "c1",
            "--cluster-id",
            "x",
            "--peers",
            "c1=127.0.0.1:1",
            "--grpc",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
            "--peer",
            "127.0.0.1:0",
            "--data-dir",
            &data,
            "--model-repository",
            &models,
            "--log",
            "off",
        ],
    );
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.starts_with("cresset-coordinator: ") && ran.stderr.lines().count() == 1, "{ran:?}");
}

#[test]
fn nobody_answers_is_a_failure_that_names_every_endpoint() {
    // Two ports that were free a moment ago and are nobody's now.
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (first, second) = (free(), free());
    let endpoints = format!("{first},{second}");
    for command in [&["status"][..], &["repository"], &["deploy", "x"], &["undeploy", "x"], &["predict", "x", "--input", "x=1"]] {
        let args: Vec<&str> = ["--endpoints", &endpoints, "--timeout", "300ms"].iter().chain(command).copied().collect();
        let ran = run("cresset", &args);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""), "{ran:?}");
        assert!(ran.stderr.contains(&first) && ran.stderr.contains(&second), "{command:?}: {ran:?}");
    }
}
