//! Sequences that their client takes up again by way of another router.
//!
//! A client that names its stream and numbers its requests (`cresset_stream_id`, `cresset_ordinal`, `cresset_ack`,
//! `cresset_attempt`; PROTOCOL.md says what each means) may lose its router at any time. The next one asks the workers for
//! what they hold of the sequence, its state and the answers that the client doesn't have, and goes on from there as if the
//! sequence had been its own. What the client sends a second time is answered from what is kept.
use std::{sync::Arc, time::Duration};

use cresset_proto::{
    fleet::v1::{
        self, KeptAnswer, ResumeKey, StepError, TakeRequest, TakeResponse, kept_answer,
        sequences_service_client::SequencesServiceClient,
    },
    ids::SequenceId,
    inference::ModelInferResponse,
    parameters::Parameters,
    reason::Reason,
};
use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::{Code, Status};

use super::{Inner, sessions::Key};
use crate::{
    balance,
    kept::{Kept, Limits},
    routes::Replica,
};

/// How long one worker is waited for before the next is asked as well.
const STAGGER: Duration = Duration::from_millis(100);
/// Workers that are asked at the same time.
const ASKED_AT_ONCE: usize = 8;

/// What a client says of a request of a sequence that it may send again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    /// Its number.
    pub(super) ordinal: u64,
    /// The last request of the sequence that was answered with a response.
    pub(super) ack: u64,
    /// Which of the client's connections it is.
    pub(super) attempt: u64,
}

impl Mark {
    /// `None` for a client that can't take up anything again.
    ///
    /// # Errors
    /// A status that says what is missing.
    pub(super) fn read(parameters: &Parameters) -> Result<Option<Self>, Status> {
        let Parameters { ordinal, ack, attempt, .. } = *parameters;
        if parameters.stream_id.is_none() {
            return Ok(None);
        }
        if ordinal == 0 || ack >= ordinal {
            let text = format!(
                "a request of a sequence with 'cresset_stream_id' needs 'cresset_ordinal', its number, from 1, and a \
                 'cresset_ack' below that; they are {ordinal} and {ack}"
            );
            return Err(Reason::InvalidArgument.status(text));
        }
        Ok(Some(Self { ordinal, ack, attempt }))
    }
}

/// What a session keeps for a client that may come back by way of another router.
#[derive(Debug)]
pub(super) struct Resumable {
    key: ResumeKey,
    first: u64,
    attempt: u64,
    /// The last request that is part of the journal's checkpoint.
    pub(super) applied: u64,
    kept: Kept,
    /// It is over: there are answers, and no state.
    pub(super) ended: bool,
}

/// What becomes of a request that comes with a number.
pub(super) enum Place {
    /// It is the sequence's next.
    Next,
    /// It came before and was not answered yet.
    UnderWay,
    /// It came before, and this was its answer.
    Known(Box<Result<ModelInferResponse, Status>>),
    /// It can't be run.
    Refused(Status),
}

impl Resumable {
    /// Of a sequence that begins.
    pub(super) fn begin(key: &Key, mark: Mark) -> Option<Self> {
        let key = resume_key(key)?;
        let Mark { ordinal: first, attempt, .. } = mark;
        Some(Self { key, first, attempt, applied: 0, kept: Kept::default(), ended: false })
    }

    /// Of one that a worker held.
    pub(super) fn again(key: &Key, mark: Mark, held: &mut TakeResponse) -> Option<Self> {
        let kept = Kept::of(std::mem::take(&mut held.answers), mark.ack);
        let key = resume_key(key)?;
        let (first, applied, ended) = (held.first, held.applied, held.checkpoint.is_none());
        Some(Self { key, first, attempt: mark.attempt, applied, kept, ended })
    }

    /// Looks at a request; `taken` is the last that was taken before.
    pub(super) fn place(&mut self, mark: Mark, taken: u64, limits: Limits) -> Place {
        self.attempt = self.attempt.max(mark.attempt);
        self.kept.acknowledge(mark.ack);
        if let Some(answer) = self.kept.get(mark.ordinal) {
            return Place::Known(Box::new(result(answer)));
        }
        if mark.ordinal <= self.kept.last().max(self.applied) {
            let text = format!("request {} of sequence {} was answered and acknowledged before", mark.ordinal, self.key.sequence);
            return Place::Refused(Reason::InvalidArgument.status(text));
        }
        if mark.ordinal <= taken {
            return Place::UnderWay;
        }
        if self.ended {
            let text = format!("sequence {} of model '{}' has ended", self.key.sequence, self.key.model);
            return Place::Refused(Reason::SequenceNotStarted.status(text));
        }
        match self.kept.has_room(limits) {
            Ok(()) => Place::Next,
            Err(full) => Place::Refused(Reason::QueueFull.status(full.to_string())),
        }
    }

    /// Keeps an answer until the client says that it has it.
    pub(super) fn keep(&mut self, ordinal: u64, answer: &Result<ModelInferResponse, Status>) {
        let result = match answer {
            Ok(response) => kept_answer::Result::Response(response.clone()),
            Err(status) => kept_answer::Result::Error(StepError {
                code: i32::from(status.code()),
                reason: Reason::of(status).map_or("", Reason::as_str).to_owned(),
                message: status.message().to_owned(),
            }),
        };
        self.kept.keep(KeptAnswer { ordinal, result: Some(result) });
    }

