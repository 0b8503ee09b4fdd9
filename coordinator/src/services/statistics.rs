//! `ModelStatistics` of the whole cluster: what each worker that holds a model has counted, added up.
//!
//! A worker counts from when it loaded the model, and what it counted goes with it: the cluster's sums can become smaller
//! when a replica moves or a worker dies.
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use cresset_client::{ModelRoute, Replica, Router};
use cresset_proto::{
    answers,
    inference::{
        InferBatchStatistics, InferResponseStatistics, InferStatistics, ModelStatistics, ModelStatisticsRequest,
        ModelStatisticsResponse, StatisticDuration, grpc_inference_service_client::GrpcInferenceServiceClient,
    },
    reason::Reason,
};
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::time::timeout;
use tonic::Status;

/// How long a worker may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Workers that are asked at a time.
const ASKED_MAX: usize = 64;

/// What one worker told.
type Told = Result<Vec<ModelStatistics>, Status>;

/// Asks workers what they have counted.
#[derive(Debug, Default, Clone)]
pub(super) struct Statistics {
    /// Lives of workers that didn't answer the last time, which is said in the log once.
    silent: Arc<Mutex<BTreeSet<(String, u64)>>>,
}

impl Statistics {
    /// The sums over all workers that hold these models. One that can't be reached is left out.
    ///
    /// # Errors
    /// UNAVAILABLE if none of several could be reached; INVALID_ARGUMENT, as Triton has it, if no worker holds the model of
    /// this `name`.
    pub(super) async fn of(
        &self,
        name: &str,
        models: &[Arc<ModelRoute>],
        router: &Router,
    ) -> Result<ModelStatisticsResponse, Status> {
        let holders: BTreeMap<&str, &Arc<Replica>> =
            models.iter().flat_map(|model| &model.replicas).map(|replica| (&*replica.worker_id, replica)).collect();
        if holders.is_empty() && !name.is_empty() {
            return Err(answers::no_statistics(name, false));
        }
        let asked = holders.len();
        let answers: Vec<_> = stream::iter(holders.into_values().cloned())
            .map(|worker| async move { (ask(router, &worker, name).await, worker) })
            .buffer_unordered(ASKED_MAX)
            .collect()
            .await;
        self.say_who_is_silent(&answers);
        let answered: Vec<_> = answers.into_iter().filter_map(|(answer, _)| answer.ok()).collect();
        if answered.is_empty() && asked > 0 {
            return Err(Reason::NoReplica.status(format!("none of the {asked} workers that were asked told its statistics")));
        }
        let model_stats = sums(models, answered.into_iter().flatten());
        // It was unloaded meanwhile.
        if model_stats.is_empty() && !name.is_empty() {
            return Err(answers::no_statistics(name, false));
        }
        Ok(ModelStatisticsResponse { model_stats })
    }

    fn say_who_is_silent(&self, answers: &[(Told, Arc<Replica>)]) {
        let mut silent = self.silent.lock();
        for (answer, worker) in answers {
            let life = (worker.worker_id.clone(), worker.incarnation);
            match answer {
                Ok(_) => drop(silent.remove(&life)),
                Err(status) => {
                    // Of its lives only the newest counts, so there are never more than workers.
                    let is_new = !silent.contains(&life);
                    silent.retain(|(id, _)| *id != life.0);
                    silent.insert(life);
                    if is_new {
                        let error = status.message();
                        tracing::warn!(worker = worker.worker_id, error, "statistics are told without this worker's");
                    }
                }
            }
        }
    }
}

/// What a worker has counted; nothing if it doesn't hold the model any more.
async fn ask(router: &Router, worker: &Arc<Replica>, name: &str) -> Told {
    let mut client = GrpcInferenceServiceClient::new(router.channel(worker)?);
    let request = ModelStatisticsRequest { name: name.to_owned(), version: String::new() };
    let late = |_| Status::deadline_exceeded(format!("no answer within {} ms", ANSWER_TIMEOUT.as_millis()));
    match timeout(ANSWER_TIMEOUT, client.model_statistics(request)).await.map_err(late)? {
        Ok(answer) => Ok(answer.into_inner().model_stats),
        Err(status) if Reason::of(&status) == Some(Reason::InvalidArgument) => Ok(vec![]),
        Err(status) => Err(status),
    }
}

/// One sum for each version of each model, by name and version; what workers tell of others is left out.
fn sums(models: &[Arc<ModelRoute>], told: impl Iterator<Item = ModelStatistics>) -> Vec<ModelStatistics> {
    let wanted: BTreeSet<(String, u64)> = models.iter().map(|model| (model.name.clone(), model.version)).collect();
    let mut sums: BTreeMap<(String, u64), ModelStatistics> = BTreeMap::new();
    for one in told {
        let Ok(version) = one.version.parse() else { continue };
        let key = (one.name.clone(), version);
        if wanted.contains(&key) {
            let nothing = || ModelStatistics { name: one.name.clone(), version: one.version.clone(), ..Default::default() };
            add(sums.entry(key).or_insert_with(nothing), one);
        }
    }
    sums.into_values().collect()
}

