//! Names of things, one type each, so that one can't be passed for another.
use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A coordinator in the Raft group. Written `c1`, `c2`, …; never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerId(pub u64);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{}", self.0)
    }
}

impl FromStr for PeerId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.strip_prefix('c').and_then(|digits| digits.parse().ok()) {
            Some(number) if number > 0 => Ok(Self(number)),
            _ => Err(IdError::Peer(text.to_owned())),
        }
    }
}

/// A worker, by the name its operator gave it: 1 to 63 letters, digits, `-`, `_` or `.`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WorkerId(String);

impl WorkerId {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for WorkerId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if (1..=63).contains(&text.len()) && text.chars().all(plain) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError::Worker(cut(text)))
        }
    }
}

/// Checks a model's name. It becomes a folder's name, so it can't climb out of the repository.
///
/// # Errors
/// [`IdError::Model`] unless it is 1 to 255 bytes long, free of `/`, `\` and control characters, and doesn't start with a dot.
pub fn check_model_name(name: &str) -> Result<(), IdError> {
    let bad = name.is_empty()
        || name.len() > 255
        || name.starts_with('.')
        || name.chars().any(|c| c == '/' || c == '\\' || c.is_control());
    if bad { Err(IdError::Model(cut(name))) } else { Ok(()) }
}

/// Longest label, in bytes.
pub const LABEL_BYTES_MAX: usize = 64;

/// Checks a label, a name for a version of a model. It stands where a version's number may stand, so it can't be one.
///
/// # Errors
/// [`IdError::Label`] unless it is a letter and up to 63 letters, digits, `-`, `_` or `.`.
pub fn check_label(label: &str) -> Result<(), IdError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good = label.len() <= LABEL_BYTES_MAX && label.starts_with(|c: char| c.is_ascii_alphabetic()) && label.chars().all(plain);
    if good { Ok(()) } else { Err(IdError::Label(cut(label))) }
}

/// What stands in `model_version`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VersionText<'a> {
    /// Nothing: the highest version that is served.
    Highest,
    /// A number.
    Number(u64),
    /// What may be a label.
    Label(&'a str),
}

/// Reads `model_version` where labels are known.
///
/// # Errors
/// [`VersionError`], in Triton's words, for what is neither a number nor could be a label.
pub fn version_text(text: &str) -> Result<VersionText<'_>, VersionError> {
    match model_version(text) {
        Ok(version) => Ok(version.map_or(VersionText::Highest, VersionText::Number)),
        Err(VersionError::NotANumber(_)) if check_label(text).is_ok() => Ok(VersionText::Label(text)),
        Err(error) => Err(error),
    }
}

/// Reads `model_version` where labels aren't known: `None` for empty, which means the highest that is served.
///
/// # Errors
/// [`VersionError`], in Triton's words, since clients test on them.
pub fn model_version(text: &str) -> Result<Option<u64>, VersionError> {
    if text.is_empty() {
        return Ok(None);
    }
    match (text.parse::<u64>(), text.parse::<i64>()) {
        (Ok(version), _) => Ok(Some(version)),
        (Err(_), Ok(_)) => Err(VersionError::Negative(cut(text))),
        (Err(_), Err(_)) => Err(VersionError::NotANumber(cut(text))),
    }
}

/// What is wrong with a `model_version`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// Not a number, or too large a one.
    #[error(
        "failed to get model version from specified version string '{0}' (it must be a whole number, or empty; or a label of the model, where a coordinator is asked)"
    )]
    NotANumber(String),
    /// What could be a label, and isn't one of this model.
    #[error(
        "failed to get model version from specified version string '{label}' (it must be a whole number, a label of model '{model}', or empty)"
    )]
    NoLabel {
        /// What was there.
        label: String,
        /// The model.
        model: String,
    },
    /// Below zero.
    #[error("invalid model version specified '{0}': it must be 0 or more, or empty")]
    Negative(String),
}

/// What is wrong with a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not `c` and a number.
    #[error("coordinator id '{0}' must be 'c' and a number from 1, as in c1")]
    Peer(String),
    /// Not a plain short word.
    #[error("worker id '{0}' must be 1 to 63 letters, digits, '-', '_' or '.'")]
    Worker(String),
    /// Not a plain short word that begins with a letter.
    #[error("label '{0}' must be a letter and up to 63 letters, digits, '-', '_' or '.'")]
    Label(String),
    /// Not a plain folder name.
    #[error("model name '{0}' must be 1 to 255 bytes without '/', '\\' or control characters, and not start with '.'")]
    Model(String),
}

/// A name from outside, short enough to be repeated in a message.
fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
}

/// The name of a sequence, as its client chose it: a number or a short text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SequenceId {
    /// `sequence_id` as a number; never 0. Negative numbers are allowed, as Triton allows them.
    Number(i64),
    /// `sequence_id` as a text of 1 to 128 bytes.
    Text(String),
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_what_they_print() {
        assert_eq!("c3".parse::<PeerId>().unwrap(), PeerId(3));
        assert_eq!(PeerId(3).to_string(), "c3");
        assert_eq!("gpu-7.rack_2".parse::<WorkerId>().unwrap().as_str(), "gpu-7.rack_2");
    }

    #[test]
    fn versions_are_numbers_or_nothing() {
        assert_eq!(model_version(""), Ok(None));
        assert_eq!(model_version("7"), Ok(Some(7)));
        assert_eq!(model_version(&u64::MAX.to_string()), Ok(Some(u64::MAX)));
        for (text, words) in [
            ("latest", "failed to get model version from specified version string 'latest'"),
            ("1.0", "failed to get model version from specified version string '1.0'"),
            ("99999999999999999999", "failed to get model version"),
            ("-1", "invalid model version specified '-1'"),
        ] {
            let error = model_version(text).unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
        }
    }

    #[test]
    fn a_label_stands_where_a_number_may() {
        assert_eq!(version_text(""), Ok(VersionText::Highest));
        assert_eq!(version_text("7"), Ok(VersionText::Number(7)));
        assert_eq!(version_text("canary"), Ok(VersionText::Label("canary")));
        for text in ["1.0", "-1", "7th", "a b", "é", &"x".repeat(LABEL_BYTES_MAX + 1)] {
            assert!(version_text(text).is_err() && check_label(text).is_err(), "{text}");
        }
        assert!(check_label(&"x".repeat(LABEL_BYTES_MAX)).is_ok() && check_label("").is_err());
    }

    #[test]
    fn ids_refuse_what_could_harm() {
        for text in ["", "c", "c0", "3", "cx"] {
            assert!(text.parse::<PeerId>().is_err(), "{text}");
        }
        for text in ["", "a/b", "a b", &"x".repeat(64)] {
            assert!(text.parse::<WorkerId>().is_err(), "{text}");
        }
        for name in ["", "..", ".hidden", "a/b", "a\\b", "a\nb", &"x".repeat(256)] {
            assert!(check_model_name(name).is_err(), "{name}");
        }
        assert!(check_model_name("silero_vad").is_ok());
    }
}
