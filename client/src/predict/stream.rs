//! Many requests on one stream: run side by side, each answer in its place.
//!
//! Requests are begun one after the other, so that those of one sequence keep their order, and a bounded number of them runs
//! at a time. They stand in lines, and a line's answers leave in the order of its requests: one line for all who don't say
//! otherwise, one for each sequence that says `cresset_unordered`, and none for what may overtake everything. Everything is
//! polled by whoever reads the answers: a slow reader slows the reading of requests, and dropping the stream cancels what is
//! under way.
use std::{collections::HashMap, sync::Arc, time::Duration};

use cresset_proto::{
    inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse},
    parameters::{bool_parameter, int64_parameter, keys, string_parameter},
    reason::Reason,
};
use futures::{
    FutureExt, Stream, StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream, SelectAll},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{CallOptions, Checked, Inner, Work, call::dress, many, received, sessions::Key, unary};

/// The code of an error on a stream, for those who asked for rich statuses.
const STATUS_CODE: &str = "cresset_status_code";

/// How much longer than its stream a request may take.
const DEADLINE_GRACE: Duration = Duration::from_millis(250);

type Answer = Result<ModelStreamInferResponse, Status>;

pub(super) fn run<S>(router: Arc<Inner>, requests: S, options: CallOptions) -> impl Stream<Item = Answer> + Send + 'static
where
    S: Stream<Item = Result<ModelInferRequest, Status>> + Send + 'static,
{
    let ends_at = options.deadline;
    // The deadline is the stream's, and ends it as a whole: no request may claim it for itself before.
    let options = Arc::new(CallOptions { deadline: ends_at.map(|at| at + DEADLINE_GRACE), ..options });
    let lines = Lines::new(router, requests.boxed(), options);
    let answers = stream::unfold(lines, |mut lines| async move { lines.next().await.map(|answer| (answer, lines)) });
    until_end(answers, ends_at)
}

/// A request in a line.
enum Entry {
    /// Its turn has come.
    Request(Box<Turn>),
    /// The caller's side of the stream broke: the end, after what was taken before.
    Broken(Status),
}

struct Turn {
    checked: Result<Checked, Status>,
    /// What its answer carries in any case.
    echo: ModelInferResponse,
    /// Its sequence, if it has a line of its own.
    key: Option<Key>,
}

/// What leaves a line.
struct Left {
    /// Absent for the silent end of a decoupled model's responses.
    answer: Option<Answer>,
    /// Nothing follows for this request.
    is_last: bool,
    key: Option<Key>,
}

/// A sequence that has requests in a line: its next ones have to enter the same.
struct Member {
    /// Its own line; `None` when it stands in the line of all.
    own: Option<mpsc::Sender<Entry>>,
    requests: usize,
}

/// All requests of a stream that are under way.
struct Lines {
    router: Arc<Inner>,
    options: Arc<CallOptions>,
    requests: BoxStream<'static, Result<ModelInferRequest, Status>>,
    reading: bool,
    at_once: usize,
    under_way: usize,
    /// The line of all who don't ask for another.
    in_order: mpsc::Sender<Entry>,
    members: HashMap<Key, Member>,
    answers: SelectAll<BoxStream<'static, Left>>,
}

impl Lines {
    fn new(
        router: Arc<Inner>,
        requests: BoxStream<'static, Result<ModelInferRequest, Status>>,
        options: Arc<CallOptions>,
    ) -> Self {
        let at_once = router.settings.stream_requests_max.max(1);
        let (in_order, first) = line(&router, &options, at_once);
        let answers = SelectAll::from_iter([first]);
        Self { router, options, requests, reading: true, at_once, under_way: 0, in_order, members: HashMap::new(), answers }
    }

    /// The next answer, whosever it is.
    async fn next(&mut self) -> Option<Answer> {
        loop {
            tokio::select! {
                request = self.requests.next(), if self.reading && self.under_way < self.at_once => match request {
                    Some(Ok(request)) => self.enter(request).await,
                    Some(Err(status)) => {
                        self.reading = false;
                        self.under_way += 1;
                        send(&self.in_order, Entry::Broken(status));
                    }
                    None => self.reading = false,
                },
                Some(left) = self.answers.next(), if self.under_way > 0 => {
                    if left.is_last {
                        self.leave(left.key);
                    }
                    if left.answer.is_some() {
                        return left.answer;
                    }
                }
                else => return None,
            }
        }
    }

