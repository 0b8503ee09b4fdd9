//! Sequences of small modules: isolation, checkpoints, and what can't be saved.

use super::*;

fn checkpoint(sequence: &mut Box<dyn SequenceModel>) -> Bytes {
    sequence.checkpoint().expect("the state can be saved")
}

fn step(sequence: &mut Box<dyn SequenceModel>, value: f32) -> f32 {
    let outputs = sequence.step(&[floats(&[1], &[value])]).expect("it runs");
    read_floats(&outputs[0])[0]
}

/// Runs `values` in one sequence, and again with a move to a new copy of another load after each
/// step: the outputs have to be equal.
fn moves_anywhere(script: &Script, values: &[f32]) {
    let saved = saved(script);
    let spec = spec(&saved.path, &["x"], &["y"]);
    let load = || TorchEngine.load(&spec).expect("the model loads");
    let mut straight = load().open_sequence().expect("opened");
    let expected: Vec<u32> = values.iter().map(|&value| step(&mut straight, value).to_bits()).collect();
    let mut moving = load().open_sequence().expect("opened");
    for (at, &value) in values.iter().enumerate() {
        assert_eq!(step(&mut moving, value).to_bits(), expected[at], "step {at}");
        let state = checkpoint(&mut moving);
        let mut next = load().open_sequence().expect("opened");
        next.restore(&state).expect("restored");
        assert_eq!(checkpoint(&mut next), state, "the same state gives the same bytes");
        moving = next;
    }
}

#[test]
fn sequences_do_not_mix() {
    let mut model = load(&testing::running_sum(), &["x"], &["total"]);
    let mut one = model.open_sequence().expect("opened");
    let mut two = model.open_sequence().expect("opened");
    assert_eq!([step(&mut one, 1.0), step(&mut two, 10.0), step(&mut one, 2.0)], [1.0, 10.0, 3.0]);
    model.infer(&[floats(&[1], &[100.0])]).expect("it runs");
    let mut three = model.open_sequence().expect("opened");
    assert_eq!([step(&mut two, 20.0), step(&mut three, 5.0)], [30.0, 5.0]);
    drop(model);
    assert_eq!(step(&mut one, 3.0), 6.0, "a sequence outlives its model's handle");
}

#[test]
fn tensors_and_numbers_move() {
    moves_anywhere(&testing::running_sum(), &[1.0, -2.5, 0.0, f32::NAN, 1.0]);
}

#[test]
fn an_untouched_state_is_small_and_a_repeated_value_too() {
    let script = testing::running_sum().buffer("big", "torch.zeros([100000])").parameter("w", "torch.zeros([100000])");
    let mut sequence = load(&script, &["x"], &["total"]).open_sequence().expect("opened");
    let untouched = checkpoint(&mut sequence).len();
    assert!(untouched < 40, "{untouched} bytes");
    step(&mut sequence, 1.0);
    let stepped = checkpoint(&mut sequence).len();
    assert!(stepped < 150, "{stepped} bytes");
}

