//! What happens to the hosts, their disks and the network between them.
use std::{collections::BTreeMap, rc::Rc, time::Duration};

use cresset_tests::simulation::disk::Fail;
use rand::{Rng, rngs::StdRng, seq::IteratorRandom};
use turmoil::Sim;

use super::{
    IDS,
    coordinator::{Shelf, name},
    witness::CHAOS_END,
};

/// What heals something, when its time has come.
#[derive(Debug)]
enum Healing {
    Restart(u64),
    Repair(u64, u64),
    /// What one end's messages to the other were kept from.
    RepairOneWay(u64, u64),
    Release(u64, u64),
    Hasten(u64, u64),
    KeepAll,
}

/// The faults of one run.
pub struct Faults {
    random: StdRng,
    shelves: BTreeMap<u64, Rc<Shelf>>,
    next: Duration,
    healings: Vec<(Duration, Healing)>,
    /// Links are either held or cut in one direction: turmoil can't have both.
    holds: bool,
    pub crashes: u64,
    pub cuts: u64,
}

const LATENCY_MAX: Duration = Duration::from_millis(4);

impl Faults {
    pub fn new(random: StdRng, shelves: BTreeMap<u64, Rc<Shelf>>, holds: bool) -> Self {
        Self { random, shelves, next: Duration::from_secs(2), healings: Vec::new(), holds, crashes: 0, cuts: 0 }
    }

    /// Does what is due.
    pub fn turn(&mut self, sim: &mut Sim<'_>) {
        let now = sim.elapsed();
        for id in IDS {
            // A disk failed, and with it the process: something starts it again, as systemd would.
            let is_awaited = self.healings.iter().any(|(_, healing)| matches!(healing, Healing::Restart(of) if *of == id));
            if !is_awaited && !sim.is_host_running(name(id)) {
                self.lose_memory(id);
                let back = now + self.millis(50..1_500);
                self.healings.push((back, Healing::Restart(id)));
            }
        }
        let is_over = now >= CHAOS_END;
        let due = self.healings.extract_if(.., |(at, _)| is_over || *at <= now).collect::<Vec<_>>();
        due.iter().for_each(|(_, healing)| self.heal(sim, healing));
        if now >= self.next && !is_over {
            self.hurt(sim, now);
            self.next = now + self.millis(100..3_000);
        }
    }

    fn hurt(&mut self, sim: &mut Sim<'_>, now: Duration) {
        let a = IDS.choose(&mut self.random).unwrap_or(1);
        let b = IDS.filter(|id| *id != a).choose(&mut self.random).unwrap_or(2);
        let end = now + self.millis(200..6_000);
        let healings = match self.random.random_range(0..8) {
            0 | 1 => {
                if sim.is_host_running(name(a)) {
                    self.silently(sim, a, |sim| sim.crash(name(a)));
                    self.lose_memory(a);
                    self.crashes += 1;
                }
                vec![Healing::Restart(a)]
            }
            2 => {
                let fail = if self.random.random() { Fail::Before } else { Fail::After };
                let writes = self.random.random_range(0..20);
                self.shelves[&a].disk.borrow().knobs.fails.set(Some((writes, fail)));
                vec![]
            }
            3 => {
                self.cuts += 1;
                sim.partition(name(a), name(b));
                vec![Healing::Repair(a, b)]
            }
            4 => {
                self.cuts += 1;
                let others: Vec<u64> = IDS.filter(|id| *id != a).collect();
                others.iter().for_each(|other| sim.partition(name(a), name(*other)));
                others.iter().map(|other| Healing::Repair(a, *other)).collect()
            }
            5 if self.holds => {
                sim.hold(name(a), name(b));
                vec![Healing::Release(a, b)]
            }
            5 => {
                self.cuts += 1;
                sim.partition_oneway(name(a), name(b));
                vec![Healing::RepairOneWay(a, b)]
            }
            6 => {
                let latency = self.millis(50..400);
                sim.set_link_max_message_latency(name(a), name(b), latency);
                vec![Healing::Hasten(a, b)]
            }
            _ => {
                sim.set_fail_rate(0.002);
                vec![Healing::KeepAll]
            }
        };
        self.healings.extend(healings.into_iter().map(|healing| (end, healing)));
    }

    fn heal(&self, sim: &mut Sim<'_>, healing: &Healing) {
        match *healing {
            Healing::Restart(id) if sim.is_host_running(name(id)) => {}
            Healing::Restart(id) => self.silently(sim, id, |sim| sim.bounce(name(id))),
            Healing::Repair(a, b) | Healing::RepairOneWay(a, b) => self.reconnect(sim, a, b),
            Healing::Release(a, b) => {
                sim.release(name(a), name(b));
                self.reconnect(sim, a, b);
            }
            Healing::Hasten(a, b) => sim.set_link_max_message_latency(name(a), name(b), LATENCY_MAX),
            Healing::KeepAll => sim.set_fail_rate(0.0),
        }
    }

    /// Ends what runs on a host, as a power failure would: nobody hears of it. The runtime drops its tasks in an order that depends on
    /// everything else in this process, so what they say then would, too.
    fn silently(&self, sim: &mut Sim<'_>, id: u64, end: impl FnOnce(&mut Sim<'_>)) {
        let others: Vec<u64> = IDS.filter(|other| *other != id).collect();
        others.iter().for_each(|other| sim.partition(name(id), name(*other)));
        end(sim);
        others.iter().for_each(|other| self.reconnect(sim, id, *other));
    }

    /// Repairs a link, but for what is still to be wrong with it.
    fn reconnect(&self, sim: &Sim<'_>, a: u64, b: u64) {
        sim.repair(name(a), name(b));
        for (_, healing) in &self.healings {
            match *healing {
                Healing::Repair(x, y) if is_same(x, y, a, b) => sim.partition(name(x), name(y)),
                Healing::RepairOneWay(x, y) if is_same(x, y, a, b) => sim.partition_oneway(name(x), name(y)),
                Healing::Release(x, y) if is_same(x, y, a, b) => sim.hold(name(x), name(y)),
                _ => {}
            }
        }
    }

    fn lose_memory(&mut self, id: u64) {
        self.shelves[&id].disk.borrow_mut().crash(&mut self.random);
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.random.random_range(range))
    }
}

/// Whether these are the two ends of the same link.
fn is_same(x: u64, y: u64, a: u64, b: u64) -> bool {
    (x, y) == (a, b) || (y, x) == (a, b)
}

/// A network in which nothing is wrong.
pub fn calm(seed: u64) -> turmoil::Builder {
    let mut builder = turmoil::Builder::new();
    builder
        .rng_seed(seed)
        .epoch(std::time::SystemTime::UNIX_EPOCH)
        .simulation_duration(Duration::from_secs(3_600))
        .max_message_latency(LATENCY_MAX)
        .tcp_capacity(1_024)
        .enable_random_order();
    builder
}
