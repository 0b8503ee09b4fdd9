//! The seal around a sequence's state: what it is, of which format and model, and that it is whole.
//!
//! `CRSTSTAT`, u16 format, u64 fingerprint of the model's attributes, u32 CRC-32 of the state, then
//! the state as `native/state.h` lays it out. Numbers are little-endian.

use bytes::{BufMut, Bytes, BytesMut};

const MAGIC: &[u8; 8] = b"CRSTSTAT";
const FORMAT: u16 = 1;
const HEADER_BYTES: usize = MAGIC.len() + 2 + 8 + 4;

/// Why bytes are not a checkpoint of this model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("the bytes are not a checkpoint")]
    NotACheckpoint,
    #[error("its format is {0}, this build reads {FORMAT}")]
    Format(u16),
    #[error("it is of another model")]
    OtherModel,
    #[error("it is damaged")]
    Damaged,
}

pub fn seal(fingerprint: u64, state: &[u8]) -> Bytes {
    let mut sealed = BytesMut::with_capacity(HEADER_BYTES + state.len());
    sealed.put_slice(MAGIC);
    sealed.put_u16_le(FORMAT);
    sealed.put_u64_le(fingerprint);
    sealed.put_u32_le(crc32fast::hash(state));
    sealed.put_slice(state);
    sealed.freeze()
}

pub fn unseal(fingerprint: u64, sealed: &[u8]) -> Result<&[u8], SealError> {
    let rest = sealed.strip_prefix(MAGIC).ok_or(SealError::NotACheckpoint)?;
    let (format, rest) = rest.split_first_chunk().ok_or(SealError::NotACheckpoint)?;
    let format = u16::from_le_bytes(*format);
    if format != FORMAT {
        return Err(SealError::Format(format));
    }
    let (model, rest) = rest.split_first_chunk().ok_or(SealError::Damaged)?;
    let (sum, state) = rest.split_first_chunk().ok_or(SealError::Damaged)?;
    if u64::from_le_bytes(*model) != fingerprint {
        return Err(SealError::OtherModel);
    }
    if u32::from_le_bytes(*sum) != crc32fast::hash(state) {
        return Err(SealError::Damaged);
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_opens_for_its_model_only() {
        let sealed = seal(7, b"state");
        assert_eq!(unseal(7, &sealed), Ok(&b"state"[..]));
        assert_eq!(unseal(8, &sealed), Err(SealError::OtherModel));
        assert_eq!(unseal(7, b""), Err(SealError::NotACheckpoint));
        let mut newer = sealed.to_vec();
        newer[8] = 2;
        assert_eq!(unseal(7, &newer), Err(SealError::Format(2)));
    }

    #[test]
    fn every_cut_and_every_flip_is_noticed() {
        let sealed = seal(7, b"some state");
        for length in 0..sealed.len() {
            assert!(unseal(7, &sealed[..length]).is_err(), "cut to {length}");
        }
        for at in 0..sealed.len() * 8 {
            let mut flipped = sealed.to_vec();
            flipped[at / 8] ^= 1 << (at % 8);
            assert!(unseal(7, &flipped).is_err(), "flip of bit {at}");
        }
    }
}
