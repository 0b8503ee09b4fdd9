//! Voice activity: the published TorchScript is used as it is, so there is nothing to make. It is
//! loaded once, and its state has to be what it promises: a new sequence starts as the last one did.

use std::path::Path;

use tch::{CModule, IValue, Kind, Tensor};

use super::{Options, PrepareError, Recipe, torch, values};

const NAME: &str = "silero_vad";
const RATE_HZ: i64 = 16_000;
const CHUNK: i64 = 512;

pub(super) const RECIPE: Recipe =
    Recipe { name: NAME, revision: 1, parts: "silero_vad.json", beside: &[], read: &[], make: check };

fn check(options: &Options, _: &Path) -> Result<String, PrepareError> {
    let path = options.home.join("models").join(NAME).join("1/model.pt");
    if !path.is_file() {
        return Err(PrepareError::NotFetched(path));
    }
    let mut probabilities = Vec::new();
    for _ in 0..2 {
        let mut module = CModule::load(&path).map_err(torch(NAME))?;
        module.set_eval();
        probabilities.push(probability(&module)?);
    }
    match probabilities[..] {
        [first, second] if first == second && (0.0..=1.0).contains(&first) => Ok(format!("silence is {first:.3}")),
        _ => {
            let problem = format!("twice the same chunk gave {probabilities:?}, not twice the same probability");
            Err(PrepareError::WrongAnswers { model: NAME, problem })
        }
    }
}

fn probability(module: &CModule) -> Result<f32, PrepareError> {
    let _no_grad = tch::no_grad_guard();
    let chunk = Tensor::f_zeros([1, CHUNK], (Kind::Float, tch::Device::Cpu)).map_err(torch(NAME))?;
    let output = module.forward_is(&[IValue::Tensor(chunk), IValue::Int(RATE_HZ)]).map_err(torch(NAME))?;
    match output {
        IValue::Tensor(output) if output.size() == [1, 1] => Ok(values(NAME, &output)?[0]),
        _ => Err(PrepareError::WrongAnswers { model: NAME, problem: "the output is not a tensor [1, 1]".into() }),
    }
}
