use proptest::prelude::*;

use super::*;
use crate::{
    inference::model_infer_request::InferInputTensor,
    parameters::{int64_parameter, string_parameter},
    shared_memory::{BYTE_SIZE, OFFSET, REGION},
};

/// The tensors of a request; one region exists, `r`, and holds the bytes 0, 1, 2 and so on.
fn inputs(mut request: ModelInferRequest) -> Result<Vec<Tensor>, TensorError> {
    take_inputs_from(&mut request, &|reference| match reference.region.as_str() {
        "r" => Ok((0..=255).skip(reference.offset as usize).take(reference.byte_size as usize).collect::<Vec<u8>>().into()),
        other => Err(SharedMemoryError::UnknownRegion(other.to_owned())),
    })
}

/// Moves an input into a region.
fn share(request: &mut ModelInferRequest, index: usize, region: &str, offset: i64, byte_size: i64) {
    let parameters = &mut request.inputs[index].parameters;
    parameters.insert(REGION.into(), string_parameter(region));
    parameters.insert(OFFSET.into(), int64_parameter(offset));
    parameters.insert(BYTE_SIZE.into(), int64_parameter(byte_size));
}

fn request(datatype: &str, shape: &[i64], contents: Option<InferTensorContents>, raw: Option<&[u8]>) -> ModelInferRequest {
    ModelInferRequest {
        model_name: "simple".into(),
        inputs: vec![InferInputTensor {
            name: "INPUT0".into(),
            datatype: datatype.into(),
            shape: shape.to_vec(),
            contents,
            ..Default::default()
        }],
        raw_input_contents: raw.map(Bytes::copy_from_slice).into_iter().collect(),
        ..Default::default()
    }
}

#[test]
fn typed_and_raw_contents_give_the_same_tensor() {
    let contents = InferTensorContents { fp32_contents: vec![1.0, -2.5], ..Default::default() };
    let typed = inputs(request("FP32", &[2], Some(contents), None)).unwrap();
    let bytes: Vec<u8> = [1.0f32, -2.5].iter().flat_map(|v| v.to_le_bytes()).collect();
    let raw = inputs(request("FP32", &[2], None, Some(&bytes))).unwrap();
    assert_eq!(typed, raw);
}

#[test]
fn mixing_raw_and_typed_is_refused_in_tritons_words() {
    let contents = InferTensorContents { fp32_contents: vec![1.0], ..Default::default() };
    let error = inputs(request("FP32", &[1], Some(contents), Some(&[0; 4]))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'"
    );
}

#[test]
fn byte_counts_must_match_exactly() {
    let error = inputs(request("INT32", &[1, 16], None, Some(&[0; 60]))).unwrap_err();
    assert!(error.to_string().ends_with("Expected 64, got 60"), "{error}");
    assert!(matches!(inputs(request("FP32", &[1 << 32, 1 << 32], None, Some(&[0; 4]))), Err(TensorError::Overflow { .. })));
    assert!(matches!(inputs(request("FP32", &[-1], None, Some(&[0; 4]))), Err(TensorError::NegativeDimension { .. })));
}

#[test]
fn fewer_raw_entries_than_inputs_are_missing_data_and_more_are_ignored() {
    let mut two = request("INT8", &[1], None, Some(&[7]));
    two.inputs.push(two.inputs[0].clone());
    assert!(matches!(inputs(two), Err(TensorError::NoData { .. })));
    let mut extra = request("INT8", &[1], None, Some(&[7]));
    extra.raw_input_contents.push(Bytes::from_static(b"ignored"));
    assert_eq!(inputs(extra).unwrap().len(), 1);
}

#[test]
fn shared_inputs_take_no_raw_entry() {
    let mut three = request("INT8", &[2], None, Some(&[7, 7]));
    three.inputs = vec![three.inputs[0].clone(); 3];
    share(&mut three, 0, "r", 4, 2);
    share(&mut three, 2, "r", 0, 2);
    let tensors = inputs(three).unwrap();
    assert_eq!(tensors.iter().map(|tensor| tensor.data.to_vec()).collect::<Vec<_>>(), [[4, 5], [7, 7], [0, 1]]);
}

