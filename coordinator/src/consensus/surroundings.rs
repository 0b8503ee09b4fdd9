//! What consensus takes from the world around it, so that a test can be another world: a disk, a network and chance.
//!
//! Time is tokio's, which a test's runtime may have stand still.
use std::sync::Arc;

use futures::future::BoxFuture;
use rand::Rng as _;
use tonic::transport::{Channel, Endpoint, Error};

use super::node::{ElectionDraw, Round};

/// A number from 0 to 1, another one each time.
pub type Chance = Arc<dyn Fn() -> f64 + Send + Sync>;

/// The world around one peer.
pub struct Surroundings<L> {
    /// Its disk.
    pub log: L,
    /// The way to the other peers.
    pub network: Arc<dyn Network>,
    /// What decides where nothing else does: election timeouts, and pauses before another attempt.
    pub chance: Chance,
}

impl<L> Surroundings<L> {
    /// A log on a real disk, TCP, and the thread's own random numbers.
    pub(super) fn real(log: L) -> Self {
        Self { log, network: Arc::new(Tcp), chance: Arc::new(|| rand::rng().random_range(0.0..1.0)) }
    }
}

/// How peers are connected to.
pub trait Network: Send + Sync + 'static {
    /// A connection; ready when this returns.
    fn connect(&self, endpoint: Endpoint) -> BoxFuture<'static, Result<Channel, Error>>;

    /// A channel that connects once it is used, and again after it broke. Must be called inside a tokio runtime.
    fn connect_lazily(&self, endpoint: Endpoint) -> Channel;
}

/// The network that there is.
struct Tcp;

impl Network for Tcp {
    fn connect(&self, endpoint: Endpoint) -> BoxFuture<'static, Result<Channel, Error>> {
        Box::pin(async move { endpoint.connect().await })
    }

    fn connect_lazily(&self, endpoint: Endpoint) -> Channel {
        endpoint.connect_lazy()
    }
}

/// Draws election timeouts in ticks, from `min` up to but not including `max`.
pub(super) fn election_draw(chance: Chance, min: usize, max: usize) -> ElectionDraw {
    Box::new(move |_: Round| min + ((max.saturating_sub(min)) as f64 * chance()) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn election_timeouts_are_spread_over_their_range() {
        let drawn = |chance: f64| election_draw(Arc::new(move || chance), 6, 12)(Round { id: 1, term: 1, number: 0 });
        assert_eq!([0.0, 0.49, 0.5, 0.999].map(drawn), [6, 8, 9, 11]);
    }
}
