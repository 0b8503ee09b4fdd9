//! Arrays of numpy in and out: any byte order and either memory order in, little-endian row-major out.
use std::{io, path::Path};

use bytes::Bytes;
use cresset_proto::tensor::{Datatype, Tensor, element_count};

use crate::values::{self, Scalar, frame, scalars};

/// Why a file can't be an input, or an output can't be saved.
#[derive(Debug, thiserror::Error)]
pub enum NpyError {
    #[error("{path}: {}", crate::settings::plain(error))]
    Io { path: String, error: io::Error },
    #[error("{path}: not a .npy file: {error}")]
    Header { path: String, error: &'static str },
    #[error("{path}: numpy's type {dtype} has no counterpart on the wire")]
    Dtype { path: String, dtype: String },
    #[error("{path}: {got} bytes of data, {expected} are needed for its shape {shape:?}")]
    Length { path: String, got: usize, expected: usize, shape: Vec<i64> },
    #[error("{path}: has an element that is not text")]
    Text { path: String },
}

/// Reads a `.npy` file as the tensor `name`.
///
/// # Errors
/// [`NpyError`] names the file.
pub fn read(path: &Path, name: &str) -> Result<Tensor, NpyError> {
    let shown = path.display().to_string();
    let file = std::fs::read(path).map_err(|error| NpyError::Io { path: shown.clone(), error })?;
    parse(&file, name, &shown)
}

/// What stands before the data.
#[derive(Debug, PartialEq, Eq)]
struct Header<'a> {
    descr: &'a str,
    is_fortran: bool,
    shape: Vec<i64>,
}

/// A numpy type of one plain kind, as in `<f4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Dtype {
    kind: char,
    is_big: bool,
    /// Bytes, or characters for `U`.
    size: usize,
}

impl Dtype {
    fn parse(descr: &str) -> Option<Self> {
        let mut chars = descr.chars();
        let (order, kind) = (chars.next()?, chars.next()?);
        let is_known = matches!(order, '<' | '>' | '|') && chars.as_str().bytes().all(|byte| byte.is_ascii_digit());
        is_known.then_some(Self { kind, is_big: order == '>', size: chars.as_str().parse().ok()? })
    }

    fn bytes(self) -> Option<usize> {
        if self.kind == 'U' { self.size.checked_mul(4) } else { Some(self.size) }
    }

    fn datatype(self) -> Option<Datatype> {
        Some(match (self.kind, self.size) {
            ('b', 1) => Datatype::Bool,
            ('u', 1) => Datatype::Uint8,
            ('u', 2) => Datatype::Uint16,
            ('u', 4) => Datatype::Uint32,
            ('u', 8) => Datatype::Uint64,
            ('i', 1) => Datatype::Int8,
            ('i', 2) => Datatype::Int16,
            ('i', 4) => Datatype::Int32,
            ('i', 8) => Datatype::Int64,
            ('f', 2) => Datatype::Fp16,
            ('f', 4) => Datatype::Fp32,
            ('f', 8) => Datatype::Fp64,
            ('S' | 'U', size) if size > 0 => Datatype::Bytes,
            _ => return None,
        })
    }
}

