//! A client from outside: NVIDIA's own gRPC client for Python, and KServe's, against a real cluster.
//!
//! The checks themselves are `tests/conformance`; here they get a cluster with models that tell right from wrong: the demo models,
//! one that returns what it is given for each datatype, one that is slow, one that raises, and some that can't be served.

use std::{fs, path::PathBuf, process::Command};

use cresset_tests::harness::{Cluster, ModelRepository, Options, binaries, fp32_model};
use cresset_worker::engine::testing::{self, Script};

/// Every datatype that libtorch holds, as `config.pbtxt` writes it.
const DATATYPES: [&str; 13] =
    ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16"];
/// Sequences that may be silent for longer than any test takes.
const SEQUENCES: &str = "sequence_batching { max_sequence_idle_microseconds: 60000000 }";

/// A repository, and which of its models are deployed from the start.
struct Prepared {
    repository: ModelRepository,
    deployed: Vec<String>,
}

fn script(source: &str) -> Script {
    Script::new(source)
}

fn prepared() -> Prepared {
    let mut repository = ModelRepository::new().unwrap();
    let mut deployed: Vec<String> = vec![];
    for name in ["minilm", "digits", "silero_vad"] {
        repository = repository.with_demo(name).unwrap();
        deployed.push(name.into());
    }
    let echo = script("def forward(self, x):\n  return x\n");
    let mut add = |name: String, config: String, script: &Script| {
        repository.add_script(&name, &config, script).unwrap();
        deployed.push(name);
    };
    for datatype in DATATYPES {
        add(format!("echo_{}", datatype.to_lowercase()), one_input(datatype, "[ -1 ]", "y"), &echo);
    }
    let words = script("def forward(self, x: List[str]) -> List[str]:\n  return x\n");
    add("echo_bytes".into(), one_input("STRING", "[ -1 ]", "y"), &words);
    let shapes = one_input("INT16", "[ -1, -1, -1, -1 ]", "y")
        + "output [ { name: \"flipped\" data_type: TYPE_INT16 dims: [ -1, -1, -1, -1 ] } ]";
    add("echo_shape".into(), shapes, &script("def forward(self, x):\n  return x, x.permute(3, 2, 1, 0)\n"));
    add("simple".into(), simple(), &testing::sum_and_difference());
    let raises = "def forward(self, x):\n  assert float(x.min()) >= 0.0, \"a negative element\"\n  return x\n";
    add("raises".into(), fp32_model(8, "dynamic_batching { }"), &script(raises));
    add("running_sum".into(), one_input("FP32", "[ 1 ]", "y") + SEQUENCES, &testing::running_sum());
    let brittle = "def forward(self, x):\n  self.total = self.total + x.sum()\n  \
                   assert float(x.sum()) >= 0.0, \"not below zero\"\n  return self.total.reshape([1])\n";
    add("brittle_sum".into(), one_input("FP32", "[ 1 ]", "y") + SEQUENCES, &script(brittle).buffer("total", "torch.zeros([])"));
    let batched = "def forward(self, x):\n  self.total = self.total + x.sum()\n  return self.total.reshape([1, 1])\n";
    add("batched_sum".into(), fp32_model(4, SEQUENCES), &script(batched).buffer("total", "torch.zeros([])"));
    // Takes long for a negative number.
    let counting = script(
        "def forward(self, x):\n  self.calls += 1\n  if float(x[0]) < 0.0:\n    m = self.matrix\n    for i in range(300000):\n      \
         m = torch.tanh(torch.mm(m, self.matrix))\n    x = x + m[0, 0] * 0\n  return x * 0 + self.calls\n",
    );
    let counting = counting.attribute("calls", "int", "0").parameter("matrix", "torch.ones([16, 16]) * 0.001");
    add("counting".into(), one_input("FP32", "[ -1 ]", "y"), &counting);
    add("slow".into(), fp32_model(1, ""), &testing::slow(16, 300_000));
    broken(&repository, &echo);
    repository.add_script("spare", &one_input("FP32", "[ -1 ]", "y"), &echo).unwrap();
    Prepared { repository, deployed }
}

/// A model without a batch dimension.
fn one_input(datatype: &str, dims: &str, output: &str) -> String {
    format!(
        "platform: \"pytorch_libtorch\"\nmax_batch_size: 0\n\
         input [ {{ name: \"x\" data_type: TYPE_{datatype} dims: {dims} }} ]\n\
         output [ {{ name: \"{output}\" data_type: TYPE_{datatype} dims: {dims} }} ]\n"
    )
}

/// The model of Triton's own examples.
fn simple() -> String {
    let tensor = |name: &str| format!("{{ name: \"{name}\" data_type: TYPE_INT32 dims: [ 16 ] }}");
    format!(
        "name: \"simple\"\nplatform: \"pytorch_libtorch\"\nmax_batch_size: 8\ninput [ {}, {} ]\noutput [ {}, {} ]\ndynamic_batching {{ }}\n",
        tensor("INPUT0"),
        tensor("INPUT1"),
        tensor("OUTPUT0"),
        tensor("OUTPUT1")
    )
}

/// Models that can't be served, each for a reason of its own.
fn broken(repository: &ModelRepository, echo: &Script) {
    let config = one_input("FP32", "[ -1 ]", "y");
    repository.add_bytes("corrupt", &config, b"this is no archive").unwrap();
    let whole = fs::read(repository.path().join("simple/1/model.pt")).unwrap();
    repository.add_bytes("truncated", &config, &whole[..whole.len() / 2]).unwrap();
    repository.add_script("wrong_arguments", &config, &testing::sum_and_difference()).unwrap();
    repository.add_script("decoupled", &format!("{config}model_transaction_policy {{ decoupled: true }}"), echo).unwrap();
    repository.add_script("texts", &one_input("STRING", "[ -1 ]", "y"), echo).unwrap();
    repository.add_script("typo", "name: \"typo\"\nmax_batch_size: 0\ninput [ { nmae: \"x\" } ]\n", echo).unwrap();
    fs::create_dir_all(repository.path().join("no_config/1")).unwrap();
}

/// The Python of the tests' virtual environment.
pub(crate) fn python() -> PathBuf {
    let python = binaries::root().join(".cresset/venv/bin/python");
    assert!(
        python.exists(),
        "there is no {}: run `make fetch` and `python3 deploy/bootstrap/fetch.py venv` first",
        python.display()
    );
    python
}

#[test]
fn stock_clients_get_what_a_triton_would_answer() {
    let python = python();
    let Prepared { repository, deployed } = prepared();
    // As many workers as a model has replicas, so that every worker can be asked for every model.
    let options = Options { workers: 2, deploy: deployed, model_repository: repository.path().to_owned(), ..Options::default() };
    let cluster = Cluster::start(&options).unwrap();
    let addresses = |members: &[cresset_tests::harness::Member]| {
        members.iter().map(|member| member.grpc.as_str()).collect::<Vec<_>>().join(",")
    };
    let root = binaries::root();
    let mut command = Command::new(python);
    command
        .arg(root.join("tests/conformance/conformance.py"))
        .args(["--coordinators", &addresses(&cluster.file().coordinators)])
        .args(["--workers", &addresses(&cluster.file().workers)])
        .arg("--speech")
        .arg(root.join(".cresset/speech/speech.wav"))
        .arg("--reference")
        .arg(root.join("deploy/models/minilm/reference.json"));
    let ran = binaries::finish(&mut command).unwrap();
    println!("{}{}", ran.stdout, ran.stderr);
    assert_eq!(ran.code, Some(0), "some checks failed; they are listed above");
}
