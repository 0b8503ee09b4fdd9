//! What a disk did to a coordinator's log: what was never promised is cut off, anything else is refused. The others go on.
use std::{
    fs,
    path::{Path, PathBuf},
};

use cresset_proto::admin::v1::{CoordinatorRole, DeployRequest, LabelRequest};
use cresset_tests::harness::{Cluster, ModelRepository, fp32_model};
use rustix::process::Signal;

use crate::{
    beside::Beside,
    members::{caught_up, replace_c2},
    support::{PATIENCE, admin, command, coordinators_alone},
};

/// Commands that lie in the log before it is damaged.
const WRITES: u64 = 200;
/// Fewer than any batch has, so that it is the last one that is torn, and no other.
const TORN_BYTES: u64 = 3;
const MODEL: &str = "model";

/// Three coordinators of which `c1` leads, with some commands behind them.
async fn led_by_c1(repository: &ModelRepository) -> (Cluster, tempfile::TempDir) {
    let (cluster, folder) = coordinators_alone(repository);
    cluster.leader().await.unwrap();
    assert_eq!(command(&cluster, &["leader", "transfer", "c1"]).code, Some(0));
    let request =
        DeployRequest { command_id: vec![1; 16].into(), name: MODEL.into(), version: 0, replicas: 1, ..Default::default() };
    admin(&cluster, "c1").await.deploy(request).await.unwrap();
    write(&cluster).await;
    (cluster, folder)
}

fn repository() -> ModelRepository {
    let repository = ModelRepository::new().unwrap();
    repository.add_bytes(MODEL, &fp32_model(8, ""), b"never loaded").unwrap();
    repository
}

/// Has commands agreed on, one after the other.
async fn write(cluster: &Cluster) {
    let mut admin = admin(cluster, "c1").await;
    for number in 0..WRITES {
        let labels = [("a-label-of-some-length".to_owned(), number % 2)].into();
        let request = LabelRequest { command_id: rand::random::<[u8; 16]>().to_vec().into(), name: MODEL.into(), labels };
        admin.label(request).await.unwrap();
    }
}

/// The data folder of a coordinator.
fn data_dir(cluster: &Cluster, id: &str) -> PathBuf {
    let words = cluster.process(id).unwrap().command_line();
    let at = words.iter().position(|word| word == "--data-dir").unwrap();
    (&words[at + 1]).into()
}

/// The newest file of a coordinator's log, and how much of it is written: the rest is room that was taken for later.
fn newest_file(data_dir: &Path) -> (PathBuf, u64) {
    let files = fs::read_dir(data_dir.join("log")).unwrap().map(|entry| entry.unwrap().path());
    let newest = files.filter(|path| path.extension().is_some_and(|kind| kind == "raftlog")).max().unwrap();
    let written = fs::read(&newest).unwrap().iter().rposition(|byte| *byte != 0).unwrap() + 1;
    (newest, written as u64)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_tail_is_cut_off_and_told_and_the_coordinator_goes_on() {
    let repository = repository();
    let (mut cluster, _folder) = led_by_c1(&repository).await;
    cluster.kill("c2").unwrap();
    let (file, written) = newest_file(&data_dir(&cluster, "c2"));
    fs::File::options().write(true).open(&file).unwrap().set_len(written - TORN_BYTES).unwrap();
    write(&cluster).await;

    cluster.restart_process("c2").unwrap();
    caught_up(&cluster, "c2", CoordinatorRole::Follower).await;
    let log = fs::read_to_string(cluster.data_dir().join("logs/c2.log")).unwrap();
    let told = log.lines().find(|line| line.contains("the log's last write was cut short")).unwrap_or_else(|| panic!("{log}"));
    assert!(told.contains("WARN") && told.contains(file.file_name().unwrap().to_str().unwrap()), "{told}");
    // It counts: with another one gone, the two that are left agree.
    cluster.kill("c3").unwrap();
    write(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_is_refused_and_the_way_out_that_is_named_works() {
    let repository = repository();
    let (mut cluster, _folder) = led_by_c1(&repository).await;
    let c2 = cluster.process("c2").unwrap();
    c2.signal(Signal::TERM).unwrap();
    c2.wait(PATIENCE).unwrap();
    let data_dir = data_dir(&cluster, "c2");
    let (file, written) = newest_file(&data_dir);
    let mut bytes = fs::read(&file).unwrap();
    bytes[written as usize / 2] ^= 1;
    fs::write(&file, bytes).unwrap();
    write(&cluster).await;

    cluster.restart_process("c2").unwrap();
    cluster.process("c2").unwrap().wait(PATIENCE).unwrap();
    let log = fs::read_to_string(cluster.data_dir().join("logs/c2.log")).unwrap();
    let refused = log.lines().last().unwrap();
    let is_found = refused.contains("the log is damaged: entries ") || refused.contains("the log has lost entries");
    assert!(is_found && refused.contains(data_dir.to_str().unwrap()), "{log}");
    assert!(refused.contains("replace this coordinator by one with a new id and an empty folder"), "{log}");

    let mut new = Beside::new(31);
    replace_c2(&cluster, &repository, &mut new).await;
    // The new one counts.
    cluster.kill("c3").unwrap();
    write(&cluster).await;
}
