//! Fields that this worker refuses, and fields that it passes over with a word in the log.
use cresset_proto::inference::{ModelConfig, model_config::SchedulingChoice};

use super::{ContractError, refuse};

/// What a configuration may ask for and this worker doesn't do. Each of them changes what a caller gets, so none may be
/// passed over in silence.
pub(super) fn refuse_unserved(config: &ModelConfig) -> Result<(), ContractError> {
    if matches!(config.scheduling_choice, Some(SchedulingChoice::EnsembleScheduling(_))) {
        return refuse("ensemble_scheduling isn't served: call the models one after the other, or trace them into one");
    }
    if let Some(SchedulingChoice::SequenceBatching(settings)) = &config.scheduling_choice
        && settings.iterative_sequence
    {
        return refuse("sequence_batching.iterative_sequence isn't served: a decoupled model's `next` does the same");
    }
    if config.model_operations.as_ref().is_some_and(|operations| !operations.op_library_filename.is_empty()) {
        return refuse("model_operations.op_library_filename isn't served: custom operators can't be loaded");
    }
    if config.model_repository_agents.as_ref().is_some_and(|agents| !agents.agents.is_empty()) {
        return refuse("model_repository_agents isn't served: put the finished files into the repository");
    }
    for input in &config.input {
        let flags = [(input.is_shape_tensor, "is_shape_tensor"), (input.is_non_linear_format_io, "is_non_linear_format_io")];
        if let Some((_, field)) = flags.iter().find(|(set, _)| *set) {
            return refuse(format!("{field} of input '{}' isn't served: libtorch has no such tensors", input.name));
        }
    }
    for output in &config.output {
        let flags = [(output.is_shape_tensor, "is_shape_tensor"), (output.is_non_linear_format_io, "is_non_linear_format_io")];
        if let Some((_, field)) = flags.iter().find(|(set, _)| *set) {
            return refuse(format!("{field} of output '{}' isn't served: libtorch has no such tensors", output.name));
        }
    }
    Ok(())
}

/// Fields that change at most how fast an answer comes, or what a dashboard shows.
pub(super) fn ignored(config: &ModelConfig) -> Vec<String> {
    let mut ignored: Vec<String> = [
        (config.optimization.is_some(), "optimization"),
        (config.response_cache.as_ref().is_some_and(|cache| cache.enable), "response_cache"),
        (!config.metric_tags.is_empty(), "metric_tags"),
        (config.model_metrics.is_some(), "model_metrics"),
        (!config.cc_model_filenames.is_empty(), "cc_model_filenames"),
        (!config.runtime.is_empty(), "runtime"),
        (config.input.iter().any(|input| input.format != 0), "input.format"),
    ]
    .into_iter()
    .filter(|(set, _)| *set)
    .map(|(_, field)| field.to_owned())
    .collect();
    for group in &config.instance_group {
        for (set, field) in [
            (group.rate_limiter.is_some(), "rate_limiter"),
            (!group.profile.is_empty(), "profile"),
            (!group.host_policy.is_empty(), "host_policy"),
        ] {
            if set {
                ignored.push(format!("instance_group.{field}"));
            }
        }
    }
    if let Some(SchedulingChoice::SequenceBatching(settings)) = &config.scheduling_choice {
        for state in &settings.state {
            for (set, field) in [
                (state.use_same_buffer_for_input_output, "use_same_buffer_for_input_output"),
                (state.use_growable_memory, "use_growable_memory"),
            ] {
                if set {
                    ignored.push(format!("sequence_batching.state.{field}"));
                }
            }
        }
    }
    ignored.dedup();
    ignored
}
