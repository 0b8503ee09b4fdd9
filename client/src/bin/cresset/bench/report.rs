//! What a run came to, as a table for people and as JSON for programs.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{
    Load,
    args::Percentile,
    tally::{Failures, Tally},
};
use crate::output;

/// A whole run. The keys are a contract; times are in µs, and fractions are kept.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The model.
    pub model: String,
    /// The version that was asked for; empty for the server's choice.
    pub version: String,
    /// `host:port` of the servers, in the order in which connections were made.
    pub endpoints: Vec<String>,
    /// `unary` or `stream`.
    pub mode: &'static str,
    /// Rows of each request.
    pub batch: u64,
    /// Bytes of each request.
    pub request_bytes: usize,
    /// Connections.
    pub connections: u32,
    /// Requests of a sequence.
    pub sequence_length: Option<u32>,
    /// In the order in which they ran.
    pub levels: Vec<Level>,
}

/// One level of load.
#[derive(Debug, Serialize)]
pub struct Level {
    /// What was asked for.
    pub load: Load,
    /// The measured time.
    pub seconds: f64,
    /// Measured requests: those answered and those failed.
    pub requests: u64,
    /// Those with a good answer.
    pub answered: u64,
    /// Those with an error, or none in time.
    pub failed: u64,
    /// Due, but never sent, because too many were in flight.
    pub unsent: u64,
    /// Answers that differ from the first, with `--check`.
    pub mismatched: u64,
    /// Responses to measured requests; more than `answered` for decoupled models only.
    pub responses: u64,
    /// Streams that were opened.
    pub streams: u64,
    /// Good answers per second.
    pub throughput: f64,
    /// Rows of good answers per second.
    pub rows_per_second: f64,
    /// Of good answers; `min`, `mean`, `max`, and `p…` for each percentile.
    pub latency_us: BTreeMap<String, f64>,
    /// How late requests were sent, in an open loop: the generator's own lateness, or that too many were in flight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag_us: Option<BTreeMap<String, f64>>,
    /// By gRPC code; `STREAM_ERROR` for errors inside a stream.
    pub errors: BTreeMap<&'static str, ErrorCount>,
    /// What the watched processes used.
    pub processes: Vec<Cost>,
    /// CPU time of the generator itself for each request.
    pub generator_cpu_us: f64,
}

/// Failures of one code.
#[derive(Debug, Serialize)]
pub struct ErrorCount {
    count: u64,
    example: String,
}

/// What a process used during a level.
#[derive(Debug, Serialize)]
pub struct Cost {
    /// The process.
    pub pid: u32,
    /// User and system time for each request that ended meanwhile.
    pub cpu_us: f64,
    /// User and system time in all.
    pub cpu_seconds: f64,
    /// Resident memory at the end.
    pub rss_bytes: u64,
}

/// What the system measured beside the requests.
#[derive(Debug, Default)]
pub struct Costs {
    /// Of each watched process: CPU seconds and resident bytes.
    pub processes: Vec<(u32, f64, u64)>,
    /// CPU seconds of this process.
    pub generator_seconds: f64,
}

impl Level {
    /// Puts a level's figures together.
    pub fn of(load: Load, tally: &Tally, costs: &Costs, batch: u64, percentiles: &[Percentile]) -> Self {
        let throughput = tally.throughput(load.is_closed());
        let for_each = |seconds: f64| if tally.ended == 0 { 0.0 } else { seconds * 1e6 / tally.ended as f64 };
        let cost = |&(pid, cpu_seconds, rss_bytes): &(u32, f64, u64)| Cost {
            pid,
            cpu_us: for_each(cpu_seconds),
            cpu_seconds,
            rss_bytes,
        };
        let count = |failures: &Failures| ErrorCount { count: failures.count, example: failures.example.clone() };
        Self {
            lag_us: (!load.is_closed()).then(|| spread(&tally.lag, percentiles)),
            load,
            seconds: tally.seconds(),
            requests: tally.answered + tally.failed(),
            answered: tally.answered,
            failed: tally.failed(),
            unsent: tally.unsent,
            mismatched: tally.mismatched,
            responses: tally.responses,
            streams: tally.streams,
            throughput,
            rows_per_second: throughput * batch as f64,
            latency_us: spread(&tally.latency, percentiles),
            errors: tally.failures.iter().map(|(code, failures)| (*code, count(failures))).collect(),
            processes: costs.processes.iter().map(cost).collect(),
            generator_cpu_us: for_each(costs.generator_seconds),
        }
    }
}

/// The figures of a histogram of ns, in µs; none if it is empty.
fn spread(histogram: &Histogram<u64>, percentiles: &[Percentile]) -> BTreeMap<String, f64> {
    if histogram.is_empty() {
        return BTreeMap::new();
    }
    let us = |ns: u64| ns as f64 / 1e3;
    let mut spread: BTreeMap<_, _> = percentiles
        .iter()
        .map(|percentile| (format!("p{}", percentile.text), us(histogram.value_at_percentile(percentile.percent))))
        .collect();
    spread.insert("min".to_owned(), us(histogram.min()));
    spread.insert("mean".to_owned(), histogram.mean() / 1e3);
    spread.insert("max".to_owned(), us(histogram.max()));
    spread
}

