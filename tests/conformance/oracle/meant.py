"""Every difference between Cresset's answers and a real Triton's that is meant, with its reason. See compare.py.

An answer with Triton's code and all of Triton's words, and perhaps more of its own, is no difference and isn't listed.
"""

from oracle.compare import ABSENT, Allowed, words

COORDINATOR, WORKER = "coordinator", "worker"

_OWN_WORDS = "same code; the words say more exactly what to change"

# Where only the words differ, and what they have in common.
_WORDING = {
    "byte_strings / cut in a length": "incomplete string",
    "byte_strings / a length of 4 GiB": "expecting string of length 4294967295 but only 0 bytes available",
    "byte_strings / cut in a text": "expecting string of length 9 but only 3 bytes available",
    "byte_strings / fewer than the shape says": "for inference input 'x' for model 'echo_bytes'",
    "classification / negative": "'classification'",
    "classification / of a wrong kind": "'classification'",
    "classification / zero": "'classification'",
    "datatypes / typed in a wrong field": "for model 'echo_fp32'",
    "* / negative version*": "invalid model version specified '-1'",
    "* / version in words*": "failed to get model version from specified version string 'latest'",
    "parameters / empty final response of a wrong kind": "'triton_enable_empty_final_response'",
    "parameters / long text id": "128",
    "parameters / reserved": "parameter keys starting with 'triton_' are reserved",
    "sequences / 129 characters / 0": "128",
    "sequences / two rows / 0": "to model 'numbered' must specify batch-size 1",
    "log_settings / verbose level of a wrong kind": "int32 for 'log_verbose_level'",
    "refused_requests* / batches differ*": "batch size does not match other inputs for 'simple'",
    "refused_requests* / elements overflow*": "'x' for model 'echo_fp32'",
    "refused_requests* / huge dimension*": "for model 'echo_fp32'",
    "refused_requests* / hundred dimensions*": "'x' for model 'echo_fp32'",
    "refused_requests* / negative dimension*": "'x' for model 'echo_fp32'",
    "refused_requests* / two negative dimensions*": "'x' for model 'echo_fp32'",
    "refused_requests* / end of a wrong kind*": "'sequence_end'",
    "refused_requests* / start of a wrong kind*": "'sequence_start'",
    "refused_requests* / timeout of a wrong kind*": "'timeout'",
    "refused_requests* / priority of a wrong kind*": "'priority'",
    "refused_requests* / negative priority*": "'priority'",
    "refused_requests* / sequence id of a wrong kind*": "'sequence_id'",
    "refused_requests* / sequence id that is a bool*": "'sequence_id'",
    "refused_requests* / extra input*": "expected 2 inputs but got 3 inputs for model 'simple'",
    "refused_requests* / missing input*": "expected 2 inputs but got 1 inputs for model 'simple'",
    "refused_requests* / no inputs*": "expected 2 inputs but got 0 inputs for model 'simple'",
    "refused_requests* / reserved parameter*": "parameter keys starting with 'triton_' are reserved",
    "refused_requests* / wrong shape*": "unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [1,8]",
    "refused_requests* / wrong rank*": "input 'INPUT0'",
    "refused_requests* / no shape*": "input 'INPUT0'",
}

