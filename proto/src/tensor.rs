//! Tensors on the wire: datatypes, and the way from a request to row-major little-endian bytes and back.
//!
//! A request brings each tensor raw (`raw_input_contents`, one entry for each input, used without a copy), typed
//! (`contents`), or in shared memory, and then it has no raw entry. Answers are always raw, since that is what Triton's
//! clients read.
use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    answers::NO_SHARED_MEMORY,
    inference::{DataType, InferTensorContents, ModelInferRequest, ModelInferResponse, model_infer_response::InferOutputTensor},
    reason::Reason,
    shared_memory::{Reference, SharedMemoryError},
};

/// The highest rank of a tensor that is accepted.
pub const RANK_MAX: usize = 16;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Fp32,
    Fp64,
    Bytes,
    Bf16,
}

impl Datatype {
    /// Every datatype.
    pub const ALL: [Datatype; 14] = [
        Self::Bool,
        Self::Uint8,
        Self::Uint16,
        Self::Uint32,
        Self::Uint64,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Fp16,
        Self::Fp32,
        Self::Fp64,
        Self::Bytes,
        Self::Bf16,
    ];

    /// The word on the wire, as in `"FP32"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
            Self::Bf16 => "BF16",
        }
    }

    /// Reads the word on the wire.
    pub fn from_wire(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|datatype| datatype.as_str() == word)
    }

    /// Reads a `config.pbtxt` data type; `None` for `TYPE_INVALID`.
    pub const fn from_config(data_type: DataType) -> Option<Self> {
        Some(match data_type {
            DataType::TypeInvalid => return None,
            DataType::TypeBool => Self::Bool,
            DataType::TypeUint8 => Self::Uint8,
            DataType::TypeUint16 => Self::Uint16,
            DataType::TypeUint32 => Self::Uint32,
            DataType::TypeUint64 => Self::Uint64,
            DataType::TypeInt8 => Self::Int8,
            DataType::TypeInt16 => Self::Int16,
            DataType::TypeInt32 => Self::Int32,
            DataType::TypeInt64 => Self::Int64,
            DataType::TypeFp16 => Self::Fp16,
            DataType::TypeFp32 => Self::Fp32,
            DataType::TypeFp64 => Self::Fp64,
            DataType::TypeString => Self::Bytes,
            DataType::TypeBf16 => Self::Bf16,
        })
    }

    /// Bytes of one element; `None` for BYTES, whose elements vary.
    pub const fn size(self) -> Option<usize> {
        match self {
            Self::Bool | Self::Uint8 | Self::Int8 => Some(1),
            Self::Uint16 | Self::Int16 | Self::Fp16 | Self::Bf16 => Some(2),
            Self::Uint32 | Self::Int32 | Self::Fp32 => Some(4),
            Self::Uint64 | Self::Int64 | Self::Fp64 => Some(8),
            Self::Bytes => None,
        }
    }
}

impl std::fmt::Display for Datatype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A named tensor: its elements are row-major and little-endian; BYTES elements carry a 4-byte length each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// The name in the model's configuration.
    pub name: String,
    /// The type of its elements.
    pub datatype: Datatype,
    /// Its dimensions, the batch first where the model has one. No entry is negative.
    pub shape: Vec<i64>,
    /// The elements.
    pub data: Bytes,
}

/// How many bytes the largest element of a fixed size takes.
const DATATYPE_BYTES_MAX: usize = 8;

