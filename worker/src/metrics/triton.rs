//! The names that dashboards made for Triton ask for, computed from the same counts as `ModelStatistics` when they are asked.
//!
//! Absent are Triton's names for what isn't there: a cache of responses, a pool of pinned memory, and GPUs, whose own
//! exporter says more.
use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock, Weak},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use cresset_runtime::metrics::register;
use parking_lot::Mutex;
use prometheus::{
    GaugeVec, IntCounterVec, IntGaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::statistics::{Failure, Recorder, Sum, Totals};

/// A model's labels: name and version.
type Labels = (String, String);
type Tracked = Vec<(Labels, Weak<Recorder>)>;

/// The recorders of loaded models. A model that is loaded twice (while its successor takes over, or by two workers in one
/// process) has two, whose counts are added.
static TRACKED: LazyLock<Mutex<Tracked>> = LazyLock::new(|| {
    if let Ok(families) = Families::new() {
        register(Aliases { descriptions: families.descriptions().into_iter().cloned().collect() });
    }
    Mutex::default()
});

/// A recorder for a model that was just loaded; its counts are shown while somebody holds it.
pub fn recorder(model: &str, version: u64, load: Duration) -> Arc<Recorder> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let recorder = Recorder::new(Instant::now(), u64::try_from(since.as_millis()).unwrap_or(u64::MAX), load);
    let mut tracked = TRACKED.lock();
    tracked.retain(|(_, recorder)| recorder.strong_count() > 0);
    tracked.push(((model.to_owned(), version.to_string()), Arc::downgrade(&recorder)));
    recorder
}

/// All families, empty; made anew each time they are asked for, so that a model that is gone leaves no series behind.
struct Families {
    success: IntCounterVec,
    failure: IntCounterVec,
    inferences: IntCounterVec,
    executions: IntCounterVec,
    request_us: IntCounterVec,
    queue_us: IntCounterVec,
    input_us: IntCounterVec,
    infer_us: IntCounterVec,
    output_us: IntCounterVec,
    pending: IntGaugeVec,
    load_seconds: GaugeVec,
    cpu: GaugeVec,
    memory_total: GaugeVec,
    memory_used: GaugeVec,
}

