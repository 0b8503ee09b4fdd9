//! Logs, traces and trace context, set up in one place.
//!
//! Spans go to an OTLP collector over gRPC when `OTEL_EXPORTER_OTLP_ENDPOINT` is set, from a thread of their own: a
//! collector that is slow or gone costs spans, never a request. Logs go to standard error. Which requests are traced and
//! what is logged can be changed while the process runs: [`controls`].
mod logs;
mod sampling;

use std::{env, sync::OnceLock, time::Duration};

use opentelemetry::{
    global,
    propagation::{Extractor, Injector},
    trace::TracerProvider as _,
};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use parking_lot::Mutex;
use tonic::metadata::{KeyRef, MetadataKey, MetadataMap, MetadataValue};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt, util::SubscriberInitExt};

pub use self::{logs::LogLevels, sampling::Sampling};
use self::{
    logs::{LogFilter, Switches},
    sampling::Sampler,
};

/// How long an export may take, in seconds, before its spans are given up.
const EXPORT_TIMEOUT_SECONDS: u64 = 5;

/// Why telemetry can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log filter doesn't parse.
    #[error("log filter '{filter}' isn't right: {source}")]
    Filter {
        /// The text that was given.
        filter: String,
        /// The parser's words.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The OTLP endpoint can't be used.
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT can't be used: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// Ends telemetry in order when it goes: spans that wait are exported.
#[derive(Debug)]
#[must_use = "telemetry ends when this is dropped"]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

/// Sets up logs and traces for a process called `service` (its kind) and `instance` (its id). Call it inside the runtime.
///
/// # Errors
/// [`Error`]. A second call in one process changes nothing.
pub fn start(service: &'static str, instance: &str, log_filter: &str) -> Result<Telemetry, Error> {
    let filter = EnvFilter::try_new(log_filter).map_err(|source| Error::Filter { filter: log_filter.to_owned(), source })?;
    global::set_text_map_propagator(TraceContextPropagator::new());
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let exports = variable("OTEL_EXPORTER_OTLP_ENDPOINT").is_some();
    let asked = Sampling::from_env(variable("OTEL_TRACES_SAMPLER").as_deref(), variable("OTEL_TRACES_SAMPLER_ARG").as_deref());
    let start = Sampling { on: exports && asked.on, ..asked };
    let sampler = Sampler::new(start);
    let provider = if exports { Some(exporter(service, instance, sampler.clone())?) } else { None };
    let (filter, switches) = LogFilter::new(filter);
    let logs =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false).with_target(true).with_filter(filter);
    // Without an exporter this process has no spans of its own that a caller's trace could continue in: what it sends is the
    // caller's own trace context, as it came.
    let tracer = provider.as_ref().map(|provider| provider.tracer("cresset"));
    let traces = tracer.map(|tracer| tracing_opentelemetry::layer().with_tracer(tracer).with_filter(trace_filter()));
    // Tests start several parts of a cluster in one process: the first set-up stays.
    if tracing_subscriber::registry().with(logs).with(traces).try_init().is_err() {
        tracing::debug!("telemetry is already set up");
    } else {
        // Nobody else can have set it: only one subscriber is ever installed.
        let _ = CONTROLS.set(Controls { switches, sampler, start, exports, changing: Mutex::new(()) });
    }
    Ok(Telemetry { provider })
}

static CONTROLS: OnceLock<Controls> = OnceLock::new();

/// What can be changed while the process runs; `None` before [`start`].
pub fn controls() -> Option<&'static Controls> {
    CONTROLS.get()
}

/// The switches of a process's telemetry.
#[derive(Debug)]
pub struct Controls {
    switches: Switches,
    sampler: Sampler,
    start: Sampling,
    exports: bool,
    /// Held while somebody changes something, so that two at once don't undo each other.
    changing: Mutex<()>,
}

impl Controls {
    /// What goes into the log.
    pub fn log_levels(&self) -> LogLevels {
        self.switches.now()
    }

    /// Changes what goes into the log, and says what it is then. Details beyond what the process was started with are
    /// those of our own crates.
    ///
    /// # Errors
    /// Those of `change`; nothing is changed then.
    pub fn change_log_levels<E>(&self, change: impl FnOnce(LogLevels) -> Result<LogLevels, E>) -> Result<LogLevels, E> {
        let _alone = self.changing.lock();
        let (before, after) = (self.log_levels(), change(self.log_levels())?);
        if after != before {
            tracing::info!(?before, ?after, "log levels change");
            self.switches.set(after);
        }
        Ok(after)
    }

    /// Which requests are traced.
    pub fn sampling(&self) -> Sampling {
        self.sampler.now()
    }

    /// Which requests were traced when the process started.
    pub fn sampling_at_start(&self) -> Sampling {
        self.start
    }

    /// Whether traces go anywhere: a collector was named when the process started.
    pub fn exports_traces(&self) -> bool {
        self.exports
    }

    /// Changes which requests are traced, and says which are then.
    ///
    /// # Errors
    /// Those of `change`; nothing is changed then.
    pub fn change_sampling<E>(&self, change: impl FnOnce(Sampling) -> Result<Sampling, E>) -> Result<Sampling, E> {
        let _alone = self.changing.lock();
        let before = self.sampling();
        let after = change(before)?;
        if after != before {
            tracing::info!(?before, ?after, "sampling of traces changes");
            self.sampler.change(before, after);
        }
        Ok(after)
    }
}

/// Spans of our own crates only: those of the HTTP library would drown them.
fn trace_filter() -> EnvFilter {
    EnvFilter::new("off,cresset=info,cresset_client=info,cresset_coordinator=info,cresset_worker=info,cresset_tests=info")
}

fn exporter(service: &'static str, instance: &str, sampler: Sampler) -> Result<SdkTracerProvider, Error> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_timeout(Duration::from_secs(EXPORT_TIMEOUT_SECONDS))
        .build()?;
    let resource = Resource::builder()
        .with_service_name(service)
        .with_attribute(opentelemetry::KeyValue::new("service.instance.id", instance.to_owned()))
        .build();
    Ok(SdkTracerProvider::builder().with_sampler(sampler).with_batch_exporter(exporter).with_resource(resource).build())
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = &self.provider
            && let Err(error) = provider.shutdown_with_timeout(Duration::from_secs(EXPORT_TIMEOUT_SECONDS))
        {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}

/// Makes `span` a child of the caller's span, if the call brought one.
pub fn continue_trace(span: &Span, metadata: &MetadataMap) {
    if metadata.contains_key("traceparent") {
        let context = global::get_text_map_propagator(|propagator| propagator.extract(&Extract(metadata)));
        // Fails only for a span that is disabled, and then there is nothing to continue.
        let _ = span.set_parent(context);
    }
}

/// Puts the current span's context into a call's metadata; without an exporter there is none, and what is there stays.
pub fn pass_trace(metadata: &mut MetadataMap) {
    let context = Span::current().context();
    global::get_text_map_propagator(|propagator| propagator.inject_context(&context, &mut Inject(metadata)));
}

struct Extract<'a>(&'a MetadataMap);

impl Extractor for Extract<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0
            .keys()
            .filter_map(|key| match key {
                KeyRef::Ascii(key) => Some(key.as_str()),
                KeyRef::Binary(_) => None,
            })
            .collect()
    }
}

struct Inject<'a>(&'a mut MetadataMap);

impl Injector for Inject<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) = (MetadataKey::from_bytes(key.as_bytes()), MetadataValue::try_from(value)) {
            self.0.insert(key, value);
        }
    }
}