DIFFERENCES = [
    *(Allowed(where, words(gist), _OWN_WORDS) for where, gist in _WORDING.items()),
    Allowed("refused_requests* / no such dtype*", words("invalid datatype 'FP99' for input 'INPUT0'"), _OWN_WORDS, triton=words("'INPUT0' data-type is '<invalid>'")),
    # What the servers are.
    Allowed("server_metadata / answer / name", "cresset", "its own name"),
    Allowed("server_metadata / answer / extensions / cuda_shared_memory", ABSENT, "CUDA shared memory isn't served"),
    Allowed("server_metadata / answer / extensions / system_shared_memory", ABSENT, "a request may go to any host", at=COORDINATOR),
    Allowed("server_metadata / answer / extensions / model_repository*", ABSENT, "models are placed by coordinators", at=WORKER),
    Allowed("server_metadata / answer / extensions / sequence(string_id)", True, "served by both; Triton only documents its name"),
    Allowed("model_metadata / * / answer / platform", "pytorch_libtorch", "the twins run in different backends"),
    Allowed("model_config / * / config / platform", "pytorch_libtorch", "the twins run in different backends"),
    Allowed("model_config / * / config / backend", "pytorch", "the twins run in different backends"),
    Allowed("model_config / * / config / default_model_filename", "model.pt", "the twins run in different backends"),
    Allowed("health_and_unknown_methods / unknown service", "NOT_FOUND: service not registered", "as the health protocol wants it"),
    # Requests.
    Allowed("parameters / free of every kind", "OK", "a key without a meaning may have any value"),
    Allowed("parameters / of no kind", "OK", "a key without a meaning may have any value"),
    Allowed("parameters / timeout uint64", "OK", "the number is clear, whatever its kind"),
    Allowed(
        "parameters / negative timeout",
        "INVALID_ARGUMENT: parameter 'timeout' must be an int64 of 0 or more",
        "Triton takes it for 584,000 years",
    ),
    Allowed("datatypes / typed", "OK", "a tensor without elements needs no contents"),
    Allowed("good_requests / no rows", "OK", "an empty batch is answered with an empty batch"),
    Allowed("good_requests / outputs the other way round / answer / outputs / *", ..., "outputs come in the order that was asked for"),
    Allowed("good_requests / the same output twice / answer / outputs / 1", ..., "outputs come as they were asked for"),
    # Streams.
    Allowed("* / responses / * / response / model_name", ..., "an error names the model that was asked for", triton=ABSENT),
    Allowed(
        "* / responses / * / response / parameters",
        {"triton_final_response": {"bool_param": True}},
        "an error is the last answer to its request, and says so: clients count final responses",
        triton=ABSENT,
    ),
    # Counters.
    Allowed("statistics_of_decoupled_responses / * / response *", 1, "Triton's Python backend doesn't report them", at=WORKER, triton=ABSENT),
    Allowed("statistics / failed / *", 1, "Triton's Python backend counts a request that failed as a success"),
    # Settings.
    Allowed("log_settings / unknown", words("nope"), "nothing is ignored in silence", triton="OK"),
    Allowed("trace_settings / unknown", words("nope"), "nothing is ignored in silence", triton="OK"),
    Allowed("trace_settings / unknown level", words("NOPE"), "nothing is ignored in silence", triton="OK"),
    Allowed("trace_settings / * / trace_mode / value / 0", "opentelemetry", "the only kind of traces that it makes"),
    Allowed("trace_settings / * / trace_rate / value / 0", "1", "every trace, unless told otherwise"),
    Allowed("cuda_shared_memory / register", words("UNIMPLEMENTED"), "CUDA shared memory isn't served", triton=...),
    # The repository.
    Allowed(
        "repository / load misspelt",
        words("INVALID_ARGUMENT: misspelt/config.pbtxt:2:11"),
        "the mistake is the caller's, and the place of it is said",
        at=COORDINATOR,
        triton=...,
    ),
    Allowed(
        "repository / config that is no JSON",
        words("INVALID_ARGUMENT: parameter 'config' of model 'spare' is no ModelConfig"),
        "the mistake is the caller's, and the place of it is said",
        at=COORDINATOR,
        triton=...,
    ),
    Allowed("repository / misspelt / 0 / reason", words("misspelt/config.pbtxt:2:11"), "the index says what is wrong", triton=ABSENT, at=COORDINATOR),
    Allowed("repository / unloaded / 0 / *", ABSENT, "a model that isn't deployed is what it was before: there to be loaded", at=COORDINATOR),
    Allowed("repository / unloaded, *", words("NOT_FOUND: Request for unknown model: 'spare' is not found"), "a model that isn't deployed is unknown", triton=..., at=COORDINATOR),
]
