//! `cresset bench` against a real cluster: what it reports adds up, and it notices what is wrong. And the benches of the
//! coordinators, in short: they measure what they say.

use std::fs;

use cresset_tests::harness::{
    Cluster,
    binaries::{Ran, run},
    fp32_model,
};
use cresset_worker::engine::testing;
use serde_json::{Value, json};

use crate::support::{cluster, command, plus_one};

/// Runs `cresset bench` with JSON output.
fn bench(cluster: &Cluster, args: &[&str]) -> (Ran, Value) {
    let ran = command(cluster, &[&["-o", "json", "bench"], args].concat());
    let json = ran.json();
    (ran, json)
}

/// The levels of a run that went well.
fn levels(cluster: &Cluster, args: &[&str]) -> Vec<Value> {
    let (ran, json) = bench(cluster, args);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    json["levels"].as_array().unwrap().clone()
}

fn count(level: &Value, key: &str) -> u64 {
    level[key].as_u64().unwrap_or_else(|| panic!("{key} in {level}"))
}

fn figure(level: &Value, pointer: &str) -> f64 {
    level.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer} in {level}"))
}

/// What holds for every level in which each request was answered with what the first one got.
fn assert_adds_up(level: &Value) {
    let answered = count(level, "answered");
    assert!(answered > 0 && count(level, "requests") == answered && count(level, "responses") == answered, "{level}");
    assert_eq!((count(level, "failed"), count(level, "mismatched"), &level["errors"]), (0, 0, &json!({})), "{level}");
    let latencies = ["min", "p50", "p90", "p99", "p99.9", "max"].map(|name| figure(level, &format!("/latency_us/{name}")));
    assert!(latencies[0] > 0.0 && latencies.is_sorted(), "{level}");
    // A closed loop counts each place's own time, which ends with its last answer.
    let per_second = answered as f64 / figure(level, "/seconds");
    assert!((0.5..2.0).contains(&(figure(level, "/throughput") / per_second)), "{level}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_loop_adds_up() {
    let repository = plus_one();
    let config = fp32_model(0, "sequence_batching { oldest { max_candidate_sequences: 64 } }");
    repository.add_script("running_sum", &config, &testing::running_sum()).unwrap();
    let cluster = cluster(1, 1, &repository, &["plus_one", "running_sum"]);
    let worker = cluster.process("w1").unwrap().pid().to_string();
    let short = ["plus_one", "--shape", "x:4", "--check", "--warmup", "100ms"];

    let closed = levels(&cluster, &[&short[..], &["--concurrency", "1,8", "--duration", "400ms", "--process", &worker]].concat());
    assert_eq!(closed.len(), 2);
    for (level, concurrency) in closed.iter().zip([1, 8]) {
        assert_adds_up(level);
        assert_eq!(level["load"], json!({"kind": "closed", "concurrency": concurrency}));
        assert_eq!(level.pointer("/processes/0/pid").unwrap().to_string(), worker);
        assert!(figure(level, "/processes/0/rss_bytes") > 1e6 && figure(level, "/processes/0/cpu_us") >= 0.0, "{level}");
        assert!(level.get("lag_us").is_none() && level["unsent"] == 0, "{level}");
    }

    // 200 requests a second for half a second, evenly: 100 are due, whatever became of them.
    let open = ["--rate", "200", "--arrivals", "constant", "--duration", "500ms", "--batch", "3"];
    let (ran, json) = bench(&cluster, &[&short[..], &open].concat());
    let level = &json["levels"][0];
    assert_eq!((ran.code, count(level, "requests") + count(level, "unsent")), (Some(0), 100), "{ran:?}");
    assert_adds_up(level);
    assert_eq!((&json["mode"], &json["batch"]), (&json!("unary"), &json!(3)));
    assert!((figure(level, "/rows_per_second") - 3.0 * figure(level, "/throughput")).abs() < 1e-6, "{level}");
    assert!(figure(level, "/lag_us/p50") <= figure(level, "/lag_us/max"), "{level}");

    let stream = ["plus_one", "--shape", "x:4", "--check", "--warmup", "0s", "--stream", "--streams", "2"];
    let stream = [&stream[..], &["--requests-per-stream", "5", "--requests", "200", "--concurrency", "8"]].concat();
    let level = &levels(&cluster, &stream)[0];
    assert_adds_up(level);
    assert_eq!(count(level, "requests"), 200);
    assert!((40..=41).contains(&count(level, "streams")), "{level}");

    // The sum at each position is the same in every sequence only if none is mixed up with another.
    for way in [&["--stream"][..], &["--connections", "2", "--threads", "2"]] {
        let sequences = ["running_sum", "--input", "x=2.5", "--sequence-length", "4", "--check", "--concurrency", "6"];
        let level = &levels(&cluster, &[&sequences[..], way, &["--warmup", "0s", "--requests", "120"]].concat())[0];
        assert_adds_up(level);
        assert_eq!(count(level, "requests"), 120);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_wrong_is_counted_and_told() {
    let repository = plus_one();
    repository.add_script("positive", &fp32_model(0, ""), &testing::raises_on_negative()).unwrap();
    let cluster = cluster(1, 1, &repository, &["plus_one", "positive"]);

    for way in [&[][..], &["--stream"]] {
        let args = ["positive", "--input", "x=-1", "--requests", "20", "--warmup", "0s"];
        let (ran, json) = bench(&cluster, &[&args[..], way].concat());
        let level = &json["levels"][0];
        assert_eq!((ran.code, count(level, "failed"), count(level, "answered")), (Some(1), 20, 0), "{ran:?}");
        let errors = level["errors"].as_object().unwrap();
        let (code, error) = errors.iter().next().unwrap();
        assert_eq!((errors.len(), &error["count"], code == "STREAM_ERROR"), (1, &json!(20), !way.is_empty()), "{level}");
        assert!(error["example"].as_str().unwrap().contains("a negative first element"), "{level}");
        assert!(ran.stderr.contains("no request was answered"), "{ran:?}");
    }

    // More than one request in flight can take: the rest is late, and what was never sent is told.
    let flood = ["plus_one", "--shape", "x:4", "--rate", "50000", "--arrivals", "constant", "--inflight-max", "1"];
    let level = &levels(&cluster, &[&flood[..], &["--duration", "300ms", "--warmup", "0s"]].concat())[0];
    assert_eq!(count(level, "requests") + count(level, "unsent"), 15_000, "{level}");
    assert!(count(level, "unsent") > 0 && figure(level, "/latency_us/max") > 100_000.0, "latency counts from due: {level}");

    let unshaped = bench(&cluster, &["plus_one"]).0;
    assert!(unshaped.code == Some(1) && unshaped.stderr.contains("--shape x:1,16"), "{unshaped:?}");
    let absent = bench(&cluster, &["nobody"]).0;
    assert!(absent.code == Some(1) && absent.stderr.contains("nobody"), "{absent:?}");
    assert_eq!(bench(&cluster, &["plus_one", "--rate", "-1"]).0.code, Some(2));
}

/// Runs a bench in short, and returns the figures of its last line, which are those of its file.
fn in_short(program: &str, file: &str) -> Value {
    let out = tempfile::tempdir().unwrap();
    let ran = run(program, ["--quick", "--out", out.path().to_str().unwrap()]).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let told: Value = serde_json::from_str(ran.stdout.lines().last().unwrap()).unwrap();
    let written: Value = serde_json::from_slice(&fs::read(out.path().join(file)).unwrap()).unwrap();
    assert_eq!(told, written);
    told
}

#[test]
fn the_bench_of_a_quorum_measures_both_systems() {
    let json = in_short("cresset-bench-quorum", "quorum.json");
    let systems = ["cresset", "etcd"].into_iter().filter(|system| !json[system].is_null());
    for system in systems.clone() {
        let part = &json[system];
        for figure in ["commands_per_second_at_1", "p50_us_at_16", "p99_us_at_64", "cpu_us_at_64", "outage_max_ms"] {
            assert!(part[figure].as_f64().is_some_and(|value| value > 0.0), "{system} {figure}: {json}");
        }
        assert_eq!(part["kills"], 2, "{json}");
    }
    assert_eq!(systems.count(), if json["etcd_version"].is_null() { 1 } else { 2 }, "{json}");
}

#[test]
fn the_bench_of_a_fleet_measures_each_size() {
    let json = in_short("cresset-bench-scale", "scale.json");
    let sizes = json["workers"].as_object().unwrap();
    assert_eq!(sizes.keys().collect::<Vec<_>>(), ["3", "6"]);
    for (size, part) in sizes {
        for figure in ["verdict_to_assigned_ms", "plan_ms", "snapshot_mb", "snapshot_load_ms", "whole_ms"] {
            assert!(part[figure].as_f64().is_some_and(|value| value > 0.0), "{size} {figure}: {json}");
        }
    }
}