impl Families {
    fn new() -> prometheus::Result<Self> {
        let model = &["model", "version"];
        let counter = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), model);
        let machine = |name: &str, help: &str| GaugeVec::new(Opts::new(name, help), &[]);
        let failure = Opts::new("nv_inference_request_failure", "Requests that failed, by reason.");
        let pending = Opts::new("nv_inference_pending_request_count", "Requests that wait to be executed.");
        let load = Opts::new("nv_model_load_duration_secs", "How long loading took, in seconds.");
        Ok(Self {
            success: counter("nv_inference_request_success", "Requests that succeeded.")?,
            failure: IntCounterVec::new(failure, &["model", "version", "reason"])?,
            inferences: counter("nv_inference_count", "Rows of requests that succeeded.")?,
            executions: counter("nv_inference_exec_count", "Calls of the model.")?,
            request_us: counter("nv_inference_request_duration_us", "Time of requests that succeeded, in µs.")?,
            queue_us: counter("nv_inference_queue_duration_us", "Time that they waited, in µs.")?,
            input_us: counter("nv_inference_compute_input_duration_us", "Time to make tensors of their bytes, in µs.")?,
            infer_us: counter("nv_inference_compute_infer_duration_us", "Time of the model, in µs.")?,
            output_us: counter("nv_inference_compute_output_duration_us", "Time to make bytes of the outputs, in µs.")?,
            pending: IntGaugeVec::new(pending, model)?,
            load_seconds: GaugeVec::new(load, model)?,
            cpu: machine("nv_cpu_utilization", "Share of the machine's CPU time that was used since the last time, 0 to 1.")?,
            memory_total: machine("nv_cpu_memory_total_bytes", "Memory of the machine, in bytes.")?,
            memory_used: machine("nv_cpu_memory_used_bytes", "Memory of the machine that is in use, in bytes.")?,
        })
    }

    fn each(&self) -> [&dyn Collector; 14] {
        [
            &self.success,
            &self.failure,
            &self.inferences,
            &self.executions,
            &self.request_us,
            &self.queue_us,
            &self.input_us,
            &self.infer_us,
            &self.output_us,
            &self.pending,
            &self.load_seconds,
            &self.cpu,
            &self.memory_total,
            &self.memory_used,
        ]
    }

    fn descriptions(&self) -> Vec<&Desc> {
        self.each().into_iter().flat_map(Collector::desc).collect()
    }

    fn model(&self, (model, version): &Labels, shown: &Shown) {
        let labels: &[&str] = &[model, version];
        let totals = &shown.totals;
        let us = |sum: Sum| sum.ns / 1_000;
        for (family, value) in [
            (&self.success, totals.success.count),
            (&self.inferences, totals.inferences),
            (&self.executions, totals.executions),
            (&self.request_us, us(totals.success)),
            (&self.queue_us, us(totals.queue)),
            (&self.input_us, us(totals.input)),
            (&self.infer_us, us(totals.infer)),
            (&self.output_us, us(totals.output)),
        ] {
            family.with_label_values(labels).inc_by(value);
        }
        for (why, failed) in Failure::ALL.into_iter().zip(&totals.failures) {
            self.failure.with_label_values(&[model.as_str(), version, why.as_str()]).inc_by(failed.count);
        }
        self.pending.with_label_values(labels).set(i64::try_from(shown.pending).unwrap_or(i64::MAX));
        self.load_seconds.with_label_values(labels).set(shown.load.as_secs_f64());
    }

    /// What can't be read is left out.
    fn machine(&self) {
        if let Some(share) = std::fs::read_to_string("/proc/stat").ok().and_then(|text| CPU_TIME.lock().share(&text)) {
            self.cpu.with_label_values::<&str>(&[]).set(share);
        }
        if let Some((total, used)) = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| memory(&text)) {
            self.memory_total.with_label_values::<&str>(&[]).set(total);
            self.memory_used.with_label_values::<&str>(&[]).set(used);
        }
    }
}

#[derive(Default)]
struct Shown {
    totals: Totals,
    pending: u64,
    load: Duration,
}

/// CPU time of the machine up to the last time that somebody asked, in the kernel's ticks.
#[derive(Default)]
struct CpuTime {
    all: u64,
    idle: u64,
    /// What was answered then.
    share: f64,
}

static CPU_TIME: Mutex<CpuTime> = Mutex::new(CpuTime { all: 0, idle: 0, share: 0.0 });

impl CpuTime {
    /// The share that was used since the last time; since the machine's start at the first.
    fn share(&mut self, stat: &str) -> Option<f64> {
        let mut times = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().map_while(|word| word.parse::<u64>().ok());
        let [user, nice, system, idle, waiting] = std::array::from_fn(|_| times.next());
        // Interrupts and what the hypervisor took; what guests used is in `user` already.
        let rest: u64 = times.take(3).sum();
        let idle = idle? + waiting.unwrap_or(0);
        let all = user? + nice? + system? + rest + idle;
        let passed = all.saturating_sub(self.all);
        // Asked twice within a tick.
        let used = passed - idle.saturating_sub(self.idle).min(passed);
        let share = if passed == 0 { self.share } else { used as f64 / passed as f64 };
        *self = Self { all, idle, share };
        Some(share)
    }
}

