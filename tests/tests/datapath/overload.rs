//! More than a model can do: what is accepted is answered in time, and the rest hears so at once.
//!
//! The model is the null engine's, which takes a time of its own for each batch, so that the measure doesn't depend on how
//! busy the machine is.
use std::sync::atomic::{AtomicU64, Ordering};

use cresset_worker::engine::AnyEngine;
use tokio::time::{MissedTickBehavior, interval};

use super::*;

/// A batch of four takes 8 ms: 500 requests a second.
async fn limited() -> Arc<Bench> {
    let models = ModelRepository::new().unwrap();
    let more = "parameters { key: \"cresset.null.sleep_us\" value: { string_value: \"8000\" } }";
    let config = fp32_model(4, more).replace("pytorch_libtorch", "null");
    models.add_bytes("limited", &config, b"").unwrap();
    Arc::new(Bench::on(Arc::new(AnyEngine { null_enabled: true }), models, &["limited"], AMPLE).await)
}

#[derive(Default)]
struct Counts {
    in_time: AtomicU64,
    late: AtomicU64,
    refused: AtomicU64,
    refusal_us_max: AtomicU64,
}

/// Answers a second while `callers` call without a pause for `long`.
async fn peak(bench: &Arc<Bench>, callers: usize, long: Duration) -> f64 {
    let until = Instant::now() + long;
    let calls = (0..callers).map(|_| async {
        let mut answered = 0_u32;
        while Instant::now() < until {
            bench.infer(batch_of("limited", &[1.0])).await.unwrap();
            answered += 1;
        }
        answered
    });
    let begun = Instant::now();
    let answered: u32 = join_all(calls).await.into_iter().sum();
    f64::from(answered) / begun.elapsed().as_secs_f64()
}

/// Sends so many requests a second for `long`, whatever becomes of them, each with this much time.
async fn flood(bench: &Arc<Bench>, per_second: f64, long: Duration, patience: Duration) -> Arc<Counts> {
    let counts = Arc::new(Counts::default());
    let mut ticks = interval(Duration::from_secs_f64(1.0 / per_second));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut calls = tokio::task::JoinSet::new();
    let begun = Instant::now();
    while begun.elapsed() < long {
        ticks.tick().await;
        let (bench, counts) = (Arc::clone(bench), Arc::clone(&counts));
        calls.spawn(async move {
            let sent = Instant::now();
            let answer = bench.infer_until(batch_of("limited", &[1.0]), Some(sent + patience)).await;
            let took = sent.elapsed();
            let count = match reason(&answer) {
                None if took <= patience => &counts.in_time,
                None | Some(Reason::DeadlineExceeded) => &counts.late,
                Some(Reason::QueueFull) => {
                    let took_us = u64::try_from(took.as_micros()).unwrap();
                    counts.refusal_us_max.fetch_max(took_us, Ordering::Relaxed);
                    &counts.refused
                }
                Some(other) => panic!("{other}"),
            };
            count.fetch_add(1, Ordering::Relaxed);
        });
        while calls.try_join_next().is_some() {}
    }
    calls.join_all().await;
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_times_too_much_leaves_goodput_where_it_was() {
    let bench = limited().await;
    let before = peak(&bench, 16, Duration::from_secs(2)).await;
    let long = Duration::from_secs(6);
    let counts = flood(&bench, before * 3.0, long, Duration::from_millis(500)).await;
    // Whatever else this machine does: the flood is held against the worse of what came before and after it.
    let peak = before.min(peak(&bench, 16, Duration::from_secs(2)).await);
    let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
    let (in_time, late, refused) = (count(&counts.in_time), count(&counts.late), count(&counts.refused));
    let goodput = in_time as f64 / long.as_secs_f64();
    println!("peak {peak:.0}/s, goodput {goodput:.0}/s, {in_time} in time, {late} late, {refused} refused");
    println!("slowest refusal {} us", count(&counts.refusal_us_max));
    assert!(refused > in_time, "there was too little to refuse: {refused} of {}", in_time + late + refused);
    assert!(goodput >= peak * 0.9, "{goodput:.0} of {peak:.0} answers a second");
    // The 99th percentile of what was accepted is in time.
    assert!(late * 100 <= in_time + late, "{late} of {} accepted requests were late", in_time + late);
    assert_eq!(bench.worker.in_flight(), 0);
}

#[tokio::test]
async fn what_would_be_late_is_refused_at_once_with_a_time_to_come_back() {
    let bench = limited().await;
    bench.infer(batch_of("limited", &[1.0])).await.unwrap();
    let patient = join_all((0..40).map(|_| bench.infer(batch_of("limited", &[1.0]))));
    let hasty = bench.infer_until(batch_of("limited", &[1.0]), Some(Instant::now() + Duration::from_millis(30)));
    let relaxed = bench.infer_until(batch_of("limited", &[1.0]), Some(Instant::now() + PATIENCE));
    let (patient, hasty, relaxed) = futures::join!(patient, hasty, relaxed);
    assert!(patient.iter().all(Result::is_ok) && relaxed.is_ok());
    let refused = hasty.unwrap_err();
    assert_eq!(refused.reason(), Reason::QueueFull);
    assert!(refused.to_string().contains("longer than its deadline allows"), "{refused}");
    let pushback = cresset_proto::metadata::retry_pushback(refused.status().metadata()).unwrap();
    assert!((Duration::from_millis(1)..Duration::from_secs(1)).contains(&pushback), "{pushback:?}");
}
