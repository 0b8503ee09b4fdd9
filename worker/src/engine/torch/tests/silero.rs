//! The real voice-activity model, which keeps its state inside.

use super::*;

const CHUNK: usize = 512;

fn path() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cresset/models/silero_vad/1/model.pt");
    assert!(path.is_file(), "the voice-activity model is not there, run `make fetch`");
    path
}

fn silero_spec(path: &Path) -> LoadSpec {
    let mut spec = spec(path, &["INPUT__0"], &["OUTPUT__0"]);
    spec.constants.insert("sr".into(), Scalar::Int(16000));
    spec.outputs[0].datatype = Some(Datatype::Fp32);
    spec
}

fn load() -> Box<dyn Model> {
    TorchEngine.load(&silero_spec(&path())).expect("the model loads")
}

/// A chunk of something like a voice: `seed` is its pitch.
fn chunk(seed: usize, number: usize) -> InputParts {
    let samples: Vec<f32> = (0..CHUNK)
        .map(|at| {
            let time = (number * CHUNK + at) as f32 / 16000.0;
            let pitch = 110.0 + 17.0 * seed as f32;
            let voice: f32 =
                (1..8).map(|overtone| (time * pitch * overtone as f32 * std::f32::consts::TAU).sin() / overtone as f32).sum();
            0.3 * voice * (0.6 + 0.4 * (time * 19.0 + seed as f32).sin())
        })
        .collect();
    floats(&[1, i64::try_from(CHUNK).expect("small")], &samples)
}

fn step(sequence: &mut Box<dyn SequenceModel>, seed: usize, number: usize) -> Bytes {
    let outputs = sequence.step(&[chunk(seed, number)]).expect("it runs");
    assert_eq!((outputs.len(), &outputs[0].shape[..]), (1, &[1, 1][..]));
    outputs[0].data.clone()
}

#[test]
fn its_signature_is_known_and_needs_the_sample_rate() {
    let model = load();
    assert_eq!(model.signature().to_string(), "forward(x: Tensor, sr: int) -> Tensor");
    assert!((1_000_000..3_000_000).contains(&model.memory_bytes()), "{} bytes", model.memory_bytes());
    let mut without = silero_spec(&path());
    without.constants.clear();
    assert!(refusal(&without).to_string().contains("cresset.scalar.sr"));
}

#[test]
fn interleaved_sequences_equal_separate_runs() {
    let mut model = load();
    let alone: Vec<Vec<Bytes>> = (0..4)
        .map(|seed| {
            let mut sequence = model.open_sequence().expect("opened");
            (0..20).map(|number| step(&mut sequence, seed, number)).collect()
        })
        .collect();
    let mut sequences: Vec<_> = (0..4).map(|_| model.open_sequence().expect("opened")).collect();
    for number in 0..20 {
        for ((seed, sequence), alone) in sequences.iter_mut().enumerate().zip(&alone) {
            assert_eq!(step(sequence, seed, number), alone[number], "sequence {seed}, chunk {number}");
        }
    }
    assert_ne!(alone[0], alone[1], "different voices give different outputs");
}

#[test]
fn a_checkpoint_continues_in_another_copy_and_another_load_bit_for_bit() {
    let mut model = load();
    let mut elsewhere = load();
    let mut straight = model.open_sequence().expect("opened");
    for number in 0..24 {
        let state = straight.checkpoint().expect("saved");
        assert!(state.len() < 4096, "{} bytes", state.len());
        let mut copies = [model.open_sequence().expect("opened"), elsewhere.open_sequence().expect("opened")];
        for copy in &mut copies {
            copy.restore(&state).expect("restored");
            assert_eq!(copy.checkpoint().expect("saved"), state, "the same state gives the same bytes");
        }
        let expected = step(&mut straight, 0, number);
        for copy in &mut copies {
            assert_eq!(step(copy, 0, number), expected, "chunk {number}");
        }
    }
}

#[test]
fn loading_on_another_thread_does_not_disturb_a_running_sequence() {
    let mut model = load();
    let mut alone = model.open_sequence().expect("opened");
    let expected: Vec<Bytes> = (0..60).map(|number| step(&mut alone, 1, number)).collect();
    let loader = std::thread::spawn(|| {
        for _ in 0..4 {
            step(&mut load().open_sequence().expect("opened"), 2, 0);
        }
    });
    let mut sequence = model.open_sequence().expect("opened");
    let outputs: Vec<Bytes> = (0..60).map(|number| step(&mut sequence, 1, number)).collect();
    assert_eq!(outputs, expected);
    loader.join().expect("the loads succeed");
}

#[test]
fn a_wrong_chunk_is_an_error_and_the_next_sequence_is_fine() {
    let mut model = load();
    let mut sequence = model.open_sequence().expect("opened");
    let failed = sequence.step(&[floats(&[1, 100], &[0.0; 100])]).expect_err("100 samples are too few");
    assert_eq!(failed, EngineError::Failed("ValueError: Input audio chunk is too short".into()));
    step(&mut model.open_sequence().expect("opened"), 0, 0);
}

#[test]
fn a_damaged_file_never_loads_and_never_crashes() {
    let whole = std::fs::read(path()).expect("read");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("model.pt");
    let try_bytes = |bytes: &[u8]| {
        std::fs::write(&file, bytes).expect("written");
        TorchEngine.load(&silero_spec(&file))
    };
    let cannot_load = |bytes: &[u8], what: String| match try_bytes(bytes) {
        Err(EngineError::CannotLoad(why)) => {
            assert!(why.len() <= 512 && !why.contains(&*dir.path().to_string_lossy()), "{what}: {why}");
        }
        Err(other) => panic!("{what}: {other}"),
        Ok(_) => panic!("{what}: it loads"),
    };
    for part in 0..20 {
        cannot_load(&whole[..whole.len() * part / 20], format!("cut to {part}/20"));
    }
    for cut in [1, 2, 8, 21, 22, 23, 64, 1000] {
        cannot_load(&whole[..whole.len() - cut], format!("{cut} bytes off the end"));
    }
    // Flips all over the file, and more at its end, where the directory is. One may hit a byte that
    // means nothing (a date, padding): then the model loads, and is the same model.
    let expected = step(&mut load().open_sequence().expect("opened"), 0, 0);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut refused = 0;
    for round in 0..48 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let span = if round % 2 == 0 { whole.len() } else { 12_000 };
        let at = whole.len() - 1 - usize::try_from(state >> 8).expect("64 bits") % span;
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (state % 8);
        match try_bytes(&flipped) {
            Err(EngineError::CannotLoad(_)) => refused += 1,
            Err(other) => panic!("byte {at}: {other}"),
            Ok(mut model) => assert_eq!(step(&mut model.open_sequence().expect("opened"), 0, 0), expected, "byte {at}"),
        }
    }
    assert!(refused >= 24, "only {refused} of 48 flips were noticed");
    assert!(try_bytes(&whole).is_ok(), "the whole file loads");
}