#[test]
fn every_kind_of_value_moves() {
    let source = "def forward(self, x):\n  \
        self.n += 1\n  self.f = self.f * 0.5 + float(x)\n  self.b = not self.b\n  self.s = self.s + \"é\"\n  \
        self.ints.append(self.n)\n  self.tensors = [x, x * 2] + self.tensors[0:3]\n  \
        self.by_key[self.s] = x + self.f\n  self.pair = (self.n, x * 3)\n  \
        if self.n == 2:\n    self.maybe = x * 7\n  if self.n == 4:\n    self.maybe = None\n  \
        y = x * 0\n  for t in self.tensors:\n    y = y + t\n  for k, v in self.by_key.items():\n    y = y * 0.5 + v + len(k)\n  \
        for i in self.ints:\n    y = y + i\n  m = self.maybe\n  if m is not None:\n    y = y + m\n  \
        return y + self.pair[0] + self.pair[1] + self.f + (1.0 if self.b else 0.0)\n";
    let script = Script::new(source)
        .attribute("n", "int", "0")
        .attribute("f", "float", "0.25")
        .attribute("b", "bool", "False")
        .attribute("s", "str", "\"\"")
        .attribute("ints", "List[int]", "[5]")
        .attribute("tensors", "List[Tensor]", "[torch.ones([1])]")
        .attribute("by_key", "Dict[str, Tensor]", "{}")
        .attribute("pair", "Tuple[int, Tensor]", "(0, torch.zeros([1]))")
        .attribute("maybe", "Optional[Tensor]", "None");
    moves_anywhere(&script, &[1.0, 2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn attributes_that_share_memory_still_do_after_a_move() {
    // `window` is a view of `ring`: a write to one is seen in the other.
    let source = "def forward(self, x):\n  if self.n == 0:\n    self.ring = x.new_zeros([4])\n    self.window = self.ring[1:3]\n  \
        self.n += 1\n  self.window.add_(x)\n  self.ring.mul_(1.5)\n  self.t = self.ring.reshape([2, 2]).t()\n  \
        return (self.ring.sum() + self.window.sum() * 2 + self.t[0, 1]).reshape([1])\n";
    let script = Script::new(source)
        .attribute("n", "int", "0")
        .buffer("ring", "torch.zeros([4])")
        .buffer("window", "torch.zeros([2])")
        .buffer("t", "torch.zeros([2, 2])");
    moves_anywhere(&script, &[1.0, 2.0, 3.0, 4.0]);
    let from_the_file = Script::new("def forward(self, x):\n  self.window.add_(x)\n  return self.ring.sum().reshape([1])\n")
        .attribute("pair", "Tuple[Tensor, Tensor]", "(torch.zeros([4]), torch.zeros([4]))")
        .buffer("ring", "torch.zeros([4])")
        .buffer("window", "torch.zeros([4])");
    moves_anywhere(&from_the_file, &[1.0, 2.0]);
}

#[test]
fn a_short_slice_of_a_long_tensor_is_saved_short() {
    let script = Script::new(
        "def forward(self, x):\n  self.tail = torch.cat([x.new_zeros([5000]), x])[-2:]\n  return self.tail.sum().reshape([1])\n",
    )
    .buffer("tail", "torch.zeros([2])");
    let mut sequence = load(&script, &["x"], &["y"]).open_sequence().expect("opened");
    step(&mut sequence, 1.0);
    assert!(checkpoint(&mut sequence).len() < 150);
    moves_anywhere(&script, &[1.0, 2.0]);
}

#[test]
fn a_list_held_by_two_attributes_is_refused_not_lost() {
    let script = Script::new("def forward(self, x):\n  self.b = self.a\n  self.a.append(1)\n  return x + len(self.b)\n")
        .attribute("a", "List[int]", "[5]")
        .attribute("b", "List[int]", "[6]");
    let mut sequence = load(&script, &["x"], &["y"]).open_sequence().expect("opened");
    assert!(sequence.checkpoint().is_ok());
    step(&mut sequence, 1.0);
    let refused = sequence.checkpoint().expect_err("two names for one list");
    assert!(matches!(&refused, EngineError::NotCheckpointable(why) if why.contains("shares a list or dict")), "{refused}");
    assert_eq!(step(&mut sequence, 1.0), 4.0, "the sequence goes on");
}

#[test]
fn a_module_that_writes_to_its_weights_is_not_run_as_sequences() {
    let script = Script::new("def forward(self, x):\n  self.w.add_(x)\n  return self.w\n").parameter("w", "torch.zeros([1])");
    let mut sequence = load(&script, &["x"], &["y"]).open_sequence().expect("opened");
    let failed = sequence.step(&[floats(&[1], &[1.0])]).expect_err("shared weights must not change");
    assert!(matches!(&failed, EngineError::Failed(why) if why.contains("writes to its own parameters")), "{failed}");
}

#[test]
fn rubbish_and_strangers_are_refused_and_leave_the_sequence_as_it_was() {
    let mut model = load(&testing::running_sum(), &["x"], &["total"]);
    let mut sequence = model.open_sequence().expect("opened");
    step(&mut sequence, 1.0);
    let good = checkpoint(&mut sequence);
    let mut stranger = load(&testing::running_sum().buffer("extra", "torch.zeros([1])"), &["x"], &["total"]);
    let refused = stranger.open_sequence().expect("opened").restore(&good).expect_err("another model");
    assert_eq!(refused, EngineError::BadCheckpoint("it is of another model".into()));
    for length in 0..good.len() {
        assert!(matches!(sequence.restore(&good[..length]), Err(EngineError::BadCheckpoint(_))), "cut to {length}");
    }
    assert_eq!(step(&mut sequence, 2.0), 3.0);
    sequence.restore(&good).expect("restored");
    assert_eq!(step(&mut sequence, 5.0), 6.0);
}

#[test]
fn a_state_that_lies_under_a_good_seal_never_crashes() {
    let script = testing::running_sum().attribute("names", "List[str]", "[\"a\"]").attribute(
        "table",
        "Dict[str, Tensor]",
        "{\"k\": torch.zeros([2])}",
    );
    let saved = saved(&script);
    let mut module = Module::load(&saved.path, device()).ok().expect("loads");
    module.bind(&[signature::Source::Input(0)], &["x"]).ok().expect("binds");
    let fingerprint = module.fingerprint();
    drop(module);
    let mut model = TorchEngine.load(&spec(&saved.path, &["x"], &["total"])).expect("loads");
    let mut sequence = model.open_sequence().expect("opened");
    step(&mut sequence, 1.0);
    let sealed = checkpoint(&mut sequence);
    let state = checkpoint::unseal(fingerprint, &sealed).expect("a good seal").to_vec();
    let mut refused = 0;
    let mut attempt = |bytes: &[u8]| {
        let mut victim = model.open_sequence().expect("opened");
        match victim.restore(&checkpoint::seal(fingerprint, bytes)) {
            Ok(()) => {
                // What was taken is a state of the declared types: running it may fail, not crash.
                let _ = victim.step(&[floats(&[1], &[1.0])]);
                let _ = victim.checkpoint();
            }
            Err(EngineError::BadCheckpoint(_) | EngineError::OutOfMemory(_)) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    };
    for length in 0..state.len() {
        attempt(&state[..length]);
    }
    for at in 0..state.len() {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut changed = state.clone();
            changed[at] = value;
            attempt(&changed);
        }
    }
    assert!(refused > state.len(), "cuts at least are refused");
}
