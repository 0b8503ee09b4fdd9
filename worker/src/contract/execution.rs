//! The parameters that say how calls run: how long one may take, and on how many threads.
use std::{ops::RangeInclusive, str::FromStr};

use super::{Contract, ContractError, refuse};

/// The parameter that bounds a call's time, in ms.
const EXECUTION_MAX: &str = "cresset.max_execution_ms";
/// Its largest value: an hour.
const EXECUTION_MS_MAX: u64 = 3_600_000;
/// Threads inside one operation; the name is that of Triton's backend for PyTorch.
const INTRA_OP_THREADS: &str = "INTRA_OP_THREAD_COUNT";
/// Most of them.
const INTRA_OP_THREADS_MAX: u64 = 1_024;

impl Contract {
    /// How long one call may run, in ms; 0 for any time, `None` if the configuration doesn't say.
    pub fn execution_max_ms(&self) -> Option<u64> {
        self.number(EXECUTION_MAX)
    }

    /// How many threads compute inside one operation on a processor: what the configuration says, else what each instance gets of
    /// the worker's `threads`.
    pub fn intra_op_threads(&self, threads: u16) -> u16 {
        let instances = u16::try_from(self.instances_total()).unwrap_or(u16::MAX);
        self.number(INTRA_OP_THREADS).unwrap_or_else(|| (threads / instances).max(1))
    }

    pub(super) fn execution_is_right(&self) -> Result<(), ContractError> {
        self.is_within(EXECUTION_MAX, 0..=EXECUTION_MS_MAX, " (no limit)")?;
        self.is_within(INTRA_OP_THREADS, 1..=INTRA_OP_THREADS_MAX, "")
    }

    fn number<T: FromStr>(&self, key: &str) -> Option<T> {
        self.parameters.get(key)?.trim().parse().ok()
    }

    /// Whether a parameter is a number between these limits, or isn't there; `least` says what its least value means.
    fn is_within(&self, key: &str, limits: RangeInclusive<u64>, least: &str) -> Result<(), ContractError> {
        match self.parameters.get(key) {
            Some(text) if self.number(key).is_none_or(|number| !limits.contains(&number)) => {
                let (from, to) = (limits.start(), limits.end());
                refuse(format!("parameter '{key}' is '{text}', it must be from {from}{least} to {to}"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use cresset_proto::{inference::ModelParameter, model_config::parse_pbtxt};

    use super::*;

    fn with(key: &str, value: &str, instances: i32) -> Result<Contract, ContractError> {
        let text = format!(
            "name: \"m\" backend: \"pytorch\" instance_group {{ count: {instances} kind: KIND_CPU }} \
             input {{ name: \"x\" data_type: TYPE_FP32 dims: [ 1 ] }} output {{ name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] }}"
        );
        let mut config = parse_pbtxt(&text).unwrap();
        config.parameters.insert(key.to_owned(), ModelParameter { string_value: value.to_owned() });
        Contract::read(&config)
    }

    #[test]
    fn instances_share_the_threads_unless_the_configuration_says_how_many_each_has() {
        assert_eq!(with("other", "", 1).unwrap().intra_op_threads(8), 8);
        assert_eq!(with("other", "", 3).unwrap().intra_op_threads(8), 2);
        assert_eq!(with("other", "", 20).unwrap().intra_op_threads(8), 1);
        assert_eq!(with(INTRA_OP_THREADS, " 5 ", 20).unwrap().intra_op_threads(8), 5);
    }

    #[test]
    fn numbers_that_are_none_are_refused_with_their_limits() {
        for value in ["0", "1025", "many", "-1", ""] {
            let refused = with(INTRA_OP_THREADS, value, 1).unwrap_err().to_string();
            assert!(refused.contains(&format!("'INTRA_OP_THREAD_COUNT' is '{value}', it must be from 1 to 1024")), "{refused}");
        }
        let refused = with(EXECUTION_MAX, "3600001", 1).unwrap_err().to_string();
        assert!(refused.contains("from 0 (no limit) to 3600000"), "{refused}");
        assert_eq!(with(EXECUTION_MAX, "0", 1).unwrap().execution_max_ms(), Some(0));
    }
}
