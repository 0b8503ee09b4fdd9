//! What `cresset up` shows: lines for changes, and on a terminal a compact picture that is repainted in place.
//!
//! [`Narrator`], [`Rates`] and [`picture`] are pure, with time coming in as a value; [`Screen`] alone writes.
use std::{
    collections::{BTreeMap, VecDeque},
    io,
    time::Duration,
};

use console::Term;

use crate::{
    output,
    status::{Model, Replica, Report, Worker, replica_words},
};

/// Turns one status after the other into lines about what changed.
#[derive(Debug, Default)]
pub struct Narrator {
    workers_expected: usize,
    last: Option<Report>,
    loading_since_ms: BTreeMap<(String, u64, u64), u64>,
}

impl Narrator {
    /// For a cluster of that many workers.
    pub fn new(workers_expected: usize) -> Self {
        Self { workers_expected, ..Self::default() }
    }

    /// What changed since the last report.
    pub fn tell(&mut self, report: &Report, now_ms: u64) -> Vec<String> {
        let old = self.last.replace(report.clone());
        let mut lines = Vec::new();
        leader_lines(old.as_ref(), report, &mut lines);
        self.worker_lines(old.as_ref(), report, &mut lines);
        self.model_lines(old.as_ref(), report, now_ms, &mut lines);
        replica_lines(old.as_ref(), report, &mut lines);
        lines
    }

    fn worker_lines(&self, old: Option<&Report>, new: &Report, lines: &mut Vec<String>) {
        // One that is joining is ready before anybody has read of it.
        let is_before = |before: &&Worker, worker: &Worker| before.id == worker.id && before.state != "joining";
        let before_of = |worker: &Worker| old.and_then(|old| old.workers.iter().find(|before| is_before(before, worker)));
        let is_new = |worker: &Worker| before_of(worker).is_none_or(|before| before.incarnation != worker.incarnation);
        let mut ready = new.workers.iter().filter(|worker| worker.state == "ready" && !is_new(worker)).count();
        for worker in &new.workers {
            let before = before_of(worker);
            let is_new_life = is_new(worker);
            ready += usize::from(is_new_life && worker.state == "ready");
            let was = before.map(|before| before.state);
            let expected = self.workers_expected.max(ready);
            match worker.state {
                "ready" if is_new_life => lines.push(format!("{} registered ({ready} of {expected} workers)", worker.id)),
                state if was != Some(state) && state != "joining" && (before.is_some() || !worker.is_over()) => {
                    lines.push(format!("{} is {state}", worker.id))
                }
                _ => {}
            }
        }
    }

    fn model_lines(&mut self, old: Option<&Report>, new: &Report, now_ms: u64, lines: &mut Vec<String>) {
        for model in &new.models {
            let before =
                old.and_then(|old| old.model(&model.name, model.version)).filter(|before| before.generation == model.generation);
            let key = (model.name.clone(), model.version, model.generation);
            if before.is_none() {
                self.loading_since_ms.insert(key.clone(), now_ms);
            }
            let same = |before: &Model| {
                (before.state, &before.reason, before.replicas_ready) == (model.state, &model.reason, model.replicas_ready)
            };
            if before.is_some_and(same) {
                continue;
            }
            let label = format!("model {}/{}", model.name, model.version);
            let replicas = format!("{} of {} replicas ready", model.replicas_ready, model.replicas_wanted);
            let reason = if model.reason.is_empty() { String::new() } else { format!(" ({})", model.reason) };
            lines.push(match model.state {
                "ready" => match self.loading_since_ms.remove(&key) {
                    Some(since) => {
                        let after = output::seconds(Duration::from_millis(now_ms.saturating_sub(since)));
                        format!("{label}: ready in {after} ({replicas})")
                    }
                    None => format!("{label}: ready ({replicas})"),
                },
                "failed" => format!("{label}: failed{reason}"),
                state => format!("{label}: {state}, {replicas}{reason}"),
            });
        }
        for gone in old.into_iter().flat_map(|old| &old.models).filter(|model| new.model(&model.name, model.version).is_none()) {
            lines.push(format!("model {}/{}: undeployed", gone.name, gone.version));
        }
        self.loading_since_ms.retain(|(name, version, generation), _| {
            new.model(name, *version).is_some_and(|model| model.generation == *generation)
        });
    }
}

fn leader_lines(old: Option<&Report>, new: &Report, lines: &mut Vec<String>) {
    let id_and_term = |report: &Report| report.leader().map(|leader| (leader.id.clone(), leader.term));
    let (before, now) = (old.and_then(id_and_term), id_and_term(new));
    match now {
        Some((id, term)) if before.as_ref() != Some(&(id.clone(), term)) => lines.push(format!("{id} leads (term {term})")),
        None if before.is_some() => lines.push("no coordinator leads".to_owned()),
        _ => {}
    }
}

