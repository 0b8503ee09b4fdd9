//! Tensors that lie in shared memory: the parameters that name their place, and what can be wrong with them.
//!
//! Here is only what both ends of the wire must agree on. Regions themselves are a worker's business, since only a worker
//! shares a host with the client that made them.
use std::collections::HashMap;

use crate::{
    inference::{InferParameter, ModelInferRequest, infer_parameter::ParameterChoice},
    reason::Reason,
};

/// The region, by the name under which it was registered.
pub const REGION: &str = "shared_memory_region";
/// Where the tensor begins, in bytes from the region's start; 0 where absent.
pub const OFFSET: &str = "shared_memory_offset";
/// Bytes of the tensor; room for it, for an output.
pub const BYTE_SIZE: &str = "shared_memory_byte_size";

/// A tensor's place in shared memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The region's name.
    pub region: String,
    /// Bytes from the region's start.
    pub offset: u64,
    /// Bytes of the tensor, or room for it.
    pub byte_size: u64,
}

/// Why a tensor's place in shared memory can't be used, in Triton's words where it has some.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum SharedMemoryError {
    #[error("invalid value type for '{key}' parameter for tensor '{tensor}', expected {wanted}.")]
    Kind { tensor: String, key: &'static str, wanted: &'static str },
    #[error("'{BYTE_SIZE}' must be specified along with '{REGION}' parameter for tensor '{tensor}'")]
    NoByteSize { tensor: String },
    #[error("'{key}' can not be specified without '{REGION}' parameter for tensor '{tensor}'")]
    NoRegion { tensor: String, key: &'static str },
    #[error("Invalid offset for shared memory region: '{region}': it is {offset}, it must be 0 or more")]
    NegativeOffset { region: String, offset: i64 },
    #[error(
        "Invalid offset + byte size for shared memory region: '{region}': the byte size is {byte_size}, it must be 0 or more"
    )]
    NegativeByteSize { region: String, byte_size: i64 },
    #[error("Unable to find shared memory region: '{0}'")]
    UnknownRegion(String),
    #[error(
        "Invalid offset + byte size for shared memory region: '{region}': {byte_size} bytes from {offset} don't lie in its {region_bytes} bytes"
    )]
    OutsideRegion { region: String, offset: u64, byte_size: u64, region_bytes: u64 },
    #[error("the tensors of a request may take {bytes_max} bytes in shared memory together, with '{region}' they take more")]
    TooLarge { region: String, bytes_max: u64 },
    #[error(
        "shared memory size specified with the request for output '{output}' ({room} bytes) should be at least {needed} bytes to hold the results"
    )]
    NoRoom { output: String, room: u64, needed: u64 },
    #[error("shared memory region '{region}' can't be used: {text}; was its object removed or made smaller?")]
    Failed { region: String, text: String },
    #[error("{0}")]
    NotServed(&'static str),
}

impl SharedMemoryError {
    /// The reason to refuse the request with.
    pub fn reason(&self) -> Reason {
        // No `_` arm: a new variant has to choose.
        match self {
            Self::Kind { .. } | Self::NoByteSize { .. } | Self::NoRegion { .. } => Reason::InvalidArgument,
            Self::NegativeOffset { .. } | Self::NegativeByteSize { .. } | Self::OutsideRegion { .. } => Reason::InvalidArgument,
            // Triton says INTERNAL where an output has no room; it is the caller who can mend it.
            Self::TooLarge { .. } | Self::NoRoom { .. } => Reason::InvalidArgument,
            Self::UnknownRegion(_) => Reason::UnknownRegion,
            Self::Failed { .. } => Reason::RegionFailed,
            Self::NotServed(_) => Reason::Unsupported,
        }
    }
}

