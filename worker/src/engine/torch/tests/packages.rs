//! The engine for AOTInductor packages against the small one that `tests/fixtures/package/make.py` makes.

use serde_json::Value;

use super::*;
use crate::engine::EngineKind;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/package").join(name)
}

fn package(inputs: &[&str], outputs: &[&str]) -> LoadSpec {
    LoadSpec { kind: EngineKind::Package, batched: true, ..spec(&fixture("model.pt2"), inputs, outputs) }
}

fn refused(spec: &LoadSpec) -> String {
    match PackageEngine.load(spec).err().expect("the package must not load") {
        EngineError::CannotLoad(why) => why,
        other => panic!("{other}"),
    }
}

/// What the script that made the package had torch answer.
fn reference() -> Vec<Value> {
    let text = std::fs::read_to_string(fixture("reference.json")).expect("it lies beside the package");
    serde_json::from_str(&text).expect("it is JSON")
}

#[allow(clippy::cast_possible_truncation)]
fn tensor(case: &Value, name: &str) -> (Vec<i64>, Vec<f32>) {
    let numbers =
        |key: &str| case[name][key].as_array().expect("an array").iter().map(|number| number.as_f64().expect("a number"));
    (numbers("shape").map(|dim| dim as i64).collect(), numbers("values").map(|value| value as f32).collect())
}

fn input(case: &Value, name: &str) -> InputParts {
    let (shape, values) = tensor(case, name);
    floats(&shape, &values)
}

#[test]
fn a_package_answers_as_torch_did_in_batches_of_any_size() {
    let mut model = PackageEngine.load(&package(&["x", "state"], &["total", "new"])).expect("the package loads");
    assert_eq!(model.memory_bytes(), 12 * 4, "the weight; the short bias became code");
    for case in reference() {
        let answer = model.infer(&[input(&case, "x"), input(&case, "state")]).expect("it runs");
        for (name, output) in ["total", "new"].into_iter().zip(answer.iter()) {
            assert_eq!((output.shape.clone(), read_floats(output)), tensor(&case, name), "{name}");
        }
        assert!(!answer.timing.infer.is_zero());
    }
}

#[test]
fn one_row_is_answered_though_torch_compiles_for_two_or_more() {
    let case = &reference()[0];
    let inputs = [input(case, "x"), input(case, "state")];
    assert_eq!(inputs[0].shape[0], 1);
    let mut model = PackageEngine.load(&package(&["x", "state"], &["total", "new"])).expect("the package loads");
    for _ in 0..2 {
        let answer = model.infer(&inputs).expect("it runs");
        assert_eq!((answer[1].shape.clone(), read_floats(&answer[1])), tensor(case, "new"));
    }
    let not_batched = LoadSpec { batched: false, ..package(&["x", "state"], &["total"]) };
    let mut model = PackageEngine.load(&not_batched).expect("the package loads");
    let failed = model.infer(&inputs).expect_err("nothing says that the first dimension is the batch");
    assert!(matches!(&failed, EngineError::Failed(why) if why.contains("refused the shapes")), "{failed}");
}

#[test]
fn inputs_and_outputs_go_by_position() {
    let case = &reference()[0];
    let mut by_name = PackageEngine.load(&package(&["INPUT__1", "INPUT__0"], &["OUTPUT__1"])).expect("the package loads");
    let answer = by_name.infer(&[input(case, "state"), input(case, "x")]).expect("it runs");
    assert_eq!((answer.len(), read_floats(&answer[0])), (1, tensor(case, "new").1));
}

