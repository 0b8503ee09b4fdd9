//! Which replica takes the next request: power of two choices by work in flight × recent slowness.
//!
//! Two random candidates and the better of them: nearly as even as asking everybody, and routers that can't see each other
//! don't all run to the same idle replica. Replicas of the router's own zone come first; one of another zone is taken when it
//! is better by far. A fresh replica gets its full share only by and by. Pure: the randomness comes in as a value, the pick
//! goes out as an index.
//!
//! Sequences are placed by rendezvous hashing ([`place`]), so that every router puts a sequence on the same replica, and stick
//! to it until it fails. Those that had to move are remembered by their sessions.
use std::cmp::Ordering;

/// How much better a replica of another zone must be to be taken.
const FAR: f32 = 4.0;
/// So many candidates are all looked at.
const LOOKED_AT_MAX: usize = 16;
/// Of more, so many are drawn to find two that are fit.
const DRAWS_MAX: u64 = 20;
/// A fresh replica's share to begin with.
pub const SHARE_MIN: f32 = 0.1;

/// What the choice may know of one replica.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// A number that all routers know it by.
    pub id: u64,
    /// Requests that this router has at the replica.
    pub in_flight: u32,
    /// How long its answers took lately, as a multiple of what is usual for their models.
    pub slowness: f32,
    /// What part of its due it may get, above 0: less than 1 for a fresh one.
    pub share: f32,
    /// It is in another zone.
    pub far: bool,
    /// This request was there already, in vain.
    pub tried: bool,
    /// It failed a moment ago: taken only when nobody else is left.
    pub failing: bool,
}

impl Default for Candidate {
    fn default() -> Self {
        Self { id: 0, in_flight: 0, slowness: 1.0, share: 1.0, far: false, tried: false, failing: false }
    }
}

impl Candidate {
    fn cost(&self) -> f32 {
        let cost = (self.in_flight as f32 + 1.0) * self.slowness;
        if self.far { cost * FAR } else { cost }
    }
}

/// [`pick`] out of `count` candidates, of which `look` tells: all of a few are looked at, and a handful of many.
pub fn choose(count: usize, look: impl Fn(usize) -> Candidate, random: u64) -> Option<usize> {
    if count > LOOKED_AT_MAX {
        if let Some(index) = sample(count, &look, random) {
            return Some(index);
        }
        // Hardly any is fit, so that it takes a search.
        let all: Vec<Candidate> = (0..count).map(look).collect();
        return pick(&all, random);
    }
    let mut few = [Candidate::default(); LOOKED_AT_MAX];
    few.iter_mut().zip(0..count).for_each(|(candidate, index)| *candidate = look(index));
    pick(few.get(..count)?, random)
}

/// Draws until two of the zone are found that are fit; `None` if that isn't soon.
fn sample(count: usize, look: impl Fn(usize) -> Candidate, random: u64) -> Option<usize> {
    let (mut near, mut far) = (None, None);
    for draw in 0..DRAWS_MAX {
        let index = usize::try_from(mixed(random, 3 + draw) % count as u64).ok()?;
        let candidate = look(index);
        match near {
            _ if candidate.tried || candidate.failing => {}
            _ if candidate.far => far = far.or(Some((index, candidate))),
            None => near = Some((index, candidate)),
            Some((first, _)) if first == index => {}
            Some(first) => return best([Some(first), Some((index, candidate)), far], random),
        }
    }
    None
}

/// Picks one of `candidates`, or `None` when every one was tried. `random` should be uniform over all 64 bits.
pub fn pick(candidates: &[Candidate], random: u64) -> Option<usize> {
    let failing = only_failing_are_left(candidates)?;
    let fit = |far: bool| {
        let wanted = move |candidate: &Candidate| !candidate.tried && candidate.failing == failing && candidate.far == far;
        candidates.iter().enumerate().filter(move |(_, candidate)| wanted(candidate)).map(|(index, _)| index)
    };
    let (near, far) = (fit(false).count(), fit(true).count());
    let nth = |is_far: bool, index: usize| fit(is_far).nth(index);
    let drawn = match (near, far) {
        (0, 0) => return None,
        (0, _) => pair(far, random).map(|index| index.and_then(|index| nth(true, index))),
        (_, 0) => pair(near, random).map(|index| index.and_then(|index| nth(false, index))),
        // Two of the zone, and one from elsewhere in case that the zone is overrun.
        _ => {
            let [first, second, _] = pair(near, random).map(|index| index.and_then(|index| nth(false, index)));
            let third = usize::try_from(mixed(random, 1) % far as u64).ok().and_then(|index| nth(true, index));
            [first, second, third]
        }
    };
    best(drawn.map(|index| index.and_then(|index| Some((index, *candidates.get(index)?)))), random)
}

