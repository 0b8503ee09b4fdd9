use proptest::prelude::*;

use super::*;
use crate::consensus::log::{merge, tests::entry};

fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
    HardState { term, vote, commit, ..HardState::default() }
}

fn snapshot(index: u64, term: u64, data: &[u8]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    snapshot.set_data(data.to_vec().into());
    snapshot.mut_metadata().index = index;
    snapshot.mut_metadata().term = term;
    snapshot
}

/// A founded log with entries 2 to `last` of term 1, in clean state on the disk.
fn written(dir: &Path, last: u64) -> Stored {
    let mut log = EngineLog::open(dir, "demo", 1).unwrap();
    assert_eq!(log.load().unwrap(), None);
    let founding = snapshot(1, 1, b"founding");
    log.append(&Batch {
        snapshot: Some(&founding),
        clear: true,
        compact: Some((1, 1)),
        hard_state: hard_state(1, 0, 1),
        sync: true,
        ..Batch::default()
    })
    .unwrap();
    for index in 2..=last {
        let entries = [entry(index, 1, format!("entry {index}").repeat(20).as_bytes())];
        log.append(&Batch { entries: &entries, hard_state: hard_state(1, 1, index - 1), sync: true, ..Batch::default() })
            .unwrap();
    }
    log.checkpoint().unwrap();
    reopened(log)
}

fn reopened(log: EngineLog) -> Stored {
    let dir = log.dir.clone();
    drop(log);
    EngineLog::open(&dir, "demo", 1).unwrap().load().unwrap().expect("it was written")
}

fn log_file(dir: &Path) -> PathBuf {
    let mut files: Vec<_> = fs::read_dir(dir.join("log")).unwrap().map(|file| file.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "raftlog"));
    files.sort();
    files.pop().expect("there is a log file")
}

#[test]
fn what_was_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let stored = written(dir.path(), 300);
    assert_eq!(stored.base, (1, 1));
    assert_eq!((stored.hard_state.term, stored.hard_state.vote, stored.hard_state.commit), (1, 1, 299));
    assert_eq!(stored.entries.len(), 299);
    assert_eq!(stored.snapshot, snapshot(1, 1, b"founding"));
}

#[test]
fn one_that_joins_may_have_promised_something_before_it_has_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = EngineLog::open(dir.path(), "demo", 1).unwrap();
    assert_eq!(log.load().unwrap(), None);
    // It heard of a term, and no more.
    log.append(&Batch { hard_state: hard_state(7, 0, 0), sync: true, ..Batch::default() }).unwrap();
    let stored = reopened(log);
    assert_eq!((stored.hard_state.term, stored.base, stored.entries.len()), (7, (0, 0), 0));
    assert_eq!(stored.snapshot, Snapshot::default());
    // Then it gets what it waited for.
    let mut log = EngineLog::open(dir.path(), "demo", 1).unwrap();
    log.load().unwrap();
    let first = snapshot(50, 6, b"state");
    let hard_state = hard_state(7, 0, 50);
    let (clear, compact) = (true, Some((50, 6)));
    log.append(&Batch { snapshot: Some(&first), clear, compact, hard_state, sync: true, ..Batch::default() }).unwrap();
    let stored = reopened(log);
    assert_eq!((stored.snapshot, stored.base), (first, (50, 6)));
}

#[test]
fn a_torn_tail_that_promised_nothing_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 10);
    // One more batch, whose write the power loss cut short: nobody was told that it is there.
    let mut log = EngineLog::open(dir.path(), "demo", 1).unwrap();
    log.load().unwrap();
    let before = fs::metadata(log_file(dir.path())).unwrap().len();
    let entries = [entry(11, 1, &[7; 500])];
    log.append(&Batch { entries: &entries, hard_state: hard_state(1, 1, 10), ..Batch::default() }).unwrap();
    drop(log);
    let file = fs::OpenOptions::new().write(true).open(log_file(dir.path())).unwrap();
    file.set_len(before + 50).unwrap();
    let stored = EngineLog::open(dir.path(), "demo", 1).unwrap().load().unwrap().expect("it was written");
    assert_eq!(stored.entries.last().map(|entry| entry.index), Some(10));
    assert_eq!(stored.hard_state.commit, 9);
}

#[test]
fn a_log_that_ends_before_its_promise_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 10);
    let path = log_file(dir.path());
    let length = fs::metadata(&path).unwrap().len();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 100).unwrap();
    let error = EngineLog::open(dir.path(), "demo", 1).unwrap().load().unwrap_err();
    let text = error.to_string();
    assert!(text.contains("the log has lost entries: expected entry 10 or later, found entry 9 as the last"), "{text}");
    assert!(text.contains(&dir.path().display().to_string()), "{text}");
}

#[test]
fn a_missing_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 10);
    fs::remove_dir_all(dir.path().join("log")).unwrap();
    let error = EngineLog::open(dir.path(), "demo", 1).unwrap().load().unwrap_err();
    assert!(matches!(error, LogError::Lost { what: "everything", .. }), "{error}");
}

#[test]
fn a_damaged_header_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 10);
    let path = log_file(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    bytes[3] ^= 0xff;
    fs::write(&path, bytes).unwrap();
    let opened = EngineLog::open(dir.path(), "demo", 1).and_then(|mut log| log.load());
    assert!(matches!(opened, Err(LogError::Lost { .. } | LogError::Engine { .. })), "{opened:?}");
}

