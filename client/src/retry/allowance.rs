//! How many requests may be run again: a part of all requests, so that an outage isn't made worse by those who flee from it.
//!
//! A token bucket (Envoy and gRPC call it a retry budget): every request pays in a fifth, every repetition takes one out, and a
//! little comes with time, so that few requests can be repeated at any rate. Pure: the time comes in as a value; it fits into
//! 64 bits, so that a shared one is kept without a lock.

/// What a request pays in, in thousandths of a repetition: one in five may be repeated.
const PAID_IN_MILLIS: u32 = 200;
/// Repetitions that come with each second.
const PER_SECOND: u32 = 50;
/// Repetitions that can be saved up: what is in flight at a worker that dies has to move at once.
pub const SAVED_MAX: u32 = 2_000;
const SAVED_MILLIS_MAX: u32 = SAVED_MAX * 1_000;

/// What is saved up, as of a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    millis: u32,
    at_ms: u32,
}

impl Allowance {
    /// Everything that can be saved up.
    pub fn full() -> Self {
        Self { millis: SAVED_MILLIS_MAX, at_ms: 0 }
    }

    /// After one more request.
    #[must_use]
    pub fn paid_in(self, now_ms: u64) -> Self {
        let now = self.at(now_ms);
        Self { millis: (now.millis + PAID_IN_MILLIS).min(SAVED_MILLIS_MAX), ..now }
    }

    /// After one more repetition; `None` if there is nothing left for it.
    pub fn taken_out(self, now_ms: u64) -> Option<Self> {
        let now = self.at(now_ms);
        Some(Self { millis: now.millis.checked_sub(1_000)?, ..now })
    }

    fn at(self, now_ms: u64) -> Self {
        // Wraps after 49 days: whoever asks so rarely gets less than is due, once.
        let at_ms = (now_ms & u64::from(u32::MAX)) as u32;
        let since_ms = at_ms.wrapping_sub(self.at_ms);
        // A clock that was read before another thread's counts as the same moment.
        if since_ms > u32::MAX / 2 {
            return self;
        }
        let came = since_ms.saturating_mul(PER_SECOND);
        Self { millis: self.millis.saturating_add(came).min(SAVED_MILLIS_MAX), at_ms }
    }

    /// Both in one word.
    pub fn to_bits(self) -> u64 {
        u64::from(self.millis) << 32 | u64::from(self.at_ms)
    }

    /// Out of [`to_bits`](Self::to_bits)' word.
    pub fn from_bits(bits: u64) -> Self {
        Self { millis: (bits >> 32) as u32, at_ms: (bits & u64::from(u32::MAX)) as u32 }
    }
}

/// What a request pays in for second copies, in thousandths of one: one in twenty may have one.
const HEDGE_PAID_IN_MILLIS: u32 = 50;
/// Second copies that can be saved up, in thousandths.
const HEDGE_SAVED_MILLIS_MAX: u32 = 10_000;

/// What is saved up for second copies of requests that take long, in thousandths of a copy. Nothing to begin with, and nothing
/// comes with time, so that there are never more than one in twenty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HedgeAllowance(pub u32);

impl HedgeAllowance {
    /// After one more request.
    #[must_use]
    pub fn paid_in(self) -> Self {
        Self((self.0 + HEDGE_PAID_IN_MILLIS).min(HEDGE_SAVED_MILLIS_MAX))
    }

    /// After one more second copy; `None` if there is nothing left for it.
    pub fn taken_out(self) -> Option<Self> {
        self.0.checked_sub(1_000).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// How many of `requests`, one each `gap_ms`, can be repeated, from a full allowance on.
    fn repeated(requests: u64, gap_ms: u64) -> u64 {
        let mut allowance = Allowance::full();
        (0..requests).fold(0, |repeated, number| {
            allowance = allowance.paid_in(number * gap_ms);
            match allowance.taken_out(number * gap_ms) {
                Some(rest) => {
                    allowance = rest;
                    repeated + 1
                }
                None => repeated,
            }
        })
    }

    #[test]
    fn a_fifth_is_repeated_in_the_long_run_and_a_burst_all_of_it() {
        assert_eq!(repeated(2_000, 0), 2_000);
        let many = repeated(100_000, 1);
        // A fifth, what was saved up, and 50 a second.
        assert!((27_000 - 10..=27_000 + 10).contains(&many), "{many}");
    }

    #[test]
    fn few_requests_are_all_repeated_for_ever() {
        assert_eq!(repeated(20_000, 50), 20_000);
    }

    #[test]
    fn one_in_twenty_has_a_second_copy() {
        let mut saved = HedgeAllowance::default();
        let mut copies = 0;
        for requests in 1..=10_000_u32 {
            saved = saved.paid_in();
            if let Some(rest) = saved.taken_out() {
                (saved, copies) = (rest, copies + 1);
            }
            assert!(copies * 20 <= requests);
        }
        assert_eq!(copies, 500);
    }

    proptest! {
        #[test]
        fn never_more_than_what_was_paid_in(steps in prop::collection::vec((0_u64..100, any::<bool>()), 1..400)) {
            let mut allowance = Allowance::full();
            let (mut now_ms, mut paid, mut taken) = (0, 0_u64, 0_u64);
            for (pause_ms, pay) in steps {
                now_ms += pause_ms;
                if pay {
                    allowance = allowance.paid_in(now_ms);
                    paid += 1;
                } else if let Some(rest) = allowance.taken_out(now_ms) {
                    allowance = rest;
                    taken += 1;
                }
                prop_assert_eq!(Allowance::from_bits(allowance.to_bits()), allowance);
                let most = u64::from(SAVED_MAX) * 1_000 + paid * u64::from(PAID_IN_MILLIS) + now_ms * u64::from(PER_SECOND);
                prop_assert!(taken * 1_000 <= most);
            }
        }
    }
}
