use cresset_proto::model_config::parse_pbtxt;

use super::*;

fn contract(text: &str) -> Contract {
    Contract::read(&parse_pbtxt(&format!("name: \"m\" {text}")).unwrap()).unwrap()
}

fn floats(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn request(contract: &Contract, shape: &[i64], values: &[f32]) -> Admitted {
    let tensor = Tensor { name: "x".into(), datatype: Datatype::Fp32, shape: shape.to_vec(), data: floats(values) };
    contract.admit(&Default::default(), vec![tensor]).unwrap()
}

fn output(datatype: Datatype, shape: &[i64], data: Bytes) -> OutputTensor {
    OutputTensor { datatype, shape: shape.to_vec(), data }
}

const PLAIN: &str = "max_batch_size: 8 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 2 ] } ] \
                     output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] } ]";

#[test]
fn rows_go_in_one_after_the_other_and_come_back_to_their_owners() {
    let contract = contract(PLAIN);
    let (a, b) = (request(&contract, &[1, 2], &[1., 2.]), request(&contract, &[2, 2], &[3., 4., 5., 6.]));
    let inputs = assemble(&contract, &[&a, &b]);
    assert_eq!((inputs.len(), inputs[0].shape.clone(), inputs[0].parts.len()), (1, vec![3, 2], 2));
    let outputs = [output(Datatype::Fp32, &[3, 1], floats(&[10., 20., 30.]))];
    let answers: Vec<Tensor> =
        answers(&contract, &[&a, &b], &outputs).into_iter().map(|answer| answer.unwrap().remove(0)).collect();
    assert_eq!((answers[0].shape.clone(), answers[0].data.clone()), (vec![1, 1], floats(&[10.])));
    assert_eq!((answers[1].shape.clone(), answers[1].data.clone()), (vec![2, 1], floats(&[20., 30.])));
}

#[test]
fn what_breaks_the_promise_is_named() {
    let contract = contract(PLAIN);
    let one = request(&contract, &[1, 2], &[1., 2.]);
    for (outputs, text) in [
        (vec![], "returned 0 outputs"),
        (vec![output(Datatype::Int32, &[1, 1], floats(&[1.]))], "came out as INT32"),
        (vec![output(Datatype::Fp32, &[2, 1], floats(&[1., 2.]))], "has the shape [2, 1] for a batch of 1"),
    ] {
        let error = answers(&contract, &[&one], &outputs).remove(0).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn ragged_requests_share_a_batch_and_are_scattered_again() {
    let contract = contract(
        "max_batch_size: 8 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true } ] \
         output [ { name: \"y\" data_type: TYPE_FP32 dims: [ -1 ] } ] \
         batch_input [ { kind: BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO target_name: \"ends\" data_type: TYPE_INT32 source_input: \"x\" } ] \
         batch_output [ { target_name: \"y\" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: \"x\" } ]",
    );
    let (a, b) = (request(&contract, &[1, 3], &[1., 2., 3.]), request(&contract, &[1, 1], &[4.]));
    assert_eq!(shape_class(&contract, &a), shape_class(&contract, &b));
    let inputs = assemble(&contract, &[&a, &b]);
    assert_eq!((inputs[0].shape.clone(), inputs[1].shape.clone()), (vec![4], vec![3]));
    let ends: Vec<u8> = [0i32, 3, 4].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(inputs[1].parts[0], ends);
    let outputs = [output(Datatype::Fp32, &[4], floats(&[2., 4., 6., 8.]))];
    let answers: Vec<Tensor> =
        answers(&contract, &[&a, &b], &outputs).into_iter().map(|answer| answer.unwrap().remove(0)).collect();
    assert_eq!((answers[0].shape.clone(), answers[0].data.clone()), (vec![1, 3], floats(&[2., 4., 6.])));
    assert_eq!((answers[1].shape.clone(), answers[1].data.clone()), (vec![1, 1], floats(&[8.])));
}

#[test]
fn strings_are_cut_at_their_elements() {
    let contract = contract(
        "max_batch_size: 8 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 2 ] } ] output [ { name: \"y\" data_type: TYPE_STRING dims: [ 1 ] } ]",
    );
    let (a, b) = (request(&contract, &[1, 2], &[0.; 2]), request(&contract, &[2, 2], &[0.; 4]));
    let framed: Vec<u8> =
        ["", "two", "3"].iter().flat_map(|text| [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()).collect();
    let outputs = [output(Datatype::Bytes, &[3], framed.clone().into())];
    let answers: Vec<Tensor> =
        answers(&contract, &[&a, &b], &outputs).into_iter().map(|answer| answer.unwrap().remove(0)).collect();
    assert_eq!((answers[0].shape.clone(), &answers[0].data[..]), (vec![1, 1], &framed[..4]));
    assert_eq!((answers[1].shape.clone(), &answers[1].data[..]), (vec![2, 1], &framed[4..]));
    let broken = [output(Datatype::Bytes, &[1], Bytes::from_static(&[9, 0, 0, 0, 1]))];
    assert!(super::answers(&contract, &[&a], &broken)[0].is_err());
}

#[test]
fn an_output_takes_the_callers_shape() {
    let contract = contract(
        "max_batch_size: 8 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 2 ] } ] \
         output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } } ]",
    );
    let a = request(&contract, &[2, 2], &[0.; 4]);
    let answer = answers(&contract, &[&a], &[output(Datatype::Fp32, &[2], floats(&[1., 2.]))]).remove(0).unwrap();
    assert_eq!(answer[0].shape, [2, 1]);
}

#[test]
fn classes_replace_the_tensor() {
    let contract = contract(
        "max_batch_size: 8 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 2 ] } ] output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 3 ] } ]",
    );
    let mut a = request(&contract, &[1, 2], &[0.; 2]);
    a.outputs[0].classes = 2;
    let answer = answers(&contract, &[&a], &[output(Datatype::Fp32, &[1, 3], floats(&[1., 3., 2.]))]).remove(0).unwrap();
    assert_eq!((answer[0].datatype, answer[0].shape.clone()), (Datatype::Bytes, vec![1, 2]));
    assert_eq!(&answer[0].data[4..14], b"3.000000:1");
}

#[test]
fn left_out_inputs_set_requests_apart() {
    let contract = contract(
        "max_batch_size: 8 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 2 ] }, { name: \"o\" data_type: TYPE_INT64 dims: [ 1 ] optional: true } ] \
         output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] } ]",
    );
    let without = request(&contract, &[1, 2], &[0.; 2]);
    let mut with = without.clone();
    with.inputs[1] = Some(Tensor { name: "o".into(), datatype: Datatype::Int64, shape: vec![1, 1], data: vec![0; 8].into() });
    assert_ne!(shape_class(&contract, &without), shape_class(&contract, &with));
    assert!(assemble(&contract, &[&without])[1].is_absent());
}
