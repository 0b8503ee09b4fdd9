//! What a run came to: one table for people, one line for programs.

use std::{collections::BTreeMap, time::Duration};

use comfy_table::{CellAlignment, Table, presets::NOTHING};
use serde_json::{Map, Value, json};

use super::{
    checker::Counts,
    faults::{Class, Fault},
    models::Kind,
    pauses::{self, Pauses},
    record::{Happened, Lane, Way},
};

/// The part of the planned load that has to be answered for a run to count.
const LOAD_MIN: f64 = 0.8;

/// A run that doesn't run for longer than this says so: nobody could answer it in time.
const STANDSTILL_MAX: Duration = Duration::from_secs(1);

/// What a run came to.
#[derive(Debug)]
pub struct Report {
    /// Decided the faults.
    pub seed: u64,
    /// How long it was to take, in s.
    pub seconds: u64,
    /// Whether processes had namespaces of their own.
    pub is_apart: bool,
    /// Faults that weren't even planned, with the reason.
    pub left_out: Vec<(Fault, String)>,
    /// Faults that were planned.
    pub planned: usize,
    /// Faults that were done.
    pub happened: Vec<Happened>,
    /// What was counted, by kind and way.
    pub counts: BTreeMap<(Kind, Way), Counts>,
    /// Requests that were to be answered.
    pub load_planned: f64,
    /// Pauses of those that were affected, by class of fault.
    pub pauses: BTreeMap<&'static str, Pauses>,
    /// The longest time in which this process itself didn't run.
    pub stood_still: Duration,
    /// Why the run ended before its schedule did.
    pub cut_short: Option<String>,
}

/// The classes of faults with their names in the report.
const CLASSES: [(&str, Class); 2] = [("kill", Class::WorkerKill), ("gray", Class::WorkerGray)];

/// The pauses of every class.
pub fn pauses(lanes: &[Lane], happened: &[Happened], coordinator: &BTreeMap<String, String>) -> BTreeMap<&'static str, Pauses> {
    let of = |class, counts: fn(Way) -> bool| {
        pauses::of_class(lanes.iter().filter(|lane| counts(lane.way)), happened, class, coordinator)
    };
    let mut all: BTreeMap<_, _> = CLASSES.into_iter().map(|(name, class)| (name, of(class, |_| true))).collect();
    // Whoever is at a coordinator and goes on at another waits for that, each as long as its own client takes to notice.
    all.insert("coordinator", of(Class::Coordinator, |way| !way.resumes()));
    all.insert("resume", of(Class::Coordinator, |way| way == Way::Resumed));
    all.insert("resume tritonclient", of(Class::Coordinator, |way| way == Way::ResumedTriton));
    all
}

/// How many requests lanes at their pace ask for until `end_us`, without the time in which every process was down.
pub fn planned_load(lanes: &[Lane], happened: &[Happened], end_us: u64) -> f64 {
    let outages = happened.iter().filter(|fault| fault.fault.class() == Class::Everything);
    let down_us: u64 = outages.map(|fault| fault.whole_us.min(end_us) - fault.begun_us).sum();
    lanes.iter().map(|lane| end_us.saturating_sub(down_us) as f64 / lane.interval_us.max(1) as f64).sum()
}

impl Report {
    /// All counts together.
    pub fn total(&self) -> Counts {
        self.counts.values().fold(Counts::default(), Counts::and)
    }

    /// Whether nothing was wrong, and it was run as planned.
    pub fn is_good(&self) -> bool {
        self.cut_short.is_none() && self.total().is_clean() && self.has_load() && self.happened.len() == self.planned
    }

    fn has_load(&self) -> bool {
        self.total().answered as f64 >= self.load_planned * LOAD_MIN
    }

