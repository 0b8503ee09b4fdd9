use bytes::Bytes;
use cresset_proto::{model_config::parse_pbtxt, parameters::int64_parameter};
use proptest::prelude::*;

use super::*;

fn contract(max_batch: usize) -> Contract {
    let text = format!(
        "name: \"simple\" max_batch_size: {max_batch}\n\
         input [ {{ name: \"INPUT0\" data_type: TYPE_INT32 dims: [ 16 ] }}, {{ name: \"INPUT1\" data_type: TYPE_INT32 dims: [ 16 ] }} ]\n\
         output [ {{ name: \"OUTPUT0\" data_type: TYPE_INT32 dims: [ 16 ] }}, {{ name: \"OUTPUT1\" data_type: TYPE_INT32 dims: [ 16 ] }} ]"
    );
    read(&text)
}

fn read(text: &str) -> Contract {
    Contract::read(&parse_pbtxt(text).unwrap()).unwrap()
}

fn tensor(name: &str, datatype: Datatype, shape: &[i64]) -> Tensor {
    let elements: i64 = shape.iter().product();
    let bytes = elements as usize * datatype.size().unwrap();
    Tensor { name: name.into(), datatype, shape: shape.to_vec(), data: Bytes::from(vec![0; bytes]) }
}

fn refusal(tensors: Vec<Tensor>) -> String {
    contract(8).admit(&ModelInferRequest::default(), tensors).unwrap_err().to_string()
}

fn both(shape: &[i64]) -> Vec<Tensor> {
    vec![tensor("INPUT0", Datatype::Int32, shape), tensor("INPUT1", Datatype::Int32, shape)]
}

#[test]
fn inputs_come_out_in_the_contracts_order() {
    let tensors = vec![tensor("INPUT1", Datatype::Int32, &[3, 16]), tensor("INPUT0", Datatype::Int32, &[3, 16])];
    let admitted = contract(8).admit(&ModelInferRequest::default(), tensors).unwrap();
    assert_eq!(admitted.inputs[0].as_ref().unwrap().name, "INPUT0");
    let outputs: Vec<usize> = admitted.outputs.iter().map(|output| output.index).collect();
    assert_eq!((admitted.rows, admitted.bytes, outputs), (3, 384, vec![0, 1]));
}

#[test]
fn refusals_are_tritons() {
    let good = |name: &str| tensor(name, Datatype::Int32, &[1, 16]);
    assert!(refusal(vec![good("INPUT0")]).starts_with("expected 2 inputs but got 1 inputs for model 'simple'"));
    assert!(refusal(vec![good("INPUT0"), good("NOPE")]).contains("unexpected inference input 'NOPE' for model 'simple'"));
    assert!(refusal(vec![good("INPUT0"), good("INPUT0")]).starts_with("input 'INPUT0' already exists in request"));
    assert_eq!(
        refusal(vec![tensor("INPUT0", Datatype::Fp32, &[1, 16]), good("INPUT1")]),
        "inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'"
    );
    assert_eq!(
        refusal(vec![tensor("INPUT0", Datatype::Int32, &[1, 8]), good("INPUT1")]),
        "unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [1,8]"
    );
    assert!(refusal(both(&[9, 16])).contains("batch-size must be <= 8"));
    let nine = tensor("INPUT1", Datatype::Int32, &[9, 16]);
    assert!(refusal(vec![good("INPUT0"), nine]).contains("batch size does not match other inputs"));
}

#[test]
fn unknown_outputs_are_refused_and_none_means_all() {
    let output = |name: &str| InferRequestedOutputTensor { name: name.into(), ..Default::default() };
    let one = ModelInferRequest { outputs: vec![output("OUTPUT1")], ..Default::default() };
    assert_eq!(contract(8).admit(&one, both(&[1, 16])).unwrap().outputs, [WantedOutput { index: 1, classes: 0 }]);
    let nope = ModelInferRequest { outputs: vec![output("NOPE")], ..Default::default() };
    let error = contract(8).admit(&nope, both(&[1, 16])).unwrap_err();
    assert_eq!(error.to_string(), "unexpected inference output 'NOPE' for model 'simple'");
}

#[test]
fn classification_is_a_positive_number() {
    let wanted = |value: i64| ModelInferRequest {
        outputs: vec![InferRequestedOutputTensor {
            name: "OUTPUT0".into(),
            parameters: [("classification".to_owned(), int64_parameter(value))].into(),
        }],
        ..Default::default()
    };
    assert_eq!(contract(8).admit(&wanted(3), both(&[1, 16])).unwrap().outputs, [WantedOutput { index: 0, classes: 3 }]);
    let error = contract(8).admit(&wanted(0), both(&[1, 16])).unwrap_err();
    assert!(error.to_string().contains("'classification' of output 'OUTPUT0'"), "{error}");
}

#[test]
fn optional_inputs_may_be_left_out_and_others_not() {
    let contract = read(
        "name: \"m\" max_batch_size: 4 input [ { name: \"a\" data_type: TYPE_FP32 dims: [ 1 ] }, \
         { name: \"b\" data_type: TYPE_FP32 dims: [ 1 ] optional: true } ] output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] } ]",
    );
    let input = |name: &str| tensor(name, Datatype::Fp32, &[2, 1]);
    let admit = |tensors| contract.admit(&ModelInferRequest::default(), tensors);
    let admitted = admit(vec![input("a")]).unwrap();
    assert_eq!((admitted.inputs.len(), admitted.inputs[1].is_none(), admitted.rows), (2, true, 2));
    assert!(admit(vec![input("a"), input("b")]).unwrap().inputs[1].is_some());
    assert!(matches!(admit(vec![input("b")]), Err(AdmissionError::Count { missing, .. }) if missing == ["a"]));
    assert!(matches!(admit(vec![input("a"), input("c")]), Err(AdmissionError::UnknownInput { .. })));
}

#[test]
fn a_reshape_keeps_free_dimensions_in_order() {
    let contract = read(
        "name: \"m\" max_batch_size: 4 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } } ] \
         output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] } ]",
    );
    let admitted = contract.admit(&ModelInferRequest::default(), vec![tensor("x", Datatype::Fp32, &[3, 1])]).unwrap();
    assert_eq!(admitted.inputs[0].as_ref().unwrap().shape, [3]);
    assert_eq!(reshaped(&[2, 5, 4, 7], 1, &[-1, 4, -1], &[2, -1, 2, -1]), [2, 2, 5, 2, 7]);
    assert_eq!(reshaped(&[5, 4], 0, &[-1, 4], &[-1, 2, 2]), [5, 2, 2]);
}

proptest! {
    #[test]
    fn what_is_admitted_fits(max_batch in 0usize..4, shape in prop::collection::vec(0i64..20, 0..4)) {
        match contract(max_batch).admit(&ModelInferRequest::default(), both(&shape)) {
            Ok(admitted) => {
                prop_assert_eq!(*shape.last().unwrap(), 16);
                prop_assert!(max_batch == 0 || admitted.rows <= max_batch);
                prop_assert_eq!(shape.len(), if max_batch == 0 { 1 } else { 2 });
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