#[test]
fn shared_inputs_may_stand_beside_typed_ones_but_have_no_contents_themselves() {
    let contents = || Some(InferTensorContents { int_contents: vec![7, 7], ..Default::default() });
    let mut mixed = request("INT8", &[2], contents(), None);
    mixed.inputs.push(request("INT8", &[2], None, None).inputs.remove(0));
    share(&mut mixed, 1, "r", 0, 2);
    assert_eq!(inputs(mixed.clone()).unwrap()[1].data[..], [0, 1]);
    mixed.inputs[1].contents = contents();
    let error = inputs(mixed).unwrap_err();
    let words = "unexpected 'content' provided when using shared memory for input tensor 'INPUT0' for model 'simple'";
    assert_eq!(error.to_string(), words);
}

#[test]
fn shared_inputs_are_checked_like_any_other() {
    let shared = |datatype: &str, region: &str, byte_size| {
        let mut one = request(datatype, &[2], None, None);
        share(&mut one, 0, region, 0, byte_size);
        inputs(one).map_err(|error| (error.reason(), error.to_string()))
    };
    assert!(shared("INT8", "r", 2).is_ok());
    let (reason, text) = shared("INT8", "r", 3).unwrap_err();
    assert_eq!((reason, text.ends_with("Expected 2, got 3")), (Reason::InvalidArgument, true), "{text}");
    let mut unserved = request("INT8", &[2], None, None);
    share(&mut unserved, 0, "r", 0, 2);
    assert_eq!(take_inputs(&mut unserved).unwrap_err().reason(), Reason::Unsupported);
    let (reason, text) = shared("INT8", "nope", 2).unwrap_err();
    assert_eq!((reason, &*text), (Reason::UnknownRegion, "Unable to find shared memory region: 'nope'"));
    let (_, text) = shared("BYTES", "r", 8).unwrap_err();
    assert!(text.contains("incomplete string data"), "{text}");
}

#[test]
fn strings_are_framed_and_counted() {
    let contents =
        InferTensorContents { bytes_contents: vec![Bytes::from_static(b"he\0llo"), Bytes::new()], ..Default::default() };
    let tensor = inputs(request("BYTES", &[2], Some(contents), None)).unwrap().remove(0);
    assert_eq!(&tensor.data[..], b"\x06\0\0\0he\0llo\0\0\0\0");
    let error = inputs(request("BYTES", &[1], None, Some(b"\x09\0\0\0abc"))).unwrap_err();
    assert!(error.to_string().contains("expecting string of length 9 but only 3 bytes available"), "{error}");
}

#[test]
fn half_precision_is_raw_only_and_values_must_fit() {
    let floats = InferTensorContents { fp32_contents: vec![1.0], ..Default::default() };
    assert!(matches!(inputs(request("FP16", &[1], Some(floats.clone()), None)), Err(TensorError::RawOnly { .. })));
    assert!(matches!(inputs(request("INT8", &[1], Some(floats), None)), Err(TensorError::WrongField { .. })));
    let big = InferTensorContents { int_contents: vec![300], ..Default::default() };
    assert!(matches!(inputs(request("INT8", &[1], Some(big), None)), Err(TensorError::OutOfRange { .. })));
}

proptest! {
    #[test]
    fn no_request_panics(
        datatype in "(BOOL|INT8|FP32|BYTES|BF16|UINT64|[A-Z]{0,4})",
        shape in prop::collection::vec(any::<i64>(), 0..20),
        raw in prop::option::of(prop::collection::vec(any::<u8>(), 0..64)),
        ints in prop::collection::vec(any::<i32>(), 0..4),
    ) {
        let contents = InferTensorContents { int_contents: ints, ..Default::default() };
        if let Ok(tensors) = inputs(request(&datatype, &shape, Some(contents), raw.as_deref())) {
            for tensor in tensors {
                if let Some(size) = tensor.datatype.size() {
                    prop_assert_eq!(element_count(&tensor.shape).unwrap() * size, tensor.data.len());
                }
            }
        }
    }
}
