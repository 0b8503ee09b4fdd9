//! The lanes of Python's tritonclient: a process of their own that reports by lines.

use std::{
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, Command},
    task::JoinHandle,
    time::timeout,
};

use super::{
    lanes::{Caller, Stage},
    record::{Break, Delivered, Lane, Pass, Way},
};
use crate::harness::binaries;

/// How long the process may take for its last answers.
const END_TIMEOUT: Duration = Duration::from_secs(90);

/// The running lanes.
#[derive(Debug)]
pub struct Triton {
    child: Child,
    stdin: ChildStdin,
    reading: JoinHandle<anyhow::Result<Vec<Lane>>>,
}

/// One line of its report.
#[derive(Debug, Deserialize)]
struct Line {
    lane: usize,
    at_us: u64,
    #[serde(flatten)]
    what: What,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "what", rename_all = "lowercase")]
enum What {
    Open { address: Option<String>, first: usize },
    Sent,
    Got { id: String, output: String },
    Broke { code: String, message: String, gave_up: bool },
    End,
}

impl Triton {
    /// Begins these lanes at these addresses; the callers say what is asked, and how often.
    ///
    /// # Errors
    /// Python can't be run.
    pub async fn begin(callers: &[(Way, Caller)], addresses: &[String], stage: &Stage) -> anyhow::Result<Self> {
        let python = binaries::root().join(".cresset/venv/bin/python");
        ensure!(python.exists(), "there is no {}: run `python3 deploy/bootstrap/fetch.py venv`", python.display());
        let mut command = Command::new(python);
        command.arg(binaries::root().join("tests/chaos/lanes.py"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        let stdout = child.stdout.take().context("no stdout")?;
        let now_us = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?;
        let spec = json!({
            "begun_unix_us": now_us.saturating_sub(stage.now_us()),
            "addresses": addresses,
            "lanes": callers.iter().map(spec).collect::<Vec<_>>(),
        });
        stdin.write_all(format!("{spec}\n").as_bytes()).await?;
        stdin.flush().await?;
        let mut lanes: Vec<_> = callers.iter().map(lane).collect();
        let reading = tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Some(line) = lines.next_line().await? {
                let line: Line = serde_json::from_str(&line).with_context(|| format!("tritonclient said {line}"))?;
                note(&mut lanes, line)?;
            }
            Ok(lanes)
        });
        Ok(Self { child, stdin, reading })
    }

    /// Asks for the end and waits for the last answers.
    ///
    /// # Errors
    /// The process failed, or doesn't end.
    pub async fn end(mut self) -> anyhow::Result<Vec<Lane>> {
        self.stdin.write_all(b"end\n").await?;
        self.stdin.flush().await?;
        let lanes = timeout(END_TIMEOUT, self.reading).await.context("tritonclient doesn't end")???;
        let status = self.child.wait().await?;
        ensure!(status.success(), "tritonclient's process ended with {status}");
        Ok(lanes)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn lane((way, caller): &(Way, Caller)) -> Lane {
    let interval_us = micros(caller.interval);
    Lane { kind: caller.kind, way: *way, script: caller.script, interval_us, passes: vec![] }
}

fn spec((way, caller): &(Way, Caller)) -> serde_json::Value {
    let (input, datatype, shape) = caller.kind.input();
    json!({
        "kind": caller.kind.name(),
        "model": caller.kind.model(),
        "resumes": way.resumes(),
        "is_sequence": caller.kind.is_sequence(),
        "parts": caller.kind.parts(),
        "input": input,
        "datatype": datatype.as_str(),
        "shape": shape,
        "interval_us": micros(caller.interval),
        "first_address": caller.first_address,
        "inputs": caller.inputs.iter().map(|input| hex(input)).collect::<Vec<_>>(),
    })
}

/// Writes one line into its lane's last pass.
fn note(lanes: &mut [Lane], Line { lane, at_us, what }: Line) -> anyhow::Result<()> {
    let lane = lanes.get_mut(lane).context("there is no such lane")?;
    if let What::Open { address, first } = what {
        lane.passes.push(Pass { address, first, ..Pass::default() });
        return Ok(());
    }
    let pass = lane.passes.last_mut().context("no pass is open")?;
    match what {
        What::Sent => pass.sent.push(at_us),
        What::Got { id, output } => {
            pass.delivered.push(Delivered { ordinal: id.parse().ok(), at_us, output: unhex(&output)? });
        }
        What::Broke { code, message, gave_up } => pass.broken = Some(Break { at_us, code, message, gave_up }),
        What::Open { .. } | What::End => {}
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> anyhow::Result<Bytes> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        bail!("'{text}' is no hex");
    }
    (0..text.len()).step_by(2).map(|at| Ok(u8::from_str_radix(&text[at..at + 2], 16)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::models::Kind;

    #[test]
    fn lines_become_passes() {
        let caller = Caller {
            kind: Kind::Implicit,
            target: crate::chaos::lanes::Target::List(vec![]),
            script: 1,
            inputs: vec![],
            interval: Duration::from_millis(5),
            first_address: 0,
        };
        let mut lanes = vec![lane(&(Way::Triton, caller))];
        for line in [
            r#"{"lane": 0, "what": "open", "at_us": 1, "address": "a:1", "first": 3}"#,
            r#"{"lane": 0, "what": "sent", "at_us": 2}"#,
            r#"{"lane": 0, "what": "got", "at_us": 3, "id": "0", "output": "00ff"}"#,
            r#"{"lane": 0, "what": "sent", "at_us": 4}"#,
            r#"{"lane": 0, "what": "broke", "at_us": 5, "code": "UNAVAILABLE", "message": "gone", "gave_up": false}"#,
            r#"{"lane": 0, "what": "open", "at_us": 6, "address": "b:1", "first": 0}"#,
            r#"{"lane": 0, "what": "end", "at_us": 7}"#,
        ] {
            note(&mut lanes, serde_json::from_str(line).unwrap()).unwrap();
        }
        let [first, second] = &lanes[0].passes[..] else { panic!("{lanes:?}") };
        assert_eq!((first.address.as_deref(), first.first, &first.sent[..]), (Some("a:1"), 3, &[2, 4][..]));
        assert_eq!(first.delivered, [Delivered { ordinal: Some(0), at_us: 3, output: Bytes::from_static(&[0, 255]) }]);
        assert_eq!(first.broken.as_ref().map(|broken| broken.at_us), Some(5));
        assert_eq!((second.address.as_deref(), second.broken.is_none()), (Some("b:1"), true));
        let nowhere: Line = serde_json::from_str(r#"{"lane": 3, "what": "sent", "at_us": 1}"#).unwrap();
        assert!(note(&mut lanes, nowhere).is_err() && unhex("0").is_err() && unhex("zz").is_err());
    }
}
