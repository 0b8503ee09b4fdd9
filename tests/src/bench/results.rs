//! All that was measured, as JSON for programs and as a table for people.

use std::{collections::BTreeMap, fs, time::SystemTime};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    figures::Part,
    models::{MODELS, Model},
    table::{Goal, Rows, word},
};
use crate::harness::binaries::root;

/// Where and when it was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Cores that everything shares.
    pub cores: u16,
    /// The processor's name.
    pub cpu: String,
    /// libtorch's version.
    pub torch: String,
    /// Cresset's.
    pub cresset: &'static str,
    /// When the bench began.
    pub date: String,
    /// Processes that wanted a core in the minute before: above 0, others were at work too.
    pub load_before: f64,
}

impl Machine {
    /// Asks this one; what it doesn't tell is empty.
    pub fn ask(cores: u16) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let header = fs::read_to_string(root().join(".cresset/libtorch/include/torch/headeronly/version.h")).unwrap_or_default();
        let number = |name: &str| {
            let line = header.lines().find_map(|line| line.strip_prefix(&format!("#define TORCH_VERSION_{name} ")));
            line.unwrap_or("?").trim().to_owned()
        };
        Self {
            cores,
            cpu: cpu.trim_start_matches([' ', '\t', ':']).to_owned(),
            torch: ["MAJOR", "MINOR", "PATCH"].map(number).join("."),
            cresset: env!("CARGO_PKG_VERSION"),
            date: httpdate::fmt_http_date(SystemTime::now()),
            load_before: read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        }
    }
}

/// The parts that were measured.
#[derive(Debug, Clone)]
pub struct Results {
    /// Where and when.
    pub machine: Machine,
    /// Rounds of each figure.
    pub rounds: usize,
    /// `routing`
    pub routing: Option<Part>,
    /// `overhead`
    pub overhead: Option<Part>,
    /// `throughput`, by model.
    pub throughput: Option<BTreeMap<&'static str, Part>>,
    /// `tail`
    pub tail: Option<Part>,
    /// `overload`
    pub overload: Option<Part>,
    /// `survival`
    pub survival: Option<Part>,
    /// `memory`
    pub memory: Option<Part>,
}

impl Results {
    /// The whole, with the parts that were left out missing.
    pub fn to_json(&self) -> Value {
        let mut json = Map::new();
        json.insert("machine".to_owned(), json!(self.machine));
        json.insert("rounds".to_owned(), json!(self.rounds));
        let parts = [
            ("routing", &self.routing),
            ("overhead", &self.overhead),
            ("tail", &self.tail),
            ("overload", &self.overload),
            ("survival", &self.survival),
            ("memory", &self.memory),
        ];
        json.extend(parts.into_iter().filter_map(|(name, part)| Some((name.to_owned(), part.as_ref()?.to_json()))));
        if let Some(models) = &self.throughput {
            let models: Map<_, _> = models.iter().map(|(name, part)| ((*name).to_owned(), part.to_json())).collect();
            json.insert("throughput".to_owned(), Value::Object(models));
        }
        Value::Object(json)
    }

    /// The models whose throughput was measured, in their usual order.
    pub fn models(&self) -> impl Iterator<Item = (Model, &Part)> {
        let parts = self.throughput.as_ref();
        MODELS.into_iter().filter_map(move |model| Some((model, parts?.get(model.name)?)))
    }

    /// Every figure with its spread, its reference and its goal.
    pub fn table(&self) -> String {
        let mut rows = Rows::new();
        self.routing.iter().for_each(|part| routing(&mut rows, part));
        self.overhead.iter().for_each(|part| overhead(&mut rows, part));
        for (model, part) in self.models() {
            throughput(&mut rows, model.name, part);
        }
        self.tail.iter().for_each(|part| tail(&mut rows, part));
        self.overload.iter().for_each(|part| overload(&mut rows, part));
        self.survival.iter().for_each(|part| survival(&mut rows, part));
        self.memory.iter().for_each(|part| memory(&mut rows, part));
        let Machine { cores, cpu, torch, date, load_before, .. } = &self.machine;
        format!("{cpu}, {cores} cores, torch {torch}, {date}, load before {load_before}\n\n{rows}\n")
    }
}