#[test]
fn a_sequence_of_a_package_has_its_state_in_tensors() {
    let mut model = PackageEngine.load(&package(&["x", "state"], &["total", "new"])).expect("the package loads");
    let case = &reference()[0];
    let mut sequence = model.open_sequence().expect("opened");
    let first = sequence.step(&[input(case, "x"), input(case, "state")]).expect("it runs");
    let state = InputParts { datatype: Datatype::Fp32, shape: first[1].shape.clone(), parts: vec![first[1].data.clone()] };
    let checkpoint = sequence.checkpoint().expect("saved");
    let mut moved = model.open_sequence().expect("opened");
    moved.restore(&checkpoint).expect("restored");
    let here = sequence.step(&[input(case, "x"), state.clone()]).expect("it runs");
    let there = moved.step(&[input(case, "x"), state]).expect("it runs");
    drop(model);
    assert_eq!(here[1].data, there[1].data);
    assert!(matches!(moved.restore(b"something else"), Err(EngineError::BadCheckpoint(_))));
    assert_eq!(read_floats(&first[1]), tensor(case, "new").1, "a result outlives its package's next call");
}

#[test]
fn inputs_that_a_package_was_not_compiled_for_are_refused_not_read_beyond_their_end() {
    let mut model = PackageEngine.load(&package(&["x", "state"], &["total"])).expect("the package loads");
    let good = || floats(&[2, 3], &[0.0; 6]);
    for wrong in [floats(&[2, 3], &[0.0; 6]), floats(&[2], &[0.0; 2]), floats(&[100, 4], &[0.0; 400])] {
        assert!(matches!(model.infer(&[wrong, good()]), Err(EngineError::Failed(_))));
    }
    assert!(model.infer(&[floats(&[2, 4], &[0.0; 8]), good()]).is_ok(), "the model is unharmed");
    let mut other = package(&["x", "state"], &["total"]);
    other.inputs[0].datatype = Datatype::Fp64;
    let mut model = PackageEngine.load(&other).expect("the package doesn't say what types it takes");
    let doubles = InputParts { datatype: Datatype::Fp64, shape: vec![2, 4], parts: vec![vec![0; 64].into()] };
    assert!(matches!(model.infer(&[doubles, good()]), Err(EngineError::Failed(_))));
}

#[test]
fn what_a_package_can_not_do_is_refused_when_it_loads() {
    let too_few = refused(&package(&["x"], &["total"]));
    assert_eq!(too_few, "the package takes 2 tensors, the configuration declares 1 inputs");
    let too_many = refused(&package(&["x", "state"], &["a", "b", "c"]));
    assert!(too_many.contains("output 'c' is number 2"), "{too_many}");
    let mut text = package(&["x", "state"], &["total"]);
    text.inputs[1].datatype = Datatype::Bytes;
    assert!(refused(&text).contains("'state' is BYTES"));
    let decoupled = LoadSpec { decoupled: true, ..package(&["x", "state"], &["total"]) };
    assert!(refused(&decoupled).contains("decoupled"));
    let scalar =
        LoadSpec { constants: BTreeMap::from([("rate".into(), Scalar::Int(1))]), ..package(&["x", "state"], &["total"]) };
    assert!(refused(&scalar).contains("cresset.scalar.rate"));
}

#[test]
fn files_that_are_no_packages_are_refused_clearly() {
    let script = saved(&testing::plus_one());
    let refusal_of = |path: &Path| refused(&LoadSpec { path: path.into(), ..package(&["x", "state"], &["total"]) });
    assert!(refusal_of(&script.path).contains("no compiled code"));
    let whole = std::fs::read(fixture("model.pt2")).expect("readable");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("model.pt2");
    for at in [100_000, whole.len() / 2] {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        std::fs::write(&path, &flipped).expect("written");
        assert!(refusal_of(&path).contains("damaged"));
        std::fs::write(&path, &whole[..at]).expect("written");
        assert!(refusal_of(&path).contains("cut short"));
    }
    assert_eq!(refusal_of(&dir.path().join("none.pt2")), "the file is not there");
    let as_script = refusal(&spec(&fixture("model.pt2"), &["x"], &["y"]));
    assert!(as_script.to_string().contains("no TorchScript code"), "{as_script}");
}
