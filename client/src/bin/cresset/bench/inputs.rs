//! What to send: given arrays, and made-up data for the inputs that nobody gave.

use std::collections::BTreeMap;

use bytes::Bytes;
use cresset_proto::{
    inference::model_metadata_response::TensorMetadata,
    tensor::{Datatype, Tensor, element_count},
};
use half::{bf16, f16};
use rand::{Rng, SeedableRng, distr::Alphanumeric, rngs::StdRng};

use crate::values::frame;

/// What gRPC can carry in one message, in bytes.
const INPUT_BYTES_MAX: usize = i32::MAX as usize;
/// Length of a made-up text.
const TEXT_CHARS: usize = 8;

/// Why there is nothing to send.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error("the model's input '{input}' has the datatype '{datatype}', which is unknown here")]
    Datatype { input: String, datatype: String },
    #[error("the model has no input '{input}'; it has {}", names.join(", "))]
    Unknown { input: String, names: Vec<String> },
    #[error("input '{input}' has free dimensions in its shape {declared:?}: give it one with --shape {input}:{example}")]
    Free { input: String, declared: Vec<i64>, example: String },
    #[error("--shape {input}: {given:?} doesn't fit the shape {declared:?} that the model declares")]
    Shape { input: String, given: Vec<i64>, declared: Vec<i64> },
    #[error("--batch {batch}: input '{input}' of shape {shape:?} has no batch dimension to fill; leave it out")]
    NoBatch { input: String, shape: Vec<i64>, batch: u32 },
    #[error("--batch {batch}: input '{input}' was given with {rows} rows, give it 1 or {batch}")]
    Rows { input: String, rows: i64, batch: u32 },
    #[error("input '{input}' of shape {shape:?} is larger than {INPUT_BYTES_MAX} bytes, the limit of one message")]
    TooLarge { input: String, shape: Vec<i64> },
}

/// What the user wants of the inputs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    /// `--shape`, by input.
    pub shapes: BTreeMap<String, Vec<i64>>,
    /// `--batch`.
    pub batch: Option<u32>,
    /// What made-up data is drawn from.
    pub seed: u64,
}

/// The inputs of a request: the given ones, and made-up data for the others, in the model's order.
///
/// `has_batch` says whether the first dimension of all inputs is the batch; without a word about it, it is where all are
/// free there.
///
/// # Errors
/// [`InputError`] names the input and the way out.
pub fn inputs(
    declared: &[TensorMetadata],
    has_batch: Option<bool>,
    mut given: BTreeMap<String, Tensor>,
    wishes: &Wishes,
) -> Result<Vec<Tensor>, InputError> {
    let names = || declared.iter().map(|input| input.name.clone()).collect();
    if let Some(input) = given.keys().chain(wishes.shapes.keys()).find(|name| declared.iter().all(|d| d.name != **name)) {
        return Err(InputError::Unknown { input: input.clone(), names: names() });
    }
    let has_batch = has_batch.unwrap_or_else(|| declared.iter().all(|input| input.shape.first() == Some(&-1)));
    let mut chance = StdRng::seed_from_u64(wishes.seed);
    let mut tensors = Vec::with_capacity(declared.len());
    for input in declared {
        tensors.push(match given.remove(&input.name) {
            Some(tensor) => repeated(tensor, wishes.batch)?,
            None => {
                let datatype = Datatype::from_wire(&input.datatype).ok_or_else(|| InputError::Datatype {
                    input: input.name.clone(),
                    datatype: crate::output::one_line(&input.datatype),
                })?;
                let shape = shape(input, has_batch, wishes)?;
                let data = made_up(datatype, &shape, &mut chance);
                let data = data.ok_or_else(|| InputError::TooLarge { input: input.name.clone(), shape: shape.clone() })?;
                Tensor { name: input.name.clone(), datatype, shape, data }
            }
        });
    }
    Ok(tensors)
}

