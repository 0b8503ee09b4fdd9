//! `TraceSetting` and `LogSettings`: Triton's names, read and checked, and the answer that lists all of them.
//!
//! A setting that has no meaning here is refused by its name. Changes are all or nothing. They are the business of the
//! process that is asked and of no other: each coordinator and each worker has its own.
use std::collections::HashMap;

use tonic::Status;

use crate::{
    inference::{
        LogSettingsRequest, LogSettingsResponse, TraceSettingRequest, TraceSettingResponse,
        log_settings_request::{self, setting_value::ParameterChoice as LogValue},
        log_settings_response::{self, setting_value::ParameterChoice as LogAnswer},
        trace_setting_response,
    },
    reason::Reason,
    shared_memory::short,
};

/// Which requests leave a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceSettings {
    /// `trace_level`: TIMESTAMPS or OFF.
    pub on: bool,
    /// `trace_rate`: of the requests that bring no trace of their own, every so manieth begins one. At least 1.
    pub rate: u32,
    /// `trace_count`: how many more may begin; `None` for any number, which Triton writes -1.
    pub count: Option<u64>,
}

/// What goes into the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogSettings {
    /// `log_error`.
    pub error: bool,
    /// `log_warning`.
    pub warning: bool,
    /// `log_info`.
    pub info: bool,
    /// `log_verbose_level`: 0 for nothing more, 1 for debug, 2 and above for everything.
    pub verbose: u32,
}

/// A setting that can't be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// It is wrong, or means nothing here.
    #[error("{0}")]
    Invalid(String),
    /// Triton has it, and doesn't let it be changed either.
    #[error("{0}")]
    Fixed(&'static str),
}

impl SettingError {
    /// The status that goes to the caller.
    pub fn status(&self) -> Status {
        match self {
            Self::Invalid(text) => Reason::InvalidArgument.status(text.clone()),
            Self::Fixed(text) => Reason::Unsupported.status(*text),
        }
    }
}

/// Where `trace_mode` is, the only one there is.
const TRACE_MODE: &str = "opentelemetry";

impl TraceSettings {
    /// The settings after a request. A setting without values goes back to what it was at the `start`. Without a collector
    /// for the traces (`exported` is false) they can't be switched on.
    ///
    /// # Errors
    /// [`SettingError`] names the setting and the way out; nothing is changed then.
    pub fn changed(self, request: &TraceSettingRequest, start: Self, exported: bool) -> Result<Self, SettingError> {
        if !request.model_name.is_empty() && !request.settings.is_empty() {
            let text = "trace settings of one model are not supported: leave the model's name empty to change them for all";
            return Err(SettingError::Invalid(text.into()));
        }
        let mut changed = self;
        // In order of their names, so that of several faults always the same one is told.
        let mut settings: Vec<_> = request.settings.iter().map(|(key, value)| (key.as_str(), &value.value[..])).collect();
        settings.sort_unstable();
        for (key, values) in settings {
            match key {
                "trace_level" => changed.on = if values.is_empty() { start.on } else { level(values)? },
                "trace_rate" => changed.rate = one(key, values)?.map_or(Ok(start.rate), rate)?,
                "trace_count" => changed.count = one(key, values)?.map_or(Ok(start.count), count)?,
                "trace_mode" => match one(key, values)? {
                    None | Some(TRACE_MODE) => {}
                    Some(other) => return Err(unparsed(key, other, "the only one is 'opentelemetry'")),
                },
                "log_frequency" => match one(key, values)? {
                    None | Some("0") => {}
                    Some(other) => return Err(unparsed(key, other, "spans are sent to the collector as they end, so it is 0")),
                },
                "trace_file" => match one(key, values)? {
                    None => {}
                    Some(_) => {
                        return Err(SettingError::Fixed(
                            "trace file location can not be updated through network protocol: \
                             traces go to the collector at OTEL_EXPORTER_OTLP_ENDPOINT",
                        ));
                    }
                },
                other => return Err(unknown("trace", other, &TRACE_NAMES)),
            }
        }
        if changed.on && !exported {
            let text = "trace_level can't be TIMESTAMPS: there is no collector to send traces to; \
                        set OTEL_EXPORTER_OTLP_ENDPOINT and start the process again";
            return Err(SettingError::Invalid(text.into()));
        }
        Ok(changed)
    }

