//! Flags of `cresset bench`.

use std::{str::FromStr, time::Duration};

use super::schedule::Arrivals;
use crate::{predict::InputArg, settings};

/// Requests in flight, connections and streams that one run may have.
const MANY: i64 = 100_000;

/// Flags of `cresset bench`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The model to load
    pub name: String,
    /// The version to ask [default: the server's choice]
    #[arg(long, value_name = "V", value_parser = clap::value_parser!(u64).range(1..))]
    pub version: Option<u64>,

    /// Closed loop: keep N requests in flight; several levels run one after the other [default: 1]
    #[arg(long, value_name = "N,…", value_delimiter = ',', conflicts_with = "rate", help_heading = "Load",
          value_parser = clap::value_parser!(u32).range(1..=MANY))]
    pub concurrency: Vec<u32>,
    /// Open loop: send R requests a second, whatever becomes of them; several levels run one after the other
    #[arg(long, value_name = "R,…", value_delimiter = ',', value_parser = rate, help_heading = "Load")]
    pub rate: Vec<f64>,
    /// How requests of an open loop are spread over time
    #[arg(long, value_enum, default_value_t = Arrivals::Poisson, help_heading = "Load")]
    pub arrivals: Arrivals,
    /// Requests of an open loop that may be in flight; what is due beyond is sent late, and its latency says so
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Load",
          value_parser = clap::value_parser!(u32).range(1..=MANY))]
    pub inflight_max: u32,
    /// How long each level is measured
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = settings::duration, help_heading = "Load")]
    pub duration: Duration,
    /// How long each level runs before it is measured
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = pause, help_heading = "Load")]
    pub warmup: Duration,
    /// Measure so many requests for each level, instead of a duration
    #[arg(long, value_name = "N", conflicts_with = "duration", value_parser = clap::value_parser!(u64).range(1..),
          help_heading = "Load")]
    pub requests: Option<u64>,

    /// An input: NAME=@FILE.npy or NAME=VALUES; for the others data is made up: floats from 0 to 1, integers 0 or 1
    #[arg(short, long = "input", value_name = "NAME=VALUE", help_heading = "Requests")]
    pub inputs: Vec<InputArg>,
    /// The shape to make an input up with, where the model leaves dimensions free; with or without the batch
    #[arg(long = "shape", value_name = "NAME:D,D,…", help_heading = "Requests")]
    pub shapes: Vec<ShapeArg>,
    /// Rows of each request [default: 1, or as many as the given inputs have]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Requests")]
    pub batch: Option<u32>,
    /// What made-up data and the times of arrival are drawn from; the same number, the same run
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Requests")]
    pub seed: u64,
    /// Compare each answer with the first, byte for byte (of a sequence: the first at its position), and exit 1 if one
    /// differs; where a server batches requests, floats may differ in their last digits
    #[arg(long, help_heading = "Requests")]
    pub check: bool,

    /// Connections, in turn to the endpoints
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Transport",
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub connections: u32,
    /// Threads of the load generator; each has its share of the connections
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Transport",
          value_parser = clap::value_parser!(u32).range(1..=256))]
    pub threads: u32,
    /// Tell the server how long each call may take (--timeout); on streams there is no way to
    #[arg(long, conflicts_with = "stream", help_heading = "Transport")]
    pub deadline: bool,
    /// Send on bidirectional streams, without waiting for the answer before
    #[arg(long, help_heading = "Transport")]
    pub stream: bool,
    /// How many streams at a time [default: one for each connection]
    #[arg(long, value_name = "N", requires = "stream", help_heading = "Transport",
          value_parser = clap::value_parser!(u32).range(1..=MANY))]
    pub streams: Option<u32>,
    /// Close each stream after so many requests and open another [default: never]
    #[arg(long, value_name = "N", requires = "stream", value_parser = clap::value_parser!(u64).range(1..),
          help_heading = "Transport")]
    pub requests_per_stream: Option<u64>,
    /// Send sequences of so many requests, as many at a time as there are requests in flight
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000), help_heading = "Transport")]
    pub sequence_length: Option<u32>,

    /// Percentiles of the latency to report
    #[arg(long, value_name = "P,…", value_delimiter = ',', default_value = "50,90,99,99.9", help_heading = "Report")]
    pub percentiles: Vec<Percentile>,
    /// Processes of this machine whose CPU time and memory to report, as those of the server
    #[arg(long = "process", value_name = "PID,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..),
          help_heading = "Report")]
    pub processes: Vec<u32>,
}