#[test]
fn a_flipped_byte_in_the_middle_is_found_at_start() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 100);
    let path = log_file(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    let needle = b"entry 50entry 50";
    let at = bytes.windows(needle.len()).position(|window| window == needle).expect("entry 50 is there in plain");
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    let opened = EngineLog::open(dir.path(), "demo", 1).and_then(|mut log| log.load());
    assert!(matches!(opened, Err(LogError::Lost { .. } | LogError::Damaged { .. })), "{opened:?}");
}

#[test]
fn a_missing_identity_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 10);
    fs::remove_file(dir.path().join("identity.json")).unwrap();
    let opened = EngineLog::open(dir.path(), "demo", 1);
    assert!(matches!(opened, Err(LogError::Damaged { .. })));
}

#[test]
fn a_folder_serves_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let log = EngineLog::open(dir.path(), "demo", 1).unwrap();
    let error = EngineLog::open(dir.path(), "demo", 1).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("in use by another process"), "{error}");
    drop(log);
    EngineLog::open(dir.path(), "demo", 1).unwrap();
}

#[test]
fn a_node_that_was_killed_while_founding_founds_again() {
    let dir = tempfile::tempdir().unwrap();
    drop(EngineLog::open(dir.path(), "demo", 1).unwrap());
    assert_eq!(EngineLog::open(dir.path(), "demo", 1).unwrap().load().unwrap(), None);
}

#[test]
fn old_files_go_away() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 1);
    let mut log = EngineLog::open(dir.path(), "demo", 1).unwrap();
    log.load().unwrap();
    let mut peak = 0;
    for round in 0..60_u64 {
        let entries: Vec<_> = (0..100).map(|n| entry(2 + round * 100 + n, 1, &incompressible(round, n))).collect();
        let last = entries[99].index;
        log.append(&Batch { entries: &entries, hard_state: hard_state(1, 1, last), sync: true, ..Batch::default() }).unwrap();
        log.append(&Batch {
            snapshot: Some(&snapshot(last, 1, b"s")),
            compact: Some((last - 10, 1)),
            hard_state: hard_state(1, 1, last),
            ..Batch::default()
        })
        .unwrap();
        let files = fs::read_dir(dir.path().join("log")).unwrap();
        peak = peak.max(files.map(|file| file.unwrap().metadata().unwrap().len()).sum());
    }
    assert!(peak < 64 << 20, "{peak} bytes of log for 96 MB written");
    assert_eq!(reopened(log).entries.len(), 10);
}

fn incompressible(round: u64, n: u64) -> Vec<u8> {
    let mut x = round * 1_000 + n + 1;
    (0..16_000)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

#[derive(Debug, Clone)]
enum Step {
    Append { back: u64, count: u64 },
    Install { ahead: u64 },
    Snapshot { keep: u64 },
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..5_u64, 1..8_u64).prop_map(|(back, count)| Step::Append { back, count }),
        1 => (0..10_u64).prop_map(|ahead| Step::Install { ahead }),
        1 => (0..5_u64).prop_map(|keep| Step::Snapshot { keep }),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The disk agrees with the plain meaning of a batch, whatever is replaced, dropped, installed and reopened.
    #[test]
    fn the_engine_holds_what_the_model_holds(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let mut log = EngineLog::open(dir.path(), "demo", 1).unwrap();
        log.load().unwrap();
        let mut model = Stored::default();
        let run = |log: &mut EngineLog, model: &mut Stored, batch: &Batch<'_>| {
            log.append(batch).unwrap();
            *model = merge(std::mem::take(model), batch);
        };
        let founding = snapshot(1, 1, b"founding");
        let clear = Batch { snapshot: Some(&founding), clear: true, compact: Some((1, 1)), ..Batch::default() };
        run(&mut log, &mut model, &Batch { hard_state: hard_state(1, 0, 1), ..clear });
        for (round, step) in steps.into_iter().enumerate() {
            let term = round as u64 + 2;
            let commit = model.hard_state.commit;
            let last = model.base.0 + model.entries.len() as u64;
            match step {
                Step::Append { back, count } => {
                    let first = (last + 1).saturating_sub(back).max(commit + 1);
                    let entries: Vec<_> = (first..first + count).map(|index| entry(index, term, b"data")).collect();
                    let hard_state = hard_state(term, 0, commit + (first - commit) / 2);
                    run(&mut log, &mut model, &Batch { entries: &entries, hard_state, ..Batch::default() });
                }
                Step::Install { ahead } => {
                    let index = commit + ahead;
                    let snapshot = snapshot(index, term, b"installed");
                    let batch = Batch { snapshot: Some(&snapshot), clear: true, compact: Some((index, term)), ..Batch::default() };
                    run(&mut log, &mut model, &Batch { hard_state: hard_state(term, 0, index), ..batch });
                }
                Step::Snapshot { keep } => {
                    let snapshot = snapshot(commit, term, b"own");
                    let cut = commit.saturating_sub(keep).max(model.base.0);
                    let cut_term = model.entries.iter().find(|e| e.index == cut).map_or(model.base.1, |e| e.term);
                    let batch = Batch { snapshot: Some(&snapshot), compact: Some((cut, cut_term)), ..Batch::default() };
                    run(&mut log, &mut model, &Batch { hard_state: hard_state(term, 0, commit), ..batch });
                }
                Step::Reopen => {
                    drop(log);
                    log = EngineLog::open(dir.path(), "demo", 1).unwrap();
                    let stored = log.load().unwrap();
                    prop_assert_eq!(stored.as_ref(), Some(&model));
                }
            }
        }
        prop_assert_eq!(&reopened(log), &model);
    }
}
