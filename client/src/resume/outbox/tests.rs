//! A client against servers that die, forget and refuse, in every order.
use cresset_proto::{inference::model_infer_response::InferOutputTensor, parameters::number_of};
use proptest::prelude::*;

use super::*;

const PARTS: u64 = 3;

fn fold(state: u64, input: u64) -> u64 {
    (state ^ input).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17)
}

fn input(request: &ModelInferRequest) -> u64 {
    number_of(&request.parameters, "input")
}

/// What is to be answered, `count` in the order of asking; a sequence by its number from 1.
#[derive(Debug, Clone, Copy)]
enum Ask {
    Plain,
    Decoupled,
    Step(i64),
}

/// Writes requests, and what their answers must be.
#[derive(Default)]
struct Caller {
    asked: u64,
    states: HashMap<i64, (u64, u64)>,
    expected: HashMap<String, Vec<u64>>,
}

impl Caller {
    fn ask(&mut self, ask: Ask) -> ModelInferRequest {
        self.asked += 1;
        let number = self.asked;
        let id = format!("q{number}");
        let mut request = ModelInferRequest { id: id.clone(), ..Default::default() };
        let mut set = |key: &str, value| request.parameters.insert(key.to_owned(), value);
        set("input", int64_parameter(i64::try_from(number).unwrap()));
        let (model, answers) = match ask {
            Ask::Plain => ("plain", vec![fold(0, number)]),
            Ask::Decoupled => ("many", (0..PARTS).map(|part| fold(part, number)).collect()),
            Ask::Step(sequence) => {
                // Of seven requests each, one after the other under the same id.
                let (count, state) = self.states.entry(sequence).or_default();
                let (is_first, is_last) = (count.is_multiple_of(7), *count % 7 == 6);
                *state = fold(if is_first { 0 } else { *state }, number);
                *count += 1;
                set(keys::SEQUENCE_ID, int64_parameter(sequence));
                set(keys::SEQUENCE_START, bool_parameter(is_first));
                set(keys::SEQUENCE_END, bool_parameter(is_last));
                ("seq", vec![*state])
            }
        };
        request.model_name = model.to_owned();
        self.expected.insert(id, answers);
        request
    }
}

/// What workers hold of one life of a sequence.
#[derive(Default)]
struct Held {
    first: u64,
    applied: u64,
    state: u64,
    kept: Vec<(u64, u64)>,
}

/// All coordinators and workers as one.
#[derive(Default)]
struct Servers {
    held: HashMap<i64, Vec<Held>>,
    /// Answers that are on their way.
    answers: VecDeque<ModelStreamInferResponse>,
    attempt: u64,
    runs: u64,
}

impl Servers {
    fn run(&mut self, request: &ModelInferRequest) {
        let said = |key| number_of(&request.parameters, key);
        assert!(said(keys::ATTEMPT) >= self.attempt, "attempts only grow");
        self.attempt = said(keys::ATTEMPT);
        let parameters = Parameters::read(&request.parameters).unwrap();
        assert!(parameters.stream_id.as_deref() == Some("stream") && parameters.empty_final_response);
        match (&*request.model_name, parameters.sequence_id.clone()) {
            ("plain", None) => self.answer(request, Some(fold(0, input(request))), true),
            ("many", None) => {
                for part in parameters.ack..PARTS {
                    self.answer(request, Some(fold(part, input(request))), false);
                }
                self.answer(request, None, true);
            }
            ("seq", Some(SequenceId::Number(sequence))) => match self.step(request, sequence, &parameters) {
                Some(value) => self.answer(request, Some(value), true),
                None => self.lost(request),
            },
            other => panic!("{other:?}"),
        }
    }