impl Report {
    /// One row for each level.
    pub fn table(&self, percentiles: &[Percentile]) -> String {
        let is_open = self.levels.iter().any(|level| level.lag_us.is_some());
        let latencies: Vec<String> = percentiles.iter().map(|p| format!("p{}", p.text)).chain(["max".to_owned()]).collect();
        let mut header: Vec<String> = ["LOAD", "ANSWERED", "ANSWERS/S"].map(ToOwned::to_owned).to_vec();
        header.extend(latencies.iter().map(|name| name.to_uppercase()));
        header.push("FAILED".to_owned());
        if is_open {
            header.extend(["UNSENT", "LAG P99"].map(ToOwned::to_owned));
        }
        let watched = self.levels.first().map_or(&[][..], |level| &level.processes);
        header.extend(watched.iter().map(|cost| format!("CPU/REQ {}", cost.pid)));
        let row = |level: &Level| {
            let mut row = vec![level.load.to_string(), level.answered.to_string(), format!("{:.1}", level.throughput)];
            row.extend(latencies.iter().map(|name| level.latency_us.get(name).map_or("-".to_owned(), |us| time(*us))));
            row.push(level.failed.to_string());
            if is_open {
                let lag = level.lag_us.as_ref().and_then(|lag| lag.get("p99").or_else(|| lag.get("max")));
                row.extend([level.unsent.to_string(), lag.map_or("-".to_owned(), |us| time(*us))]);
            }
            row.extend(level.processes.iter().map(|cost| time(cost.cpu_us)));
            row
        };
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        output::table(&header, self.levels.iter().map(row).collect())
    }

    /// What a reader of the table has to know besides.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for level in &self.levels {
            for (code, error) in &level.errors {
                notes.push(format!("{}: {} times {code}, as in: {}", level.load, error.count, error.example));
            }
            if level.unsent > 0 {
                notes.push(format!(
                    "{}: {} requests were due and could not be sent before the end, with as many in flight as --inflight-max \
                     allows; the latencies are lower bounds",
                    level.load, level.unsent
                ));
            }
            if level.mismatched > 0 {
                notes.push(format!("{}: {} answers differ from the first", level.load, level.mismatched));
            }
        }
        notes
    }
}

/// µs in the unit that suits them.
fn time(us: f64) -> String {
    match us {
        us if us < 1_000.0 => format!("{us:.0} µs"),
        us if us < 1_000_000.0 => format!("{:.2} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        schedule::Arrivals,
        tally::{Answer, Failure, Outcome, Window},
    };

    fn percentiles() -> Vec<Percentile> {
        ["50", "99.9"].iter().map(|text| text.parse().unwrap()).collect()
    }

    fn level(load: Load) -> Level {
        let mut tally = Tally::new(Window { from_ns: 0, until_ns: 2_000_000_000 });
        for number in 1..=1_000u64 {
            let result = match number {
                1_000 => Err(Failure { code: "UNAVAILABLE", message: "gone".into() }),
                _ => Ok(Answer { responses: 1, matches: true }),
            };
            tally.add(&Outcome { due_ns: number, sent_ns: number + 50_000, done_ns: number + 1_000 * number, result });
        }
        tally.add_unsent(7);
        let costs = Costs { processes: vec![(42, 0.5, 1 << 20)], generator_seconds: 0.01 };
        Level::of(load, &tally, &costs, 4, &percentiles())
    }

    fn report() -> Report {
        let open = Load::Open { rate: 500.0, arrivals: Arrivals::Poisson, inflight_max: 8 };
        Report {
            model: "m".into(),
            version: String::new(),
            endpoints: vec!["a:1".into()],
            mode: "unary",
            batch: 4,
            request_bytes: 100,
            connections: 1,
            sequence_length: None,
            levels: vec![level(open)],
        }
    }

    #[test]
    fn the_json_adds_up() {
        let json = serde_json::to_value(report()).unwrap();
        let level = &json["levels"][0];
        assert_eq!((&level["requests"], &level["answered"], &level["failed"]), (&1000.into(), &999.into(), &1.into()));
        assert_eq!((&level["unsent"], &level["seconds"]), (&1.into(), &2.0.into()));
        assert_eq!((&level["throughput"], &level["rows_per_second"]), (&499.5.into(), &1998.0.into()));
        assert_eq!(level["load"], serde_json::json!({"kind": "open", "rate": 500.0, "arrivals": "poisson", "inflight_max": 8}));
        assert_eq!(level["errors"]["UNAVAILABLE"], serde_json::json!({"count": 1, "example": "gone"}));
        assert_eq!(
            level["processes"][0],
            serde_json::json!({"pid": 42, "cpu_us": 500.0, "cpu_seconds": 0.5, "rss_bytes": 1 << 20})
        );
        let near = |value: &serde_json::Value, us: f64| (value.as_f64().unwrap() - us).abs() <= us / 500.0;
        assert!(near(&level["latency_us"]["p50"], 500.0) && near(&level["latency_us"]["p99.9"], 998.0), "{level}");
        assert!(near(&level["lag_us"]["max"], 50.0) && near(&level["generator_cpu_us"], 10.0), "{level}");
    }

    #[test]
    fn a_closed_loop_has_no_lag() {
        let json = serde_json::to_value(self::level(Load::Closed { concurrency: 3 })).unwrap();
        assert_eq!(json["load"], serde_json::json!({"kind": "closed", "concurrency": 3}));
        assert!(json.get("lag_us").is_none());
    }

    #[test]
    fn the_table_is_in_human_units_and_notes_say_what_is_wrong() {
        let report = report();
        let table = report.table(&percentiles());
        assert!(
            table.starts_with("LOAD   ANSWERED  ANSWERS/S  P50     P99.9   MAX     FAILED  UNSENT  LAG P99  CPU/REQ 42\n"),
            "{table}"
        );
        assert!(table.contains("500/s  999       499.5      500 µs  999 µs  999 µs  1       1       50 µs    500 µs"), "{table}");
        let notes = report.notes().join("\n");
        assert!(notes.contains("1 times UNAVAILABLE, as in: gone") && notes.contains("--inflight-max"), "{notes}");
        assert_eq!((time(12.4), time(1_500.0), time(2e6)), ("12 µs".into(), "1.50 ms".into(), "2.00 s".into()));
    }
}
