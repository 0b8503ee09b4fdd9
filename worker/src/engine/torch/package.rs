//! The engine for AOTInductor packages (`.pt2`): models that were compiled to native code for one kind of device.
//!
//! A package takes tensors by position and returns tensors; it has no state inside, no scalars and no byte strings. Its inputs
//! are fed in the configuration's order, or by the `N` where every name ends in `__N`, or by keyword where it was exported
//! with keywords. A sequence of a package is the package itself: its state, if it has one, goes in and out as tensors. What a
//! package takes is compiled in, unsigned integers included, so nothing is widened for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::Value;

use super::calls::CallShape;
use super::{checkpoint, native, refusal_at_load};
use crate::engine::archive::{self, Layout};
use crate::engine::error::short_message;
use crate::engine::signature::{self, Argument, ArgumentKind, Signature, Source};
use crate::engine::{Datatype, Engine, EngineError, Generation, InputParts, LoadSpec, Model, Outputs, SequenceModel};

/// AOTInductor's packages, through libtorch's own loader.
#[derive(Clone, Copy, Debug, Default)]
pub struct PackageEngine;

impl Engine for PackageEngine {
    fn load(&self, spec: &LoadSpec) -> Result<Box<dyn Model>, EngineError> {
        let refuse = |why: String| EngineError::CannotLoad(short_message(&why));
        archive::check(&spec.path, Layout::Package).map_err(EngineError::CannotLoad)?;
        check_spec(spec).map_err(refuse)?;
        let cannot_load = |refusal| refusal_at_load(refusal, spec);
        let mut package = native::Package::load(&spec.path, spec.device).map_err(cannot_load)?;
        let (inputs, outputs) = package.call_spec().map_err(cannot_load)?;
        let unreadable = || refuse("the package's call specification can't be read".into());
        let signature = read_signature(&inputs, &outputs).ok_or_else(unreadable)?;
        let (takes, given) = (signature.arguments.len(), spec.inputs.len());
        if takes != given {
            return Err(refuse(format!("the package takes {takes} tensors, the configuration declares {given} inputs")));
        }
        let order = order(&signature, spec).map_err(refuse)?;
        let shape_of_calls = CallShape::of(spec);
        shape_of_calls.check_count(count(&outputs).ok_or_else(unreadable)?).map_err(refuse)?;
        let names: Vec<&str> = order.iter().map(|&input| spec.inputs[input].name.as_str()).collect();
        package.bind(&names).map_err(cannot_load)?;
        let fingerprint = u64::from(crc32fast::hash(format!("{inputs}\n{outputs}").as_bytes()));
        let memory_bytes = package.bytes();
        let doubles = Arc::new(AtomicBool::new(false));
        let package = Arc::new(Mutex::new(package));
        let shared = Shared { package, order: order.into(), shape_of_calls, batched: spec.batched, doubles };
        Ok(Box::new(PackageModel { shared, signature, memory_bytes, fingerprint }))
    }

    fn name(&self) -> &'static str {
        "aotinductor"
    }
}

/// What a configuration may ask of TorchScript and not of a package.
fn check_spec(spec: &LoadSpec) -> Result<(), String> {
    if let Some(name) = spec.constants.keys().next() {
        return Err(format!(
            "an AOTInductor package takes tensors only, so the parameter cresset.scalar.{name} can't be given to it"
        ));
    }
    if spec.decoupled {
        return Err("an AOTInductor package answers each request once, so it can't be decoupled".into());
    }
    let inputs = spec.inputs.iter().map(|input| (&input.name, Some(input.datatype)));
    let outputs = spec.outputs.iter().map(|output| (&output.name, output.datatype));
    match inputs.chain(outputs).find(|(_, datatype)| *datatype == Some(Datatype::Bytes)) {
        Some((name, _)) => Err(format!("'{name}' is BYTES, an AOTInductor package takes and returns tensors only")),
        None => Ok(()),
    }
}

/// For each argument of the package the input that feeds it.
fn order(signature: &Signature, spec: &LoadSpec) -> Result<Vec<usize>, String> {
    let sources = signature::bind(signature, &spec.inputs, &spec.constants)?;
    let input = |source| match source {
        Source::Input(input) => Some(input),
        _ => None,
    };
    sources.into_iter().map(input).collect::<Option<_>>().ok_or_else(|| "the package takes tensors only".to_owned())
}

/// Reads the tree of a call: its positional arguments, then those with a name. An argument that is a structure counts as
/// the tensors in it.
fn read_signature(inputs: &str, outputs: &str) -> Option<Signature> {
    let tree: Value = serde_json::from_str(inputs).ok()?;
    let [positional, named] = children(tree.get(1)?)? else { return None };
    let mut names: Vec<String> = (0..leaves(positional)?).map(|position| position.to_string()).collect();
    let keys: Vec<String> = serde_json::from_str(named.get("context")?.as_str()?).ok()?;
    for (key, child) in keys.iter().zip(children(named)?) {
        match leaves(child)? {
            1 => names.push(key.clone()),
            count => names.extend((0..count).map(|at| format!("{key}[{at}]"))),
        }
    }
    let argument = |name| Argument { name, kind: ArgumentKind::Tensor, type_name: "Tensor".into(), has_default: false };
    let returns = format!("{} tensors", count(outputs)?);
    Some(Signature { arguments: names.into_iter().map(argument).collect(), returns })
}

