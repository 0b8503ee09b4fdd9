//! The everyday version of `make chaos`, on a machine that does nothing else: see [`cresset_tests::chaos`].
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use cresset_tests::{
    chaos::faults::{Fault, Needs},
    harness::binaries,
};
use serde_json::Value;

/// Whoever holds it has the machine: what the load needs of two cores, two clusters at once may not find, and then all is late.
static MACHINE: Mutex<()> = Mutex::new(());

/// Runs it, and returns its last line.
fn chaos(args: &[&str]) -> Value {
    let _machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let ran = binaries::run("cresset-chaos", args).unwrap();
    println!("{}{}", ran.stderr, ran.stdout);
    assert_eq!(ran.code, Some(0), "something was wrong; it is listed above");
    serde_json::from_str(ran.stdout.lines().last().unwrap_or_default()).unwrap()
}

fn count(json: &Value, key: &str) -> u64 {
    json[key].as_u64().unwrap_or_else(|| panic!("{key} in {json}"))
}

fn assert_clean(json: &Value) {
    for key in ["failed", "lost", "repeated", "reordered", "wrong", "late"] {
        assert_eq!(count(json, key), 0, "{key} in {json}");
    }
    assert_eq!(count(json, "faults"), count(json, "faults_planned"));
    assert!(count(json, "answered") > count(json, "seconds") * 50, "hardly any load: {json}");
}

#[test]
fn no_fault_that_one_machine_allows_costs_a_response() {
    let json = chaos(&["--everyday", "--seconds", "120", "--seed", "1", "--streams", "12", "--rate", "30"]);
    assert_clean(&json);
    let happened: BTreeSet<String> = json["by_fault"].as_object().unwrap().keys().cloned().collect();
    let left_out = json["left_out"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect();
    let all: BTreeSet<_> = Fault::ALL.iter().map(|fault| fault.name().to_owned()).collect();
    assert_eq!(&all - &happened, left_out, "each comes, or is said to be left out");
}

#[test]
fn without_namespaces_it_says_what_it_left_out() {
    let allowed = ["kill-worker", "reset-worker", "fill-disk"];
    let json =
        chaos(&["--loopback", "--seconds", "12", "--seed", "1", "--streams", "12", "--rate", "30", "--only", &allowed.join(",")]);
    assert_clean(&json);
    assert_eq!(json["by_fault"].as_object().unwrap().keys().collect::<Vec<_>>(), ["kill-worker"]);
    let left_out: Vec<_> = allowed.into_iter().filter(|name| Fault::of(name).unwrap().needs() != Needs::Nothing).collect();
    assert_eq!(json["left_out"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect::<Vec<_>>(), left_out);
}
