//! A worker made of arithmetic, and every way to interrupt it.
use proptest::prelude::*;

use super::*;

fn request(id: u64) -> ModelInferRequest {
    ModelInferRequest { id: id.to_string(), ..Default::default() }
}

fn limits(checkpoint_requests: u64) -> Limits {
    Limits { checkpoint_requests, ..Limits::default() }
}

#[test]
fn answers_are_delivered_once_and_in_order() {
    let mut journal = Journal::new(limits(8));
    assert_eq!(journal.push(request(1)).unwrap(), 1);
    assert_eq!(journal.push(request(2)).unwrap(), 2);
    assert_eq!(journal.accept(2, Outcome::Answered), Accept::Gap);
    assert_eq!(journal.accept(1, Outcome::Answered), Accept::Deliver);
    assert_eq!(journal.accept(1, Outcome::Answered), Accept::Duplicate);
    assert_eq!(journal.accept(1, Outcome::Failed), Accept::Diverged);
    assert_eq!(journal.accept(2, Outcome::Failed), Accept::Deliver);
    assert_eq!(journal.accept(3, Outcome::Answered), Accept::Gap);
    assert_eq!(journal.unanswered(), 0);
}

#[test]
fn a_checkpoint_trims_and_a_new_lane_starts_there() {
    let mut journal = Journal::new(limits(2));
    for id in 1..=4 {
        journal.push(request(id)).unwrap();
        journal.accept(id, Outcome::Answered);
    }
    assert!(journal.checkpoint(3, Bytes::from_static(b"three")));
    assert!(!journal.checkpoint(2, Bytes::from_static(b"older")));
    assert!(!journal.checkpoint(5, Bytes::from_static(b"ahead of delivery")));
    let mut lane = Lane::open(&journal);
    assert_eq!((lane.checkpoint.as_deref(), lane.checkpoint_ordinal), (Some(b"three".as_slice()), 3));
    let send = lane.send(&journal).unwrap();
    assert_eq!((send.wire_ordinal, send.request.id.as_str(), send.want_checkpoint), (4, "4", true));
    assert!(lane.send(&journal).is_none());
    assert_eq!(journal.bytes(), request(4).encoded_len());
}

#[test]
fn a_request_that_failed_is_not_replayed_and_leaves_no_gap() {
    let mut journal = Journal::new(limits(8));
    for id in 1..=3 {
        journal.push(request(id)).unwrap();
    }
    journal.accept(1, Outcome::Answered);
    journal.accept(2, Outcome::Failed);
    let mut lane = Lane::open(&journal);
    let sent: Vec<_> = std::iter::from_fn(|| lane.send(&journal)).map(|send| (send.wire_ordinal, send.request.id)).collect();
    assert_eq!(sent, [(1, "1".to_owned()), (2, "3".to_owned())]);
    assert_eq!(lane.answered(2), None, "answers come in order");
    assert_eq!(lane.answered(1), Some(1));
    assert_eq!(lane.answered(2), Some(3));
    assert_eq!(lane.answered(3), None, "nothing else was sent");
}

#[test]
fn checkpoints_are_wanted_by_count_and_by_bytes_and_again_after_a_failure() {
    let mut journal = Journal::new(limits(4));
    let wants = |journal: &mut Journal, id| {
        journal.push(request(id)).unwrap();
        journal.entries.back().unwrap().want_checkpoint
    };
    let wanted: Vec<bool> = (1..=8).map(|id| wants(&mut journal, id)).collect();
    assert_eq!(wanted, [false, false, false, true, false, false, false, true]);
    for id in 1..=7 {
        journal.accept(id, Outcome::Answered);
    }
    journal.accept(8, Outcome::Failed);
    assert!(wants(&mut journal, 9), "the checkpoint that was asked with request 8 may never come");

    let mut journal = Journal::new(Limits { checkpoint_bytes: 1, ..Limits::default() });
    assert!(wants(&mut journal, 1));
}

#[test]
fn the_journal_is_bounded_until_a_checkpoint_makes_room() {
    let bytes = request(1).encoded_len();
    let mut journal = Journal::new(Limits { bytes_max: 2 * bytes, ..Limits::default() });
    journal.push(request(1)).unwrap();
    journal.push(request(2)).unwrap();
    let (full, again) = journal.push(request(3)).unwrap_err();
    assert_eq!(full, JournalFull { request_bytes: bytes, held_bytes: 2 * bytes, bytes_max: 2 * bytes });
    assert!(full.to_string().contains("journal_bytes_max"));
    journal.accept(1, Outcome::Answered);
    journal.checkpoint(1, Bytes::new());
    assert_eq!(journal.push(*again).unwrap(), 3);
}

