//! Every response against a run without faults. Pure.
//!
//! A caller of the Rust client is promised that no fault of a single process shows. A caller with a list of coordinators
//! is promised less: what it has open at a coordinator that is hit ends with an error, and goes on at another address, unless
//! it does what a client has to whose streams outlive coordinators; then it is promised as much as the Rust client. So a
//! pass may break where its own coordinator was hit, while it was hit and until shortly after; and anybody's may while every
//! process is down. Such a pass counts as *moved*, its unanswered requests as *interrupted* (the lane asks again). Any other
//! break is a failure, and so is one request less, more, later or different.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{
    faults::Class,
    models::Kind,
    record::{Happened, Lane, Pass, Way},
};
use crate::{reference::difference, tally::DIFFERENCE_MAX};

/// How late a response may be before it counts as late.
pub const LATE_US: u64 = 5_000_000;
/// How long after its coordinator is whole again a caller may still find out that its connection had ended.
const GRACE_US: u64 = 2_000_000;
/// Words about what was wrong that are kept.
const FINDINGS_MAX: usize = 40;

/// Outputs without faults: by kind and script, for each request its responses.
pub type Reference = BTreeMap<(Kind, usize), Vec<Vec<Bytes>>>;

/// The count.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counts {
    /// Requests that were handed over.
    pub requests: u64,
    /// Of these, how many got every response, whatever it said.
    pub answered: u64,
    /// Passes that broke though nothing allowed them to, and requests that were given up.
    pub failed: u64,
    /// Requests that lack a response, in a pass that had no right to break.
    pub lost: u64,
    /// Responses beyond those that a request has, and to requests that nobody made.
    pub repeated: u64,
    /// Responses that came after a later one.
    pub reordered: u64,
    /// Responses with another content.
    pub wrong: u64,
    /// Responses that took longer than [`LATE_US`].
    pub late: u64,
    /// Passes that broke with the coordinator that they were open at, or while every process was down.
    pub moved: u64,
    /// Requests that these left unanswered; the lanes asked again.
    pub interrupted: u64,
    /// The largest difference from the reference.
    pub largest_difference: f32,
    /// What was wrong, in words; the first of them.
    pub findings: Vec<String>,
}

impl Counts {
    /// Whether nothing was wrong.
    pub fn is_clean(&self) -> bool {
        [self.failed, self.lost, self.repeated, self.reordered, self.wrong, self.late].iter().all(|count| *count == 0)
    }

    /// Two counts as one.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        let pairs = [
            (&mut self.requests, other.requests),
            (&mut self.answered, other.answered),
            (&mut self.failed, other.failed),
            (&mut self.lost, other.lost),
            (&mut self.repeated, other.repeated),
            (&mut self.reordered, other.reordered),
            (&mut self.wrong, other.wrong),
            (&mut self.late, other.late),
            (&mut self.moved, other.moved),
            (&mut self.interrupted, other.interrupted),
        ];
        for (sum, more) in pairs {
            *sum += more;
        }
        self.largest_difference = self.largest_difference.max(other.largest_difference);
        let room = FINDINGS_MAX.saturating_sub(self.findings.len());
        self.findings.extend(other.findings.iter().take(room).cloned());
        self
    }

    fn find(&mut self, finding: impl FnOnce() -> String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding());
        }
    }
}

/// Counts one lane. `coordinator` names the coordinator at an address.
pub fn check(lane: &Lane, reference: &Reference, happened: &[Happened], coordinator: &BTreeMap<String, String>) -> Counts {
    let mut counts = Counts::default();
    let nothing = Vec::new();
    let expected = reference.get(&(lane.kind, lane.script)).unwrap_or(&nothing);
    for (number, pass) in lane.passes.iter().enumerate() {
        let name = format!("{} by {} #{number}", lane.kind.name(), lane.way.name());
        let id = pass.address.as_ref().and_then(|address| coordinator.get(address));
        let hit = |at_us: u64| may_break(lane.way, id.map(String::as_str), at_us, happened);
        PassCheck { kind: lane.kind, name: &name, pass, expected, counts: &mut counts }.run(&hit);
    }
    counts
}

