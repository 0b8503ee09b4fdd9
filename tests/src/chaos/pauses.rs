//! How long each fault held each lane up. Pure.
//!
//! A pause is the silence of a stream from one response to the next, without its steady interval; of a lane of single calls,
//! the time that a call took, without the middle of what calls take. A lane is *affected* by a fault when its longest pause in
//! that time is far longer than nearly all of its pauses in the calm before the first fault: a client doesn't know who answers
//! it, so that is how it is told from one that nothing happened to. What is open at a coordinator that is hit itself isn't counted:
//! that it ends is what was promised, and how soon its caller notices is the caller's own doing.

use std::collections::BTreeMap;

use super::{
    faults::{CALM_MS, Class},
    models::Kind,
    record::{Happened, Lane, Pass},
};
use crate::tally::median;

/// A pause shorter than this is none: a machine that does other things too has as much.
const NOISE_US_MIN: u64 = 5_000;
/// How many times longer than 95% of the pauses in the calm one has to be.
const TIMES_NOISE: u64 = 3;
/// The beginning of the calm, in which connections are made.
const SETTLED_US: u64 = 1_500_000;
/// What belongs to a fault that is over, since what was begun in it may end after it.
const AFTERMATH_US: u64 = 500_000;

/// From when to when nothing came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Silence {
    from_us: u64,
    to_us: u64,
    /// What of it is pause.
    pause_us: u64,
    /// The pass that it is in.
    pass: usize,
}

/// The pauses that faults of one class made, in µs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pauses {
    sorted_us: Vec<u64>,
    /// The longest of them: whose, and by what.
    worst: Option<String>,
}

impl Pauses {
    fn new(mut pauses: Vec<(u64, &Lane, &Happened)>) -> Self {
        pauses.sort_unstable_by_key(|(us, ..)| *us);
        let worst = pauses.last().map(|(_, lane, fault)| {
            let at_s = fault.begun_us as f64 / 1e6;
            let (kind, way, name) = (lane.kind.name(), lane.way.name(), fault.fault.name());
            format!("{kind} by {way}, when {name} was done to {} at {at_s:.3} s", fault.targets.join(" "))
        });
        Self { sorted_us: pauses.into_iter().map(|(us, ..)| us).collect(), worst }
    }

    /// The longest of them: whose, and by what.
    pub fn worst(&self) -> &str {
        self.worst.as_deref().unwrap_or("nobody")
    }

    /// How many there were: lanes that a fault affected, over all faults.
    pub fn len(&self) -> usize {
        self.sorted_us.len()
    }

    /// Whether nothing was affected.
    pub fn is_empty(&self) -> bool {
        self.sorted_us.is_empty()
    }

    /// The smallest pause that this part of all isn't longer than, in ms; 0 of none.
    pub fn quantile_ms(&self, part: f64) -> f64 {
        self.quantile_us(part) as f64 / 1e3
    }

    fn quantile_us(&self, part: f64) -> u64 {
        let rank = (part * self.sorted_us.len() as f64).ceil() as usize;
        self.sorted_us.get(rank.max(1) - 1).or(self.sorted_us.last()).copied().unwrap_or(0)
    }
}

/// The pauses of all lanes that faults of a class affected.
pub fn of_class<'a>(
    lanes: impl IntoIterator<Item = &'a Lane>,
    happened: &[Happened],
    class: Class,
    coordinator: &BTreeMap<String, String>,
) -> Pauses {
    let faults: Vec<_> = happened.iter().filter(|fault| fault.fault.class() == class).collect();
    let mut pauses = Vec::new();
    for lane in lanes {
        let silences = silences(lane);
        let calm = silences.iter().filter(|silence| silence.from_us >= SETTLED_US && silence.to_us <= CALM_MS * 1_000);
        let calm = Pauses { sorted_us: sorted(calm.map(|silence| silence.pause_us)), worst: None };
        let noise_us = (calm.quantile_us(0.95) * TIMES_NOISE).max(NOISE_US_MIN);
        for fault in &faults {
            let until_us = fault.whole_us.saturating_add(AFTERMATH_US);
            let hit = |pass: usize| {
                let id = lane.passes.get(pass).and_then(|pass| coordinator.get(pass.address.as_ref()?));
                id.is_some_and(|id| fault.targets.contains(id))
            };
            let touched = silences.iter().filter(|silence| silence.to_us >= fault.begun_us && silence.from_us <= until_us);
            let touched = touched.filter(|silence| !hit(silence.pass));
            let longest_us = touched.map(|silence| silence.pause_us).max().unwrap_or(0);
            if longest_us > noise_us {
                pauses.push((longest_us, lane, *fault));
            }
        }
    }
    Pauses::new(pauses)
}

fn sorted(values: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values
}

