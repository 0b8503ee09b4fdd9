//! What goes in and comes out of every call: the inputs' check, and which result is which output.

use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};

use super::native::Results;
use super::types::datatype;
use crate::engine::error::short_message;
use crate::engine::signature::position_in_name;
use crate::engine::{Datatype, EngineError, InputBinding, InputParts, LoadSpec, OutputBinding, OutputTensor, Outputs, Timing};

/// What goes in and comes out of every call of a model.
#[derive(Clone)]
pub struct CallShape {
    inputs: Vec<InputBinding>,
    outputs: Vec<OutputBinding>,
}

impl CallShape {
    pub fn of(spec: &LoadSpec) -> Self {
        Self { inputs: spec.inputs.clone(), outputs: spec.outputs.clone() }
    }

    /// Whether a model that returns this many tensors has all outputs.
    pub fn check_count(&self, count: usize) -> Result<(), String> {
        places(&self.outputs, &vec![""; count], false).map(drop)
    }

    /// Whether the inputs are those that were declared; what their bytes hold is checked where they are read.
    pub fn check(&self, inputs: &[InputParts]) -> Result<(), EngineError> {
        if inputs.len() != self.inputs.len() {
            let (want, got) = (self.inputs.len(), inputs.len());
            return Err(EngineError::BadInput(format!("expected {want} inputs, got {got}")));
        }
        for (input, binding) in inputs.iter().zip(&self.inputs) {
            check_input(input, binding).map_err(|why| EngineError::BadInput(short_message(&why)))?;
        }
        Ok(())
    }

    /// The declared outputs among the results of a call that began at `began`.
    pub fn outputs(&self, mut results: Results, began: Instant) -> Result<Outputs, EngineError> {
        let fail = |why: String| EngineError::Failed(short_message(&why));
        let views: Vec<_> = (0..results.len()).map(|index| results.view(index)).collect();
        let names: Vec<&str> = views.iter().map(|view| view.name.as_str()).collect();
        let is_dict = views.iter().any(|view| view.is_answerable() && !view.name.is_empty());
        let places = places(&self.outputs, &names, is_dict).map_err(fail)?;
        let mut tensors: Vec<OutputTensor> = Vec::with_capacity(places.len());
        for (binding, &place) in self.outputs.iter().zip(&places) {
            let view = &views[place];
            let Some(datatype) = datatype(view.code) else {
                let kind = if view.is_answerable() { "tensor of a type with no name here" } else { view.name.as_str() };
                return Err(fail(format!("output '{}' is a {kind}, which can't be answered", binding.name)));
            };
            // Two outputs of the configuration may name one result: a take leaves nothing behind.
            let data = match places.iter().take(tensors.len()).position(|&earlier| earlier == place) {
                Some(earlier) => tensors[earlier].data.clone(),
                None => results.take(place),
            };
            tensors.push(OutputTensor { datatype, shape: view.shape.clone(), data });
        }
        for (binding, tensor) in self.outputs.iter().zip(&mut tensors) {
            as_declared(binding, tensor).map_err(fail)?;
        }
        let (input, infer) = results.times();
        Ok(Outputs { tensors, timing: Timing::ending_now(began, input, infer) })
    }
}

fn check_input(input: &InputParts, binding: &InputBinding) -> Result<(), String> {
    let name = &binding.name;
    if input.is_absent() {
        return Ok(());
    }
    if input.datatype != binding.datatype {
        return Err(format!("input '{name}' is {}, expected {}", input.datatype, binding.datatype));
    }
    let elements = input.shape.iter().try_fold(1_usize, |product, &dimension| {
        usize::try_from(dimension).ok().and_then(|dimension| product.checked_mul(dimension))
    });
    // Each byte string has a length of its own: the shim counts them when it reads them.
    let size = input.datatype.size();
    // No element takes more than 8 bytes inside, whatever it takes on the wire.
    let fits = |elements: &usize| elements.checked_mul(8).is_some_and(|bytes| i64::try_from(bytes).is_ok());
    let want = elements.filter(fits).ok_or_else(|| format!("input '{name}' has the impossible shape {:?}", input.shape))?;
    let got: usize = input.parts.iter().map(Bytes::len).sum();
    match size.map(|size| want * size) {
        Some(want) if got != want => Err(format!("input '{name}' has {got} bytes, its shape {:?} needs {want}", input.shape)),
        _ => Ok(()),
    }
}

