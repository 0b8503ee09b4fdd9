//! Sentence embedding: all-MiniLM-L6-v2, a BERT of six layers, from its published weights. Pooling
//! and normalisation are part of the model: token ids in, one vector of length one out.
//!
//! Checked against values that `transformers` gave for the same weights (`reference.json`), with
//! other shapes than those of the trace, and against itself: padding must not change a sentence.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tch::{CModule, Kind, TchError, Tensor};

use super::{Options, PrepareError, Recipe, read, torch, trace, values};

const NAME: &str = "minilm";
const LAYERS: usize = 6;
const HIDDEN: i64 = 384;
const HEADS: i64 = 12;
const INNER: i64 = 1536;
const VOCABULARY: i64 = 30_522;
const POSITIONS: i64 = 512;
const EPSILON: f64 = 1e-12;
/// Added to the score of a padded token: its weight becomes zero, and a sentence without any token
/// gives no NaN, as an infinite value would.
const MASKED: f64 = -1e9;

pub(super) const RECIPE: Recipe =
    Recipe { name: NAME, revision: 1, parts: "minilm-weights.json", beside: &[], read: &["reference.json"], make };

fn make(options: &Options, path: &Path) -> Result<String, PrepareError> {
    let weights = options.home.join("weights/minilm/model.safetensors");
    let encoder = Encoder::read(&weights)?;
    let ids = Tensor::from_slice2(&[[101i64, 7592, 2088, 102, 0], [101, 1996, 4937, 2003, 102]]);
    let mask = Tensor::from_slice2(&[[1i64, 1, 1, 1, 0], [1, 1, 1, 1, 1]]);
    trace(NAME, &[ids, mask], path, |inputs| encoder.forward(&inputs[0], &inputs[1]))?;
    let reference = options.templates.join(NAME).join("reference.json");
    check(path, &reference)
}

/// The weights by their published names, each with the shape that the model needs.
struct Encoder(BTreeMap<String, Tensor>);

impl Encoder {
    fn read(path: &Path) -> Result<Self, PrepareError> {
        if !path.is_file() {
            return Err(PrepareError::NotFetched(path.to_owned()));
        }
        let found: BTreeMap<_, _> = Tensor::read_safetensors(path).map_err(torch(NAME))?.into_iter().collect();
        for (name, shape) in wanted() {
            match found.get(&name).map(Tensor::size) {
                Some(size) if size == shape => {}
                size => {
                    let problem = format!("weight {name} should have the shape {shape:?}, found {size:?}");
                    return Err(PrepareError::BadInput { model: NAME, problem });
                }
            }
        }
        Ok(Self(found))
    }

    fn weight(&self, name: &str) -> Result<&Tensor, TchError> {
        self.0.get(name).ok_or_else(|| TchError::TensorNameNotFound(name.into(), "the weights".into()))
    }

    fn linear(&self, input: &Tensor, name: &str) -> Result<Tensor, TchError> {
        let bias = self.weight(&format!("{name}.bias"))?;
        input.f_linear(self.weight(&format!("{name}.weight"))?, Some(bias))
    }

    fn norm(&self, input: &Tensor, name: &str) -> Result<Tensor, TchError> {
        let weight = self.weight(&format!("{name}.weight"))?;
        let bias = self.weight(&format!("{name}.bias"))?;
        input.f_layer_norm([HIDDEN], Some(weight), Some(bias), EPSILON, false)
    }

