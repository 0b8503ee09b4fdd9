//! `config.pbtxt`: from text to [`ModelConfig`], and the few questions that several processes ask of one.
use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

use crate::{
    DESCRIPTORS,
    inference::{
        DataType, ModelConfig, ModelInstanceGroup, ModelMetadataResponse, ModelSequenceBatching, ModelVersionPolicy,
        model_config::SchedulingChoice, model_instance_group::Kind, model_metadata_response::TensorMetadata,
        model_optimization_policy::PinnedMemoryBuffer, model_sequence_batching::StrategyChoice, model_version_policy,
    },
    tensor::Datatype,
};

/// Prefix of a `parameters` entry that gives `forward` a constant scalar argument: `cresset.scalar.sr` = `int:16000`.
pub const SCALAR_PREFIX: &str = "cresset.scalar.";
/// The platform of a model that names none.
pub const PLATFORM: &str = "pytorch_libtorch";
/// The backend of that platform.
pub const BACKEND: &str = "pytorch";
/// The model's file where its configuration names none.
pub const MODEL_FILENAME: &str = "model.pt";
/// The platform of packages that AOTInductor compiled.
pub const PACKAGE_PLATFORM: &str = "torch_aoti";
/// A package's file where its configuration names none.
pub const PACKAGE_FILENAME: &str = "model.pt2";
/// The platform, and the backend, of models that answer without a model.
pub const NULL_PLATFORM: &str = "null";
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

/// Reads protobuf's JSON form, as Triton's clients give a configuration.
///
/// # Errors
/// What is wrong, with the place.
pub fn parse_json(text: &str) -> Result<ModelConfig, String> {
    if text.len() > PBTXT_BYTES_MAX {
        return Err(format!("it has {} bytes, the limit is {PBTXT_BYTES_MAX}", text.len()));
    }
    let descriptor = MODEL_CONFIG.clone().ok_or("the built-in description of ModelConfig is broken")?;
    let mut json = serde_json::Deserializer::from_str(text);
    let message = DynamicMessage::deserialize(descriptor, &mut json).map_err(|error| error.to_string())?;
    json.end().map_err(|error| error.to_string())?;
    ModelConfig::decode(message.encode_to_vec().as_slice()).map_err(|error| error.to_string())
}

/// Whether this is a model of the null engine.
pub fn is_null(config: &ModelConfig) -> bool {
    config.platform == NULL_PLATFORM || (config.platform.is_empty() && config.backend == NULL_PLATFORM)
}

/// The file that holds the model; `None` for the null engine, which has no need of one.
pub fn model_filename(config: &ModelConfig) -> Option<&str> {
    match config.default_model_filename.as_str() {
        _ if is_null(config) => None,
        "" if config.platform == PACKAGE_PLATFORM => Some(PACKAGE_FILENAME),
        "" => Some(MODEL_FILENAME),
        name => Some(name),
    }
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
        platform: platform_of(config).to_owned(),
        inputs: config.input.iter().map(|input| tensor(&input.name, input.data_type, &input.dims)).collect(),
        outputs: config.output.iter().map(|output| tensor(&output.name, output.data_type, &output.dims)).collect(),
        properties: [("backend".to_owned(), if is_null(config) { NULL_PLATFORM } else { BACKEND }.to_owned())].into(),
    }
}

/// The platform, which a configuration may leave to its default.
pub fn platform_of(config: &ModelConfig) -> &str {
    match config.platform.as_str() {
        "" if is_null(config) => NULL_PLATFORM,
        "" => PLATFORM,
        platform => platform,
    }
}