/// What is wrong with a tensor of a request. Each message names the input and the model, in Triton's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum TensorError {
    #[error("invalid datatype '{datatype}' for input '{input}' for model '{model}'")]
    UnknownDatatype { input: String, model: String, datatype: String },
    #[error("input '{input}' for model '{model}' has {rank} dimensions, the limit is {RANK_MAX}")]
    Rank { input: String, model: String, rank: usize },
    #[error("input '{input}' for model '{model}' has a negative dimension in its shape {shape:?}")]
    NegativeDimension { input: String, model: String, shape: Vec<i64> },
    #[error("input '{input}' for model '{model}' has a shape with too many elements: {shape:?}")]
    Overflow { input: String, model: String, shape: Vec<i64> },
    #[error("contents field must not be specified when using raw_input_contents for '{input}' for model '{model}'")]
    Mixed { input: String, model: String },
    #[error("unable to find data for input tensor '{input}' for model '{model}' in request")]
    NoData { input: String, model: String },
    #[error("input byte size mismatch for input '{input}' for model '{model}'. Expected {expected}, got {got}")]
    ByteCount { input: String, model: String, expected: usize, got: usize },
    #[error("{datatype} tensor '{input}' for model '{model}' must be sent in raw_input_contents, there is no typed field for it")]
    RawOnly { input: String, model: String, datatype: Datatype },
    #[error("input '{input}' for model '{model}' must use the field '{field}' of contents for datatype {datatype}, and no other")]
    WrongField { input: String, model: String, datatype: Datatype, field: &'static str },
    #[error("input '{input}' for model '{model}' has a value out of the range of {datatype}")]
    OutOfRange { input: String, model: String, datatype: Datatype },
    #[error(
        "incomplete string data for inference input '{input}' for model '{model}', \
         expecting string of length {expected} but only {got} bytes available"
    )]
    IncompleteString { input: String, model: String, expected: usize, got: usize },
    #[error("unexpected number of string elements {got} for inference input '{input}' for model '{model}', expecting {expected}")]
    StringCount { input: String, model: String, expected: usize, got: usize },
    #[error("unexpected 'content' provided when using shared memory for input tensor '{input}' for model '{model}'")]
    SharedAndContents { input: String, model: String },
    #[error(transparent)]
    SharedMemory(#[from] SharedMemoryError),
}

impl TensorError {
    /// The reason to refuse the request with.
    pub fn reason(&self) -> Reason {
        match self {
            Self::SharedMemory(error) => error.reason(),
            _ => Reason::InvalidArgument,
        }
    }
}

/// Where the bytes of tensors in shared memory come from.
pub type Resolve<'a> = dyn Fn(&Reference) -> Result<Bytes, SharedMemoryError> + 'a;

/// Elements of a shape, or `None` where they can't be counted or a dimension is negative.
pub fn element_count(shape: &[i64]) -> Option<usize> {
    shape.iter().try_fold(1usize, |count, dim| count.checked_mul(usize::try_from(*dim).ok()?))
}

/// Takes the input tensors out of a request, raw or typed, with every count checked.
///
/// # Errors
/// [`TensorError`], which is always the caller's fault.
pub fn take_inputs(request: &mut ModelInferRequest) -> Result<Vec<Tensor>, TensorError> {
    take_inputs_from(request, &|_| Err(SharedMemoryError::NotServed(NO_SHARED_MEMORY)))
}

/// As [`take_inputs`], with tensors in shared memory from where `resolve` finds them.
///
/// # Errors
/// [`TensorError`]; but for a region that failed it is the caller's fault.
pub fn take_inputs_from(request: &mut ModelInferRequest, resolve: &Resolve<'_>) -> Result<Vec<Tensor>, TensorError> {
    let model = std::mem::take(&mut request.model_name);
    let result = inputs_of(request, &model, resolve);
    request.model_name = model;
    result
}

fn inputs_of(request: &mut ModelInferRequest, model: &str, resolve: &Resolve<'_>) -> Result<Vec<Tensor>, TensorError> {
    let raw = std::mem::take(&mut request.raw_input_contents);
    let is_raw = !raw.is_empty();
    let mut raw = raw.into_iter();
    let mut tensors = Vec::with_capacity(request.inputs.len());
    for input in request.inputs.drain(..) {
        let at = Place { input: &input.name, model };
        let datatype = Datatype::from_wire(&input.datatype).ok_or_else(|| TensorError::UnknownDatatype {
            input: input.name.clone(),
            model: model.to_owned(),
            datatype: input.datatype.chars().take(32).collect(),
        })?;
        let elements = at.elements(&input.shape)?;
        let shared = Reference::read(&input.parameters, &input.name)?;
        let data = match (shared, is_raw, input.contents) {
            (Some(_), _, Some(contents)) if has_any(&contents) => return Err(at.shared_and_contents()),
            (Some(reference), ..) => at.shared(datatype, elements, &reference, resolve)?,
            (None, true, Some(contents)) if has_any(&contents) => return Err(at.mixed()),
            (None, true, _) => at.raw(datatype, elements, raw.next().ok_or_else(|| at.no_data())?)?,
            (None, false, Some(contents)) => at.typed(datatype, elements, contents)?,
            (None, false, None) if elements == 0 => Bytes::new(),
            (None, false, None) => return Err(at.no_data()),
        };
        tensors.push(Tensor { name: input.name, datatype, shape: input.shape, data });
    }
    Ok(tensors)
}