/// Splits a file into its header and its data; the error says what is wrong with the header.
fn split(file: &[u8]) -> Result<(Header<'_>, &[u8]), &'static str> {
    let rest = file.strip_prefix(b"\x93NUMPY").ok_or("it doesn't begin like one")?;
    let cut = "it ends within its header";
    let (&[major, _minor], rest) = rest.split_first_chunk::<2>().ok_or(cut)?;
    let (length, rest) = match major {
        1 => rest.split_first_chunk().map(|(length, rest)| (u32::from(u16::from_le_bytes(*length)), rest)).ok_or(cut)?,
        2 | 3 => rest.split_first_chunk().map(|(length, rest)| (u32::from_le_bytes(*length), rest)).ok_or(cut)?,
        _ => return Err("its version is unknown"),
    };
    let (text, data) = rest.split_at_checked(length as usize).ok_or(cut)?;
    let text = std::str::from_utf8(text).map_err(|_| "its header is not text")?;
    let header = header(text).ok_or("its header lacks a plain descr, fortran_order or shape")?;
    Ok((header, data))
}

/// Reads the header, a literal of Python with three keys.
fn header(text: &str) -> Option<Header<'_>> {
    let after = |key: &str| text.split_once(key).map(|(_, rest)| rest.trim_start_matches([' ', ':']));
    let descr = after("'descr'")?;
    let descr = match descr.strip_prefix('\'') {
        Some(plain) => plain.split_once('\'')?.0,
        // A record or an array type: as it stands, for the message.
        None => descr.split_once("'fortran_order'").map_or(descr, |(descr, _)| descr).trim_end_matches([' ', ',']),
    };
    let is_fortran = match after("'fortran_order'")? {
        yes if yes.starts_with("True") => true,
        no if no.starts_with("False") => false,
        _ => return None,
    };
    let (dims, _) = after("'shape'")?.strip_prefix('(')?.split_once(')')?;
    let dims = dims.split(',').map(str::trim).filter(|dim| !dim.is_empty());
    let shape = dims.map(|dim| dim.parse().ok().filter(|dim| *dim >= 0)).collect::<Option<Vec<i64>>>()?;
    Some(Header { descr, is_fortran, shape })
}

fn parse(file: &[u8], name: &str, path: &str) -> Result<Tensor, NpyError> {
    let (header, data) = split(file).map_err(|error| NpyError::Header { path: path.to_owned(), error })?;
    let unknown = || NpyError::Dtype { path: path.to_owned(), dtype: crate::output::one_line(header.descr) };
    let dtype = Dtype::parse(header.descr).ok_or_else(unknown)?;
    let (datatype, size) = dtype.datatype().zip(dtype.bytes()).ok_or_else(unknown)?;
    let shape = header.shape;
    let expected = element_count(&shape).unwrap_or(usize::MAX).saturating_mul(size);
    if data.len() != expected {
        return Err(NpyError::Length { path: path.to_owned(), got: data.len(), expected, shape });
    }
    let rows = if header.is_fortran { row_major(data, &shape, size) } else { data.to_vec() };
    let data = match datatype {
        Datatype::Bytes => texts(&rows, dtype, size).ok_or_else(|| NpyError::Text { path: path.to_owned() })?,
        _ if dtype.is_big => rows.chunks_exact(size).flat_map(|one| one.iter().rev().copied()).collect(),
        _ => rows,
    };
    Ok(values::tensor(name, datatype, shape, data))
}

