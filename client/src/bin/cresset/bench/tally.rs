//! What a run comes to: latencies, failures, what was never sent. Pure: times are values, in ns since the start.
//!
//! A request belongs to the measurement if it was *due* in the measured window: in an open loop by its schedule, in a closed
//! loop by its being sent. Its latency runs from that moment, so a server that stands still is charged with every request
//! that was due meanwhile (no coordinated omission).

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

/// Between 100 ns and an hour, to three digits.
const LOWEST_NS: u64 = 100;
const HIGHEST_NS: u64 = 3_600_000_000_000;
const DIGITS: u8 = 3;
/// Different failures that are told apart by code; there are fewer gRPC codes.
const EXAMPLE_CHARS_MAX: usize = 300;

/// The time that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The end of the warm-up.
    pub from_ns: u64,
    /// When nothing new is begun any more; `u64::MAX` if a number of requests ends the run.
    pub until_ns: u64,
}

impl Window {
    /// Whether a request that is due then is measured.
    pub fn has(&self, due_ns: u64) -> bool {
        (self.from_ns..self.until_ns).contains(&due_ns)
    }
}

/// How one request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The gRPC code in capitals; `STREAM_ERROR` for an error inside a stream, which has none.
    pub code: &'static str,
    /// The server's words.
    pub message: String,
}

/// What came back for one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// How many responses; other than 1 only for a decoupled model.
    pub responses: u32,
    /// Whether it equals the first answer; true where nobody looked.
    pub matches: bool,
}

/// One request from its due moment to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// When it should have been sent.
    pub due_ns: u64,
    /// When it was.
    pub sent_ns: u64,
    /// When its last response, or its failure, was in.
    pub done_ns: u64,
    /// What it got.
    pub result: Result<Answer, Failure>,
}

/// Failures of one code.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failures {
    /// How many.
    pub count: u64,
    /// The words of the first.
    pub example: String,
}

/// The work of one of the requests that a closed loop keeps in flight, from its first to its last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span {
    first_ns: Option<u64>,
    last_ns: u64,
    answered: u64,
}

impl Span {
    /// Counts a measured request in.
    pub fn add(&mut self, outcome: &Outcome) {
        self.first_ns.get_or_insert(outcome.due_ns);
        self.last_ns = self.last_ns.max(outcome.done_ns);
        self.answered += u64::from(outcome.result.is_ok());
    }

    /// Answers per second while it was at work.
    ///
    /// The sum over all of them is the throughput: requests begin and end in step where a server works in batches, and
    /// counting what ends within a fixed time would be off by up to a batch.
    fn rate(&self) -> f64 {
        let busy_ns = self.first_ns.map_or(0, |first| self.last_ns.saturating_sub(first));
        if busy_ns == 0 { 0.0 } else { self.answered as f64 * 1e9 / busy_ns as f64 }
    }
}

/// The count over a run, or over one thread's share of it.
#[derive(Debug, Clone)]
pub struct Tally {
    window: Window,
    /// Of answered requests, in ns.
    pub latency: Histogram<u64>,
    /// From due to sent, of all measured requests, in ns.
    pub lag: Histogram<u64>,
    /// Measured requests that got a good answer.
    pub answered: u64,
    /// Measured requests that failed, by code.
    pub failures: BTreeMap<&'static str, Failures>,
    /// Answers that differ from the first.
    pub mismatched: u64,
    /// Responses to measured requests.
    pub responses: u64,
    /// Due in the window, but as many as may be were in flight until its end.
    pub unsent: u64,
    /// Requests that ended after the warm-up, measured or not: what CPU time is spread over.
    pub ended: u64,
    /// Streams that were opened, warm-up included.
    pub streams: u64,
    /// When the last measured request ended.
    pub last_ns: u64,
    closed_rate: f64,
}

impl Tally {
    /// Nothing yet.
    pub fn new(window: Window) -> Self {
        let histogram = || Histogram::new_with_bounds(LOWEST_NS, HIGHEST_NS, DIGITS).expect("the bounds are constants");
        Self {
            window,
            latency: histogram(),
            lag: histogram(),
            answered: 0,
            failures: BTreeMap::new(),
            mismatched: 0,
            responses: 0,
            unsent: 0,
            ended: 0,
            streams: 0,
            last_ns: 0,
            closed_rate: 0.0,
        }
    }

