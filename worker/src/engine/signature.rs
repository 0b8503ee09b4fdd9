//! The arguments of a module's `forward`, and which input or constant feeds which.

use std::collections::BTreeMap;

use super::{Datatype, InputBinding, Scalar};

/// What an argument takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgumentKind {
    /// `Tensor` or `Optional[Tensor]`.
    Tensor,
    /// `List[str]`, or optional: takes byte strings.
    Texts,
    /// `int`, or optional.
    Int,
    /// `float`, or optional.
    Float,
    /// `bool`, or optional.
    Bool,
    /// `str`, or optional.
    Text,
    /// `Dict[str, Tensor]`: takes all inputs by name.
    Dict,
    /// Anything else: only a default can feed it.
    Other,
}

/// One argument of `forward`, without the module itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its name in the source.
    pub name: String,
    /// What can feed it.
    pub kind: ArgumentKind,
    /// Its type as TorchScript writes it, for messages.
    pub type_name: String,
    /// Whether it may be left out.
    pub has_default: bool,
}

/// The signature of a module's `forward`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Signature {
    /// The arguments in order.
    pub arguments: Vec<Argument>,
    /// The type of what it returns, as TorchScript writes it.
    pub returns: String,
}

impl std::fmt::Display for Signature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("forward(")?;
        for (i, argument) in self.arguments.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            let default = if argument.has_default { " = .." } else { "" };
            write!(f, "{comma}{}: {}{default}", argument.name, argument.type_name)?;
        }
        write!(f, ") -> {}", self.returns)
    }
}

/// Where an argument's value comes from in every call.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The input with this index in the configuration.
    Input(usize),
    /// A constant of the configuration.
    Constant(Scalar),
    /// The default in the module's source.
    Default,
    /// All inputs, by name.
    AllInputs,
}

/// Finds the source of each argument.
///
/// Constants go by the argument's name. Then the inputs: if the one argument left is a
/// `Dict[str, Tensor]` it gets them all; if every input's name is an argument's name they go by name;
/// if every name ends in `__N` then N is the position among the arguments without a constant; else
/// they go to the arguments without a constant in the configuration's order.
///
/// # Errors
/// A message that names the input or argument at fault and the signature, also if only some names
/// match: that is a spelling mistake more often than not.
pub fn bind(signature: &Signature, inputs: &[InputBinding], constants: &BTreeMap<String, Scalar>) -> Result<Vec<Source>, String> {
    let fail = |why: String| format!("{why}; the module's signature is {signature}");
    let mut sources = bind_constants(signature, constants).map_err(fail)?;
    let open: Vec<usize> = (0..sources.len()).filter(|&at| sources[at].is_none()).collect();
    let dict = open.iter().copied().find(|&at| signature.arguments[at].kind == ArgumentKind::Dict);
    if let Some(at) = dict.filter(|_| !inputs.is_empty()) {
        if let Some(text) = inputs.iter().find(|input| input.datatype == Datatype::Bytes) {
            let (input, argument) = (&text.name, &signature.arguments[at].name);
            return Err(fail(format!("input '{input}' is BYTES, argument '{argument}' takes a dict of tensors")));
        }
        sources[at] = Some(Source::AllInputs);
    } else {
        let targets = targets(signature, inputs, &open).map_err(fail)?;
        for (index, at) in targets.into_iter().enumerate() {
            let (input, argument) = (&inputs[index].name, &signature.arguments[at]);
            if sources[at].is_some() {
                return Err(fail(format!("input '{input}' is bound to argument '{}', which is bound already", argument.name)));
            }
            check_kind(&inputs[index], argument).map_err(fail)?;
            sources[at] = Some(Source::Input(index));
        }
    }
    let arguments = signature.arguments.iter();
    sources
        .into_iter()
        .zip(arguments)
        .map(|(source, argument)| match source {
            Some(source) => Ok(source),
            None if argument.has_default => Ok(Source::Default),
            None => Err(fail(format!(
                "argument '{name}: {type_name}' gets no value, declare an input or the parameter cresset.scalar.{name}",
                name = argument.name,
                type_name = argument.type_name,
            ))),
        })
        .collect()
}

