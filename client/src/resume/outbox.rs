//! What a client keeps of a stream that outlives its coordinators. Pure.
//!
//! Requests get a number when they come in, and go out with what PROTOCOL.md asks of a client: the stream's id, their number,
//! what was answered, and which connection it is. Everything unanswered goes out again on a new connection. The requests of a
//! sequence are kept to its end, so that it can be sent again from its first one if nobody holds it any more. Whatever is
//! answered a second time is dropped here.
use std::collections::{BTreeMap, HashMap, VecDeque};

use cresset_proto::{
    ids::SequenceId,
    inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse, infer_parameter::ParameterChoice},
    parameters::{Parameters, bool_parameter, int64_parameter, keys, string_parameter},
    reason::Reason,
};
use prost::Message;

/// What one request takes beside its message, in bytes.
const ENTRY_BYTES: usize = 256;
/// How often a sequence is sent again from its first request without any answer in between.
const REBUILDS_MAX: u32 = 5;

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may be unanswered; no more are taken meanwhile.
    pub unanswered_max: usize,
    /// Bytes of answered requests that are kept so that sequences can be sent again. A sequence beyond it survives its
    /// coordinator or its worker, but not both at once.
    pub journal_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // As many as a coordinator takes at a time.
        Self { unanswered_max: 128, journal_bytes_max: 64 << 20 }
    }
}

/// What is to be done with what came.
#[derive(Debug, PartialEq)]
pub enum Came {
    /// It is the caller's.
    Deliver(Box<ModelStreamInferResponse>),
    /// The caller has it, or never asked for it.
    Nothing,
    /// A sequence has to be sent again: on a new connection.
    Reconnect,
    /// A sequence can't be sent again, though it has to be: the stream is over.
    Broken(Box<ModelStreamInferResponse>),
}

type Key = (String, SequenceId);

#[derive(Debug)]
struct Entry {
    request: ModelInferRequest,
    bytes: usize,
    wants_empty_final: bool,
    /// Its sequence, by the number of that one's first request.
    sequence: Option<u64>,
    is_end: bool,
    /// Responses that the caller has.
    received: u64,
    /// Responses that came on this connection, and those that its coordinator was asked to leave out.
    came: u64,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unanswered,
    /// With a response.
    Answered,
    /// With an error: it has left no trace.
    Failed,
}

#[derive(Debug)]
struct Sequence {
    /// Its requests that are kept, in order.
    numbers: VecDeque<u64>,
    /// Whether all of them are.
    is_whole: bool,
    /// Those that are unanswered.
    unanswered: usize,
    /// It gets no further requests.
    is_over: bool,
    ack: u64,
    /// The version that its answers came from.
    version: String,
    /// All of it goes out on the next connection.
    again: bool,
    rebuilds: u32,
}

/// The requests of one stream.
#[derive(Debug)]
pub struct Outbox {
    stream_id: String,
    limits: Limits,
    attempt: i64,
    last: u64,
    /// Where sending goes on.
    next: u64,
    entries: BTreeMap<u64, Entry>,
    sequences: HashMap<u64, Sequence>,
    /// Those that may get further requests.
    open: HashMap<Key, u64>,
    unanswered: usize,
    journal_bytes: usize,
}

impl Outbox {
    /// Of a new stream; its id must be nobody else's.
    pub fn new(stream_id: String, limits: Limits) -> Self {
        Self {
            stream_id,
            limits,
            attempt: 0,
            last: 0,
            next: 0,
            entries: BTreeMap::new(),
            sequences: HashMap::new(),
            open: HashMap::new(),
            unanswered: 0,
            journal_bytes: 0,
        }
    }

    /// Whether one more request may be taken.
    pub fn has_room(&self) -> bool {
        self.unanswered < self.limits.unanswered_max.max(1)
    }

    /// Whether everything was answered.
    pub fn is_empty(&self) -> bool {
        self.unanswered == 0
    }

    /// Takes a request.
    pub fn push(&mut self, request: ModelInferRequest) {
        self.last += 1;
        let number = self.last;
        // What is wrong with them the coordinator will say.
        let parameters = Parameters::read(&request.parameters).unwrap_or_default();
        let key = parameters.sequence_id.clone().map(|id| (request.model_name.clone(), id));
        let sequence = key.map(|key| self.join(key, number, &parameters));
        let entry = Entry {
            bytes: request.encoded_len() + ENTRY_BYTES,
            wants_empty_final: parameters.empty_final_response,
            is_end: parameters.sequence_end,
            request,
            sequence,
            received: 0,
            came: 0,
            state: State::Unanswered,
        };
        self.entries.insert(number, entry);
        self.unanswered += 1;
    }

