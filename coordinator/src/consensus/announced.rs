//! Which feature levels the other coordinators say that they know.
//!
//! What a peer says holds for one connection: when that ends, the process behind it may come back as another version. So a
//! level rises by what is said now, and what was said last is only good for messages to people.
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use cresset_core::{PeerId, command::PEERS_MAX, level::Level};
use parking_lot::Mutex;

/// Most peers that are remembered: the members, and as many that would be.
const SAID_MAX: usize = 2 * PEERS_MAX;

/// What the peers say. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Announced(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    said: Mutex<BTreeMap<u64, Said>>,
    connections: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
struct Said {
    level: Level,
    /// The connection that it was said over, as long as it lasts.
    connection: Option<u64>,
}

/// What a peer says as long as this lives.
#[derive(Debug)]
pub(super) struct Heard {
    announced: Announced,
    peer: u64,
    level: Level,
    connection: u64,
}

impl Heard {
    /// What was said.
    pub(super) fn level(&self) -> Level {
        self.level
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        let mut said = self.announced.0.said.lock();
        // Its next connection may have begun before this one's end was noticed.
        if let Some(last) = said.get_mut(&self.peer).filter(|last| last.connection == Some(self.connection)) {
            last.connection = None;
        }
    }
}

impl Announced {
    /// A peer says, over a connection of its own, what it knows.
    pub(super) fn hear(&self, peer: u64, level: Level) -> Heard {
        let connection = self.0.connections.fetch_add(1, Ordering::Relaxed);
        let mut said = self.0.said.lock();
        if said.len() >= SAID_MAX {
            said.retain(|_, said| said.connection.is_some());
        }
        // With more connected than there can be members, some of them are none.
        if said.len() < SAID_MAX || said.contains_key(&peer) {
            said.insert(peer, Said { level, connection: Some(connection) });
        }
        Heard { announced: self.clone(), peer, level, connection }
    }

    /// What the peers say that are connected.
    pub(super) fn live(&self) -> BTreeMap<PeerId, Level> {
        let said = self.0.said.lock();
        said.iter().filter(|(_, said)| said.connection.is_some()).map(|(peer, said)| (PeerId(*peer), said.level)).collect()
    }

    /// What a peer said last, connected or not.
    pub(super) fn last(&self, peer: u64) -> Option<Level> {
        self.0.said.lock().get(&peer).map(|said| said.level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_holds_for_its_connection_only() {
        let announced = Announced::default();
        let old = announced.hear(2, 1);
        let third = announced.hear(3, 2);
        assert_eq!(announced.live(), BTreeMap::from([(PeerId(2), 1), (PeerId(3), 2)]));
        // The second comes back as a later version, before the end of its first connection is noticed.
        let new = announced.hear(2, 2);
        drop(old);
        assert_eq!((announced.live()[&PeerId(2)], new.level()), (2, 2));
        drop(third);
        assert_eq!((announced.live().get(&PeerId(3)), announced.last(3)), (None, Some(2)));
        assert_eq!(announced.last(9), None);
    }

    #[test]
    fn strangers_take_a_bounded_place() {
        let announced = Announced::default();
        let connected: Vec<Heard> = (0..1_000).map(|peer| announced.hear(peer, 1)).collect();
        assert_eq!(announced.live().len(), SAID_MAX);
        drop(connected);
        let _heard = announced.hear(5_000, 2);
        assert_eq!(announced.live(), BTreeMap::from([(PeerId(5_000), 2)]));
    }
}
