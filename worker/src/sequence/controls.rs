//! What a model is told about the sequence with each request. Pure.
use bytes::{BufMut, Bytes, BytesMut};
use cresset_proto::{
    ids::SequenceId,
    tensor::{Datatype, Tensor},
};

use crate::{
    contract::{Contract, Control, ControlKind},
    error::PredictError,
};

/// Where a request stands in its sequence.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    /// The sequence's id.
    pub id: &'a SequenceId,
    /// It is the first.
    pub start: bool,
    /// It is the last.
    pub end: bool,
}

/// The control inputs for a request, in the contract's order.
///
/// # Errors
/// [`PredictError::CorrelationId`] for an id that doesn't fit the datatype which the model wants it in.
pub fn control_inputs(contract: &Contract, standing: Standing<'_>) -> Result<Vec<Tensor>, PredictError> {
    let controls = contract.sequence.as_ref().map_or(&[][..], |spec| &spec.controls);
    let shape = if contract.batch_rows_max > 0 { vec![1, 1] } else { vec![1] };
    let tensor = |control: &Control| {
        let flag = |is: bool| Ok(Bytes::copy_from_slice(&control.false_true[usize::from(is)]));
        let data = match control.kind {
            ControlKind::Start => flag(standing.start),
            ControlKind::End => flag(standing.end),
            ControlKind::Ready => flag(true),
            ControlKind::CorrelationId => correlation_id(&contract.name, control.datatype, standing.id),
        }?;
        Ok(Tensor { name: control.input.clone(), datatype: control.datatype, shape: shape.clone(), data })
    };
    controls.iter().map(tensor).collect()
}

fn correlation_id(model: &str, datatype: Datatype, id: &SequenceId) -> Result<Bytes, PredictError> {
    let refuse = || PredictError::CorrelationId { model: model.to_owned(), sequence: id.to_string(), datatype };
    let bytes = match (id, datatype) {
        (SequenceId::Number(number), Datatype::Int64) => number.to_le_bytes().to_vec(),
        // Negative ids are Triton's unsigned ones beyond the middle.
        (SequenceId::Number(number), Datatype::Uint64) => number.to_le_bytes().to_vec(),
        (SequenceId::Number(number), Datatype::Int32) => i32::try_from(*number).map_err(|_| refuse())?.to_le_bytes().to_vec(),
        (SequenceId::Number(number), Datatype::Uint32) => u32::try_from(*number).map_err(|_| refuse())?.to_le_bytes().to_vec(),
        (SequenceId::Text(text), Datatype::Bytes) => return Ok(framed(text)),
        (SequenceId::Number(number), Datatype::Bytes) => return Ok(framed(&number.to_string())),
        _ => return Err(refuse()),
    };
    Ok(bytes.into())
}

fn framed(text: &str) -> Bytes {
    let mut framed = BytesMut::with_capacity(4 + text.len());
    framed.put_u32_le(u32::try_from(text.len()).unwrap_or(u32::MAX));
    framed.put_slice(text.as_bytes());
    framed.freeze()
}

#[cfg(test)]
mod tests {
    use cresset_proto::model_config::parse_pbtxt;

    use super::*;

    #[test]
    fn a_model_is_told_what_it_asked_for() {
        let contract = Contract::read(
            &parse_pbtxt(
                "max_batch_size: 2 sequence_batching { control_input [ \
                 { name: \"END\" control [ { kind: CONTROL_SEQUENCE_END int32_false_true: [ -1, 7 ] } ] }, \
                 { name: \"READY\" control [ { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } ] }, \
                 { name: \"ID\" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT32 } ] } ] }",
            )
            .unwrap(),
        )
        .unwrap();
        let tell = |id: SequenceId, end| control_inputs(&contract, Standing { id: &id, start: true, end });
        let told = tell(SequenceId::Number(9), false).unwrap();
        assert_eq!(told[0].data[..], (-1i32).to_le_bytes());
        assert_eq!((told[1].data[..].to_vec(), told[2].data[..].to_vec()), (vec![1], 9u32.to_le_bytes().to_vec()));
        assert_eq!(told[2].shape, [1, 1]);
        assert_eq!(tell(SequenceId::Number(9), true).unwrap()[0].data[..], 7i32.to_le_bytes());
        for wrong in [SequenceId::Number(-1), SequenceId::Text("a".into())] {
            assert!(tell(wrong, false).unwrap_err().to_string().contains("UINT32"));
        }
    }
}
