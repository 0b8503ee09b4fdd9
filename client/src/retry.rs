//! May this error, at this point, move? One closed table, and nothing else decides it.
//!
//! Pure: what happened, how far the request was and what is left of its budgets come in as values; a verdict goes out. A
//! prediction may be run twice (it has no effect but its answer), so a request that was sent may move as long as nothing of
//! its answer was delivered. A sequence may always move: its journal knows what was delivered. So may a request of a decoupled
//! model: the responses that were delivered are counted, and are left out when it runs again. What is absent here: any notion of
//! a replica's health (see `ejection`).
pub mod allowance;

use cresset_proto::reason::Reason;
use tonic::{Code, ConnectError, Status};

/// What went wrong at a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No connection could be made, or it ended before the request was on it.
    Unreachable,
    /// The connection broke, or the answer ended in the middle.
    Broken,
    /// The worker refused and said why.
    Refused(Reason),
    /// A bare gRPC code, from something that isn't one of our workers or from tonic itself.
    Coded(Code),
}

impl Failure {
    /// Reads a status.
    pub fn of(status: &Status) -> Self {
        if let Some(reason) = Reason::of(status) {
            return Self::Refused(reason);
        }
        // A status that came over the wire has no source; one that tonic made of an error of the connection has.
        let mut source = std::error::Error::source(status);
        if source.is_none() {
            return Self::Coded(status.code());
        }
        while let Some(error) = source {
            if error.is::<ConnectError>() || is_unsent(error) {
                return Self::Unreachable;
            }
            source = error.source();
        }
        Self::Broken
    }

    /// How far a request that failed like this can have come.
    pub fn point(self) -> Point {
        match self {
            Self::Unreachable => Point::NotSent,
            Self::Broken | Self::Refused(_) | Self::Coded(_) => Point::Sent,
        }
    }
}

/// Whether the connection ended in order before the request was on it, or the server says that it hasn't looked at it
/// (RFC 9113, 8.7): what a request meets that comes when its server begins to leave.
fn is_unsent(error: &(dyn std::error::Error + 'static)) -> bool {
    // hyper says so of what waited for the connection, and of nothing that was sent.
    error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled)
        || error.downcast_ref::<h2::Error>().is_some_and(|error| error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// How far the request was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The replica can't have seen it.
    NotSent,
    /// The replica may have run it; nothing of the answer was delivered to the caller.
    Sent,
    /// The caller has a part of the answer.
    PartlyDelivered,
}

/// What kind of work it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One request with one answer and no state.
    Unary,
    /// The stream of a sequence, with a journal behind it.
    Sequence,
    /// One request with any number of answers, of which those that were delivered are counted.
    Decoupled,
}

/// What was spent on this request so far, and what may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// Moves left after failures that may be the request's own fault. Moves of requests that were never sent are free.
    pub moves_left: u32,
    /// Moves left after refusals for want of room, so that a full cluster isn't asked by everybody everywhere.
    pub overloads_left: u32,
    /// How often this request has failed in a row, from 1; the pause grows with it.
    pub failures: u32,
    /// Whether this router may still have requests run again, over all of them; see [`allowance`].
    pub allowed: bool,
    /// Where between half of a pause and all of it this request goes on, from 0 to 1: those who failed together don't come back
    /// together.
    pub jitter: f32,
    /// Whether a replica is left that this request hasn't tried.
    pub others: bool,
    /// How long the replica that refused asks to be left alone, in ms; 0 if it didn't say.
    pub pushback_ms: u64,
    /// Now, in ms of any clock.
    pub now_ms: u64,
    /// When the caller stops waiting, on the same clock.
    pub deadline_ms: u64,
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go to another replica after `after_ms`.
    Move {
        /// 0 for at once.
        after_ms: u64,
        /// Which budget pays.
        pays: Pays,
    },
    /// Nobody untried is left: wait for newer routes, at most `at_most_ms`, then try everybody again.
    Wait {
        /// The longest wait.
        at_most_ms: u64,
        /// Which budget pays.
        pays: Pays,
    },
    /// Tell the caller.
    GiveUp,
}

/// Which budget a move is taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pays {
    /// None: the request did no work and can't be to blame.
    Nothing,
    /// [`Budget::moves_left`], and [`Budget::allowed`].
    Move,
    /// [`Budget::overloads_left`], and [`Budget::allowed`].
    Overload,
}

