//! How slow something has been lately: a value with a time, which fades.
//!
//! Pure: samples and times come in, a new value goes out. It fits into 64 bits, so that a shared one is kept without a lock.

/// After so long, a value counts for a third of what it did.
pub const FADES_MS: f32 = 2_000.0;
/// After so long, the longest of the last seconds counts for a third.
const CREST_FADES_MS: f32 = 10_000.0;
/// A sample counts at least for the rest, also when many come in one millisecond.
const KEPT_MAX: f32 = 0.98;
/// No replica counts as slower than this many times the usual: more would only make the balance swing.
pub const SLOWNESS_MAX: f32 = 16.0;

/// A value as of a moment. The default was never observed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Recent {
    value: f32,
    at_ms: u32,
}

impl Recent {
    /// Whether there was no sample yet.
    pub fn is_unknown(self) -> bool {
        self.value <= 0.0
    }

    /// The value, however old it is; 0 when there was no sample.
    pub fn value(self) -> f32 {
        self.value
    }

    /// After one more sample: the mean of the recent ones.
    #[must_use]
    pub fn mean(self, sample: f32, now_ms: u64) -> Self {
        if self.is_unknown() {
            return Self { value: sample, at_ms: wrapped(now_ms) };
        }
        let kept = self.kept(now_ms).min(KEPT_MAX);
        Self { value: self.value * kept + sample * (1.0 - kept), at_ms: wrapped(now_ms) }
    }

    /// After one more sample: at least that sample, so that a replica that gets slow is known for it at once and trusted again
    /// only by and by.
    #[must_use]
    pub fn peak(self, sample: f32, now_ms: u64) -> Self {
        if sample > self.value { Self { value: sample, at_ms: wrapped(now_ms) } } else { self.mean(sample, now_ms) }
    }

    /// After one more sample: the longest of the last seconds.
    #[must_use]
    pub fn crest(self, sample: f32, now_ms: u64) -> Self {
        if sample >= self.crested(now_ms) { Self { value: sample, at_ms: wrapped(now_ms) } } else { self }
    }

    /// The longest of the last seconds, as of now.
    pub fn crested(self, now_ms: u64) -> f32 {
        self.value * (-(wrapped(now_ms).wrapping_sub(self.at_ms) as f32) / CREST_FADES_MS).exp()
    }

    /// The value now, when without news it fades to `rest`.
    pub fn faded(self, rest: f32, now_ms: u64) -> f32 {
        if self.is_unknown() { rest } else { rest + (self.value - rest) * self.kept(now_ms) }
    }

    /// How much of an old value still counts.
    fn kept(self, now_ms: u64) -> f32 {
        // Wraps after 49 days: a value of before that counts as new once, and fades again.
        let age_ms = wrapped(now_ms).wrapping_sub(self.at_ms);
        (-(age_ms as f32) / FADES_MS).exp()
    }

    /// Both in one word.
    pub fn to_bits(self) -> u64 {
        u64::from(self.value.to_bits()) << 32 | u64::from(self.at_ms)
    }

    /// Out of [`to_bits`](Self::to_bits)' word.
    pub fn from_bits(bits: u64) -> Self {
        Self { value: f32::from_bits((bits >> 32) as u32), at_ms: wrapped(bits) }
    }
}

/// The low half.
fn wrapped(word: u64) -> u32 {
    (word & u64::from(u32::MAX)) as u32
}

/// How far one sample moves the 95th percentile, as a part of it.
const P95_STEP: f32 = 0.0025;

/// The 95th percentile after one more sample; 0 for unknown. It settles where one sample in twenty is above.
pub fn p95(known: f32, sample: f32) -> f32 {
    if known <= 0.0 {
        sample
    } else if sample > known {
        (known * (1.0 + 19.0 * P95_STEP)).min(sample)
    } else {
        known * (1.0 - P95_STEP)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_95th_percentile_is_found_and_followed() {
        let mut known = 0.0;
        // A full-period walk over 0..1000, again and again.
        let mut follow = |scale: f32| {
            for number in 0..5_000_u32 {
                known = p95(known, (number * 389 % 1_000) as f32 * scale);
            }
            known
        };
        let (first, later) = (follow(1.0), follow(10.0));
        assert!((850.0..1_000.0).contains(&first) && (8_500.0..10_000.0).contains(&later), "{first} {later}");
    }

    #[test]
    fn a_peak_is_believed_at_once_and_fades() {
        let slow = Recent::default().peak(1.0, 0).peak(9.0, 10);
        assert_eq!(slow.value(), 9.0);
        let later = slow.faded(1.0, 10 + FADES_MS as u64);
        assert!((3.5..4.5).contains(&later), "{later}");
        assert!((slow.faded(1.0, 60_000) - 1.0).abs() < 0.001);
        let again = slow.peak(1.0, 1_010);
        assert!(again.value() < 9.0 && again.value() > 4.0, "{again:?}");
    }

    #[test]
    fn the_longest_stays_for_seconds_however_many_come_after_it() {
        let mut longest = Recent::default().crest(900.0, 0);
        for now_ms in 1..1_000 {
            longest = longest.crest(5.0, now_ms);
        }
        assert!(longest.crested(1_000) > 800.0 && longest.crested(60_000) < 5.0, "{longest:?}");
    }

    #[test]
    fn what_was_never_seen_is_at_rest() {
        assert_eq!(Recent::default().faded(1.0, 5), 1.0);
        assert_eq!(Recent::default().mean(7.0, 5).value(), 7.0);
    }

    proptest! {
        #[test]
        fn one_word_holds_it(value in 0.0_f32..1e9, at_ms: u32, samples in prop::collection::vec((0.0_f32..1e6, 0_u64..10_000), 1..20)) {
            let recent = Recent { value, at_ms };
            prop_assert_eq!(Recent::from_bits(recent.to_bits()), recent);
            let (mut now_ms, mut mean) = (0, Recent::default());
            let most = samples.iter().map(|sample| sample.0).fold(0.0, f32::max);
            for (sample, pause_ms) in samples {
                now_ms += pause_ms;
                mean = mean.mean(sample, now_ms);
                prop_assert!(mean.value() <= most * 1.001);
            }
        }
    }
}