    /// Counts one request that was sent. Says whether it is measured.
    pub fn add(&mut self, outcome: &Outcome) -> bool {
        self.ended += u64::from(outcome.done_ns >= self.window.from_ns);
        if !self.window.has(outcome.due_ns) {
            return false;
        }
        self.last_ns = self.last_ns.max(outcome.done_ns);
        self.lag.saturating_record(outcome.sent_ns.saturating_sub(outcome.due_ns));
        match &outcome.result {
            Ok(answer) => {
                self.answered += 1;
                self.responses += u64::from(answer.responses);
                self.mismatched += u64::from(!answer.matches);
                self.latency.saturating_record(outcome.done_ns.saturating_sub(outcome.due_ns));
            }
            Err(failure) => {
                let failures = self.failures.entry(failure.code).or_default();
                failures.count += 1;
                if failures.example.is_empty() {
                    failures.example = failure.message.chars().take(EXAMPLE_CHARS_MAX).collect();
                }
            }
        }
        true
    }

    /// Counts a request that was due and never sent.
    pub fn add_unsent(&mut self, due_ns: u64) {
        self.unsent += u64::from(self.window.has(due_ns));
    }

    /// Counts the work of one place of a closed loop.
    pub fn add_span(&mut self, span: &Span) {
        self.closed_rate += span.rate();
    }

    /// Two threads' shares as one.
    pub fn merge(&mut self, other: &Self) {
        // Both have the same bounds, so there is nothing that doesn't fit.
        for (mine, theirs) in [(&mut self.latency, &other.latency), (&mut self.lag, &other.lag)] {
            mine.add(theirs).expect("the bounds are constants");
        }
        for (code, theirs) in &other.failures {
            let mine = self.failures.entry(code).or_default();
            mine.count += theirs.count;
            if mine.example.is_empty() {
                mine.example.clone_from(&theirs.example);
            }
        }
        self.answered += other.answered;
        self.mismatched += other.mismatched;
        self.responses += other.responses;
        self.unsent += other.unsent;
        self.ended += other.ended;
        self.streams += other.streams;
        self.last_ns = self.last_ns.max(other.last_ns);
        self.closed_rate += other.closed_rate;
    }

    /// Measured requests that failed.
    pub fn failed(&self) -> u64 {
        self.failures.values().map(|failures| failures.count).sum()
    }

    /// The measured time in seconds: the window, or up to the last answer where a number of requests ended the run.
    pub fn seconds(&self) -> f64 {
        let until_ns = if self.window.until_ns == u64::MAX { self.last_ns } else { self.window.until_ns };
        until_ns.saturating_sub(self.window.from_ns) as f64 / 1e9
    }