    fn forward(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor, TchError> {
        // As a weight is, not `to_kind`: that would write this machine's device into the trace.
        let kept = mask.f_type_as(self.weight("embeddings.LayerNorm.weight")?)?;
        // [batch, 1, 1, length]: the same for every head and every asking token.
        let bias = kept.f_rsub_scalar(1.0)?.f_mul_scalar(MASKED)?.f_unsqueeze(1)?.f_unsqueeze(1)?;
        let mut hidden = self.embed(ids)?;
        for layer in 0..LAYERS {
            hidden = self.layer(&hidden, &bias, &format!("encoder.layer.{layer}"))?;
        }
        let kept = kept.f_unsqueeze(-1)?;
        let sum = hidden.f_mul(&kept)?.f_sum_dim_intlist(1, false, None)?;
        let count = kept.f_sum_dim_intlist(1, false, None)?.f_clamp_min(1e-9)?;
        let mean = sum.f_div(&count)?;
        let length = mean.f_square()?.f_sum_dim_intlist(1, true, None)?.f_sqrt()?.f_clamp_min(1e-12)?;
        mean.f_div(&length)
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor, TchError> {
        let lookup = |table: &str, indices: &Tensor| {
            let table = self.weight(&format!("embeddings.{table}_embeddings.weight"))?;
            Tensor::f_embedding(table, indices, -1, false, false)
        };
        // Counted by an operation, since a length that Rust has seen would be fixed in the trace.
        let positions = ids.f_ones_like()?.f_cumsum(1, Kind::Int64)?.f_sub_scalar(1)?;
        let types = ids.f_zeros_like()?;
        let sum = lookup("word", ids)?.f_add(&lookup("token_type", &types)?)?.f_add(&lookup("position", &positions)?)?;
        self.norm(&sum, "embeddings.LayerNorm")
    }

    fn layer(&self, hidden: &Tensor, bias: &Tensor, name: &str) -> Result<Tensor, TchError> {
        let heads = |part: &str| {
            let all = self.linear(hidden, &format!("{name}.attention.self.{part}"))?;
            all.f_unflatten(-1, [HEADS, HIDDEN / HEADS])?.f_transpose(1, 2)
        };
        let (query, key, value) = (heads("query")?, heads("key")?, heads("value")?);
        let context = Tensor::f_scaled_dot_product_attention(&query, &key, &value, Some(bias), 0.0, false, None, false)?;
        let context = context.f_transpose(1, 2)?.f_flatten(2, 3)?;
        let attended = self.linear(&context, &format!("{name}.attention.output.dense"))?.f_add(hidden)?;
        let attended = self.norm(&attended, &format!("{name}.attention.output.LayerNorm"))?;
        let inner = self.linear(&attended, &format!("{name}.intermediate.dense"))?.f_gelu("none")?;
        let output = self.linear(&inner, &format!("{name}.output.dense"))?.f_add(&attended)?;
        self.norm(&output, &format!("{name}.output.LayerNorm"))
    }
}

/// The weights that the model uses.
fn wanted() -> Vec<(String, Vec<i64>)> {
    let mut wanted = Vec::new();
    for (table, rows) in [("word", VOCABULARY), ("position", POSITIONS), ("token_type", 2)] {
        wanted.push((format!("embeddings.{table}_embeddings.weight"), vec![rows, HIDDEN]));
    }
    let mut norms = vec!["embeddings.LayerNorm".to_string()];
    for layer in 0..LAYERS {
        let name = format!("encoder.layer.{layer}");
        let square = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"];
        let linears = square.map(|part| (part, HIDDEN, HIDDEN)).into_iter();
        for (part, output, input) in linears.chain([("intermediate.dense", INNER, HIDDEN), ("output.dense", HIDDEN, INNER)]) {
            wanted.push((format!("{name}.{part}.weight"), vec![output, input]));
            wanted.push((format!("{name}.{part}.bias"), vec![output]));
        }
        norms.push(format!("{name}.attention.output.LayerNorm"));
        norms.push(format!("{name}.output.LayerNorm"));
    }
    for norm in norms {
        wanted.push((format!("{norm}.weight"), vec![HIDDEN]));
        wanted.push((format!("{norm}.bias"), vec![HIDDEN]));
    }
    wanted
}

fn check(model: &Path, reference: &Path) -> Result<String, PrepareError> {
    let _no_grad = tch::no_grad_guard();
    let mut module = CModule::load(model).map_err(torch(NAME))?;
    module.set_eval();
    let bad = |problem: &str| PrepareError::BadInput { model: NAME, problem: format!("reference.json: {problem}") };
    let json: Value = serde_json::from_slice(&read(reference)?).map_err(|error| bad(&error.to_string()))?;
    let tolerance = json["tolerance"].as_f64().ok_or_else(|| bad("tolerance is not a number"))? as f32;
    let cases = json["cases"].as_array().filter(|cases| !cases.is_empty()).ok_or_else(|| bad("there are no cases"))?;
    let mut worst = 0.0f32;
    for case in cases {
        let matrix = |name: &str| serde_json::from_value(case[name].clone()).map_err(|error| bad(&format!("{name}: {error}")));
        let (ids, mask): (Vec<Vec<i64>>, Vec<Vec<i64>>) = (matrix("input_ids")?, matrix("attention_mask")?);
        let expected: Vec<Vec<f32>> =
            serde_json::from_value(case["sentence_embedding"].clone()).map_err(|error| bad(&error.to_string()))?;
        let together = embed(&module, &ids, &mask)?;
        let alone = ids.iter().zip(&mask).map(|(ids, mask)| {
            let length = mask.iter().filter(|kept| **kept == 1).count();
            embed(&module, &[ids[..length].to_vec()], &[mask[..length].to_vec()])
        });
        let alone = alone.collect::<Result<Vec<_>, _>>()?.concat();
        worst = worst.max(largest_difference(&together, &expected.concat())).max(largest_difference(&together, &alone));
    }
    if worst > tolerance || worst.is_nan() {
        let problem = format!("an embedding is off by {worst:e}, at most {tolerance:e} is allowed");
        return Err(PrepareError::WrongAnswers { model: NAME, problem });
    }
    Ok(format!("{} references within {worst:.1e}", cases.len()))
}

fn embed(module: &CModule, ids: &[Vec<i64>], mask: &[Vec<i64>]) -> Result<Vec<f32>, PrepareError> {
    let tensor = |rows: &[Vec<i64>]| {
        let length = rows.first().map_or(0, Vec::len) as i64;
        Tensor::f_from_slice(&rows.concat())?.f_reshape([rows.len() as i64, length])
    };
    let output = tensor(ids).and_then(|ids| module.forward_ts(&[ids, tensor(mask)?])).map_err(torch(NAME))?;
    values(NAME, &output)
}

/// NaN and a missing value count as infinitely far away.
fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    if left.len() != right.len() {
        return f32::INFINITY;
    }
    let distance = |(left, right): (&f32, &f32)| if (left - right).is_nan() { f32::INFINITY } else { (left - right).abs() };
    left.iter().zip(right).map(distance).fold(0.0, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_strange_value_is_far_away() {
        assert_eq!(largest_difference(&[1.0, 2.0], &[1.0, 2.5]), 0.5);
        assert_eq!(largest_difference(&[1.0], &[1.0, 2.0]), f32::INFINITY);
        assert_eq!(largest_difference(&[f32::NAN], &[1.0]), f32::INFINITY);
    }

    #[test]
    fn the_weights_are_those_of_a_bert_with_six_layers() {
        let wanted = wanted();
        assert_eq!(wanted.len(), 3 + 2 + LAYERS * 16);
        let parameters: i64 = wanted.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
        assert_eq!(parameters, 22_565_376, "22.7 million less the pooler, which this model doesn't use");
    }
}