fn routing(rows: &mut Rows, part: &Part) {
    let known = |key: &str| part.known(key).map_or("?".to_owned(), ToString::to_string);
    let reference = format!("{} models on {} workers", known("models"), known("workers"));
    rows.row("route and replica, 1 thread, ns", part, "one_thread_ns", 0, Goal::Most(1_000.0), &reference);
    rows.row("  2 threads at once, each", part, "two_threads_ns", 0, Goal::Most(1_000.0), "no lock between them");
    rows.row("  a model on every worker", part, "everywhere_ns", 0, Goal::Most(1_000.0), "");
}

fn overhead(rows: &mut Rows, part: &Part) {
    rows.row("a call of tonic's that does nothing, p50, µs", part, "bare_p50_us", 0, Goal::None, "what this machine asks for");
    rows.row("  its server's CPU, µs", part, "bare_cpu_us", 1, Goal::None, "");
    for (name, way, most) in [("direct", "straight", 120.0), ("coordinator", "by coordinator", 220.0)] {
        for (percentile, goal) in [("p50", Goal::Most(most)), ("p99", Goal::None)] {
            let whole = word(part, &format!("{name}_whole_{percentile}_us"), 0);
            let forward = word(part, &format!("in_process_{percentile}_us"), 0);
            let figure = format!("{name}_{percentile}_us");
            let words = format!("overhead {way}, {percentile}, µs");
            rows.row(&words, part, &figure, 0, goal, &format!("{whole} in all, forward in process {forward}"));
        }
    }
    for (process, at_64, at_1) in [("worker", 50.0, 120.0), ("coordinator", 40.0, 100.0)] {
        let way = if process == "worker" { "direct" } else { "coordinator" };
        let rate = word(part, &format!("{way}_throughput_at_64"), 0);
        let words = |concurrency: u32| format!("{process} CPU per request at {concurrency}, µs");
        rows.row(&words(64), part, &format!("{process}_cpu_us"), 1, Goal::Most(at_64), &format!("{rate} requests/s"));
        rows.row(&words(1), part, &format!("{process}_cpu_us_at_1"), 1, Goal::Most(at_1), "");
    }
}

fn throughput(rows: &mut Rows, name: &str, part: &Part) {
    let known = |key: &str| part.known("reference").map_or(Value::Null, |reference| reference[key].clone());
    let (batch, threads) = (known("batch"), known("threads"));
    let rows_per_second = word(part, "in_process_rows_per_second", 0);
    let reference = format!("{rows_per_second} rows/s: batch {batch}, {} × {} threads", threads["callers"], threads["intra"]);
    let goal = if name == "mlp" { Goal::None } else { Goal::Least(0.95) };
    rows.row(&format!("{name}: best ratio to libtorch"), part, "best_ratio", 3, goal, &reference);
    for concurrency in [1, 8, 32, 64] {
        let rate = word(part, &format!("requests_per_second_at_{concurrency}"), 0);
        let figure = format!("ratio_at_{concurrency}");
        rows.row(&format!("{name}: ratio at {concurrency}"), part, &figure, 3, Goal::None, &format!("{rate} requests/s"));
    }
    if name == "mlp" {
        let cost = word(part, "worker_cpu_us_at_64", 1);
        let words = "mlp: requests per core-second at 64";
        rows.row(words, part, "requests_per_core_second", 0, Goal::Least(20_000.0), &format!("{cost} µs of CPU each"));
    }
}

fn tail(rows: &mut Rows, part: &Part) {
    let rate = word(part, "saturation_requests_per_second", 0);
    for (share, suffix, goal) in [("70%", "", Goal::Most(5.0)), ("30%", "_at_30_percent", Goal::None)] {
        let p50 = word(part, &format!("p50_us{suffix}"), 0);
        let reference = format!("p50 {p50} µs at {share} of {rate} requests/s");
        rows.row(&format!("p99.9 / p50 at {share} load"), part, &format!("p999_over_p50{suffix}"), 1, goal, &reference);
        let (alone, beside) = (word(part, &format!("p99_us{suffix}"), 0), word(part, &format!("neighbour_p99_us{suffix}"), 0));
        let moves = word(part, &format!("neighbour_moves{suffix}"), 0);
        let reference = format!("p99 {alone} µs alone, {beside} µs beside {moves} loads and unloads");
        let words = format!("p99 beside a loading neighbour, {share} load");
        let goal = if suffix.is_empty() { Goal::Most(1.5) } else { Goal::None };
        rows.row(&words, part, &format!("neighbour_p99_growth{suffix}"), 2, goal, &reference);
    }
}

