//! Who should be judged dead: heartbeats in, verdicts out.
//!
//! Runs on the leader only. A verdict here is an opinion; it counts once `MarkDead` is committed, and until then it is
//! repeated now and then. Time comes in as milliseconds of any clock that doesn't jump.
//!
//! Three things are never held against a worker: time before this leader began to listen; time in which the leader itself
//! stood still (a stopped process, a machine that slept); and that it hasn't found a new leader yet while it answers when it is
//! asked, since after an election all the workers of a large cluster come at once.
use std::collections::BTreeMap;

use crate::{ClusterState, WorkerId, command::Cause, state::Incarnation};

/// How long is too long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Silence after which a worker is dead.
    pub timeout_ms: u64,
    /// A verdict that isn't committed is repeated after this.
    pub repeat_ms: u64,
    /// Silence after which a worker is suspect, and one that routers leave alone is asked whether it still lives.
    pub doubt_ms: u64,
    /// A gap between two ticks from which on the leader itself is taken to have stood still.
    pub stall_ms: u64,
    /// How long a worker that answers when asked may take to find a new leader.
    pub return_ms: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self { timeout_ms: 2_500, repeat_ms: 1_000, doubt_ms: 1_500, stall_ms: 1_000, return_ms: 15_000 }
    }
}

/// What should be done about a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Its connection broke, or it hasn't come back to a new leader: ask at its address whether it still lives, at once.
    Probe {
        /// Whom to ask.
        worker: WorkerId,
        /// The life that is in question.
        incarnation: Incarnation,
    },
    /// It is dead: propose it.
    Dead {
        /// Who.
        worker: WorkerId,
        /// Which of its lives.
        incarnation: Incarnation,
        /// Judged by what.
        cause: Cause,
    },
}

/// Why a life isn't trusted with anything new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doubt {
    /// It is new, and hasn't been heard of since it registered.
    Joining,
    /// It has been silent for a while, its connection broke, or most routers leave it alone.
    Suspect,
}

/// What the leader has heard of the workers.
#[derive(Debug, Clone)]
pub struct Liveness {
    policy: Policy,
    begun_ms: u64,
    ticked_ms: u64,
    workers: BTreeMap<WorkerId, Watch>,
    /// The workers that were there when the leader began are known. Those that come later are new.
    has_begun: bool,
}

#[derive(Debug, Clone)]
struct Watch {
    incarnation: Incarnation,
    heard_ms: u64,
    /// No heartbeat of this life has come yet, and it began under this leader.
    is_joining: bool,
    /// It was there before this leader, which hasn't heard of it.
    is_awaited: bool,
    suspicion: Suspicion,
    /// When the last verdict was given.
    judged_ms: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Suspicion {
    None,
    /// It was asked, and the probe isn't back yet.
    Probing,
    /// The probe failed as well.
    Unreachable,
}

impl Watch {
    fn new(incarnation: Incarnation, now_ms: u64, is_joining: bool) -> Self {
        Self { incarnation, heard_ms: now_ms, is_joining, is_awaited: false, suspicion: Suspicion::None, judged_ms: None }
    }

    fn heard(&mut self, now_ms: u64) {
        *self = Self::new(self.incarnation, now_ms.max(self.heard_ms), self.is_joining);
    }

    /// As if it had been heard, though it wasn't.
    fn forgive(&mut self, now_ms: u64) {
        *self = Self { is_awaited: self.is_awaited, ..Self::new(self.incarnation, now_ms.max(self.heard_ms), self.is_joining) };
    }

    fn doubt(&self, now_ms: u64, doubt_ms: u64) -> Option<Doubt> {
        if self.suspicion != Suspicion::None || now_ms.saturating_sub(self.heard_ms) >= doubt_ms {
            Some(Doubt::Suspect)
        } else {
            self.is_joining.then_some(Doubt::Joining)
        }
    }

    fn cause(&self, now_ms: u64, timeout_ms: u64) -> Option<Cause> {
        if self.suspicion == Suspicion::Unreachable {
            Some(Cause::Unreachable)
        } else if now_ms.saturating_sub(self.heard_ms) >= timeout_ms {
            Some(Cause::Silence)
        } else {
            None
        }
    }
}

impl Liveness {
    /// Begins to listen. A new leader knows nothing, so every worker has a full timeout from the moment it is followed.
    pub fn new(policy: Policy, now_ms: u64) -> Self {
        Self { policy, begun_ms: now_ms, ticked_ms: now_ms, workers: BTreeMap::new(), has_begun: false }
    }

