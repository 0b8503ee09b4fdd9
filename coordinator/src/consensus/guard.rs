//! What may be said to the raft library: it panics on messages that no honest peer sends.
//!
//! Only types that peers exchange get through, and only with numbers that an honest peer could have sent. What the library
//! forwards by itself (proposals, reads, transfers) is dropped: Cresset has calls for that. The sender needn't be a member, as
//! far as this peer knows: one that was away, or is new, learns who the members are from a leader that it doesn't know yet. Who
//! was removed is kept out by the peer service.
use std::collections::BTreeSet;

use raft::{
    Raft, StateRole, Storage,
    eraftpb::{ConfState, Entry, EntryType, Message, MessageType},
};

use super::node::is_change;

/// Terms and indexes stay far below the end of their type, so that arithmetic on them can't overflow.
const NUMBER_MAX: u64 = 1 << 48;
/// Most entries in one message; those of the largest message are fewer.
const ENTRIES_MAX: usize = 1 << 18;

/// Why a peer's message was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("message of type {kind} from c{from} refused: {problem}")]
pub struct Refused {
    /// Who sent it.
    pub from: u64,
    /// Its type.
    pub kind: &'static str,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// Checks a message that arrived from `from`.
///
/// # Errors
/// [`Refused`]; the library must not see it.
pub(super) fn check<S: Storage>(raft: &Raft<S>, from: u64, message: &Message) -> Result<(), Refused> {
    let (kind, problem) = (name(message.get_msg_type()), problem(raft, from, message));
    problem.map_or(Ok(()), |problem| Err(Refused { from, kind, problem }))
}

fn problem<S: Storage>(raft: &Raft<S>, from: u64, message: &Message) -> Option<&'static str> {
    let unlike = |bad: bool, problem: &'static str| bad.then_some(problem);
    let numbers = [
        message.term,
        message.log_term,
        message.index,
        message.commit,
        message.commit_term,
        message.reject_hint,
        message.request_snapshot,
    ];
    unlike(message.from != from, "it names another sender")
        .or_else(|| unlike(message.to != raft.id, "it is for another peer"))
        .or_else(|| unlike(from == raft.id || from == 0 || from > NUMBER_MAX, "its sender can't be a peer"))
        // Term 0 means a local message to the library, which trusts those.
        .or_else(|| unlike(message.term == 0, "it has no term"))
        .or_else(|| unlike(numbers.iter().any(|&number| number > NUMBER_MAX), "a number is beyond reason"))
        .or_else(|| of_type(raft, message))
}

fn of_type<S: Storage>(raft: &Raft<S>, message: &Message) -> Option<&'static str> {
    let unlike = |bad: bool, problem: &'static str| bad.then_some(problem);
    let last_index = raft.raft_log.last_index();
    let current = message.term >= raft.term;
    match message.get_msg_type() {
        MessageType::MsgAppend => entries_problem(raft, message),
        MessageType::MsgHeartbeat => unlike(current && message.commit > last_index, "it commits entries that aren't there"),
        MessageType::MsgSnapshot => {
            let metadata = message.get_snapshot().get_metadata();
            unlike(metadata.index == 0 || metadata.index > NUMBER_MAX, "its index is out of range")
                .or_else(|| unlike(metadata.term == 0 || metadata.term > message.term, "its term is out of range"))
                .or_else(|| members_problem(metadata.get_conf_state(), raft.id))
        }
        MessageType::MsgAppendResponse => unlike(message.request_snapshot != 0, "it asks for a snapshot")
            .or_else(|| unlike(current && message.index > last_index, "it acknowledges entries that aren't there"))
            .or_else(|| unlike(message.reject_hint > message.index, "its hint is beyond its index")),
        MessageType::MsgTimeoutNow => {
            let leads = message.term == raft.term && message.from == raft.leader_id;
            unlike(!leads || raft.state != StateRole::Follower, "its sender doesn't lead this peer")
        }
        MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgHeartbeatResponse => None,
        MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgPropose
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum
        | MessageType::MsgTransferLeader
        | MessageType::MsgReadIndex
        | MessageType::MsgReadIndexResp => Some("peers don't send this type"),
    }
}

