//! Values of tensors as people write and read them: literals, conversion without loss, JSON, and a short form.
use bytes::Bytes;
use cresset_proto::tensor::{Datatype, Tensor, element_count};
use half::{bf16, f16};
use serde_json::Value;

/// What is wrong with a value for an input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    #[error("input '{input}': '{text}' is not a number")]
    NotANumber { input: String, text: String },
    #[error("input '{input}': {value} doesn't fit {datatype} without loss; convert the array first, as with .astype() in numpy")]
    Lossy { input: String, value: String, datatype: Datatype },
    #[error("input '{input}': {from} can't be made {to}")]
    Kind { input: String, from: Datatype, to: Datatype },
    #[error("input '{input}': {count} values can't fill the shape {shape:?} that the model declares")]
    Shape { input: String, count: usize, shape: Vec<i64> },
    #[error("input '{input}': the lists are of different lengths")]
    Ragged { input: String },
    #[error("input '{input}': the JSON doesn't parse: {error}")]
    Json { input: String, error: String },
}

/// One element of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Scalar {
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Vec<u8>),
}

/// What a model declares for an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declared {
    pub datatype: Datatype,
    /// -1 where any size will do.
    pub shape: Vec<i64>,
}

impl Scalar {
    fn words(&self) -> String {
        match self {
            Self::Bool(value) => value.to_string(),
            Self::Int(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Text(value) => format!("'{}'", String::from_utf8_lossy(value)),
        }
    }

    /// Little-endian bytes of the value in `datatype`. With `exact`, `None` where that would change the value; a literal
    /// isn't exact: 0.1 is meant as the nearest there is.
    fn encode(&self, datatype: Datatype, exact: bool) -> Option<Vec<u8>> {
        let float = |value: f64, back: f64, bytes: Vec<u8>| {
            let same = value == back || (value.is_nan() && back.is_nan());
            let fits = same || (!exact && back.is_finite());
            fits.then_some(bytes)
        };
        let number = match self {
            Self::Text(text) if datatype == Datatype::Bytes => return frame(text),
            Self::Text(_) => return None,
            Self::Bool(value) => i128::from(*value) as f64,
            Self::Int(value) => {
                let rounded = *value as f64;
                let is_float = matches!(datatype, Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
                if is_float && exact && rounded as i128 != *value {
                    return None;
                }
                rounded
            }
            Self::Float(value) => *value,
        };
        let integer = match self {
            Self::Bool(value) => Some(i128::from(*value)),
            Self::Int(value) => Some(*value),
            Self::Float(value) if value.fract() == 0.0 && value.abs() < 2f64.powi(100) => Some(*value as i128),
            _ => None,
        };
        match datatype {
            Datatype::Bool => integer.filter(|value| matches!(value, 0 | 1)).map(|value| vec![value as u8]),
            Datatype::Uint8 => u8::try_from(integer?).ok().map(|v| v.to_le_bytes().to_vec()),
            Datatype::Uint16 => u16::try_from(integer?).ok().map(|v| v.to_le_bytes().to_vec()),
            Datatype::Uint32 => u32::try_from(integer?).ok().map(|v| v.to_le_bytes().to_vec()),
            Datatype::Uint64 => u64::try_from(integer?).ok().map(|v| v.to_le_bytes().to_vec()),
            Datatype::Int8 => i8::try_from(integer?).ok().map(|v| v.to_le_bytes().to_vec()),
            Datatype::Int16 => i16::try_from(integer?).ok().map(|v| v.to_le_bytes().to_vec()),
            Datatype::Int32 => i32::try_from(integer?).ok().map(|v| v.to_le_bytes().to_vec()),
            Datatype::Int64 => i64::try_from(integer?).ok().map(|v| v.to_le_bytes().to_vec()),
            Datatype::Fp16 => {
                let value = f16::from_f64(number);
                float(number, value.to_f64(), value.to_le_bytes().to_vec())
            }
            Datatype::Bf16 => {
                let value = bf16::from_f64(number);
                float(number, value.to_f64(), value.to_le_bytes().to_vec())
            }
            Datatype::Fp32 => float(number, f64::from(number as f32), (number as f32).to_le_bytes().to_vec()),
            Datatype::Fp64 => Some(number.to_le_bytes().to_vec()),
            Datatype::Bytes => None,
        }
    }
}

/// A BYTES element as it goes over the wire: its length, then its bytes.
pub fn frame(text: &[u8]) -> Option<Vec<u8>> {
    let mut framed = u32::try_from(text.len()).ok()?.to_le_bytes().to_vec();
    framed.extend_from_slice(text);
    Some(framed)
}

/// The elements of a tensor in row-major order; stops where the data ends too early.
pub fn scalars(tensor: &Tensor) -> impl Iterator<Item = Scalar> + '_ {
    let mut rest = &tensor.data[..];
    std::iter::from_fn(move || {
        let (scalar, tail) = split_scalar(tensor.datatype, rest)?;
        rest = tail;
        Some(scalar)
    })
}

fn split_scalar(datatype: Datatype, data: &[u8]) -> Option<(Scalar, &[u8])> {
    macro_rules! number {
        ($kind:ident, $type:ty, $wide:ty) => {{
            let (head, tail) = data.split_first_chunk()?;
            (Scalar::$kind(<$wide>::from(<$type>::from_le_bytes(*head))), tail)
        }};
    }
    Some(match datatype {
        Datatype::Bool => {
            let (head, tail) = data.split_first()?;
            (Scalar::Bool(*head != 0), tail)
        }
        Datatype::Uint8 => number!(Int, u8, i128),
        Datatype::Uint16 => number!(Int, u16, i128),
        Datatype::Uint32 => number!(Int, u32, i128),
        Datatype::Uint64 => number!(Int, u64, i128),
        Datatype::Int8 => number!(Int, i8, i128),
        Datatype::Int16 => number!(Int, i16, i128),
        Datatype::Int32 => number!(Int, i32, i128),
        Datatype::Int64 => number!(Int, i64, i128),
        Datatype::Fp16 => number!(Float, f16, f64),
        Datatype::Bf16 => number!(Float, bf16, f64),
        Datatype::Fp32 => number!(Float, f32, f64),
        Datatype::Fp64 => number!(Float, f64, f64),
        Datatype::Bytes => {
            let (head, tail) = data.split_first_chunk::<4>()?;
            let (text, tail) = tail.split_at_checked(u32::from_le_bytes(*head) as usize)?;
            (Scalar::Text(text.to_vec()), tail)
        }
    })
}

/// The same tensor in the datatype that the model declares.
///
/// # Errors
/// [`ValueError`] where a value would change.
pub fn convert(tensor: Tensor, declared: Option<&Declared>) -> Result<Tensor, ValueError> {
    let Some(to) = declared.map(|declared| declared.datatype).filter(|to| *to != tensor.datatype) else { return Ok(tensor) };
    if (to == Datatype::Bytes) != (tensor.datatype == Datatype::Bytes) {
        return Err(ValueError::Kind { input: tensor.name, from: tensor.datatype, to });
    }
    let mut data = Vec::new();
    for scalar in scalars(&tensor) {
        let lossy = || ValueError::Lossy { input: tensor.name.clone(), value: scalar.words(), datatype: to };
        data.extend(scalar.encode(to, true).ok_or_else(lossy)?);
    }
    Ok(Tensor { datatype: to, data: data.into(), ..tensor })
}

/// Reads a literal: `1,2,3`, a single value, or nested JSON lists, which also give the shape.
///
/// # Errors
/// [`ValueError`] with what is wrong.
pub fn literal(input: &str, text: &str, declared: Option<&Declared>) -> Result<Tensor, ValueError> {
    let is_text = declared.is_some_and(|declared| declared.datatype == Datatype::Bytes);
    let (shape, scalars) = if text.trim_start().starts_with('[') {
        let value: Value =
            serde_json::from_str(text).map_err(|error| ValueError::Json { input: input.to_owned(), error: error.to_string() })?;
        let mut scalars = Vec::new();
        let shape = nested(&value, &mut scalars, input)?;
        (Some(shape), scalars)
    } else if is_text {
        (None, vec![Scalar::Text(text.as_bytes().to_vec())])
    } else {
        (None, text.split(',').map(|part| number(input, part.trim())).collect::<Result<Vec<_>, _>>()?)
    };
    let datatype = declared.map_or_else(|| default_datatype(&scalars), |declared| declared.datatype);
    let shape = match (shape, declared) {
        (Some(shape), _) => shape,
        (None, Some(declared)) => fit(&declared.shape, scalars.len()).ok_or_else(|| ValueError::Shape {
            input: input.to_owned(),
            count: scalars.len(),
            shape: declared.shape.clone(),
        })?,
        (None, None) => vec![scalars.len() as i64],
    };
    let mut data = Vec::new();
    for scalar in &scalars {
        let lossy = || ValueError::Lossy { input: input.to_owned(), value: scalar.words(), datatype };
        data.extend(scalar.encode(datatype, false).ok_or_else(lossy)?);
    }
    Ok(Tensor { name: input.to_owned(), datatype, shape, data: data.into() })
}

fn number(input: &str, text: &str) -> Result<Scalar, ValueError> {
    match text {
        "true" | "True" => return Ok(Scalar::Bool(true)),
        "false" | "False" => return Ok(Scalar::Bool(false)),
        _ => {}
    }
    let integer = text.parse().map(Scalar::Int);
    integer
        .or_else(|_| text.parse().map(Scalar::Float))
        .map_err(|_| ValueError::NotANumber { input: input.to_owned(), text: crate::output::one_line(text) })
}

fn nested(value: &Value, scalars: &mut Vec<Scalar>, input: &str) -> Result<Vec<i64>, ValueError> {
    let not_a_number = || ValueError::NotANumber { input: input.to_owned(), text: value.to_string() };
    match value {
        Value::Array(items) => {
            let mut inner: Option<Vec<i64>> = None;
            for item in items {
                let shape = nested(item, scalars, input)?;
                if inner.get_or_insert_with(|| shape.clone()) != &shape {
                    return Err(ValueError::Ragged { input: input.to_owned() });
                }
            }
            let mut shape = vec![items.len() as i64];
            shape.extend(inner.unwrap_or_default());
            return Ok(shape);
        }
        Value::Bool(truth) => scalars.push(Scalar::Bool(*truth)),
        Value::Number(number) => match (number.as_i128(), number.as_f64()) {
            (Some(integer), _) => scalars.push(Scalar::Int(integer)),
            (None, Some(float)) => scalars.push(Scalar::Float(float)),
            (None, None) => return Err(not_a_number()),
        },
        Value::String(text) => scalars.push(Scalar::Text(text.clone().into_bytes())),
        Value::Null | Value::Object(_) => return Err(not_a_number()),
    }
    Ok(vec![])
}

fn default_datatype(scalars: &[Scalar]) -> Datatype {
    let all = |is: fn(&Scalar) -> bool| !scalars.is_empty() && scalars.iter().all(is);
    if all(|scalar| matches!(scalar, Scalar::Text(_))) {
        Datatype::Bytes
    } else if all(|scalar| matches!(scalar, Scalar::Bool(_))) {
        Datatype::Bool
    } else if all(|scalar| matches!(scalar, Scalar::Int(_))) {
        Datatype::Int64
    } else {
        Datatype::Fp32
    }
}

/// Fills the open places of a declared shape so that `count` elements fit: the last one takes what there is, the others
/// (the batch) are 1, unless only a larger batch can hold them.
fn fit(declared: &[i64], count: usize) -> Option<Vec<i64>> {
    let fixed: Vec<i64> = declared.iter().copied().filter(|dim| *dim >= 0).collect();
    let fixed = element_count(&fixed)?;
    let Some(open) = declared.iter().rposition(|dim| *dim < 0) else {
        return (fixed == count).then(|| declared.to_vec());
    };
    if fixed == 0 || !count.is_multiple_of(fixed) {
        return None;
    }
    let mut shape: Vec<i64> = declared.iter().map(|dim| if *dim < 0 { 1 } else { *dim }).collect();
    shape[open] = i64::try_from(count / fixed).ok()?;
    Some(shape)
}

/// A value as JSON: what JSON can't say (NaN, infinities) as text, bytes that aren't UTF-8 as a list of numbers.
fn json(scalar: &Scalar, datatype: Datatype) -> Value {
    match scalar {
        Scalar::Bool(value) => Value::from(*value),
        Scalar::Int(value) => i64::try_from(*value).map_or_else(|_| Value::from(*value as u64), Value::from),
        Scalar::Float(value) if !value.is_finite() => Value::from(short_float(*value, datatype)),
        Scalar::Float(value) => {
            let shortest = short_float(*value, datatype).parse::<f64>().unwrap_or(*value);
            serde_json::Number::from_f64(shortest).map_or(Value::Null, Value::Number)
        }
        Scalar::Text(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Value::from(text),
            Err(_) => Value::from(bytes.clone()),
        },
    }
}

/// All values of a tensor, flat and row-major.
pub fn json_values(tensor: &Tensor) -> Value {
    Value::Array(scalars(tensor).map(|scalar| json(&scalar, tensor.datatype)).collect())
}

/// The shortest digits that give the same value in its own datatype.
fn short_float(value: f64, datatype: Datatype) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    match datatype {
        Datatype::Fp64 => format!("{value:?}"),
        // Halves are exact in f32, and their shortest digits there say the same.
        _ => format!("{:?}", value as f32),
    }
}

