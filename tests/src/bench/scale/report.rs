//! What was measured, as a table, as JSON and as a plot.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::bench::{
    figures::Part,
    plot::{self, Content, Line},
    results::Machine,
    table::{Goal, Rows},
};

/// Each figure: its name, its words, digits, and the most that it may be.
const FIGURES: [(&str, &str, usize, Goal); 9] = [
    ("leader_cores", "leader in calm, cores", 3, Goal::None),
    ("follower_cores", "a follower in calm, cores", 3, Goal::None),
    ("verdict_to_assigned_ms", "verdict to assignments, ms", 1, Goal::Most(100.0)),
    ("death_to_assigned_ms", "  death to assignments, ms", 1, Goal::None),
    ("plan_ms", "a full plan from nothing, ms", 1, Goal::Most(1_000.0)),
    ("apply_plan_ms", "  applying it, ms", 1, Goal::None),
    ("snapshot_mb", "snapshot, MB", 2, Goal::Most(20.0)),
    ("snapshot_load_ms", "  loading it, ms", 1, Goal::Most(1_000.0)),
    ("whole_ms", "start until all workers are told, ms", 0, Goal::None),
];

/// The figures of each size.
#[derive(Debug, Clone)]
pub struct Report {
    machine: Machine,
    /// By workers, ascending.
    pub(super) sizes: Vec<(usize, Part)>,
}

impl Report {
    /// Nothing measured yet.
    pub(super) fn new(machine: Machine) -> Self {
        Self { machine, sizes: vec![] }
    }

    /// Everything, for programs.
    pub fn to_json(&self) -> Value {
        let sizes: Map<_, _> = self.sizes.iter().map(|(workers, part)| (workers.to_string(), part.to_json())).collect();
        json!({"machine": self.machine, "models_per_worker": super::MODELS_PER_WORKER, "workers": sizes})
    }

    /// Each figure of each size.
    pub fn table(&self) -> String {
        let mut rows = Rows::new();
        for (workers, part) in &self.sizes {
            let reference = format!("{workers} workers, {} models", workers * super::MODELS_PER_WORKER);
            for (name, words, digits, goal) in FIGURES {
                rows.row(words, part, name, digits, goal, &reference);
            }
        }
        let Machine { cores, cpu, date, load_before, .. } = &self.machine;
        format!("{cpu}, {cores} cores, {date}, load before {load_before}\n\n{rows}\n")
    }

    /// Draws the figures over the number of workers.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn draw(&self, path: &Path) -> anyhow::Result<()> {
        let places: Vec<String> = self.sizes.iter().map(|(workers, _)| workers.to_string()).collect();
        let line = |(label, name): (&str, &str), colour: usize| {
            let values = self.sizes.iter().filter_map(|(_, part)| part.median(name)).collect();
            Line { label: label.to_owned(), values, colour }
        };
        let panel = |heading: &'static str, lines: &[(&str, &str)]| {
            let lines = lines.iter().zip(1..).map(|(named, colour)| line(*named, colour)).collect();
            (heading, Content::Lines(places.clone(), lines, true))
        };
        let panels = [
            panel("CPU in calm, cores, by workers", &[("leader", "leader_cores"), ("a follower", "follower_cores")]),
            panel(
                "A worker's death until what it had is assigned to others, ms",
                &[("from the verdict", "verdict_to_assigned_ms"), ("from the death", "death_to_assigned_ms")],
            ),
            panel("A full plan from nothing, ms", &[("planning", "plan_ms"), ("applying", "apply_plan_ms")]),
            panel("Snapshot", &[("MB", "snapshot_mb"), ("loading, ms", "snapshot_load_ms")]),
        ];
        let Machine { cores, cpu, date, .. } = &self.machine;
        plot::draw_panels(&format!("{cpu}, {cores} cores, {date}"), &panels, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_stand_below_each_other_and_are_drawn() {
        let mut report = Report::new(Machine::ask(2));
        for (workers, ms) in [(10, 3.0), (100, 200.0)] {
            let mut part = Part::default();
            part.add("verdict_to_assigned_ms", ms);
            part.add("snapshot_mb", ms / 100.0);
            report.sizes.push((workers, part));
        }
        let table = report.table();
        let of = |workers: &str| table.lines().find(|line| line.contains("verdict") && line.contains(workers)).unwrap();
        assert!(of(" 10 workers, 100 models").contains("≤ 100 ") && of("100 workers").contains("missed"), "{table}");
        assert_eq!(report.to_json()["workers"]["100"]["verdict_to_assigned_ms"], json!(200.0));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scale.svg");
        report.draw(&path).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains("from the verdict"));
    }
}