/// How many tensors a specification stands for.
fn count(spec: &str) -> Option<usize> {
    leaves(serde_json::from_str::<Value>(spec).ok()?.get(1)?)
}

fn children(node: &Value) -> Option<&[Value]> {
    Some(node.get("children_spec")?.as_array()?)
}

fn leaves(node: &Value) -> Option<usize> {
    if node.get("type")?.is_null() {
        return Some(1);
    }
    children(node)?.iter().try_fold(0, |sum, child| Some(sum + leaves(child)?))
}

/// What a package's model and its sequences share.
#[derive(Clone)]
struct Shared {
    /// The lock is never waited for: all of them are on one device's thread.
    package: Arc<Mutex<native::Package>>,
    order: Arc<[usize]>,
    shape_of_calls: CallShape,
    batched: bool,
    /// Whether it was seen to refuse one row.
    doubles: Arc<AtomicBool>,
}

impl Shared {
    fn run(&self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        let began = Instant::now();
        self.shape_of_calls.check(inputs)?;
        let one_row = self.batched && inputs.iter().all(|input| input.shape.first() == Some(&1));
        if one_row && self.doubles.load(Ordering::Relaxed) {
            return self.run_doubled(inputs, began);
        }
        match self.run_as_is(inputs, began) {
            Err(EngineError::Failed(why)) if one_row => {
                let outputs = self.run_doubled(inputs, began).map_err(|_| EngineError::Failed(why))?;
                self.doubles.store(true, Ordering::Relaxed);
                Ok(outputs)
            }
            done => done,
        }
    }

    fn run_as_is(&self, inputs: &[InputParts], began: Instant) -> Result<Outputs, EngineError> {
        let mut package = self.package.lock();
        let results = if self.order.is_sorted() {
            package.run(inputs)
        } else {
            let ordered: Vec<InputParts> = self.order.iter().map(|&input| inputs[input].clone()).collect();
            package.run(&ordered)
        };
        self.shape_of_calls.outputs(results.map_err(native::Refusal::into_error)?, began)
    }

    /// One row as two equal ones, of whose answers the second is dropped.
    fn run_doubled(&self, inputs: &[InputParts], began: Instant) -> Result<Outputs, EngineError> {
        let mut doubled = inputs.to_vec();
        for input in &mut doubled {
            input.shape[0] = 2;
            input.parts.extend_from_within(..);
        }
        let mut outputs = self.run_as_is(&doubled, began)?;
        for output in &mut outputs.tensors {
            if let Some(rows @ 2) = output.shape.first_mut() {
                *rows = 1;
                output.data.truncate(output.data.len() / 2);
            }
        }
        Ok(outputs)
    }
}

struct PackageModel {
    shared: Shared,
    signature: Signature,
    memory_bytes: u64,
    fingerprint: u64,
}

impl Model for PackageModel {
    fn infer(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        self.shared.run(inputs)
    }

    fn open_sequence(&mut self) -> Result<Box<dyn SequenceModel>, EngineError> {
        Ok(Box::new(PackageSequence { shared: self.shared.clone(), fingerprint: self.fingerprint }))
    }

    fn open_generation(&mut self, _: &[InputParts]) -> Result<Box<dyn Generation>, EngineError> {
        Err(EngineError::Failed("the model is not decoupled".into()))
    }

    fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }
}

struct PackageSequence {
    shared: Shared,
    fingerprint: u64,
}

impl SequenceModel for PackageSequence {
    fn step(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        self.shared.run(inputs)
    }

    fn checkpoint(&mut self) -> Result<Bytes, EngineError> {
        Ok(checkpoint::seal(self.fingerprint, &[]))
    }

    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), EngineError> {
        match checkpoint::unseal(self.fingerprint, checkpoint) {
            Ok([]) => Ok(()),
            Ok(_) => Err(EngineError::BadCheckpoint("a package has no state".into())),
            Err(why) => Err(EngineError::BadCheckpoint(why.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_specification_is_read_with_its_keywords() {
        let leaf = r#"{"type": null, "context": null, "children_spec": []}"#;
        let pair = format!(r#"{{"type": "builtins.list", "context": "null", "children_spec": [{leaf}, {leaf}]}}"#);
        let inputs = format!(
            r#"[1, {{"type": "builtins.tuple", "context": "null", "children_spec": [
                {{"type": "builtins.tuple", "context": "null", "children_spec": [{leaf}, {pair}]}},
                {{"type": "builtins.dict", "context": "[\"mask\", \"pair\"]", "children_spec": [{leaf}, {pair}]}}]}}]"#
        );
        let signature = read_signature(&inputs, &format!("[1, {pair}]")).expect("it is one");
        let names: Vec<&str> = signature.arguments.iter().map(|argument| argument.name.as_str()).collect();
        assert_eq!(names, ["0", "1", "2", "mask", "pair[0]", "pair[1]"]);
        assert_eq!(signature.returns, "2 tensors");
        for broken in ["", "[1]", "[1, {}]", r#"[1, {"type": "x", "children_spec": 3}]"#] {
            assert!(read_signature(broken, broken).is_none(), "{broken}");
        }
    }
}