    /// Good answers per second.
    pub fn throughput(&self, is_closed: bool) -> f64 {
        let seconds = self.seconds();
        match is_closed {
            true => self.closed_rate,
            false if seconds > 0.0 => self.answered as f64 / seconds,
            false => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const WINDOW: Window = Window { from_ns: 100 * MS, until_ns: 1_100 * MS };

    fn good(due: u64, sent: u64, done: u64) -> Outcome {
        let result = Ok(Answer { responses: 1, matches: true });
        Outcome { due_ns: due * MS, sent_ns: sent * MS, done_ns: done * MS, result }
    }

    fn bad(due: u64, code: &'static str, message: &str) -> Outcome {
        Outcome { result: Err(Failure { code, message: message.to_owned() }), ..good(due, due, due + 1) }
    }

    fn about(histogram: &Histogram<u64>, quantile: f64) -> f64 {
        histogram.value_at_quantile(quantile) as f64 / MS as f64
    }

    #[test]
    fn the_warm_up_and_the_time_after_are_not_measured() {
        let mut tally = Tally::new(WINDOW);
        assert!(!tally.add(&good(99, 99, 150)));
        assert!(tally.add(&good(100, 100, 101)));
        assert!(tally.add(&good(1_099, 1_099, 5_000)), "it was due in time");
        assert!(!tally.add(&good(1_100, 1_100, 1_101)));
        assert!(!tally.add(&good(20, 20, 30)));
        assert_eq!((tally.answered, tally.ended), (2, 4), "all but one ended after the warm-up");
        assert_eq!((tally.seconds(), tally.throughput(false)), (1.0, 2.0));
    }

    #[test]
    fn a_server_that_stands_still_is_charged_with_all_that_was_due() {
        // 1 request each ms, each answered within 1 ms, but for 500 ms nothing can be sent.
        let mut tally = Tally::new(WINDOW);
        for due in 100..1_100 {
            let sent = if (300..800).contains(&due) { 800 } else { due };
            tally.add(&good(due, sent, sent + 1));
        }
        assert!((about(&tally.latency, 0.5) - 1.0).abs() < 1.1, "half of them saw nothing of it");
        assert!((about(&tally.latency, 0.75) - 250.0).abs() < 5.0, "{}", about(&tally.latency, 0.75));
        assert!((about(&tally.latency, 0.99) - 490.0).abs() < 5.0, "{}", about(&tally.latency, 0.99));
        assert!((about(&tally.lag, 1.0) - 500.0).abs() < 5.0);
    }

    #[test]
    fn failures_are_counted_by_code_and_have_no_latency() {
        let mut tally = Tally::new(WINDOW);
        tally.add(&bad(200, "RESOURCE_EXHAUSTED", "full"));
        tally.add(&bad(300, "RESOURCE_EXHAUSTED", "still full"));
        tally.add(&bad(400, "UNAVAILABLE", "gone"));
        tally.add(&bad(50, "UNAVAILABLE", "before"));
        tally.add(&good(500, 500, 510));
        assert_eq!((tally.answered, tally.failed(), tally.latency.len()), (1, 3, 1));
        assert_eq!(tally.failures["RESOURCE_EXHAUSTED"], Failures { count: 2, example: "full".into() });
        assert_eq!(tally.failures["UNAVAILABLE"], Failures { count: 1, example: "gone".into() });
    }

    #[test]
    fn what_was_never_sent_is_counted_if_it_was_due_in_the_window() {
        let mut tally = Tally::new(WINDOW);
        [50, 100, 1_099, 1_100].iter().for_each(|due| tally.add_unsent(due * MS));
        assert_eq!(tally.unsent, 2);
    }

    #[test]
    fn a_closed_loop_counts_whole_batches() {
        // Two places, each batch of two takes 400 ms: 5 answers per second, though the window ends within a batch.
        let mut tally = Tally::new(WINDOW);
        for _place in 0..2 {
            let mut span = Span::default();
            for batch in 0..4 {
                let outcome = good(batch * 400, batch * 400, batch * 400 + 400);
                if tally.add(&outcome) {
                    span.add(&outcome);
                }
            }
            tally.add_span(&span);
        }
        assert!((tally.throughput(true) - 5.0).abs() < 1e-9, "{}", tally.throughput(true));
        assert_eq!(tally.answered, 4);
    }

    #[test]
    fn shares_add_up() {
        let (mut one, mut other) = (Tally::new(WINDOW), Tally::new(WINDOW));
        one.add(&good(200, 200, 210));
        one.add_unsent(300 * MS);
        other.add(&good(200, 200, 230));
        other.add(&bad(300, "INTERNAL", "x"));
        other.add(&Outcome { result: Ok(Answer { responses: 3, matches: false }), ..good(400, 400, 401) });
        other.streams = 4;
        one.merge(&other);
        assert_eq!((one.answered, one.failed(), one.unsent, one.mismatched), (3, 1, 1, 1));
        assert_eq!((one.responses, one.streams, one.ended, one.latency.len()), (5, 4, 4, 3));
        assert_eq!(one.last_ns, 401 * MS);
    }

    #[test]
    fn without_an_end_the_last_answer_is_the_end() {
        let mut tally = Tally::new(Window { from_ns: 100 * MS, until_ns: u64::MAX });
        tally.add(&good(100, 100, 200));
        tally.add(&good(200, 200, 600));
        assert_eq!((tally.seconds(), tally.throughput(false)), (0.5, 4.0));
    }
}