/// The shape to make data up for: the declared one with the wished dimensions, which may come with or without the batch.
fn shape(input: &TensorMetadata, has_batch: bool, wishes: &Wishes) -> Result<Vec<i64>, InputError> {
    let (name, declared) = (&input.name, &input.shape);
    let mut shape = declared.clone();
    if let Some(wished) = wishes.shapes.get(name) {
        let skipped = usize::from(has_batch && wished.len() + 1 == declared.len());
        let open = &declared[skipped..];
        let fits = wished.len() == open.len() && wished.iter().zip(open).all(|(wish, dim)| *dim == -1 || dim == wish);
        if !fits {
            return Err(InputError::Shape { input: name.clone(), given: wished.clone(), declared: declared.clone() });
        }
        shape.splice(skipped.., wished.iter().copied());
    }
    match (wishes.batch, shape.first().copied()) {
        (Some(batch), Some(first)) if has_batch && (first == -1 || first == i64::from(batch)) => shape[0] = i64::from(batch),
        (Some(batch), _) => return Err(InputError::NoBatch { input: name.clone(), shape, batch }),
        (None, Some(-1)) if has_batch => shape[0] = 1,
        (None, _) => {}
    }
    if shape.contains(&-1) {
        let example = shape.iter().map(|dim| if *dim == -1 { "16".to_owned() } else { dim.to_string() }).collect::<Vec<_>>();
        return Err(InputError::Free { input: name.clone(), declared: declared.clone(), example: example.join(",") });
    }
    Ok(shape)
}

/// A given array of one row as often as the batch wants it.
fn repeated(tensor: Tensor, batch: Option<u32>) -> Result<Tensor, InputError> {
    let Some(batch) = batch else { return Ok(tensor) };
    match tensor.shape.first().copied() {
        Some(rows) if rows == i64::from(batch) => Ok(tensor),
        Some(1) if tensor.data.len().saturating_mul(batch as usize) <= INPUT_BYTES_MAX => {
            let mut shape = tensor.shape;
            shape[0] = i64::from(batch);
            Ok(Tensor { shape, data: tensor.data.repeat(batch as usize).into(), ..tensor })
        }
        Some(1) => Err(InputError::TooLarge { input: tensor.name, shape: tensor.shape }),
        Some(rows) => Err(InputError::Rows { input: tensor.name, rows, batch }),
        None => Err(InputError::NoBatch { input: tensor.name, shape: tensor.shape, batch }),
    }
}

