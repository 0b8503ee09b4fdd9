//! Unloading a model gives its memory back. Alone in its process, since it measures the process.

use cresset_worker::engine::device::{DeviceThread, freed};
use cresset_worker::engine::testing::{Script, spec_of};
use cresset_worker::engine::{
    Datatype, Device, Engine, InputBinding, InputParts, LoadSpec, OutputBinding, TorchEngine, set_threads,
};

const ROUNDS: usize = 50;
/// Many weights of a size that malloc keeps for itself, once it has seen it.
const WEIGHTS: usize = 200;
const MODEL_BYTES: u64 = 200_000_000;
/// Of the resident memory after the first round.
const GROWTH_MAX: f64 = 0.05;

#[tokio::test]
async fn a_large_model_loaded_and_unloaded_fifty_times_leaves_nothing_behind() {
    set_threads(1, 1).expect("one thread");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("model.pt");
    script().save(&path).expect("the script compiles");
    let spec = LoadSpec {
        inputs: vec![InputBinding { name: "x".into(), datatype: Datatype::Fp32 }],
        outputs: vec![OutputBinding { name: "y".into(), datatype: Some(Datatype::Fp32), dims: vec![1000] }],
        ..spec_of(&path)
    };
    let thread = DeviceThread::spawn(Device::Cpu).expect("a thread");
    let mut after_first = None;
    for round in 1..=ROUNDS {
        round_trip(&thread, &spec).await;
        let resident = resident_bytes();
        let first = *after_first.get_or_insert(resident);
        let growth = (resident as f64 - first as f64) / first as f64;
        assert!(growth.abs() < GROWTH_MAX, "round {round}: {resident} bytes are resident, {first} after the first round");
    }
}

fn script() -> Script {
    let lines: String = (0..WEIGHTS).map(|number| format!("  y = y + torch.mm(x, self.w{number})\n")).collect();
    let script = Script::new(&format!("def forward(self, x):\n  y = torch.zeros([1, 1000])\n{lines}  return y\n"));
    (0..WEIGHTS).fold(script, |script, number| script.parameter(&format!("w{number}"), "torch.ones([250, 1000])"))
}

/// Loads the model, answers one request, and unloads it.
async fn round_trip(thread: &DeviceThread, spec: &LoadSpec) {
    let to_load = spec.clone();
    let loaded = tokio::task::spawn_blocking(move || TorchEngine.load(&to_load));
    let model = thread.place(loaded.await.expect("no panic").expect("the model loads"));
    assert_eq!(model.memory_bytes(), MODEL_BYTES);
    let ones = 1.0_f32.to_le_bytes().repeat(250);
    let input = InputParts { datatype: Datatype::Fp32, shape: vec![1, 250], parts: vec![ones.into()] };
    let outputs = model.infer(vec![input]).await.expect("it runs");
    assert_eq!(outputs[0].data[..4], 50_000.0_f32.to_le_bytes());
    drop((model, outputs));
    freed().await;
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).expect("a number");
    pages * 4096
}
