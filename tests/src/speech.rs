//! The speech that the voice-activity model listens to.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use hound::{SampleFormat, WavReader};

use crate::harness::binaries;

/// Samples in one chunk: what the model takes at once, 32 ms.
pub const CHUNK_SAMPLES: usize = 512;
/// Samples in a second.
pub const RATE: u32 = 16_000;

/// A recording that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SpeechError {
    /// The file.
    #[error("can't read {}: {source}; run `make fetch`", path.display())]
    Wav {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: hound::Error,
    },
    /// Another kind of recording.
    #[error("{} has {channels} channels at {rate} Hz with {bits} bits, it must have 1 at {RATE} Hz with 16", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it has.
        channels: u16,
        /// What it has.
        rate: u32,
        /// What it has.
        bits: u16,
    },
}

/// A recording, cut into chunks.
#[derive(Debug, Clone)]
pub struct Speech {
    chunks: Vec<Bytes>,
}

impl Speech {
    /// The one that `make fetch` brings.
    ///
    /// # Errors
    /// [`SpeechError`].
    pub fn load() -> Result<Self, SpeechError> {
        Self::read(&binaries::root().join(".cresset/speech/speech.wav"))
    }

    /// Reads a WAV file: one channel, 16 kHz, 16 bits. What is left after the last whole chunk is dropped.
    ///
    /// # Errors
    /// [`SpeechError`].
    pub fn read(path: &Path) -> Result<Self, SpeechError> {
        let wrong = |source| SpeechError::Wav { path: path.to_owned(), source };
        let mut reader = WavReader::open(path).map_err(wrong)?;
        let spec = reader.spec();
        if spec.channels != 1 || spec.sample_rate != RATE || spec.bits_per_sample != 16 || spec.sample_format != SampleFormat::Int
        {
            let (channels, rate, bits) = (spec.channels, spec.sample_rate, spec.bits_per_sample);
            return Err(SpeechError::Kind { path: path.to_owned(), channels, rate, bits });
        }
        let samples = reader.samples::<i16>().collect::<Result<Vec<_>, _>>().map_err(wrong)?;
        let chunk = |samples: &[i16]| samples.iter().flat_map(|sample| (f32::from(*sample) / 32_768.0).to_le_bytes()).collect();
        Ok(Self { chunks: samples.chunks_exact(CHUNK_SAMPLES).map(chunk).collect() })
    }

    /// How many chunks it has.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether it is shorter than one chunk.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// `count` chunks from `start` on, around the end and on from the beginning: as FP32 little-endian bytes.
    pub fn chunks(&self, start: usize, count: usize) -> Vec<Bytes> {
        self.chunks.iter().cycle().skip(start % self.chunks.len().max(1)).take(count).cloned().collect()
    }
}
