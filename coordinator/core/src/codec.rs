//! One byte that says what its reader has to know, then MessagePack with named fields.
//!
//! Named fields let a later version add a field with `#[serde(default)]` and still read what this one wrote. The
//! leading byte, a feature [`level`](crate::level), is for changes that this can't absorb: an unknown one is refused, never
//! guessed at. There is no checksum, since the log and the snapshot store keep their own.
use serde::{Serialize, de::DeserializeOwned};

use crate::level::{LEVEL_FIRST, Level};

/// Why bytes could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// There is nothing to read.
    #[error("{what} is empty")]
    Empty {
        /// What was being read.
        what: &'static str,
    },
    /// Written by a version of Cresset that this one doesn't know.
    #[error("{what} is of feature level {found}, this version of Cresset knows levels up to {known}; install a later one")]
    Level {
        /// What was being read.
        what: &'static str,
        /// The level that was found.
        found: Level,
        /// The highest that can be read.
        known: Level,
    },
    /// Damaged, or not what it claims to be.
    #[error("{what} can't be decoded: {source}")]
    Malformed {
        /// What was being read.
        what: &'static str,
        /// Where decoding stopped.
        source: rmp_serde::decode::Error,
    },
}

/// Writes `value` behind the level that its reader has to know.
pub(crate) fn encode<T: Serialize>(level: Level, value: &T) -> Vec<u8> {
    let mut bytes = vec![level];
    // Writing to memory doesn't fail, and none of our types has a shape that MessagePack lacks; a test encodes them all.
    rmp_serde::encode::write_named(&mut bytes, value).expect("plain data always encodes");
    bytes
}

/// Reads what [`encode`] wrote, with the level that it was written at, as one who knows the levels up to `known`.
pub(crate) fn decode<T: DeserializeOwned>(what: &'static str, known: Level, bytes: &[u8]) -> Result<(Level, T), DecodeError> {
    let (&found, body) = bytes.split_first().ok_or(DecodeError::Empty { what })?;
    if !(LEVEL_FIRST..=known).contains(&found) {
        return Err(DecodeError::Level { what, found, known });
    }
    let value = rmp_serde::from_slice(body).map_err(|source| DecodeError::Malformed { what, source })?;
    Ok((found, value))
}

/// Byte strings as MessagePack's `bin`; serde's default would write one number for each byte.
pub(crate) mod blob {
    use std::fmt;

    use bytes::Bytes;
    use serde::{Deserializer, Serializer, de};

    pub(crate) fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes::copy_from_slice(bytes))
            }
            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
                Ok(bytes.into())
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}
