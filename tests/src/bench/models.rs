//! The models that are measured: a small MLP, a convolution net of ResNet-18's size, and MiniLM; and a heavy neighbour.
//!
//! The first two are TorchScript with made-up weights that are the same in every run: how long they take doesn't depend on
//! what they have learnt. The last is the demo's.

use std::{
    fmt::Write,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use cresset_proto::tensor::{Datatype, Tensor};
use cresset_worker::engine::testing::Script;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::harness::{Error, ModelRepository, binaries, failed};

/// Tokens of a sentence.
const TOKENS: i64 = 64;
/// A word that MiniLM knows.
const TOKEN: i64 = 7592;
/// Rows and columns of the heavy neighbour's one weight: 100 MB of floats.
const HEAVY_SIDE: usize = 5_000;

/// One input, without the batch.
#[derive(Debug, Clone, Copy)]
struct Input {
    name: &'static str,
    datatype: Datatype,
    dims: &'static [i64],
}

/// A model that is measured.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Its name in the repository and in the results.
    pub name: &'static str,
    /// What it is, in words.
    pub about: &'static str,
    inputs: &'static [Input],
    outputs: &'static str,
}

/// The small one.
pub const MLP: Model = Model {
    name: "mlp",
    about: "784-512-10 perceptron",
    inputs: &[Input { name: "x", datatype: Datatype::Fp32, dims: &[784] }],
    outputs: "{ name: \"y\" data_type: TYPE_FP32 dims: [ 10 ] }",
};

/// The convolution net.
pub const RESNET18: Model = Model {
    name: "resnet18",
    about: "ResNet-18, 3x224x224, batch norms folded",
    inputs: &[Input { name: "x", datatype: Datatype::Fp32, dims: &[3, 224, 224] }],
    outputs: "{ name: \"y\" data_type: TYPE_FP32 dims: [ 1000 ] }",
};

/// The encoder.
pub const MINILM: Model = Model {
    name: "minilm",
    about: "all-MiniLM-L6-v2, 64 tokens",
    inputs: &[
        Input { name: "input_ids", datatype: Datatype::Int64, dims: &[TOKENS] },
        Input { name: "attention_mask", datatype: Datatype::Int64, dims: &[TOKENS] },
    ],
    outputs: "{ name: \"sentence_embedding\" data_type: TYPE_FP32 dims: [ 384 ] }",
};

/// All of them.
pub const MODELS: [Model; 3] = [MLP, RESNET18, MINILM];

/// The name of the heavy neighbour.
pub const HEAVY: &str = "heavy";

impl Model {
    /// The one of that name.
    pub fn named(name: &str) -> Option<Self> {
        MODELS.into_iter().find(|model| model.name == name)
    }

    /// A batch of inputs, drawn as `cresset bench` draws what it sends. How long a net takes does depend on them: a maximum is easily
    /// guessed among numbers that rise, and pooling took 12 % of the convolution net's time with such, 17 % with these.
    pub fn sample(&self, rows: usize) -> Vec<Tensor> {
        let mut chance = StdRng::seed_from_u64(rows as u64);
        let tensor = |input: &Input| {
            let elements = input.dims.iter().product::<i64>() as usize * rows;
            let data: Vec<u8> = match (input.datatype, input.name) {
                (Datatype::Int64, "input_ids") => std::iter::repeat_n(TOKEN, elements).flat_map(i64::to_le_bytes).collect(),
                (Datatype::Int64, _) => std::iter::repeat_n(1_i64, elements).flat_map(i64::to_le_bytes).collect(),
                _ => (0..elements).flat_map(|_| chance.random::<f32>().to_le_bytes()).collect(),
            };
            let mut shape = vec![rows as i64];
            shape.extend(input.dims);
            Tensor { name: input.name.to_owned(), datatype: input.datatype, shape, data: data.into() }
        };
        self.inputs.iter().map(tensor).collect()
    }

