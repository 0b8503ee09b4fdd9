//! One byte of format version, then MessagePack with named fields.
//!
//! Named fields let a later version add a field with `#[serde(default)]` and still read what this one wrote. The
//! leading byte is for changes that this can't absorb: an unknown one is refused, never guessed at. There is no
//! checksum, since the log and the snapshot store keep their own.
use serde::{Serialize, de::DeserializeOwned};

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
    #[error("{what} has format {found}, this version reads {known}; upgrade this process")]
    Format {
        /// What was being read.
        what: &'static str,
        /// The format that was found.
        found: u8,
        /// The format that can be read.
        known: u8,
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

/// Writes `value` behind its format byte.
pub(crate) fn encode<T: Serialize>(format: u8, value: &T) -> Vec<u8> {
    let mut bytes = vec![format];
    // Writing to memory doesn't fail, and none of our types has a shape that MessagePack lacks; a test encodes them all.
    rmp_serde::encode::write_named(&mut bytes, value).expect("plain data always encodes");
    bytes
}

/// Reads what [`encode`] wrote.
pub(crate) fn decode<T: DeserializeOwned>(what: &'static str, known: u8, bytes: &[u8]) -> Result<T, DecodeError> {
    let (&found, body) = bytes.split_first().ok_or(DecodeError::Empty { what })?;
    if found != known {
        return Err(DecodeError::Format { what, found, known });
    }
    rmp_serde::from_slice(body).map_err(|source| DecodeError::Malformed { what, source })
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