/// Whether the input's datatype is what the argument takes.
fn check_kind(input: &InputBinding, argument: &Argument) -> Result<(), String> {
    let Argument { name, type_name, .. } = argument;
    let (input, datatype) = (&input.name, input.datatype);
    match (argument.kind, datatype) {
        (ArgumentKind::Texts, Datatype::Bytes) => Ok(()),
        (ArgumentKind::Tensor, datatype) if datatype != Datatype::Bytes => Ok(()),
        (ArgumentKind::Tensor, _) => {
            Err(format!("input '{input}' is BYTES, which needs an argument of the type List[str]; '{name}' is {type_name}"))
        }
        (ArgumentKind::Texts, _) => {
            Err(format!("input '{input}' is {datatype}, argument '{name}: {type_name}' takes BYTES (TYPE_STRING)"))
        }
        _ => Err(format!(
            "input '{input}' can't feed argument '{name}: {type_name}', which takes no tensor; \
             give it a constant with the parameter cresset.scalar.{name}"
        )),
    }
}

fn bind_constants(signature: &Signature, constants: &BTreeMap<String, Scalar>) -> Result<Vec<Option<Source>>, String> {
    let mut sources: Vec<Option<Source>> = vec![None; signature.arguments.len()];
    for (name, scalar) in constants {
        let Some(at) = signature.arguments.iter().position(|argument| argument.name == *name) else {
            return Err(format!("the parameter cresset.scalar.{name} names no argument"));
        };
        let argument = &signature.arguments[at];
        let value = match (argument.kind, scalar) {
            (ArgumentKind::Int, Scalar::Int(_))
            | (ArgumentKind::Float, Scalar::Float(_))
            | (ArgumentKind::Bool, Scalar::Bool(_))
            | (ArgumentKind::Text, Scalar::Text(_)) => scalar.clone(),
            #[allow(clippy::cast_precision_loss)]
            (ArgumentKind::Float, Scalar::Int(value)) => Scalar::Float(*value as f64),
            _ => {
                return Err(format!(
                    "the parameter cresset.scalar.{name} has a value of the wrong type for argument '{name}: {}'",
                    argument.type_name
                ));
            }
        };
        sources[at] = Some(Source::Constant(value));
    }
    Ok(sources)
}

/// For each input the argument that it feeds.
fn targets(signature: &Signature, inputs: &[InputBinding], open: &[usize]) -> Result<Vec<usize>, String> {
    let by_name: Vec<Option<usize>> =
        inputs.iter().map(|input| signature.arguments.iter().position(|argument| argument.name == input.name)).collect();
    if by_name.iter().any(Option::is_some) {
        let pairs = by_name.into_iter().zip(inputs);
        return pairs
            .map(|(at, input)| at.ok_or_else(|| format!("input '{}' is not an argument, though others are", input.name)))
            .collect();
    }
    let positions: Vec<Option<usize>> = inputs.iter().map(|input| position_in_name(&input.name)).collect();
    if !positions.is_empty() && positions.iter().all(Option::is_some) {
        let pairs = positions.into_iter().flatten().zip(inputs);
        return pairs
            .map(|(position, input)| {
                let left = open.len();
                let at = open.get(position).copied();
                at.ok_or_else(|| format!("input '{}' is at position {position}, there are {left} arguments", input.name))
            })
            .collect();
    }
    if inputs.len() > open.len() {
        let (extra, left) = (&inputs[open.len()].name, open.len());
        return Err(format!("input '{extra}' is one too many, {left} arguments take a tensor"));
    }
    Ok(open[..inputs.len()].to_vec())
}