/// The best of those that were drawn, but for fresh ones that aren't due.
fn best(drawn: [Option<(usize, Candidate)>; 3], random: u64) -> Option<usize> {
    let dice = mixed(random, 2);
    let keys = drawn.into_iter().flatten().enumerate().map(|(draw, (index, candidate))| {
        // 16 bits of the dice for each of the drawn.
        let die = ((dice >> (16 * draw)) & 0xffff) as f32 / 65_536.0;
        (index, die >= candidate.share, candidate.cost())
    });
    let best = keys.min_by(|a, b| a.1.cmp(&b.1).then(a.2.partial_cmp(&b.2).unwrap_or(Ordering::Equal)));
    best.map(|(index, _, _)| index)
}

/// Places a sequence: the candidate that `key` likes best, out of those that don't have far more than their part. `None` when
/// every one was tried.
pub fn place(candidates: &[Candidate], key: u64) -> Option<usize> {
    let failing = only_failing_are_left(candidates)?;
    let fit = || candidates.iter().enumerate().filter(move |(_, candidate)| !candidate.tried && candidate.failing == failing);
    let (sum, count) = fit().fold((0_u64, 0_u64), |(sum, count), (_, c)| (sum + u64::from(c.in_flight), count + 1));
    // A quarter more than the mean, with this one counted, and rounded up.
    let most = (sum + 1).saturating_mul(5).div_ceil(4 * count.max(1));
    let has_room = |candidate: &Candidate| u64::from(candidate.in_flight) < most;
    let best = |far: bool| {
        let fit = fit().filter(|(_, candidate)| candidate.far == far && has_room(candidate));
        fit.max_by_key(|(_, candidate)| mixed(candidate.id, key)).map(|(index, _)| index)
    };
    best(false).or_else(|| best(true))
}

/// Whether all that were not tried are failing; `None` if all were tried.
fn only_failing_are_left(candidates: &[Candidate]) -> Option<bool> {
    let mut left = candidates.iter().filter(|candidate| !candidate.tried).map(|candidate| candidate.failing);
    let first = left.next()?;
    Some(first && left.all(|failing| failing))
}

