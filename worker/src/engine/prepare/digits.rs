//! Handwritten digits: a small convolutional network, trained here in a few seconds on 1,500 of the
//! 1,797 images of the UCI repository. The other 297 test it: every sixth image, so that each writer
//! is in both parts.
//!
//! One thread and a fixed seed, so that the same machine makes the same model.

use std::path::Path;

use tch::nn::{self, OptimizerConfig};
use tch::{CModule, Device, Kind, Reduction, TchError, Tensor};

use super::{Options, PrepareError, Recipe, read, torch, trace};

const NAME: &str = "digits";
const IMAGES: usize = 1797;
const HELD_OUT: usize = 297;
const TRAINING: i64 = (IMAGES - HELD_OUT) as i64;
const PIXELS: usize = 64;
const INK_MAX: f64 = 16.0;
const SEED: i64 = 7;
const EPOCHS: usize = 30;
const BATCH: i64 = 50;
const ACCURACY_MIN: f64 = 0.95;

pub(super) const RECIPE: Recipe =
    Recipe { name: NAME, revision: 1, parts: "digits-data.json", beside: &["labels.txt"], read: &[], make };

fn make(options: &Options, path: &Path) -> Result<String, PrepareError> {
    let csv = options.home.join("weights/digits/digits.csv");
    let all = parse(&String::from_utf8_lossy(&read(&csv)?))?;
    let (training, held_out) = all.split().map_err(torch(NAME))?;
    let threads = tch::get_num_threads();
    tch::set_num_threads(1);
    let trained = train(&training);
    tch::set_num_threads(threads);
    let network = trained.map_err(torch(NAME))?;
    let example = training.images.f_narrow(0, 0, 2).map_err(torch(NAME))?;
    trace(NAME, &[example], path, |inputs| network.forward(&inputs[0], false))?;
    let right = accuracy(path, &held_out).map_err(torch(NAME))?;
    if right < ACCURACY_MIN {
        let problem = format!("{:.1} % of the held-out images are right, at least 95 % are needed", right * 100.0);
        return Err(PrepareError::WrongAnswers { model: NAME, problem });
    }
    Ok(format!("{:.1} % of {HELD_OUT} held-out images right", right * 100.0))
}

/// Images, [count, 64], and the digit that each of them shows.
struct Examples {
    images: Tensor,
    labels: Tensor,
}

impl Examples {
    fn choose(&self, rows: &Tensor) -> Result<Self, TchError> {
        Ok(Self { images: self.images.f_index_select(0, rows)?, labels: self.labels.f_index_select(0, rows)? })
    }

    /// The images to train with, and those held out.
    fn split(&self) -> Result<(Self, Self), TchError> {
        let (held_out, training): (Vec<i64>, Vec<i64>) =
            (0..IMAGES as i64).partition(|row| row % 6 == 5 && row / 6 < HELD_OUT as i64);
        let part = |rows: &[i64]| self.choose(&Tensor::f_from_slice(rows)?);
        Ok((part(&training)?, part(&held_out)?))
    }
}

/// All images, from lines of 64 numbers from 0 to 16 and a digit.
fn parse(csv: &str) -> Result<Examples, PrepareError> {
    let bad = |problem: String| PrepareError::BadInput { model: NAME, problem: format!("digits.csv: {problem}") };
    let (mut images, mut labels) = (Vec::with_capacity(IMAGES * PIXELS), Vec::with_capacity(IMAGES));
    for (number, line) in csv.lines().enumerate() {
        let fields: Result<Vec<i64>, _> =
            line.split(',').map(|field| field.trim().parse::<f64>().map(|value| value as i64)).collect();
        match fields.as_deref() {
            Ok([ink @ .., digit @ 0..=9]) if ink.len() == PIXELS && ink.iter().all(|ink| (0..=16).contains(ink)) => {
                images.extend(ink.iter().map(|ink| *ink as f32));
                labels.push(*digit);
            }
            _ => return Err(bad(format!("line {} is not 64 numbers from 0 to 16 and a digit", number + 1))),
        }
    }
    if labels.len() != IMAGES {
        return Err(bad(format!("there are {} images instead of {IMAGES}", labels.len())));
    }
    let images = Tensor::f_from_slice(&images).and_then(|all| all.f_reshape([-1, PIXELS as i64])).map_err(torch(NAME))?;
    let labels = Tensor::f_from_slice(&labels).map_err(torch(NAME))?;
    Ok(Examples { images, labels })
}

