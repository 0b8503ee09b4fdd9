//! Datatypes that libtorch can't hold as they are: byte strings and wide unsigned integers.

use super::*;

use crate::engine::Datatype::{Bytes as Text, Fp32, Int32, Int64, Uint16, Uint32, Uint64};

fn load_typed(script: &Script, inputs: &[(&str, Datatype)], outputs: &[(&str, Datatype)]) -> Result<Box<dyn Model>, EngineError> {
    let saved = saved(script);
    let mut spec = spec(&saved.path, &[], &[]);
    let declared = |&(name, datatype): &(&str, Datatype)| OutputBinding { datatype: Some(datatype), ..output(name) };
    spec.inputs = inputs.iter().map(|(name, datatype)| binding(name, *datatype)).collect();
    spec.outputs = outputs.iter().map(declared).collect();
    TorchEngine.load(&spec)
}

/// The wire's framing.
fn framed(texts: &[&[u8]]) -> Vec<u8> {
    let length = |text: &[u8]| u32::try_from(text.len()).expect("short").to_le_bytes();
    texts.iter().flat_map(|text| [&length(text), *text].concat()).collect()
}

fn texts(shape: &[i64], parts: &[&[&[u8]]]) -> InputParts {
    let parts = parts.iter().map(|texts| framed(texts).into()).collect();
    InputParts { datatype: Text, shape: shape.to_vec(), parts }
}

#[test]
fn byte_strings_go_in_and_come_out_as_they_are() {
    let script = Script::new(
        "def forward(self, words: List[str], x):\n  turned = [word + \"!\" for word in words]\n  \
         return turned, \"one\", x + len(words), {\"kept\": words}\n",
    );
    // A dict's values are found by their keys, so all names have to be keys: here they go by position.
    let mut model =
        load_typed(&script, &[("words", Text), ("x", Fp32)], &[("O__0", Text), ("O__1", Text), ("O__2", Fp32), ("O__3", Text)])
            .expect("the model loads");
    let strange: [&[u8]; 3] = [b"nul \0 inside", b"\xff\xfe not utf-8", b""];
    let answer = model.infer(&[texts(&[4, 1], &[&strange, &[b"fourth"]]), floats(&[1], &[1.0])]).expect("it runs");
    let turned: [&[u8]; 4] = [b"nul \0 inside!", b"\xff\xfe not utf-8!", b"!", b"fourth!"];
    assert_eq!((answer[0].datatype, &answer[0].shape[..], &answer[0].data[..]), (Text, &[4][..], &framed(&turned)[..]));
    assert_eq!((&answer[1].shape[..], &answer[1].data[..]), (&[1][..], &framed(&[b"one"])[..]));
    assert_eq!(read_floats(&answer[2]), [5.0]);
    assert_eq!(answer[3].data[..], framed(&[strange[0], strange[1], strange[2], b"fourth"])[..]);

    let none = model.infer(&[texts(&[0, 1], &[]), floats(&[1], &[1.0])]).expect("it runs");
    assert_eq!((&none[0].shape[..], none[0].data.len()), (&[0][..], 0));
}

#[test]
fn a_dict_of_byte_strings_is_asked_by_key() {
    let script = Script::new("def forward(self, words: List[str]):\n  return {\"first\": [words[0]], \"all\": words}\n");
    let mut model = load_typed(&script, &[("words", Text)], &[("all", Text), ("first", Text)]).expect("the model loads");
    let answer = model.infer(&[texts(&[2], &[&[b"a", b"bc"]])]).expect("it runs");
    assert_eq!([&answer[0].data[..], &answer[1].data[..]], [&framed(&[b"a", b"bc"])[..], &framed(&[b"a"])[..]]);
}

#[test]
fn byte_strings_that_do_not_fit_are_refused_by_name() {
    let script = Script::new("def forward(self, words: List[str]):\n  return words\n");
    let mut model = load_typed(&script, &[("words", Text)], &[("y", Text)]).expect("the model loads");
    let raw =
        |shape: &[i64], part: &[u8]| InputParts { datatype: Text, shape: shape.to_vec(), parts: vec![part.to_vec().into()] };
    let cases = [
        (texts(&[3], &[&[b"a", b"b"]]), "has 2 elements, its shape needs 3"),
        (raw(&[1], b"\x01\0\0"), "ends inside the length of an element"),
        (raw(&[1], b"\x02\0\0\0a"), "longer than the rest of its bytes"),
        (raw(&[1], b"\xff\xff\xff\xffa"), "longer than the rest of its bytes"),
        (raw(&[-1], b""), "impossible shape"),
    ];
    for (input, expected) in cases {
        let refused = model.infer(&[input]).expect_err(expected);
        assert!(matches!(&refused, EngineError::BadInput(why) if why.contains("'words'") && why.contains(expected)), "{refused}");
    }
    assert!(model.infer(&[texts(&[1], &[&[b"fine"]])]).is_ok(), "the model is unharmed");
    let numbers = Script::new("def forward(self, words: List[str]):\n  return torch.ones([len(words)])\n");
    let mut model = load_typed(&numbers, &[("words", Text)], &[("y", Text)]).expect("the model loads");
    let failed = model.infer(&[texts(&[1], &[&[b"a"]])]).expect_err("it returns no strings");
    assert_eq!(failed, EngineError::Failed("output 'y' is FP32, the configuration says BYTES".into()));
}

