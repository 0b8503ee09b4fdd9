//! The house's own rules: who may use whom, and what each room may know. A change that breaks one of these is a change of
//! the design, and is made there first.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use cresset_tests::harness::binaries::root;

/// Each crate with the crates of ours that it may use.
const MAY_USE: [(&str, &[&str]); 7] = [
    ("proto", &[]),
    ("proto/runtime", &[]),
    ("coordinator/core", &["cresset-proto"]),
    ("client", &["cresset-proto", "cresset-runtime"]),
    ("coordinator", &["cresset-core", "cresset-client", "cresset-runtime", "cresset-proto"]),
    ("worker", &["cresset-client", "cresset-runtime", "cresset-proto"]),
    ("tests", &["cresset-proto", "cresset-runtime", "cresset-core", "cresset-client", "cresset-coordinator", "cresset-worker"]),
];

/// Foreign crates that one crate alone may use.
const KEPT_TO: [(&str, &str); 6] = [
    ("raft", "coordinator"),
    ("raft-engine", "coordinator"),
    ("protobuf", "coordinator"),
    ("slog", "coordinator"),
    ("tch", "worker"),
    ("cc", "worker"),
];

/// Rooms that decide and do nothing: time comes in as a value, effects go out as values.
const PURE: [&str; 14] = [
    "worker/src/health.rs",
    "coordinator/core/src",
    "worker/src/batching.rs",
    "worker/src/batching",
    "worker/src/assignment.rs",
    "worker/src/admission.rs",
    "client/src/balance.rs",
    "client/src/ejection.rs",
    "client/src/latency.rs",
    "client/src/retry.rs",
    "client/src/retry",
    "client/src/journal.rs",
    "client/src/kept.rs",
    "client/src/resume/outbox.rs",
];

/// What a pure room never names.
const IMPURE: [&str; 10] = [
    "tokio",
    "rand",
    "Instant",
    "SystemTime",
    "std::fs",
    "std::net",
    "std::env",
    "std::process",
    "std::thread",
    "tonic::transport",
];

fn manifest(folder: &str) -> toml::Table {
    fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap().parse().unwrap()
}

/// Every dependency of a crate, for whatever purpose.
fn dependencies(folder: &str) -> BTreeSet<String> {
    let manifest = manifest(folder);
    assert!(!manifest.contains_key("target"), "{folder}: dependencies of one platform only aren't looked at here");
    ["dependencies", "dev-dependencies", "build-dependencies"]
        .iter()
        .filter_map(|kind| manifest.get(*kind)?.as_table())
        .flat_map(|table| table.keys().cloned())
        .collect()
}

