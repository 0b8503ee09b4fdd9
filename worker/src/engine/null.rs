//! The null engine: it sleeps for a while and answers with what it was given. There is no model behind it, so it is only for
//! finding out what a large cluster's control plane and routers do, and a worker has to be told to allow it.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use cresset_proto::tensor::element_count;

use super::{
    Datatype, EngineError, Generation, InputParts, LoadSpec, Model, OutputBinding, OutputTensor, Outputs, SequenceModel,
    Signature, Timing,
};

/// The largest output that is made up, in bytes.
const OUTPUT_BYTES_MAX: usize = 1 << 30;

/// What a null model does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NullSpec {
    /// How long each call takes, in µs.
    pub sleep_us: u64,
}

/// A null model. Output `i` has the declared type and shape; its bytes are those of input `i` if they fit, else zeros.
#[derive(Clone)]
pub(super) struct NullModel {
    sleep: Duration,
    outputs: Vec<OutputBinding>,
    batched: bool,
    signature: Signature,
}

impl NullModel {
    pub fn new(null: NullSpec, spec: &LoadSpec) -> Self {
        let sleep = Duration::from_micros(null.sleep_us);
        Self { sleep, outputs: spec.outputs.clone(), batched: spec.batched, signature: Signature::default() }
    }

    fn run(&self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        let began = Instant::now();
        std::thread::sleep(self.sleep);
        let answer = |(at, output)| self.answer(output, inputs, at).map_err(EngineError::Failed);
        let tensors = self.outputs.iter().enumerate().map(answer).collect::<Result<_, _>>()?;
        Ok(Outputs { tensors, timing: Timing::of_model(began) })
    }

    fn answer(&self, output: &OutputBinding, inputs: &[InputParts], at: usize) -> Result<OutputTensor, String> {
        let input = inputs.get(at);
        let datatype = output.datatype.or(input.map(|input| input.datatype)).unwrap_or(Datatype::Fp32);
        let rows = inputs.first().and_then(|input| input.shape.first()).copied().unwrap_or(1);
        let batch = usize::from(self.batched);
        // A free dimension is the input's at its place, as far as it has one.
        let free = |place: usize| input.and_then(|input| input.shape.get(place)).copied().unwrap_or(1);
        let dim = |(place, dim): (usize, &i64)| if *dim < 0 { free(place + batch) } else { *dim };
        let dims = output.dims.iter().enumerate().map(dim);
        let shape: Vec<i64> = self.batched.then_some(rows).into_iter().chain(dims).collect();
        let elements = element_count(&shape);
        if let Some(input) = input
            && input.datatype == datatype
            && element_count(&input.shape) == elements
        {
            return Ok(OutputTensor { datatype, shape, data: joined(&input.parts) });
        }
        // An empty byte string is its length, in four bytes.
        let bytes = elements.and_then(|elements| elements.checked_mul(datatype.size().unwrap_or(4)));
        let bytes = bytes.filter(|bytes| *bytes <= OUTPUT_BYTES_MAX).ok_or_else(|| {
            format!("output '{}' of the shape {shape:?} would take more than {OUTPUT_BYTES_MAX} bytes", output.name)
        })?;
        Ok(OutputTensor { datatype, shape, data: BytesMut::zeroed(bytes).freeze() })
    }
}

fn joined(parts: &[Bytes]) -> Bytes {
    match parts {
        [one] => one.clone(),
        many => many.concat().into(),
    }
}

impl Model for NullModel {
    fn infer(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        self.run(inputs)
    }

    fn open_sequence(&mut self) -> Result<Box<dyn SequenceModel>, EngineError> {
        Ok(Box::new(self.clone()))
    }

    /// One response.
    fn open_generation(&mut self, inputs: &[InputParts]) -> Result<Box<dyn Generation>, EngineError> {
        Ok(Box::new(Once { model: self.clone(), inputs: Some(inputs.to_vec()) }))
    }

    fn memory_bytes(&self) -> u64 {
        0
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }
}

impl SequenceModel for NullModel {
    fn step(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        self.run(inputs)
    }