fn overload(rows: &mut Rows, part: &Part) {
    let seconds = part.known("seconds").cloned().unwrap_or_default();
    let reference = format!("{} requests/s at best; 3 times as many for {seconds} s", word(part, "peak_requests_per_second", 0));
    rows.row("goodput over peak, 3 × too much", part, "goodput_over_peak", 3, Goal::Least(0.9), &reference);
    rows.row("  p99 of accepted over deadline", part, "accepted_p99_over_deadline", 3, Goal::Most(1.0), "");
    rows.row("  refused, part of all", part, "refused_share", 3, Goal::None, "");
    rows.row("  memory grew by, MiB", part, "memory_growth_mib", 1, Goal::None, "");
}

fn survival(rows: &mut Rows, part: &Part) {
    for name in ["speech", "implicit"] {
        let rate = |way: &str| word(part, &format!("{name}_{way}_requests_per_second"), 0);
        let reference = format!("{} requests/s with, {} without", rate("surviving"), rate("without_checkpoints"));
        let goal = Goal::Most(1.1);
        rows.row(&format!("{name}: cost of checkpoints"), part, &format!("{name}_over_without_checkpoints"), 3, goal, &reference);
        let reference = format!("{} requests/s on a plain stream", rate("plain"));
        rows.row("  of surviving at all", part, &format!("{name}_over_plain"), 3, Goal::None, &reference);
        let checkpoints = word(part, &format!("{name}_checkpoint_bytes_per_request"), 0);
        let journal = word(part, &format!("{name}_journal_bytes_per_stream"), 0);
        let reference = format!("{checkpoints} a request; {journal} bytes of journal a stream");
        rows.row("  checkpoint bytes/s", part, &format!("{name}_checkpoint_bytes_per_second"), 0, Goal::None, &reference);
        for (process, words) in [("worker", "  worker CPU per request, µs"), ("client", "  router's and caller's CPU, µs")] {
            let others = ["without_checkpoints", "plain"].map(|way| word(part, &format!("{name}_{way}_{process}_cpu_us"), 1));
            let reference = format!("{} without checkpoints, {} plain", others[0], others[1]);
            rows.row(words, part, &format!("{name}_surviving_{process}_cpu_us"), 1, Goal::None, &reference);
        }
    }
}

fn memory(rows: &mut Rows, part: &Part) {
    let (worker, reference) = (word(part, "worker_mib", 1), word(part, "reference_mib", 1));
    let words = format!("worker {worker} MiB, libtorch with the models {reference} MiB");
    rows.row("memory over libtorch, MiB", part, "over_libtorch_mib", 1, Goal::Most(30.0), &words);
    rows.row("  before the first request", part, "at_rest_over_libtorch_mib", 1, Goal::None, "");
    for (what, words) in [("requests", "small requests"), ("streams", "streams")] {
        let count = part.known(&format!("flat_{what}")).cloned().unwrap_or_default();
        let figure = format!("over_{what}_percent");
        rows.row(&format!("memory moved over {count} {words}, %"), part, &figure, 2, Goal::Most(1.0), "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_promised_keys_are_there_and_the_table_tells_what_was_missed() {
        let mut overhead = Part::default();
        for value in [100.0, 130.0, 90.0] {
            overhead.add("direct_p50_us", value);
            overhead.add("worker_cpu_us", value);
        }
        let mut mlp = Part::default();
        mlp.add("best_ratio", 0.5);
        mlp.add("requests_per_core_second", 19_000.0);
        let machine = Machine::ask(2);
        assert!(machine.torch.starts_with("2."), "{machine:?}");
        let results = Results {
            machine,
            rounds: 3,
            routing: None,
            overhead: Some(overhead),
            throughput: Some(BTreeMap::from([("mlp", mlp)])),
            tail: None,
            overload: None,
            survival: None,
            memory: None,
        };
        let json = results.to_json();
        assert_eq!(json["overhead"]["direct_p50_us"], json!(100.0));
        assert_eq!(json["throughput"]["mlp"]["best_ratio"], json!(0.5));
        assert!(json.get("tail").is_none() && json["machine"]["cores"] == 2);
        let table = results.table();
        let line = |words: &str| table.lines().find(|line| line.contains(words)).unwrap().to_owned();
        assert!(line("straight, p50").contains("≤ 120 ") && line("straight, p50").contains("90 … 130"), "{table}");
        assert!(line("worker CPU per request at 64").contains("≤ 50  missed"), "{table}");
        assert!(line("per core-second").contains("≥ 20000  missed"), "{table}");
    }
}
