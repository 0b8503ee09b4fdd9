use proptest::prelude::*;

use super::*;

const AMPLE: Bounds = Bounds { requests_max: 1000, bytes_max: usize::MAX };

fn waiting(arrived_us: u64, rows: usize, shape_class: u64) -> Waiting {
    Waiting { arrived_us, rows, bytes: 1, shape_class, level: 0, times_out_us: None, deadline_us: None }
}

fn line(requests: &[Waiting]) -> Line<usize> {
    let mut line = Line::default();
    for (number, request) in requests.iter().enumerate() {
        line.push(*request, number, &QueuePolicy::default(), &AMPLE).unwrap();
    }
    line
}

fn queueing(delay_us: u64, preferred_rows: &[usize]) -> Queueing {
    Queueing { delay_us, preferred_rows: preferred_rows.to_vec(), ..Queueing::default() }
}

/// The requests that would be run together, by number; or when to ask again.
fn decide(line: &mut Line<usize>, rows_max: usize, queueing: &Queueing, now_us: u64) -> Result<Vec<usize>, Option<u64>> {
    match line.next(rows_max, queueing, now_us, |_| true, |_| panic!("nobody has gone")) {
        Decision::Idle => Err(None),
        Decision::WaitUntil(at) => Err(Some(at)),
        Decision::Cut(batch) => Ok(batch.into_iter().map(|(_, number)| number).collect()),
    }
}

#[test]
fn an_idle_device_takes_whatever_is_there_at_once() {
    let at_once = queueing(0, &[]);
    assert_eq!(decide(&mut line(&[]), 8, &at_once, 100), Err(None));
    assert_eq!(decide(&mut line(&[waiting(100, 1, 0)]), 8, &at_once, 100), Ok(vec![0]));
    let mut three = line(&[waiting(100, 3, 0); 3]);
    assert_eq!(decide(&mut three, 8, &at_once, 100), Ok(vec![0, 1]));
    assert_eq!(decide(&mut three, 8, &at_once, 100), Ok(vec![2]));
    assert!(three.is_empty() && three.bytes == 0);
}

#[test]
fn a_delay_waits_for_a_fuller_batch_and_no_longer() {
    let patient = queueing(50, &[]);
    assert_eq!(decide(&mut line(&[waiting(100, 1, 0)]), 4, &patient, 120), Err(Some(150)));
    assert_eq!(decide(&mut line(&[waiting(100, 1, 0)]), 4, &patient, 150), Ok(vec![0]));
    assert_eq!(decide(&mut line(&[waiting(100, 2, 0); 2]), 4, &patient, 100), Ok(vec![0, 1]));
    assert_eq!(decide(&mut line(&[waiting(100, 2, 0), waiting(100, 3, 0)]), 4, &patient, 100), Ok(vec![0]));
}

#[test]
fn the_largest_preferred_size_goes_without_waiting() {
    let preferred = queueing(50, &[2, 4]);
    assert_eq!(decide(&mut line(&[waiting(100, 1, 0)]), 8, &preferred, 100), Err(Some(150)));
    assert_eq!(decide(&mut line(&[waiting(100, 1, 0); 3]), 8, &preferred, 100), Ok(vec![0, 1]));
    assert_eq!(decide(&mut line(&[waiting(100, 1, 0); 6]), 8, &preferred, 100), Ok(vec![0, 1, 2, 3]));
    // Too late for a preferred size: whatever is there.
    assert_eq!(decide(&mut line(&[waiting(100, 3, 0)]), 8, &preferred, 150), Ok(vec![0]));
}

#[test]
fn shapes_are_not_mixed_and_the_oldest_goes_first() {
    let mut mixed = line(&[waiting(1, 1, 7), waiting(2, 1, 9), waiting(3, 1, 7)]);
    assert_eq!(decide(&mut mixed, 8, &queueing(0, &[]), 100), Ok(vec![0, 2]));
    assert_eq!(decide(&mut mixed, 8, &queueing(0, &[]), 100), Ok(vec![1]));
}

#[test]
fn without_a_batch_dimension_requests_go_one_by_one() {
    assert_eq!(decide(&mut line(&[waiting(100, 1, 0); 2]), 0, &queueing(1000, &[]), 100), Ok(vec![0]));
}

#[test]
fn a_higher_level_goes_first_and_a_lower_one_fills_the_batch() {
    let mut levels = line(&[]);
    for (number, level) in [(0, 2), (1, 1), (2, 3), (3, 1)] {
        let request = Waiting { level, ..waiting(number, 1, 0) };
        levels.push(request, number as usize, &QueuePolicy::default(), &AMPLE).unwrap();
    }
    assert_eq!(decide(&mut levels, 3, &queueing(0, &[]), 100), Ok(vec![1, 3, 0]));
    assert_eq!(decide(&mut levels, 3, &queueing(0, &[]), 100), Ok(vec![2]));
}