    /// Brings the list of workers in line with the committed state: new lives are listened for from now on, dead and unknown
    /// ones no longer.
    pub fn follow(&mut self, state: &ClusterState, now_ms: u64) {
        let alive = |id: &WorkerId| state.workers.get(id).filter(|worker| !worker.state.is_over());
        self.workers.retain(|id, watch| alive(id).is_some_and(|worker| worker.incarnation <= watch.incarnation));
        for (id, worker) in state.workers.iter().filter(|(_, worker)| !worker.state.is_over()) {
            let is_new = self.has_begun;
            self.workers
                .entry(id.clone())
                .or_insert_with(|| Watch { is_awaited: !is_new, ..Watch::new(worker.incarnation, now_ms, is_new) });
        }
        self.has_begun = true;
    }

    /// A registration was committed.
    pub fn registered(&mut self, worker: &WorkerId, incarnation: Incarnation, now_ms: u64) {
        let known = self.workers.get(worker).map_or((0, true), |watch| (watch.incarnation, watch.is_joining));
        if incarnation >= known.0 {
            // The same life again has only a new stream.
            let is_joining = incarnation > known.0 || known.1;
            self.workers.insert(worker.clone(), Watch::new(incarnation, now_ms, is_joining));
        }
    }

    /// The lives that aren't trusted with anything new, and why.
    pub fn doubts(&self, now_ms: u64) -> impl Iterator<Item = (&WorkerId, Incarnation, Doubt)> {
        let doubt_ms = self.policy.doubt_ms;
        let doubts =
            move |(worker, watch): (_, &Watch)| watch.doubt(now_ms, doubt_ms).map(|doubt| (worker, watch.incarnation, doubt));
        self.workers.iter().filter_map(doubts)
    }

    /// Why a life isn't trusted with anything new, if it isn't.
    pub fn doubt(&self, worker: &WorkerId, incarnation: Incarnation, now_ms: u64) -> Option<Doubt> {
        let watch = self.workers.get(worker).filter(|watch| watch.incarnation == incarnation)?;
        watch.doubt(now_ms, self.policy.doubt_ms)
    }

    /// A heartbeat came in. It clears every doubt about this life of the worker.
    pub fn heartbeat(&mut self, worker: &WorkerId, incarnation: Incarnation, now_ms: u64) {
        if let Some(watch) = self.watch(worker, incarnation) {
            watch.is_joining = false;
            watch.heard(now_ms);
        }
    }

    /// The worker's stream ended.
    pub fn connection_lost(&mut self, worker: &WorkerId, incarnation: Incarnation) -> Vec<Verdict> {
        match self.watch(worker, incarnation) {
            Some(watch) if watch.suspicion == Suspicion::None => {
                watch.suspicion = Suspicion::Probing;
                vec![Verdict::Probe { worker: worker.clone(), incarnation }]
            }
            _ => Vec::new(),
        }
    }

    /// Most routers leave the worker alone. Alone that is no verdict: only one that is silent here too is asked, sooner than the
    /// timeout alone would have it.
    pub fn doubted(&mut self, worker: &WorkerId, incarnation: Incarnation, now_ms: u64) -> Vec<Verdict> {
        let doubt_ms = self.policy.doubt_ms;
        match self.watch(worker, incarnation) {
            Some(watch) if watch.suspicion == Suspicion::None && now_ms.saturating_sub(watch.heard_ms) >= doubt_ms => {
                watch.suspicion = Suspicion::Probing;
                vec![Verdict::Probe { worker: worker.clone(), incarnation }]
            }
            _ => Vec::new(),
        }
    }

    /// Nobody answered at the worker's address.
    pub fn probe_failed(&mut self, worker: &WorkerId, incarnation: Incarnation, now_ms: u64) -> Vec<Verdict> {
        match self.watch(worker, incarnation) {
            // Otherwise it was heard of since, and the probe is out of date.
            Some(watch) if watch.suspicion == Suspicion::Probing => {
                watch.suspicion = Suspicion::Unreachable;
                watch.judged_ms = Some(now_ms);
                vec![Verdict::Dead { worker: worker.clone(), incarnation, cause: Cause::Unreachable }]
            }
            _ => Vec::new(),
        }
    }

