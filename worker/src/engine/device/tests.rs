//! The device thread with a model of Rust closures: no libtorch here.

use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use super::*;
use crate::engine::{Datatype, OutputTensor, Timing};

type Behaviour = Box<dyn FnMut(&[InputParts]) -> Result<Outputs, EngineError> + Send>;

fn outputs(tensors: Vec<OutputTensor>) -> Outputs {
    Outputs { tensors, timing: Timing::of_model(Instant::now()) }
}

struct Fake {
    behaviour: Behaviour,
    signature: Signature,
    freed: Option<Sender<String>>,
}

impl Fake {
    fn new(behaviour: impl FnMut(&[InputParts]) -> Result<Outputs, EngineError> + Send + 'static) -> Box<Self> {
        Box::new(Self { behaviour: Box::new(behaviour), signature: Signature::default(), freed: None })
    }
}

impl Model for Fake {
    fn infer(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        (self.behaviour)(inputs)
    }

    fn open_sequence(&mut self) -> Result<Box<dyn SequenceModel>, EngineError> {
        Ok(Box::new(Count(0)))
    }

    fn open_generation(&mut self, inputs: &[InputParts]) -> Result<Box<dyn Generation>, EngineError> {
        (self.behaviour)(inputs)?;
        Ok(Box::new(Count(0)))
    }

    fn memory_bytes(&self) -> u64 {
        42
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(freed) = self.freed.take() {
            let name = std::thread::current().name().unwrap_or_default().to_string();
            freed.send(name).expect("the test waits");
        }
    }
}

struct Count(u8);

impl SequenceModel for Count {
    fn step(&mut self, _: &[InputParts]) -> Result<Outputs, EngineError> {
        self.0 += 1;
        Ok(outputs(vec![OutputTensor { datatype: Datatype::Uint8, shape: vec![1], data: vec![self.0].into() }]))
    }

    fn checkpoint(&mut self) -> Result<Bytes, EngineError> {
        Ok(vec![self.0].into())
    }

    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), EngineError> {
        self.0 = *checkpoint.first().ok_or_else(|| EngineError::BadCheckpoint("empty".into()))?;
        Ok(())
    }
}

impl Generation for Count {
    fn next(&mut self) -> Result<Option<Outputs>, EngineError> {
        (self.0 < 3).then(|| self.step(&[])).transpose()
    }
}

fn spawn() -> DeviceThread {
    DeviceThread::spawn(Device::Cpu).expect("a thread")
}

/// A model whose every call tells that it began, then waits to be let go.
fn gated() -> (Box<Fake>, Receiver<()>, Sender<()>) {
    let (began, begun) = channel();
    let (go, gate) = channel::<()>();
    let model = Fake::new(move |_| {
        began.send(()).expect("the test waits");
        gate.recv().expect("the test lets go");
        Ok(outputs(Vec::new()))
    });
    (model, begun, go)
}

#[tokio::test]
async fn jobs_run_on_the_devices_thread_in_turn() {
    let thread = spawn();
    let model = thread.place(Fake::new(|_| {
        let name = std::thread::current().name().unwrap_or_default().as_bytes().to_vec();
        Ok(outputs(vec![OutputTensor { datatype: Datatype::Uint8, shape: vec![10], data: name.into() }]))
    }));
    let answer = model.infer(Vec::new()).await.expect("it runs");
    assert_eq!(&answer[0].data[..], b"engine-cpu");
    assert_eq!(model.memory_bytes(), 42);
    let sequence = model.open_sequence().await.expect("opened");
    assert_eq!(sequence.step(Vec::new()).await.expect("it runs")[0].data[..], [1]);
    let saved =
        sequence.thread().slot().await.expect("a slot").step_and_checkpoint(&sequence, Vec::new()).await.expect("it runs");
    assert_eq!((&saved.outputs[0].data[..], saved.checkpoint), (&[2][..], Ok(vec![2].into())));
    sequence.restore(vec![9].into()).await.expect("restored");
    assert_eq!(sequence.checkpoint().await.expect("saved")[..], [9]);
    assert!(matches!(sequence.restore(Bytes::new()).await, Err(EngineError::BadCheckpoint(_))));
}

#[tokio::test]
async fn one_job_is_ready_while_one_runs_and_a_third_waits() {
    let thread = spawn();
    let (model, begun, go) = gated();
    let model = thread.place(model);
    let first = thread.slot().await.expect("a slot").infer(&model, Vec::new());
    begun.recv().expect("the first runs");
    assert!(thread.busy_for().is_some());
    let second = thread.slot().await.expect("a slot").infer(&model, Vec::new());
    let mut third = std::pin::pin!(thread.slot());
    assert!(futures::poll!(third.as_mut()).is_pending(), "no room for a third");
    go.send(()).expect("let go");
    assert!(first.await.is_ok());
    begun.recv().expect("the second runs");
    drop(third.await.expect("room now"));
    go.send(()).expect("let go");
    assert!(second.await.is_ok());
    let idle = thread.slot().await.expect("a slot");
    drop(idle);
    assert!(thread.busy_total() > Duration::ZERO);
}

