//! The process's metrics registry, and its text for Prometheus.
//!
//! Each crate has one `metrics.rs` that registers its families here; nothing else creates any.
use std::sync::LazyLock;

use prometheus::{Encoder, Registry, TextEncoder};

static REGISTRY: LazyLock<Registry> = LazyLock::new(Registry::new);

/// The one registry of this process.
pub fn registry() -> &'static Registry {
    &REGISTRY
}

/// Registers a metric, and hands it back. A second registration of the same name (several clusters in one test process)
/// leaves the first in place.
pub fn register<M: prometheus::core::Collector + Clone + 'static>(metric: M) -> M {
    if let Err(error) = REGISTRY.register(Box::new(metric.clone())) {
        tracing::debug!(%error, "metric is already registered");
    }
    metric
}

/// All metrics in Prometheus' text format.
pub fn render() -> String {
    let mut text = Vec::new();
    match TextEncoder::new().encode(&REGISTRY.gather(), &mut text) {
        Ok(()) => String::from_utf8(text).unwrap_or_default(),
        Err(error) => format!("# metrics can't be encoded: {error}\n"),
    }
}