/// A number for a name, the same in every process.
pub fn id_of(name: &str) -> u64 {
    // FNV-1a: short names, and no enemy.
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Random bits out of two words (the finalizer of SplitMix64).
pub fn mixed(word: u64, salt: u64) -> u64 {
    let mut z = word ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Two different indices below `count`, or the only one.
fn pair(count: usize, random: u64) -> [Option<usize>; 3] {
    if count < 2 {
        return [(count == 1).then_some(0), None, None];
    }
    let (first, second) = two(count, random);
    [Some(first), Some(second), None]
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

    /// How often each of `candidates` is picked in 4,000 draws.
    fn shares(candidates: &[Candidate]) -> Vec<u32> {
        let mut picks = vec![0; candidates.len()];
        for draw in 0..4_000 {
            picks[pick(candidates, mixed(draw, 77)).unwrap()] += 1;
        }
        picks
    }

    #[test]
    fn a_slow_replica_gets_less_at_the_same_load() {
        let slow = Candidate { slowness: 5.0, ..busy(2) };
        assert_eq!(shares(&[slow, busy(2)]), [0, 4_000]);
        assert_eq!(shares(&[slow, busy(20)]), [4_000, 0], "until the other has far more to do");
    }

    #[test]
    fn another_zone_is_for_when_this_one_is_overrun() {
        let far = |in_flight| Candidate { far: true, ..busy(in_flight) };
        assert_eq!(shares(&[busy(5), busy(5), far(2)])[2], 0);
        assert_eq!(shares(&[busy(50), busy(50), far(2)])[2], 4_000);
        assert_eq!(pick(&[far(9)], 3), Some(0), "better far than nobody");
        assert_eq!(shares(&[Candidate { failing: true, ..busy(0) }, far(9)]), [0, 4_000]);
    }

    #[test]
    fn a_fresh_replica_starts_slowly_and_is_no_worse_than_nobody() {
        let fresh = Candidate { share: SHARE_MIN, ..busy(0) };
        let picks = shares(&[fresh, busy(1)]);
        assert!((200..800).contains(&picks[0]), "about a tenth: {picks:?}");
        let all_fresh = shares(&[fresh, fresh]);
        assert!(all_fresh.iter().all(|count| (1_500..2_500).contains(count)), "{all_fresh:?}");
    }

    #[test]
    fn sequences_are_placed_alike_by_every_router_and_few_move_when_one_goes() {
        let names = ["w1", "w2", "w3", "w4"];
        let all: Vec<_> = names.iter().map(|name| Candidate { id: id_of(name), ..busy(1_000) }).collect();
        let mut without = all.clone();
        without[2].tried = true;
        let mut moved = 0;
        let mut counts = [0_u32; 4];
        for key in 0..1_000 {
            let home = place(&all, key).unwrap();
            counts[home] += 1;
            let next = place(&without, key).unwrap();
            assert_ne!(next, 2);
            moved += u32::from(next != home);
        }
        assert_eq!(moved, counts[2], "only those that were there");
        assert!(counts.iter().all(|count| (180..320).contains(count)), "{counts:?}");
    }

    #[test]
    fn no_replica_is_given_far_more_sequences_than_the_others() {
        let mut all: Vec<_> = (1..=3).map(|id| Candidate { id, ..busy(0) }).collect();
        for sequence in 0..300_u64 {
            let home = place(&all, mixed(sequence, 5)).unwrap();
            all[home].in_flight += 1;
        }
        let most = all.iter().map(|candidate| candidate.in_flight).max().unwrap();
        assert!(most <= 126, "{all:?}");
        assert_eq!(place(&[Candidate { tried: true, ..busy(0) }], 3), None);
    }

    #[test]
    fn of_many_only_a_handful_is_looked_at_and_all_have_their_turn() {
        let looks = std::cell::Cell::new(0_u32);
        let mut picks = vec![0_u32; 1_000];
        for draw in 0..20_000 {
            let look = |index: usize| {
                looks.set(looks.get() + 1);
                Candidate { failing: index.is_multiple_of(4), far: index % 4 == 1, ..busy(1) }
            };
            picks[choose(1_000, look, mixed(draw, 3)).unwrap()] += 1;
        }
        assert!(looks.get() < 20_000 * 6, "{looks:?}");
        let (taken, left): (Vec<_>, Vec<_>) = picks.iter().enumerate().partition(|(index, _)| index % 4 > 1);
        assert!(left.iter().all(|(_, count)| **count == 0), "{left:?}");
        assert!(taken.iter().all(|(_, count)| (15..75).contains(*count)), "40 each: {taken:?}");
    }

    #[test]
    fn the_last_one_that_is_fit_is_found_among_many() {
        let look = |index| Candidate { tried: index != 777, ..busy(9) };
        assert!((0..50).all(|draw| choose(1_000, look, mixed(draw, 9)) == Some(777)));
        assert_eq!(choose(1_000, |_| Candidate { tried: true, ..busy(0) }, 1), None);
        assert_eq!((choose(0, |_| busy(0), 1), choose(1, |_| busy(0), 1)), (None, Some(0)));
    }

    proptest! {
        #[test]
        fn picks_are_fit_and_never_the_busiest_of_all(
            loads in prop::collection::vec((0_u32..100, any::<bool>(), any::<bool>()), 0..12),
            random: u64,
        ) {
            let candidate = |&(in_flight, tried, failing)| Candidate { in_flight, tried, failing, ..Candidate::default() };
            let candidates: Vec<Candidate> = loads.iter().map(candidate).collect();
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
