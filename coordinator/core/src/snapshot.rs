//! The state as bytes, remembered commands included: a peer that starts from a snapshot must still know which commands
//! were applied.
use crate::{
    ClusterState,
    codec::{self, DecodeError},
    level::{LEVEL_KNOWN, Level},
};

/// The whole state as bytes.
pub fn encode(state: &ClusterState) -> Vec<u8> {
    codec::encode(state.level, state)
}

/// Reads what [`encode`] wrote.
///
/// # Errors
/// [`DecodeError`] if the bytes are damaged, or a level is in force that this version doesn't know.
pub fn decode(bytes: &[u8]) -> Result<ClusterState, DecodeError> {
    decode_knowing(LEVEL_KNOWN, bytes)
}

/// Reads what [`encode`] wrote, as a version does that knows no more than this level.
///
/// # Errors
/// As of [`decode`].
pub fn decode_knowing(known: Level, bytes: &[u8]) -> Result<ClusterState, DecodeError> {
    let (level, state) = codec::decode::<ClusterState>("snapshot", known, bytes)?;
    Ok(ClusterState { level, ..state })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        PeerId,
        state::{PeerInfo, Worker, WorkerState},
    };

    #[test]
    fn a_group_that_goes_on_from_a_state_mixes_with_nothing_of_before() {
        let mut state = ClusterState { epoch: 7, generation_last: 3, ..ClusterState::new("old") };
        let info = PeerInfo { grpc_address: "h:1".into(), http_address: "h:2".into(), peer_address: "h:3".into() };
        state.peers.insert(PeerId(2), info);
        state.founders.insert(PeerId(2));
        state.members.voters.insert(PeerId(2));
        state.peer_removed_last = Some(PeerId(1));
        let worker = Worker {
            incarnation: 5,
            incarnation_floor: 5,
            grpc_address: "w:1".into(),
            http_address: "w:2".into(),
            zone: String::new(),
            devices: vec![],
            state: WorkerState::Ready,
            tags: Default::default(),
        };
        state.workers.insert("w1".parse().unwrap(), worker);
        let new = state.clone().reborn("new", "checksum");
        assert_eq!((new.cluster_id.as_str(), new.origin.as_str(), &new.workers), ("new", "checksum", &state.workers));
        assert!(
            new.peers.is_empty() && new.founders.is_empty() && new.members.all().is_empty() && new.peer_removed_last.is_none()
        );
        assert!(new.epoch > state.epoch + 1_000_000 && new.generation_last > state.generation_last + 1_000_000);
        assert_eq!(decode(&encode(&new)).unwrap(), new);
    }
}