    /// All settings in force.
    pub fn response(self) -> TraceSettingResponse {
        let level = if self.on { "TIMESTAMPS" } else { "OFF" };
        let count = self.count.map_or_else(|| "-1".to_owned(), |count| count.to_string());
        let values = [level.into(), self.rate.to_string(), count, "0".into(), String::new(), TRACE_MODE.into()];
        let value = |value| trace_setting_response::SettingValue { value: vec![value] };
        TraceSettingResponse { settings: TRACE_NAMES.iter().map(ToString::to_string).zip(values.map(value)).collect() }
    }
}

/// In the order of [`TraceSettings::response`].
const TRACE_NAMES: [&str; 6] = ["trace_level", "trace_rate", "trace_count", "log_frequency", "trace_file", "trace_mode"];

fn level(values: &[String]) -> Result<bool, SettingError> {
    let is_off = |value: &String| value == "OFF";
    if let Some(other) = values.iter().find(|value| !is_off(value) && *value != "TIMESTAMPS") {
        return Err(unparsed("trace_level", other, "it is OFF or TIMESTAMPS; contents of tensors are never traced"));
    }
    match (values.iter().any(is_off), values.len()) {
        (false, _) => Ok(true),
        (true, 1) => Ok(false),
        (true, _) => Err(SettingError::Invalid("Expect only one trace level 'OFF' is specified".into())),
    }
}

fn rate(text: &str) -> Result<u32, SettingError> {
    let rate = text.parse().ok().filter(|rate| *rate > 0);
    rate.ok_or_else(|| unparsed("trace_rate", text, "it is a whole number from 1; trace_level OFF traces nothing"))
}

fn count(text: &str) -> Result<Option<u64>, SettingError> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(None),
        Ok(count) => count.try_into().map(Some).map_err(|_| count_below(text)),
        Err(_) => Err(unparsed("trace_count", text, "it is a whole number, or -1 for no limit")),
    }
}

fn count_below(text: &str) -> SettingError {
    SettingError::Invalid(format!("Unable to parse 'trace_count'. Expecting value >= -1, got: {}", short(text)))
}

/// The one value of a setting; `None` where it is to be cleared.
fn one<'a>(key: &str, values: &'a [String]) -> Result<Option<&'a str>, SettingError> {
    match values {
        [] => Ok(None),
        [value] => Ok(Some(value)),
        _ => Err(SettingError::Invalid(format!("expect only 1 value for '{key}'"))),
    }
}

fn unparsed(key: &str, got: &str, way_out: &str) -> SettingError {
    SettingError::Invalid(format!("Unable to parse '{key}', got: {}: {way_out}", short(got)))
}

fn unknown(kind: &str, key: &str, known: &[&str]) -> SettingError {
    SettingError::Invalid(format!("unknown {kind} setting '{}', there are {}", short(key), known.join(", ")))
}

/// In the order of [`LogSettings::response`].
const LOG_NAMES: [&str; 6] = ["log_error", "log_warning", "log_info", "log_verbose_level", "log_file", "log_format"];