    /// The sequence that a request belongs to.
    fn join(&mut self, key: Key, number: u64, parameters: &Parameters) -> u64 {
        if parameters.sequence_start
            && let Some(before) = self.open.remove(&key)
        {
            self.end(before);
        }
        let first = *self.open.entry(key.clone()).or_insert(number);
        let sequence = self.sequences.entry(first).or_insert_with(|| Sequence {
            numbers: VecDeque::new(),
            is_whole: parameters.sequence_start,
            unanswered: 0,
            is_over: false,
            ack: 0,
            version: String::new(),
            again: false,
            rebuilds: 0,
        });
        sequence.numbers.push_back(number);
        sequence.unanswered += 1;
        if parameters.sequence_end {
            sequence.is_over = true;
            self.open.remove(&key);
        }
        first
    }

    /// Begins a connection: everything that it needs goes out on it.
    pub fn connect(&mut self) {
        self.attempt += 1;
        self.next = 0;
    }

    /// Whether [`send`](Self::send) has something.
    pub fn has_more(&self) -> bool {
        self.entries.range(self.next..).any(|(_, entry)| self.goes_out(entry))
    }

    fn goes_out(&self, entry: &Entry) -> bool {
        let again = |first| self.sequences.get(first).is_some_and(|sequence| sequence.again);
        match entry.state {
            State::Unanswered => true,
            State::Answered => entry.sequence.as_ref().is_some_and(again),
            State::Failed => false,
        }
    }

    /// The next request for this connection.
    pub fn send(&mut self) -> Option<ModelInferRequest> {
        let number = *self.entries.range(self.next..).find(|(_, entry)| self.goes_out(entry))?.0;
        self.next = number + 1;
        let ack = self.ack(number);
        let attempt = self.attempt;
        let entry = self.entries.get_mut(&number)?;
        let is_sequence = entry.sequence.is_some();
        entry.came = if is_sequence { 0 } else { entry.received };
        let mut request = entry.request.clone();
        request.id = number.to_string();
        if let Some(sequence) = entry.sequence.and_then(|first| self.sequences.get(&first))
            && sequence.again
        {
            // What the highest version is may have changed.
            request.model_version.clone_from(&sequence.version);
        }
        let int = |number: u64| int64_parameter(i64::try_from(number).unwrap_or(i64::MAX));
        let parameters = &mut request.parameters;
        parameters.insert(keys::STREAM_ID.to_owned(), string_parameter(self.stream_id.clone()));
        parameters.insert(keys::ORDINAL.to_owned(), int(number));
        parameters.insert(keys::ACK.to_owned(), int(if is_sequence { ack } else { entry.received }));
        parameters.insert(keys::ATTEMPT.to_owned(), int64_parameter(attempt));
        // Without it, nobody could tell the last response of a decoupled model.
        parameters.insert(keys::EMPTY_FINAL.to_owned(), bool_parameter(true));
        Some(request)
    }

    /// The last request before this one, of its sequence, that was answered with a response.
    fn ack(&self, number: u64) -> u64 {
        let sequence = self.entries.get(&number).and_then(|entry| self.sequences.get(entry.sequence.as_ref()?));
        let Some(sequence) = sequence else { return 0 };
        if sequence.ack < number && !sequence.again {
            return sequence.ack;
        }
        let answered = |n: &&u64| self.entries.get(n).is_some_and(|entry| entry.state == State::Answered);
        sequence.numbers.iter().rev().filter(|before| **before < number).find(answered).copied().unwrap_or(0)
    }

