use cresset_proto::model_config::parse_pbtxt;

use super::*;

const BASE: &str = "name: \"m\" max_batch_size: 4 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ -1 ] } ] \
                    output [ { name: \"y\" data_type: TYPE_FP32 dims: [ -1 ] } ] ";

fn read(text: &str) -> Result<Contract, ContractError> {
    Contract::read(&parse_pbtxt(&format!("{BASE}{text}")).unwrap_or_else(|error| panic!("{text}: {error}")))
}

#[test]
fn what_cannot_be_served_is_refused_by_field() {
    for (text, field) in [
        ("ensemble_scheduling { }", "ensemble_scheduling"),
        ("sequence_batching { iterative_sequence: true }", "iterative_sequence"),
        ("model_operations { op_library_filename: \"a.so\" }", "op_library_filename"),
        ("model_repository_agents { agents [ { name: \"a\" } ] }", "model_repository_agents"),
        ("input [ { name: \"s\" data_type: TYPE_FP32 dims: [ 1 ] is_shape_tensor: true } ]", "is_shape_tensor of input 's'"),
        ("input [ { name: \"s\" dims: [ 1 ] } ]", "input 's' has no data_type"),
        ("input [ { name: \"s\" data_type: TYPE_FP32 dims: [ 0 ] } ]", "input 's' has the dimension 0"),
        ("input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 1 ] } ]", "input 'x' is declared twice"),
        ("input [ { name: \"s\" data_type: TYPE_FP32 dims: [ 4 ] reshape: { shape: [ 3 ] } } ]", "input 's': reshape [3]"),
        ("input [ { name: \"s\" data_type: TYPE_FP32 dims: [ -1 ] reshape: { shape: [ 1 ] } } ]", "input 's': reshape [1]"),
        ("input [ { name: \"s\" data_type: TYPE_STRING dims: [ 1 ] allow_ragged_batch: true } ]", "allow_ragged_batch"),
        (
            "batch_input [ { kind: BATCH_ELEMENT_COUNT target_name: \"n\" data_type: TYPE_INT32 source_input: \"z\" } ]",
            "'z' is not an input",
        ),
        (
            "batch_input [ { kind: BATCH_ELEMENT_COUNT target_name: \"n\" data_type: TYPE_INT64 source_input: \"x\" } ]",
            "batch_input: data_type",
        ),
        ("dynamic_batching { preferred_batch_size: [ 5 ] }", "preferred_batch_size is 5"),
        ("dynamic_batching { priority_levels: 2 }", "default_priority_level is 0"),
        ("dynamic_batching { priority_queue_policy { key: 3 value { max_queue_size: 1 } } }", "names level 3"),
        ("instance_group [ { count: 1000 } ]", "instance_group.count is 1000"),
        ("instance_group [ { kind: KIND_CPU gpus: [ 0 ] } ]", "KIND_CPU can't have gpus"),
        ("instance_group [ { secondary_devices [ { device_id: 1 } ] } ]", "secondary_devices"),
        ("model_warmup [ { name: \"w\" batch_size: 9 } ]", "batch_size 9"),
        ("model_warmup [ { name: \"w\" batch_size: 1 } ]", "no input 'x'"),
        (
            "model_warmup [ { name: \"w\" inputs { key: \"x\" value { data_type: TYPE_FP32 dims: [ -1 ] zero_data: true } } } ]",
            "all must be known",
        ),
        (
            "model_warmup [ { name: \"w\" inputs { key: \"x\" value { data_type: TYPE_FP32 dims: [ 1 ] input_data_file: \"../x\" } } } ]",
            "'../x'",
        ),
        ("sequence_batching { state [ { input_name: \"s\" } ] }", "output_name"),
        (
            "sequence_batching { state [ { input_name: \"x\" output_name: \"t\" data_type: TYPE_FP32 dims: [ 1 ] } ] }",
            "'x' names two inputs",
        ),
        (
            "sequence_batching { control_input [ { name: \"c\" control [ { kind: CONTROL_SEQUENCE_START } ] } ] }",
            "needs exactly one of",
        ),
        (
            "sequence_batching { control_input [ { name: \"c\" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 1 ] } ] } ] }",
            "has 1 values",
        ),
        ("sequence_batching { } model_transaction_policy { decoupled: true }", "can't be combined"),
    ] {
        let error = read(text).map(drop).expect_err(text).to_string();
        assert!(error.contains(field) && error.starts_with("config.pbtxt: "), "{text}: {error}");
    }
}

