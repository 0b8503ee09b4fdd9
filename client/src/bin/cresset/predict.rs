//! `cresset predict`: one prediction from the command line.
//!
//! It asks the public service of a coordinator, like any other client. The model's metadata is asked for first, so that
//! literals get the declared type and shape, and arrays of another type are converted where nothing is lost.
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::Context;
use cresset_client::CallError;
use cresset_proto::{
    inference::{
        InferParameter, ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse,
        grpc_inference_service_client::GrpcInferenceServiceClient, infer_parameter::ParameterChoice,
    },
    parameters::keys,
    tensor::{self, Datatype, Tensor},
};
use tonic::transport::Channel;

use crate::{
    connect::{Cluster, request},
    npy,
    output::{self, Format},
    values::{self, Declared},
};

/// Flags of `cresset predict`.
#[derive(clap::Args)]
pub struct Args {
    /// The deployed model
    name: String,
    /// An input: NAME=@FILE.npy, or NAME=VALUES as in 16000 or 1,2,3 or [[1,2],[3,4]]; once for each input
    #[arg(short, long = "input", value_name = "NAME=VALUE", required = true)]
    inputs: Vec<InputArg>,
    /// The version to ask, a number or a label [default: the highest that is ready]
    #[arg(long, value_name = "V")]
    version: Option<String>,
    /// Make it part of a sequence: a number or a text
    #[arg(long, value_name = "ID")]
    sequence_id: Option<String>,
    /// The first request of the sequence
    #[arg(long, requires = "sequence_id")]
    sequence_start: bool,
    /// The last request of the sequence
    #[arg(long, requires = "sequence_id")]
    sequence_end: bool,
    /// Save each output as DIR/NAME.npy too
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
}

/// One `--input`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputArg {
    name: String,
    value: Source,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    File(PathBuf),
    Literal(String),
}

impl FromStr for InputArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write it as NAME=@FILE.npy or NAME=VALUES".to_owned();
        let (name, value) = text.split_once('=').ok_or_else(wrong)?;
        if name.is_empty() || value.is_empty() || value == "@" {
            return Err(wrong());
        }
        let value = match value.strip_prefix('@') {
            Some(path) => Source::File(path.into()),
            None => Source::Literal(value.to_owned()),
        };
        Ok(Self { name: name.to_owned(), value })
    }
}

/// Runs `cresset predict`.
///
/// # Errors
/// When an input can't be read or doesn't fit, when the model refuses it, or when nobody answers.
pub async fn run(cluster: &Cluster, args: &Args, format: Format) -> anyhow::Result<()> {
    // Files that aren't there are found before anyone is asked.
    let arrays = read_files(&args.inputs)?;
    let version = args.version.clone().unwrap_or_default();
    let metadata = metadata(cluster, &args.name, &version).await?;
    let mut message = ModelInferRequest {
        model_name: args.name.clone(),
        model_version: version,
        parameters: parameters(args),
        ..Default::default()
    };
    for tensor in tensors(&args.inputs, arrays, &metadata)? {
        tensor::push_input(&mut message, tensor);
    }
    let response = infer(cluster, message, args.sequence_id.is_some()).await?;
    let outputs = tensor::outputs(&response).context("the answer is not well formed: outputs without their bytes")?;
    if let Some(folder) = &args.output_dir {
        save(folder, &outputs)?;
    }
    match format {
        Format::Json => output::print_json(&as_json(&response, &outputs))?,
        Format::Table => output::print(&as_table(&outputs))?,
    }
    Ok(())
}

/// Reads the inputs that are files; `None` for the others.
///
/// # Errors
/// [`npy::NpyError`] for the first one that can't be read.
pub fn read_files(inputs: &[InputArg]) -> Result<Vec<Option<Tensor>>, npy::NpyError> {
    let read = |input: &InputArg| match &input.value {
        Source::File(path) => npy::read(path, &input.name).map(Some),
        Source::Literal(_) => Ok(None),
    };
    inputs.iter().map(read).collect()
}

/// The inputs as tensors of the declared types; `arrays` are those that [`read_files`] read.
///
/// # Errors
/// [`values::ValueError`] for one that doesn't fit.
pub fn tensors(
    inputs: &[InputArg],
    arrays: Vec<Option<Tensor>>,
    metadata: &ModelMetadataResponse,
) -> anyhow::Result<Vec<Tensor>> {
    let declared = declared_inputs(metadata);
    let mut tensors = Vec::with_capacity(inputs.len());
    for (input, array) in inputs.iter().zip(arrays) {
        let declared = declared.get(input.name.as_str());
        tensors.push(match (&input.value, array) {
            (Source::Literal(text), _) => values::literal(&input.name, text, declared)?,
            (Source::File(_), Some(array)) => values::convert(array, declared)?,
            (Source::File(path), None) => anyhow::bail!("{}: was not read", path.display()),
        });
    }
    Ok(tensors)
}

