//! The worker's metrics, all of them: our own, and [`triton`]'s names for those that have one.
pub mod triton;

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use cresset_runtime::metrics::register;
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts};

use crate::{
    engine::{Device, Timing},
    error::PredictError,
    statistics::{Failure, Recorder},
};

/// Seconds, from 50 µs to 10 s.
const SECONDS: [f64; 12] = [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.25, 1.0, 10.0];
const ROWS: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

struct Families {
    requests: IntCounterVec,
    failures: IntCounterVec,
    request_seconds: HistogramVec,
    batch_rows: HistogramVec,
    batch_seconds: HistogramVec,
    waiting: IntGaugeVec,
    in_flight: IntGauge,
    sequences: IntGauge,
    sequences_detached: IntGauge,
    detached_bytes: IntGauge,
    device_healthy: IntGaugeVec,
    canaries: IntCounterVec,
    overruns: IntCounterVec,
}

// The definitions below are all that can be wrong, and a test builds them.
#[allow(clippy::expect_used)]
static FAMILIES: LazyLock<Families> = LazyLock::new(|| build().expect("the metrics are well defined"));

fn build() -> prometheus::Result<Families> {
    let model = &["model", "version"];
    let histogram = |name: &str, help: &str, buckets: &[f64]| {
        HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), model).map(register)
    };
    Ok(Families {
        requests: register(IntCounterVec::new(
            Opts::new("cresset_worker_requests_total", "Requests answered or refused."),
            model,
        )?),
        failures: register(IntCounterVec::new(
            Opts::new("cresset_worker_request_failures_total", "Requests refused or failed, by reason."),
            &["model", "version", "reason"],
        )?),
        request_seconds: histogram("cresset_worker_request_seconds", "From a request's arrival to its answer.", &SECONDS)?,
        batch_rows: histogram("cresset_worker_batch_rows", "Rows of a batch.", &ROWS)?,
        batch_seconds: histogram("cresset_worker_batch_seconds", "A batch's time, from its hand-over to the device.", &SECONDS)?,
        waiting: register(IntGaugeVec::new(Opts::new("cresset_worker_queue_requests", "Requests that wait in a queue."), model)?),
        in_flight: register(IntGauge::new("cresset_worker_requests_in_flight", "Requests between arrival and answer.")?),
        sequences: register(IntGauge::new("cresset_worker_sequences", "Sequences that are open.")?),
        sequences_detached: register(IntGauge::new(
            "cresset_worker_sequences_detached",
            "Sequences that are held for a client that may take them up again by way of another coordinator.",
        )?),
        detached_bytes: register(IntGauge::new("cresset_worker_detached_bytes", "Their states and answers.")?),
        device_healthy: register(IntGaugeVec::new(
            Opts::new("cresset_worker_device_healthy", "1 if a device is trusted, 0 if it is fenced."),
            &["device"],
        )?),
        canaries: register(IntCounterVec::new(
            Opts::new("cresset_worker_canaries_total", "Canary inferences, by device and result."),
            &["device", "result"],
        )?),
        overruns: register(IntCounterVec::new(
            Opts::new("cresset_worker_overruns_total", "Calls that were given up because they ran longer than their model may."),
            &["model"],
        )?),
    })
}

/// Requests between arrival and answer.
pub fn in_flight() -> IntGauge {
    FAMILIES.in_flight.clone()
}

/// Sequences that are open.
pub fn sequences() -> IntGauge {
    FAMILIES.sequences.clone()
}

/// Sequences that are held for other routers, and their bytes.
pub fn sequences_detached(count: usize, bytes: usize) {
    FAMILIES.sequences_detached.set(i64::try_from(count).unwrap_or(i64::MAX));
    FAMILIES.detached_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
}

/// A device is trusted, or fenced.
pub fn device_healthy(device: Device, is_healthy: bool) {
    FAMILIES.device_healthy.with_label_values(&[&device.to_string()]).set(i64::from(is_healthy));
}

/// A canary inference came back.
pub fn canary(device: Device, succeeded: bool) {
    let result = if succeeded { "success" } else { "failure" };
    FAMILIES.canaries.with_label_values(&[&device.to_string(), result]).inc();
}

/// A call of a model was given up.
pub fn overrun(model: &str) {
    FAMILIES.overruns.with_label_values(&[model]).inc();
}

/// The metrics of one model.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    model: String,
    version: String,
    /// Requests that wait in the queue.
    pub waiting: IntGauge,
    /// What `ModelStatistics` tells.
    pub statistics: Arc<Recorder>,
    requests: IntCounter,
    request_seconds: Histogram,
    batch_rows: Histogram,
    batch_seconds: Histogram,
}

impl ModelMetrics {
    /// Metrics with this model's labels.
    pub fn new(model: &str, version: u64, statistics: Arc<Recorder>) -> Self {
        let version = version.to_string();
        let labels: &[&str] = &[model, &version];
        Self {
            waiting: FAMILIES.waiting.with_label_values(labels),
            statistics,
            requests: FAMILIES.requests.with_label_values(labels),
            request_seconds: FAMILIES.request_seconds.with_label_values(labels),
            batch_rows: FAMILIES.batch_rows.with_label_values(labels),
            batch_seconds: FAMILIES.batch_seconds.with_label_values(labels),
            model: model.to_owned(),
            version,
        }
    }

    /// A batch of this many rows ran.
    pub fn batch(&self, rows: usize, timing: &Timing) {
        self.batch_rows.observe(rows as f64);
        self.batch_seconds.observe(timing.total().as_secs_f64());
        self.statistics.executed(rows as u64, timing);
    }

    /// A request of `rows` rows that was in line left it: answered after so long in the queue and with these times of its
    /// batch, or failed.
    pub fn ended(&self, rows: usize, took: Duration, times: Result<(Duration, Timing), &PredictError>) {
        match times {
            Ok((queued, timing)) => self.statistics.success(rows as u64, took, queued, &timing),
            Err(error) => self.statistics.failure(Failure::of(error.reason()), took),
        }
    }

    /// A request was answered (`None`) or refused for a reason.
    pub fn request(&self, refused: Option<&'static str>, took: Duration) {
        self.requests.inc();
        self.request_seconds.observe(took.as_secs_f64());
        if let Some(reason) = refused {
            FAMILIES.failures.with_label_values(&[&self.model, &self.version, reason]).inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_what_dashboards_expect() {
        ModelMetrics::new("m", 1, triton::recorder("m", 1, Duration::ZERO)).request(Some("queue-full"), Duration::from_millis(2));
        let text = cresset_runtime::metrics::render();
        for line in [
            "cresset_worker_requests_total{model=\"m\",version=\"1\"} 1",
            "cresset_worker_request_failures_total{model=\"m\",reason=\"queue-full\",version=\"1\"} 1",
            "cresset_worker_request_seconds_count{model=\"m\",version=\"1\"} 1",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