impl LogSettings {
    /// The settings after a request.
    ///
    /// # Errors
    /// [`SettingError`] names the setting and the way out; nothing is changed then.
    pub fn changed(self, request: &LogSettingsRequest) -> Result<Self, SettingError> {
        let mut changed = self;
        let mut settings: Vec<_> = request.settings.iter().collect();
        settings.sort_unstable_by_key(|(key, _)| *key);
        for (key, value) in settings {
            match key.as_str() {
                "log_error" => changed.error = boolean(key, value)?,
                "log_warning" => changed.warning = boolean(key, value)?,
                "log_info" => changed.info = boolean(key, value)?,
                "log_verbose_level" => match value.parameter_choice {
                    Some(LogValue::Uint32Param(level)) => changed.verbose = level,
                    _ => return Err(SettingError::Invalid("expect uint32 for 'log_verbose_level'".into())),
                },
                "log_file" => {
                    return Err(SettingError::Fixed(
                        "log file location can not be updated through network protocol: the log goes to standard error",
                    ));
                }
                "log_format" => match &value.parameter_choice {
                    Some(LogValue::StringParam(format)) if format == "default" => {}
                    Some(LogValue::StringParam(format)) => {
                        let text = "the only one is 'default', whose times are ISO 8601 already";
                        return Err(SettingError::Invalid(format!(
                            "invalid argument for log_format, got: {}: {text}",
                            short(format)
                        )));
                    }
                    _ => return Err(SettingError::Invalid("expect string for 'log_format'".into())),
                },
                other => return Err(unknown("log", other, &LOG_NAMES)),
            }
        }
        Ok(changed)
    }

    /// All settings in force.
    pub fn response(self) -> LogSettingsResponse {
        let flag = LogAnswer::BoolParam;
        let text = |text: &str| LogAnswer::StringParam(text.into());
        let values = [
            flag(self.error),
            flag(self.warning),
            flag(self.info),
            LogAnswer::Uint32Param(self.verbose),
            text(""),
            text("default"),
        ];
        let value = |value| log_settings_response::SettingValue { parameter_choice: Some(value) };
        let settings: HashMap<_, _> = LOG_NAMES.iter().map(ToString::to_string).zip(values.map(value)).collect();
        LogSettingsResponse { settings }
    }
}