/// The first and last few values, for tables.
pub fn short_values(tensor: &Tensor) -> String {
    const SHOWN_MAX: usize = 8;
    const TEXT_CHARS_MAX: usize = 40;
    let words = |scalar: &Scalar| match scalar {
        Scalar::Float(value) => short_float(*value, tensor.datatype),
        Scalar::Text(bytes) => {
            let text = crate::output::one_line(&String::from_utf8_lossy(bytes));
            let cut: String = text.chars().take(TEXT_CHARS_MAX).collect();
            if cut == text { format!("\"{text}\"") } else { format!("\"{cut}…\"") }
        }
        other => other.words(),
    };
    let all: Vec<_> = scalars(tensor).collect();
    let shown: Vec<String> = if all.len() <= SHOWN_MAX {
        all.iter().map(words).collect()
    } else {
        let (head, tail) = (&all[..SHOWN_MAX / 2], &all[all.len() - SHOWN_MAX / 2..]);
        head.iter().map(words).chain(["…".to_owned()]).chain(tail.iter().map(words)).collect()
    };
    format!("[{}]", shown.join(", "))
}

/// A tensor from parts, for tests and readers.
pub fn tensor(name: &str, datatype: Datatype, shape: Vec<i64>, data: Vec<u8>) -> Tensor {
    Tensor { name: name.to_owned(), datatype, shape, data: Bytes::from(data) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn declared(datatype: Datatype, shape: &[i64]) -> Option<Declared> {
        Some(Declared { datatype, shape: shape.to_vec() })
    }

    fn floats(values: &[f64]) -> Tensor {
        tensor("X", Datatype::Fp64, vec![values.len() as i64], values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    #[test]
    fn literals_take_the_declared_type_and_shape() {
        let read = literal("X", "1, 2.5,-3", declared(Datatype::Fp32, &[-1, 3]).as_ref()).unwrap();
        assert_eq!((read.datatype, &read.shape[..]), (Datatype::Fp32, &[1, 3][..]));
        assert_eq!(short_values(&read), "[1.0, 2.5, -3.0]");
        let rate = literal("SR", "16000", declared(Datatype::Int64, &[1]).as_ref()).unwrap();
        assert_eq!((rate.shape, &rate.data[..]), (vec![1], &16000i64.to_le_bytes()[..]));
        let scalar = literal("SR", "16000", declared(Datatype::Int64, &[]).as_ref()).unwrap();
        assert_eq!(scalar.shape, [0i64; 0]);
        let text = literal("T", "a, b", declared(Datatype::Bytes, &[-1, 1]).as_ref()).unwrap();
        assert_eq!((text.shape.as_slice(), &text.data[..]), (&[1, 1][..], &b"\x04\0\0\0a, b"[..]));
    }

    #[test]
    fn nested_lists_give_their_own_shape() {
        let read = literal("X", "[[1,2],[3,4],[5,6]]", None).unwrap();
        assert_eq!((read.datatype, read.shape.as_slice()), (Datatype::Int64, &[3, 2][..]));
        assert_eq!(literal("X", "[[1,2],[3]]", None), Err(ValueError::Ragged { input: "X".to_owned() }));
        assert!(matches!(literal("X", "[1,", None), Err(ValueError::Json { .. })));
        assert!(matches!(literal("X", "[null]", None), Err(ValueError::NotANumber { .. })));
        let words = literal("X", r#"["a","bc"]"#, None).unwrap();
        assert_eq!((words.datatype, json_values(&words)), (Datatype::Bytes, serde_json::json!(["a", "bc"])));
    }

    #[test]
    fn wrong_literals_name_the_input() {
        let error = literal("X", "1,two", None).unwrap_err().to_string();
        assert_eq!(error, "input 'X': 'two' is not a number");
        let error = literal("X", "300", declared(Datatype::Int8, &[1]).as_ref()).unwrap_err().to_string();
        assert!(error.starts_with("input 'X': 300 doesn't fit INT8"), "{error}");
        let error = literal("X", "1,2", declared(Datatype::Fp32, &[-1, 3]).as_ref()).unwrap_err().to_string();
        assert_eq!(error, "input 'X': 2 values can't fill the shape [-1, 3] that the model declares");
    }

    #[test]
    fn open_dimensions_take_what_there_is() {
        assert_eq!(fit(&[-1, -1], 5), Some(vec![1, 5]));
        assert_eq!(fit(&[-1, 3], 6), Some(vec![2, 3]));
        assert_eq!(fit(&[2, 3], 6), Some(vec![2, 3]));
        assert_eq!(fit(&[2, 3], 5), None);
        assert_eq!(fit(&[-1, 0], 5), None);
        assert_eq!(fit(&[], 1), Some(vec![]));
    }

    #[test]
    fn arrays_are_converted_only_without_loss() {
        let to = |datatype| declared(datatype, &[-1]);
        let single = convert(floats(&[0.5, -2.0, f64::NAN]), to(Datatype::Fp32).as_ref()).unwrap();
        assert_eq!(short_values(&single), "[0.5, -2.0, NaN]");
        let error = convert(floats(&[0.1]), to(Datatype::Fp32).as_ref()).unwrap_err().to_string();
        assert!(error.starts_with("input 'X': 0.1 doesn't fit FP32 without loss"), "{error}");
        assert!(convert(floats(&[1.5]), to(Datatype::Int64).as_ref()).is_err());
        assert!(convert(floats(&[70000.0]), to(Datatype::Fp16).as_ref()).is_err());
        assert!(convert(floats(&[1.0]), to(Datatype::Bytes).as_ref()).is_err());
        let exact = tensor("X", Datatype::Int64, vec![1], ((1i64 << 53) + 1).to_le_bytes().to_vec());
        assert!(convert(exact, to(Datatype::Fp64).as_ref()).is_err());
    }

    #[test]
    fn floats_are_shown_with_the_digits_of_their_own_type() {
        let data = [0.1f32, f32::NEG_INFINITY].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(json_values(&tensor("X", Datatype::Fp32, vec![2], data)).to_string(), r#"[0.1,"-Infinity"]"#);
        let many: Vec<f64> = (0..100).map(f64::from).collect();
        assert_eq!(short_values(&floats(&many)), "[0.0, 1.0, 2.0, 3.0, …, 96.0, 97.0, 98.0, 99.0]");
    }

    proptest! {
        #[test]
        fn int_arrays_survive_widening_and_back(values in prop::collection::vec(any::<i16>(), 0..20)) {
            let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let narrow = tensor("X", Datatype::Int16, vec![values.len() as i64], data);
            for wide in [Datatype::Int32, Datatype::Int64, Datatype::Fp32, Datatype::Fp64] {
                let there = convert(narrow.clone(), declared(wide, &[-1]).as_ref()).unwrap();
                let back = convert(there, declared(Datatype::Int16, &[-1]).as_ref()).unwrap();
                prop_assert_eq!(&back, &narrow);
            }
        }

        #[test]
        fn no_literal_panics(text in ".{0,40}", shape in prop::collection::vec(-2i64..5, 0..4)) {
            for datatype in Datatype::ALL {
                if let Ok(read) = literal("X", &text, declared(datatype, &shape).as_ref()) {
                    prop_assert_eq!(scalars(&read).count(), element_count(&read.shape).unwrap());
                }
            }
        }
    }
}