    /// The flags that make `cresset bench` send the same.
    pub fn flags(&self) -> Vec<String> {
        let literal = |input: &Input| {
            let value = if input.name == "input_ids" { TOKEN } else { 1 };
            let row = vec![value.to_string(); input.dims.iter().product::<i64>() as usize];
            vec!["--input".to_owned(), format!("{}=[[{}]]", input.name, row.join(","))]
        };
        // Made-up floats are as good as the sample's.
        self.inputs.iter().filter(|input| input.datatype == Datatype::Int64).flat_map(literal).collect()
    }

    fn config(&self, serving: Serving) -> String {
        let Serving { batch_max, instances } = serving;
        let mut text = format!("platform: \"pytorch_libtorch\"\nmax_batch_size: {batch_max}\ndynamic_batching {{ }}\n");
        let _ = writeln!(text, "instance_group {{ count: {instances} }}");
        for input in self.inputs {
            let (name, kind) = (input.name, input.datatype.as_str());
            let dims = input.dims.iter().map(i64::to_string).collect::<Vec<_>>().join(", ");
            // Writing to a string can't fail.
            let _ = writeln!(text, "input {{ name: \"{name}\" data_type: TYPE_{kind} dims: [ {dims} ] }}");
        }
        text + "output " + self.outputs + "\n"
    }
}

/// How a model is served.
#[derive(Debug, Clone, Copy)]
pub struct Serving {
    /// Most rows of a batch.
    pub batch_max: usize,
    /// Copies side by side, which share the cores.
    pub instances: u16,
}

impl Serving {
    /// As good as any before the best is known.
    const USUAL: Self = Self { batch_max: 64, instances: 1 };
}

/// A repository with all models.
///
/// # Errors
/// [`Error::Io`], as when MiniLM wasn't prepared.
pub fn repository() -> Result<ModelRepository, Error> {
    let repository = ModelRepository::new()?
        .with_script(MLP.name, &MLP.config(Serving::USUAL), &mlp())?
        .with_script(RESNET18.name, &RESNET18.config(Serving::USUAL), &resnet18())?
        .with_script(HEAVY, &crate::harness::fp32_model(8, ""), &heavy())?;
    let prepared = binaries::demo_models().join(MINILM.name).join("1");
    if !prepared.join("model.pt").is_file() {
        let missing = io::Error::new(io::ErrorKind::NotFound, "run `make models`");
        return Err(failed(format!("no model in {}", prepared.display()))(missing));
    }
    let folder = repository.path().join(MINILM.name);
    fs::create_dir_all(&folder).map_err(failed("can't make a folder for minilm"))?;
    symlink(prepared, folder.join("1")).map_err(failed("can't link minilm"))?;
    configure(repository.path(), MINILM, Serving::USUAL)?;
    Ok(repository)
}

/// Writes a model's configuration anew.
///
/// # Errors
/// [`Error::Io`].
pub fn configure(repository: &Path, model: Model, serving: Serving) -> Result<(), Error> {
    let path: PathBuf = repository.join(model.name).join("config.pbtxt");
    fs::write(&path, model.config(serving)).map_err(failed(format!("can't write {}", path.display())))
}

/// An expression for numbers between `-bound` and `bound` that look random and are the same everywhere: the digits far
/// behind the point of a sine.
fn weights(shape: &[usize], bound: f64, seed: usize) -> String {
    let count: usize = shape.iter().product();
    let noise = format!("torch.sin(torch.arange({count}).double() * 12.9898 + {seed}.0) * 43758.5453");
    format!("(torch.frac({noise}) * {bound:.9}).float().reshape({shape:?})")
}

fn mlp() -> Script {
    let bound = |inputs: usize| (6.0 / inputs as f64).sqrt();
    Script::new(
        "def forward(self, x):\n  \
           h = torch.relu(torch.linear(x, self.w1, self.b1))\n  \
           return torch.linear(h, self.w2, self.b2)\n",
    )
    .parameter("w1", &weights(&[512, 784], bound(784), 1))
    .parameter("b1", &weights(&[512], 0.05, 2))
    .parameter("w2", &weights(&[10, 512], bound(512), 3))
    .parameter("b2", &weights(&[10], 0.05, 4))
}