    /// Looks at what came on this connection.
    pub fn receive(&mut self, message: ModelStreamInferResponse) -> Came {
        let ModelStreamInferResponse { error_message, infer_response } = message;
        let mut response = infer_response.unwrap_or_default();
        let Some(number) = response.id.parse::<u64>().ok().filter(|number| self.entries.contains_key(number)) else {
            return Came::Nothing;
        };
        let is_final = response.parameters.get(keys::FINAL).is_some_and(|value| is_true(value.parameter_choice.as_ref()));
        let Some(entry) = self.entries.get_mut(&number) else { return Came::Nothing };
        let is_open = entry.state == State::Unanswered;
        response.id.clone_from(&entry.request.id);
        if !error_message.is_empty() {
            let must_again = !is_open || said(&response, Reason::SequenceLost);
            let late = said(&response, Reason::DeadlineExceeded);
            if must_again && self.send_again(number) {
                return Came::Reconnect;
            }
            let message = Box::new(ModelStreamInferResponse { error_message, infer_response: Some(response) });
            if !is_open {
                return Came::Broken(message);
            }
            self.answered(number, State::Failed, late);
            return Came::Deliver(message);
        }
        if !is_open {
            return Came::Nothing;
        }
        let is_end = is_final && response.outputs.is_empty();
        let is_new = is_end || entry.came == entry.received;
        if !is_end {
            entry.came += 1;
            entry.received = entry.received.max(entry.came);
            if let Some(sequence) = entry.sequence.and_then(|first| self.sequences.get_mut(&first)) {
                sequence.version.clone_from(&response.model_version);
            }
            if !is_final {
                // The rest must come from the version that began.
                entry.request.model_version.clone_from(&response.model_version);
            }
        }
        let is_asked_for = !is_end || entry.wants_empty_final;
        if is_final {
            self.answered(number, State::Answered, false);
        }
        match is_new && is_asked_for {
            true => Came::Deliver(Box::new(ModelStreamInferResponse { error_message, infer_response: Some(response) })),
            false => Came::Nothing,
        }
    }

    /// Nobody holds the sequence that a request belongs to: all of it goes out again. `false` where that can't help.
    fn send_again(&mut self, number: u64) -> bool {
        let first = self.entries.get(&number).and_then(|entry| entry.sequence);
        let Some(sequence) = first.and_then(|first| self.sequences.get_mut(&first)) else { return false };
        if !sequence.is_whole || sequence.rebuilds >= REBUILDS_MAX {
            return false;
        }
        sequence.rebuilds += 1;
        sequence.again = true;
        true
    }

    /// `may_have_run`: nobody knows whether a request that failed is part of the state.
    fn answered(&mut self, number: u64, state: State, may_have_run: bool) {
        let Some(entry) = self.entries.get_mut(&number) else { return };
        entry.state = state;
        self.unanswered -= 1;
        let (first, bytes, is_end) = (entry.sequence, entry.bytes, entry.is_end);
        let Some((first, sequence)) = first.and_then(|first| Some((first, self.sequences.get_mut(&first)?))) else {
            self.entries.remove(&number);
            return;
        };
        sequence.unanswered -= 1;
        self.journal_bytes += bytes;
        if state == State::Answered {
            sequence.ack = number;
            // What was sent again came before this one.
            (sequence.again, sequence.rebuilds) = (false, 0);
        }
        let is_over = sequence.is_over && sequence.unanswered == 0 && (!is_end || state == State::Answered);
        if is_over {
            self.end(first);
        } else if may_have_run || self.journal_bytes > self.limits.journal_bytes_max {
            self.forget_answered(first);
        }
    }

    /// No further request belongs to this sequence.
    fn end(&mut self, first: u64) {
        let Some(sequence) = self.sequences.get_mut(&first) else { return };
        sequence.is_over = true;
        if sequence.unanswered == 0 {
            self.forget_answered(first);
            self.sequences.remove(&first);
        }
    }

    fn forget_answered(&mut self, first: u64) {
        let Some(sequence) = self.sequences.get_mut(&first) else { return };
        sequence.is_whole = false;
        let (entries, journal_bytes) = (&mut self.entries, &mut self.journal_bytes);
        sequence.numbers.retain(|number| {
            let is_open = entries.get(number).is_some_and(|entry| entry.state == State::Unanswered);
            if !is_open && let Some(entry) = entries.remove(number) {
                *journal_bytes -= entry.bytes;
            }
            is_open
        });
    }
}

fn is_true(value: Option<&ParameterChoice>) -> bool {
    matches!(value, Some(ParameterChoice::BoolParam(true)))
}

fn said(response: &ModelInferResponse, reason: Reason) -> bool {
    let value = response.parameters.get(keys::REASON).and_then(|value| value.parameter_choice.as_ref());
    matches!(value, Some(ParameterChoice::StringParam(text)) if text == reason.as_str())
}

#[cfg(test)]
mod tests;