#[test]
fn what_only_tunes_is_listed() {
    let contract = read("optimization { eager_batching: true } instance_group [ { count: 2 profile: \"p\" } ]").unwrap();
    assert_eq!(contract.ignored, ["optimization", "instance_group.profile"]);
    assert_eq!(contract.instances, [InstanceSpec { kind: InstanceKind::Auto, count: 2, gpus: vec![] }]);
    assert!(read("dynamic_batching { }").unwrap().ignored.is_empty());
}

/// A use of each field that `PROTOCOL.md` calls ignored or refused.
const UNSERVED: [(&str, &str); 22] = [
    ("input.format", "input [ { name: \"s\" data_type: TYPE_FP32 dims: [ 1, 1, 1 ] format: FORMAT_NHWC } ]"),
    ("input.is_shape_tensor", "input [ { name: \"s\" data_type: TYPE_FP32 dims: [ 1 ] is_shape_tensor: true } ]"),
    ("input.is_non_linear_format_io", "input [ { name: \"s\" data_type: TYPE_FP32 dims: [ 1 ] is_non_linear_format_io: true } ]"),
    ("output.is_shape_tensor", "output [ { name: \"s\" data_type: TYPE_FP32 dims: [ 1 ] is_shape_tensor: true } ]"),
    (
        "output.is_non_linear_format_io",
        "output [ { name: \"s\" data_type: TYPE_FP32 dims: [ 1 ] is_non_linear_format_io: true } ]",
    ),
    ("version_policy", "version_policy { latest { num_versions: 1 } }"),
    ("sequence_batching.state.use_same_buffer_for_input_output", "use_same_buffer_for_input_output: true"),
    ("sequence_batching.state.use_growable_memory", "use_growable_memory: true"),
    ("sequence_batching.iterative_sequence", "sequence_batching { iterative_sequence: true }"),
    ("ensemble_scheduling", "ensemble_scheduling { }"),
    ("instance_group.rate_limiter", "instance_group [ { rate_limiter { priority: 1 } } ]"),
    ("instance_group.profile", "instance_group [ { profile: \"p\" } ]"),
    ("instance_group.host_policy", "instance_group [ { host_policy: \"p\" } ]"),
    ("instance_group.secondary_devices", "instance_group [ { secondary_devices [ { device_id: 1 } ] } ]"),
    ("optimization", "optimization { eager_batching: true }"),
    ("response_cache", "response_cache { enable: true }"),
    ("metric_tags", "metric_tags { key: \"a\" value: \"b\" }"),
    ("model_metrics", "model_metrics { }"),
    ("cc_model_filenames", "cc_model_filenames { key: \"7.5\" value: \"a.pt\" }"),
    ("runtime", "runtime: \"r\""),
    ("model_operations.op_library_filename", "model_operations { op_library_filename: \"a.so\" }"),
    ("model_repository_agents", "model_repository_agents { agents [ { name: \"a\" } ] }"),
];

