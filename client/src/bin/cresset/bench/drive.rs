//! The two loops: a closed one keeps a number of requests in flight, an open one sends when it is time to.

use std::{
    cell::{Cell, RefCell},
    io,
    time::Instant,
};

use futures::{StreamExt, stream::FuturesUnordered};

use super::{
    caller::Caller,
    schedule::Schedule,
    tally::{Outcome, Span, Tally, Window},
    timer::Timer,
};

/// Time since the start, in ns.
#[derive(Debug, Clone, Copy)]
pub struct Clock(pub Instant);

impl Clock {
    fn now_ns(self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Lets each caller send its next request as soon as it has the answer to the one before, until the window is over or
/// `requests` were measured.
pub async fn closed(clock: Clock, callers: Vec<Caller>, window: Window, requests: u64) -> Tally {
    let tally = RefCell::new(Tally::new(window));
    let left = Cell::new(requests);
    let working: FuturesUnordered<_> =
        callers.into_iter().map(|caller| keep_calling(clock, caller, window, &left, &tally)).collect();
    working.for_each(async |()| {}).await;
    tally.into_inner()
}

async fn keep_calling(clock: Clock, mut caller: Caller, window: Window, left: &Cell<u64>, tally: &RefCell<Tally>) {
    let mut span = Span::default();
    loop {
        let due_ns = clock.now_ns();
        if due_ns >= window.until_ns || left.get() == 0 {
            break;
        }
        if window.has(due_ns) {
            left.set(left.get() - 1);
        }
        let result = caller.call().await;
        let outcome = Outcome { due_ns, sent_ns: due_ns, done_ns: clock.now_ns(), result };
        if tally.borrow_mut().add(&outcome) {
            span.add(&outcome);
        }
    }
    tally.borrow_mut().add_span(&span);
    caller.finish().await;
}

/// Sends when the schedule says so, whatever became of the requests before, until the window is over or `requests` were
/// measured. What is due while `inflight_max` callers are busy is sent late, and what is still due at the end is counted.
///
/// # Errors
/// The system's, if there is no timer.
pub async fn open(
    clock: Clock,
    mut schedule: Schedule,
    mut hire: impl FnMut(usize) -> Caller,
    inflight_max: usize,
    window: Window,
    requests: u64,
) -> io::Result<Tally> {
    let mut tally = Tally::new(window);
    let mut timer = Timer::new()?;
    let (mut idle, mut hired, mut left, mut is_over) = (Vec::<Caller>::new(), 0, requests, false);
    let mut busy = FuturesUnordered::new();
    loop {
        let now_ns = clock.now_ns();
        while !is_over && schedule.due_ns() <= now_ns && (hired < inflight_max || !idle.is_empty()) {
            let due_ns = schedule.due_ns();
            if due_ns >= window.until_ns || left == 0 {
                is_over = true;
                break;
            }
            left -= u64::from(window.has(due_ns));
            schedule.advance();
            let caller = idle.pop().unwrap_or_else(|| {
                hired += 1;
                hire(hired - 1)
            });
            busy.push(send(clock, caller, due_ns));
        }
        if !is_over && now_ns >= window.until_ns {
            is_over = true;
            while schedule.due_ns() < window.until_ns && left > 0 {
                tally.add_unsent(schedule.due_ns());
                left -= u64::from(window.has(schedule.due_ns()));
                schedule.advance();
            }
        }
        if is_over && busy.is_empty() {
            break;
        }
        let may_send = !is_over && (hired < inflight_max || !idle.is_empty());
        tokio::select! {
            biased;
            Some((caller, outcome)) = busy.next(), if !busy.is_empty() => {
                tally.add(&outcome);
                idle.push(caller);
            }
            woken = timer.until(schedule.due_ns().min(window.until_ns), now_ns), if may_send => woken?,
        }
    }
    let leaving: FuturesUnordered<_> = idle.iter_mut().map(Caller::finish).collect();
    leaving.for_each(async |()| {}).await;
    Ok(tally)
}

async fn send(clock: Clock, mut caller: Caller, due_ns: u64) -> (Caller, Outcome) {
    let sent_ns = clock.now_ns();
    let result = caller.call().await;
    let outcome = Outcome { due_ns, sent_ns, done_ns: clock.now_ns(), result };
    (caller, outcome)
}