fn heavy() -> Script {
    Script::new("def forward(self, x):\n  return x + self.weight[0, 0]\n")
        .parameter("weight", &weights(&[HEAVY_SIDE, HEAVY_SIDE], 1.0, 5))
}

/// ResNet-18 as it is served: convolutions with a bias, into which the batch norms were folded.
fn resnet18() -> Script {
    let mut net = Net { body: String::new(), weights: vec![] };
    net.convolution("x", "x", [64, 3, 7], [2, 3], true);
    net.line("x = torch.max_pool2d(x, [3, 3], [2, 2], [1, 1])");
    let mut channels = 64;
    for (stage, wide) in [64, 128, 256, 512].into_iter().enumerate() {
        for block in 0..2 {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            net.convolution("h", "x", [wide, channels, 3], [stride, 1], true);
            net.convolution("h", "h", [wide, wide, 3], [1, 1], false);
            if stride == 2 {
                net.convolution("x", "x", [wide, channels, 1], [2, 0], false);
            }
            net.line("x = torch.relu(h + x)");
            channels = wide;
        }
    }
    net.line("x = torch.flatten(torch.adaptive_avg_pool2d(x, [1, 1]), 1)");
    net.line("return torch.linear(x, self.fc_w, self.fc_b)");
    let mut script = Script::new(&format!("def forward(self, x):\n{}", net.body));
    for (seed, (name, shape, bound)) in net.weights.iter().enumerate() {
        script = script.parameter(name, &weights(shape, *bound, 100 + seed));
    }
    script.parameter("fc_w", &weights(&[1000, 512], 0.05, 98)).parameter("fc_b", &weights(&[1000], 0.05, 99))
}

/// A net in the making: the lines of its `forward`, and its weights with their bounds.
struct Net {
    body: String,
    weights: Vec<(String, Vec<usize>, f64)>,
}

impl Net {
    fn line(&mut self, line: &str) {
        self.body += &format!("  {line}\n");
    }

    /// `to = conv(from)` with weights of `[outputs, inputs, side]` and `[stride, padding]`, through a ReLU if there is one.
    fn convolution(&mut self, to: &str, from: &str, weight: [usize; 3], step: [usize; 2], has_relu: bool) {
        let [outputs, inputs, side] = weight;
        let [stride, padding] = step;
        let number = self.weights.len() / 2;
        // Keeps the signal's size from layer to layer; half of it where a shortcut is added.
        let bound = (if has_relu { 6.0 } else { 1.5 } / (inputs * side * side) as f64).sqrt();
        self.weights.push((format!("w{number}"), vec![outputs, inputs, side, side], bound));
        self.weights.push((format!("b{number}"), vec![outputs], 0.05));
        let convolved =
            format!("torch.conv2d({from}, self.w{number}, self.b{number}, [{stride}, {stride}], [{padding}, {padding}])");
        self.line(&format!("{to} = {}", if has_relu { format!("torch.relu({convolved})") } else { convolved }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{Reference, floats};

    #[test]
    fn each_model_answers_with_finite_numbers_of_its_shape() {
        let repository = repository().unwrap();
        for (model, columns) in [(MLP, 10), (RESNET18, 1000), (MINILM, 384)] {
            let mut reference = Reference::load(repository.path(), model.name).unwrap();
            let output = reference.infer(&model.sample(2)).unwrap().remove(0);
            assert_eq!(output.shape, [2, columns], "{}", model.name);
            let values = floats(&output.data);
            let largest = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            assert!(values.iter().all(|value| value.is_finite()) && (1e-3..1e3).contains(&largest), "{} {largest}", model.name);
        }
        let sizes = |name: &str| fs::metadata(repository.path().join(name).join("1/model.pt")).unwrap().len() / 1_000_000;
        assert_eq!((sizes("resnet18"), sizes(HEAVY)), (46, 100), "MB");
    }
}