    /// The worker answered a probe. Only its connection broke: it has the rest of its timeout to come back. One that hasn't found a
    /// new leader yet has a whole one.
    pub fn probe_ok(&mut self, worker: &WorkerId, incarnation: Incarnation, now_ms: u64) {
        if let Some(watch) = self.watch(worker, incarnation)
            && watch.suspicion == Suspicion::Probing
        {
            watch.suspicion = Suspicion::None;
            if watch.is_awaited {
                watch.heard_ms = now_ms.max(watch.heard_ms);
            }
        }
    }

    /// Time has passed.
    pub fn tick(&mut self, now_ms: u64) -> Vec<Verdict> {
        let stalled = now_ms.saturating_sub(self.ticked_ms) >= self.policy.stall_ms;
        self.ticked_ms = now_ms.max(self.ticked_ms);
        if stalled {
            // What was said in the meantime hasn't been read yet.
            self.workers.values_mut().for_each(|watch| watch.forgive(now_ms));
            return Vec::new();
        }
        let Policy { timeout_ms, repeat_ms, return_ms, .. } = self.policy;
        let may_return = now_ms.saturating_sub(self.begun_ms) < return_ms;
        let mut verdicts = Vec::new();
        for (worker, watch) in &mut self.workers {
            let Some(cause) = watch.cause(now_ms, timeout_ms) else { continue };
            if watch.is_awaited && may_return && watch.suspicion != Suspicion::Unreachable {
                // It is asked first, once at a time.
                if watch.suspicion == Suspicion::None {
                    watch.suspicion = Suspicion::Probing;
                    verdicts.push(Verdict::Probe { worker: worker.clone(), incarnation: watch.incarnation });
                }
                continue;
            }
            if watch.judged_ms.is_some_and(|judged_ms| now_ms.saturating_sub(judged_ms) < repeat_ms) {
                continue;
            }
            watch.judged_ms = Some(now_ms);
            verdicts.push(Verdict::Dead { worker: worker.clone(), incarnation: watch.incarnation, cause });
        }
        verdicts
    }

    fn watch(&mut self, worker: &WorkerId, incarnation: Incarnation) -> Option<&mut Watch> {
        self.workers.get_mut(worker).filter(|watch| watch.incarnation == incarnation)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        state::WorkerState,
        testkit::{registered, w},
    };

    fn dead(name: &str, incarnation: u64, cause: Cause) -> Vec<Verdict> {
        vec![Verdict::Dead { worker: w(name), incarnation, cause }]
    }

    /// Ticks every 100 ms from `from` on, up to and including `to`, and collects the verdicts with their times.
    fn ticks(liveness: &mut Liveness, from: u64, to: u64) -> Vec<(u64, Verdict)> {
        let times = (from..=to).step_by(100);
        times.flat_map(|now| liveness.tick(now).into_iter().map(move |verdict| (now, verdict))).collect()
    }

    #[test]
    fn silence_is_judged_after_the_timeout_and_repeated_now_and_then() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.registered(&w("w1"), 7, 0);
        liveness.registered(&w("w2"), 3, 0);
        let mut judged = Vec::new();
        for now in (100..=4_600).step_by(100) {
            liveness.heartbeat(&w("w2"), 3, now);
            judged.extend(liveness.tick(now).into_iter().map(|verdict| (now, verdict)));
        }
        let verdict = Verdict::Dead { worker: w("w1"), incarnation: 7, cause: Cause::Silence };
        assert_eq!(judged, vec![(2_500, verdict.clone()), (3_500, verdict.clone()), (4_500, verdict)]);
    }

