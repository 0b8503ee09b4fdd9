//! The state as bytes, remembered commands included: a peer that starts from a snapshot must still know which commands
//! were applied.
use crate::{
    ClusterState,
    codec::{self, DecodeError},
};

const FORMAT: u8 = 1;

/// The whole state as bytes.
pub fn encode(state: &ClusterState) -> Vec<u8> {
    codec::encode(FORMAT, state)
}

/// Reads what [`encode`] wrote.
///
/// # Errors
/// [`DecodeError`] if the bytes are damaged or of a later format.
pub fn decode(bytes: &[u8]) -> Result<ClusterState, DecodeError> {
    codec::decode("snapshot", FORMAT, bytes)
}