    fn checkpoint(&mut self) -> Result<Bytes, EngineError> {
        Ok(Bytes::new())
    }

    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), EngineError> {
        let fits = checkpoint.is_empty();
        fits.then_some(()).ok_or_else(|| EngineError::BadCheckpoint("a null model has no state".into()))
    }
}

struct Once {
    model: NullModel,
    inputs: Option<Vec<InputParts>>,
}

impl Generation for Once {
    fn next(&mut self) -> Result<Option<Outputs>, EngineError> {
        self.inputs.take().map(|inputs| self.model.run(&inputs)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::spec_of;
    use super::super::{AnyEngine, Engine, EngineKind};
    use super::*;

    fn output(name: &str, datatype: Datatype, dims: &[i64]) -> OutputBinding {
        OutputBinding { name: name.into(), datatype: Some(datatype), dims: dims.to_vec() }
    }

    fn load(batched: bool, sleep_us: u64, outputs: Vec<OutputBinding>) -> Box<dyn Model> {
        let spec = LoadSpec { kind: EngineKind::Null(NullSpec { sleep_us }), batched, outputs, ..spec_of("nowhere".as_ref()) };
        AnyEngine { null_enabled: true }.load(&spec).expect("it is allowed")
    }

    fn parts(datatype: Datatype, shape: &[i64], parts: &[&[u8]]) -> InputParts {
        InputParts { datatype, shape: shape.to_vec(), parts: parts.iter().map(|part| part.to_vec().into()).collect() }
    }

    #[test]
    fn inputs_come_back_by_position_in_the_declared_type_and_shape() {
        let outputs = vec![
            output("same", Datatype::Uint8, &[2]),
            output("other", Datatype::Int64, &[3, -1]),
            output("words", Datatype::Bytes, &[2]),
        ];
        let mut model = load(true, 0, outputs);
        let inputs = [parts(Datatype::Uint8, &[2, 2], &[&[1, 2], &[3, 4]]), parts(Datatype::Uint8, &[2, 3, 4], &[&[0; 24]])];
        let answer = model.infer(&inputs).expect("it runs");
        assert_eq!((&answer[0].shape[..], &answer[0].data[..]), (&[2, 2][..], &[1, 2, 3, 4][..]));
        assert_eq!((&answer[1].shape[..], answer[1].data.len()), (&[2, 3, 4][..], 2 * 3 * 4 * 8));
        assert_eq!((&answer[2].shape[..], &answer[2].data[..]), (&[2, 2][..], &[0; 16][..]));
        assert_eq!(model.memory_bytes(), 0);
    }

    #[test]
    fn a_call_takes_as_long_as_it_should() {
        let mut model = load(false, 3_000, vec![output("y", Datatype::Fp32, &[1])]);
        let timing = model.infer(&[]).expect("it runs").timing;
        assert!(timing.infer >= Duration::from_micros(3_000), "{timing:?}");
    }

    #[test]
    fn sequences_and_generations_are_calls() {
        let mut model = load(false, 0, vec![output("y", Datatype::Uint8, &[1])]);
        let input = [parts(Datatype::Uint8, &[1], &[&[7]])];
        let mut sequence = model.open_sequence().expect("opened");
        assert_eq!(sequence.step(&input).expect("it runs")[0].data[..], [7]);
        let checkpoint = sequence.checkpoint().expect("saved");
        assert_eq!(sequence.restore(&checkpoint), Ok(()));
        assert!(matches!(sequence.restore(b"state"), Err(EngineError::BadCheckpoint(_))));
        let mut generation = model.open_generation(&input).expect("opened");
        assert_eq!(generation.next().expect("it runs").expect("there is one")[0].data[..], [7]);
        assert!(generation.next().expect("it runs").is_none());
    }

    #[test]
    fn an_output_that_is_too_large_is_an_error() {
        let mut model = load(false, 0, vec![output("y", Datatype::Fp32, &[1 << 40])]);
        let failed = model.infer(&[]).expect_err("too large");
        assert!(matches!(&failed, EngineError::Failed(why) if why.contains("output 'y'")), "{failed}");
    }
}
