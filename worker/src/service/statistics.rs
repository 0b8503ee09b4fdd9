//! `ModelStatistics` of this worker.
use cresset_proto::{
    answers,
    ids::model_version,
    inference::{MemoryUsage, ModelStatistics, ModelStatisticsResponse},
    reason::Reason,
};
use tonic::Status;

use crate::{engine::Device, models::ServedModel, predict::Worker};

impl Worker {
    /// What a model's served versions have done, or one of them, or all models if the name is empty; by name and version.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for what isn't served, as Triton has it.
    pub fn statistics(&self, name: &str, version: &str) -> Result<ModelStatisticsResponse, Status> {
        let wanted = if name.is_empty() { None } else { version_of(version)? };
        let mut served = self.models.served();
        served.retain(|model| name.is_empty() || model.key.model == name);
        if served.is_empty() && !name.is_empty() {
            return Err(answers::no_statistics(name, false));
        }
        served.retain(|model| wanted.is_none_or(|version| model.key.version == version));
        if served.is_empty() && !name.is_empty() {
            return Err(answers::no_statistics(name, true));
        }
        served.sort_by(|a, b| (&a.key.model, a.key.version).cmp(&(&b.key.model, b.key.version)));
        Ok(ModelStatisticsResponse { model_stats: served.iter().map(|model| statistics(model)).collect() })
    }
}

fn version_of(text: &str) -> Result<Option<u64>, Status> {
    model_version(text).map_err(|error| Reason::InvalidArgument.status(error.to_string()))
}

fn statistics(served: &ServedModel) -> ModelStatistics {
    let memory = served.devices.iter().map(|device| {
        let (kind, id) = match device {
            Device::Cpu => ("CPU", 0),
            Device::Cuda(ordinal) => ("GPU", i64::from(*ordinal)),
        };
        MemoryUsage { r#type: kind.into(), id, byte_size: served.memory_bytes }
    });
    served.metrics.statistics.snapshot(&served.key.model, served.key.version, memory.collect())
}
