//! `TraceSetting` and `LogSettings` of this process: Triton's names on one side, what telemetry can change on the other.
use cresset_proto::{
    inference::{LogSettingsRequest, LogSettingsResponse, TraceSettingRequest, TraceSettingResponse},
    reason::Reason,
    settings::{LogSettings, SettingError, TraceSettings},
};
use cresset_runtime::telemetry::{Controls, LogLevels, Sampling, controls};
use tonic::Status;

/// Changes which requests leave a trace, and answers with all settings.
pub(super) fn trace(request: &TraceSettingRequest) -> Result<TraceSettingResponse, Status> {
    let of = |Sampling { on, every, left }| TraceSettings { on, rate: every, count: left };
    let controls = running()?;
    let (start, exports) = (of(controls.sampling_at_start()), controls.exports_traces());
    let changed = controls.change_sampling(|now| {
        let TraceSettings { on, rate, count } = of(now).changed(request, start, exports)?;
        Ok(Sampling { on, every: rate, left: count })
    });
    changed.map(|now| of(now).response()).map_err(|error: SettingError| error.status())
}

/// Changes what goes into the log, and answers with all settings.
pub(super) fn log(request: &LogSettingsRequest) -> Result<LogSettingsResponse, Status> {
    let of = |LogLevels { error, warning, info, verbose }| LogSettings { error, warning, info, verbose };
    let changed = running()?.change_log_levels(|now| {
        let LogSettings { error, warning, info, verbose } = of(now).changed(request)?;
        Ok(LogLevels { error, warning, info, verbose })
    });
    changed.map(|now| of(now).response()).map_err(|error: SettingError| error.status())
}

/// A program that has a server inside may have telemetry of its own.
fn running() -> Result<&'static Controls, Status> {
    controls().ok_or_else(|| {
        Reason::Unsupported.status("the settings of traces and logs are not this server's: its program set them up")
    })
}
