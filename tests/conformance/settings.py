"""TraceSetting and LogSettings: of the process that is asked, by Triton's names."""

import grpc
from checks import DEADLINE_S, check, equal, refused
from tritonclient.grpc import service_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


def _traces(response):
    return {key: list(setting.value) for key, setting in response.settings.items()}


def _log(response):
    return {key: getattr(setting, setting.WhichOneof("parameter_choice")) for key, setting in response.settings.items()}


@check
def log_settings_are_read_and_changed(place):
    client = place.any().client
    before = _log(client.get_log_settings())
    start = {"log_error": True, "log_warning": True, "log_info": True, "log_verbose_level": 0, "log_file": "", "log_format": "default"}
    equal(before, start)
    changed = _log(client.update_log_settings({"log_info": False, "log_verbose_level": 1, "log_format": "default"}))
    equal(changed, {**start, "log_info": False, "log_verbose_level": 1})
    equal(_log(client.get_log_settings()), changed)
    equal(_log(client.update_log_settings({"log_info": True, "log_verbose_level": 0})), start)


@check
def log_settings_that_mean_nothing_are_refused_by_name(place):
    endpoint = place.any()
    value = pb.LogSettingsRequest.SettingValue
    for key, setting, code, part in [
        ("nope", value(bool_param=True), INVALID, "unknown log setting 'nope'"),
        ("log_info", value(string_param="x"), INVALID, "expect boolean for 'log_info'"),
        ("log_info", value(), INVALID, "expect boolean for 'log_info'"),
        ("log_verbose_level", value(bool_param=True), INVALID, "for 'log_verbose_level'"),
        ("log_format", value(string_param="x"), INVALID, "invalid argument for log_format, got: x"),
        ("log_file", value(string_param="/tmp/x"), UNIMPLEMENTED, "log file location can not be updated through network protocol"),
    ]:
        message = pb.LogSettingsRequest(settings={key: setting, "log_error": value(bool_param=False)})
        refused(code, [part], lambda: endpoint.stub.LogSettings(message, timeout=DEADLINE_S))
    assert _log(endpoint.client.get_log_settings())["log_error"], "a refused change changes nothing"


@check
def trace_settings_are_read_changed_and_cleared(place):
    client = place.any().client
    start = _traces(client.get_trace_settings())
    # These processes have no collector.
    wanted = {"trace_level": "OFF", "trace_rate": "1", "trace_count": "-1", "log_frequency": "0", "trace_file": "", "trace_mode": "opentelemetry"}
    equal(start, {key: [value] for key, value in wanted.items()})
    changed = _traces(client.update_trace_settings(settings={"trace_rate": "100", "trace_count": "7", "trace_level": ["OFF"]}))
    equal(changed, {**start, "trace_rate": ["100"], "trace_count": ["7"]})
    equal(_traces(client.get_trace_settings()), changed)
    equal(_traces(client.update_trace_settings(settings={"trace_rate": None})), {**changed, "trace_rate": ["1"]})
    equal(_traces(client.update_trace_settings(settings={key: None for key in start})), start)


@check
def trace_settings_that_mean_nothing_are_refused_by_name(place):
    client = place.any().client
    start = _traces(client.get_trace_settings())
    for settings, code, part in [
        ({"nope": "1"}, INVALID, "unknown trace setting 'nope'"),
        ({"trace_rate": ["5", "6"]}, INVALID, "expect only 1 value for 'trace_rate'"),
        ({"trace_rate": "x"}, INVALID, "Unable to parse 'trace_rate', got: x"),
        ({"trace_count": "-2"}, INVALID, "Unable to parse 'trace_count'. Expecting value >= -1, got: -2"),
        ({"trace_level": ["OFF", "TIMESTAMPS"]}, INVALID, "Expect only one trace level 'OFF' is specified"),
        ({"trace_level": "TENSORS"}, INVALID, "trace_level"),
        ({"trace_level": "TIMESTAMPS"}, INVALID, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ({"trace_mode": "triton"}, INVALID, "trace_mode"),
        ({"log_frequency": "10"}, INVALID, "log_frequency"),
        ({"trace_file": "/tmp/x"}, UNIMPLEMENTED, "trace file location can not be updated through network protocol"),
    ]:
        refused(code, [part], lambda: client.update_trace_settings(settings={**settings, "trace_count": settings.get("trace_count", "3")}))
    equal(_traces(client.get_trace_settings()), start, "a refused change changes nothing")


@check
def trace_settings_are_those_of_all_models(place):
    client = place.of("simple").client
    equal(_traces(client.get_trace_settings("simple")), _traces(client.get_trace_settings()))
    refused(INVALID, ["one model"], lambda: client.update_trace_settings("simple", {"trace_rate": "2"}))
    refused(INVALID, ["Request for unknown model : nope"], lambda: client.get_trace_settings("nope"))