    /// Puts a request into its line.
    async fn enter(&mut self, request: ModelInferRequest) {
        self.under_way += 1;
        let echo = ModelInferResponse { id: request.id.clone(), model_name: request.model_name.clone(), ..Default::default() };
        let deadline = self.router.deadline(&self.options);
        let checked = match self.router.check(request, deadline, false).await {
            Ok(checked) if checked.route.decoupled => return self.answers.push(self.many(checked, echo)),
            checked => checked,
        };
        let (unordered, key) = match &checked {
            Ok(Checked { parameters, route, .. }) => {
                let sequence = parameters.sequence_id.clone().filter(|_| route.stateful);
                let stream = parameters.stream_id.clone();
                (parameters.unordered, sequence.map(|sequence| Key { model: route.name.clone(), stream, sequence }))
            }
            Err(_) => (false, None),
        };
        if unordered && key.is_none() {
            let (router, options) = (Arc::clone(&self.router), Arc::clone(&self.options));
            let entry = Entry::Request(Box::new(Turn { checked, echo, key: None }));
            return self.answers.push(stream::once(async move { begin(router, options, entry).await.await }).boxed());
        }
        let sender = match &key {
            Some(key) => self.join(key, unordered),
            None => self.in_order.clone(),
        };
        send(&sender, Entry::Request(Box::new(Turn { checked, echo, key })));
    }

    /// The line of a sequence that has one more request.
    fn join(&mut self, key: &Key, unordered: bool) -> mpsc::Sender<Entry> {
        let member = self.members.entry(key.clone()).or_insert_with(|| {
            let own = unordered.then(|| {
                let (sender, answers) = line(&self.router, &self.options, self.at_once);
                self.answers.push(answers);
                sender
            });
            Member { own, requests: 0 }
        });
        member.requests += 1;
        member.own.as_ref().unwrap_or(&self.in_order).clone()
    }

    fn leave(&mut self, key: Option<Key>) {
        self.under_way -= 1;
        if let Some(key) = key
            && let Some(member) = self.members.get_mut(&key)
        {
            member.requests -= 1;
            if member.requests == 0 {
                self.members.remove(&key);
            }
        }
    }

    /// The responses of a decoupled model, which stand in no line.
    fn many(&self, checked: Checked, echo: ModelInferResponse) -> BoxStream<'static, Left> {
        let options = Arc::clone(&self.options);
        let wants_end = checked.parameters.empty_final_response;
        let end_echo = echo.clone();
        let responses = many::responses(Arc::clone(&self.router), checked, Arc::clone(&options));
        let answers = responses.map(move |response| {
            let is_last = response.is_err();
            (Some(finish(response, is_last, echo.clone(), &options)), is_last)
        });
        let end = wants_end.then(|| item(String::new(), true, end_echo));
        // An error is the last of its answers, and nothing is taken from the rest.
        answers
            .chain(stream::iter([(end, true)]))
            .scan(false, |ended, (answer, is_last)| {
                let before = std::mem::replace(ended, *ended || is_last);
                std::future::ready((!before).then_some(Left { answer, is_last, key: None }))
            })
            .boxed()
    }
}

/// A line: its requests go in here, and its answers come in the same order.
fn line(router: &Arc<Inner>, options: &Arc<CallOptions>, at_once: usize) -> (mpsc::Sender<Entry>, BoxStream<'static, Left>) {
    let (sender, entries) = mpsc::channel(at_once);
    let (router, options) = (Arc::clone(router), Arc::clone(options));
    let begun = ReceiverStream::new(entries).then(move |entry| begin(Arc::clone(&router), Arc::clone(&options), entry));
    (sender, begun.buffered(at_once).boxed())
}