/// The N of a name like `INPUT__N`.
pub(super) fn position_in_name(name: &str) -> Option<usize> {
    let (_, digits) = name.rsplit_once("__")?;
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(arguments: &[(&str, ArgumentKind, bool)]) -> Signature {
        let arguments = arguments
            .iter()
            .map(|&(name, kind, has_default)| Argument { name: name.into(), kind, type_name: format!("{kind:?}"), has_default })
            .collect();
        Signature { arguments, returns: "Tensor".into() }
    }

    fn inputs(names: &[&str]) -> Vec<InputBinding> {
        names.iter().map(|name| InputBinding { name: (*name).into(), datatype: Datatype::Fp32 }).collect()
    }

    fn constants(pairs: &[(&str, Scalar)]) -> BTreeMap<String, Scalar> {
        pairs.iter().map(|(name, scalar)| ((*name).to_string(), scalar.clone())).collect()
    }

    use ArgumentKind::{Dict, Float, Int, Tensor};

    #[test]
    fn names_win_over_the_order() {
        let signature = signature(&[("a", Tensor, false), ("b", Tensor, false)]);
        let bound = bind(&signature, &inputs(&["b", "a"]), &BTreeMap::new());
        assert_eq!(bound, Ok(vec![Source::Input(1), Source::Input(0)]));
    }

    #[test]
    fn positions_in_names_count_arguments_without_a_constant() {
        let signature = signature(&[("sr", Int, false), ("a", Tensor, false), ("b", Tensor, false)]);
        let sr = constants(&[("sr", Scalar::Int(8000))]);
        let bound = bind(&signature, &inputs(&["INPUT__1", "INPUT__0"]), &sr);
        assert_eq!(bound, Ok(vec![Source::Constant(Scalar::Int(8000)), Source::Input(1), Source::Input(0)]));
    }

    #[test]
    fn other_names_go_by_order_and_defaults_fill_the_rest() {
        let signature = signature(&[("x", Tensor, false), ("scale", Float, true)]);
        let bound = bind(&signature, &inputs(&["audio"]), &BTreeMap::new());
        assert_eq!(bound, Ok(vec![Source::Input(0), Source::Default]));
        let scaled = bind(&signature, &inputs(&["audio"]), &constants(&[("scale", Scalar::Int(2))]));
        assert_eq!(scaled, Ok(vec![Source::Input(0), Source::Constant(Scalar::Float(2.0))]));
    }

    #[test]
    fn a_dict_takes_all_inputs() {
        let signature = signature(&[("batch", Dict, false)]);
        assert_eq!(bind(&signature, &inputs(&["a", "b"]), &BTreeMap::new()), Ok(vec![Source::AllInputs]));
        assert!(bind(&signature, &[], &BTreeMap::new()).is_err());
    }

    #[test]
    fn every_refusal_names_the_culprit_and_the_signature() {
        let two = signature(&[("x", Tensor, false), ("sr", Int, false)]);
        let cases = [
            (inputs(&["x"]), constants(&[]), "argument 'sr: Int' gets no value"),
            (inputs(&["x", "sr"]), constants(&[]), "input 'sr' can't feed argument 'sr: Int'"),
            (inputs(&["x", "y"]), constants(&[("sr", Scalar::Int(1))]), "input 'y' is not an argument"),
            (inputs(&["p", "q"]), constants(&[("sr", Scalar::Int(1))]), "input 'q' is one too many"),
            (inputs(&["I__0", "I__0"]), constants(&[("sr", Scalar::Int(1))]), "bound already"),
            (inputs(&["I__3"]), constants(&[("sr", Scalar::Int(1))]), "position 3"),
            (inputs(&["x"]), constants(&[("sr", Scalar::Float(1.0))]), "wrong type"),
            (inputs(&["x"]), constants(&[("rate", Scalar::Int(1))]), "names no argument"),
            (inputs(&["x"]), constants(&[("x", Scalar::Int(1)), ("sr", Scalar::Int(1))]), "wrong type"),
            (inputs(&[]), constants(&[("sr", Scalar::Int(1))]), "argument 'x: Tensor' gets no value"),
        ];
        for (inputs, constants, expected) in cases {
            let refusal = bind(&two, &inputs, &constants).expect_err(expected);
            assert!(refusal.contains(expected) && refusal.contains("forward(x: Tensor, sr: Int)"), "{refusal}");
        }
    }

    #[test]
    fn byte_strings_and_tensors_are_not_mixed_up() {
        let of = |kind| signature(&[("x", kind, false)]);
        let text = [InputBinding { name: "x".into(), datatype: Datatype::Bytes }];
        assert_eq!(bind(&of(ArgumentKind::Texts), &text, &BTreeMap::new()), Ok(vec![Source::Input(0)]));
        for (signature, inputs, expected) in [
            (of(Tensor), &text[..], "needs an argument of the type List[str]"),
            (of(Dict), &text[..], "takes a dict of tensors"),
            (of(ArgumentKind::Texts), &inputs(&["x"])[..], "takes BYTES"),
        ] {
            let refusal = bind(&signature, inputs, &BTreeMap::new()).expect_err(expected);
            assert!(refusal.contains("input 'x'") && refusal.contains(expected), "{refusal}");
        }
    }

    #[test]
    fn positions_are_read_from_names() {
        assert_eq!(position_in_name("INPUT__12"), Some(12));
        for name in ["INPUT", "INPUT__", "INPUT__x", "INPUT_1", "INPUT__99999999999999999999999"] {
            assert_eq!(position_in_name(name), None, "{name}");
        }
    }
}