#[test]
fn the_tables_word_on_each_field_that_is_not_served_is_kept() {
    let table = include_str!("../../../proto/PROTOCOL.md").split("## ").find(|part| part.starts_with("Fields of")).unwrap();
    let mut seen = 0;
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let [_, fields, verdict, ..] = row.split(" | ").flat_map(|cell| cell.split("| ")).collect::<Vec<_>>()[..] else {
            panic!("{row}");
        };
        let refused = verdict.starts_with("refused");
        if !refused && !verdict.starts_with("ignored") {
            continue;
        }
        for field in fields.split('`').skip(1).step_by(2) {
            let (_, text) = UNSERVED.iter().find(|(name, _)| *name == field).unwrap_or_else(|| panic!("no use of {field}"));
            let state = "input_name: \"i\" output_name: \"o\" data_type: TYPE_FP32 dims: [ 1 ]";
            let text = if field.starts_with("sequence_batching.state") {
                format!("sequence_batching {{ state [ {{ {state} {text} }} ] }}")
            } else {
                (*text).to_owned()
            };
            seen += 1;
            if refused {
                let error = read(&text).map(drop).expect_err(field).to_string();
                assert!(error.contains(field.rsplit('.').next().unwrap()), "{field}: {error}");
            } else {
                let contract = read(&text).unwrap_or_else(|error| panic!("{field}: {error}"));
                assert!(contract.ignored.iter().any(|name| name == field), "{field}: {:?}", contract.ignored);
            }
        }
    }
    assert!(seen >= 20, "only {seen} fields were found in the table");
}

#[test]
fn queue_settings_are_read() {
    let queueing = read(
        "dynamic_batching { preferred_batch_size: [ 4, 2 ] max_queue_delay_microseconds: 9 priority_levels: 3 \
         default_priority_level: 2 default_queue_policy { max_queue_size: 7 } \
         priority_queue_policy { key: 1 value { timeout_action: DELAY default_timeout_microseconds: 5 } } }",
    )
    .unwrap()
    .queueing;
    assert_eq!((queueing.preferred_rows.clone(), queueing.delay_us), (vec![2, 4], 9));
    assert_eq!((queueing.level(0), queueing.level(1), queueing.level(4)), (2, 1, 2));
    assert_eq!((queueing.policy(1).action, queueing.policy(2).requests_max), (TimeoutAction::Delay, 7));
}

#[test]
fn sequences_with_state_tensors_are_read() {
    let contract = read(
        "instance_group [ { count: 2 } ] sequence_batching { direct { } max_sequence_idle_microseconds: 7 \
         control_input [ { name: \"START\" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] }, \
                         { name: \"ID\" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] } ] \
         state [ { input_name: \"h\" output_name: \"h_out\" data_type: TYPE_FP32 dims: [ 2, -1 ] \
                   initial_state { data_type: TYPE_FP32 dims: [ 2, 3 ] zero_data: true name: \"zero\" } } ] }",
    )
    .unwrap();
    let hidden: Vec<&str> = contract.hidden_inputs().map(|(name, _)| name).collect();
    assert_eq!(hidden, ["START", "ID", "h"]);
    let spec = contract.sequence.as_ref().unwrap();
    // Slots: two copies with four rows each.
    assert_eq!((spec.strategy, spec.sequences_max, spec.idle_us), (Strategy::Direct, 8, 7));
    assert_eq!(
        (spec.states()[0].initial_dims.clone(), spec.controls[0].false_true[1].clone()),
        (vec![2, 3], 1f32.to_le_bytes().to_vec())
    );
    let inside = read("sequence_batching { oldest { max_candidate_sequences: 3 } }").unwrap().sequence.unwrap();
    assert_eq!((inside.memory, inside.sequences_max), (Memory::Inside, 3));
}

#[test]
fn parameters_are_split_into_constants_and_others() {
    let contract = read(
        "parameters { key: \"cresset.scalar.sr\" value: { string_value: \"int:1\" } } \
         parameters { key: \"other\" value: { string_value: \"v\" } }",
    )
    .unwrap();
    assert_eq!(contract.constants, BTreeMap::from([("sr".to_owned(), "int:1".to_owned())]));
    assert_eq!(contract.parameters, BTreeMap::from([("other".to_owned(), "v".to_owned())]));
}