#[test]
fn a_policy_rejects_or_moves_behind() {
    let reject = QueuePolicy { timeout_us: 10, ..QueuePolicy::default() };
    let delay = QueuePolicy { action: TimeoutAction::Delay, ..reject };
    for (policy, dropped, order) in [(reject, vec![(Dropped::TimedOut, 0)], vec![1]), (delay, vec![], vec![1, 0])] {
        let queueing = Queueing { policy_default: policy, ..Queueing::default() };
        let mut line = Line::default();
        for (number, arrived_us) in [(0, 0), (1, 5)] {
            let request = Waiting { times_out_us: Some(arrived_us + 10), ..waiting(arrived_us, 1, 0) };
            line.push(request, number, &policy, &AMPLE).unwrap();
        }
        assert_eq!(line.expire(&queueing, 9), vec![]);
        assert_eq!(line.expire(&queueing, 10), dropped);
        // What was moved behind does not time out again.
        assert_eq!(line.expire(&queueing, 12), vec![]);
        assert_eq!(decide(&mut line, 8, &queueing, 12), Ok(order));
        assert!(line.is_empty());
    }
}

#[test]
fn a_request_can_only_lower_the_limit_that_is_there() {
    let policy = QueuePolicy { timeout_us: 100, allow_override: true, ..QueuePolicy::default() };
    assert_eq!((policy.timeout_us(0), policy.timeout_us(30), policy.timeout_us(300)), (Some(100), Some(30), Some(100)));
    let fixed = QueuePolicy { allow_override: false, ..policy };
    assert_eq!(fixed.timeout_us(30), Some(100));
    let unlimited = QueuePolicy { timeout_us: 0, ..policy };
    assert_eq!(unlimited.timeout_us(30), None);
}

#[test]
fn a_full_line_says_which_bound() {
    let bounds = Bounds { requests_max: 2, bytes_max: 10 };
    let policy = QueuePolicy { requests_max: 1, ..QueuePolicy::default() };
    let mut line = Line::default();
    let big = Waiting { bytes: 100, ..waiting(0, 1, 0) };
    // The only request is taken however large it is.
    line.push(big, 0, &QueuePolicy::default(), &bounds).unwrap();
    assert_eq!(line.push(waiting(0, 1, 0), 1, &QueuePolicy::default(), &bounds), Err((Full::Bytes(10), 1)));
    assert_eq!(line.drain(), [0]);
    line.push(waiting(0, 1, 0), 0, &policy, &bounds).unwrap();
    assert_eq!(line.push(waiting(0, 1, 0), 1, &policy, &bounds), Err((Full::Requests(1), 1)));
    line.push(waiting(0, 1, 0), 1, &QueuePolicy::default(), &bounds).unwrap();
    assert_eq!(line.push(waiting(0, 1, 0), 2, &QueuePolicy::default(), &bounds), Err((Full::Requests(2), 2)));
}

#[test]
fn who_has_gone_is_not_run() {
    let mut line = line(&[waiting(0, 1, 0); 4]);
    let mut gone = vec![];
    let Decision::Cut(batch) = line.next(8, &queueing(0, &[]), 1, |number| number % 2 == 1, |number| gone.push(number)) else {
        panic!("two are left");
    };
    assert_eq!((batch.len(), gone), (2, vec![0, 2]));
    assert!(line.is_empty());
}

#[test]
fn answers_leave_in_order() {
    let mut order = Ordering::default();
    assert_eq!(order.finish(1, 'b'), vec![]);
    assert_eq!(order.finish(0, 'a'), vec!['a', 'b']);
    assert_eq!(order.finish(2, 'c'), vec!['c']);
}

prop_compose! {
    fn any_request()(arrived_us in 0u64..100, rows in 0usize..9, shape_class in 0u64..3, level in 0u64..3,
                     times_out in prop::option::of(0u64..400), deadline in prop::option::of(0u64..400)) -> Waiting {
        Waiting { arrived_us, rows, bytes: rows, shape_class, level, times_out_us: times_out.map(|at| at + 1), deadline_us: deadline }
    }
}

