//! How much of libtorch's own speed is served.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context;
use serde::Serialize;
use serde_json::json;

use super::{
    figures::Part,
    inprocess::{Holder, Threads},
    models::{MLP, MODELS, Model, Serving, configure},
    stage::Stage,
};
use crate::harness::Cluster;

/// Requests in flight; on a GPU, whose best batches are larger, all of them.
const CONCURRENCY: [u32; 6] = [1, 8, 32, 64, 256, 512];
/// Batches that the reference tries; likewise.
const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// What of both is for a processor.
const ON_A_PROCESSOR_MAX: u32 = 64;
/// A batch this much slower than the best so far ends the search among larger ones.
const WORSE: f64 = 0.9;

/// How libtorch runs a model fastest on this machine.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Best {
    /// Callers and threads.
    pub threads: Threads,
    /// Rows in one call.
    pub batch: usize,
    /// What came of it in the search.
    pub rows_per_second: f64,
}

/// The best for each model, by its name.
pub type Tuning = BTreeMap<&'static str, Best>;

/// Searches the best batch and threads for each model, and configures the models for it.
///
/// # Errors
/// When a reference fails.
pub fn tune(stage: &Stage) -> anyhow::Result<Tuning> {
    let mut tuning = Tuning::new();
    let choices = if stage.gpu { Threads::ON_A_GPU.to_vec() } else { Threads::choices(stage.cores) };
    for threads in choices {
        let mut holder = Holder::start(stage.repository.path(), stage.gpu, &MODELS, threads)?;
        for model in MODELS {
            let mut most = 0.0_f64;
            for batch in BATCHES.into_iter().filter(|batch| stage.gpu || *batch <= ON_A_PROCESSOR_MAX as usize) {
                let rows_per_second = holder.measure(model, batch, stage.pace.time / 6)?.rows_per_second;
                let best = tuning.entry(model.name).or_insert(Best { threads, batch, rows_per_second });
                if rows_per_second > best.rows_per_second {
                    *best = Best { threads, batch, rows_per_second };
                }
                if rows_per_second < most * WORSE {
                    break;
                }
                most = most.max(rows_per_second);
            }
        }
    }
    for model in MODELS {
        configure(stage.repository.path(), model, serving(&tuning, model)?)?;
    }
    Ok(tuning)
}

/// As libtorch runs it fastest; but the small model's requests are worth batching for what surrounds them, whatever libtorch
/// thinks of it.
fn serving(tuning: &Tuning, model: Model) -> anyhow::Result<Serving> {
    let Best { threads, batch, .. } = *tuning.get(model.name).context("the search left a model out")?;
    Ok(if model.name == MLP.name {
        Serving { batch_max: batch.max(64), instances: 1 }
    } else {
        Serving { batch_max: batch, instances: threads.callers }
    })
}

fn levels(stage: &Stage) -> impl Iterator<Item = u32> {
    let gpu = stage.gpu;
    CONCURRENCY.into_iter().filter(move |concurrency| gpu || *concurrency <= ON_A_PROCESSOR_MAX)
}

/// Measures each model at each concurrency, beside libtorch at its best.
///
/// # Errors
/// When a process fails, or a request.
pub fn measure(stage: &Stage, cluster: &Cluster, tuning: &Tuning) -> anyhow::Result<BTreeMap<&'static str, Part>> {
    let mut parts: BTreeMap<&'static str, Part> = MODELS.iter().map(|model| (model.name, Part::default())).collect();
    for round in 0..stage.pace.rounds {
        for model in MODELS {
            let part = parts.get_mut(model.name).context("no such model")?;
            let best = tuning.get(model.name).context("the search left a model out")?;
            // One at a time: a reference that waits holds memory, but no core.
            let mut holder = Holder::start(stage.repository.path(), stage.gpu, &[model], best.threads)?;
            let reference = holder.measure(model, best.batch, stage.pace.time)?;
            drop(holder);
            part.raw("in_process", round, &reference);
            part.add("in_process_rows_per_second", reference.rows_per_second);
            let straight = stage.straight(cluster, model)?;
            for concurrency in levels(stage) {
                // Several times through all that is in flight, however slow the model is.
                let pass = f64::from(concurrency) / reference.rows_per_second;
                let time = Duration::from_secs_f64((4.0 * pass).max(stage.pace.time.as_secs_f64()));
                let level = straight.lasting(time).closed(concurrency)?;
                part.raw(&format!("{concurrency} in flight"), round, &level);
                part.add(&format!("requests_per_second_at_{concurrency}"), level.throughput);
                part.add(&format!("ratio_at_{concurrency}"), level.throughput / reference.rows_per_second);
                let cost = level.processes.first().context("the worker wasn't watched")?;
                part.add(&format!("worker_cpu_us_at_{concurrency}"), cost.cpu_us);
                if concurrency == 64 {
                    part.add("requests_per_core_second", 1e6 / cost.cpu_us);
                }
            }
        }
    }
    for model in MODELS {
        let part = parts.get_mut(model.name).context("no such model")?;
        let ratio = |part: &Part, concurrency: u32| part.median(&format!("ratio_at_{concurrency}")).unwrap_or(0.0);
        let best = levels(stage).max_by(|a, b| ratio(part, *a).total_cmp(&ratio(part, *b)));
        let best = best.context("no concurrency")?;
        part.copy(&format!("ratio_at_{best}"), "best_ratio");
        part.fact("best_concurrency", best);
        let Serving { batch_max, instances } = serving(tuning, model)?;
        part.fact("batch_max", batch_max);
        part.fact("instances", instances);
        part.fact("reference", json!(tuning.get(model.name)));
    }
    Ok(parts)
}