/// A line has room for everything that may be under way, and lasts as long as its sender.
fn send(line: &mpsc::Sender<Entry>, entry: Entry) {
    if line.try_send(entry).is_err() {
        tracing::error!("a request of a stream was lost: its line has no room");
    }
}

/// Begins a request and returns what will be its answer.
async fn begin(router: Arc<Inner>, options: Arc<CallOptions>, entry: Entry) -> BoxFuture<'static, Left> {
    let (checked, echo, key) = match entry {
        Entry::Request(turn) => {
            let Turn { checked, echo, key } = *turn;
            (checked, echo, key)
        }
        Entry::Broken(status) => {
            return std::future::ready(Left { answer: Some(Err(status)), is_last: true, key: None }).boxed();
        }
    };
    let (work, deadline) = match checked {
        Ok(checked) => {
            let deadline = checked.deadline;
            (router.begin(checked, &options).await, deadline)
        }
        Err(status) => (Err(status), Instant::now()),
    };
    async move {
        let result = match work {
            Ok(Work::Single(request, version, key)) => unary::infer(&router, request, version, key, &options, deadline).await,
            Ok(Work::Sequence(answer)) => received(answer).await,
            Err(status) => Err(status),
        };
        Left { answer: Some(finish(result, true, echo, &options)), is_last: true, key }
    }
    .boxed()
}

/// Puts an answer, or an error, into the stream's form.
fn finish(
    result: Result<ModelInferResponse, Status>,
    is_last: bool,
    mut echo: ModelInferResponse,
    options: &CallOptions,
) -> Answer {
    let status = match result {
        Ok(response) => return item(String::new(), is_last, response),
        Err(status) => dress(status, options.rich_status),
    };
    if options.stream_errors {
        return Err(status);
    }
    if options.rich_status {
        let code = i64::from(i32::from(status.code()));
        echo.parameters.insert(STATUS_CODE.to_owned(), int64_parameter(code));
        if let Some(reason) = Reason::of(&status) {
            echo.parameters.insert(keys::REASON.to_owned(), string_parameter(reason.as_str()));
        }
    }
    // An empty message would mean success.
    let text = if status.message().is_empty() { status.code().description() } else { status.message() };
    item(text.to_owned(), true, echo)
}

fn item(error_message: String, is_last: bool, mut response: ModelInferResponse) -> Answer {
    response.parameters.insert(keys::FINAL.to_owned(), bool_parameter(is_last));
    Ok(ModelStreamInferResponse { error_message, infer_response: Some(response) })
}

/// Answers up to and with the first error, which at the deadline is that it has passed. What is under way then is dropped
/// with the stream that comes in.
pub fn until_end<T: Send + 'static>(
    answers: impl Stream<Item = Result<T, Status>> + Send + 'static,
    deadline: Option<Instant>,
) -> impl Stream<Item = Result<T, Status>> + Send + 'static {
    stream::unfold(Some(answers.boxed()), move |answers| async move {
        let mut answers = answers?;
        let next = match deadline {
            Some(deadline) => timeout_at(deadline, answers.next()).await,
            None => Ok(answers.next().await),
        };
        let late = |_| Some(Err(Reason::DeadlineExceeded.status("the stream's deadline passed")));
        match next.unwrap_or_else(late)? {
            Ok(answer) => Some((Ok(answer), Some(answers))),
            Err(status) => Some((Err(status), None)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_with_its_first_error_or_at_its_deadline() {
        let one_and_silence = || stream::iter([Ok(1)]).chain(stream::pending());
        let deadline = Instant::now() + Duration::from_secs(2);
        let answers: Vec<_> = until_end(one_and_silence(), Some(deadline)).collect().await;
        assert_eq!(Instant::now(), deadline);
        assert_eq!(*answers[0].as_ref().unwrap(), 1);
        assert_eq!(Reason::of(answers[1].as_ref().unwrap_err()), Some(Reason::DeadlineExceeded));
        assert_eq!(answers.len(), 2);

        let error = stream::iter([Ok(1), Err(Status::unavailable("x")), Ok(2)]);
        assert_eq!(until_end(error, None).count().await, 2);
    }
}
