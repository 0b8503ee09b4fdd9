//! Requests of different shapes in one batch. Pure.
//!
//! A ragged input reaches the model as the elements of all requests in one dimension. What the model needs to tell them
//! apart is computed here from the requests' shapes (`batch_input`), and an output is cut apart by the shapes of an input
//! (`batch_output`). The kinds are Triton's (its `ragged_batching.md`).
use bytes::Bytes;
use cresset_proto::{inference::batch_input::Kind, tensor::Datatype};

/// A tensor computed from a batch: shape and bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Computed {
    /// Its dimensions.
    pub shape: Vec<i64>,
    /// Row-major little-endian bytes.
    pub data: Bytes,
}

/// Computes a batch input of this `kind` and `datatype` (INT32 or FP32) from the shapes that its source has in each request
/// of the batch, the batch dimension first.
pub fn compute(kind: Kind, datatype: Datatype, shapes: &[&[i64]]) -> Computed {
    let elements = |shape: &&[i64]| shape.iter().fold(1i64, |product, dim| product.saturating_mul(*dim));
    let counts: Vec<i64> = shapes.iter().map(elements).collect();
    let (shape, values) = match kind {
        Kind::BatchElementCount => (vec![length(&counts)], counts),
        Kind::BatchAccumulatedElementCount => {
            let sums = accumulated(&counts);
            (vec![length(&sums)], sums)
        }
        Kind::BatchAccumulatedElementCountWithZero => {
            let sums: Vec<i64> = std::iter::once(0).chain(accumulated(&counts)).collect();
            (vec![length(&sums)], sums)
        }
        // Only the shape tells something; what is in it doesn't matter.
        Kind::BatchMaxElementCountAsShape => {
            let max = counts.iter().copied().max().unwrap_or(0);
            (vec![max], vec![0; usize::try_from(max).unwrap_or(0)])
        }
        Kind::BatchItemShape | Kind::BatchItemShapeFlatten => {
            let rank = shapes.first().map_or(0, |shape| shape.len().saturating_sub(1));
            // Each row of a request has the request's shape.
            let rows = shapes.iter().flat_map(|shape| {
                let rows = shape.first().copied().and_then(|rows| usize::try_from(rows).ok()).unwrap_or(0);
                std::iter::repeat_n(shape.get(1..).unwrap_or_default(), rows)
            });
            let values: Vec<i64> = rows.flatten().copied().collect();
            let rank = i64::try_from(rank).unwrap_or(0);
            let rows = if rank == 0 { 0 } else { length(&values) / rank };
            let shape = if kind == Kind::BatchItemShape { vec![rows, rank] } else { vec![length(&values)] };
            (shape, values)
        }
    };
    Computed { shape, data: encode(datatype, &values) }
}

/// Elements of each request in an output that is scattered like an input: the input's elements in that request.
pub fn scattered(shapes: &[&[i64]]) -> Vec<usize> {
    let elements =
        |shape: &&[i64]| shape.iter().try_fold(1usize, |product, dim| product.checked_mul(usize::try_from(*dim).ok()?));
    shapes.iter().map(|shape| elements(shape).unwrap_or(usize::MAX)).collect()
}

fn length(values: &[i64]) -> i64 {
    i64::try_from(values.len()).unwrap_or(i64::MAX)
}

fn accumulated(counts: &[i64]) -> Vec<i64> {
    counts
        .iter()
        .scan(0i64, |sum, count| {
            *sum = sum.saturating_add(*count);
            Some(*sum)
        })
        .collect()
}

/// The configuration allows only these two types; a count beyond 2^31 can't be reached within a message.
fn encode(datatype: Datatype, values: &[i64]) -> Bytes {
    if datatype == Datatype::Fp32 {
        values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect()
    } else {
        values.iter().flat_map(|value| i32::try_from(*value).unwrap_or(i32::MAX).to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ints(computed: &Computed) -> (Vec<i64>, Vec<i32>) {
        let values = computed.data.chunks_exact(4).map(|chunk| i32::from_le_bytes(chunk.try_into().unwrap()));
        (computed.shape.clone(), values.collect())
    }

    #[test]
    fn each_kind_says_what_it_should() {
        // Triton's own example: two rows of [3, 1], then one row of [2, 2].
        let shapes: [&[i64]; 2] = [&[2, 3, 1], &[1, 2, 2]];
        for (kind, shape, values) in [
            (Kind::BatchElementCount, vec![2], vec![6, 4]),
            (Kind::BatchAccumulatedElementCount, vec![2], vec![6, 10]),
            (Kind::BatchAccumulatedElementCountWithZero, vec![3], vec![0, 6, 10]),
            (Kind::BatchMaxElementCountAsShape, vec![6], vec![0; 6]),
            (Kind::BatchItemShape, vec![3, 2], vec![3, 1, 3, 1, 2, 2]),
            (Kind::BatchItemShapeFlatten, vec![6], vec![3, 1, 3, 1, 2, 2]),
        ] {
            assert_eq!(ints(&compute(kind, Datatype::Int32, &shapes)), (shape, values), "{kind:?}");
        }
        assert_eq!(scattered(&shapes), [6, 4]);
        let floats = compute(Kind::BatchElementCount, Datatype::Fp32, &shapes);
        assert_eq!(&floats.data[..4], 6f32.to_le_bytes());
    }
}