/// The longest pause before everybody is tried again, in ms.
pub const PAUSE_MS_MAX: u64 = 250;
/// The first pause, in ms.
const PAUSE_MS_MIN: u64 = 10;

/// What a failure says about the replica and the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// The replica can't serve this now, and another can; the request is not to blame.
    Elsewhere,
    /// The replica failed, perhaps because of the request.
    Suspect,
    /// No room.
    Overloaded,
    /// The answer would be the same everywhere.
    Final,
}

/// The table.
fn class(failure: Failure, kind: Kind) -> Class {
    match failure {
        Failure::Unreachable => Class::Elsewhere,
        Failure::Broken => Class::Suspect,
        Failure::Refused(reason) => class_of_reason(reason, kind),
        Failure::Coded(code) => class_of_code(code, kind),
    }
}

fn class_of_reason(reason: Reason, kind: Kind) -> Class {
    // No `_` arm: a new reason has to choose.
    match reason {
        // The routes are older than the truth.
        Reason::NotHere | Reason::Fenced | Reason::Draining | Reason::NoReplica | Reason::UnknownModel => Class::Elsewhere,
        Reason::DeviceUnhealthy => Class::Elsewhere,
        Reason::QueueFull | Reason::SequencesFull | Reason::OutOfMemory => Class::Overloaded,
        Reason::Suspect | Reason::Internal => Class::Suspect,
        Reason::SequenceNotStarted | Reason::BadCheckpoint => match kind {
            Kind::Unary | Kind::Decoupled => Class::Final,
            // The journal can open it anew anywhere.
            Kind::Sequence => Class::Suspect,
        },
        // Nobody else has it, or somebody else has it for good.
        Reason::SequenceLost | Reason::TakenOver => Class::Final,
        // The time that its policy or its caller gives it is over.
        Reason::QueueTimeout | Reason::DeadlineExceeded => Class::Final,
        Reason::InvalidArgument | Reason::ModelFailed | Reason::Unsupported | Reason::LoadFailed => Class::Final,
        // Coordinators say these, workers don't.
        Reason::NoLeader | Reason::Indeterminate | Reason::Conflict => Class::Final,
        // Of shared memory, which is for callers on the worker's own host.
        Reason::AlreadyExists | Reason::UnknownRegion | Reason::RegionFailed => Class::Final,
    }
}

fn class_of_code(code: Code, kind: Kind) -> Class {
    match code {
        // A fence, or a server that is going away.
        Code::Unavailable | Code::FailedPrecondition | Code::Aborted | Code::NotFound => Class::Elsewhere,
        Code::ResourceExhausted => Class::Overloaded,
        // tonic's answer for a stream that ended without a status, or that its server dropped.
        Code::Unknown | Code::Cancelled => Class::Suspect,
        Code::Ok | Code::Internal | Code::DataLoss => match kind {
            Kind::Unary | Kind::Decoupled => Class::Final,
            // The stream of a sequence has no business ending like that while requests are open.
            Kind::Sequence => Class::Suspect,
        },
        Code::InvalidArgument | Code::DeadlineExceeded | Code::AlreadyExists | Code::PermissionDenied => Class::Final,
        Code::OutOfRange | Code::Unimplemented | Code::Unauthenticated => Class::Final,
    }
}

/// Decides what becomes of a request, or of a sequence's stream, after `failure`.
pub fn decide(failure: Failure, point: Point, kind: Kind, budget: &Budget) -> Verdict {
    let movable = match (kind, point) {
        (_, Point::NotSent) | (_, Point::Sent) | (Kind::Sequence | Kind::Decoupled, Point::PartlyDelivered) => true,
        (Kind::Unary, Point::PartlyDelivered) => false,
    };
    if !movable {
        return Verdict::GiveUp;
    }
    let pays = match (class(failure, kind), point) {
        (Class::Final, _) => return Verdict::GiveUp,
        (Class::Elsewhere, _) | (_, Point::NotSent) => Pays::Nothing,
        (Class::Suspect, _) => Pays::Move,
        (Class::Overloaded, _) => Pays::Overload,
    };
    let affordable = match pays {
        Pays::Nothing => true,
        Pays::Move => budget.moves_left > 0 && budget.allowed,
        Pays::Overload => budget.overloads_left > 0 && budget.allowed,
    };
    if !affordable || budget.now_ms >= budget.deadline_ms {
        return Verdict::GiveUp;
    }
    let left_ms = budget.deadline_ms - budget.now_ms;
    match (budget.others, pays) {
        (true, _) => Verdict::Move { after_ms: 0, pays },
        // Newer routes don't make room.
        (false, Pays::Overload) => match pause_ms(budget).max(after_pushback_ms(budget)) {
            after_ms if after_ms < left_ms => Verdict::Move { after_ms, pays },
            _ => Verdict::GiveUp,
        },
        (false, _) => Verdict::Wait { at_most_ms: pause_ms(budget).min(left_ms), pays },
    }
}