/// Where a tensor stands, for messages.
struct Place<'a> {
    input: &'a str,
    model: &'a str,
}

impl Place<'_> {
    fn names(&self) -> (String, String) {
        (self.input.to_owned(), self.model.to_owned())
    }

    fn mixed(&self) -> TensorError {
        let (input, model) = self.names();
        TensorError::Mixed { input, model }
    }

    fn shared_and_contents(&self) -> TensorError {
        let (input, model) = self.names();
        TensorError::SharedAndContents { input, model }
    }

    fn no_data(&self) -> TensorError {
        let (input, model) = self.names();
        TensorError::NoData { input, model }
    }

    fn elements(&self, shape: &[i64]) -> Result<usize, TensorError> {
        if shape.len() > RANK_MAX {
            let (input, model) = self.names();
            return Err(TensorError::Rank { input, model, rank: shape.len() });
        }
        if shape.iter().any(|dim| *dim < 0) {
            let (input, model) = self.names();
            return Err(TensorError::NegativeDimension { input, model, shape: shape.to_vec() });
        }
        // As bytes too, whatever the datatype.
        element_count(shape).filter(|count| count.checked_mul(DATATYPE_BYTES_MAX).is_some()).ok_or_else(|| {
            let (input, model) = self.names();
            TensorError::Overflow { input, model, shape: shape.to_vec() }
        })
    }

    /// What a place in shared memory holds, which is read only if its size is right.
    fn shared(
        &self,
        datatype: Datatype,
        elements: usize,
        reference: &Reference,
        resolve: &Resolve<'_>,
    ) -> Result<Bytes, TensorError> {
        if let Some(size) = datatype.size() {
            self.byte_count(elements, size, usize::try_from(reference.byte_size).unwrap_or(usize::MAX))?;
        }
        self.raw(datatype, elements, resolve(reference)?)
    }

    fn raw(&self, datatype: Datatype, elements: usize, data: Bytes) -> Result<Bytes, TensorError> {
        match datatype.size() {
            Some(size) => self.byte_count(elements, size, data.len())?,
            None => self.string_elements(elements, &data)?,
        }
        Ok(data)
    }

    fn byte_count(&self, elements: usize, size: usize, got: usize) -> Result<(), TensorError> {
        let expected = elements.saturating_mul(size);
        if expected == got {
            return Ok(());
        }
        let (input, model) = self.names();
        Err(TensorError::ByteCount { input, model, expected, got })
    }

    fn string_elements(&self, expected: usize, data: &[u8]) -> Result<(), TensorError> {
        let (mut rest, mut got) = (data, 0usize);
        let incomplete = |expected, got| {
            let (input, model) = self.names();
            TensorError::IncompleteString { input, model, expected, got }
        };
        while !rest.is_empty() {
            let (head, tail) = rest.split_first_chunk::<4>().ok_or_else(|| incomplete(4, rest.len()))?;
            let length = u32::from_le_bytes(*head) as usize;
            rest = tail.get(length..).ok_or_else(|| incomplete(length, tail.len()))?;
            got += 1;
        }
        if got == expected {
            return Ok(());
        }
        let (input, model) = self.names();
        Err(TensorError::StringCount { input, model, expected, got })
    }

    fn typed(&self, datatype: Datatype, elements: usize, contents: InferTensorContents) -> Result<Bytes, TensorError> {
        let field = field_of(datatype).ok_or_else(|| {
            let (input, model) = self.names();
            TensorError::RawOnly { input, model, datatype }
        })?;
        if filled_fields(&contents).any(|filled| filled != field) {
            let (input, model) = self.names();
            return Err(TensorError::WrongField { input, model, datatype, field });
        }
        let data = to_bytes(datatype, contents).ok_or_else(|| {
            let (input, model) = self.names();
            TensorError::OutOfRange { input, model, datatype }
        })?;
        self.raw(datatype, elements, data)
    }
}

fn has_any(contents: &InferTensorContents) -> bool {
    filled_fields(contents).next().is_some()
}

fn filled_fields(contents: &InferTensorContents) -> impl Iterator<Item = &'static str> {
    [
        (!contents.bool_contents.is_empty(), "bool_contents"),
        (!contents.int_contents.is_empty(), "int_contents"),
        (!contents.int64_contents.is_empty(), "int64_contents"),
        (!contents.uint_contents.is_empty(), "uint_contents"),
        (!contents.uint64_contents.is_empty(), "uint64_contents"),
        (!contents.fp32_contents.is_empty(), "fp32_contents"),
        (!contents.fp64_contents.is_empty(), "fp64_contents"),
        (!contents.bytes_contents.is_empty(), "bytes_contents"),
    ]
    .into_iter()
    .filter_map(|(filled, name)| filled.then_some(name))
}

