//! Many requests on one stream: run side by side, answered in order.
//!
//! Requests are begun one after the other, so that those of one sequence keep their order, and a bounded number of them runs
//! at a time. Everything is polled by whoever reads the answers: a slow reader slows the reading of requests, and dropping
//! the stream cancels what is under way.
use std::{sync::Arc, time::Duration};

use cresset_proto::{
    inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse},
    parameters::{bool_parameter, int64_parameter, keys, string_parameter},
    reason::Reason,
};
use futures::{FutureExt, Stream, StreamExt, future::BoxFuture, stream};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::{CallOptions, Inner, Work, call::dress, received, unary};

/// The code of an error on a stream, for those who asked for rich statuses.
const STATUS_CODE: &str = "cresset_status_code";
/// The reason of an error on a stream.
const STATUS_REASON: &str = "cresset_reason";

/// How much longer than its stream a request may take.
const DEADLINE_GRACE: Duration = Duration::from_millis(250);

type Answer = Result<ModelStreamInferResponse, Status>;

pub(super) fn run<S>(router: Arc<Inner>, requests: S, options: CallOptions) -> impl Stream<Item = Answer> + Send + 'static
where
    S: Stream<Item = Result<ModelInferRequest, Status>> + Send + 'static,
{
    let at_once = router.settings.stream_requests_max.max(1);
    let ends_at = options.deadline;
    // The deadline is the stream's, and ends it as a whole: no request may claim it for itself before.
    let options = Arc::new(CallOptions { deadline: ends_at.map(|at| at + DEADLINE_GRACE), ..options });
    let answers = requests.then(move |request| begin(Arc::clone(&router), request, Arc::clone(&options))).buffered(at_once);
    until_end(answers, ends_at)
}

/// Begins a request and returns what will be its answer.
async fn begin(
    router: Arc<Inner>,
    request: Result<ModelInferRequest, Status>,
    options: Arc<CallOptions>,
) -> BoxFuture<'static, Answer> {
    let request = match request {
        Ok(request) => request,
        // The caller's side of the stream broke.
        Err(status) => return std::future::ready(Err(status)).boxed(),
    };
    let echo = ModelInferResponse { id: request.id.clone(), model_name: request.model_name.clone(), ..Default::default() };
    let deadline = router.deadline(&options);
    let work = router.begin(request, &options, deadline, false).await;
    async move {
        let result = match work {
            Ok(Work::Single(request)) => unary::infer(&router, request, &options, deadline).await,
            Ok(Work::Sequence(answer)) => received(answer).await,
            Err(status) => Err(status),
        };
        finish(result, echo, &options)
    }
    .boxed()
}

/// Puts an answer, or an error, into the stream's form.
fn finish(result: Result<ModelInferResponse, Status>, mut echo: ModelInferResponse, options: &CallOptions) -> Answer {
    let (error_message, mut response) = match result {
        Ok(response) => (String::new(), response),
        Err(status) => {
            let status = dress(status, options.rich_status);
            if options.stream_errors {
                return Err(status);
            }
            if options.rich_status {
                let code = i64::from(i32::from(status.code()));
                echo.parameters.insert(STATUS_CODE.to_owned(), int64_parameter(code));
                if let Some(reason) = Reason::of(&status) {
                    echo.parameters.insert(STATUS_REASON.to_owned(), string_parameter(reason.as_str()));
                }
            }
            // An empty message would mean success.
            let text = if status.message().is_empty() { status.code().description() } else { status.message() };
            (text.to_owned(), echo)
        }
    };
    response.parameters.insert(keys::FINAL.to_owned(), bool_parameter(true));
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