    #[test]
    fn a_broken_connection_is_probed_and_judged_at_once_if_nobody_answers() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.registered(&w("w1"), 7, 0);
        assert_eq!(liveness.connection_lost(&w("w1"), 7), vec![Verdict::Probe { worker: w("w1"), incarnation: 7 }]);
        assert_eq!(liveness.connection_lost(&w("w1"), 7), vec![], "one probe at a time");
        assert_eq!(liveness.probe_failed(&w("w1"), 7, 40), dead("w1", 7, Cause::Unreachable));
        let again = ticks(&mut liveness, 100, 1_100);
        assert_eq!(again.first().map(|(now, _)| *now), Some(1_100), "repeated only after the interval");
    }

    #[test]
    fn one_that_routers_leave_alone_is_asked_sooner_if_it_is_silent_here_too() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.registered(&w("w1"), 7, 0);
        liveness.heartbeat(&w("w1"), 7, 1_000);
        assert_eq!(liveness.doubted(&w("w1"), 7, 2_400), vec![], "it was heard of a moment ago");
        assert_eq!(liveness.doubted(&w("w1"), 6, 2_500), vec![], "another life");
        let probe = vec![Verdict::Probe { worker: w("w1"), incarnation: 7 }];
        assert_eq!(liveness.doubted(&w("w1"), 7, 2_500), probe);
        assert_eq!(liveness.doubted(&w("w1"), 7, 2_600), vec![], "one probe at a time");
        liveness.probe_ok(&w("w1"), 7, 2_650);
        assert_eq!(liveness.doubted(&w("w1"), 7, 2_700), probe);
        assert_eq!(liveness.probe_failed(&w("w1"), 7, 2_800), dead("w1", 7, Cause::Unreachable));
    }

    #[test]
    fn a_worker_that_answers_the_probe_has_the_rest_of_its_timeout() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.registered(&w("w1"), 7, 0);
        liveness.connection_lost(&w("w1"), 7);
        liveness.probe_ok(&w("w1"), 7, 50);
        assert_eq!(ticks(&mut liveness, 100, 2_400), vec![]);
        assert_eq!(liveness.tick(2_500), dead("w1", 7, Cause::Silence));
    }

    #[test]
    fn a_heartbeat_overtakes_the_probe() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.registered(&w("w1"), 7, 0);
        liveness.connection_lost(&w("w1"), 7);
        liveness.heartbeat(&w("w1"), 7, 50);
        assert_eq!(liveness.probe_failed(&w("w1"), 7, 60), vec![]);
    }

    #[test]
    fn past_lives_are_not_heard() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.registered(&w("w1"), 7, 0);
        liveness.registered(&w("w1"), 8, 10);
        liveness.registered(&w("w1"), 7, 20);
        assert_eq!(liveness.connection_lost(&w("w1"), 7), vec![], "the old stream's end says nothing about the new life");
        for now in (100..2_500).step_by(100) {
            liveness.heartbeat(&w("w1"), 7, now);
            assert_eq!(liveness.tick(now), vec![]);
        }
        assert_eq!(liveness.tick(2_510), dead("w1", 8, Cause::Silence));
    }

    #[test]
    fn a_new_leader_waits_one_timeout_of_its_own() {
        let state = registered(&["w1", "w2"]);
        let mut liveness = Liveness::new(Policy::default(), 1_000_000);
        liveness.follow(&state, 1_000_000);
        assert_eq!(ticks(&mut liveness, 1_000_100, 1_002_400), vec![]);
        assert_eq!(liveness.tick(1_002_500).len(), 2);
    }

    #[test]
    fn one_that_has_not_found_a_new_leader_is_asked_before_it_is_judged() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.follow(&registered(&["w1", "w2", "w3"]), 0);
        liveness.heartbeat(&w("w3"), 1, 1_000);
        let probe = |name: &str| Verdict::Probe { worker: w(name), incarnation: 1 };
        assert_eq!(ticks(&mut liveness, 100, 2_600), [(2_500, probe("w1")), (2_500, probe("w2"))], "each once");
        liveness.probe_ok(&w("w1"), 1, 2_600);
        assert_eq!(liveness.probe_failed(&w("w2"), 1, 2_600), dead("w2", 1, Cause::Unreachable));
        liveness.heartbeat(&w("w3"), 1, 3_400);
        let later = ticks(&mut liveness, 2_700, 5_100);
        let again = dead("w2", 1, Cause::Unreachable).remove(0);
        assert_eq!(later, [(3_600, again.clone()), (4_600, again), (5_100, probe("w1"))], "a whole timeout for w1");
        // It was heard here: from now on silence is silence.
        assert_eq!(ticks(&mut liveness, 5_200, 5_900).pop(), Some((5_900, dead("w3", 1, Cause::Silence).remove(0))));
        liveness.heartbeat(&w("w1"), 1, 6_000);
        let silent = (8_500, dead("w1", 1, Cause::Silence).remove(0));
        assert!(ticks(&mut liveness, 6_100, 8_500).contains(&silent));
    }

    #[test]
    fn one_that_answers_and_never_comes_is_judged_at_last() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.follow(&registered(&["w1"]), 0);
        let mut judged = None;
        for now in (100..30_000).step_by(100) {
            for verdict in liveness.tick(now) {
                match verdict {
                    Verdict::Probe { worker, incarnation } => liveness.probe_ok(&worker, incarnation, now),
                    Verdict::Dead { cause, .. } => judged = judged.or(Some((now, cause))),
                }
            }
        }
        assert_eq!(judged, Some((15_000, Cause::Silence)));
    }

    #[test]
    fn a_leader_that_stood_still_blames_nobody() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.registered(&w("w1"), 7, 0);
        assert_eq!(ticks(&mut liveness, 100, 500), vec![]);
        assert_eq!(liveness.tick(60_000), vec![], "stopped for a minute");
        assert_eq!(ticks(&mut liveness, 60_100, 62_400), vec![]);
        assert_eq!(liveness.tick(62_500), dead("w1", 7, Cause::Silence));
    }

    #[test]
    fn the_dead_and_the_unknown_are_forgotten() {
        let mut state = registered(&["w1", "w2"]);
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.follow(&state, 0);
        state.workers.get_mut(&w("w1")).unwrap().state = WorkerState::Dead;
        state.workers.remove(&w("w2"));
        liveness.follow(&state, 100);
        assert_eq!(ticks(&mut liveness, 100, 5_000), vec![]);
    }

    #[test]
    fn a_worker_is_joining_until_it_is_heard_and_suspect_before_it_is_dead() {
        let mut liveness = Liveness::new(Policy::default(), 0);
        liveness.follow(&registered(&["w1"]), 0);
        assert_eq!(liveness.doubts(0).count(), 0, "it was there before this leader");
        let state = registered(&["w1", "w2"]);
        liveness.follow(&state, 100);
        let doubts = |liveness: &Liveness, now_ms| -> Vec<(String, Doubt)> {
            liveness.doubts(now_ms).map(|(worker, _, doubt)| (worker.to_string(), doubt)).collect()
        };
        assert_eq!(doubts(&liveness, 100), [("w2".into(), Doubt::Joining)]);
        liveness.registered(&w("w2"), 1, 200);
        assert_eq!(doubts(&liveness, 200), [("w2".into(), Doubt::Joining)], "nothing came on its stream yet");
        liveness.registered(&w("w1"), 1, 200);
        liveness.heartbeat(&w("w2"), 1, 300);
        assert_eq!(doubts(&liveness, 300), [], "w1 has only joined a new leader");
        assert_eq!(doubts(&liveness, 1_699), []);
        liveness.heartbeat(&w("w2"), 1, 1_700);
        assert_eq!(doubts(&liveness, 1_700), [("w1".into(), Doubt::Suspect)], "silent for 1.5 s");
        liveness.registered(&w("w1"), 2, 1_800);
        assert_eq!(doubts(&liveness, 1_800), [("w1".into(), Doubt::Joining)], "another life");
        liveness.heartbeat(&w("w1"), 2, 1_900);
        liveness.connection_lost(&w("w1"), 2);
        assert_eq!(doubts(&liveness, 1_900), [("w1".into(), Doubt::Suspect)]);
        liveness.probe_ok(&w("w1"), 2, 1_950);
        assert_eq!(doubts(&liveness, 1_900), []);
    }

    proptest! {
        #[test]
        fn nobody_is_judged_before_a_full_timeout_of_silence(
            beats in proptest::collection::vec(1_u64..400, 1..60),
        ) {
            let mut liveness = Liveness::new(Policy::default(), 0);
            liveness.registered(&w("w1"), 1, 0);
            let mut heard = 0;
            let mut now = 0;
            for gap in beats {
                now += gap;
                if gap % 3 == 0 {
                    liveness.heartbeat(&w("w1"), 1, now);
                    heard = now;
                }
                let verdicts = liveness.tick(now);
                prop_assert!(verdicts.is_empty() || now - heard >= 2_500);
            }
        }
    }
}