fn field_of(datatype: Datatype) -> Option<&'static str> {
    Some(match datatype {
        Datatype::Bool => "bool_contents",
        Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 => "uint_contents",
        Datatype::Uint64 => "uint64_contents",
        Datatype::Int8 | Datatype::Int16 | Datatype::Int32 => "int_contents",
        Datatype::Int64 => "int64_contents",
        Datatype::Fp32 => "fp32_contents",
        Datatype::Fp64 => "fp64_contents",
        Datatype::Bytes => "bytes_contents",
        Datatype::Fp16 | Datatype::Bf16 => return None,
    })
}

/// Little-endian bytes of typed contents; `None` where a value doesn't fit its datatype.
fn to_bytes(datatype: Datatype, contents: InferTensorContents) -> Option<Bytes> {
    fn narrow<T, const N: usize>(values: &[T], narrow: impl Fn(&T) -> Option<[u8; N]>) -> Option<Bytes> {
        let mut out = Vec::with_capacity(values.len().checked_mul(N)?);
        for value in values {
            out.extend_from_slice(&narrow(value)?);
        }
        Some(out.into())
    }
    match datatype {
        Datatype::Bool => narrow(&contents.bool_contents, |v| Some([u8::from(*v)])),
        Datatype::Uint8 => narrow(&contents.uint_contents, |v| u8::try_from(*v).ok().map(u8::to_le_bytes)),
        Datatype::Uint16 => narrow(&contents.uint_contents, |v| u16::try_from(*v).ok().map(u16::to_le_bytes)),
        Datatype::Uint32 => narrow(&contents.uint_contents, |v| Some(v.to_le_bytes())),
        Datatype::Uint64 => narrow(&contents.uint64_contents, |v| Some(v.to_le_bytes())),
        Datatype::Int8 => narrow(&contents.int_contents, |v| i8::try_from(*v).ok().map(i8::to_le_bytes)),
        Datatype::Int16 => narrow(&contents.int_contents, |v| i16::try_from(*v).ok().map(i16::to_le_bytes)),
        Datatype::Int32 => narrow(&contents.int_contents, |v| Some(v.to_le_bytes())),
        Datatype::Int64 => narrow(&contents.int64_contents, |v| Some(v.to_le_bytes())),
        Datatype::Fp32 => narrow(&contents.fp32_contents, |v| Some(v.to_le_bytes())),
        Datatype::Fp64 => narrow(&contents.fp64_contents, |v| Some(v.to_le_bytes())),
        Datatype::Bytes => {
            let mut out = BytesMut::new();
            for element in &contents.bytes_contents {
                out.put_u32_le(u32::try_from(element.len()).ok()?);
                out.put_slice(element);
            }
            Some(out.freeze())
        }
        Datatype::Fp16 | Datatype::Bf16 => None,
    }
}

/// Adds an output to a response, raw.
pub fn push_output(response: &mut ModelInferResponse, tensor: Tensor) {
    response.outputs.push(InferOutputTensor {
        name: tensor.name,
        datatype: tensor.datatype.as_str().to_owned(),
        shape: tensor.shape,
        ..Default::default()
    });
    response.raw_output_contents.push(tensor.data);
}

/// Adds an input to a request, raw.
pub fn push_input(request: &mut ModelInferRequest, tensor: Tensor) {
    request.inputs.push(crate::inference::model_infer_request::InferInputTensor {
        name: tensor.name,
        datatype: tensor.datatype.as_str().to_owned(),
        shape: tensor.shape,
        ..Default::default()
    });
    request.raw_input_contents.push(tensor.data);
}

/// Reads the outputs of a response; `None` if it isn't well formed (one raw entry for each output, known datatypes).
pub fn outputs(response: &ModelInferResponse) -> Option<Vec<Tensor>> {
    if response.outputs.len() != response.raw_output_contents.len() {
        return None;
    }
    response
        .outputs
        .iter()
        .zip(&response.raw_output_contents)
        .map(|(output, data)| {
            let datatype = Datatype::from_wire(&output.datatype)?;
            Some(Tensor { name: output.name.clone(), datatype, shape: output.shape.clone(), data: data.clone() })
        })
        .collect()
}

#[cfg(test)]
mod tests;