/// Replicas that became ready or failed; what happens in between is for the picture only.
fn replica_lines(old: Option<&Report>, new: &Report, lines: &mut Vec<String>) {
    let states = |report: &Report| -> BTreeMap<(String, u64, String, u64, u32), &'static str> {
        let of_worker = |worker: &Worker| {
            let key = |replica: &Replica| {
                let place = (worker.id.clone(), worker.incarnation, replica.model.clone(), replica.version, replica.shard);
                (place, replica.state)
            };
            worker.replicas.iter().map(key).collect::<Vec<_>>()
        };
        report.workers.iter().flat_map(of_worker).collect()
    };
    let before = old.map(states).unwrap_or_default();
    for worker in &new.workers {
        for replica in worker.replicas.iter().filter(|replica| matches!(replica.state, "ready" | "failed")) {
            let key = (worker.id.clone(), worker.incarnation, replica.model.clone(), replica.version, replica.shard);
            if before.get(&key) != Some(&replica.state) {
                let reason = if replica.reason.is_empty() { String::new() } else { format!(": {}", replica.reason) };
                lines.push(format!("{} on {}{reason}", replica_words(replica), worker.id));
            }
        }
    }
}

/// Requests per second of each worker, from its growing counter.
#[derive(Debug, Default)]
pub struct Rates {
    samples: BTreeMap<(String, u64), VecDeque<(u64, u64)>>,
}

impl Rates {
    const WINDOW_MS: u64 = 2_000;

    /// Notes the counters as they stand now.
    pub fn note(&mut self, report: &Report, now_ms: u64) {
        let key_of = |worker: &Worker| (worker.id.clone(), worker.incarnation);
        self.samples.retain(|key, _| report.workers.iter().any(|worker| key_of(worker) == *key));
        for worker in &report.workers {
            let samples = self.samples.entry(key_of(worker)).or_default();
            // One that answers for another leader may have counted less.
            if samples.back().is_some_and(|(_, total)| *total > worker.requests_total) {
                samples.clear();
            }
            samples.push_back((now_ms, worker.requests_total));
            while samples.len() > 2 && samples.get(1).is_some_and(|(at, _)| now_ms.saturating_sub(*at) >= Self::WINDOW_MS) {
                samples.pop_front();
            }
        }
    }

    /// Requests per second over the last two seconds.
    fn of(&self, id: &str, incarnation: u64) -> f64 {
        let Some(samples) = self.samples.get(&(id.to_owned(), incarnation)) else { return 0.0 };
        let (Some((from, before)), Some((to, after))) = (samples.front(), samples.back()) else { return 0.0 };
        if to > from { (after - before) as f64 * 1000.0 / (to - from) as f64 } else { 0.0 }
    }
}

/// The picture of a running cluster, line by line.
pub fn picture(report: &Report, rates: &Rates) -> Vec<String> {
    let leader = report.leader().map_or("no leader".to_owned(), |leader| format!("{} leads, term {}", leader.id, leader.term));
    let mut lines = vec![format!("{}  {leader}, epoch {}", report.cluster_id, report.epoch)];
    let coordinators = report.coordinators.iter().map(|c| format!("{} {} {}", c.id, c.role, c.address)).collect::<Vec<_>>();
    lines.push(coordinators.join("  "));
    let worker = |worker: &Worker| {
        let replicas: Vec<_> = worker.replicas.iter().map(replica_words).collect();
        vec![
            worker.id.clone(),
            worker.state.to_owned(),
            format!("{:.1}", rates.of(&worker.id, worker.incarnation)),
            worker.requests_in_flight.to_string(),
            worker.sequences_live.to_string(),
            if replicas.is_empty() { "-".to_owned() } else { replicas.join(", ") },
        ]
    };
    let header = ["WORKER", "STATE", "REQ/S", "IN FLIGHT", "SEQUENCES", "REPLICAS"];
    lines.extend(output::table(&header, report.workers.iter().map(worker).collect()).lines().map(str::to_owned));
    if !report.models.is_empty() {
        let model = |model: &Model| {
            let replicas = format!("{}/{}", model.replicas_ready, model.replicas_wanted);
            vec![format!("{}/{}", model.name, model.version), model.state.to_owned(), replicas, model.reason.clone()]
        };
        let header = ["MODEL", "STATE", "REPLICAS", ""];
        lines.extend(output::table(&header, report.models.iter().map(model).collect()).lines().map(str::to_owned));
    }
    lines
}

/// Stderr: lines that stay, and below them the picture where there is a terminal.
pub struct Screen {
    term: Term,
    painted: Vec<String>,
}

impl Screen {
    /// The process's stderr.
    pub fn new() -> Self {
        Self { term: Term::buffered_stderr(), painted: vec![] }
    }

