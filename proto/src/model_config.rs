//! `config.pbtxt`: from text to [`ModelConfig`], and the few questions that several processes ask of one.
use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

use crate::{
    DESCRIPTORS,
    inference::{
        DataType, ModelConfig, ModelMetadataResponse, ModelSequenceBatching, model_config::SchedulingChoice,
        model_metadata_response::TensorMetadata,
    },
    tensor::Datatype,
};

/// Prefix of a `parameters` entry that gives `forward` a constant scalar argument: `cresset.scalar.sr` = `int:16000`.
pub const SCALAR_PREFIX: &str = "cresset.scalar.";
/// How long a sequence may be idle, in µs, unless its configuration says otherwise.
pub const SEQUENCE_IDLE_US_DEFAULT: u64 = 1_000_000;
/// The largest `config.pbtxt` that is read, in bytes.
pub const PBTXT_BYTES_MAX: usize = 1 << 20;

/// A text that isn't a model configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {message}")]
pub struct PbtxtError {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What is wrong there.
    pub message: String,
}

static MODEL_CONFIG: LazyLock<Option<MessageDescriptor>> =
    LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).ok()?.get_message_by_name("inference.ModelConfig"));

/// Reads protobuf text format.
///
/// # Errors
/// [`PbtxtError`] with the place of the first fault.
pub fn parse_pbtxt(text: &str) -> Result<ModelConfig, PbtxtError> {
    let whole = |message: String| PbtxtError { line: 1, column: 1, message };
    if text.len() > PBTXT_BYTES_MAX {
        return Err(whole(format!("the file has {} bytes, the limit is {PBTXT_BYTES_MAX}", text.len())));
    }
    let descriptor = MODEL_CONFIG.clone().ok_or_else(|| whole("the built-in description of ModelConfig is broken".into()))?;
    let colons = missing_colons(text);
    let mut complete = text.to_owned();
    for offset in colons.iter().rev() {
        complete.insert(*offset, ':');
    }
    let message = DynamicMessage::parse_text_format(descriptor, &complete).map_err(|error| locate(text, &colons, &error))?;
    ModelConfig::decode(message.encode_to_vec().as_slice()).map_err(|error| whole(error.to_string()))
}

/// Byte offsets of each `[` that follows a field's name directly, as in `input [ { … } ]`. Text format allows to leave the
/// colon out before a list of messages, every published `config.pbtxt` does so, and the library insists on it.
fn missing_colons(text: &str) -> Vec<usize> {
    let mut offsets = Vec::new();
    let mut after_name = false;
    let mut chars = text.char_indices();
    while let Some((offset, c)) = chars.next() {
        match c {
            '#' => {
                chars.by_ref().find(|(_, c)| *c == '\n');
            }
            '"' | '\'' => {
                after_name = false;
                while let Some((_, inner)) = chars.next() {
                    match inner {
                        '\\' => drop(chars.next()),
                        end if end == c => break,
                        _ => {}
                    }
                }
            }
            '[' if after_name => {
                offsets.push(offset);
                after_name = false;
            }
            c if c.is_whitespace() => {}
            c => after_name = c.is_alphanumeric() || c == '_',
        }
    }
    offsets
}

fn locate(text: &str, colons: &[usize], error: &prost_reflect::text_format::ParseError) -> PbtxtError {
    // The library tells the place only through the labels of its diagnostics; an unexpected end has none.
    let label = miette::Diagnostic::labels(error).and_then(|mut labels| labels.next());
    let offset = label.map_or(text.len() + colons.len(), |label| label.offset());
    // Back to an offset in the text as its author wrote it.
    let added = colons.iter().enumerate().filter(|(before, colon)| **colon + before < offset).count();
    let offset = offset.saturating_sub(added).min(text.len());
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |last| last.chars().count()) + 1;
    PbtxtError { line, column, message: error.to_string() }
}

/// The sequence settings, if requests to this model share state.
pub fn sequence_batching(config: &ModelConfig) -> Option<&ModelSequenceBatching> {
    match &config.scheduling_choice {
        Some(SchedulingChoice::SequenceBatching(settings)) => Some(settings),
        _ => None,
    }
}

/// How long a sequence of this model may be idle, in µs.
pub fn sequence_idle_us(config: &ModelConfig) -> u64 {
    match sequence_batching(config).map(|settings| settings.max_sequence_idle_microseconds) {
        None | Some(0) => SEQUENCE_IDLE_US_DEFAULT,
        Some(idle) => idle,
    }
}

/// Whether one request can have several responses.
pub fn is_decoupled(config: &ModelConfig) -> bool {
    config.model_transaction_policy.as_ref().is_some_and(|policy| policy.decoupled)
}

/// What `ModelMetadata` answers for a model with this configuration.
pub fn metadata(config: &ModelConfig, versions: Vec<String>) -> ModelMetadataResponse {
    let tensor = |name: &str, data_type: i32, dims: &[i64]| {
        let datatype = DataType::try_from(data_type).ok().and_then(Datatype::from_config);
        let batch = (config.max_batch_size > 0).then_some(-1);
        TensorMetadata {
            name: name.to_owned(),
            datatype: datatype.map(Datatype::as_str).unwrap_or_default().to_owned(),
            shape: batch.into_iter().chain(dims.iter().copied()).collect(),
        }
    };
    ModelMetadataResponse {
        name: config.name.clone(),
        versions,
        platform: if config.platform.is_empty() { "pytorch_libtorch".to_owned() } else { config.platform.clone() },
        inputs: config.input.iter().map(|input| tensor(&input.name, input.data_type, &input.dims)).collect(),
        outputs: config.output.iter().map(|output| tensor(&output.name, output.data_type, &output.dims)).collect(),
        properties: [("backend".to_owned(), "pytorch".to_owned())].into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIMPLE: &str = r#"
name: "simple"
platform: "pytorch_libtorch"
max_batch_size: 8
input [ { name: "INPUT__0" data_type: TYPE_FP32 dims: [ -1, 16 ] } ]
output [ { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ 16 ] } ]
sequence_batching { max_sequence_idle_microseconds: 5000000 }
parameters { key: "cresset.scalar.sr" value: { string_value: "int:16000" } }
"#;

    #[test]
    fn reads_text_format() {
        let config = parse_pbtxt(SIMPLE).unwrap();
        assert_eq!(config.max_batch_size, 8);
        assert_eq!(config.input[0].dims, [-1, 16]);
        assert_eq!(sequence_idle_us(&config), 5_000_000);
        assert_eq!(config.parameters["cresset.scalar.sr"].string_value, "int:16000");
        assert!(!is_decoupled(&config));
    }

    #[test]
    fn faults_have_a_place() {
        let error = parse_pbtxt("name: \"x\"\nmax_batch_sise: 8\n").unwrap_err();
        assert_eq!((error.line, error.column), (2, 1), "{error}");
        let error = parse_pbtxt("name: \"x\"\n  max_batch_size: \"eight\"\n").unwrap_err();
        assert_eq!(error.line, 2, "{error}");
        let error = parse_pbtxt("input [ { name: \"[x\" dims: [ 1 ] } ] outputt [ ]").unwrap_err();
        assert_eq!((error.line, error.column), (1, 38), "{error}");
        assert!(parse_pbtxt("name: \"unclosed").is_err());
        assert!(parse_pbtxt("# input [\nname: 'a [' ").is_ok());
    }
}