    /// The contract of PROTOCOL.md.
    fn step(&mut self, request: &ModelInferRequest, sequence: i64, parameters: &Parameters) -> Option<u64> {
        let Parameters { ordinal, ack, .. } = *parameters;
        assert!(ack < ordinal);
        let lives = self.held.entry(sequence).or_default();
        if parameters.sequence_start {
            assert_eq!(ack, 0);
            lives.retain(|life| life.first != ordinal);
            lives.push(Held { first: ordinal, ..Held::default() });
        }
        let life = lives.iter_mut().filter(|life| life.first <= ordinal).max_by_key(|life| life.first)?;
        if life.applied < ack {
            return None;
        }
        life.kept.retain(|(kept, _)| *kept > ack);
        if ordinal > life.applied {
            self.runs += 1;
            life.state = fold(life.state, input(request));
            life.applied = ordinal;
            life.kept.push((ordinal, life.state));
        }
        Some(life.kept.iter().find(|(kept, _)| *kept == ordinal).expect("it was not acknowledged").1)
    }

    fn answer(&mut self, request: &ModelInferRequest, value: Option<u64>, is_final: bool) {
        let mut response =
            ModelInferResponse { id: request.id.clone(), model_name: request.model_name.clone(), ..Default::default() };
        response.model_version = "3".to_owned();
        response.outputs = value.iter().map(|_| InferOutputTensor::default()).collect();
        response.raw_output_contents = value.iter().map(|value| value.to_le_bytes().to_vec().into()).collect();
        response.parameters.insert(keys::FINAL.to_owned(), bool_parameter(is_final));
        self.answers.push_back(ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) });
    }

    fn lost(&mut self, request: &ModelInferRequest) {
        let mut response = ModelInferResponse { id: request.id.clone(), ..Default::default() };
        response.parameters.insert(keys::REASON.to_owned(), string_parameter(Reason::SequenceLost.as_str()));
        self.answers.push_back(ModelStreamInferResponse { error_message: "lost".to_owned(), infer_response: Some(response) });
    }
}

/// A client, its servers, and what its caller got.
struct World {
    outbox: Outbox,
    servers: Servers,
    caller: Caller,
    got: HashMap<String, Vec<u64>>,
    order: Vec<String>,
}

impl World {
    fn new(limits: Limits) -> Self {
        let mut outbox = Outbox::new("stream".to_owned(), limits);
        outbox.connect();
        let (servers, caller) = (Servers::default(), Caller::default());
        Self { outbox, servers, caller, got: HashMap::new(), order: vec![] }
    }

    fn push(&mut self, ask: Ask) {
        if self.outbox.has_room() {
            let request = self.caller.ask(ask);
            self.outbox.push(request);
        }
    }

    fn send(&mut self, most: usize) {
        for _ in 0..most {
            let Some(request) = self.outbox.send() else { return };
            self.servers.run(&request);
        }
    }

    fn hear(&mut self, most: usize) {
        for _ in 0..most {
            let Some(message) = self.servers.answers.pop_front() else { return };
            match self.outbox.receive(message) {
                Came::Deliver(message) => {
                    assert_eq!(message.error_message, "", "{message:?}");
                    let response = message.infer_response.unwrap();
                    let value = u64::from_le_bytes(response.raw_output_contents[0][..].try_into().unwrap());
                    self.order.push(response.id.clone());
                    self.got.entry(response.id).or_default().push(value);
                }
                Came::Nothing => {}
                Came::Reconnect => self.reconnect(),
                Came::Broken(message) => panic!("{message:?}"),
            }
        }
    }

    fn reconnect(&mut self) {
        self.servers.answers.clear();
        self.outbox.connect();
    }

    fn finish(&mut self) {
        for _ in 0..1_000 {
            self.send(usize::MAX);
            self.hear(usize::MAX);
            if self.outbox.is_empty() {
                return;
            }
        }
        panic!("it doesn't end: {:?}", self.outbox);
    }
}

fn asks() -> impl Strategy<Value = Ask> {
    prop_oneof![Just(Ask::Plain), Just(Ask::Decoupled), (1..3_i64).prop_map(Ask::Step), Just(Ask::Step(9))]
}

#[derive(Debug, Clone)]
enum Op {
    Push(Ask),
    Send(usize),
    Hear(usize),
    /// The coordinator dies.
    Break,
    /// And the workers with it.
    Lose,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => asks().prop_map(Op::Push),
        4 => (1..6_usize).prop_map(Op::Send),
        4 => (1..8_usize).prop_map(Op::Hear),
        1 => Just(Op::Break),
        1 => Just(Op::Lose),
    ];
    proptest::collection::vec(op, 0..150)
}