fn silences(lane: &Lane) -> Vec<Silence> {
    if lane.kind == Kind::Unary {
        let mut silences: Vec<_> = lane.passes.iter().enumerate().filter_map(call).collect();
        let usual_us = median(silences.iter().map(|silence| silence.pause_us).collect());
        for silence in &mut silences {
            silence.pause_us = silence.pause_us.saturating_sub(usual_us);
        }
        return silences;
    }
    let gaps = |(number, pass): (usize, &Pass)| {
        let times: Vec<_> = pass.delivered.iter().map(|response| response.at_us).collect();
        let gap = |pair: &[u64]| Silence {
            from_us: pair[0],
            to_us: pair[1],
            pause_us: pair[1].saturating_sub(pair[0]).saturating_sub(lane.interval_us),
            pass: number,
        };
        times.windows(2).map(gap).collect::<Vec<_>>()
    };
    lane.passes.iter().enumerate().flat_map(gaps).collect()
}

/// A call that was answered.
fn call((number, pass): (usize, &Pass)) -> Option<Silence> {
    let (from_us, to_us) = (*pass.sent.first()?, pass.delivered.first()?.at_us);
    Some(Silence { from_us, to_us, pause_us: to_us.saturating_sub(from_us), pass: number })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::chaos::{
        faults::Fault,
        record::{Delivered, Way},
    };

    fn pass(sent: &[u64], delivered: &[u64]) -> Pass {
        let response =
            |(ordinal, at_us): (usize, &u64)| Delivered { ordinal: Some(ordinal), at_us: *at_us, output: Bytes::new() };
        Pass { sent: sent.to_vec(), delivered: delivered.iter().enumerate().map(response).collect(), ..Pass::default() }
    }

    fn lane(kind: Kind, passes: Vec<Pass>) -> Lane {
        Lane { kind, way: Way::Client, script: 0, interval_us: 10_000, passes }
    }

    fn of_kills(lanes: &[Lane], fault: Happened) -> Pauses {
        of_class(lanes, &[fault], Class::WorkerKill, &BTreeMap::new())
    }

    fn kill(begun_us: u64) -> Happened {
        let whole_us = begun_us + 1_000_000;
        Happened { fault: Fault::KillWorker, targets: vec![], begun_us, undone_us: begun_us, whole_us }
    }

    #[test]
    fn the_pause_of_a_stream_is_its_silence_without_its_interval() {
        let times = [6_000_000, 6_010_000, 6_020_000, 6_120_000, 6_130_000];
        let lanes = [lane(Kind::Speech, vec![pass(&times, &times)])];
        let pauses = of_kills(&lanes, kill(6_025_000));
        assert_eq!((pauses.len(), pauses.quantile_ms(0.5)), (1, 90.0));
        assert!(of_class(&lanes, &[kill(6_025_000)], Class::WorkerGray, &BTreeMap::new()).is_empty(), "another class of faults");
        assert!(of_kills(&lanes, kill(8_000_000)).is_empty(), "before the fault");
    }

    #[test]
    fn what_a_lane_has_in_the_calm_too_is_no_pause() {
        let calm: Vec<_> = (0..10).map(|n| 2_000_000 + n * 110_000).collect();
        let count = |pause_us: u64| {
            let later = [6_000_000, 6_010_000 + pause_us];
            of_kills(&[lane(Kind::Speech, vec![pass(&calm, &calm), pass(&later, &later)])], kill(6_005_000)).len()
        };
        assert_eq!((count(300_000), count(300_001)), (0, 1), "three times as long as usual, and longer");
    }

    #[test]
    fn a_call_pauses_for_what_it_takes_longer_than_others() {
        let mut calls: Vec<_> = (0..9).map(|n| pass(&[n * 100_000], &[n * 100_000 + 2_000])).collect();
        calls.push(pass(&[6_000_000], &[6_052_000]));
        calls.push(pass(&[6_000_000], &[]));
        let pauses = of_kills(&[lane(Kind::Unary, calls)], kill(6_010_000));
        assert_eq!((pauses.len(), pauses.quantile_ms(0.99)), (1, 50.0));
    }

    #[test]
    fn a_stream_that_is_open_at_the_one_that_is_hit_isnt_counted() {
        let times = [6_000_000, 6_500_000];
        let own = Pass { address: Some("a".into()), ..pass(&times, &times) };
        let fault = Happened { fault: Fault::StopLeader, targets: vec!["c1".into()], ..kill(6_100_000) };
        let coordinators = |id: &str| [("a".to_owned(), id.to_owned())].into();
        let lanes = [lane(Kind::Speech, vec![own])];
        let count = |id| of_class(&lanes, std::slice::from_ref(&fault), Class::Coordinator, &coordinators(id)).len();
        assert_eq!((count("c1"), count("c2")), (0, 1));
    }

    #[test]
    fn quantiles_are_of_what_was_seen() {
        let (lane, fault) = (lane(Kind::Unary, vec![]), kill(1_000_000));
        let pauses = Pauses::new((1..=200).rev().map(|ms| (ms * 1_000, &lane, &fault)).collect());
        assert_eq!(pauses.worst(), "unary by client, when kill-worker was done to  at 1.000 s");
        assert_eq!((pauses.quantile_ms(0.5), pauses.quantile_ms(0.99), pauses.quantile_ms(1.0)), (100.0, 198.0, 200.0));
        assert_eq!(Pauses::default().quantile_ms(0.99), 0.0);
    }
}