    /// The table, and what there is to say beside it.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.table());
        let place = if self.is_apart { "network namespaces on a bridge" } else { "the loopback interface" };
        text += &format!("{} of {} faults, on {place}: {}\n", self.happened.len(), self.planned, self.by_fault());
        for (fault, why) in &self.left_out {
            text += &format!("left out: {}: {why}\n", fault.name());
        }
        for (name, pauses) in &self.pauses {
            let [p50, p99, max] = [0.5, 0.99, 1.0].map(|part| pauses.quantile_ms(part));
            let count = pauses.len();
            let worst = pauses.worst();
            text += &format!("pauses, {name}: {count}, p50 {p50:.0} ms, p99 {p99:.0} ms, max {max:.0} ms: {worst}\n");
        }
        let total = self.total();
        for finding in &total.findings {
            text += &format!("found: {finding}\n");
        }
        if self.stood_still > STANDSTILL_MAX {
            let seconds = self.stood_still.as_secs_f64();
            text += &format!("this run itself stood still for {seconds:.1} s: what was found may be of that\n");
        }
        if !self.has_load() {
            text += &format!("too little load: {} of {:.0} requests were answered\n", total.answered, self.load_planned);
        }
        if let Some(why) = &self.cut_short {
            text += &format!("cut short: {why}\n");
        }
        if !self.is_good() {
            text += &format!("again with: make chaos SECONDS={} SEED={}\n", self.seconds, self.seed);
        }
        text
    }

    fn table(&self) -> String {
        let mut table = Table::new();
        table.load_preset(NOTHING);
        let names =
            ["", "requests", "answered", "failed", "lost", "repeated", "reordered", "wrong", "late", "moved", "interrupted"];
        table.set_header(names);
        let mut row = |name: String, counts: &Counts| {
            let Counts { requests, answered, failed, lost, repeated, reordered, wrong, late, moved, interrupted, .. } = counts;
            let cells = [requests, answered, failed, lost, repeated, reordered, wrong, late, moved, interrupted];
            table.add_row(std::iter::once(name).chain(cells.map(u64::to_string)));
        };
        for ((kind, way), counts) in &self.counts {
            row(format!("{} by {}", kind.name(), way.name()), counts);
        }
        row("together".to_owned(), &self.total());
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.trim_fmt()
    }

    fn by_fault(&self) -> String {
        let mut counts: BTreeMap<Fault, usize> = BTreeMap::new();
        for fault in &self.happened {
            *counts.entry(fault.fault).or_default() += 1;
        }
        counts.iter().map(|(fault, count)| format!("{count} {}", fault.name())).collect::<Vec<_>>().join(", ")
    }

    /// The last line.
    pub fn json(&self) -> Value {
        let total = self.total();
        let tenth = |ms: f64| (ms * 10.0).round() / 10.0;
        let pause = |name: &str, part| tenth(self.pauses.get(name).map_or(0.0, |pauses| pauses.quantile_ms(part)));
        let affected = |name: &str| self.pauses.get(name).map_or(0, Pauses::len);
        let mut by_fault: Map<String, Value> = Map::new();
        for fault in &self.happened {
            let count = by_fault.get(fault.fault.name()).and_then(Value::as_u64).unwrap_or(0) + 1;
            by_fault.insert(fault.fault.name().to_owned(), count.into());
        }
        json!({
            "seed": self.seed,
            "seconds": self.seconds,
            "faults": self.happened.len(),
            "faults_planned": self.planned,
            "by_fault": by_fault,
            "left_out": self.left_out.iter().map(|(fault, _)| fault.name()).collect::<Vec<_>>(),
            "namespaces": self.is_apart,
            "requests": total.requests,
            "requests_planned": self.load_planned.round(),
            "answered": total.answered,
            "failed": total.failed,
            "lost": total.lost,
            "repeated": total.repeated,
            "reordered": total.reordered,
            "wrong": total.wrong,
            "late": total.late,
            "moved": total.moved,
            "interrupted": total.interrupted,
            "largest_difference": total.largest_difference,
            "kill_affected": affected("kill"),
            "kill_pause_p50_ms": pause("kill", 0.5),
            "kill_pause_p99_ms": pause("kill", 0.99),
            "gray_affected": affected("gray"),
            "gray_pause_p50_ms": pause("gray", 0.5),
            "gray_pause_p99_ms": pause("gray", 0.99),
            "coordinator_affected": affected("coordinator"),
            "resume_affected": affected("resume"),
            "resume_pause_p50_ms": pause("resume", 0.5),
            "resume_pause_p99_ms": pause("resume", 0.99),
            "resume_tritonclient_pause_p50_ms": pause("resume tritonclient", 0.5),
            "resume_tritonclient_pause_p99_ms": pause("resume tritonclient", 0.99),
            "coordinator_pause_p99_ms": pause("coordinator", 0.99),
            "stood_still_ms": self.stood_still.as_secs_f64() * 1e3,
            "good": self.is_good(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(counts: Counts, load_planned: f64) -> Report {
        let fault = Happened { fault: Fault::KillWorker, targets: vec!["w1".into()], begun_us: 0, undone_us: 1, whole_us: 2 };
        Report {
            seed: 7,
            seconds: 60,
            is_apart: true,
            left_out: vec![],
            planned: 1,
            happened: vec![fault],
            counts: [((Kind::Unary, Way::Plain), counts)].into(),
            load_planned,
            pauses: BTreeMap::new(),
            stood_still: Duration::ZERO,
            cut_short: None,
        }
    }

    #[test]
    fn a_run_is_good_only_if_nothing_was_wrong_and_it_was_run_as_planned() {
        let clean = Counts { requests: 90, answered: 90, ..Counts::default() };
        let good = report(clean.clone(), 100.0);
        assert!(good.is_good() && good.json()["good"] == true, "{}", good.text());
        for spoilt in [
            report(clean.clone(), 120.0),
            report(Counts { lost: 1, ..clean.clone() }, 100.0),
            report(Counts { failed: 1, ..clean.clone() }, 100.0),
            report(Counts { late: 1, ..clean.clone() }, 100.0),
            Report { planned: 2, ..report(clean.clone(), 100.0) },
            Report { cut_short: Some("no leader".into()), ..report(clean.clone(), 100.0) },
        ] {
            assert!(!spoilt.is_good(), "{}", spoilt.text());
            assert!(spoilt.text().ends_with("again with: make chaos SECONDS=60 SEED=7\n"));
        }
    }

    #[test]
    fn the_last_line_has_what_the_issue_asks_for() {
        let json = report(Counts::default(), 0.0).json();
        for key in ["seed", "faults", "requests", "failed", "lost", "repeated", "reordered", "wrong"] {
            assert!(json[key].is_u64(), "{key} in {json}");
        }
        for key in ["kill_pause_p50_ms", "kill_pause_p99_ms", "gray_pause_p99_ms"] {
            assert!(json[key].is_f64(), "{key} in {json}");
        }
    }

    #[test]
    fn nobody_plans_to_be_answered_while_nobody_lives() {
        let lane = Lane { kind: Kind::Unary, way: Way::Client, script: 0, interval_us: 10_000, passes: vec![] };
        let outage =
            Happened { fault: Fault::KillEverything, targets: vec![], begun_us: 1_000_000, undone_us: 0, whole_us: 3_000_000 };
        assert_eq!(planned_load(&[lane], &[outage], 10_000_000), 800.0);
    }
}