proptest! {
    #[test]
    fn every_answer_comes_once_and_right_whatever_dies(ops in ops()) {
        let mut world = World::new(Limits { unanswered_max: 12, ..Limits::default() });
        for op in ops {
            match op {
                Op::Push(ask) => world.push(ask),
                Op::Send(most) => world.send(most),
                Op::Hear(most) => world.hear(most),
                Op::Break => world.reconnect(),
                Op::Lose => {
                    world.servers.held.clear();
                    world.reconnect();
                }
            }
        }
        world.finish();
        prop_assert_eq!(&world.got, &world.caller.expected);
        // What isn't decoupled comes in the order in which it was asked.
        let single = world.order.iter().filter(|id| world.caller.expected[*id].len() == 1);
        let numbers: Vec<u64> = single.map(|id| id[1..].parse().unwrap()).collect();
        prop_assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", numbers);
        // Nothing is left but the sequences that go on.
        let open = world.outbox.sequences.values().filter(|sequence| !sequence.is_over).count();
        prop_assert_eq!(open, world.outbox.sequences.len());
        prop_assert!(world.outbox.entries.values().all(|entry| entry.sequence.is_some()));
        let bytes: usize = world.outbox.entries.values().map(|entry| entry.bytes).sum();
        prop_assert_eq!(bytes, world.outbox.journal_bytes);
    }
}

#[test]
fn a_coordinators_death_makes_nothing_run_twice() {
    let mut world = World::new(Limits::default());
    for _ in 0..6 {
        world.push(Ask::Step(1));
        world.send(1);
    }
    world.hear(2);
    world.reconnect();
    world.finish();
    assert_eq!((world.servers.runs, world.got.len()), (6, 6));
}

#[test]
fn a_sequence_beyond_the_journals_bound_is_told_as_lost_when_both_die() {
    let mut world = World::new(Limits { journal_bytes_max: 2 * ENTRY_BYTES, ..Limits::default() });
    for _ in 0..5 {
        world.push(Ask::Step(1));
        world.send(1);
        world.hear(1);
    }
    assert!(world.outbox.journal_bytes <= 2 * ENTRY_BYTES);
    world.servers.held.clear();
    world.push(Ask::Step(1));
    world.reconnect();
    world.send(1);
    let message = world.servers.answers.pop_front().unwrap();
    let Came::Deliver(message) = world.outbox.receive(message) else { panic!("it can't be sent again") };
    assert_eq!((&*message.error_message, &*message.infer_response.unwrap().id), ("lost", "q6"));
    assert!(world.outbox.is_empty());
}

#[test]
fn a_sequence_that_can_nowhere_be_kept_is_not_sent_again_for_ever() {
    let mut world = World::new(Limits::default());
    for _ in 0..3 {
        world.push(Ask::Step(1));
    }
    world.send(3);
    world.hear(1);
    let mut tries = 0;
    loop {
        world.servers.held.clear();
        world.reconnect();
        let Some(request) = std::iter::from_fn(|| world.outbox.send()).last() else { break };
        world.servers.lost(&request);
        match world.outbox.receive(world.servers.answers.pop_front().unwrap()) {
            Came::Reconnect => tries += 1,
            Came::Deliver(message) => {
                assert_eq!(message.error_message, "lost");
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(tries, REBUILDS_MAX);
}

#[test]
fn an_error_in_the_middle_of_a_sequence_that_is_sent_again_does_not_pass_as_its_state() {
    let mut world = World::new(Limits::default());
    for _ in 0..3 {
        world.push(Ask::Step(1));
        world.send(1);
        world.hear(1);
    }
    world.servers.held.clear();
    world.push(Ask::Step(1));
    world.reconnect();
    world.send(1);
    world.hear(1);
    let first = world.outbox.send().unwrap();
    assert_eq!((&*first.id, number_of(&first.parameters, keys::ACK), &*first.model_version), ("1", 0, "3"));
    world.servers.lost(&first);
    let message = world.servers.answers.pop_front().unwrap();
    assert_eq!(world.outbox.receive(message), Came::Reconnect);
    world.reconnect();
    world.finish();
    assert_eq!(world.got, world.caller.expected);
}
