//! Streams by way of coordinators that are killed in the middle, and in the end together with every worker.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use cresset_client::{ConnectionSettings, Coordinators, ResumeSettings};
use cresset_proto::inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use cresset_tests::{
    chaos::models::{self, Kind},
    harness::Cluster,
    reference::difference,
    speech::Speech,
    tally::DIFFERENCE_MAX,
};
use futures::{StreamExt, stream::BoxStream};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    support::{PATIENCE, cluster, until_ready},
    telemetry::get,
};

/// Streams of each kind.
const STREAMS: usize = 2;
/// Coordinators that are killed, one after the other.
const KILLS: usize = 4;
/// Requests of each stream that are answered between two of them.
const BETWEEN: usize = 15;
/// What one stream has asked and not heard of: more than a client may leave unanswered.
const ASKED_MAX: usize = 256;
/// From one request of a stream to the next.
const INTERVAL: Duration = Duration::from_millis(10);
pub const KINDS: [Kind; 4] = [Kind::Independent, Kind::Speech, Kind::Implicit, Kind::Decoupled];

type Answers = BoxStream<'static, Result<ModelStreamInferResponse, Status>>;

/// One stream and what it asks, again and again.
pub struct Speaker {
    kind: Kind,
    inputs: Vec<Bytes>,
    /// For each input its responses.
    outputs: Vec<Vec<Bytes>>,
}

/// A request that was handed over.
struct Asked {
    id: String,
    place: usize,
    got: usize,
}

fn output(response: &ModelInferResponse) -> Bytes {
    response.raw_output_contents.first().cloned().unwrap_or_default()
}

fn response(message: Result<ModelStreamInferResponse, Status>) -> ModelInferResponse {
    let message = message.unwrap();
    assert_eq!(message.error_message, "", "{:?}", message.infer_response.map(|response| response.id));
    message.infer_response.unwrap()
}

impl Speaker {
    /// Learns what the answers have to be from a cluster that nobody hurts.
    pub async fn learn(kind: Kind, number: usize, speech: &Speech, cluster: &Cluster) -> Self {
        let client = cluster.client().await.unwrap();
        let inputs = kind.script(number, speech);
        let count = inputs.len();
        let ask = |(place, input): (usize, &Bytes)| kind.request(place.to_string(), input, 1, (place == 0, place + 1 == count));
        let requests: Vec<ModelInferRequest> = inputs.iter().enumerate().map(ask).collect();
        let mut outputs = vec![vec![]; count];
        let mut answers = client.stream(futures::stream::iter(requests)).boxed();
        while let Some(message) = answers.next().await {
            let response = response(message);
            outputs[response.id.parse::<usize>().unwrap()].push(output(&response));
        }
        assert!(outputs.iter().all(|parts| parts.len() == kind.parts()));
        Self { kind, inputs, outputs }
    }

    /// Asks at a steady pace until `over`, then to the end of its sequence, and checks every answer as it comes.
    pub async fn speak(self, coordinators: Coordinators, over: CancellationToken, answered: watch::Sender<usize>) {
        let (requests, queued) = mpsc::channel(1);
        let (tell, asked) = mpsc::channel(ASKED_MAX);
        let answers = coordinators.stream(ReceiverStream::new(queued), ResumeSettings::default()).boxed();
        let asking = async {
            let mut ticks = interval(INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let mut sequence = 0;
            'asking: loop {
                sequence += 1;
                for (place, input) in self.inputs.iter().enumerate() {
                    ticks.tick().await;
                    let is_last = place + 1 == self.inputs.len() || over.is_cancelled();
                    // Sequences one after the other under the same id, too.
                    let request =
                        self.kind.request(format!("{sequence}-{place}"), input, 1 + sequence % 3, (place == 0, is_last));
                    tell.send(Asked { id: request.id.clone(), place, got: 0 }).await.unwrap();
                    requests.send(request).await.unwrap();
                    if is_last && over.is_cancelled() {
                        break 'asking;
                    }
                }
            }
            drop((requests, tell));
        };
        tokio::join!(asking, self.listen(answers, asked, answered));
    }

