"""Puts one minute of recorded speech together: utterances of one reader, with pauses between them.

The utterances are sentences of *Sense and Sensibility* read for LibriVox, a recording in the public
domain, as they lie in pocketsphinx's test data (16 kHz, mono, 16 bit).
"""

import io
import tarfile
import wave

from errors import Problem

RATE_HZ = 16_000
_UTTERANCES = ("0870", "0880", "0890", "0920", "0930")
_PATH = "{root}/test/data/librivox/sense_and_sensibility_01_austen_64kb-{number}.wav"
# Each utterance twice, in two orders; the second pass is quieter. Gains are in sixteenths.
_SCRIPT = [(number, 16) for number in _UTTERANCES] + [(number, 9) for number in reversed(_UTTERANCES)]
_PAUSES_MS = (400, 1500, 700, 2000, 300, 1200, 900, 2500, 600, 800, 1000)


def assemble(archive, target):
    """Writes `target`, a WAV file, from the source archive of pocketsphinx."""
    clips = _utterances(archive)
    noise = _Noise()
    samples = noise.samples(_PAUSES_MS[0])
    for (number, gain), pause_ms in zip(_SCRIPT, _PAUSES_MS[1:]):
        samples += _scaled(clips[number], gain)
        samples += noise.samples(pause_ms)
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(bytes(samples))
    return len(samples) / 2 / RATE_HZ


def _utterances(archive):
    root = archive.rsplit("/", 1)[-1][: -len(".tar.gz")]
    clips = {}
    with tarfile.open(archive) as tar:
        for number in _UTTERANCES:
            name = _PATH.format(root=root, number=number)
            try:
                data = tar.extractfile(name).read()
            except KeyError as error:
                raise Problem(f"{archive} holds no {name}") from error
            with wave.open(io.BytesIO(data)) as clip:
                if (clip.getnchannels(), clip.getsampwidth(), clip.getframerate()) != (1, 2, RATE_HZ):
                    raise Problem(f"{name} is not 16 kHz mono with 16 bits")
                clips[number] = clip.readframes(clip.getnframes())
    return clips


def _scaled(frames, gain):
    out = bytearray(len(frames))
    for at in range(0, len(frames), 2):
        value = int.from_bytes(frames[at : at + 2], "little", signed=True) * gain // 16
        out[at : at + 2] = value.to_bytes(2, "little", signed=True)
    return out


class _Noise:
    """The faint noise of a quiet room, the same in every run."""

    def __init__(self):
        self._state = 20_240_229

    def samples(self, duration_ms):
        out = bytearray()
        for _ in range(duration_ms * RATE_HZ // 1000):
            self._state = (self._state * 1_103_515_245 + 12_345) % (1 << 31)
            out += ((self._state >> 16) % 17 - 8).to_bytes(2, "little", signed=True)
        return out