/// Whether a request may have a second copy while the first is still out: only what has no state and one answer.
pub fn may_hedge(kind: Kind) -> bool {
    match kind {
        Kind::Unary => true,
        Kind::Sequence | Kind::Decoupled => false,
    }
}

fn pause_ms(budget: &Budget) -> u64 {
    jittered(backoff_ms(budget.failures), budget.jitter)
}

/// Never before the replica asked for, and up to a quarter later.
fn after_pushback_ms(budget: &Budget) -> u64 {
    budget.pushback_ms + (budget.pushback_ms as f32 / 4.0 * budget.jitter.clamp(0.0, 1.0)) as u64
}

/// 10 ms, doubled with each failure, up to [`PAUSE_MS_MAX`].
pub fn backoff_ms(failures: u32) -> u64 {
    (PAUSE_MS_MIN << failures.saturating_sub(1).min(16)).min(PAUSE_MS_MAX)
}

/// Between half of a pause and all of it.
fn jittered(pause_ms: u64, jitter: f32) -> u64 {
    let half = pause_ms / 2;
    pause_ms - half + (half as f32 * jitter.clamp(0.0, 1.0)) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AMPLE: Budget = Budget {
        moves_left: 3,
        overloads_left: 2,
        failures: 1,
        allowed: true,
        jitter: 1.0,
        others: true,
        pushback_ms: 0,
        now_ms: 1_000,
        deadline_ms: 2_000,
    };

    fn every_failure() -> Vec<Failure> {
        let codes = (0..=16).map(|code| Failure::Coded(Code::from_i32(code)));
        let reasons = Reason::ALL.iter().map(|&reason| Failure::Refused(reason));
        [Failure::Unreachable, Failure::Broken].into_iter().chain(codes).chain(reasons).collect()
    }

    #[test]
    fn a_stream_that_the_server_refused_was_never_sent() {
        let status = |reason: h2::Reason| Status::from_error(Box::new(h2::Error::from(reason)));
        assert_eq!(Failure::of(&status(h2::Reason::REFUSED_STREAM)), Failure::Unreachable);
        assert_eq!(Failure::of(&status(h2::Reason::CANCEL)), Failure::Broken);
    }

    #[test]
    fn what_is_wrong_with_the_request_never_moves() {
        for reason in [Reason::InvalidArgument, Reason::ModelFailed, Reason::QueueTimeout, Reason::DeadlineExceeded] {
            for kind in [Kind::Unary, Kind::Sequence, Kind::Decoupled] {
                assert_eq!(decide(Failure::Refused(reason), Point::Sent, kind, &AMPLE), Verdict::GiveUp, "{reason}");
            }
        }
    }

    #[test]
    fn a_dead_worker_costs_nothing_before_it_was_reached_and_a_move_after() {
        let at_once = |pays| Verdict::Move { after_ms: 0, pays };
        let unary = |failure: Failure| decide(failure, failure.point(), Kind::Unary, &AMPLE);
        assert_eq!(unary(Failure::Unreachable), at_once(Pays::Nothing));
        assert_eq!(unary(Failure::Broken), at_once(Pays::Move));
        assert_eq!(unary(Failure::Refused(Reason::Fenced)), at_once(Pays::Nothing));
        assert_eq!(unary(Failure::Coded(Code::Unavailable)), at_once(Pays::Nothing));
        assert_eq!(unary(Failure::Refused(Reason::QueueFull)), at_once(Pays::Overload));
    }

    #[test]
    fn a_request_that_breaks_every_worker_is_stopped() {
        let spent = Budget { moves_left: 0, ..AMPLE };
        assert_eq!(decide(Failure::Broken, Point::Sent, Kind::Unary, &spent), Verdict::GiveUp);
        assert_ne!(decide(Failure::Unreachable, Point::NotSent, Kind::Unary, &spent), Verdict::GiveUp);
    }

    #[test]
    fn when_too_many_were_run_again_only_what_cost_nothing_moves() {
        let spent = Budget { allowed: false, ..AMPLE };
        let unary = |failure: Failure| decide(failure, failure.point(), Kind::Unary, &spent);
        assert_eq!(unary(Failure::Broken), Verdict::GiveUp);
        assert_eq!(unary(Failure::Refused(Reason::QueueFull)), Verdict::GiveUp);
        assert_ne!(unary(Failure::Unreachable), Verdict::GiveUp);
        assert_ne!(unary(Failure::Refused(Reason::Draining)), Verdict::GiveUp);
    }

    #[test]
    fn pauses_are_spread_between_half_and_all() {
        let alone = |jitter| Budget { others: false, failures: 2, jitter, ..AMPLE };
        let pause = |jitter| match decide(Failure::Broken, Point::Sent, Kind::Unary, &alone(jitter)) {
            Verdict::Wait { at_most_ms, .. } => at_most_ms,
            other => panic!("{other:?}"),
        };
        assert_eq!([0.0, 0.5, 1.0].map(pause), [10, 15, 20]);
    }

    #[test]
    fn waits_for_routes_when_nobody_is_left_but_not_for_room() {
        let alone = Budget { others: false, failures: 2, ..AMPLE };
        let wait = Verdict::Wait { at_most_ms: 20, pays: Pays::Nothing };
        assert_eq!(decide(Failure::Refused(Reason::NotHere), Point::Sent, Kind::Unary, &alone), wait);
        let full = decide(Failure::Refused(Reason::QueueFull), Point::Sent, Kind::Unary, &alone);
        assert_eq!(full, Verdict::Move { after_ms: 20, pays: Pays::Overload });
        let asked =
            |pushback_ms| decide(Failure::Refused(Reason::QueueFull), Point::Sent, Kind::Unary, &Budget { pushback_ms, ..alone });
        assert_eq!(asked(72), Verdict::Move { after_ms: 90, pays: Pays::Overload }, "a quarter later at most");
        assert_eq!(asked(5), full);
        assert_eq!(asked(1_000), Verdict::GiveUp, "the deadline is before that");
    }

    #[test]
    fn sequences_and_decoupled_requests_survive_what_a_unary_call_does_not() {
        let verdict = |kind| decide(Failure::Broken, Point::PartlyDelivered, kind, &AMPLE);
        assert_eq!(verdict(Kind::Unary), Verdict::GiveUp);
        for kind in [Kind::Sequence, Kind::Decoupled] {
            assert_eq!(verdict(kind), Verdict::Move { after_ms: 0, pays: Pays::Move }, "{kind:?}");
        }
    }

    #[test]
    fn statuses_are_read_by_reason_then_source_then_code() {
        assert_eq!(Failure::of(&Reason::Fenced.status("x")), Failure::Refused(Reason::Fenced));
        assert_eq!(Failure::of(&Status::unavailable("x")), Failure::Coded(Code::Unavailable));
        let broken = Status::from_error("the pipe broke".into());
        assert_eq!(Failure::of(&broken), Failure::Broken);
        let refused = Status::from_error(Box::new(ConnectError("refused".into())));
        assert_eq!(Failure::of(&refused), Failure::Unreachable);
    }

    proptest! {
        #[test]
        fn pauses_fit_the_deadline_and_a_past_deadline_ends_it(
            which in 0_usize..64, kind in 0_usize..3, failures in 0_u32..100, others: bool, now_ms in 0_u64..5_000,
        ) {
            let failures_all = every_failure();
            let failure = failures_all[which % failures_all.len()];
            let kind = [Kind::Unary, Kind::Sequence, Kind::Decoupled][kind];
            let budget = Budget { failures, others, now_ms, ..AMPLE };
            match decide(failure, failure.point(), kind, &budget) {
                Verdict::GiveUp => {}
                Verdict::Move { after_ms, .. } => prop_assert!(now_ms + after_ms < budget.deadline_ms),
                Verdict::Wait { at_most_ms, .. } => {
                    prop_assert!(!others && now_ms + at_most_ms <= budget.deadline_ms);
                }
            }
        }
    }
}