/// For each declared output the index of its result.
fn places(outputs: &[OutputBinding], names: &[&str], is_dict: bool) -> Result<Vec<usize>, String> {
    let by_position = outputs.iter().all(|output| position_in_name(&output.name).is_some());
    let place = |(order, output): (usize, &OutputBinding)| {
        let name = &output.name;
        if is_dict && let Some(place) = names.iter().position(|key| key == name) {
            return Ok(place);
        }
        let place = if by_position { position_in_name(name).unwrap_or(order) } else { order };
        if is_dict && !by_position {
            Err(format!("the module returned no '{name}', only {}", names.join(", ")))
        } else if place >= names.len() {
            Err(format!("the module returned {} values, output '{name}' is number {place} (from 0)", names.len()))
        } else {
            Ok(place)
        }
    };
    outputs.iter().enumerate().map(place).collect()
}

/// Holds an output against its declared type. What was widened on the way in is made narrow again.
fn as_declared(binding: &OutputBinding, tensor: &mut OutputTensor) -> Result<(), String> {
    let (name, found) = (&binding.name, tensor.datatype);
    let Some(declared) = binding.datatype.filter(|declared| *declared != found) else {
        return Ok(());
    };
    match narrowed(&tensor.data, found, declared) {
        Some(Ok(data)) => {
            (tensor.datatype, tensor.data) = (declared, data);
            Ok(())
        }
        Some(Err(value)) => Err(format!("output '{name}' holds {value}, which no {declared} can hold")),
        None => Err(format!("output '{name}' is {found}, the configuration says {declared}")),
    }
}

/// Signed integers as the unsigned ones that stand for them; the first value that doesn't fit, or `None` if these types
/// don't stand for each other.
fn narrowed(data: &[u8], found: Datatype, declared: Datatype) -> Option<Result<Bytes, i64>> {
    let put: fn(&mut BytesMut, i64) -> Option<()> = match declared {
        Datatype::Uint16 => |out, value| u16::try_from(value).ok().map(|value| out.put_u16_le(value)),
        Datatype::Uint32 => |out, value| u32::try_from(value).ok().map(|value| out.put_u32_le(value)),
        Datatype::Uint64 => |out, value| u64::try_from(value).ok().map(|value| out.put_u64_le(value)),
        _ => return None,
    };
    let mut out = BytesMut::with_capacity(data.len());
    let mut convert = |value: i64| put(&mut out, value).ok_or(value);
    let converted = match found {
        Datatype::Int32 => data.as_chunks().0.iter().try_for_each(|four| convert(i32::from_le_bytes(*four).into())),
        Datatype::Int64 => data.as_chunks().0.iter().try_for_each(|eight| convert(i64::from_le_bytes(*eight))),
        _ => return None,
    };
    Some(converted.map(|()| out.freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_results_become_the_unsigned_type_that_was_declared() {
        let long = |value: i64| value.to_le_bytes();
        let narrow = |value, declared| narrowed(&long(value), Datatype::Int64, declared);
        assert_eq!(narrow(65535, Datatype::Uint16), Some(Ok(vec![255, 255].into())));
        assert_eq!(narrow(65536, Datatype::Uint16), Some(Err(65536)));
        assert_eq!(narrow(1 << 32, Datatype::Uint32), Some(Err(1 << 32)));
        assert_eq!(narrow(-1, Datatype::Uint64), Some(Err(-1)));
        assert_eq!(narrow(i64::MAX, Datatype::Uint64), Some(Ok(long(i64::MAX).to_vec().into())));
        assert_eq!(narrowed(&(-1_i32).to_le_bytes(), Datatype::Int32, Datatype::Uint16), Some(Err(-1)));
        assert_eq!(narrow(1, Datatype::Int32), None, "a signed type is never changed");
        assert_eq!(narrowed(&[0; 8], Datatype::Fp64, Datatype::Uint64), None, "nor is a fraction");
    }
}