#[tokio::test]
async fn an_abandoned_prediction_is_not_run_but_an_abandoned_step_is() {
    let thread = spawn();
    let (gate_model, begun, go) = gated();
    let gate_model = thread.place(gate_model);
    let ran = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&ran);
    let model = thread.place(Fake::new(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
        Ok(outputs(Vec::new()))
    }));
    let sequence = model.open_sequence().await.expect("opened");
    for round in 0..2 {
        let blocking = thread.slot().await.expect("a slot").infer(&gate_model, Vec::new());
        begun.recv().expect("it runs");
        let slot = thread.slot().await.expect("a slot");
        if round == 0 {
            drop(slot.infer(&model, Vec::new()));
        } else {
            drop(slot.step(&sequence, Vec::new()));
        }
        go.send(()).expect("let go");
        blocking.await.expect("it ran");
    }
    assert_eq!(sequence.step(Vec::new()).await.expect("it runs")[0].data[..], [2]);
    assert_eq!(ran.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn responses_of_two_requests_take_turns() {
    let thread = spawn();
    let model = thread.place(Fake::new(|_| Ok(outputs(Vec::new()))));
    let one = model.open_generation(Vec::new()).await.expect("opened");
    let other = model.open_generation(Vec::new()).await.expect("opened");
    for number in 1..=3 {
        for generation in [&one, &other] {
            let response = generation.next().await.expect("it runs").expect("there is one");
            assert_eq!(response[0].data[..], [number]);
        }
    }
    drop(thread.slot().await.expect("a slot").next(&other));
    for generation in [&one, &other] {
        assert!(generation.next().await.expect("it runs").is_none());
    }
}

#[tokio::test]
async fn a_panic_is_an_error_and_loses_the_device() {
    let thread = spawn();
    let model = thread.place(Fake::new(|_| panic!("a bug at 0x7fffdeadbeef")));
    let mut health = thread.health();
    assert_eq!(*health.borrow_and_update(), DeviceHealth::Ready);
    let failed = model.infer(Vec::new()).await.expect_err("it panics");
    assert!(matches!(failed, EngineError::DeviceLost(_)), "{failed}");
    health.changed().await.expect("the thread lives");
    assert_eq!(*health.borrow(), DeviceHealth::Lost("a job panicked: a bug at 0x..".into()));
    let next = model.infer(Vec::new()).await.expect_err("the device is lost");
    assert_eq!(next, EngineError::DeviceLost("a job panicked: a bug at 0x..".into()));
}

#[tokio::test]
async fn an_error_of_the_model_loses_nothing_but_a_lost_device_does() {
    let thread = spawn();
    let mut calls = 0;
    let model = thread.place(Fake::new(move |_| {
        calls += 1;
        Err(if calls == 1 { EngineError::Failed("no".into()) } else { EngineError::DeviceLost("gone".into()) })
    }));
    assert_eq!(model.infer(Vec::new()).await.expect_err("fails"), EngineError::Failed("no".into()));
    assert_eq!(*thread.health().borrow(), DeviceHealth::Ready);
    for _ in 0..2 {
        assert_eq!(model.infer(Vec::new()).await.expect_err("fails"), EngineError::DeviceLost("gone".into()));
    }
}

#[tokio::test]
async fn a_model_is_freed_elsewhere_when_its_last_handle_goes() {
    let thread = spawn();
    let (freed, news) = channel();
    let mut model = Fake::new(|_| Ok(outputs(Vec::new())));
    model.freed = Some(freed);
    let placed = thread.place(model);
    let other = placed.clone();
    drop(placed);
    other.infer(Vec::new()).await.expect("still there");
    drop(other);
    assert_eq!(news.recv().expect("freed"), "engine-free");
}

#[tokio::test]
async fn whoever_holds_a_thread_that_is_given_up_overran_and_the_others_find_it_lost() {
    let thread = DeviceThread::spawn(Device::Cpu).expect("a thread");
    let (begun, has_begun) = channel();
    let (end, ends) = channel::<()>();
    let model = thread.place(Fake::new(move |_| {
        begun.send(()).expect("the test waits");
        ends.recv().expect("the test ends it");
        Ok(outputs(Vec::new()))
    }));
    let told = Arc::new(Mutex::new(String::new()));
    let hears = Arc::clone(&told);
    thread.on_fence(move |why| hears.lock().push_str(why));
    let holds = thread.slot().await.expect("room").infer(&model, Vec::new());
    has_begun.recv().expect("it begins");
    let waits = thread.slot().await.expect("room").infer(&model, Vec::new());
    let watch = thread.watch();
    assert!(watch.busy_for().is_some() && watch.lost().is_none() && !watch.is_over());
    let in_line = tokio::spawn({
        let thread = thread.clone();
        async move { thread.slot().await.map(drop) }
    });
    watch.fence("too long");
    let lost = || EngineError::DeviceLost("too long".into());
    assert_eq!(holds.await.unwrap_err(), EngineError::Overran("too long".into()));
    assert_eq!(waits.await.unwrap_err(), lost());
    assert_eq!(in_line.await.expect("no panic").unwrap_err(), lost());
    assert_eq!((told.lock().as_str(), watch.lost().as_deref()), ("too long", Some("too long")));
    end.send(()).expect("it waits still");
    assert_eq!(thread.slot().await.map(drop).unwrap_err(), lost(), "also once it came back");
}
