//! What a worker holds beyond its weights and libtorch itself, and whether it stays so.

use std::time::Duration;

use anyhow::Context;

use super::{
    figures::Part,
    inprocess::Holder,
    models::{MLP, MODELS},
    stage::{Stage, WORKER},
    usage::rss_mib,
};

/// Requests to each model before memory is compared; the reference makes about as many calls.
const FIRST_REQUESTS: u64 = 5;
/// Samples of memory that is to stay flat.
const SAMPLES: u64 = 10;
/// Requests of one short stream.
const STREAM_REQUESTS: u64 = 2;

/// Measures a fresh worker beside a process with nothing but libtorch and the same models.
///
/// # Errors
/// When a process fails, or a request.
pub fn measure(stage: &Stage) -> anyhow::Result<Part> {
    let mut part = Part::default();
    let cluster = stage.cluster()?;
    let worker = cluster.process(WORKER)?.pid();
    let bare = Holder::start(stage.repository.path(), stage.gpu, &[], stage.one_caller())?;
    let mut holder = Holder::start(stage.repository.path(), stage.gpu, &MODELS, stage.one_caller())?;
    part.add("libtorch_mib", rss_mib(bare.pid())?);
    part.add("weights_mib", rss_mib(holder.pid())? - rss_mib(bare.pid())?);
    part.add("at_rest_over_libtorch_mib", rss_mib(worker)? - rss_mib(holder.pid())?);
    for model in MODELS {
        holder.measure(model, 1, Duration::ZERO)?;
        stage.straight(&cluster, model)?.unwarmed().requests(FIRST_REQUESTS, &["--concurrency", "1"])?;
    }
    part.add("worker_mib", rss_mib(worker)?);
    part.add("reference_mib", rss_mib(holder.pid())?);
    part.add("over_libtorch_mib", rss_mib(worker)? - rss_mib(holder.pid())?);
    drop((bare, holder));

    let small = stage.straight(&cluster, MLP)?.unwarmed();
    let requests = (stage.pace.flat_requests / SAMPLES).max(1);
    flat(&mut part, "requests", || small.requests(requests, &["--concurrency", "64"]).map(drop), worker)?;
    let per_stream = STREAM_REQUESTS.to_string();
    let streams = (stage.pace.flat_streams / SAMPLES).max(1) * STREAM_REQUESTS;
    let flags = ["--concurrency", "8", "--stream", "--streams", "8", "--requests-per-stream", &per_stream];
    flat(&mut part, "streams", || small.requests(streams, &flags).map(drop), worker)?;
    part.fact("flat_requests", stage.pace.flat_requests);
    part.fact("flat_streams", stage.pace.flat_streams);
    Ok(part)
}

/// Runs a load again and again, and says how far memory moved after the first time, in percent of what it was then.
fn flat(part: &mut Part, what: &str, mut load: impl FnMut() -> anyhow::Result<()>, worker: u32) -> anyhow::Result<()> {
    let mut samples = Vec::new();
    for _ in 0..SAMPLES {
        load()?;
        samples.push(rss_mib(worker)?);
    }
    let first = samples.first().copied().context("no sample")?;
    let furthest = samples.iter().map(|sample| sample - first).max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(0.0);
    part.add(&format!("over_{what}_percent"), furthest / first * 100.0);
    part.fact(&format!("worker_mib_over_{what}"), samples);
    Ok(())
}
