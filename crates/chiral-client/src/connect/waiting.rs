//! Waits for a server to appear, and reports it.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};

use super::options::{ConnectError, ConnectOptions};
use crate::{error::Error, waiting::Waiting};

/// Repeats an attempt to connect every `period`, until there is a server or trying again would not help.
pub(crate) async fn wait_for_server<T, F: Future<Output = Result<T, ConnectError>>>(
    options: &ConnectOptions,
    period: Duration,
    attempt: impl Fn() -> F,
) -> Result<T, Error> {
    let mut last = "the first attempt is not over".to_owned();
    let attempts = async {
        let mut progress = Progress::default();
        loop {
            match attempt().await {
                Ok(connected) => return Ok(connected),
                Err(ConnectError::Failed(error)) => return Err(error),
                Err(ConnectError::Unavailable(reason)) => last = reason,
            }
            if let Some(waiting) = progress.next(&options.uri, &last, Instant::now()) {
                options.on_waiting.call(&waiting);
            }
            sleep(period).await;
        }
    };
    let Some(deadline) = options.deadline else { return attempts.await };
    let outcome = timeout(deadline, attempts).await;
    outcome.unwrap_or_else(|_| Err(Error::NoServer { uri: options.uri.clone(), deadline, last }))
}

/// What is reported while waiting: at once that it waits, after a while why, and then whenever the reason
/// changes.
#[derive(Default)]
struct Progress {
    reported: Option<(Instant, String)>,
}

impl Progress {
    /// A server that is just starting may take this long. A reason that keeps changing is reported no
    /// more often.
    const PERIOD: Duration = Duration::from_secs(5);

    /// What to report now, if anything.
    fn next<'a>(&mut self, uri: &'a str, reason: &'a str, now: Instant) -> Option<Waiting<'a>> {
        let Some((reported_at, reported)) = &mut self.reported else {
            self.reported = Some((now, String::new()));
            return Some(Waiting::ForServer { uri, reason: None });
        };
        if reported == reason || now - *reported_at < Self::PERIOD {
            return None;
        }
        (*reported_at, *reported) = (now, reason.to_owned());
        Some(Waiting::ForServer { uri, reason: Some(reason) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_reported_at_once_and_its_reason_after_a_while() {
        let (mut progress, start) = (Progress::default(), Instant::now());
        let mut line = |ms, reason| {
            let waiting = progress.next("ws://robot:8765", reason, start + Duration::from_millis(ms));
            waiting.map(|waiting| waiting.to_string())
        };
        assert_eq!(line(0, "refused").as_deref(), Some("waiting for server at ws://robot:8765 …"));
        assert_eq!(line(4999, "refused"), None, "it may just be starting");
        assert_eq!(line(5000, "refused").as_deref(), Some("still waiting for ws://robot:8765: refused"));
        assert_eq!(line(20_000, "refused"), None, "it is known");
        assert_eq!(
            line(20_100, "no answer").as_deref(),
            Some("still waiting for ws://robot:8765: no answer")
        );
        assert_eq!(line(20_200, "refused"), None, "a reason that keeps changing");
    }
}