proptest! {
    #[test]
    fn whatever_comes_each_request_leaves_exactly_once(
        requests in prop::collection::vec(any_request(), 0..24), rows_max in 0usize..8, delay_us in 0u64..100,
        preferred in prop::collection::btree_set(1usize..8, 0..3), delays in any::<bool>(),
    ) {
        let action = if delays { TimeoutAction::Delay } else { TimeoutAction::Reject };
        let queueing = Queueing {
            delay_us,
            preferred_rows: preferred.into_iter().filter(|rows| *rows <= rows_max).collect(),
            policy_default: QueuePolicy { action, ..QueuePolicy::default() },
            ..Queueing::default()
        };
        let mut line = line(&requests);
        let mut left: Vec<usize> = (0..requests.len()).collect();
        let mut now_us = 100;
        loop {
            for (why, number) in line.expire(&queueing, now_us) {
                let request = &requests[number];
                let is_right = match why {
                    Dropped::Deadline => request.deadline_us.unwrap() <= now_us,
                    Dropped::TimedOut => !delays && request.times_out_us.unwrap() <= now_us,
                    Dropped::Abandoned => false,
                };
                prop_assert!(is_right, "{:?}", why);
                left.retain(|other| *other != number);
            }
            match line.next(rows_max, &queueing, now_us, |_| true, |_| ()) {
                Decision::Idle => break,
                Decision::WaitUntil(at) => {
                    prop_assert!(at > now_us && delay_us > 0);
                    now_us = at;
                }
                Decision::Cut(batch) => {
                    let rows: usize = batch.iter().map(|(waiting, _)| waiting.rows).sum();
                    prop_assert!(rows <= rows_max || batch.len() == 1);
                    prop_assert!(batch.iter().all(|(waiting, _)| waiting.shape_class == batch[0].0.shape_class));
                    prop_assert!(batch.windows(2).all(|pair| pair[0].0.level <= pair[1].0.level));
                    for (_, number) in &batch {
                        prop_assert!(left.contains(number), "{number} was run twice");
                        prop_assert!(requests[*number].deadline_us.is_none_or(|at| at > now_us), "it had expired");
                    }
                    let level = batch[0].0.level;
                    prop_assert!(left.iter().all(|number| requests[*number].level >= level));
                    left.retain(|number| !batch.iter().any(|(_, taken)| taken == number));
                }
            }
        }
        prop_assert!(left.is_empty() && line.is_empty() && line.bytes == 0);
    }
}

#[test]
fn a_request_takes_as_long_as_the_batches_up_to_its_own() {
    let pace = Pace { batch_us: 1_000, rows_max: 4, instances: 1 };
    assert_eq!(line(&[]).takes_us(0, 1, &pace), None, "nobody waits");
    let seven = line(&[waiting(100, 1, 0); 7]);
    // One is running, half of it is over; seven rows and one are two batches; and a quarter more.
    assert_eq!(seven.takes_us(0, 1, &pace), Some(3_125));
    assert_eq!(seven.takes_us(0, 2, &pace), Some(4_375));
    assert_eq!(seven.takes_us(0, 2, &Pace { instances: 2, ..pace }), Some(3_125));
    let low = line(&[Waiting { level: 2, ..waiting(100, 4, 0) }; 5]);
    assert_eq!((low.takes_us(1, 1, &pace), low.takes_us(2, 1, &pace)), (Some(1_875), Some(8_125)), "higher levels go first");
}

#[test]
fn one_slow_batch_is_soon_forgotten() {
    let once_slow = Pace::smoothed_us(1_000, 801_000);
    assert_eq!((Pace::smoothed_us(0, 5), once_slow), (5, 101_000));
    let after = (0..7).fold(once_slow, |before, _| Pace::smoothed_us(before, 1_000));
    assert!(after < 2_000, "{after}");
}

proptest! {
    #[test]
    fn rows_are_counted_whatever_leaves_and_how(
        requests in prop::collection::vec((1_usize..5, 0_u64..3, 0_u64..50, any::<bool>()), 1..40),
        steps in prop::collection::vec((0_u64..60, any::<bool>()), 1..20),
    ) {
        let mut line = Line::default();
        for (number, (rows, level, deadline_us, has_deadline)) in requests.into_iter().enumerate() {
            let request = Waiting { level, deadline_us: has_deadline.then_some(deadline_us), ..waiting(0, rows, (number % 2) as u64) };
            line.push(request, number, &QueuePolicy::default(), &AMPLE).unwrap();
        }
        for (now_us, abandons) in steps {
            line.expire(&queueing(0, &[]), now_us);
            if now_us % 3 == 0 {
                let before = line.len();
                let gone = line.sweep(|number| number % 5 != 0);
                prop_assert!(gone.iter().all(|number| number % 5 == 0));
                prop_assert_eq!(line.len() + gone.len(), before);
                prop_assert!(line.walk().all(|(_, _, number)| number % 5 != 0));
            }
            line.next(4, &queueing(0, &[]), now_us, |number| !abandons || number % 3 != 0, |_| ());
            for level in line.levels.values() {
                let there: usize = level.fresh.iter().chain(&level.delayed).map(|(waiting, _)| waiting.rows).sum();
                prop_assert_eq!(level.rows, there);
            }
        }
    }
}
