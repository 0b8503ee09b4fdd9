//! Which replica takes the next request: power of two choices by requests in flight.
//!
//! Two random candidates and the less busy of them: nearly as even as asking everybody, and routers that can't see each
//! other don't all run to the same idle replica. Pure: the randomness comes in as a value, the pick goes out as an index.
//! Sequences are not balanced here after their first request: they stick to their replica until it fails.

/// What the choice may know of one replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Candidate {
    /// Requests that this router has at the replica.
    pub in_flight: u32,
    /// This request was there already, in vain.
    pub tried: bool,
    /// It failed a moment ago: taken only when nobody else is left.
    pub failing: bool,
}

/// Picks one of `candidates`, or `None` when every one was tried. `random` should be uniform over all 64 bits.
pub fn pick(candidates: &[Candidate], random: u64) -> Option<usize> {
    let eligible = |failing: bool| {
        let wanted = move |candidate: &Candidate| !candidate.tried && candidate.failing == failing;
        candidates.iter().enumerate().filter(move |(_, candidate)| wanted(candidate)).map(|(index, _)| index)
    };
    let mut fit: Vec<usize> = eligible(false).collect();
    if fit.is_empty() {
        fit = eligible(true).collect();
    }
    match fit.len() {
        0 => None,
        1 => fit.first().copied(),
        count => {
            let (first, second) = two(count, random);
            let (first, second) = (*fit.get(first)?, *fit.get(second)?);
            let busy = |index: usize| candidates.get(index).map_or(u32::MAX, |candidate| candidate.in_flight);
            Some(if busy(second) < busy(first) { second } else { first })
        }
    }
}

/// Two different indices below `count` (at least 2), each half of `random` deciding one.
fn two(count: usize, random: u64) -> (usize, usize) {
    let (high, low) = ((random >> 32) as usize, (random & 0xffff_ffff) as usize);
    let first = high % count;
    let second = low % (count - 1);
    (first, if second >= first { second + 1 } else { second })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn busy(in_flight: u32) -> Candidate {
        Candidate { in_flight, ..Candidate::default() }
    }

    #[test]
    fn nobody_is_left_when_all_were_tried() {
        assert_eq!(pick(&[], 7), None);
        assert_eq!(pick(&[Candidate { tried: true, ..busy(0) }], 7), None);
    }

    #[test]
    fn a_failing_replica_is_the_last_resort() {
        let failing = Candidate { failing: true, ..busy(0) };
        for random in 0..100_u64 {
            assert_eq!(pick(&[failing, busy(50)], random << 31 | random), Some(1));
        }
        assert_eq!(pick(&[failing, Candidate { tried: true, ..busy(0) }], 3), Some(0));
    }

    #[test]
    fn the_less_busy_of_two_is_taken() {
        for random in [0, 1, u64::MAX, 0x0000_0001_0000_0000, 0xdead_beef_0bad_cafe] {
            assert_eq!(pick(&[busy(5), busy(1)], random), Some(1));
            assert_eq!(pick(&[busy(1), busy(5)], random), Some(0));
        }
    }

    proptest! {
        #[test]
        fn picks_are_fit_and_never_the_busiest_of_all(
            loads in prop::collection::vec((0_u32..100, any::<bool>(), any::<bool>()), 0..12),
            random: u64,
        ) {
            let candidates: Vec<Candidate> =
                loads.iter().map(|&(in_flight, tried, failing)| Candidate { in_flight, tried, failing }).collect();
            match pick(&candidates, random) {
                None => prop_assert!(candidates.iter().all(|candidate| candidate.tried)),
                Some(index) => {
                    let picked = candidates[index];
                    prop_assert!(!picked.tried);
                    let peers: Vec<_> =
                        candidates.iter().filter(|c| !c.tried && c.failing == picked.failing).collect();
                    prop_assert!(!picked.failing || candidates.iter().all(|c| c.tried || c.failing));
                    let busier = peers.iter().filter(|c| c.in_flight >= picked.in_flight).count();
                    prop_assert!(peers.len() == 1 || busier >= 2);
                }
            }
        }

        #[test]
        fn two_are_always_two(count in 2_usize..64, random: u64) {
            let (first, second) = two(count, random);
            prop_assert!(first != second && first < count && second < count);
        }

        #[test]
        fn equal_loads_spread(seed: u64) {
            // A cheap full-period generator stands in for randomness.
            let mut random = seed;
            let mut picks = [0_u32; 4];
            for _ in 0..4_000 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let mixed = (random ^ (random >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                picks[pick(&[busy(0); 4], mixed ^ (mixed >> 32)).unwrap()] += 1;
            }
            prop_assert!(picks.iter().all(|count| (700..1_300).contains(count)), "{picks:?}");
        }
    }
}
