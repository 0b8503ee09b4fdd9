//! What was measured, as a table and as JSON.

use serde_json::{Value, json};

use super::{COMMAND_BYTES, Pace, WRITERS};
use crate::bench::{
    figures::Part,
    results::Machine,
    table::{Goal, Rows, word},
};

/// The goals for the time without a leader.
const OUTAGE_MEDIAN_MS: f64 = 1_000.0;
const OUTAGE_MAX_MS: f64 = 2_500.0;

/// Both systems' figures.
#[derive(Debug, Clone)]
pub struct Report {
    machine: Machine,
    pace: Pace,
    /// Cresset's.
    pub(super) cresset: Part,
    /// etcd's, where it is installed.
    pub(super) etcd: Option<Part>,
    /// Which etcd.
    pub(super) etcd_version: Option<String>,
}

impl Report {
    /// Nothing measured yet.
    pub(super) fn new(machine: Machine, pace: Pace) -> Self {
        Self { machine, pace, cresset: Part::default(), etcd: None, etcd_version: None }
    }

    /// Everything, for programs.
    pub fn to_json(&self) -> Value {
        let outage = |part: &Part| part.spread("outage_ms").map(|(_, max)| max);
        let whole = |part: &Part| {
            let mut json = part.to_json();
            json["outage_max_ms"] = json!(outage(part));
            json["kills"] = json!(part.rounds("outage_ms").len());
            json
        };
        json!({
            "machine": self.machine,
            "rounds": self.pace.rounds,
            "seconds": self.pace.time.as_secs_f64(),
            "command_bytes": COMMAND_BYTES,
            "etcd_version": self.etcd_version,
            "cresset": whole(&self.cresset),
            "etcd": self.etcd.as_ref().map(whole),
        })
    }

    /// Each figure with etcd's beside it.
    pub fn table(&self) -> String {
        let mut rows = Rows::new();
        let theirs = |name: &str, digits: usize| match &self.etcd {
            Some(part) => format!("etcd {}", word(part, name, digits)),
            None => "no etcd here".to_owned(),
        };
        let their = |name: &str| self.etcd.as_ref().and_then(|part| part.median(name));
        for writers in WRITERS {
            let rate = format!("commands_per_second_at_{writers}");
            let goal = their(&rate).map_or(Goal::None, |rate| Goal::Least(rate.round()));
            let words = format!("commands/s, {writers} writer{}", if writers == 1 { "" } else { "s" });
            rows.row(&words, &self.cresset, &rate, 0, goal, &theirs(&rate, 0));
            let figures = [("p50_us", "  p50, µs"), ("p99_us", "  p99, µs"), ("cpu_us", "  CPU of all three, µs")];
            for (figure, words) in figures {
                let name = format!("{figure}_at_{writers}");
                rows.row(words, &self.cresset, &name, 0, Goal::None, &theirs(&name, 0));
            }
        }
        let kills = self.cresset.rounds("outage_ms").len();
        let words = format!("without a leader, {kills} kills, ms");
        rows.row(&words, &self.cresset, "outage_ms", 0, Goal::Most(OUTAGE_MEDIAN_MS), &theirs("outage_ms", 0));
        let longest = |part: &Part| {
            let mut longest = Part::default();
            part.spread("outage_ms").into_iter().for_each(|(_, max)| longest.add("outage_max_ms", max));
            longest
        };
        let reference =
            self.etcd.as_ref().map_or_else(String::new, |part| format!("etcd {}", word(&longest(part), "outage_max_ms", 0)));
        rows.row("  longest, ms", &longest(&self.cresset), "outage_max_ms", 0, Goal::Most(OUTAGE_MAX_MS), &reference);
        let Machine { cores, cpu, date, load_before, .. } = &self.machine;
        let etcd = self.etcd_version.as_deref().unwrap_or("not installed");
        format!("{cpu}, {cores} cores, {date}, load before {load_before}; etcd {etcd}\n\n{rows}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_stand_beside_etcds_and_what_is_missed_is_told() {
        let mut report = Report::new(Machine::ask(2), Pace::QUICK);
        let mut etcd = Part::default();
        report.cresset.add("commands_per_second_at_16", 900.0);
        etcd.add("commands_per_second_at_16", 1_000.0);
        for outage_ms in [400.0, 500.0, 3_000.0] {
            report.cresset.add("outage_ms", outage_ms);
            etcd.add("outage_ms", outage_ms * 2.0);
        }
        report.etcd = Some(etcd);
        let table = report.table();
        let line = |words: &str| table.lines().find(|line| line.contains(words)).unwrap().to_owned();
        assert!(line("16 writers").contains("≥ 1000  missed") && line("16 writers").contains("etcd 1000"), "{table}");
        assert!(line("3 kills").contains("≤ 1000 ") && line("3 kills").contains("etcd 1000"), "{table}");
        assert!(line("longest").contains("≤ 2500  missed") && line("longest").contains("etcd 6000"), "{table}");
        let json = report.to_json();
        assert_eq!((&json["cresset"]["outage_max_ms"], &json["etcd"]["kills"]), (&json!(3_000.0), &json!(3)));
        report.etcd = None;
        assert!(report.table().contains("no etcd here") && report.to_json()["etcd"].is_null());
    }
}