/// Column-major elements of `size` bytes in row-major order.
fn row_major(data: &[u8], shape: &[i64], size: usize) -> Vec<u8> {
    let dims: Vec<usize> = shape.iter().map(|dim| usize::try_from(*dim).unwrap_or(0)).collect();
    let mut strides = Vec::with_capacity(dims.len());
    let mut stride = 1;
    for dim in &dims {
        strides.push(stride);
        stride *= dim;
    }
    let mut out = Vec::with_capacity(data.len());
    let mut index = vec![0usize; dims.len()];
    for _ in 0..stride {
        let at: usize = index.iter().zip(&strides).map(|(position, stride)| position * stride).sum();
        out.extend_from_slice(&data[at * size..(at + 1) * size]);
        for axis in (0..dims.len()).rev() {
            index[axis] += 1;
            if index[axis] < dims[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    out
}

/// Fixed-width texts, framed for the wire without numpy's padding.
fn texts(rows: &[u8], dtype: Dtype, size: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for element in rows.chunks_exact(size) {
        let text = if dtype.kind == 'S' {
            element.to_vec()
        } else {
            let (points, _) = element.as_chunks::<4>();
            let point = |point: &[u8; 4]| {
                char::from_u32(if dtype.is_big { u32::from_be_bytes(*point) } else { u32::from_le_bytes(*point) })
            };
            points.iter().map(point).collect::<Option<String>>()?.into_bytes()
        };
        let end = text.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        out.extend(frame(&text[..end])?);
    }
    Some(out)
}

/// Saves a tensor. BF16, which numpy lacks, becomes f4; BYTES become fixed-width byte strings.
///
/// # Errors
/// [`NpyError::Io`] when the file can't be written.
pub fn write(path: &Path, tensor: &Tensor) -> Result<(), NpyError> {
    std::fs::write(path, encode(tensor)).map_err(|error| NpyError::Io { path: path.display().to_string(), error })
}

fn encode(tensor: &Tensor) -> Vec<u8> {
    const ALIGNMENT: usize = 64;
    const PREFIX: usize = 10;
    let (descr, data) = numpy_data(tensor);
    let dims: String = tensor.shape.iter().map(|dim| format!("{dim},")).collect();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}");
    let padding = ALIGNMENT - (PREFIX + header.len() + 1) % ALIGNMENT;
    header.extend(std::iter::repeat_n(' ', padding % ALIGNMENT));
    header.push('\n');
    let mut out = b"\x93NUMPY\x01\0".to_vec();
    // A rank is at most 16: a header is never near 64 KiB.
    out.extend_from_slice(&u16::try_from(header.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&data);
    out
}

fn numpy_data(tensor: &Tensor) -> (String, Bytes) {
    let plain = |descr: &str| (descr.to_owned(), tensor.data.clone());
    match tensor.datatype {
        Datatype::Bool => plain("|b1"),
        Datatype::Uint8 => plain("|u1"),
        Datatype::Uint16 => plain("<u2"),
        Datatype::Uint32 => plain("<u4"),
        Datatype::Uint64 => plain("<u8"),
        Datatype::Int8 => plain("|i1"),
        Datatype::Int16 => plain("<i2"),
        Datatype::Int32 => plain("<i4"),
        Datatype::Int64 => plain("<i8"),
        Datatype::Fp16 => plain("<f2"),
        Datatype::Fp32 => plain("<f4"),
        Datatype::Fp64 => plain("<f8"),
        Datatype::Bf16 => {
            let wide = |scalar| if let Scalar::Float(value) = scalar { value as f32 } else { 0.0 };
            ("<f4".to_owned(), scalars(tensor).flat_map(|scalar| wide(scalar).to_le_bytes()).collect())
        }
        Datatype::Bytes => {
            let bytes_of = |scalar| if let Scalar::Text(text) = scalar { text } else { vec![] };
            let texts: Vec<Vec<u8>> = scalars(tensor).map(bytes_of).collect();
            let width = texts.iter().map(Vec::len).max().unwrap_or(0).max(1);
            let padded = |mut text: Vec<u8>| {
                text.resize(width, 0);
                text
            };
            (format!("|S{width}"), texts.into_iter().flat_map(padded).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::values::{json_values, tensor};

    fn file(descr: &str, fortran: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        let mut out = b"\x93NUMPY\x01\0".to_vec();
        out.extend_from_slice(&(header.len() as u16).to_le_bytes());
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(data);
        out
    }

    #[test]
    fn both_byte_orders_and_both_memory_orders_are_read() {
        let big: Vec<u8> = (1i32..=6).flat_map(i32::to_be_bytes).collect();
        let read = parse(&file(">i4", "False", "(2, 3)", &big), "X", "x.npy").unwrap();
        assert_eq!((read.datatype, read.shape.as_slice()), (Datatype::Int32, &[2, 3][..]));
        assert_eq!(json_values(&read), serde_json::json!([1, 2, 3, 4, 5, 6]));
        let columns: Vec<u8> = [1i16, 4, 2, 5, 3, 6].iter().flat_map(|v| v.to_le_bytes()).collect();
        let read = parse(&file("<i2", "True", "(2, 3)", &columns), "X", "x.npy").unwrap();
        assert_eq!(json_values(&read), serde_json::json!([1, 2, 3, 4, 5, 6]));
    }

    #[test]
    fn texts_lose_their_padding() {
        let read = parse(&file("|S3", "False", "(2,)", b"ab\0xyz"), "X", "x.npy").unwrap();
        assert_eq!(json_values(&read), serde_json::json!(["ab", "xyz"]));
        let points: Vec<u8> = ['ä', '\0'].iter().flat_map(|c| (*c as u32).to_le_bytes()).collect();
        let read = parse(&file("<U2", "False", "(1,)", &points), "X", "x.npy").unwrap();
        assert_eq!(json_values(&read), serde_json::json!(["ä"]));
    }

    #[test]
    fn bad_files_are_refused_with_their_name() {
        for (bytes, part) in [
            (b"hello".to_vec(), "x.npy: not a .npy file"),
            (file("<c8", "False", "(1,)", &[0; 8]), "numpy's type <c8 has no counterpart"),
            (file("|O", "False", "(1,)", &[0; 8]), "has no counterpart"),
            (b"\x93NUMPY\x01\0\xff\xff{".to_vec(), "it ends within its header"),
            (file("<f4", "Maybe", "(3,)", &[0; 8]), "its header lacks a plain descr"),
            (file("<f4", "False", "(-3,)", &[0; 8]), "its header lacks a plain descr"),
            (file("<f4", "False", "(3,)", &[0; 8]), "8 bytes of data, 12 are needed for its shape [3]"),
            (file("<f4", "False", "(4294967296, 4294967296)", &[0; 8]), "8 bytes of data"),
        ] {
            let error = parse(&bytes, "X", "x.npy").unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let error = read(Path::new("no/such.npy"), "X").unwrap_err().to_string();
        assert_eq!(error, "no/such.npy: no such file or directory");
    }

    #[test]
    fn what_numpy_lacks_is_saved_as_something_it_has() {
        let halves = tensor("Y", Datatype::Bf16, vec![1], half::bf16::from_f32(1.5).to_le_bytes().to_vec());
        let back = parse(&encode(&halves), "Y", "y.npy").unwrap();
        assert_eq!((back.datatype, json_values(&back)), (Datatype::Fp32, serde_json::json!([1.5])));
        let words = tensor("Y", Datatype::Bytes, vec![2], b"\x01\0\0\0a\x03\0\0\0bcd".to_vec());
        let back = parse(&encode(&words), "Y", "y.npy").unwrap();
        assert_eq!(back, words);
    }

    #[test]
    fn records_are_refused_by_their_description() {
        let text = "{'descr': [('a', '<f4'), ('b', '<i8')], 'fortran_order': False, 'shape': (1,), }";
        assert_eq!(header(text).unwrap().descr, "[('a', '<f4'), ('b', '<i8')]");
        assert_eq!(Dtype::parse("<M8[ns]"), None);
        assert_eq!(Dtype::parse("<U3").unwrap().bytes(), Some(12));
    }

    proptest! {
        #[test]
        fn what_is_saved_is_read_again(shape in prop::collection::vec(0i64..4, 0..5), which in 0usize..12) {
            let datatype = Datatype::ALL[which];
            let bytes = element_count(&shape).unwrap() * datatype.size().unwrap();
            let saved = tensor("X", datatype, shape, (0..bytes).map(|i| (i % 2) as u8).collect());
            let file = encode(&saved);
            prop_assert_eq!((file.len() - bytes) % 64, 0);
            prop_assert_eq!(parse(&file, "X", "x.npy").unwrap(), saved);
        }

        #[test]
        fn no_file_panics(tail in prop::collection::vec(any::<u8>(), 0..80), shape in "\\([0-9, ]{0,30}\\)") {
            let _ = parse(&file("<f4", "True", &shape, &tail), "X", "x.npy");
            let _ = parse(&tail, "X", "x.npy");
        }
    }
}