    async fn listen(&self, mut answers: Answers, mut asked: mpsc::Receiver<Asked>, answered: watch::Sender<usize>) {
        let mut open: VecDeque<Asked> = VecDeque::new();
        while let Some(message) = timeout(2 * PATIENCE, answers.next()).await.expect("silence") {
            let response = response(message);
            while let Ok(next) = asked.try_recv() {
                open.push_back(next);
            }
            let at = open.iter().position(|asked| asked.id == response.id);
            let at = at.unwrap_or_else(|| panic!("{} was answered before, or never asked", response.id));
            assert!(at == 0 || self.kind == Kind::Decoupled, "{} overtook {}", response.id, open[0].id);
            let Asked { place, got, .. } = &mut open[at];
            let expected = &self.outputs[*place][*got];
            let apart = difference(&output(&response), expected);
            assert!(apart <= DIFFERENCE_MAX, "{} differs by {apart}", response.id);
            *got += 1;
            if *got == self.kind.parts() {
                open.remove(at);
                answered.send_modify(|count| *count += 1);
            }
        }
        while let Some(next) = asked.recv().await {
            open.push_back(next);
        }
        assert!(open.is_empty(), "{} has no answer", open[0].id);
    }
}

/// Waits until every stream has so many more answers.
pub async fn more(counts: &[watch::Receiver<usize>]) {
    for count in counts {
        let mut count = count.clone();
        let wanted = *count.borrow() + BETWEEN;
        timeout(2 * PATIENCE, count.wait_for(|count| *count >= wanted)).await.expect("a stream stands still").unwrap();
    }
}

/// How many sequences coordinators have taken up from one another since each of them started.
async fn taken_up(cluster: &Cluster) -> u64 {
    let mut sum = 0;
    for member in &cluster.file().coordinators {
        let metrics = get(cluster.http(&member.id).unwrap(), "/metrics").await;
        let count = metrics.lines().find_map(|line| line.strip_prefix("cresset_router_sequences_taken_up_total "));
        sum += count.map_or(0, |count| count.parse::<u64>().unwrap());
    }
    sum
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_outlive_every_coordinator_and_once_all_workers_with_it() {
    let repository = models::repository().unwrap();
    let names: Vec<&str> = KINDS.iter().map(|kind| kind.model()).collect();
    let mut cluster = cluster(3, 2, &repository, &names);
    let speech = Speech::load().unwrap();
    let (over, mut running, mut counts) = (CancellationToken::new(), JoinSet::new(), Vec::new());
    // One list for all, so that all are at the same coordinator: the first, and after its death the next.
    let coordinators = Coordinators::new(cluster.endpoints(), ConnectionSettings::default());
    for (number, kind) in (0..STREAMS).flat_map(|number| KINDS.map(|kind| (number, kind))) {
        let speaker = Speaker::learn(kind, number, &speech, &cluster).await;
        let (answered, count) = watch::channel(0);
        counts.push(count);
        running.spawn(speaker.speak(coordinators.clone(), over.clone(), answered));
    }
    let ids: Vec<String> = cluster.file().coordinators.iter().map(|member| member.id.clone()).collect();
    for kill in 0..KILLS {
        more(&counts).await;
        let id = &ids[kill % ids.len()];
        cluster.kill(id).unwrap();
        more(&counts).await;
        cluster.restart_process(id).unwrap();
        until_ready(&cluster, names[0]).await;
    }
    more(&counts).await;
    assert!(taken_up(&cluster).await > 0, "sequences were begun anew, not taken up at their workers");
    // Now nobody holds any sequence but its client.
    let workers: Vec<String> = cluster.file().workers.iter().map(|member| member.id.clone()).collect();
    let both: Vec<&str> = workers.iter().map(String::as_str).chain([&*ids[KILLS % ids.len()]]).collect();
    cluster.kill_all(both.iter().copied()).unwrap();
    for id in both {
        cluster.restart_process(id).unwrap();
    }
    more(&counts).await;
    over.cancel();
    while let Some(done) = running.join_next().await {
        done.unwrap();
    }
}