fn client(channel: Channel) -> GrpcInferenceServiceClient<Channel> {
    GrpcInferenceServiceClient::new(channel).max_decoding_message_size(usize::MAX).max_encoding_message_size(usize::MAX)
}

async fn metadata(cluster: &Cluster, name: &str, version: &str) -> Result<ModelMetadataResponse, CallError> {
    let message = ModelMetadataRequest { name: name.to_owned(), version: version.to_owned() };
    let ask = async |channel, limit| client(channel).model_metadata(request(message.clone(), limit)).await;
    cluster.call(ask).await
}

async fn infer(cluster: &Cluster, message: ModelInferRequest, has_state: bool) -> Result<ModelInferResponse, CallError> {
    // A stateless request may be run again; a request of a sequence may not, as it changes the sequence's state.
    let ask = async |channel, limit| client(channel).model_infer(request(message.clone(), limit)).await;
    if has_state { cluster.call_once(ask).await } else { cluster.call_patiently(ask).await }
}

fn declared_inputs(metadata: &ModelMetadataResponse) -> BTreeMap<&str, Declared> {
    let inputs = metadata.inputs.iter();
    let known = inputs.filter_map(|input| Some((input, Datatype::from_wire(&input.datatype)?)));
    known.map(|(input, datatype)| (input.name.as_str(), Declared { datatype, shape: input.shape.clone() })).collect()
}

fn parameters(args: &Args) -> HashMap<String, InferParameter> {
    let parameter = |choice| InferParameter { parameter_choice: Some(choice) };
    let mut map = HashMap::new();
    if let Some(id) = &args.sequence_id {
        let id = match id.parse() {
            Ok(number) => ParameterChoice::Int64Param(number),
            Err(_) => ParameterChoice::StringParam(id.clone()),
        };
        map.insert(keys::SEQUENCE_ID.to_owned(), parameter(id));
        map.insert(keys::SEQUENCE_START.to_owned(), parameter(ParameterChoice::BoolParam(args.sequence_start)));
        map.insert(keys::SEQUENCE_END.to_owned(), parameter(ParameterChoice::BoolParam(args.sequence_end)));
    }
    map
}

fn save(folder: &Path, outputs: &[Tensor]) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("can't create {}", folder.display()))?;
    for output in outputs {
        npy::write(&folder.join(file_name(&output.name)), output)?;
    }
    Ok(())
}

/// A name that the model chose, as a file name that stays in its folder.
fn file_name(output: &str) -> String {
    let plain: String = output.chars().map(|c| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '_' }).collect();
    format!("{plain}.npy")
}

fn as_json(response: &ModelInferResponse, outputs: &[Tensor]) -> serde_json::Value {
    let output = |output: &Tensor| {
        serde_json::json!({
            "name": output.name,
            "datatype": output.datatype.as_str(),
            "shape": output.shape,
            "data": values::json_values(output),
        })
    };
    serde_json::json!({
        "model_name": response.model_name,
        "model_version": response.model_version,
        "outputs": outputs.iter().map(output).collect::<Vec<_>>(),
    })
}

fn as_table(outputs: &[Tensor]) -> String {
    let row = |output: &Tensor| {
        let shape = output.shape.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        vec![output.name.clone(), output.datatype.to_string(), format!("[{shape}]"), values::short_values(output)]
    };
    output::table(&["OUTPUT", "DATATYPE", "SHAPE", "VALUES"], outputs.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_files_or_literals() {
        let file: InputArg = "X=@a=b.npy".parse().unwrap();
        assert_eq!(file, InputArg { name: "X".to_owned(), value: Source::File("a=b.npy".into()) });
        let literal: InputArg = "X=1,2".parse().unwrap();
        assert_eq!(literal.value, Source::Literal("1,2".to_owned()));
        for wrong in ["X", "X=", "=1", "X=@", ""] {
            assert!(wrong.parse::<InputArg>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn output_names_stay_in_their_folder() {
        assert_eq!(file_name("OUTPUT__0"), "OUTPUT__0.npy");
        assert_eq!(file_name("../../etc/passwd"), "______etc_passwd.npy");
    }

    #[test]
    fn outputs_are_shown_short_and_told_in_full() {
        let data = (0..20u8).collect();
        let outputs = [values::tensor("Y", Datatype::Uint8, vec![1, 20], data)];
        let text = as_table(&outputs);
        assert!(text.contains("Y       UINT8     [1,20]  [0, 1, 2, 3, …, 16, 17, 18, 19]"), "{text}");
        let json =
            as_json(&ModelInferResponse { model_name: "m".into(), model_version: "3".into(), ..Default::default() }, &outputs);
        assert_eq!(json["model_version"], "3");
        assert_eq!(json["outputs"][0]["shape"], serde_json::json!([1, 20]));
        assert_eq!(json["outputs"][0]["data"].as_array().unwrap().len(), 20);
    }
}
