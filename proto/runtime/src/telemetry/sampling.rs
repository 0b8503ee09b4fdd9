//! Which requests leave a trace: changed at run time, asked without a lock.
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
};

use opentelemetry::{
    Context, KeyValue,
    trace::{Link, SpanKind, TraceContextExt, TraceId},
};
use opentelemetry_sdk::trace::{SamplingDecision, SamplingResult, ShouldSample};

/// Which requests leave a trace. A request that brings a trace of its own follows its caller's decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    /// Whether any do. If not, that goes for requests with a trace of their own too, and for what they call.
    pub on: bool,
    /// Of the requests without a trace, every so manieth begins one. At least 1.
    pub every: u32,
    /// How many more may begin; `None` for any number.
    pub left: Option<u64>,
}

impl Sampling {
    /// Every request.
    pub const ALL: Self = Self { on: true, every: 1, left: None };

    /// What OpenTelemetry's variables ask for, as far as it can be done: a ratio becomes every so manieth.
    pub(super) fn from_env(sampler: Option<&str>, argument: Option<&str>) -> Self {
        let word = sampler.unwrap_or_default();
        match word.strip_prefix("parentbased_").unwrap_or(word) {
            "always_off" => Self { on: false, ..Self::ALL },
            "traceidratio" => match argument.and_then(|text| text.parse::<f64>().ok()) {
                Some(ratio) if ratio <= 0.0 => Self { on: false, ..Self::ALL },
                // `as` saturates.
                Some(ratio) if ratio < 1.0 => Self { every: (1.0 / ratio).round().max(1.0) as u32, ..Self::ALL },
                _ => Self::ALL,
            },
            _ => Self::ALL,
        }
    }
}

/// No limit of traces, in [`State::left`].
const NO_LIMIT: u64 = u64::MAX;

#[derive(Debug)]
struct State {
    on: AtomicBool,
    every: AtomicU32,
    left: AtomicU64,
    /// Requests that brought no trace, since the settings changed.
    seen: AtomicU64,
}

/// The decision for each span that begins. Clones share the settings.
#[derive(Debug, Clone)]
pub(super) struct Sampler(Arc<State>);

impl Sampler {
    pub(super) fn new(start: Sampling) -> Self {
        let left = start.left.unwrap_or(NO_LIMIT);
        Self(Arc::new(State { on: start.on.into(), every: start.every.into(), left: left.into(), seen: 0.into() }))
    }

    pub(super) fn now(&self) -> Sampling {
        let left = self.0.left.load(Relaxed);
        Sampling { on: self.0.on.load(Relaxed), every: self.0.every.load(Relaxed), left: (left != NO_LIMIT).then_some(left) }
    }

    /// Changes what differs: a count that isn't touched goes on counting down.
    pub(super) fn change(&self, from: Sampling, to: Sampling) {
        if to.left != from.left {
            self.0.left.store(to.left.unwrap_or(NO_LIMIT), Relaxed);
        }
        if to.every != from.every {
            self.0.every.store(to.every.max(1), Relaxed);
            self.0.seen.store(0, Relaxed);
        }
        self.0.on.store(to.on, Relaxed);
    }

    /// Whether a request without a trace begins one.
    fn begins(&self) -> bool {
        let seen = self.0.seen.fetch_add(1, Relaxed).wrapping_add(1);
        if !seen.is_multiple_of(u64::from(self.0.every.load(Relaxed).max(1))) {
            return false;
        }
        let take = |left| match left {
            NO_LIMIT => Some(NO_LIMIT),
            0 => None,
            some => Some(some - 1),
        };
        self.0.left.fetch_update(Relaxed, Relaxed, take).is_ok()
    }
}

impl ShouldSample for Sampler {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        _: TraceId,
        _: &str,
        _: &SpanKind,
        _: &[KeyValue],
        _: &[Link],
    ) -> SamplingResult {
        let parent = parent.map(|context| context.span().span_context().clone()).filter(|context| context.is_valid());
        let sampled = self.0.on.load(Relaxed)
            && match &parent {
                Some(parent) => parent.is_sampled(),
                None => self.begins(),
            };
        SamplingResult {
            decision: if sampled { SamplingDecision::RecordAndSample } else { SamplingDecision::Drop },
            attributes: vec![],
            trace_state: parent.map(|parent| parent.trace_state().clone()).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceState};

    use super::*;

    fn ask(sampler: &Sampler, parent: Option<TraceFlags>) -> bool {
        let context = parent.map(|flags| {
            let parent = SpanContext::new(TraceId::from(7), SpanId::from(7), flags, true, TraceState::default());
            Context::new().with_remote_span_context(parent)
        });
        let context = context.unwrap_or_default();
        let result = sampler.should_sample(Some(&context), TraceId::from(7), "x", &SpanKind::Internal, &[], &[]);
        result.decision == SamplingDecision::RecordAndSample
    }

    fn sampled(sampler: &Sampler, of: usize) -> usize {
        (0..of).filter(|_| ask(sampler, None)).count()
    }

    #[test]
    fn every_so_manieth_request_begins_a_trace() {
        let sampler = Sampler::new(Sampling { every: 3, ..Sampling::ALL });
        let asked: Vec<bool> = (0..7).map(|_| ask(&sampler, None)).collect();
        assert_eq!(asked, [false, false, true, false, false, true, false]);
        sampler.change(sampler.now(), Sampling::ALL);
        assert_eq!(sampled(&sampler, 5), 5);
    }

    #[test]
    fn a_limit_counts_down_and_other_changes_leave_it_alone() {
        let sampler = Sampler::new(Sampling { left: Some(3), ..Sampling::ALL });
        let before = sampler.now();
        assert_eq!(sampled(&sampler, 2), 2);
        assert_eq!(sampler.now().left, Some(1));
        // This change was thought of before the two.
        sampler.change(before, Sampling { every: 2, ..before });
        assert_eq!((sampled(&sampler, 10), sampler.now().left), (1, Some(0)));
        sampler.change(sampler.now(), Sampling::ALL);
        assert_eq!((sampled(&sampler, 10), sampler.now()), (10, Sampling::ALL));
    }

    #[test]
    fn a_callers_decision_is_followed_unless_all_is_off() {
        let sampler = Sampler::new(Sampling { every: 1000, left: Some(0), on: true });
        assert!(ask(&sampler, Some(TraceFlags::SAMPLED)));
        assert!(!ask(&sampler, Some(TraceFlags::default())));
        sampler.change(sampler.now(), Sampling { on: false, ..Sampling::ALL });
        assert!(!ask(&sampler, Some(TraceFlags::SAMPLED)) && !ask(&sampler, None));
    }

    #[test]
    fn the_environment_is_read_as_far_as_it_goes() {
        let off = Sampling { on: false, ..Sampling::ALL };
        for (sampler, argument, wanted) in [
            (None, None, Sampling::ALL),
            (Some("always_on"), None, Sampling::ALL),
            (Some("parentbased_always_off"), None, off),
            (Some("traceidratio"), Some("0.1"), Sampling { every: 10, ..Sampling::ALL }),
            (Some("parentbased_traceidratio"), Some("0"), off),
            (Some("traceidratio"), Some("1.0"), Sampling::ALL),
            (Some("traceidratio"), Some("many"), Sampling::ALL),
            (Some("traceidratio"), Some("1e-300"), Sampling { every: u32::MAX, ..Sampling::ALL }),
        ] {
            assert_eq!(Sampling::from_env(sampler, argument), wanted, "{sampler:?} {argument:?}");
        }
    }
}
