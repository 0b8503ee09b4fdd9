//! The router against workers that die, refuse and lie, over real connections.
mod ejection;
mod many;
mod resumed;
mod sequences;
mod streams;
mod unary;

use std::sync::Arc;

use cresset_proto::{inference::ModelInferRequest, parameters};

use super::*;
use crate::{
    fake::{Fake, routes},
    routes::{RouteSender, channel},
};

/// Long enough that no test comes near it.
const IDLE_US: u64 = 60_000_000;

/// A router and the pen that writes its routes.
struct World {
    router: Router,
    table: RouteSender,
    epoch: u64,
}

impl World {
    fn new(workers: &[&Fake]) -> Self {
        Self::with(workers, IDLE_US, RouterSettings::default())
    }

    fn with(workers: &[&Fake], idle_us: u64, settings: RouterSettings) -> Self {
        let (table, receiver) = channel();
        table.publish(&routes(1, workers, idle_us)).unwrap();
        Self { router: Router::new(receiver, settings), table, epoch: 1 }
    }

    /// A newer table with these workers.
    fn publish(&mut self, workers: &[&Fake]) {
        self.epoch += 1;
        self.table.publish(&routes(self.epoch, workers, IDLE_US)).unwrap();
    }
}

fn plain(id: u64) -> ModelInferRequest {
    ModelInferRequest { model_name: "plain".into(), id: id.to_string(), ..Default::default() }
}

/// Request `id` of sequence `sequence`; the first one is 1.
fn step(sequence: i64, id: u64) -> ModelInferRequest {
    let mut request = ModelInferRequest { model_name: "seq".into(), id: id.to_string(), ..Default::default() };
    let keys = [("sequence_id", parameters::int64_parameter(sequence)), ("sequence_start", parameters::bool_parameter(id == 1))];
    request.parameters.extend(keys.map(|(key, value)| (key.to_owned(), value)));
    request
}

/// Request `id` of the decoupled model, to be answered `count` times.
fn many(id: u64, count: i64) -> ModelInferRequest {
    let mut request = ModelInferRequest { model_name: "many".into(), id: id.to_string(), ..Default::default() };
    request.parameters.insert("count".into(), parameters::int64_parameter(count));
    request
}

/// The same request, whose answer may overtake others.
fn unordered(mut request: ModelInferRequest) -> ModelInferRequest {
    request.parameters.insert("cresset_unordered".into(), parameters::bool_parameter(true));
    request
}

fn last(mut request: ModelInferRequest) -> ModelInferRequest {
    request.parameters.insert("sequence_end".into(), parameters::bool_parameter(true));
    request
}