/// Bounded data: floats from 0 to 1, integers 0 or 1 (they may be indices or a mask), short texts. `None` if it is too much.
fn made_up(datatype: Datatype, shape: &[i64], chance: &mut StdRng) -> Option<Bytes> {
    let size = datatype.size().unwrap_or(4 + TEXT_CHARS);
    let count = element_count(shape).filter(|count| count.checked_mul(size).is_some_and(|bytes| bytes <= INPUT_BYTES_MAX))?;
    let mut data = Vec::with_capacity(count * size);
    for _ in 0..count {
        match datatype {
            Datatype::Fp16 => data.extend(f16::from_f32(chance.random()).to_le_bytes()),
            Datatype::Bf16 => data.extend(bf16::from_f32(chance.random()).to_le_bytes()),
            Datatype::Fp32 => data.extend(chance.random::<f32>().to_le_bytes()),
            Datatype::Fp64 => data.extend(chance.random::<f64>().to_le_bytes()),
            Datatype::Bytes => data.extend(frame(&chance.sample_iter(Alphanumeric).take(TEXT_CHARS).collect::<Vec<_>>())?),
            _ => {
                data.push(chance.random_range(0..=1u8));
                data.resize(data.len() + size - 1, 0);
            }
        }
    }
    Some(data.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declared(name: &str, datatype: &str, shape: &[i64]) -> TensorMetadata {
        TensorMetadata { name: name.into(), datatype: datatype.into(), shape: shape.to_vec() }
    }

    fn wishes(shapes: &[(&str, &[i64])], batch: Option<u32>) -> Wishes {
        let shapes = shapes.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect();
        Wishes { shapes, batch, seed: 1 }
    }

    fn shapes(declared: &[TensorMetadata], has_batch: Option<bool>, wishes: &Wishes) -> Result<Vec<Vec<i64>>, String> {
        let made = inputs(declared, has_batch, BTreeMap::new(), wishes).map_err(|error| error.to_string())?;
        Ok(made.into_iter().map(|tensor| tensor.shape).collect())
    }

    #[test]
    fn the_batch_is_filled_and_other_free_dimensions_are_asked_for() {
        let image = [declared("x", "FP32", &[-1, 784])];
        assert_eq!(shapes(&image, Some(true), &wishes(&[], None)).unwrap(), [[1, 784]]);
        assert_eq!(shapes(&image, None, &wishes(&[], Some(8))).unwrap(), [[8, 784]]);
        let text = [declared("ids", "INT64", &[-1, -1])];
        let error = shapes(&text, Some(true), &wishes(&[], None)).unwrap_err();
        assert!(error.ends_with("give it one with --shape ids:1,16"), "{error}");
        assert_eq!(shapes(&text, Some(true), &wishes(&[("ids", &[4, 128])], None)).unwrap(), [[4, 128]]);
        assert_eq!(shapes(&text, Some(true), &wishes(&[("ids", &[128])], Some(4))).unwrap(), [[4, 128]]);
    }

    #[test]
    fn wishes_that_do_not_fit_are_named() {
        let plain = [declared("x", "FP32", &[3, 4])];
        for (has_batch, wishes, words) in [
            (Some(false), wishes(&[], Some(2)), "has no batch dimension to fill"),
            (Some(false), wishes(&[("x", &[3, 5])], None), "doesn't fit the shape [3, 4]"),
            (Some(false), wishes(&[("y", &[3])], None), "the model has no input 'y'; it has x"),
            (Some(true), wishes(&[("x", &[2, 3, 4])], None), "doesn't fit"),
        ] {
            let error = shapes(&plain, has_batch, &wishes).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        let huge = [declared("x", "FP64", &[-1])];
        let error = shapes(&huge, Some(false), &wishes(&[("x", &[1 << 40])], None)).unwrap_err();
        assert!(error.contains("the limit of one message"), "{error}");
        let odd = [declared("x", "FP8", &[1])];
        assert!(shapes(&odd, None, &wishes(&[], None)).unwrap_err().contains("'FP8'"));
    }

    #[test]
    fn every_datatype_is_made_up_within_its_bounds() {
        let mut chance = StdRng::seed_from_u64(3);
        for datatype in Datatype::ALL {
            let data = made_up(datatype, &[2, 50], &mut chance).unwrap();
            let tensor = crate::values::tensor("x", datatype, vec![2, 50], data.to_vec());
            let scalars: Vec<_> = crate::values::scalars(&tensor).collect();
            assert_eq!(scalars.len(), 100, "{datatype}");
            for scalar in scalars {
                use crate::values::Scalar::{Bool, Float, Int, Text};
                let fits = match scalar {
                    Bool(_) => true,
                    Int(value) => (0..=1).contains(&value),
                    Float(value) => (0.0..=1.0).contains(&value),
                    Text(text) => text.len() == TEXT_CHARS,
                };
                assert!(fits, "{datatype}");
            }
        }
    }

    #[test]
    fn given_inputs_are_sent_as_they_are_or_repeated() {
        let both = [declared("a", "UINT8", &[-1, 2]), declared("b", "UINT8", &[-1, 2])];
        let given = |rows: i64| {
            let tensor = crate::values::tensor("b", Datatype::Uint8, vec![rows, 2], vec![7; 2 * rows as usize]);
            BTreeMap::from([("b".to_owned(), tensor)])
        };
        let made = inputs(&both, Some(true), given(1), &wishes(&[], Some(3))).unwrap();
        assert_eq!((made[0].name.as_str(), &made[0].shape[..]), ("a", &[3, 2][..]));
        assert_eq!((&made[1].shape[..], &made[1].data[..]), (&[3, 2][..], &[7; 6][..]));
        let error = inputs(&both, Some(true), given(2), &wishes(&[], Some(3))).unwrap_err().to_string();
        assert!(error.contains("with 2 rows, give it 1 or 3"), "{error}");
        assert_eq!(inputs(&both, Some(true), given(2), &wishes(&[], None)).unwrap()[1].shape, [2, 2]);
    }
}
