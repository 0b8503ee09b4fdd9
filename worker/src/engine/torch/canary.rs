//! A tiny inference whose result is known: whether a device can still compute.
use tch::{Kind, TchError, Tensor};

use super::native::Refusal;
use crate::engine::{Device, EngineError};

/// Rows and columns of the matrix. Small integers: the result is exact on every device.
const SIDE: i64 = 8;

/// Multiplies a matrix by itself on the device and compares every element.
///
/// # Errors
/// [`EngineError::Failed`] for a wrong result, else what libtorch said.
pub fn sing(device: Device) -> Result<(), EngineError> {
    let got = product(device).map_err(|error| Refusal::plain(&error.to_string()).into_error())?;
    compare(&got)
}

fn product(device: Device) -> Result<Vec<f32>, TchError> {
    let place = match device {
        Device::Cpu => tch::Device::Cpu,
        Device::Cuda(ordinal) => tch::Device::Cuda(ordinal as usize),
    };
    let _no_grad = tch::no_grad_guard();
    let matrix = Tensor::f_arange(SIDE * SIDE, (Kind::Float, place))?.f_view([SIDE, SIDE])?;
    let product = matrix.f_mm(&matrix)?.f_view([SIDE * SIDE])?.f_to(tch::Device::Cpu)?;
    Vec::try_from(product)
}

fn compare(got: &[f32]) -> Result<(), EngineError> {
    let expected = (0..SIDE * SIDE).map(|at| {
        let (row, column) = (at / SIDE, at % SIDE);
        (0..SIDE).map(|k| (row * SIDE + k) * (k * SIDE + column)).sum::<i64>() as f32
    });
    if expected.eq(got.iter().copied()) {
        Ok(())
    } else {
        Err(EngineError::Failed("a canary inference gave a wrong result".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_can_compute_and_a_wrong_result_is_noticed() {
        let device = super::super::tests::device();
        sing(device).unwrap();
        let mut got = product(device).unwrap();
        got[9] += 1.0;
        assert_eq!(compare(&got), Err(EngineError::Failed("a canary inference gave a wrong result".into())));
    }
}