/// What may happen to a sequence between its router and its workers.
#[derive(Debug, Clone)]
enum Op {
    Push,
    Send,
    /// The worker runs its next request; it may fail by itself, and may leave out the checkpoint.
    Answer {
        fails: bool,
        checkpoint: bool,
    },
    /// The worker repeats its last answer.
    Repeat,
    /// The worker dies.
    Die,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::Push),
        4 => Just(Op::Send),
        5 => (prop::bool::weighted(0.15), prop::bool::weighted(0.8)).prop_map(|(fails, checkpoint)| Op::Answer { fails, checkpoint }),
        1 => Just(Op::Repeat),
        1 => Just(Op::Die),
    ]
}

/// The state after a request; its answer is the state itself.
fn step(state: u64, id: u64) -> u64 {
    (state ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17)
}

struct Worker {
    state: u64,
    next_wire: u64,
    inbox: VecDeque<Outgoing>,
}

struct World {
    journal: Journal,
    lane: Lane,
    worker: Worker,
    pushed: u64,
    last_wire: Option<u64>,
    /// (request, answer), as the caller saw them; no answer for an error.
    delivered: Vec<(u64, Option<u64>)>,
}

impl World {
    fn new(limits: Limits) -> Self {
        let journal = Journal::new(limits);
        let lane = Lane::open(&journal);
        let worker = Worker { state: 0, next_wire: 1, inbox: VecDeque::new() };
        Self { journal, lane, worker, pushed: 0, last_wire: None, delivered: Vec::new() }
    }

    fn move_to_another_worker(&mut self) {
        self.lane = Lane::open(&self.journal);
        let state = self.lane.checkpoint.as_ref().map_or(0, |bytes| u64::from_le_bytes(bytes[..].try_into().unwrap()));
        self.worker = Worker { state, next_wire: self.lane.checkpoint_ordinal + 1, inbox: VecDeque::new() };
        self.last_wire = None;
    }

    fn answer(&mut self, fails: bool, checkpoint: bool) {
        let Some(send) = self.worker.inbox.pop_front() else { return };
        assert_eq!(send.wire_ordinal, self.worker.next_wire, "no gaps on the wire");
        self.worker.next_wire += 1;
        let id: u64 = send.request.id.parse().unwrap();
        if !fails {
            self.worker.state = step(self.worker.state, id);
        }
        let state = self.worker.state;
        self.last_wire = Some(send.wire_ordinal);
        let ordinal = self.lane.answered(send.wire_ordinal).unwrap();
        let outcome = if fails { Outcome::Failed } else { Outcome::Answered };
        match self.journal.accept(ordinal, outcome) {
            Accept::Deliver => self.delivered.push((id, (!fails).then_some(state))),
            Accept::Duplicate => {}
            Accept::Diverged => return self.move_to_another_worker(),
            Accept::Gap => panic!("a worker in order makes no gap"),
        }
        if send.want_checkpoint && checkpoint {
            self.journal.checkpoint(ordinal, Bytes::copy_from_slice(&state.to_le_bytes()));
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Push => {
                self.pushed += 1;
                assert_eq!(self.journal.push(request(self.pushed)).unwrap(), self.pushed);
            }
            Op::Send => self.worker.inbox.extend(self.lane.send(&self.journal)),
            Op::Answer { fails, checkpoint } => self.answer(*fails, *checkpoint),
            Op::Repeat => {
                if let Some(wire) = self.last_wire {
                    assert_eq!(self.lane.answered(wire), None);
                }
            }
            Op::Die => self.move_to_another_worker(),
        }
    }

    fn finish(&mut self) {
        while self.journal.unanswered() > 0 {
            self.apply(&Op::Send);
            self.apply(&Op::Answer { fails: false, checkpoint: true });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_each_answer_comes_once_in_order_and_right(
        ops in prop::collection::vec(op(), 0..200),
        checkpoint_requests in 1_u64..12,
    ) {
        let mut world = World::new(limits(checkpoint_requests));
        for op in &ops {
            world.apply(op);
        }
        world.finish();
        let ids: Vec<u64> = world.delivered.iter().map(|(id, _)| *id).collect();
        prop_assert_eq!(ids, (1..=world.pushed).collect::<Vec<_>>());
        let mut state = 0;
        for (id, answer) in &world.delivered {
            if let Some(answer) = answer {
                state = step(state, *id);
                prop_assert_eq!(*answer, state, "request {}", id);
            }
        }
        let held: usize = world.journal.entries.iter().map(|entry| entry.request.encoded_len()).sum();
        prop_assert_eq!(held, world.journal.bytes());
    }
}