const AFTER_HELP: &str = "Any server of the Open Inference Protocol will do. In an open loop latency counts from the moment a request \
                          was due, so a server that stands still is charged with all that was due meanwhile. --timeout is the \
                          limit of each request.\n\
                          Exit codes: 0 measured (requests may have failed: the report says so), 1 no request of a level was \
                          answered or --check found a difference, 2 bad usage.";

fn rate(text: &str) -> Result<f64, String> {
    const RATE_MAX: f64 = 1e7;
    let rate: f64 = text.trim().parse().map_err(|_| "it must be a number of requests per second".to_owned())?;
    if rate > 0.0 && rate <= RATE_MAX { Ok(rate) } else { Err(format!("it must be above 0 and at most {RATE_MAX}")) }
}

/// A duration that may be 0.
fn pause(text: &str) -> Result<Duration, String> {
    let number = text.trim().trim_end_matches(|c: char| c.is_ascii_alphabetic());
    if number.parse() == Ok(0.0) { Ok(Duration::ZERO) } else { settings::duration(text) }
}

/// `--shape NAME:1,784`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeArg {
    /// The input.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<i64>,
}

impl FromStr for ShapeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write it as NAME:1,784, with dimensions of 0 or more".to_owned();
        let (name, dims) = text.rsplit_once(':').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong)?;
        let shape = dims.split(',').map(|dim| dim.trim().parse().ok().filter(|dim| *dim >= 0)).collect::<Option<_>>();
        Ok(Self { name: name.to_owned(), shape: shape.ok_or_else(wrong)? })
    }
}

/// A percentile, with the digits that the user gave it.
#[derive(Debug, Clone, PartialEq)]
pub struct Percentile {
    /// As in `99.9`.
    pub text: String,
    /// From 0 to 100.
    pub percent: f64,
}

impl FromStr for Percentile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim().trim_start_matches('p');
        let percent = text.parse::<f64>().ok().filter(|percent| (0.0..=100.0).contains(percent));
        Ok(Self { text: text.to_owned(), percent: percent.ok_or("it must be from 0 to 100")? })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &[&str]) -> Result<Args, String> {
        let whole = ["bench", "m"].iter().chain(line);
        Line::try_parse_from(whole).map(|line| line.args).map_err(|error| error.to_string())
    }

    #[test]
    fn levels_are_lists() {
        let args = parse(&["--rate", "10,2.5e3", "--warmup", "0s", "--percentiles", "50,p99.99"]).unwrap();
        assert_eq!((&args.rate[..], args.warmup), (&[10.0, 2500.0][..], Duration::ZERO));
        assert_eq!(args.percentiles[1], Percentile { text: "99.99".into(), percent: 99.99 });
        assert_eq!(parse(&["--concurrency", "1,8"]).unwrap().concurrency, [1, 8]);
    }

    #[test]
    fn shapes_are_names_with_dimensions() {
        let shape: ShapeArg = "a:b:1,784".parse().unwrap();
        assert_eq!(shape, ShapeArg { name: "a:b".into(), shape: vec![1, 784] });
        for wrong in ["x", "x:", ":1", "x:1,-1", "x:a"] {
            assert!(wrong.parse::<ShapeArg>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for wrong in [
            &["--rate", "0"][..],
            &["--rate", "NaN"],
            &["--rate", "1", "--concurrency", "1"],
            &["--concurrency", "0"],
            &["--percentiles", "101"],
            &["--streams", "2"],
            &["--requests", "5", "--duration", "5s"],
            &["--sequence-length", "0"],
            &["--process", "0"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