    /// For the worker that gets the sequence.
    pub(super) fn open(&self) -> v1::Resumable {
        v1::Resumable {
            key: Some(self.key.clone()),
            first: self.first,
            attempt: self.attempt,
            applied: self.applied,
            answers: self.kept.up_to(u64::MAX),
        }
    }

    /// Bytes of the answers kept.
    pub(super) fn bytes(&self) -> usize {
        self.kept.bytes()
    }
}

fn result(answer: &KeptAnswer) -> Result<ModelInferResponse, Status> {
    match &answer.result {
        Some(kept_answer::Result::Response(response)) => Ok(response.clone()),
        Some(kept_answer::Result::Error(error)) => Err(step_status(error)),
        None => Err(Reason::Internal.status("an answer without a result was kept")),
    }
}

/// A request's own error as a status.
pub(super) fn step_status(error: &StepError) -> Status {
    match error.reason.parse::<Reason>() {
        Ok(reason) => reason.status(error.message.clone()),
        Err(()) => Status::new(Code::from_i32(error.code), error.message.clone()),
    }
}

fn resume_key(key: &Key) -> Option<ResumeKey> {
    let sequence = match &key.sequence {
        SequenceId::Number(number) => number.to_string(),
        // In quotes, so that it is no number.
        SequenceId::Text(text) => format!("{text:?}"),
    };
    Some(ResumeKey { model: key.model.clone(), stream_id: key.stream.clone()?, sequence })
}

/// A later connection of the client goes on with the sequence.
pub(super) fn taken_over(key: &Key) -> Status {
    Reason::TakenOver.status(format!("a later connection of the same client goes on with sequence {}", key.sequence))
}

/// Asks the workers of a model for a sequence whose router is gone: the likeliest first, and the next as soon as one hasn't it, or
/// is silent.
pub(super) async fn take(router: &Arc<Inner>, key: &Key, mark: Mark, deadline: Instant) -> Result<TakeResponse, Status> {
    let deadline = deadline.min(Instant::now() + router.settings.take_timeout);
    let mut left = holders(router, key).into_iter();
    let request = TakeRequest { key: resume_key(key), ordinal: mark.ordinal, ack: mark.ack, attempt: mark.attempt };
    let mut asked = FuturesUnordered::new();
    let mut unheard = String::new();
    let mut ask_next = true;
    loop {
        if ask_next
            && asked.len() < ASKED_AT_ONCE
            && let Some(replica) = left.next()
        {
            asked.push(ask(router, replica, request.clone(), deadline));
        }
        ask_next = true;
        let next_at = Instant::now() + STAGGER;
        let (replica, status) = tokio::select! {
            biased;
            answer = asked.next() => match answer {
                Some((_, Ok(held))) => return Ok(held),
                Some((replica, Err(status))) => (replica, status),
                None => break,
            },
            () = sleep_until(next_at) => continue,
        };
        match Reason::of(&status) {
            Some(Reason::TakenOver) => return Err(taken_over(key)),
            Some(Reason::SequenceLost) => {}
            _ => unheard = format!("; {} didn't answer: {}", replica.worker_id, status.message()),
        }
    }
    Err(Reason::SequenceLost.status(format!(
        "sequence {} of model '{}' can't be taken up again at request {}: no worker holds it as it was after request {}{unheard}; \
         send it again from its first request",
        key.sequence, key.model, mark.ordinal, mark.ack
    )))
}

async fn ask(
    router: &Arc<Inner>,
    replica: Arc<Replica>,
    request: TakeRequest,
    deadline: Instant,
) -> (Arc<Replica>, Result<TakeResponse, Status>) {
    let answer = async {
        let connection = router.workers.connection(&replica)?;
        let bytes_max = router.workers.message_bytes_max();
        let mut client = SequencesServiceClient::new(connection.channel.clone()).max_decoding_message_size(bytes_max);
        let answer = client.take(request).await.map(tonic::Response::into_inner);
        if let Err(status) = &answer {
            router.workers.failed(&connection, status);
        }
        answer
    };
    let late = |_| Err(Reason::DeadlineExceeded.status("no answer in time"));
    let answer = timeout_at(deadline, answer).await.unwrap_or_else(late);
    (replica, answer)
}

/// The workers of any version of the model, in the order in which sequences are given to them.
fn holders(router: &Inner, key: &Key) -> Vec<Arc<Replica>> {
    let table = router.routes.load();
    let mut replicas: Vec<Arc<Replica>> = table.versions(&key.model).flat_map(|route| route.replicas.iter().cloned()).collect();
    let place = key.place();
    replicas.sort_by_key(|replica| (std::cmp::Reverse(balance::mixed(replica.id, place)), Arc::as_ptr(replica)));
    replicas.dedup_by(|a, b| Arc::ptr_eq(a, b));
    replicas
}