/// Whether a pass may end at this moment: its own coordinator is hit, or nobody is left.
fn may_break(way: Way, coordinator: Option<&str>, at_us: u64, happened: &[Happened]) -> bool {
    happened.iter().any(|fault| {
        let own = way.may_move() && fault.targets.iter().any(|target| Some(target.as_str()) == coordinator);
        let concerned = own || fault.fault.class() == Class::Everything;
        concerned && (fault.begun_us..=fault.whole_us.saturating_add(GRACE_US)).contains(&at_us)
    })
}

struct PassCheck<'a> {
    kind: Kind,
    name: &'a str,
    pass: &'a Pass,
    expected: &'a [Vec<Bytes>],
    counts: &'a mut Counts,
}

impl PassCheck<'_> {
    fn run(&mut self, hit: &dyn Fn(u64) -> bool) {
        let pass = self.pass;
        let excused = pass.broken.as_ref().is_some_and(|broken| hit(broken.at_us));
        let got = self.responses(hit);
        self.counts.requests += pass.sent.len() as u64;
        let whole = got.iter().filter(|count| **count >= self.kind.parts()).count() as u64;
        let missing = pass.sent.len() as u64 - whole;
        self.counts.answered += whole;
        match &pass.broken {
            Some(broken) if excused && !broken.gave_up => {
                self.counts.moved += 1;
                self.counts.interrupted += missing;
            }
            Some(broken) => {
                self.counts.failed += 1;
                self.counts.lost += missing;
                let name = self.name;
                self.counts.find(|| {
                    let at = pass.address.as_ref().map_or(String::new(), |address| format!(" at {address}"));
                    let moment = broken.at_us as f64 / 1e6;
                    format!("{name}{at} broke at {moment:.3} s, {missing} unanswered: {}: {}", broken.code, broken.message)
                });
            }
            None => {
                self.counts.lost += missing;
                if missing > 0 {
                    let (name, begun) = (self.name, pass.sent.first().map_or(0.0, |at| *at as f64 / 1e6));
                    self.counts.find(|| format!("{name}, begun at {begun:.3} s, ended and left {missing} unanswered"));
                }
            }
        }
    }

    /// Looks at each response; says how many each request got.
    fn responses(&mut self, hit: &dyn Fn(u64) -> bool) -> Vec<usize> {
        let mut got = vec![0; self.pass.sent.len()];
        let mut latest = 0;
        for response in &self.pass.delivered {
            let at_s = response.at_us as f64 / 1e6;
            let Some((ordinal, sent_us)) =
                response.ordinal.and_then(|ordinal| self.pass.sent.get(ordinal).map(|sent| (ordinal, *sent)))
            else {
                self.counts.repeated += 1;
                let name = self.name;
                self.counts.find(|| format!("{name} got a response that nobody asked for at {at_s:.3} s"));
                continue;
            };
            let part = got[ordinal];
            got[ordinal] += 1;
            if part >= self.kind.parts() {
                self.counts.repeated += 1;
                let name = self.name;
                self.counts.find(|| format!("{name} got one response more to its request {ordinal} at {at_s:.3} s"));
                continue;
            }
            // Responses of decoupled models may interleave; `part` tells the order of each request's own.
            if self.kind != Kind::Decoupled && ordinal < latest {
                self.counts.reordered += 1;
                let name = self.name;
                self.counts.find(|| format!("{name} got the answer to request {ordinal} after that to {latest} at {at_s:.3} s"));
            }
            latest = latest.max(ordinal);
            self.compare(ordinal, part, &response.output, at_s);
            let took_us = response.at_us.saturating_sub(sent_us);
            if took_us > LATE_US && !hit(response.at_us) {
                self.counts.late += 1;
                let name = self.name;
                self.counts
                    .find(|| format!("{name} waited {:.3} s for request {ordinal}, until {at_s:.3} s", took_us as f64 / 1e6));
            }
        }
        got
    }

    fn compare(&mut self, ordinal: usize, part: usize, output: &Bytes, at_s: f64) {
        let place = (self.pass.first + ordinal) % self.expected.len().max(1);
        let Some(parts) = self.expected.get(place) else { return self.differs(ordinal, f32::INFINITY, at_s) };
        let apart = parts.get(part).map_or(f32::INFINITY, |expected| difference(output, expected));
        if apart <= DIFFERENCE_MAX {
            self.counts.largest_difference = self.counts.largest_difference.max(apart);
        } else if parts.iter().any(|other| difference(output, other) <= DIFFERENCE_MAX) {
            // One of the request's own responses, in another one's place.
            self.counts.reordered += 1;
            let name = self.name;
            self.counts.find(|| format!("{name} got the responses to request {ordinal} out of order at {at_s:.3} s"));
        } else {
            self.differs(ordinal, apart, at_s);
        }
    }

    fn differs(&mut self, ordinal: usize, apart: f32, at_s: f64) {
        self.counts.largest_difference = self.counts.largest_difference.max(apart);
        self.counts.wrong += 1;
        let name = self.name;
        self.counts.find(|| format!("{name}: the answer to request {ordinal} at {at_s:.3} s differs by {apart:e}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        chaos::{
            faults::Fault,
            record::{Break, Delivered},
        },
        reference::bytes_of,
    };

    fn value(request: usize, part: usize) -> Bytes {
        bytes_of(&[(request * 100 + part) as f32])
    }

    /// A pass of this many requests, with these responses: (request, value's request, value's part).
    fn pass(sent: usize, delivered: &[(usize, usize, usize)]) -> Pass {
        let response = |(number, &(ordinal, request, part)): (usize, &(usize, usize, usize))| Delivered {
            ordinal: Some(ordinal),
            at_us: 1_000_000 + number as u64,
            output: value(request, part),
        };
        Pass {
            address: Some("a".into()),
            sent: vec![1_000_000; sent],
            delivered: delivered.iter().enumerate().map(response).collect(),
            ..Pass::default()
        }
    }

    fn count(kind: Kind, way: Way, pass: Pass, happened: &[Happened]) -> Counts {
        let reference = [((kind, 0), (0..10).map(|at| (0..kind.parts()).map(|part| value(at, part)).collect()).collect())];
        let lane = Lane { kind, way, script: 0, interval_us: 1, passes: vec![pass] };
        check(&lane, &reference.into(), happened, &[("a".to_owned(), "c1".to_owned())].into())
    }

    fn stream(pass: Pass) -> Counts {
        count(Kind::Independent, Way::Plain, pass, &[])
    }

    fn fault(fault: Fault, targets: &[&str], begun_us: u64, whole_us: u64) -> Happened {
        let targets = targets.iter().map(ToString::to_string).collect();
        Happened { fault, targets, begun_us, undone_us: begun_us, whole_us }
    }

    fn broken(sent: usize, delivered: &[(usize, usize, usize)], at_us: u64) -> Pass {
        let broken = Some(Break { at_us, code: "Unavailable".into(), message: "gone".into(), gave_up: false });
        Pass { broken, ..pass(sent, delivered) }
    }

    #[test]
    fn a_pass_as_in_the_reference_is_clean_also_around_the_scripts_end() {
        let counts = stream(pass(3, &[(0, 0, 0), (1, 1, 0), (2, 2, 0)]));
        assert!(counts.is_clean() && counts.findings.is_empty(), "{counts:?}");
        assert_eq!((counts.requests, counts.answered), (3, 3));
        let around = Pass { first: 9, ..pass(2, &[(0, 9, 0), (1, 0, 0)]) };
        assert!(stream(around).is_clean());
    }

    #[test]
    fn each_fault_is_counted_by_its_name() {
        let faults = |pass| {
            let counts = stream(pass);
            assert!(!counts.is_clean() && !counts.findings.is_empty());
            [counts.lost, counts.repeated, counts.reordered, counts.wrong, counts.late, counts.failed]
        };
        assert_eq!(faults(pass(2, &[(0, 0, 0)])), [1, 0, 0, 0, 0, 0]);
        assert_eq!(faults(pass(2, &[(0, 0, 0), (1, 1, 0), (1, 1, 0)])), [0, 1, 0, 0, 0, 0]);
        assert_eq!(faults(pass(2, &[(1, 1, 0), (0, 0, 0)])), [0, 0, 1, 0, 0, 0]);
        assert_eq!(faults(pass(2, &[(0, 1, 0), (1, 1, 0)])), [0, 0, 0, 1, 0, 0]);
        let mut stranger = pass(1, &[(0, 0, 0), (0, 0, 0)]);
        stranger.delivered[1].ordinal = None;
        assert_eq!(faults(stranger), [0, 1, 0, 0, 0, 0]);
        let mut late = pass(1, &[(0, 0, 0)]);
        late.delivered[0].at_us += LATE_US + 1;
        assert_eq!(faults(late), [0, 0, 0, 0, 1, 0]);
        assert_eq!(faults(broken(2, &[(0, 0, 0)], 2_000_000)), [1, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn responses_of_a_decoupled_model_have_their_order_within_each_request() {
        let parts = Kind::Decoupled.parts();
        let count = |delivered: &[(usize, usize, usize)]| count(Kind::Decoupled, Way::Plain, pass(2, delivered), &[]);
        let mut interleaved: Vec<_> = (0..parts).flat_map(|part| [(1, 1, part), (0, 0, part)]).collect();
        assert!(count(&interleaved).is_clean());
        interleaved.swap(0, 2);
        assert_eq!(count(&interleaved).reordered, 2);
        interleaved.swap(0, 2);
        interleaved.pop();
        assert_eq!((count(&interleaved).lost, count(&interleaved).answered), (1, 1));
    }

    #[test]
    fn a_pass_may_break_only_with_its_own_coordinator_and_while_that_is_hit() {
        let judge = |way, happened: &[Happened], at_us| {
            let counts = count(Kind::Speech, way, broken(2, &[(0, 0, 0)], at_us), happened);
            assert_eq!(counts.moved + counts.failed, 1);
            assert_eq!(counts.is_clean(), counts.interrupted == 1);
            counts.is_clean()
        };
        let own = [fault(Fault::KillLeader, &["c1"], 1_500_000, 3_000_000)];
        assert!(judge(Way::Plain, &own, 1_600_000));
        assert!(judge(Way::Triton, &own, 3_000_000 + GRACE_US), "found out at its next request");
        assert!(!judge(Way::Plain, &own, 3_000_001 + GRACE_US), "too late to be that");
        assert!(!judge(Way::Plain, &own, 1_400_000), "nothing had happened");
        for way in [Way::Client, Way::Resumed, Way::ResumedTriton] {
            assert!(!judge(way, &own, 1_600_000), "{way:?} doesn't depend on it");
        }
        let other = [fault(Fault::KillLeader, &["c2"], 1_500_000, 3_000_000), fault(Fault::KillWorker, &["w1"], 0, 9_000_000)];
        assert!(!judge(Way::Plain, &other, 1_600_000), "another one was hit");
        let all = [fault(Fault::KillEverything, &["c1", "w1"], 1_500_000, 3_000_000)];
        assert!(judge(Way::Client, &all, 1_600_000));
    }

    #[test]
    fn who_gives_up_has_failed_whatever_happened() {
        let all = [fault(Fault::KillEverything, &["c1"], 0, 9_000_000)];
        let mut pass = broken(1, &[], 2_000_000);
        pass.broken.as_mut().unwrap().gave_up = true;
        let counts = count(Kind::Unary, Way::Client, pass, &all);
        assert_eq!((counts.failed, counts.lost, counts.moved), (1, 1, 0));
    }
}
