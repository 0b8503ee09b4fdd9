//! Modules that answer a request 0 to n times.

use super::*;

/// Answers as often as the first element says, counting down.
fn countdown() -> Script {
    Script::new(
        "def forward(self, x):\n  self.left = x.sum()\n\n\
         def next(self) -> Optional[Tensor]:\n  if bool(self.left <= 0):\n    return None\n  \
         self.left = self.left - 1\n  return (self.left + 1) * self.weight\n",
    )
    .buffer("left", "torch.zeros([])")
    .parameter("weight", "torch.ones([1])")
}

fn decoupled(script: &Script, outputs: &[&str]) -> Result<Box<dyn Model>, EngineError> {
    let saved = saved(script);
    TorchEngine.load(&LoadSpec { decoupled: true, ..spec(&saved.path, &["x"], outputs) })
}

fn all(generation: &mut dyn Generation) -> Vec<f32> {
    std::iter::from_fn(|| generation.next().expect("it runs")).flat_map(|outputs| read_floats(&outputs[0])).collect()
}

#[test]
fn a_request_is_answered_until_next_returns_none() {
    let mut model = decoupled(&countdown(), &["y"]).expect("the model loads");
    let mut open = |count| model.open_generation(&[floats(&[1], &[count])]).expect("opened");
    assert_eq!(all(&mut *open(3.0)), [3.0, 2.0, 1.0]);
    assert_eq!(all(&mut *open(0.0)), [0.0; 0]);
}

#[test]
fn requests_do_not_mix_and_time_is_counted_once() {
    let mut model = decoupled(&countdown(), &["y"]).expect("the model loads");
    let before = Instant::now();
    let mut one = model.open_generation(&[floats(&[1], &[2.0])]).expect("opened");
    let opened = Instant::now();
    let mut other = model.open_generation(&[floats(&[1], &[5.0])]).expect("opened");
    let next = |generation: &mut Box<dyn Generation>| generation.next().expect("it runs").expect("there is one");
    let (first, second) = (next(&mut one), next(&mut other));
    assert_eq!((read_floats(&first[0]), read_floats(&second[0])), (vec![2.0], vec![5.0]));
    assert!(before <= first.timing.began && first.timing.began <= opened, "the request's own part is in the first response");
    assert!(!first.timing.input.is_zero());
    let later = next(&mut one);
    assert!(later.timing.began > opened && later.timing.input.is_zero());
    assert_eq!(read_floats(&later[0]), [1.0]);
    drop(model);
    assert_eq!(all(&mut *other), [4.0, 3.0, 2.0, 1.0], "an open request outlives its model");
    assert!(one.next().expect("it runs").is_none());
}

#[test]
fn a_response_may_be_a_tuple_or_a_dict() {
    let tuple = Script::new(
        "def forward(self, x):\n  self.x = x\n\ndef next(self) -> Optional[Tuple[Tensor, int]]:\n  \
         self.calls += 1\n  if self.calls > 2:\n    return None\n  return self.x, self.calls\n",
    )
    .buffer("x", "torch.zeros([])")
    .attribute("calls", "int", "0");
    let mut model = decoupled(&tuple, &["x", "calls"]).expect("the model loads");
    let mut generation = model.open_generation(&[floats(&[1], &[7.0])]).expect("opened");
    for number in 1..=2_i64 {
        let response = generation.next().expect("it runs").expect("there is one");
        assert_eq!((read_floats(&response[0]), &response[1].data[..]), (vec![7.0], &number.to_le_bytes()[..]));
    }
    let dict = Script::new(
        "def forward(self, x):\n  self.x = x\n\ndef next(self) -> Optional[Dict[str, Tensor]]:\n  \
         x = self.x\n  self.x = x - 1\n  return {\"b\": x, \"a\": -x} if bool(x > 0) else None\n",
    )
    .buffer("x", "torch.zeros([])");
    let mut model = decoupled(&dict, &["a"]).expect("the model loads");
    assert_eq!(all(&mut *model.open_generation(&[floats(&[1], &[2.0])]).expect("opened")), [-2.0, -1.0]);
}

#[test]
fn what_is_not_decoupled_is_refused_when_it_loads() {
    let forward = "def forward(self, x):\n  return x\n\n";
    for (next, expected) in [
        ("", "has no method `next`"),
        ("def next(self) -> Tensor:\n  return torch.ones([1])\n", "this one returns Tensor"),
        ("def next(self, n: int) -> Optional[Tensor]:\n  return None\n", "this one needs 'n'"),
    ] {
        let refused = decoupled(&Script::new(&format!("{forward}{next}")), &["y"]).err().expect(expected);
        assert!(matches!(&refused, EngineError::CannotLoad(why) if why.contains(expected)), "{refused}");
    }
    let mut plain = load(&testing::plus_one(), &["x"], &["y"]);
    let refused = plain.open_generation(&[floats(&[1], &[1.0])]).err().expect("it is not decoupled");
    assert_eq!(refused, EngineError::Failed("the model is not decoupled".into()));
}

#[test]
fn errors_of_the_request_and_of_a_response_are_told() {
    let script = Script::new(
        "def forward(self, x):\n  assert float(x[0]) >= 0.0, \"a negative start\"\n  self.x = x\n\n\
         def next(self) -> Optional[Tensor]:\n  self.x = self.x - 1\n  assert float(self.x[0]) >= 0.0, \"gone below\"\n  \
         return self.x\n",
    )
    .buffer("x", "torch.zeros([1])");
    let mut model = decoupled(&script, &["y"]).expect("the model loads");
    let refused = model.open_generation(&[floats(&[1], &[-1.0])]).err().expect("it raises");
    assert_eq!(refused, EngineError::Failed("AssertionError: a negative start".into()));
    assert!(matches!(model.open_generation(&[]).err(), Some(EngineError::BadInput(_))));
    let mut generation = model.open_generation(&[floats(&[1], &[1.0])]).expect("opened");
    assert!(generation.next().expect("it runs").is_some());
    assert_eq!(generation.next().err(), Some(EngineError::Failed("AssertionError: gone below".into())));
}

#[test]
fn a_module_that_writes_to_its_weights_is_not_decoupled() {
    let script = Script::new(
        "def forward(self, x):\n  return x\n\ndef next(self) -> Optional[Tensor]:\n  self.w.add_(1)\n  return self.w\n",
    )
    .parameter("w", "torch.zeros([1])");
    let mut model = decoupled(&script, &["y"]).expect("the model loads");
    let mut generation = model.open_generation(&[floats(&[1], &[1.0])]).expect("opened");
    let failed = generation.next().expect_err("it writes to what all share");
    assert!(matches!(&failed, EngineError::Failed(why) if why.contains("writes to its own parameters")), "{failed}");
}