    /// Can it be painted in place?
    pub fn is_live(&self) -> bool {
        self.term.is_term() && !console::Term::features(&self.term).is_msys_tty()
    }

    /// Prints a line that stays.
    pub fn say(&mut self, line: &str) {
        let picture = std::mem::take(&mut self.painted);
        // A terminal that has gone is no reason to end the cluster.
        let written = self.erase(picture.len()).and_then(|()| self.term.write_line(&format!("cresset: {line}")));
        let _ = written.and_then(|()| self.term.flush());
        self.paint(picture);
    }

    /// Paints the picture over the last one.
    pub fn paint(&mut self, picture: Vec<String>) {
        if !self.is_live() {
            return;
        }
        let (height, width) = self.term.size();
        let room = usize::from(height).saturating_sub(1);
        let cut = |line: &String| console::truncate_str(line, usize::from(width), "…").into_owned();
        let lines: Vec<String> = picture.iter().take(room).map(cut).collect();
        let _ = self.erase(self.painted.len()).and_then(|()| {
            lines.iter().try_for_each(|line| self.term.write_line(line))?;
            self.term.flush()
        });
        self.painted = lines;
    }

    /// Takes the picture away, for what else wants to be printed.
    pub fn clear(&mut self) {
        let painted = std::mem::take(&mut self.painted);
        let _ = self.erase(painted.len()).and_then(|()| self.term.flush());
    }

    fn erase(&self, lines: usize) -> io::Result<()> {
        if lines == 0 { Ok(()) } else { self.term.clear_last_lines(lines) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::example;

    #[test]
    fn the_first_report_tells_everything_and_the_same_again_tells_nothing() {
        let report = Report::from(example());
        let mut narrator = Narrator::new(3);
        assert_eq!(
            narrator.tell(&report, 0),
            [
                "c2 leads (term 3)",
                "w1 registered (1 of 3 workers)",
                "model broken/1: failed (model.pt is not an archive)",
                "model vad/1: degraded, 1 of 2 replicas ready (1 of 2 replicas)",
                "vad/1 ready on w1",
                "broken/1 failed on w1: model.pt is not an archive",
            ]
        );
        assert_eq!(narrator.tell(&report, 100), Vec::<String>::new());
    }

    #[test]
    fn changes_are_told_with_how_long_loading_took() {
        let mut report = Report::from(example());
        let mut narrator = Narrator::new(2);
        narrator.tell(&report, 1_000);
        report.models[1].state = "ready";
        report.models[1].reason.clear();
        report.models[1].replicas_ready = 2;
        report.workers[0].state = "dead";
        report.workers[1].state = "ready";
        report.workers[1].incarnation += 1;
        report.coordinators[1].role = "unreachable";
        report.models.remove(0);
        assert_eq!(
            narrator.tell(&report, 4_200),
            [
                "no coordinator leads",
                "w1 is dead",
                "w2 registered (1 of 2 workers)",
                "model vad/1: ready in 3.2 s (2 of 2 replicas ready)",
                "model broken/1: undeployed",
            ]
        );
    }

    #[test]
    fn rates_come_from_the_last_two_seconds_of_one_life() {
        let mut report = Report::from(example());
        let life = report.workers[0].incarnation;
        let mut rates = Rates::default();
        for (now_ms, total) in [(0, 100), (1_000, 150), (2_000, 250), (3_000, 450)] {
            report.workers[0].requests_total = total;
            rates.note(&report, now_ms);
        }
        assert_eq!(rates.of("w1", life), 150.0);
        report.workers[0].requests_total = 10;
        rates.note(&report, 3_500);
        assert_eq!(rates.of("w1", life), 0.0);
        report.workers[0].incarnation += 1;
        rates.note(&report, 4_000);
        assert_eq!(rates.of("w1", life), 0.0);
        assert_eq!(rates.samples.len(), 2);
    }

    #[test]
    fn the_picture_shows_who_leads_and_who_holds_what() {
        let report = Report::from(example());
        let text = picture(&report, &Rates::default()).join("\n");
        let expected = [
            "local-0123abcd  c2 leads, term 3, epoch 12",
            "c1 unreachable 127.0.0.1:8011  c2 leader 127.0.0.1:8021  c10 follower 127.0.0.1:80101",
            "WORKER  STATE  REQ/S  IN FLIGHT  SEQUENCES  REPLICAS",
            "w1      ready  0.0    2          0          vad/1 ready, broken/1 failed",
            "w2      dead   0.0    2          0          -",
            "MODEL     STATE     REPLICAS",
            "broken/1  failed    0/2       model.pt is not an archive",
            "vad/1     degraded  1/2       1 of 2 replicas",
        ];
        assert_eq!(text, expected.join("\n"));
    }
}
