//! The best classes of an output, as Triton's classification extension writes them: `SCORE:INDEX` or `SCORE:INDEX:LABEL`.
//! Pure.
use std::cmp::Ordering;

use bytes::{BufMut, Bytes, BytesMut};
use cresset_proto::tensor::Datatype;
use half::{bf16, f16};

/// The best `classes` of each row, best first, as BYTES in the wire's framing; and how many each row has.
///
/// `data` holds `rows` equal rows of row-major little-endian elements; a label is found by the class's index in its row.
pub fn best(datatype: Datatype, data: &[u8], rows: usize, classes: usize, labels: &[String]) -> (Bytes, usize) {
    let row_bytes = data.len().checked_div(rows).unwrap_or(0);
    let element_bytes = datatype.size().unwrap_or(1);
    let classes = classes.min(row_bytes / element_bytes);
    let mut framed = BytesMut::new();
    for row in data.chunks_exact(row_bytes.max(1)).take(rows) {
        let mut scores: Vec<(usize, Score)> =
            row.chunks_exact(element_bytes).map(|element| score(datatype, element)).enumerate().collect();
        // Equal scores keep their order; what is not a number comes last.
        scores.sort_by(|(_, a), (_, b)| b.partial_cmp(a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan())));
        for (index, score) in scores.into_iter().take(classes) {
            let mut text = format!("{score}:{index}");
            if let Some(label) = labels.get(index) {
                text.push(':');
                text.push_str(label);
            }
            framed.put_u32_le(u32::try_from(text.len()).unwrap_or(u32::MAX));
            framed.put_slice(text.as_bytes());
        }
    }
    (framed.freeze(), classes)
}

/// A score in its own kind: 64-bit integers don't fit a float.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Score {
    Signed(i64),
    Unsigned(u64),
    Float(f64),
}

impl Score {
    fn is_nan(self) -> bool {
        matches!(self, Self::Float(score) if score.is_nan())
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Signed(a), Self::Signed(b)) => a.partial_cmp(b),
            (Self::Unsigned(a), Self::Unsigned(b)) => a.partial_cmp(b),
            (Self::Float(a), Self::Float(b)) => a.partial_cmp(b),
            _ => None,
        }
    }
}

impl std::fmt::Display for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Signed(score) => write!(f, "{score}"),
            Self::Unsigned(score) => write!(f, "{score}"),
            // Six places, as C++'s to_string prints them.
            Self::Float(score) => write!(f, "{score:.6}"),
        }
    }
}

fn score(datatype: Datatype, element: &[u8]) -> Score {
    macro_rules! read {
        ($type:ty) => {
            element.try_into().map(<$type>::from_le_bytes).unwrap_or_default()
        };
    }
    match datatype {
        Datatype::Int8 => Score::Signed(read!(i8).into()),
        Datatype::Int16 => Score::Signed(read!(i16).into()),
        Datatype::Int32 => Score::Signed(read!(i32).into()),
        Datatype::Int64 => Score::Signed(read!(i64)),
        Datatype::Uint16 => Score::Unsigned(read!(u16).into()),
        Datatype::Uint32 => Score::Unsigned(read!(u32).into()),
        Datatype::Uint64 => Score::Unsigned(read!(u64)),
        Datatype::Fp16 => Score::Float(f16::from_bits(read!(u16)).into()),
        Datatype::Bf16 => Score::Float(bf16::from_bits(read!(u16)).into()),
        Datatype::Fp32 => Score::Float(read!(f32).into()),
        Datatype::Fp64 => Score::Float(read!(f64)),
        // BYTES are refused when the request is admitted.
        Datatype::Bool | Datatype::Uint8 | Datatype::Bytes => Score::Unsigned(element.first().copied().unwrap_or(0).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(framed: &[u8]) -> Vec<String> {
        let (mut rest, mut texts) = (framed, vec![]);
        while let Some((length, tail)) = rest.split_first_chunk::<4>() {
            let (text, tail) = tail.split_at(u32::from_le_bytes(*length) as usize);
            texts.push(String::from_utf8(text.to_vec()).unwrap());
            rest = tail;
        }
        texts
    }

    #[test]
    fn the_best_come_first_in_tritons_words() {
        let ints: Vec<u8> = [1i32, 30, 28, 2].iter().flat_map(|value| value.to_le_bytes()).collect();
        let (framed, classes) = best(Datatype::Int32, &ints, 1, 2, &[]);
        assert_eq!((texts(&framed), classes), (vec!["30:1".to_owned(), "28:2".to_owned()], 2));
        let floats: Vec<u8> = [0.25f32, f32::NAN, 0.75, 0.5].iter().flat_map(|value| value.to_le_bytes()).collect();
        let labels = ["cat".to_owned(), "dog".to_owned()];
        let (framed, classes) = best(Datatype::Fp32, &floats, 2, 9, &labels);
        assert_eq!(
            (texts(&framed), classes),
            (vec!["0.250000:0:cat".into(), "NaN:1:dog".into(), "0.750000:0:cat".into(), "0.500000:1:dog".into()], 2)
        );
    }

    #[test]
    fn large_integers_are_told_apart() {
        let numbers: Vec<u8> = [u64::MAX - 1, u64::MAX].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(texts(&best(Datatype::Uint64, &numbers, 1, 1, &[]).0), ["18446744073709551615:1"]);
    }
}