/// What `ModelConfig` answers: the configuration with its defaults filled in, those that Triton fills in (measured on 2.51).
/// `gpus` are the ordinals of the GPUs where the model runs; without any it runs on the CPU.
pub fn effective(config: &ModelConfig, gpus: &[i32]) -> ModelConfig {
    let mut config = config.clone();
    platform(&mut config);
    if config.version_policy.as_ref().is_none_or(|policy| policy.policy_choice.is_none()) {
        let latest = model_version_policy::Latest { num_versions: 1 };
        config.version_policy =
            Some(ModelVersionPolicy { policy_choice: Some(model_version_policy::PolicyChoice::Latest(latest)) });
    }
    instance_groups(&mut config, gpus);
    let optimization = config.optimization.get_or_insert_default();
    optimization.input_pinned_memory.get_or_insert(PinnedMemoryBuffer { enable: true });
    optimization.output_pinned_memory.get_or_insert(PinnedMemoryBuffer { enable: true });
    let prefer_full = |preferred: &mut Vec<i32>| {
        if preferred.is_empty() && config.max_batch_size > 0 {
            preferred.push(config.max_batch_size);
        }
    };
    match &mut config.scheduling_choice {
        Some(SchedulingChoice::DynamicBatching(batching)) => prefer_full(&mut batching.preferred_batch_size),
        Some(SchedulingChoice::SequenceBatching(sequences)) => {
            if sequences.max_sequence_idle_microseconds == 0 {
                sequences.max_sequence_idle_microseconds = SEQUENCE_IDLE_US_DEFAULT;
            }
            if let Some(StrategyChoice::Oldest(oldest)) = &mut sequences.strategy_choice {
                prefer_full(&mut oldest.preferred_batch_size);
            }
        }
        Some(SchedulingChoice::EnsembleScheduling(_)) | None => {}
    }
    config
}

/// Platform, backend and file name, each of which follows from the others.
fn platform(config: &mut ModelConfig) {
    let fits = |word: &str, wanted: &str| word.is_empty() || word == wanted;
    if config.platform == PACKAGE_PLATFORM && fits(&config.backend, BACKEND) {
        config.backend = BACKEND.into();
        if config.default_model_filename.is_empty() {
            config.default_model_filename = PACKAGE_FILENAME.into();
        }
    }
    if is_null(config) {
        config.platform = NULL_PLATFORM.into();
        config.backend = NULL_PLATFORM.into();
    }
    if fits(&config.platform, PLATFORM) && fits(&config.backend, BACKEND) {
        config.platform = PLATFORM.into();
        config.backend = BACKEND.into();
        if config.default_model_filename.is_empty() {
            config.default_model_filename = MODEL_FILENAME.into();
        }
    }
}

