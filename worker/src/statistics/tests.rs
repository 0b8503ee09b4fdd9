use proptest::prelude::*;

use super::*;

fn recorder() -> (Arc<Recorder>, Instant) {
    let now = Instant::now();
    (Recorder::new(now, 1_000_000, Duration::from_secs(3)), now)
}

fn timing(began: Instant, input: u64, infer: u64, output: u64) -> Timing {
    let ns = Duration::from_nanos;
    Timing { began, input: ns(input), infer: ns(infer), output: ns(output) }
}

fn sum(duration: Option<StatisticDuration>) -> (u64, u64) {
    let duration = duration.unwrap();
    (duration.count, duration.ns)
}

/// Three requests of 1, 3 and 4 rows, the first alone and the others in one batch.
#[test]
fn requests_and_executions_are_counted_as_triton_does() {
    let (recorder, now) = recorder();
    let first = timing(now + Duration::from_millis(20), 10, 100, 1);
    recorder.executed(1, &first);
    recorder.success(1, Duration::from_nanos(150), Duration::from_nanos(30), &first);
    let second = timing(now + Duration::from_millis(50), 20, 200, 2);
    recorder.executed(7, &second);
    for rows in [3, 4] {
        recorder.success(rows, Duration::from_nanos(400), Duration::from_nanos(50), &second);
    }
    recorder.failure(Failure::Rejected, Duration::from_nanos(5));
    recorder.cancelled(Duration::from_nanos(7));

    let told = recorder.snapshot("m", 2, vec![MemoryUsage { r#type: "CPU".into(), id: 0, byte_size: 9 }]);
    assert_eq!((&*told.name, &*told.version, told.last_inference), ("m", "2", 1_000_050));
    assert_eq!((told.inference_count, told.execution_count), (8, 2));
    let stats = told.inference_stats.unwrap();
    assert_eq!((sum(stats.success), sum(stats.fail)), ((3, 950), (2, 12)));
    assert_eq!((sum(stats.queue), sum(stats.compute_input)), ((3, 130), (3, 50)));
    assert_eq!((sum(stats.compute_infer), sum(stats.compute_output)), ((3, 500), (3, 5)), "each has its batch's times");
    let batches: Vec<_> = told.batch_stats.iter().map(|batch| (batch.batch_size, sum(batch.compute_infer))).collect();
    assert_eq!(batches, [(1, (1, 100)), (7, (1, 200))]);
    assert_eq!(told.memory_usage[0].byte_size, 9);
    assert!(told.response_stats.is_empty());
}

#[test]
fn a_model_that_was_never_asked_has_zeros_and_not_nothing() {
    let told = recorder().0.snapshot("m", 1, vec![]);
    assert_eq!((told.last_inference, told.inference_count, told.execution_count), (0, 0, 0));
    let stats = told.inference_stats.unwrap();
    for duration in [stats.success, stats.fail, stats.queue, stats.compute_input, stats.cache_hit, stats.cache_miss] {
        assert_eq!(sum(duration), (0, 0));
    }
}

#[test]
fn responses_are_counted_by_their_index() {
    let (recorder, _) = recorder();
    let (infer, output) = (Duration::from_nanos(10), Duration::from_nanos(3));
    recorder.response(0, infer, output, ResponseKind::Success);
    recorder.response(0, infer, output, ResponseKind::Success);
    recorder.response(2, infer, output, ResponseKind::Fail);
    recorder.response(2, infer, output, ResponseKind::Empty);
    recorder.response(2, infer, output, ResponseKind::Cancel);
    recorder.response(RESPONSE_INDEXES_MAX as u64, infer, output, ResponseKind::Success);
    recorder.response(u64::MAX, infer, output, ResponseKind::Success);
    let told = recorder.snapshot("m", 1, vec![]).response_stats;
    assert_eq!(told.len(), 3);
    assert_eq!((sum(told["0"].success), sum(told["0"].compute_infer)), ((2, 26), (2, 20)));
    assert_eq!(sum(told["1"].compute_infer), (0, 0));
    let last = &told["2"];
    assert_eq!((sum(last.fail), sum(last.empty_response), sum(last.cancel)), ((1, 13), (1, 10), (1, 10)));
    assert_eq!((sum(last.compute_infer), sum(last.compute_output)), ((2, 20), (1, 3)));
}

#[test]
fn the_listed_batch_sizes_are_bounded_and_the_counts_are_not() {
    let (recorder, now) = recorder();
    let sizes = BATCH_SIZES_MAX as u64 + 10;
    for rows in (1..=sizes).rev() {
        recorder.executed(rows, &timing(now, 1, 1, 1));
        recorder.executed(rows, &timing(now, 1, 1, 1));
    }
    let told = recorder.snapshot("m", 1, vec![]);
    assert_eq!((told.execution_count, told.batch_stats.len()), (2 * sizes, BATCH_SIZES_MAX));
    assert!(told.batch_stats.is_sorted_by_key(|batch| batch.batch_size));
    assert!(told.batch_stats.iter().all(|batch| sum(batch.compute_infer).0 == 2));
}

#[test]
fn what_waits_is_counted_until_its_guard_goes() {
    let (recorder, _) = recorder();
    let (one, other) = (recorder.pending(), recorder.pending());
    assert_eq!(recorder.pending_count(), 2);
    drop(one);
    assert_eq!(recorder.pending_count(), 1);
    drop(other);
    assert_eq!(recorder.pending_count(), 0);
}

/// A batch: when it began in ms, its times, and the rows, queue and rest of the time of each of its requests.
type Batch = (u64, [u64; 3], Vec<(u64, u64, u64)>);

fn batches() -> impl Strategy<Value = Vec<Batch>> {
    let requests = prop::collection::vec((1u64..8, 0u64..1000, 0u64..1000), 1..5);
    prop::collection::vec((0u64..1000, prop::array::uniform3(0u64..1000), requests), 0..20)
}

proptest! {
    #[test]
    fn counts_add_up(batches in batches(), failures in prop::collection::vec((0usize..4, 0u64..1000), 0..10)) {
        let (recorder, now) = recorder();
        for (at_ms, [input, infer, output], requests) in &batches {
            let timing = timing(now + Duration::from_millis(*at_ms), *input, *infer, *output);
            recorder.executed(requests.iter().map(|(rows, ..)| rows).sum(), &timing);
            for (rows, queue, rest) in requests {
                let total = Duration::from_nanos(queue + rest + input + infer + output);
                recorder.success(*rows, total, Duration::from_nanos(*queue), &timing);
            }
        }
        for (why, ns) in &failures {
            recorder.failure(Failure::ALL[*why], Duration::from_nanos(*ns));
        }
        let told = recorder.snapshot("m", 1, vec![]);
        let stats = told.inference_stats.unwrap();
        let requests = batches.iter().flat_map(|(.., requests)| requests);
        let rows_of = |requests: &[(u64, u64, u64)]| requests.iter().map(|(rows, ..)| rows).sum::<u64>();

        prop_assert_eq!(told.inference_count, batches.iter().map(|(.., requests)| rows_of(requests)).sum::<u64>());
        prop_assert_eq!(told.execution_count, batches.len() as u64);
        prop_assert_eq!(told.batch_stats.iter().map(|batch| sum(batch.compute_infer).0).sum::<u64>(), told.execution_count);
        let listed: u64 = told.batch_stats.iter().map(|batch| batch.batch_size * sum(batch.compute_input).0).sum();
        prop_assert_eq!(listed, told.inference_count, "every row that was executed belongs to a request that succeeded");
        let infer: u64 = told.batch_stats.iter().map(|batch| sum(batch.compute_infer).1).sum();
        prop_assert_eq!(infer, batches.iter().map(|(_, [_, infer, _], _)| infer).sum::<u64>());

        let success = sum(stats.success);
        prop_assert_eq!(success.0, requests.count() as u64);
        for part in [stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output] {
            prop_assert_eq!(sum(part).0, success.0);
        }
        let parts = [stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output];
        let rest: u64 = batches.iter().flat_map(|(.., requests)| requests).map(|(.., rest)| rest).sum();
        prop_assert_eq!(success.1, parts.into_iter().map(|part| sum(part).1).sum::<u64>() + rest);
        prop_assert_eq!(sum(stats.fail), (failures.len() as u64, failures.iter().map(|(_, ns)| ns).sum()));
        let last = batches.iter().map(|(at_ms, ..)| 1_000_000 + at_ms).max();
        prop_assert_eq!(told.last_inference, last.unwrap_or(0));
    }
}
