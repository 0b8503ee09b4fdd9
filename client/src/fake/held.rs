//! What a fake worker holds of sequences that can be taken up again: the truth of a worker without its bounds.
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use cresset_proto::{
    fleet::v1::{KeptAnswer, Resumable, ResumeKey, RunResponse, TakeRequest, TakeResponse, kept_answer, run_response},
    reason::Reason,
};
use prost::Message;
use tonic::Status;

use crate::kept::Kept;

/// Sequences by name, each with its lives.
#[derive(Default)]
pub(super) struct Held(Mutex<HashMap<Vec<u8>, Vec<Life>>>);

struct Life {
    first: u64,
    attempt: u64,
    /// Which stream has it.
    stream: u64,
    applied: u64,
    state: u64,
    kept: Kept,
}

/// The stream of a sequence that can be taken up again.
#[derive(Clone)]
pub(super) struct Tie {
    key: Vec<u8>,
    first: u64,
    stream: u64,
}

impl Held {
    fn with<T>(&self, key: &[u8], what: impl FnOnce(&mut Vec<Life>) -> T) -> T {
        what(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key.to_vec()).or_default())
    }

    pub(super) fn attach(&self, resumable: Resumable, state: u64) -> Result<Tie, Status> {
        let Resumable { key, first, attempt, applied, answers } = resumable;
        let key = key.map(|key| key.encode_to_vec()).unwrap_or_default();
        self.with(&key, |lives| {
            let before = lives.iter().position(|life| life.first == first).map(|at| lives.swap_remove(at));
            if before.as_ref().is_some_and(|before| before.attempt > attempt) {
                lives.extend(before);
                return Err(Reason::TakenOver.status("a later router has it"));
            }
            let stream = before.map_or(1, |before| before.stream + 1);
            let floor = answers.first().map_or(applied, |answer| answer.ordinal - 1).min(applied);
            let mut kept = Kept::of(vec![], floor);
            answers.into_iter().for_each(|answer| kept.keep(answer));
            lives.push(Life { first, attempt, stream, applied, state, kept });
            Ok(Tie { key: key.clone(), first, stream })
        })
    }

    /// Notes an answer; `false` when the stream has lost the sequence, and the step must not have been run.
    pub(super) fn step(
        &self,
        tie: &Tie,
        ordinal: u64,
        ack: u64,
        run: impl FnOnce() -> (RunResponse, u64),
    ) -> Option<RunResponse> {
        self.with(&tie.key, |lives| {
            let life = lives.iter_mut().find(|life| life.first == tie.first && life.stream == tie.stream)?;
            let (response, state) = run();
            (life.applied, life.state) = (ordinal, state);
            life.kept.acknowledge(ack);
            let result = match response.result.clone()? {
                run_response::Result::Response(response) => kept_answer::Result::Response(response),
                run_response::Result::Error(error) => kept_answer::Result::Error(error),
            };
            life.kept.keep(KeptAnswer { ordinal, result: Some(result) });
            Some(response)
        })
    }

    pub(super) fn take(&self, request: TakeRequest) -> Result<TakeResponse, Status> {
        let TakeRequest { key, ordinal, ack, attempt } = request;
        let lost = || Reason::SequenceLost.status("not held here");
        self.with(&key.map(|key: ResumeKey| key.encode_to_vec()).unwrap_or_default(), |lives| {
            let lives = lives.iter_mut().filter(|life| life.first < ordinal);
            let life = lives.max_by_key(|life| life.first).ok_or_else(lost)?;
            if life.attempt > attempt {
                return Err(Reason::TakenOver.status("a later router has it"));
            }
            (life.attempt, life.stream) = (attempt, life.stream + 1);
            if life.applied < ack || life.kept.floor() > ack {
                return Err(lost());
            }
            let answers = life.kept.up_to(life.applied).into_iter().filter(|answer| answer.ordinal > ack).collect();
            let checkpoint = Some(Bytes::copy_from_slice(&life.state.to_le_bytes()));
            Ok(TakeResponse { version: 1, generation: 1, first: life.first, applied: life.applied, checkpoint, answers })
        })
    }

    /// The worker has lost everything.
    pub(super) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