/// Bytes of the machine's memory, and of what is in use.
fn memory(meminfo: &str) -> Option<(f64, f64)> {
    let bytes = |name: &str| {
        let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        Some(rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    let (total, free) = (bytes("MemTotal:")?, bytes("MemAvailable:")?);
    Some((total as f64, total.saturating_sub(free) as f64))
}

#[derive(Clone)]
struct Aliases {
    descriptions: Vec<Desc>,
}

impl Collector for Aliases {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Ok(families) = Families::new() else { return vec![] };
        let mut models: BTreeMap<Labels, Shown> = BTreeMap::new();
        for (labels, recorder) in TRACKED.lock().iter() {
            let Some(recorder) = recorder.upgrade() else { continue };
            let shown = models.entry(labels.clone()).or_default();
            shown.totals.add(&recorder.totals());
            shown.pending += recorder.pending_count();
            shown.load = recorder.load();
        }
        for (labels, shown) in &models {
            families.model(labels, shown);
        }
        families.machine();
        families.each().into_iter().flat_map(Collector::collect).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Timing;

    #[test]
    fn the_names_are_tritons_and_the_counts_those_of_the_statistics() {
        let us = Duration::from_micros;
        let timing = Timing { began: Instant::now(), input: us(10), infer: us(100), output: us(5) };
        let recorders = [recorder("aliased", 3, us(2_500_000)), recorder("aliased", 3, us(1_500_000))];
        for recorder in &recorders {
            recorder.executed(4, &timing);
            recorder.success(4, us(150), us(35), &timing);
            recorder.failure(Failure::Rejected, us(1));
        }
        let _waits = recorders[0].pending();
        let text = cresset_runtime::metrics::render();
        for line in [
            "nv_inference_request_success{model=\"aliased\",version=\"3\"} 2",
            "nv_inference_request_failure{model=\"aliased\",reason=\"REJECTED\",version=\"3\"} 2",
            "nv_inference_request_failure{model=\"aliased\",reason=\"CANCELED\",version=\"3\"} 0",
            "nv_inference_request_failure{model=\"aliased\",reason=\"BACKEND\",version=\"3\"} 0",
            "nv_inference_request_failure{model=\"aliased\",reason=\"OTHER\",version=\"3\"} 0",
            "nv_inference_count{model=\"aliased\",version=\"3\"} 8",
            "nv_inference_exec_count{model=\"aliased\",version=\"3\"} 2",
            "nv_inference_request_duration_us{model=\"aliased\",version=\"3\"} 300",
            "nv_inference_queue_duration_us{model=\"aliased\",version=\"3\"} 70",
            "nv_inference_compute_input_duration_us{model=\"aliased\",version=\"3\"} 20",
            "nv_inference_compute_infer_duration_us{model=\"aliased\",version=\"3\"} 200",
            "nv_inference_compute_output_duration_us{model=\"aliased\",version=\"3\"} 10",
            "nv_inference_pending_request_count{model=\"aliased\",version=\"3\"} 1",
            "nv_model_load_duration_secs{model=\"aliased\",version=\"3\"} 1.5",
            "nv_cpu_utilization ",
            "nv_cpu_memory_total_bytes ",
            "nv_cpu_memory_used_bytes ",
        ] {
            assert!(text.lines().any(|found| found.starts_with(line)), "{line} is missing in\n{text}");
        }
        drop((recorders, _waits));
        assert!(!cresset_runtime::metrics::render().contains("aliased"), "a model that is gone leaves no series");
    }

    #[test]
    fn the_machines_numbers_are_read_as_the_kernel_writes_them() {
        let mut time = CpuTime::default();
        assert_eq!(time.share("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 1 1 1\n"), Some(0.2));
        assert_eq!(time.share("cpu  150 0 130 710 110 0 0 0 0 0\n"), Some(0.8));
        assert_eq!(time.share("cpu  150 0 130 710 110 0 0 0 0 0\n"), Some(0.8), "no time has passed");
        assert_eq!(time.share("cpu  150 0 130 720 110\n"), Some(0.0));
        assert_eq!(time.share("intr 1\n"), None);
        assert_eq!(memory("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:   40 kB\n"), Some((102_400.0, 61_440.0)));
        assert_eq!(memory("MemTotal: 100 kB\n"), None);
    }
}
