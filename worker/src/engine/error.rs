//! What can go wrong in an engine, and how libtorch's texts become short messages.

use std::path::Path;

/// The longest message, in bytes: libtorch's texts can carry a whole weight tensor.
pub const MESSAGE_BYTES_MAX: usize = 512;

/// Why an engine refused or failed. Messages are one line of at most [`MESSAGE_BYTES_MAX`] bytes,
/// without paths or addresses of this machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The model file is missing, damaged, or doesn't fit its configuration.
    #[error("can't load the model: {0}")]
    CannotLoad(String),
    /// The inputs of a call don't fit the model's configuration.
    #[error("{0}")]
    BadInput(String),
    /// The model raised, or returned something that can't be answered.
    #[error("the model failed: {0}")]
    Failed(String),
    /// The device has no memory left; a smaller batch may work.
    #[error("the device is out of memory: {0}")]
    OutOfMemory(String),
    /// The state of a sequence can't be saved: it can't be moved to another replica.
    #[error("the sequence's state can't be saved: {0}")]
    NotCheckpointable(String),
    /// The bytes are not a checkpoint of this model.
    #[error("the checkpoint can't be used: {0}")]
    BadCheckpoint(String),
    /// The call ran longer than the model may; its device's thread was given up with it.
    #[error("{0}")]
    Overran(String),
    /// The device or its thread is gone; nothing will work on it until the process is started again.
    #[error("the device is lost: {0}")]
    DeviceLost(String),
}

/// Cuts a text to its useful line, takes out paths and addresses, and bounds its length.
///
/// TorchScript puts a traceback before what the model raised and libtorch puts one after its own
/// errors; in both the useful line is the first that is neither indented nor part of a traceback.
pub fn short_message(text: &str) -> String {
    let line = useful_line(text);
    let clean: Vec<String> = line.split_whitespace().map(without_place).collect();
    bound(&clean.join(" "))
}

/// As [`short_message`], for a text about a file that may name its whole path.
pub(super) fn short_message_about(text: &str, path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    short_message(&text.replace(&*path.to_string_lossy(), &name))
}

fn useful_line(text: &str) -> &str {
    // A traceback's frames end with the line that points at the place; the last one counts.
    let rest = text.rfind("<--- HERE").map_or(text, |at| &text[at + "<--- HERE".len()..]);
    rest.lines()
        .find(|line| {
            let starts_inside = line.starts_with([' ', '\t']);
            let trimmed = line.trim();
            !starts_inside
                && !trimmed.is_empty()
                && !trimmed.starts_with("Traceback of TorchScript")
                && !trimmed.starts_with("The following operation failed in the TorchScript interpreter")
                && !trimmed.starts_with("Exception raised from")
        })
        .or_else(|| text.lines().map(str::trim).find(|line| !line.is_empty()))
        .unwrap_or("no reason given")
}

/// Keeps the last component of an absolute path and hides an address.
fn without_place(word: &str) -> String {
    let start = word.find(|c: char| !"\"'`([{<".contains(c)).unwrap_or(word.len());
    let (before, rest) = word.split_at(start);
    if let Some(digits) = rest.strip_prefix("0x")
        && digits.chars().take_while(char::is_ascii_hexdigit).count() >= 6
    {
        return format!("{before}0x..");
    }
    if rest.starts_with('/') && rest.matches('/').count() >= 2 {
        let name = rest.rsplit('/').find(|part| !part.is_empty()).unwrap_or("");
        return format!("{before}{name}");
    }
    word.to_string()
}

fn bound(line: &str) -> String {
    if line.len() <= MESSAGE_BYTES_MAX {
        return line.to_string();
    }
    let mut end = MESSAGE_BYTES_MAX - 3;
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...", &line[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_after_a_traceback_is_kept() {
        let text = "The following operation failed in the TorchScript interpreter.\n\
                    Traceback of TorchScript, serialized code (most recent call last):\n  \
                    File \"code/__torch__/m.py\", line 4, in forward\n    x: Tensor) -> Tensor:\n    \
                    return torch.mm(x, x)\n           ~~~~~~~~ <--- HERE\n\n\
                    Traceback of TorchScript, original code (most recent call last):\n  \
                    File \"/home/somebody/model.py\", line 9, in forward\n    return x.mm(x)\n           \
                    ~~~~ <--- HERE\nRuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3 and 1x3)\n";
        assert_eq!(short_message(text), "RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3 and 1x3)");
    }

    #[test]
    fn a_c_plus_plus_text_is_cut_to_its_first_line() {
        let text =
            "expected scalar type Float but found Int\nException raised from mm at ../aten/x.cpp:12\nframe #0: f + 0x57 (0x7f2a)";
        assert_eq!(short_message(text), "expected scalar type Float but found Int");
    }

    #[test]
    fn paths_and_addresses_are_taken_out() {
        let text = "open file failed, file path: /srv/models/voice/1/model.pt (at 0x7fffdeadbeef) 3/4 a/b /x";
        assert_eq!(short_message(text), "open file failed, file path: model.pt (at 0x.. 3/4 a/b /x");
    }

    #[test]
    fn a_path_with_spaces_is_taken_out_when_it_is_known() {
        let path = Path::new("/srv/my models/1/model.pt");
        assert_eq!(short_message_about("no /srv/my models/1/model.pt here", path), "no model.pt here");
    }

    #[test]
    fn a_long_text_is_bounded_at_a_character() {
        let short = short_message(&"é".repeat(4000));
        assert!(short.len() <= MESSAGE_BYTES_MAX && short.ends_with("é..."), "{}", short.len());
        assert_eq!(short_message(""), "no reason given");
        assert_eq!(short_message("\n  only indented\n"), "only indented");
    }
}
