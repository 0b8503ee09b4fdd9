//! `model_warmup`: calls to make before a model counts as ready.
use std::collections::BTreeMap;

use cresset_proto::{
    inference::{ModelConfig, ModelWarmup, model_warmup::input::InputDataType},
    tensor::{Datatype, element_count},
};

use super::{ContractError, datatype, refuse};

/// Most calls of one warm-up.
pub const WARM_UP_CALLS_MAX: u32 = 10_000;
/// The largest input that is made up, in bytes.
pub const WARM_UP_BYTES_MAX: usize = 1 << 30;

/// What the input of a warm-up call is filled with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filling {
    /// Zeros; empty strings.
    Zero,
    /// Random numbers; random short strings.
    Random,
    /// The content of this file in the model's `warmup` folder.
    File(String),
}

/// One input of a warm-up call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmUpInput {
    /// The type of its elements.
    pub datatype: Datatype,
    /// Its dimensions without the batch.
    pub dims: Vec<i64>,
    /// Its content.
    pub filling: Filling,
}

/// Equal calls to make before the model counts as ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmUp {
    /// Its name, for messages.
    pub name: String,
    /// Rows of the batch; 1 for a model without a batch dimension.
    pub rows: usize,
    /// Inputs by name.
    pub inputs: BTreeMap<String, WarmUpInput>,
    /// How many calls.
    pub count: u32,
}

pub(super) fn read(config: &ModelConfig, batch_rows_max: usize) -> Result<Vec<WarmUp>, ContractError> {
    config.model_warmup.iter().map(|settings| warm_up(config, settings, batch_rows_max)).collect()
}

fn warm_up(config: &ModelConfig, settings: &ModelWarmup, batch_rows_max: usize) -> Result<WarmUp, ContractError> {
    let name = &settings.name;
    let rows = settings.batch_size as usize;
    if rows > batch_rows_max.max(1) {
        return refuse(format!(
            "model_warmup '{name}' has the batch_size {rows}, the limit is max_batch_size ({batch_rows_max})"
        ));
    }
    if settings.count > WARM_UP_CALLS_MAX {
        return refuse(format!("model_warmup '{name}' has the count {}, the limit is {WARM_UP_CALLS_MAX}", settings.count));
    }
    let inputs = settings.inputs.iter().map(|(input, content)| {
        let field = format!("model_warmup '{name}': input");
        if !config.input.iter().any(|declared| declared.name == *input) {
            return refuse(format!("{field} '{input}' is not an input of the model"));
        }
        let datatype = datatype(&field, input, content.data_type)?;
        let bytes = element_count(&content.dims).and_then(|count| count.checked_mul(datatype.size().unwrap_or(8) * rows.max(1)));
        if bytes.is_none_or(|bytes| bytes > WARM_UP_BYTES_MAX) {
            return refuse(format!(
                "{field} '{input}' has the dims {:?}: all must be known, and {WARM_UP_BYTES_MAX} bytes are the limit",
                content.dims
            ));
        }
        let filling = match &content.input_data_type {
            Some(InputDataType::ZeroData(_)) => Filling::Zero,
            Some(InputDataType::RandomData(_)) => Filling::Random,
            Some(InputDataType::InputDataFile(file)) if is_file_name(file) => Filling::File(file.clone()),
            Some(InputDataType::InputDataFile(file)) => {
                return refuse(format!(
                    "{field} '{input}': input_data_file '{file}' must be the name of a file in the model's folder warmup"
                ));
            }
            None => return refuse(format!("{field} '{input}' needs zero_data, random_data or input_data_file")),
        };
        Ok((input.clone(), WarmUpInput { datatype, dims: content.dims.clone(), filling }))
    });
    let inputs = inputs.collect::<Result<BTreeMap<_, _>, _>>()?;
    if let Some(missing) = config.input.iter().find(|input| !input.optional && !inputs.contains_key(&input.name)) {
        return refuse(format!("model_warmup '{name}' has no input '{}'", missing.name));
    }
    Ok(WarmUp { name: name.clone(), rows: rows.max(1), inputs, count: settings.count.max(1) })
}

/// Whether this names a file in a folder and can't lead out of it.
pub(super) fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}
