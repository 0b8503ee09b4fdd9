use cresset_proto::{fleet::v1::ResumeKey, reason::Reason};

use super::*;

fn key() -> Option<ResumeKey> {
    Some(ResumeKey { model: "m".into(), stream_id: "s".into(), sequence: "7".into() })
}

fn resumable(first: u64, attempt: u64) -> Resumable {
    Resumable { key: key(), first, attempt, applied: 0, answers: vec![] }
}

fn answer(ordinal: u64) -> KeptAnswer {
    KeptAnswer { ordinal, result: None }
}

fn request(ordinal: u64, ack: u64, attempt: u64) -> TakeRequest {
    TakeRequest { key: key(), ordinal, ack, attempt }
}

async fn take(detached: &Detached, ordinal: u64, ack: u64, attempt: u64) -> Result<TakeResponse, Reason> {
    detached.take(request(ordinal, ack, attempt)).await.map_err(|error| error.reason())
}

/// A sequence that has answered `ordinals`, of which the client has those up to `ack`.
async fn left(detached: &Arc<Detached>, ordinals: std::ops::RangeInclusive<u64>, ack: u64) {
    let mut attachment = detached.attach(resumable(*ordinals.start(), 1), 1, 1).await.unwrap();
    for ordinal in ordinals {
        attachment.answered(answer(ordinal), false);
    }
    attachment.acknowledge(ack);
    attachment.detach(Some(Bytes::from_static(b"state")));
}

fn ordinals(held: &TakeResponse) -> Vec<u64> {
    held.answers.iter().map(|answer| answer.ordinal).collect()
}

#[tokio::test]
async fn the_next_router_gets_the_state_and_what_the_client_lacks() {
    let detached = Arc::new(Detached::default());
    left(&detached, 1..=9, 5).await;
    let held = take(&detached, 8, 7, 2).await.unwrap();
    assert_eq!((held.first, held.applied, ordinals(&held)), (1, 9, vec![8, 9]));
    assert_eq!(held.checkpoint.as_deref(), Some(&b"state"[..]));
    // That router may die as well.
    assert_eq!(take(&detached, 8, 7, 3).await.unwrap(), held);
    assert_eq!(take(&detached, 8, 7, 2).await, Err(Reason::TakenOver), "an older connection");
}

#[tokio::test]
async fn what_does_not_go_on_where_the_client_is_is_lost_rather_than_guessed() {
    let detached = Arc::new(Detached::default());
    left(&detached, 1..=9, 5).await;
    assert_eq!(take(&detached, 12, 11, 2).await, Err(Reason::SequenceLost), "the client has more than this state");
    assert_eq!(take(&detached, 5, 4, 2).await, Err(Reason::SequenceLost), "answer 5 was dropped");
    assert_eq!(take(&detached, 1, 0, 2).await, Err(Reason::SequenceLost), "a first request begins anew");
    let other = TakeRequest { key: Some(ResumeKey { stream_id: "t".into(), ..key().unwrap() }), ..request(8, 7, 2) };
    assert_eq!(detached.take(other).await.unwrap_err().reason(), Reason::SequenceLost);
}

#[tokio::test]
async fn a_router_that_still_has_the_stream_loses_it() {
    let detached = Arc::new(Detached::default());
    let mut old = detached.attach(resumable(1, 1), 1, 1).await.unwrap();
    let stream = tokio::spawn(async move {
        old.answered(answer(1), false);
        old.wanted_elsewhere().await;
        old.answered(answer(2), false);
        old.detach(Some(Bytes::new()));
    });
    let held = take(&detached, 2, 1, 2).await.unwrap();
    assert_eq!((held.applied, ordinals(&held)), (2, vec![2]));
    stream.await.unwrap();
    assert_eq!(detached.attach(resumable(1, 1), 1, 1).await.unwrap_err().reason(), Reason::TakenOver);
    assert!(detached.attach(resumable(1, 2), 1, 1).await.is_ok());
}

#[tokio::test]
async fn the_next_life_of_an_id_does_not_touch_the_one_before() {
    let detached = Arc::new(Detached::default());
    let mut first = detached.attach(resumable(1, 1), 1, 1).await.unwrap();
    let second = detached.attach(resumable(4, 1), 1, 1).await.unwrap();
    first.answered(answer(3), true);
    assert!(first.is_over());
    first.detach(None);
    second.detach(Some(Bytes::new()));
    let ended = take(&detached, 3, 2, 2).await.unwrap();
    assert_eq!((ended.first, ended.checkpoint.clone(), ordinals(&ended)), (1, None, vec![3]));
    assert_eq!(take(&detached, 5, 0, 2).await.unwrap().first, 4);
}

#[tokio::test]
async fn it_is_held_for_a_while_and_the_oldest_go_when_there_are_too_many() {
    let detached = Arc::new(Detached::default());
    detached.set_bounds(Bounds { sequences_max: 2, ..Bounds::default() });
    for first in [1, 11, 21] {
        left(&detached, first..=first + 5, first).await;
    }
    assert_eq!(detached.held(), 2);
    let (_, _, newest) = detached.table.lock().oldest_first.back().cloned().unwrap();
    // Asked for again, and so held for longer than what was left after it.
    take(&detached, 15, 14, 1).await.unwrap();
    let window = Bounds::default().window;
    detached.table.lock().forget_at(newest + window - Duration::from_millis(1));
    assert_eq!(detached.held(), 2);
    detached.table.lock().forget_at(newest + window);
    assert_eq!(take(&detached, 25, 24, 1).await, Err(Reason::SequenceLost));
    take(&detached, 15, 14, 1).await.unwrap();
    let mut table = detached.table.lock();
    table.forget_at(Instant::now() + window);
    assert_eq!((table.count, table.bytes, table.lives.len(), table.oldest_first.len()), (0, 0, 0, 0));
}

#[tokio::test]
async fn bytes_are_bounded() {
    let detached = Arc::new(Detached::default());
    detached.set_bounds(Bounds { bytes_max: 4 * (HELD_BYTES + 20), ..Bounds::default() });
    for first in 1..100 {
        left(&detached, first * 10..=first * 10 + 5, first * 10 + 5).await;
        assert!(detached.held() <= 4 && detached.table.lock().bytes <= 4 * (HELD_BYTES + 20));
    }
    assert_eq!(detached.attached_bytes.load(Ordering::Relaxed), 0);
}
