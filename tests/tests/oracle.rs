//! Cresset's answers beside those of a real Triton, which `make conformance-triton` recorded.
//!
//! The questions, the recording and the list of the differences that are meant are `tests/conformance/oracle`. Each of its
//! models has a configuration, which both servers read, and two programs that do the same: one for Triton's Python backend
//! (`twin.py`), and one in TorchScript here.

use std::{fs, path::Path, process::Command};

use cresset_tests::harness::{Cluster, ModelRepository, Options, binaries};
use cresset_worker::engine::testing::{self, Script};

use crate::conformance::python;

/// What `forward` of a slow model takes: long enough to send a few requests meanwhile.
const BUSY_ROUNDS: u32 = 60_000;

/// The same as `twin.py`, model by model; one that isn't named returns what it is given.
fn twin(name: &str) -> Script {
    let sequence = "self.total = self.total * (1.0 - float(START.max())) + x\n  return self.total\n";
    match name {
        "simple" => testing::sum_and_difference(),
        "raises" => Script::new(
            "def forward(self, x):\n  if x.numel() > 0:\n    assert float(x.min()) >= 0.0, \"a negative element\"\n  return x\n",
        ),
        "full" | "late" => testing::slow(16, BUSY_ROUNDS),
        "optional" => Script::new(
            "def forward(self, x, y: Optional[Tensor] = None):\n  if y is None:\n    return x\n  else:\n    return x + y\n",
        ),
        "datatypes" => {
            let names: Vec<String> = (0..12).map(|index| format!("x{index}")).collect();
            let names = names.join(", ");
            Script::new(&format!("def forward(self, {names}):\n  return {names}\n"))
        }
        "echo_bytes" => Script::new("def forward(self, x: List[str]) -> List[str]:\n  return x\n"),
        "numbered" => {
            Script::new(&format!("def forward(self, x, START, CORRID):\n  {sequence}")).buffer("total", "torch.zeros([1, 1])")
        }
        "named" => Script::new(&format!("def forward(self, x, START):\n  {sequence}")).buffer("total", "torch.zeros([1, 1])"),
        "repeat" => Script::new(
            "def forward(self, IN):\n  self.left = IN\n\n\
             def next(self) -> Optional[Tensor]:\n  if self.left.numel() == 0:\n    return None\n  \
             first = self.left[0:1]\n  self.left = self.left[1:]\n  return first\n",
        )
        .buffer("left", "torch.zeros([0]).int()"),
        _ => Script::new("def forward(self, x):\n  return x\n"),
    }
}

/// Every model of the comparison, and the names of those that are deployed from the start.
fn prepared(folder: &Path) -> (ModelRepository, Vec<String>) {
    let repository = ModelRepository::new().unwrap();
    let mut names = vec![];
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let config = fs::read_to_string(entry.path().join("config.pbtxt")).unwrap();
        repository.add_script(&name, &format!("{config}\nplatform: \"pytorch_libtorch\"\n"), &twin(&name)).unwrap();
        let labels = entry.path().join("labels.txt");
        if labels.exists() {
            fs::copy(labels, repository.path().join(&name).join("labels.txt")).unwrap();
        }
        if !["misspelt", "spare"].contains(&name.as_str()) {
            names.push(name);
        }
    }
    names.sort();
    (repository, names)
}

#[test]
fn answers_are_a_real_tritons_but_for_the_differences_that_are_meant() {
    let conformance = binaries::root().join("tests/conformance");
    let (repository, deploy) = prepared(&conformance.join("oracle/models"));
    // One worker, so that the counters of the cluster are those of one server.
    let options = Options { workers: 1, deploy, model_repository: repository.path().to_owned(), ..Options::default() };
    let cluster = Cluster::start(&options).unwrap();
    let mut command = Command::new(python());
    command
        .arg(conformance.join("differential.py"))
        .arg("compare")
        .args(["--coordinator", &cluster.file().coordinators[0].grpc])
        .args(["--worker", &cluster.file().workers[0].grpc]);
    let ran = binaries::finish(&mut command).unwrap();
    println!("{}{}", ran.stdout, ran.stderr);
    assert_eq!(ran.code, Some(0), "answers differ from a Triton's; they are listed above");
}

/// NVIDIA's load tool, in every way it can ask, through a coordinator and straight at a worker.
#[test]
fn tritons_load_tool_is_served() {
    if std::env::var_os("CRESSET_PERF_ANALYZER").is_none() {
        println!("skipped: `make perf-analyzer` fetches Triton's load tool, and a Debian that it runs in");
        return;
    }
    let conformance = binaries::root().join("tests/conformance");
    let (repository, deploy) = prepared(&conformance.join("oracle/models"));
    let options = Options { workers: 1, deploy, model_repository: repository.path().to_owned(), ..Options::default() };
    let cluster = Cluster::start(&options).unwrap();
    let ran = Command::new("python3")
        .arg(conformance.join("perf_analyzer.py"))
        .args(["--coordinator", &cluster.file().coordinators[0].grpc])
        .args(["--worker", &cluster.file().workers[0].grpc])
        .status()
        .unwrap();
    assert_eq!(ran.code(), Some(0), "some runs failed; they are listed above");
}

#[test]
fn the_comparison_and_the_table_of_the_protocol_are_whole() {
    let mut command = Command::new(python());
    command.args(["-m", "unittest", "oracle.test_compare", "test_table"]).current_dir(binaries::root().join("tests/conformance"));
    let ran = binaries::finish(&mut command).unwrap();
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
}