/// Weights and biases, from the image to the scores.
struct Network {
    convolutions: [(Tensor, Tensor); 2],
    dense: [(Tensor, Tensor); 2],
}

impl Network {
    fn new(path: &nn::Path) -> Result<Self, TchError> {
        let layer = |name: &str, shape: &[i64]| {
            let weight = path.f_kaiming_uniform(&format!("{name}_weight"), shape)?;
            Ok::<_, TchError>((weight, path.f_zeros(&format!("{name}_bias"), &shape[..1])?))
        };
        Ok(Self {
            convolutions: [layer("first", &[16, 1, 3, 3])?, layer("second", &[32, 16, 3, 3])?],
            dense: [layer("third", &[64, 32 * 4 * 4])?, layer("scores", &[10, 64])?],
        })
    }

    fn forward(&self, images: &Tensor, training: bool) -> Result<Tensor, TchError> {
        let mut hidden = images.f_div_scalar(INK_MAX)?.f_reshape([-1, 1, 8, 8])?;
        for (weight, bias) in &self.convolutions {
            hidden = hidden.f_conv2d(weight, Some(bias), 1, 1, 1, 1)?.f_relu()?;
        }
        hidden = hidden.f_max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false)?.f_flatten(1, -1)?;
        let [(weight, bias), (scores_weight, scores_bias)] = &self.dense;
        hidden = hidden.f_linear(weight, Some(bias))?.f_relu()?;
        if training {
            hidden = hidden.f_dropout(0.3, true)?;
        }
        hidden.f_linear(scores_weight, Some(scores_bias))
    }

    /// A copy without gradients: only such weights may become constants of a trace.
    fn detached(&self) -> Self {
        let copy = |(weight, bias): &(Tensor, Tensor)| (weight.detach().copy(), bias.detach().copy());
        Self { convolutions: self.convolutions.each_ref().map(copy), dense: self.dense.each_ref().map(copy) }
    }
}

fn train(examples: &Examples) -> Result<Network, TchError> {
    tch::manual_seed(SEED);
    let variables = nn::VarStore::new(Device::Cpu);
    let network = Network::new(&variables.root())?;
    let mut optimizer = nn::Adam { wd: 1e-4, ..nn::Adam::default() }.build(&variables, 2e-3)?;
    for epoch in 0..EPOCHS {
        optimizer.set_lr(2e-3 * (1.0 - epoch as f64 / EPOCHS as f64));
        let order = Tensor::f_randperm(TRAINING, (Kind::Int64, Device::Cpu))?;
        for start in (0..TRAINING).step_by(BATCH as usize) {
            let batch = examples.choose(&order.f_narrow(0, start, BATCH)?)?;
            let scores = network.forward(&batch.images, true)?;
            let loss = scores.f_cross_entropy_loss::<&Tensor>(&batch.labels, None, Reduction::Mean, -100, 0.05)?;
            optimizer.backward_step(&loss);
        }
    }
    Ok(network.detached())
}

/// The share of the held-out images that the model in the file names rightly.
fn accuracy(path: &Path, held_out: &Examples) -> Result<f64, TchError> {
    let _no_grad = tch::no_grad_guard();
    let mut module = CModule::load(path)?;
    module.set_eval();
    let named = module.forward_ts(&[&held_out.images])?.f_argmax(-1, false)?;
    named.f_eq_tensor(&held_out.labels)?.f_mean(Kind::Double)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_image_is_in_both_parts() {
        let csv: String = (0..IMAGES).map(|row| format!("{}{}\n", "0,".repeat(PIXELS), row % 10)).collect();
        let mut all = parse(&csv).unwrap();
        all.labels = Tensor::arange(IMAGES as i64, (Kind::Int64, Device::Cpu));
        let (training, held_out) = all.split().unwrap();
        assert_eq!((training.images.size()[0], held_out.images.size()[0]), (TRAINING, HELD_OUT as i64));
        let mut rows: Vec<i64> = Vec::try_from(training.labels).unwrap();
        rows.extend(Vec::<i64>::try_from(held_out.labels).unwrap());
        rows.sort_unstable();
        assert_eq!(rows, (0..IMAGES as i64).collect::<Vec<_>>());
    }

    #[test]
    fn a_bad_line_is_named() {
        let good = format!("{}7\n", "0,".repeat(PIXELS));
        let error = parse(&(good.clone() + "1,2,3\n")).err().unwrap();
        assert!(error.to_string().contains("line 2"), "{error}");
        let error = parse(&good).err().unwrap();
        assert!(error.to_string().contains("1 images instead of 1797"), "{error}");
    }
}
