//! State tensors of sequences: their first values, and checkpoints of them. Pure.
use bytes::Bytes;
use cresset_proto::{
    inference::ModelInferRequest,
    tensor::{Tensor, element_count, push_input, take_inputs},
};
use prost::Message;
use sha2::{Digest, Sha256};

use crate::{
    contract::{Contract, StateSpec},
    engine::{EngineError, seal},
};

/// The state in which a sequence begins: zeros, or the content of the files that the configuration names.
///
/// # Errors
/// What is wrong with a file, or what `read` says of it.
pub fn initial(contract: &Contract, read: impl Fn(&str) -> Result<Bytes, String>) -> Result<Vec<Tensor>, String> {
    let tensor = |spec: &StateSpec| {
        let shape = with_batch(contract, &spec.initial_dims);
        let size = spec.datatype.size().unwrap_or(1);
        let bytes = element_count(&shape).and_then(|count| count.checked_mul(size)).unwrap_or(0);
        let data = match &spec.initial_file {
            None => Bytes::from(vec![0; bytes]),
            Some(file) => {
                let data = read(file)?;
                if data.len() != bytes {
                    let got = data.len();
                    return Err(format!("initial_state/{file} has {got} bytes, state '{}' needs {bytes}", spec.input));
                }
                data
            }
        };
        Ok(Tensor { name: spec.input.clone(), datatype: spec.datatype, shape, data })
    };
    contract.states().iter().map(tensor).collect()
}

fn with_batch(contract: &Contract, dims: &[i64]) -> Vec<i64> {
    (contract.batch_rows_max > 0).then_some(1).into_iter().chain(dims.iter().copied()).collect()
}

/// The state after a step: what the model returned, under the names by which it takes it.
///
/// # Errors
/// What of it doesn't fit the configuration.
pub fn returned(contract: &Contract, outputs: Vec<Tensor>) -> Result<Vec<Tensor>, String> {
    let states = contract.states().iter().zip(outputs).map(|(spec, mut tensor)| {
        tensor.name.clone_from(&spec.input);
        fits(contract, spec, &tensor)?;
        // The slice would keep the whole batch's result alive for as long as the sequence lives.
        tensor.data = Bytes::copy_from_slice(&tensor.data);
        Ok(tensor)
    });
    states.collect()
}

fn fits(contract: &Contract, spec: &StateSpec, tensor: &Tensor) -> Result<(), String> {
    let wanted = with_batch(contract, &spec.dims);
    let fits = tensor.shape.len() == wanted.len()
        && tensor.shape.iter().zip(&wanted).all(|(dim, wanted)| *wanted == -1 || dim == wanted);
    if fits && tensor.datatype == spec.datatype {
        return Ok(());
    }
    let (datatype, shape) = (tensor.datatype, &tensor.shape);
    Err(format!(
        "state '{}' came back as {datatype} {shape:?}, the configuration declares {} {wanted:?}",
        spec.output, spec.datatype
    ))
}

/// The state as bytes, sealed.
pub fn save(contract: &Contract, states: &[Tensor]) -> Bytes {
    let mut message = ModelInferRequest::default();
    for state in states {
        push_input(&mut message, state.clone());
    }
    seal::seal(fingerprint(contract), &message.encode_to_vec())
}

/// The state that [`save`] wrote.
///
/// # Errors
/// [`EngineError::BadCheckpoint`] for bytes that are damaged or of another model.
pub fn restore(contract: &Contract, checkpoint: &[u8]) -> Result<Vec<Tensor>, EngineError> {
    let bad = |why: String| EngineError::BadCheckpoint(why);
    let state = seal::unseal(fingerprint(contract), checkpoint).map_err(|why| bad(why.to_string()))?;
    let mut message = ModelInferRequest::decode(state).map_err(|why| bad(why.to_string()))?;
    let states = take_inputs(&mut message).map_err(|why| bad(why.to_string()))?;
    if states.len() != contract.states().len() {
        return Err(bad(format!("it has {} state tensors, the model has {}", states.len(), contract.states().len())));
    }
    for (spec, state) in contract.states().iter().zip(&states) {
        fits(contract, spec, state).map_err(bad)?;
    }
    Ok(states)
}

/// Tells models apart whose states can't be exchanged.
fn fingerprint(contract: &Contract) -> u64 {
    let mut hash = Sha256::new();
    for spec in contract.states() {
        hash.update(format!("{}\t{}\t{:?}\n", spec.input, spec.datatype, with_batch(contract, &spec.dims)));
    }
    let digest = hash.finalize();
    digest.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use cresset_proto::{model_config::parse_pbtxt, tensor::Datatype};

    use super::*;

    fn contract(dims: &str, initial: &str) -> Contract {
        let text = format!(
            "max_batch_size: 4 sequence_batching {{ state [ {{ input_name: \"h\" output_name: \"h_out\" data_type: TYPE_FP32 \
             dims: [ {dims} ] {initial} }} ] }}"
        );
        Contract::read(&parse_pbtxt(&text).unwrap()).unwrap()
    }

    fn no_file(_: &str) -> Result<Bytes, String> {
        Err("there is none".into())
    }

    #[test]
    fn a_sequence_begins_with_zeros_or_a_file() {
        let zeros = initial(&contract("2, -1", ""), no_file).unwrap();
        assert_eq!((zeros[0].shape.clone(), zeros[0].data.len()), (vec![1, 2, 1], 8));
        let from_file = contract("2", "initial_state { data_type: TYPE_FP32 dims: [ 2 ] data_file: \"h0\" }");
        let state = initial(&from_file, |file| Ok(file.repeat(4).into())).unwrap();
        assert_eq!(state[0].data[..], *b"h0h0h0h0");
        assert!(initial(&from_file, |_| Ok(Bytes::new())).unwrap_err().contains("initial_state/h0 has 0 bytes"));
        assert_eq!(initial(&from_file, no_file).unwrap_err(), "there is none");
    }

    #[test]
    fn a_checkpoint_is_restored_whole_or_not_at_all() {
        let contract = contract("-1", "");
        let output = Tensor { name: "h_out".into(), datatype: Datatype::Fp32, shape: vec![1, 2], data: vec![7; 8].into() };
        let states = returned(&contract, vec![output.clone()]).unwrap();
        let saved = save(&contract, &states);
        assert_eq!(restore(&contract, &saved).unwrap(), states);
        for cut in 0..saved.len() {
            assert!(restore(&contract, &saved[..cut]).is_err(), "cut to {cut}");
        }
        let other = super::tests::contract("2", "");
        assert!(restore(&other, &saved).is_err());
        let wrong = Tensor { datatype: Datatype::Int32, ..output };
        assert!(returned(&contract, vec![wrong]).unwrap_err().contains("came back as INT32"));
    }
}