fn instance_groups(config: &mut ModelConfig, gpus: &[i32]) {
    if config.instance_group.is_empty() {
        // One that nobody wrote has the model's own name, without a number.
        config.instance_group.push(ModelInstanceGroup { name: config.name.clone(), ..Default::default() });
    }
    for (number, group) in config.instance_group.iter_mut().enumerate() {
        if group.name.is_empty() {
            group.name = format!("{}_{number}", config.name);
        }
        if group.count == 0 {
            group.count = 1;
        }
        if group.kind() == Kind::Auto {
            group.set_kind(if gpus.is_empty() { Kind::Cpu } else { Kind::Gpu });
        }
        if group.kind() == Kind::Gpu && group.gpus.is_empty() {
            group.gpus = gpus.to_vec();
        }
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

    #[test]
    fn json_says_the_same_as_text() {
        let json = r#"{"name": "m", "max_batch_size": 8, "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["-1", 16]}],
            "dynamic_batching": {"max_queue_delay_microseconds": "100"}, "version_policy": {"specific": {"versions": [1, 3]}},
            "parameters": {"a": {"string_value": "b"}}}"#;
        let text = "name: 'm' max_batch_size: 8 input { name: 'x' data_type: TYPE_FP32 dims: [ -1, 16 ] } \
            dynamic_batching { max_queue_delay_microseconds: 100 } version_policy { specific { versions: [ 1, 3 ] } } \
            parameters { key: 'a' value { string_value: 'b' } }";
        assert_eq!(parse_json(json), parse_pbtxt(text).map_err(|error| error.to_string()));
        for wrong in ["", "{", "[]", "{} {}", r#"{"max_batch_sise": 1}"#, r#"{"max_batch_size": "eight"}"#] {
            assert!(parse_json(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_engine_has_its_file() {
        let file = |text| model_filename(&pbtxt(text)).map(str::to_owned);
        assert_eq!(file("").as_deref(), Some("model.pt"));
        assert_eq!(file("platform: 'torch_aoti'").as_deref(), Some("model.pt2"));
        assert_eq!(file("platform: 'torch_aoti' default_model_filename: 'a'").as_deref(), Some("a"));
        assert_eq!(file("backend: 'null'"), None);
        let package = effective_of("platform: 'torch_aoti'", &[]);
        assert_eq!((&*package.backend, &*package.default_model_filename), ("pytorch", "model.pt2"));
        let null = effective_of("backend: 'null'", &[]);
        assert_eq!((&*null.platform, &*null.default_model_filename), ("null", ""));
    }

    fn effective_of(text: &str, gpus: &[i32]) -> ModelConfig {
        effective(&parse_pbtxt(&format!("name: \"m\" {text}")).unwrap(), gpus)
    }

    fn pbtxt(text: &str) -> ModelConfig {
        parse_pbtxt(text).unwrap()
    }

    /// What every answer has, as a real Triton gives it on a machine without a GPU.
    const FILLED: &str = "name: 'm' platform: 'pytorch_libtorch' backend: 'pytorch' default_model_filename: 'model.pt' \
         version_policy { latest { num_versions: 1 } } \
         optimization { input_pinned_memory { enable: true } output_pinned_memory { enable: true } } ";
    const ONE_INSTANCE: &str = "instance_group { name: 'm' kind: KIND_CPU count: 1 } ";

    #[test]
    fn defaults_are_filled_in_as_triton_does() {
        for (given, filled) in [
            ("", ""),
            ("platform: 'pytorch_libtorch'", ""),
            ("backend: 'pytorch' max_batch_size: 4", "max_batch_size: 4"),
            ("max_batch_size: 4 dynamic_batching { }", "max_batch_size: 4 dynamic_batching { preferred_batch_size: 4 }"),
            (
                "max_batch_size: 4 dynamic_batching { preferred_batch_size: 2 max_queue_delay_microseconds: 9 }",
                "max_batch_size: 4 dynamic_batching { preferred_batch_size: 2 max_queue_delay_microseconds: 9 }",
            ),
            ("dynamic_batching { }", "dynamic_batching { }"),
            ("sequence_batching { }", "sequence_batching { max_sequence_idle_microseconds: 1000000 }"),
            (
                "max_batch_size: 4 sequence_batching { max_sequence_idle_microseconds: 7 oldest { max_candidate_sequences: 5 } }",
                "max_batch_size: 4 sequence_batching { max_sequence_idle_microseconds: 7 \
                 oldest { max_candidate_sequences: 5 preferred_batch_size: 4 } }",
            ),
            ("sequence_batching { direct { } }", "sequence_batching { max_sequence_idle_microseconds: 1000000 direct { } }"),
        ] {
            assert_eq!(effective_of(given, &[]), pbtxt(&format!("{FILLED}{ONE_INSTANCE}{filled}")), "{given}");
        }
    }

    #[test]
    fn what_was_written_stays() {
        let written = "platform: 'x' default_model_filename: 'a.pt' version_policy { all { } } \
            optimization { priority: PRIORITY_MAX input_pinned_memory { enable: false } } instance_group { name: 'a' count: 3 }";
        let config = effective_of(written, &[]);
        assert_eq!((&*config.platform, &*config.backend, &*config.default_model_filename), ("x", "", "a.pt"));
        assert!(!config.optimization.unwrap().input_pinned_memory.unwrap().enable);
        assert_eq!(config.instance_group, pbtxt("instance_group { name: 'a' kind: KIND_CPU count: 3 }").instance_group);
        assert_eq!(config.version_policy, pbtxt("version_policy { all { } }").version_policy);
    }

    #[test]
    fn instance_groups_get_names_and_places() {
        let groups = |text: &str, gpus: &[i32]| effective_of(text, gpus).instance_group;
        let wanted = |text: &str| pbtxt(text).instance_group;
        assert_eq!(
            groups("instance_group [ { kind: KIND_CPU }, { count: 2 } ]", &[]),
            wanted("instance_group [ { name: 'm_0' kind: KIND_CPU count: 1 }, { name: 'm_1' kind: KIND_CPU count: 2 } ]")
        );
        assert_eq!(groups("", &[0, 1]), wanted("instance_group { name: 'm' kind: KIND_GPU count: 1 gpus: [ 0, 1 ] }"));
        assert_eq!(
            groups("instance_group [ { kind: KIND_GPU gpus: 1 }, { kind: KIND_CPU } ]", &[0, 1]),
            wanted("instance_group [ { name: 'm_0' kind: KIND_GPU count: 1 gpus: 1 }, { name: 'm_1' kind: KIND_CPU count: 1 } ]")
        );
    }

    #[test]
    fn to_fill_in_twice_changes_nothing() {
        let once = effective_of(SIMPLE.trim_start_matches("\nname: \"simple\""), &[0]);
        assert_eq!(effective(&once, &[0]), once);
    }
}
