//! Three members that agree, whichever system they are.

use std::{collections::BTreeMap, future::Future, path::Path, time::Duration};

use anyhow::{Context, bail};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::harness::{Cluster, Launch, ModelRepository};

/// How long a group may take until it is whole: all members there, one of them leading, the others caught up.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a member may take to say where it stands.
const LOOK_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a write may take.
pub(super) const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks at what can't be watched.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Where a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// It leads.
    pub(super) leads: bool,
    /// It leads, or knows who does.
    pub(super) is_led: bool,
    /// The last entry that it has applied.
    pub(super) applied: u64,
}

/// A way to one member.
pub(super) trait Client: Clone + Send + Sync + 'static {
    /// The system's key in the results.
    const NAME: &'static str;

    /// Over this channel.
    fn new(channel: Channel) -> Self;

    /// Has a command agreed on that changes something of this writer's.
    fn write(&self, writer: usize, number: u64) -> impl Future<Output = Result<(), Status>> + Send;

    /// Where the member stands.
    fn look(&self) -> impl Future<Output = Result<Seen, Status>> + Send;
}

/// A running group.
pub(super) struct Group<C> {
    cluster: Cluster,
    clients: BTreeMap<String, C>,
    /// What coordinators read models from; it goes when they do.
    _repository: Option<ModelRepository>,
}

impl<C: Client> Group<C> {
    /// Starts the members and waits until the group is whole.
    pub(super) async fn start(
        data_dir: &Path,
        launches: Vec<Launch>,
        repository: Option<ModelRepository>,
    ) -> anyhow::Result<Self> {
        let cluster = Cluster::launch(data_dir, launches)?;
        let client = |id: String| Ok((id.clone(), C::new(channel(cluster.grpc(&id)?)?)));
        let clients = cluster.ids().into_iter().map(client).collect::<anyhow::Result<_>>()?;
        let group = Self { cluster, clients, _repository: repository };
        group.whole().await?;
        Ok(group)
    }

    /// The processes.
    pub(super) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Starts a member again that was killed.
    pub(super) fn restart(&mut self, id: &str) -> anyhow::Result<()> {
        Ok(self.cluster.restart_process(id)?)
    }

    /// A client with a connection of its own.
    pub(super) fn client(&self, id: &str) -> anyhow::Result<C> {
        Ok(C::new(channel(self.cluster.grpc(id)?)?))
    }

    /// The clients of the members but for this one.
    pub(super) fn survivors(&self, dead: &str) -> Vec<C> {
        self.clients.iter().filter(|(id, _)| *id != dead).map(|(_, client)| client.clone()).collect()
    }

    async fn look(&self, id: &str) -> Option<Seen> {
        timeout(LOOK_TIMEOUT, self.clients.get(id)?.look()).await.ok()?.ok()
    }

    /// Waits until every member is there and has applied what the leader had when that was first seen. Returns who leads.
    pub(super) async fn whole(&self) -> anyhow::Result<String> {
        let deadline = Instant::now() + WHOLE_TIMEOUT;
        let mut looks = interval(LOOK_AGAIN);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut goal = None;
        while Instant::now() < deadline {
            looks.tick().await;
            let mut seen = Vec::new();
            for id in self.clients.keys() {
                seen.extend(self.look(id).await.map(|seen| (id, seen)));
            }
            let Some((leader, leading)) = seen.iter().find(|(_, seen)| seen.leads) else { continue };
            let goal = *goal.get_or_insert(leading.applied);
            if seen.len() == self.clients.len() && seen.iter().all(|(_, seen)| seen.is_led && seen.applied >= goal) {
                return Ok((*leader).clone());
            }
        }
        bail!("{} isn't whole after {WHOLE_TIMEOUT:?}\n{}", C::NAME, self.cluster.tails());
    }
}

fn channel(address: &str) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).with_context(|| format!("'{address}' is no address"))?;
    Ok(endpoint.connect_timeout(LOOK_TIMEOUT).tcp_nodelay(true).connect_lazy())
}