/// Entries must follow each other and the entry before them, in index and in term.
fn entries_problem<S: Storage>(raft: &Raft<S>, message: &Message) -> Option<&'static str> {
    if message.entries.len() > ENTRIES_MAX {
        return Some("it has too many entries");
    }
    // The library takes term 0 for that of any entry beyond the log, and would commit and append there.
    if message.log_term == 0 || message.log_term > message.term {
        return Some("the term before its entries is out of range");
    }
    if raft.state == StateRole::Leader && message.term == raft.term {
        return Some("this peer leads its term");
    }
    let mut term = message.log_term;
    for (position, entry) in message.entries.iter().enumerate() {
        if entry.index != message.index + 1 + position as u64 {
            return Some("its entries leave a gap");
        }
        if entry.term < term || entry.term == 0 || entry.term > message.term {
            return Some("the terms of its entries are out of order");
        }
        if !entry_is_known(entry) {
            return Some("it has an entry of an unknown kind");
        }
        term = entry.term;
    }
    None
}

fn entry_is_known(entry: &Entry) -> bool {
    match entry.get_entry_type() {
        EntryType::EntryNormal => true,
        EntryType::EntryConfChangeV2 => is_change(entry),
        EntryType::EntryConfChange => false,
    }
}

/// The library panics on members that contradict each other, and ignores a snapshot without the peer that gets it.
fn members_problem(conf: &ConfState, id: u64) -> Option<&'static str> {
    let set = |peers: &[u64]| peers.iter().copied().collect::<BTreeSet<u64>>();
    let (voters, outgoing, learners) = (set(&conf.voters), set(&conf.voters_outgoing), set(&conf.learners));
    let twice =
        voters.len() + outgoing.len() + learners.len() != conf.voters.len() + conf.voters_outgoing.len() + conf.learners.len();
    let all = || voters.iter().chain(&outgoing).chain(&learners);
    let contradict = voters.is_empty()
        || twice
        || !learners.is_disjoint(&voters)
        || !learners.is_disjoint(&outgoing)
        // Cresset makes no learner of a voter.
        || !conf.learners_next.is_empty()
        || conf.auto_leave == outgoing.is_empty()
        || all().any(|peer| *peer == 0 || *peer > NUMBER_MAX);
    if contradict {
        return Some("its members can't be");
    }
    (!all().any(|peer| *peer == id)).then_some("this peer isn't among its members")
}

fn name(kind: MessageType) -> &'static str {
    match kind {
        MessageType::MsgHup => "hup",
        MessageType::MsgBeat => "beat",
        MessageType::MsgPropose => "propose",
        MessageType::MsgAppend => "append",
        MessageType::MsgAppendResponse => "append_response",
        MessageType::MsgRequestVote => "request_vote",
        MessageType::MsgRequestVoteResponse => "request_vote_response",
        MessageType::MsgSnapshot => "snapshot",
        MessageType::MsgHeartbeat => "heartbeat",
        MessageType::MsgHeartbeatResponse => "heartbeat_response",
        MessageType::MsgUnreachable => "unreachable",
        MessageType::MsgSnapStatus => "snapshot_status",
        MessageType::MsgCheckQuorum => "check_quorum",
        MessageType::MsgTransferLeader => "transfer_leader",
        MessageType::MsgTimeoutNow => "timeout_now",
        MessageType::MsgReadIndex => "read_index",
        MessageType::MsgReadIndexResp => "read_index_response",
        MessageType::MsgRequestPreVote => "request_pre_vote",
        MessageType::MsgRequestPreVoteResponse => "request_pre_vote_response",
    }
}