/// All Rust files under a folder, or the file itself; relative to the checkout.
fn sources(path: &str) -> Vec<PathBuf> {
    let whole = root().join(path);
    if whole.is_file() {
        return vec![path.into()];
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(&whole).unwrap_or_else(|error| panic!("{path}: {error}")) {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let inner = format!("{path}/{name}");
        if root().join(&inner).is_dir() {
            found.extend(sources(&inner));
        } else if name.ends_with(".rs") {
            found.push(inner.into());
        }
    }
    found.sort();
    found
}

/// A file's code, without comments and without what is in quotes.
fn code(path: &Path) -> String {
    without_words(&fs::read_to_string(root().join(path)).unwrap())
}

fn without_words(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(raw) = raw_string(rest) {
            raw
        } else if c == '"' {
            quoted(rest)
        } else if rest.starts_with("'\"'") {
            3
        } else if rest.starts_with("'\\\"'") {
            4
        } else {
            code.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        rest = &rest[skipped..];
    }
    code
}

/// The length of the raw string that begins here, if one does.
fn raw_string(text: &str) -> Option<usize> {
    let hashes = text.strip_prefix('r')?.bytes().take_while(|byte| *byte == b'#').count();
    let end = format!("\"{}", "#".repeat(hashes));
    let inner = text[1 + hashes..].strip_prefix('"')?;
    Some(2 + hashes + inner.find(&end)? + end.len())
}

fn quoted(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Whether code names a word, or a path of words, that isn't the end of a longer path or the start of a longer word.
fn names(code: &str, path: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(path).any(|(at, found)| {
        let (before, after) = (&code[..at], &code[at + found.len()..]);
        !before.ends_with(is_word) && !after.starts_with(is_word)
    })
}

/// Whether code uses a crate: names it at the start of a path.
fn uses_crate(code: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(&format!("{name}::")).any(|(at, _)| {
        let before = &code[..at];
        // `raft::v1` is the package of our own wire, reached through `cresset_proto`.
        !before.ends_with(is_word) && !before.ends_with("::") && !code[at + name.len() + 2..].starts_with("v1")
    })
}

#[test]
fn crates_use_only_what_the_design_allows() {
    let packages: BTreeMap<&str, String> =
        MAY_USE.iter().map(|(folder, _)| (*folder, manifest(folder)["package"]["name"].as_str().unwrap().to_owned())).collect();
    for (folder, allowed) in MAY_USE {
        let allowed: BTreeSet<_> = allowed.iter().map(ToString::to_string).collect();
        let ours: BTreeSet<_> = dependencies(folder).into_iter().filter(|name| name.starts_with("cresset-")).collect();
        let beyond: Vec<_> = ours.difference(&allowed).collect();
        assert!(beyond.is_empty(), "{folder} must not use {beyond:?}");
        assert!(!ours.contains(&packages["tests"]), "nothing uses the tests");
    }
    let members = manifest("")["workspace"]["members"].as_array().unwrap().clone();
    let members: BTreeSet<_> = members.iter().map(|member| member.as_str().unwrap().to_owned()).collect();
    assert_eq!(members, MAY_USE.iter().map(|(folder, _)| (*folder).to_owned()).collect(), "every crate has its rule here");
}

#[test]
fn the_client_library_knows_no_runtime() {
    for path in sources("client/src") {
        let is_command_line = path.starts_with("client/src/bin");
        assert!(is_command_line || !uses_crate(&code(&path), "cresset_runtime"), "{} is the library", path.display());
    }
}

#[test]
fn some_crates_are_kept_to_one_room() {
    for (name, folder) in KEPT_TO {
        for (other, _) in MAY_USE.iter().filter(|(other, _)| *other != folder) {
            assert!(!dependencies(other).contains(name), "{other} must not use {name}, that is for {folder}");
        }
    }
    for path in sources("coordinator/src").iter().filter(|path| !path.starts_with("coordinator/src/consensus")) {
        for name in ["raft", "raft_engine", "protobuf", "slog"] {
            assert!(!uses_crate(&code(path), name), "{} names {name}, only consensus may", path.display());
        }
    }
    for path in sources("worker/src").iter().filter(|path| !path.starts_with("worker/src/engine")) {
        assert!(!uses_crate(&code(path), "tch"), "{} names tch, only the engine may", path.display());
    }
}

#[test]
fn pure_rooms_know_no_clock_no_chance_and_no_outside() {
    for room in PURE {
        for path in sources(room) {
            let code = code(&path);
            for name in IMPURE {
                assert!(!names(&code, name), "{} names {name}", path.display());
            }
            let is_core = path.starts_with("coordinator/core");
            let unordered = names(&code, "HashMap") || names(&code, "HashSet");
            assert!(!is_core || !unordered, "{} has an order that differs from peer to peer", path.display());
        }
    }
}

#[test]
fn unsafe_code_is_the_engines_alone_and_says_why() {
    for (folder, _) in MAY_USE {
        for path in sources(&format!("{folder}/src")) {
            let code = code(&path);
            if path.starts_with("worker/src/engine") {
                continue;
            }
            assert!(!names(&code, "unsafe"), "{} has unsafe code", path.display());
            let is_root =
                path.ends_with("src/lib.rs") || path.ends_with("main.rs") || path.parent().unwrap().ends_with("src/bin");
            let forbids = code.contains("#![forbid(unsafe_code)]");
            assert!(!is_root || forbids || path == Path::new("worker/src/lib.rs"), "{} must forbid it", path.display());
        }
    }
    assert!(code(Path::new("worker/src/lib.rs")).contains("#![deny(unsafe_code)]"));
    for path in sources("worker/src/engine") {
        let text = fs::read_to_string(root().join(&path)).unwrap();
        let blocks =
            text.lines().filter(|line| names(&without_words(line), "unsafe {") || line.trim_start().starts_with("unsafe impl"));
        let reasons = text.matches("SAFETY:").count();
        assert!(blocks.count() == 0 || reasons > 0, "{} has unsafe code without a reason", path.display());
    }
}

#[test]
fn the_scanner_reads_code_and_nothing_else() {
    let text = "let a = \"tokio::x \\\" rand\"; // Instant\nlet b = r#\"std::fs \" \"#; let c = '\"'; use std::net::X;";
    let code = without_words(text);
    for absent in ["tokio", "rand", "Instant", "std::fs"] {
        assert!(!names(&code, absent), "{absent} in {code}");
    }
    assert!(names(&code, "std::net") && !names(&code, "td::net"), "{code}");
    assert!(uses_crate("use raft::Config;", "raft") && uses_crate("{ raft::X }", "raft"));
    assert!(!uses_crate("cresset_proto::raft::X", "raft") && !uses_crate("use {raft::v1::Y}", "raft"));
}
