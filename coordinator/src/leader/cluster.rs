//! What the leader's duties need of consensus, and nothing else of it: so they can be tested without a log or a network.
use std::{collections::BTreeMap, fmt::Display, future::Future, time::Duration};

use cresset_core::{ClusterState, Command, CommandBody, CommandId, Outcome, PeerId, level::Level, state::Epoch};
use futures::{StreamExt, stream::BoxStream};
use tokio::time::Instant;
use tokio_stream::wrappers::WatchStream;

use crate::consensus::{self, Consensus, Leadership, ProposeError, ReadError};

/// Who leads, as this coordinator knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Role {
    /// The election that this is about.
    pub term: u64,
    /// Whether this coordinator leads.
    pub leads: bool,
    /// Who does, if known.
    pub leader: Option<PeerId>,
}

/// The coordinators' agreement, seen from one of them.
pub trait Cluster: Clone + Send + Sync + 'static {
    /// Why something couldn't be agreed on; it may have been nevertheless.
    type ProposeError: Display + Send + 'static;
    /// Why the state here isn't known to be current.
    type ReadError: Display + Send + 'static;

    /// Agrees on a command under a new id. Returns once it is applied, here too if this coordinator leads.
    fn propose(&self, body: CommandBody) -> impl Future<Output = Result<Outcome, Self::ProposeError>> + Send;

    /// Returns once the state here holds everything that was agreed on before the call.
    fn catch_up(&self) -> impl Future<Output = Result<(), Self::ReadError>> + Send;

    /// Looks at the state as it was applied here. It must be quick: nothing is applied meanwhile.
    fn read<R>(&self, look: impl FnOnce(&ClusterState) -> R) -> R;

    /// A copy of the state as it was applied here, without the answers to past commands: to be looked at for as long as it takes.
    fn view(&self) -> ClusterState;

    /// The highest feature level that each coordinator says that it knows, of those that are connected with this one; and of
    /// itself.
    fn levels_known(&self) -> BTreeMap<PeerId, Level>;

    /// Who leads now.
    fn role(&self) -> Role;

    /// Who leads: now, and after each change. Ends with the process.
    fn roles(&self) -> BoxStream<'static, Role>;

    /// The epoch of the state: now, and after each change. Ends with the process.
    fn epochs(&self) -> BoxStream<'static, Epoch>;

    /// The index of the state: now, and after each change, also one that no worker or router is told of. Ends with the
    /// process.
    fn indexes(&self) -> BoxStream<'static, u64>;
}

/// How long one attempt to catch up may take.
const CATCH_UP: Duration = Duration::from_secs(1);

impl Cluster for Consensus {
    type ProposeError = ProposeError;
    type ReadError = ReadError;

    async fn propose(&self, body: CommandBody) -> Result<Outcome, ProposeError> {
        // The duties propose anew, from what the state is then, rather than the same again; so every proposal has its own id.
        let command = Command { id: CommandId(rand::random()), body };
        Consensus::propose(self, &command).await
    }

    async fn catch_up(&self) -> Result<(), ReadError> {
        self.read_barrier(Instant::now() + CATCH_UP).await.map(|_| ())
    }

    fn read<R>(&self, look: impl FnOnce(&ClusterState) -> R) -> R {
        look(&self.state())
    }

    fn view(&self) -> ClusterState {
        Consensus::view(self)
    }

    fn levels_known(&self) -> BTreeMap<PeerId, Level> {
        Consensus::levels_known(self)
    }

    fn role(&self) -> Role {
        Role::from(&*self.leadership().borrow())
    }

    fn roles(&self) -> BoxStream<'static, Role> {
        WatchStream::new(self.leadership()).map(|leadership| Role::from(&leadership)).boxed()
    }

    fn epochs(&self) -> BoxStream<'static, Epoch> {
        WatchStream::new(self.epoch()).boxed()
    }

    fn indexes(&self) -> BoxStream<'static, u64> {
        WatchStream::new(self.applied()).map(|applied| applied.index).boxed()
    }
}

impl From<&Leadership> for Role {
    fn from(leadership: &Leadership) -> Self {
        let leads = leadership.role == consensus::Role::Leader;
        Self { term: leadership.term, leads, leader: leadership.leader.map(PeerId) }
    }
}