fn add(sum: &mut ModelStatistics, one: ModelStatistics) {
    sum.last_inference = sum.last_inference.max(one.last_inference);
    sum.inference_count += one.inference_count;
    sum.execution_count += one.execution_count;
    add_requests(sum.inference_stats.get_or_insert_default(), &one.inference_stats.unwrap_or_default());
    for batch in one.batch_stats {
        match sum.batch_stats.binary_search_by_key(&batch.batch_size, |known| known.batch_size) {
            Ok(place) => add_batches(&mut sum.batch_stats[place], &batch),
            Err(place) => sum.batch_stats.insert(place, batch),
        }
    }
    for usage in one.memory_usage {
        let known = sum.memory_usage.iter_mut().find(|known| (&known.r#type, known.id) == (&usage.r#type, usage.id));
        match known {
            Some(known) => known.byte_size += usage.byte_size,
            None => sum.memory_usage.push(usage),
        }
    }
    for (index, response) in one.response_stats {
        add_responses(sum.response_stats.entry(index).or_default(), &response);
    }
}

fn add_duration(sum: &mut Option<StatisticDuration>, one: &Option<StatisticDuration>) {
    let (sum, one) = (sum.get_or_insert_default(), one.unwrap_or_default());
    sum.count += one.count;
    sum.ns = sum.ns.saturating_add(one.ns);
}

fn add_requests(sum: &mut InferStatistics, one: &InferStatistics) {
    add_duration(&mut sum.success, &one.success);
    add_duration(&mut sum.fail, &one.fail);
    add_duration(&mut sum.queue, &one.queue);
    add_duration(&mut sum.compute_input, &one.compute_input);
    add_duration(&mut sum.compute_infer, &one.compute_infer);
    add_duration(&mut sum.compute_output, &one.compute_output);
    add_duration(&mut sum.cache_hit, &one.cache_hit);
    add_duration(&mut sum.cache_miss, &one.cache_miss);
}

fn add_batches(sum: &mut InferBatchStatistics, one: &InferBatchStatistics) {
    add_duration(&mut sum.compute_input, &one.compute_input);
    add_duration(&mut sum.compute_infer, &one.compute_infer);
    add_duration(&mut sum.compute_output, &one.compute_output);
}

fn add_responses(sum: &mut InferResponseStatistics, one: &InferResponseStatistics) {
    add_duration(&mut sum.compute_infer, &one.compute_infer);
    add_duration(&mut sum.compute_output, &one.compute_output);
    add_duration(&mut sum.success, &one.success);
    add_duration(&mut sum.fail, &one.fail);
    add_duration(&mut sum.empty_response, &one.empty_response);
    add_duration(&mut sum.cancel, &one.cancel);
}

#[cfg(test)]
mod tests {
    use cresset_client::RouteTable;
    use cresset_proto::{
        fleet::v1::{self, WatchResponse},
        inference::MemoryUsage,
    };
    use proptest::prelude::*;

    use super::*;

    fn routes(models: &[(&str, u64)]) -> Vec<Arc<ModelRoute>> {
        let route = |(model, version): &(&str, u64)| v1::ModelRoute {
            model: (*model).into(),
            version: *version,
            generation: 1,
            ..Default::default()
        };
        let response = WatchResponse { epoch: 1, models: models.iter().map(route).collect(), ..Default::default() };
        RouteTable::build(&response, &RouteTable::unknown()).unwrap().models().cloned().collect()
    }

    fn duration(count: u64) -> Option<StatisticDuration> {
        Some(StatisticDuration { count, ns: count * 10 })
    }

    /// What a worker tells whose counts are all `count`, with batches of these sizes.
    fn told(name: &str, version: u64, count: u64, sizes: &[u64]) -> ModelStatistics {
        let (d, none) = (duration(count), duration(0));
        let batch =
            |size: &u64| InferBatchStatistics { batch_size: *size, compute_input: d, compute_infer: d, compute_output: d };
        let response =
            InferResponseStatistics { compute_infer: d, compute_output: d, success: d, fail: d, empty_response: d, cancel: d };
        ModelStatistics {
            name: name.into(),
            version: version.to_string(),
            last_inference: count,
            inference_count: count,
            execution_count: count,
            inference_stats: Some(InferStatistics {
                success: d,
                fail: d,
                queue: d,
                compute_input: d,
                compute_infer: d,
                compute_output: d,
                cache_hit: none,
                cache_miss: none,
            }),
            batch_stats: sizes.iter().map(batch).collect(),
            memory_usage: vec![MemoryUsage { r#type: "CPU".into(), id: 0, byte_size: count }],
            response_stats: [("0".to_owned(), response)].into(),
        }
    }

    proptest! {
        #[test]
        fn workers_are_added_up(counts in prop::collection::vec(0u64..1_000_000, 1..6)) {
            let routes = routes(&[("m", 2), ("m", 10)]);
            let sums = sums(&routes, counts.iter().map(|count| told("m", 2, *count, &[1, 4])));
            let all = counts.iter().sum();
            let mut wanted = told("m", 2, all, &[1, 4]);
            wanted.last_inference = *counts.iter().max().unwrap();
            prop_assert_eq!(sums, [wanted]);
        }
    }

    #[test]
    fn versions_stay_apart_and_in_order_and_others_are_left_out() {
        let routes = routes(&[("b", 10), ("a", 1), ("b", 9)]);
        let told = [told("b", 10, 1, &[2]), told("b", 9, 2, &[]), told("b", 10, 3, &[1]), told("gone", 1, 9, &[])];
        let sums = sums(&routes, told.into_iter());
        let found: Vec<_> = sums.iter().map(|sum| (&*sum.name, &*sum.version, sum.inference_count)).collect();
        assert_eq!(found, [("b", "9", 2), ("b", "10", 4)]);
        let sizes: Vec<_> = sums[1].batch_stats.iter().map(|batch| (batch.batch_size, batch.compute_infer)).collect();
        assert_eq!(sizes, [(1, duration(3)), (2, duration(1))]);
    }
}
