//! How requests of a model wait: `dynamic_batching`, or what `sequence_batching` says of batches.
use std::collections::BTreeMap;

use cresset_proto::inference::{
    ModelConfig, ModelDynamicBatching, ModelQueuePolicy, model_config::SchedulingChoice, model_queue_policy,
    model_sequence_batching::StrategyChoice,
};

use super::{ContractError, refuse};

/// Most priority levels.
pub const PRIORITY_LEVELS_MAX: u64 = 1024;

/// What happens to a request that has waited for its policy's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimeoutAction {
    /// It is refused.
    #[default]
    Reject,
    /// It goes behind all requests of its level that have not.
    Delay,
}

/// How requests of one priority level wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueuePolicy {
    /// What happens when the time is over.
    pub action: TimeoutAction,
    /// The time, in µs; 0: no limit.
    pub timeout_us: u64,
    /// Whether a request's `timeout` may shorten it.
    pub allow_override: bool,
    /// Requests that may wait; 0: only the worker's own bound.
    pub requests_max: usize,
}

impl QueuePolicy {
    /// How long a request may wait that brought `requested_us`, in µs; `None`: no limit. As in Triton a request can only
    /// lower a limit that is there.
    pub fn timeout_us(&self, requested_us: u64) -> Option<u64> {
        let own = (self.timeout_us > 0).then_some(self.timeout_us)?;
        Some(if self.allow_override && requested_us > 0 { own.min(requested_us) } else { own })
    }
}

/// How requests of a model wait.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Queueing {
    /// Batches of these sizes are cut at once; ascending.
    pub preferred_rows: Vec<usize>,
    /// How long the oldest request may wait for a preferred or full batch, in µs.
    pub delay_us: u64,
    /// Answers leave in the order in which the requests came.
    pub preserve_ordering: bool,
    /// Number of priority levels; 0: there is only one.
    pub levels: u64,
    /// The level of requests that name none; 1 is the highest.
    pub level_default: u64,
    /// The policy of levels that have none of their own.
    pub policy_default: QueuePolicy,
    /// Policies by level.
    pub policies: BTreeMap<u64, QueuePolicy>,
}

impl Queueing {
    /// The level of a request with this `priority`: out of range means the default, as in Triton.
    pub fn level(&self, priority: u64) -> u64 {
        if priority == 0 || priority > self.levels { self.level_default } else { priority }
    }

    /// The policy of a level.
    pub fn policy(&self, level: u64) -> &QueuePolicy {
        self.policies.get(&level).unwrap_or(&self.policy_default)
    }
}

pub(super) fn read(config: &ModelConfig, batch_rows_max: usize) -> Result<Queueing, ContractError> {
    match &config.scheduling_choice {
        Some(SchedulingChoice::DynamicBatching(settings)) => dynamic(settings, batch_rows_max),
        Some(SchedulingChoice::SequenceBatching(settings)) => match &settings.strategy_choice {
            Some(StrategyChoice::Oldest(oldest)) => Ok(Queueing {
                preferred_rows: preferred("sequence_batching.oldest", &oldest.preferred_batch_size, batch_rows_max)?,
                delay_us: oldest.max_queue_delay_microseconds,
                preserve_ordering: oldest.preserve_ordering,
                ..Queueing::default()
            }),
            Some(StrategyChoice::Direct(direct)) => Ok(Queueing {
                delay_us: direct.max_queue_delay_microseconds,
                ..direct_slots(direct.minimum_slot_utilization, batch_rows_max)
            }),
            None => Ok(Queueing::default()),
        },
        _ => Ok(Queueing::default()),
    }
}

/// `minimum_slot_utilization`: a batch is cut at once when that share of the slots has a request.
fn direct_slots(utilization: f32, batch_rows_max: usize) -> Queueing {
    let rows = (f64::from(utilization.clamp(0.0, 1.0)) * batch_rows_max as f64).ceil() as usize;
    let preferred_rows = if rows == 0 { vec![] } else { (rows..=batch_rows_max).collect() };
    Queueing { preferred_rows, ..Queueing::default() }
}

fn dynamic(settings: &ModelDynamicBatching, batch_rows_max: usize) -> Result<Queueing, ContractError> {
    let field = "dynamic_batching";
    let levels = settings.priority_levels;
    if levels > PRIORITY_LEVELS_MAX {
        return refuse(format!("{field}.priority_levels is {levels}, the limit is {PRIORITY_LEVELS_MAX}"));
    }
    let level_default = settings.default_priority_level;
    if levels > 0 && !(1..=levels).contains(&level_default) {
        return refuse(format!(
            "{field}.default_priority_level is {level_default}, it must be from 1 to priority_levels ({levels})"
        ));
    }
    if let Some(level) = settings.priority_queue_policy.keys().find(|level| !(1..=levels).contains(level)) {
        return refuse(format!("{field}.priority_queue_policy names level {level}, levels are 1 to priority_levels ({levels})"));
    }
    Ok(Queueing {
        preferred_rows: preferred(field, &settings.preferred_batch_size, batch_rows_max)?,
        delay_us: settings.max_queue_delay_microseconds,
        preserve_ordering: settings.preserve_ordering,
        levels,
        level_default,
        policy_default: settings.default_queue_policy.as_ref().map(policy).unwrap_or_default(),
        policies: settings.priority_queue_policy.iter().map(|(level, settings)| (*level, policy(settings))).collect(),
    })
}

fn policy(settings: &ModelQueuePolicy) -> QueuePolicy {
    let delay = settings.timeout_action == model_queue_policy::TimeoutAction::Delay as i32;
    QueuePolicy {
        action: if delay { TimeoutAction::Delay } else { TimeoutAction::Reject },
        timeout_us: settings.default_timeout_microseconds,
        allow_override: settings.allow_timeout_override,
        requests_max: usize::try_from(settings.max_queue_size).unwrap_or(usize::MAX),
    }
}

fn preferred(field: &str, sizes: &[i32], batch_rows_max: usize) -> Result<Vec<usize>, ContractError> {
    let read = |size: &i32| match usize::try_from(*size) {
        Ok(rows) if (1..=batch_rows_max).contains(&rows) => Ok(rows),
        _ => refuse(format!("{field}.preferred_batch_size is {size}, it must be from 1 to max_batch_size ({batch_rows_max})")),
    };
    let mut rows = sizes.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    rows.sort_unstable();
    rows.dedup();
    Ok(rows)
}