#[test]
fn wide_unsigned_integers_can_be_computed_with() {
    let script = Script::new("def forward(self, x):\n  return (x * 2 - x).sort(descending=True)[0]\n");
    let cases: [(Datatype, Vec<u8>, Vec<u8>); 3] = [
        (Uint16, [7_u16, 65535].map(u16::to_le_bytes).concat(), [65535_u16, 7].map(u16::to_le_bytes).concat()),
        (Uint32, [7_u32, u32::MAX].map(u32::to_le_bytes).concat(), [u32::MAX, 7].map(u32::to_le_bytes).concat()),
        (Uint64, [7_u64, 1 << 40].map(u64::to_le_bytes).concat(), [1_u64 << 40, 7].map(u64::to_le_bytes).concat()),
    ];
    for (datatype, given, wanted) in cases {
        let mut model = load_typed(&script, &[("x", datatype)], &[("y", datatype)]).expect("the model loads");
        let (first, second) = given.split_at(given.len() / 2);
        let parts = vec![first.to_vec().into(), second.to_vec().into()];
        let answer = model.infer(&[InputParts { datatype, shape: vec![2], parts }]).expect("it runs");
        assert_eq!((answer[0].datatype, &answer[0].data[..]), (datatype, &wanted[..]));
    }
}

#[test]
fn unsigned_integers_out_of_range_are_refused_by_name() {
    let double = Script::new("def forward(self, x):\n  return x + x, x - x - 1\n");
    let one = |datatype, bytes: &[u8]| InputParts { datatype, shape: vec![1], parts: vec![bytes.to_vec().into()] };
    let mut model = load_typed(&double, &[("x", Uint64)], &[("y", Uint64)]).expect("the model loads");
    let refused = model.infer(&[one(Uint64, &u64::MAX.to_le_bytes())]).expect_err("too large");
    let expected =
        "input 'x' holds 18446744073709551615, the largest UINT64 that a model can compute with is 9223372036854775807";
    assert_eq!(refused, EngineError::BadInput(expected.into()));
    let mut model = load_typed(&double, &[("x", Uint16)], &[("y", Uint16)]).expect("the model loads");
    let failed = model.infer(&[one(Uint16, &40_000_u16.to_le_bytes())]).expect_err("too large");
    assert_eq!(failed, EngineError::Failed("output 'y' holds 80000, which no UINT16 can hold".into()));
    let mut model = load_typed(&double, &[("x", Uint32)], &[("O__1", Uint32)]).expect("the model loads");
    let failed = model.infer(&[one(Uint32, &[0; 4])]).expect_err("negative");
    assert_eq!(failed, EngineError::Failed("output 'O__1' holds -1, which no UINT32 can hold".into()));
}

#[test]
fn a_module_may_return_the_exact_unsigned_type_or_declare_the_wide_one() {
    // TorchScript has no name for this type yet; 27 is its number.
    let exact = Script::new("def forward(self, x):\n  return x.to(dtype=27)\n");
    let one = || InputParts { datatype: Uint16, shape: vec![1], parts: vec![vec![1_u8, 2].into()] };
    let mut model = load_typed(&exact, &[("x", Uint16)], &[("y", Uint16)]).expect("the model loads");
    assert_eq!(model.infer(&[one()]).expect("it runs")[0].data[..], [1, 2]);
    let wide = Script::new("def forward(self, x):\n  return x, x.long()\n");
    let mut model = load_typed(&wide, &[("x", Uint16)], &[("y", Int32), ("z", Int64)]).expect("the model loads");
    let answer = model.infer(&[one()]).expect("it runs");
    assert_eq!([&answer[0].data[..], &answer[1].data[..]], [&[1, 2, 0, 0][..], &[1, 2, 0, 0, 0, 0, 0, 0][..]]);
}

#[test]
fn every_datatype_passes_through_unchanged() {
    for datatype in Datatype::ALL {
        let same = saved(&Script::new("def forward(self, x):\n  return x\n"));
        let mut spec = spec(&same.path, &["x"], &["y"]);
        spec.inputs[0].datatype = datatype;
        spec.outputs[0].datatype = Some(datatype);
        let Some(size) = datatype.size() else {
            let refused = refusal(&spec);
            assert!(matches!(&refused, EngineError::CannotLoad(why) if why.contains("needs an argument of the type List[str]")));
            continue;
        };
        let mut model = TorchEngine.load(&spec).expect("the model loads");
        let bytes: Vec<u8> = (0..6 * size).map(|at| u8::try_from(at % 2).expect("small")).collect();
        let input = InputParts { datatype, shape: vec![2, 3], parts: vec![bytes.clone().into()] };
        let outputs = model.infer(&[input]).expect("it runs");
        assert_eq!((outputs[0].datatype, &outputs[0].shape[..], &outputs[0].data[..]), (datatype, &[2, 3][..], &bytes[..]));
    }
}

#[test]
fn bools_that_are_not_0_or_1_count_as_true() {
    let same = saved(&Script::new("def forward(self, x):\n  return x\n"));
    let mut spec = spec(&same.path, &["x"], &["y"]);
    spec.inputs[0].datatype = Datatype::Bool;
    let mut model = TorchEngine.load(&spec).expect("the model loads");
    let input = InputParts { datatype: Datatype::Bool, shape: vec![3], parts: vec![vec![0_u8, 2, 255].into()] };
    assert_eq!(&model.infer(&[input]).expect("it runs")[0].data[..], [0, 1, 1]);
}
