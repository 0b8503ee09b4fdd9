//! Who can reach whom, and how long it takes.
use std::collections::BTreeSet;

use rand::{Rng, rngs::StdRng};

use super::{MS, Us};

/// Somebody with an address: coordinators count from 1, everybody else from 100.
pub(super) type Address = u64;

/// A network in which every packet finds its own way.
#[derive(Debug, Default)]
pub(super) struct Network {
    /// One-way cuts, from whom to whom.
    cut: BTreeSet<(Address, Address)>,
    /// Packets of a thousand that are lost, and that come twice.
    pub(super) lost_permille: u32,
    pub(super) repeated_permille: u32,
    /// Packets of a thousand that are overtaken by those sent later.
    pub(super) late_permille: u32,
}

impl Network {
    /// When the copies of a packet arrive; none if it is lost.
    pub(super) fn route(&self, from: Address, to: Address, now: Us, random: &mut StdRng) -> Vec<Us> {
        if self.cut.contains(&(from, to)) || random.random_ratio(self.lost_permille, 1_000) {
            return vec![];
        }
        let copies = if random.random_ratio(self.repeated_permille, 1_000) { 2 } else { 1 };
        let mut delay = || {
            let usual = random.random_range(200..2 * MS);
            if random.random_ratio(self.late_permille, 1_000) { usual + random.random_range(0..200 * MS) } else { usual }
        };
        (0..copies).map(|_| now + delay()).collect()
    }

    /// Whether a packet would arrive at all.
    pub(super) fn is_cut(&self, from: Address, to: Address) -> bool {
        self.cut.contains(&(from, to))
    }

    /// Cuts the way from each of `left` to each of `right`, and back unless `one_way`.
    pub(super) fn cut(&mut self, left: &[Address], right: &[Address], one_way: bool) {
        for &from in left {
            for &to in right.iter().filter(|&&to| to != from) {
                self.cut.insert((from, to));
                if !one_way {
                    self.cut.insert((to, from));
                }
            }
        }
    }

    /// Everybody reaches everybody again.
    pub(super) fn heal(&mut self) {
        *self = Self::default();
    }

    /// Takes cuts back, and leaves the weather as it is.
    pub(super) fn mend(&mut self) {
        self.cut.clear();
    }
}
