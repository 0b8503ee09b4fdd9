//! Who the coordinators are, and changes of that.
use std::collections::BTreeMap;

use cresset_core::{Command, CommandBody, CommandId, PeerId, members::MemberChange};
use cresset_proto::{
    admin::v1::{
        AddMember, Member, MemberRole, MembersRequest, MembersResponse, PromoteMember, RemoveMember,
        change_members_request::Change,
    },
    reason::Reason,
};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::Status;

use super::{Context, deploy::epoch_of, status::LEADER_TIMEOUT};
use crate::consensus::{MemberSeen, TransferError};

/// Reads what is wanted.
///
/// # Errors
/// A status that names the field.
pub(super) fn change(change: Option<Change>) -> Result<MemberChange, Status> {
    match change {
        None => Err(Reason::InvalidArgument.status("change is missing: add, promote or remove")),
        Some(Change::Add(AddMember { id, peer_address })) => Ok(MemberChange::Add { peer: peer("add.id", &id)?, peer_address }),
        Some(Change::Promote(PromoteMember { id, replaces })) => {
            let replaces = if replaces.is_empty() { None } else { Some(peer("promote.replaces", &replaces)?) };
            Ok(MemberChange::Promote { peer: peer("promote.id", &id)?, replaces })
        }
        Some(Change::Remove(RemoveMember { id })) => Ok(MemberChange::Remove { peer: peer("remove.id", &id)? }),
    }
}

fn peer(field: &str, id: &str) -> Result<PeerId, Status> {
    id.parse().map_err(|error| Reason::InvalidArgument.status(format!("{field}: {error}")))
}

fn transfer_status(error: &TransferError) -> Status {
    let reason = match error {
        TransferError::NotLeader { .. } | TransferError::Shutdown => Reason::NoLeader,
        TransferError::Refused { .. } | TransferError::TimedOut => Reason::Conflict,
        TransferError::Unreachable { .. } => Reason::Indeterminate,
    };
    reason.status(error.to_string())
}

impl Context {
    /// The members, as the leader knows them, or else as they are known here.
    pub(super) async fn members(&self) -> MembersResponse {
        if let Some(mut leader) = self.leader()
            && let Ok(Ok(answer)) = timeout(LEADER_TIMEOUT, leader.members(MembersRequest {})).await
        {
            return answer.into_inner();
        }
        let current = self.consensus.read_barrier(Instant::now() + LEADER_TIMEOUT).await.is_ok();
        let seen = self.consensus.members_seen().await;
        self.own_members(&seen, current && !seen.is_empty())
    }

    fn own_members(&self, seen: &[MemberSeen], current: bool) -> MembersResponse {
        let leader = self.consensus.raft().borrow().leader;
        let seen: BTreeMap<u64, &MemberSeen> = seen.iter().map(|seen| (seen.id, seen)).collect();
        let state = self.consensus.state();
        let members = &state.members;
        let role = |peer: &PeerId| match (members.voters.contains(peer), members.learners.contains(peer)) {
            (true, _) => MemberRole::Voter,
            (false, true) => MemberRole::Learner,
            (false, false) => MemberRole::Leaving,
        };
        let member = |peer: PeerId| {
            let info = state.peers.get(&peer).cloned();
            Member {
                id: peer.to_string(),
                role: role(&peer).into(),
                leads: leader == Some(peer.0),
                peer_address: info.as_ref().map(|info| info.peer_address.clone()).unwrap_or_default(),
                grpc_address: info.as_ref().map(|info| info.grpc_address.clone()).unwrap_or_default(),
                http_address: info.map(|info| info.http_address).unwrap_or_default(),
                answers: seen.get(&peer.0).is_some_and(|seen| seen.answers),
                behind: seen.get(&peer.0).map_or(0, |seen| seen.behind),
            }
        };
        let all = members.all();
        let last = all.iter().next_back().copied().max(state.peer_removed_last);
        let next = PeerId(last.map_or(1, |last| last.0.saturating_add(1)));
        MembersResponse { members: all.into_iter().map(member).collect(), current, next_id: next.to_string() }
    }

    /// Has a change agreed on, and waits until nobody who leaves is needed any more.
    pub(super) async fn change_members(&self, id: CommandId, change: &MemberChange, deadline: Instant) -> Result<u64, Status> {
        let command = Command { id, body: CommandBody::ChangeMembers(change.clone()) };
        let outcome = self.agree(&command, deadline).await?;
        let mut applied = self.consensus.applied();
        let complete = applied.wait_for(|_| self.consensus.state().members.reflect(change));
        match timeout_at(deadline, complete).await {
            Ok(_) => Ok(epoch_of(&outcome)),
            Err(_) => Err(Reason::Indeterminate.status(
                "the change is agreed on, but not complete: a majority of the voters of before and of those of after has to answer; it goes on by itself, `cresset member list` shows it",
            )),
        }
    }

    /// Has the leader hand over, to this voter or to any.
    pub(super) async fn transfer_leadership(&self, to: &str, deadline: Instant) -> Result<PeerId, Status> {
        let to = if to.is_empty() { None } else { Some(peer("to", to)?.0) };
        let done = self.consensus.transfer_leadership(to, deadline).await.map_err(|error| transfer_status(&error))?;
        match to.filter(|to| *to != done) {
            Some(to) => Err(transfer_status(&TransferError::Refused {
                problem: format!("c{to} didn't take over, c{done} leads now; `cresset member list` shows whether it answers"),
            })),
            None => Ok(PeerId(done)),
        }
    }
}