fn boolean(key: &str, value: &log_settings_request::SettingValue) -> Result<bool, SettingError> {
    match value.parameter_choice {
        Some(LogValue::BoolParam(flag)) => Ok(flag),
        _ => Err(SettingError::Invalid(format!("expect boolean for '{key}'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::trace_setting_request;

    const START: TraceSettings = TraceSettings { on: true, rate: 1, count: None };
    const LOG: LogSettings = LogSettings { error: true, warning: true, info: true, verbose: 0 };

    fn trace(settings: &[(&str, &[&str])]) -> TraceSettingRequest {
        let value =
            |values: &[&str]| trace_setting_request::SettingValue { value: values.iter().map(ToString::to_string).collect() };
        let settings = settings.iter().map(|(key, values)| ((*key).to_owned(), value(values))).collect();
        TraceSettingRequest { settings, model_name: String::new() }
    }

    fn log(settings: &[(&str, Option<LogValue>)]) -> LogSettingsRequest {
        let value = |value: &Option<LogValue>| log_settings_request::SettingValue { parameter_choice: value.clone() };
        LogSettingsRequest { settings: settings.iter().map(|(key, of)| ((*key).to_owned(), value(of))).collect() }
    }

    #[test]
    fn trace_settings_change_and_go_back_to_the_start() {
        let change = |settings: &[(&str, &[&str])], from: TraceSettings| from.changed(&trace(settings), START, true).unwrap();
        let changed = change(&[("trace_level", &["OFF"]), ("trace_rate", &["5"]), ("trace_count", &["7"])], START);
        assert_eq!(changed, TraceSettings { on: false, rate: 5, count: Some(7) });
        assert_eq!(change(&[], changed), changed, "to ask is no change");
        assert_eq!(change(&[("trace_count", &["-1"])], changed), TraceSettings { count: None, ..changed });
        assert_eq!(change(&[("trace_rate", &[])], changed), TraceSettings { rate: 1, ..changed });
        let all: Vec<(&str, &[&str])> = TRACE_NAMES.iter().map(|name| (*name, &[][..])).collect();
        assert_eq!(change(&all, changed), START);
        assert_eq!(change(&[("trace_mode", &["opentelemetry"]), ("log_frequency", &["0"])], changed), changed);
    }

    #[test]
    fn trace_settings_that_mean_nothing_are_refused_by_name() {
        let cases: [(&str, &[&str], &str); 12] = [
            ("nope", &["1"], "unknown trace setting 'nope', there are trace_level, trace_rate"),
            ("nope", &[], "unknown trace setting 'nope'"),
            ("trace_rate", &["5", "6"], "expect only 1 value for 'trace_rate'"),
            ("trace_rate", &["x"], "Unable to parse 'trace_rate', got: x"),
            ("trace_rate", &["0"], "Unable to parse 'trace_rate', got: 0"),
            ("trace_count", &["-2"], "Unable to parse 'trace_count'. Expecting value >= -1, got: -2"),
            ("trace_level", &["TENSORS"], "Unable to parse 'trace_level', got: TENSORS"),
            ("trace_level", &["OFF", "TIMESTAMPS"], "Expect only one trace level 'OFF' is specified"),
            ("trace_mode", &["triton"], "Unable to parse 'trace_mode', got: triton"),
            ("log_frequency", &["10"], "Unable to parse 'log_frequency', got: 10"),
            ("trace_file", &["/tmp/x"], "trace file location can not be updated through network protocol"),
            ("trace_rate", &["-1"], "Unable to parse 'trace_rate', got: -1"),
        ];
        for (key, values, words) in cases {
            let error = START.changed(&trace(&[(key, values)]), START, true).unwrap_err();
            assert!(error.to_string().starts_with(words), "{error}");
        }
        let mut one_model = trace(&[("trace_rate", &["2"])]);
        one_model.model_name = "m".into();
        assert!(START.changed(&one_model, START, true).is_err());
        one_model.settings.clear();
        assert_eq!(START.changed(&one_model, START, true), Ok(START), "to ask is fine");
    }

    #[test]
    fn without_a_collector_traces_stay_off() {
        let off = TraceSettings { on: false, ..START };
        let error = off.changed(&trace(&[("trace_level", &["TIMESTAMPS"])]), off, false).unwrap_err();
        assert!(error.to_string().contains("OTEL_EXPORTER_OTLP_ENDPOINT"), "{error}");
        assert_eq!(off.changed(&trace(&[("trace_rate", &["9"])]), off, false), Ok(TraceSettings { rate: 9, ..off }));
    }

    #[test]
    fn the_answers_list_every_setting() {
        let answer = TraceSettings { count: Some(3), ..START }.response();
        assert_eq!(answer.settings.len(), TRACE_NAMES.len());
        assert_eq!((&*answer.settings["trace_level"].value[0], &*answer.settings["trace_count"].value[0]), ("TIMESTAMPS", "3"));
        assert_eq!(START.response().settings["trace_count"].value, ["-1"]);
        let answer = LOG.response();
        assert_eq!(answer.settings.len(), LOG_NAMES.len());
        assert_eq!(answer.settings["log_verbose_level"].parameter_choice, Some(LogAnswer::Uint32Param(0)));
    }

    #[test]
    fn log_settings_change_or_are_refused_by_name() {
        let changed = LOG.changed(&log(&[
            ("log_info", Some(LogValue::BoolParam(false))),
            ("log_verbose_level", Some(LogValue::Uint32Param(2))),
            ("log_format", Some(LogValue::StringParam("default".into()))),
        ]));
        assert_eq!(changed, Ok(LogSettings { info: false, verbose: 2, ..LOG }));
        for (key, value, words) in [
            ("nope", Some(LogValue::BoolParam(true)), "unknown log setting 'nope', there are log_error, log_warning"),
            ("log_info", Some(LogValue::StringParam("x".into())), "expect boolean for 'log_info'"),
            ("log_info", None, "expect boolean for 'log_info'"),
            ("log_verbose_level", Some(LogValue::BoolParam(true)), "expect uint32 for 'log_verbose_level'"),
            ("log_format", Some(LogValue::StringParam("ISO8601".into())), "invalid argument for log_format, got: ISO8601"),
            (
                "log_file",
                Some(LogValue::StringParam("x".into())),
                "log file location can not be updated through network protocol",
            ),
        ] {
            let error = LOG.changed(&log(&[(key, value), ("log_error", Some(LogValue::BoolParam(false)))])).unwrap_err();
            assert!(error.to_string().starts_with(words), "{error}");
        }
    }
}