impl Reference {
    /// Reads the parameters of a tensor; `None` if it isn't in shared memory.
    ///
    /// # Errors
    /// [`SharedMemoryError`] names the parameter and the tensor.
    pub fn read(parameters: &HashMap<String, InferParameter>, tensor: &str) -> Result<Option<Self>, SharedMemoryError> {
        if parameters.is_empty() {
            return Ok(None);
        }
        let choice = |key: &str| parameters.get(key).map(|parameter| parameter.parameter_choice.as_ref());
        let kind = |key, wanted| SharedMemoryError::Kind { tensor: short(tensor), key, wanted };
        let number = |key| match choice(key) {
            None => Ok(None),
            Some(Some(ParameterChoice::Int64Param(number))) => Ok(Some(*number)),
            Some(_) => Err(kind(key, "int64_param")),
        };
        let region = match choice(REGION) {
            None => None,
            Some(Some(ParameterChoice::StringParam(region))) => Some(region),
            Some(_) => return Err(kind(REGION, "string_param")),
        };
        let (offset, byte_size) = (number(OFFSET)?, number(BYTE_SIZE)?);
        let Some(region) = region else {
            let stray = [(offset, OFFSET), (byte_size, BYTE_SIZE)].into_iter().find(|(number, _)| number.is_some());
            return match stray {
                Some((_, key)) => Err(SharedMemoryError::NoRegion { tensor: short(tensor), key }),
                None => Ok(None),
            };
        };
        let byte_size = byte_size.ok_or_else(|| SharedMemoryError::NoByteSize { tensor: short(tensor) })?;
        let offset = offset.unwrap_or(0);
        Ok(Some(Self {
            offset: offset.try_into().map_err(|_| SharedMemoryError::NegativeOffset { region: short(region), offset })?,
            byte_size: byte_size
                .try_into()
                .map_err(|_| SharedMemoryError::NegativeByteSize { region: short(region), byte_size })?,
            region: region.clone(),
        }))
    }
}

/// Whether any tensor of a request claims to be in shared memory, or wants to go there.
pub fn is_used(request: &ModelInferRequest) -> bool {
    let claims = |parameters: &HashMap<String, InferParameter>| {
        !parameters.is_empty() && [REGION, OFFSET, BYTE_SIZE].iter().any(|key| parameters.contains_key(*key))
    };
    request.inputs.iter().any(|input| claims(&input.parameters))
        || request.outputs.iter().any(|output| claims(&output.parameters))
}

/// A name from outside, short enough to be repeated in a message.
pub fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::{bool_parameter, int64_parameter, string_parameter};

    fn read(parameters: &[(&str, InferParameter)]) -> Result<Option<Reference>, String> {
        let parameters = parameters.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        Reference::read(&parameters, "x").map_err(|error| error.to_string())
    }

    #[test]
    fn a_reference_is_read_with_its_default_offset() {
        assert_eq!(read(&[("other", bool_parameter(true))]), Ok(None));
        let wanted = Reference { region: "r".into(), offset: 0, byte_size: 64 };
        assert_eq!(read(&[(REGION, string_parameter("r")), (BYTE_SIZE, int64_parameter(64))]), Ok(Some(wanted)));
        let whole = [(REGION, string_parameter("r")), (BYTE_SIZE, int64_parameter(64)), (OFFSET, int64_parameter(8))];
        assert_eq!(read(&whole).unwrap().unwrap().offset, 8);
    }

    #[test]
    fn faults_are_named_as_triton_names_them() {
        let (region, size) = ((REGION, string_parameter("r")), (BYTE_SIZE, int64_parameter(64)));
        for (parameters, words) in [
            (vec![region.clone()], "'shared_memory_byte_size' must be specified along with"),
            (vec![size.clone()], "'shared_memory_byte_size' can not be specified without 'shared_memory_region'"),
            (vec![(OFFSET, int64_parameter(1))], "'shared_memory_offset' can not be specified without"),
            (
                vec![(REGION, int64_parameter(1)), size.clone()],
                "invalid value type for 'shared_memory_region' parameter for tensor 'x', expected string_param.",
            ),
            (vec![region.clone(), (BYTE_SIZE, string_parameter("64"))], "expected int64_param."),
            (vec![region.clone(), size.clone(), (OFFSET, int64_parameter(-8))], "Invalid offset for shared memory region: 'r'"),
            (vec![region, (BYTE_SIZE, int64_parameter(-1))], "Invalid offset + byte size for shared memory region: 'r'"),
        ] {
            let error = read(&parameters).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
