//! Names of commands.
use std::fmt;

use serde::{Deserialize, Serialize};

/// Names a command in all its retries: 16 bytes that its caller chose at random.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CommandId(pub [u8; 16]);

impl TryFrom<&[u8]> for CommandId {
    type Error = CommandIdError;
    fn try_from(bytes: &[u8]) -> Result<Self, CommandIdError> {
        let bytes = bytes.try_into().map_err(|_| CommandIdError { found: bytes.len() })?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for CommandId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for CommandId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A command id of the wrong length.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("command_id has {found} bytes, it must have 16: choose them at random and keep them in every retry")]
pub struct CommandIdError {
    /// Bytes that were there.
    pub found: usize,
}
