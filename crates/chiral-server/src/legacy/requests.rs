//! The pending requests of a legacy client, which are served one after another, and whether its actions may
//! reach the robot. Pure.

use std::collections::VecDeque;

use chiral_proto::{Code, Fault, Request};

/// Pending requests of one session: minutes of a client that sends 30 requests a second during a long reset,
/// some 100 bytes each.
const MAX_PENDING: usize = 4096;
/// Rows in the pending steps of one session, each of some 30 to 130 bytes.
const MAX_PENDING_ROWS: usize = 1 << 16;

/// A request, or why it is refused when its turn comes.
pub(crate) type CheckedRequest = Result<Request, Fault>;

/// The pending requests of a session, oldest first.
#[derive(Default)]
pub(crate) struct RequestQueue {
    pending: VecDeque<CheckedRequest>,
    is_shared: bool,
    /// The client's last session ended, and it has not reset the robot since.
    must_reset: bool,
}

impl RequestQueue {
    /// The queue of a client's own connection.
    pub(crate) fn for_connection() -> RequestQueue {
        RequestQueue::default()
    }

    /// The queue of a client on keys that it shares with others. One that `must_reset` moves nothing before:
    /// its last session ended, and what it sends may be of that time.
    pub(crate) fn for_shared_keys(must_reset: bool) -> RequestQueue {
        RequestQueue { is_shared: true, must_reset, ..RequestQueue::default() }
    }

    /// Whether other clients may send on the same keys.
    pub(crate) fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Adds a request. An error says why it gets no reply at all.
    pub(crate) fn push(&mut self, request: CheckedRequest) -> Result<(), Fault> {
        let rows = self.pending.iter().map(step_rows).sum::<usize>() + step_rows(&request);
        let refuse = |text| Err(Fault::new(Code::QueueFull, text).retryable());
        if self.pending.len() == MAX_PENDING {
            return refuse(format!("expected at most {MAX_PENDING} pending requests, found more"));
        }
        if rows > MAX_PENDING_ROWS {
            return refuse(format!(
                "expected at most {MAX_PENDING_ROWS} rows in pending steps, found {rows}"
            ));
        }
        self.pending.push_back(request);
        Ok(())
    }

    /// Fails if actions that arrive now must not reach the robot.
    pub(crate) fn check_actions(&self) -> Result<(), Fault> {
        if self.has_pending_reset() {
            // They would overtake it.
            let text = "expected actions after the reset's reply, found a pending reset";
            return Err(Fault::new(Code::Resetting, text));
        }
        if self.must_reset { Err(must_reset()) } else { Ok(()) }
    }

    /// Whether a reset has not reached the robot yet.
    fn has_pending_reset(&self) -> bool {
        self.pending.iter().flatten().any(|request| matches!(request, Request::Reset { .. }))
    }

    /// Takes the next request to serve. The one before it has been served.
    pub(crate) fn pop(&mut self) -> Option<CheckedRequest> {
        let request = self.pending.pop_front()?;
        let is_step = matches!(request, Ok(Request::Step { .. }));
        Some(if is_step && self.must_reset { Err(must_reset()) } else { request })
    }

    /// Records that the robot was reset.
    pub(crate) fn note_reset(&mut self) {
        self.must_reset = false;
    }
}

/// The rows of a step, a measure of the robot's time that it takes.
fn step_rows(request: &CheckedRequest) -> usize {
    match request {
        Ok(Request::Step { actions, .. }) => actions.rows(),
        _ => 0,
    }
}

fn must_reset() -> Fault {
    let text = "expected a reset before actions, since this client's last session ended, found none";
    Fault::new(Code::Stale, text)
}

#[cfg(test)]
mod tests {
    use chiral_proto::ActionChunk;

    use super::*;

    const RESET: Request = Request::Reset { seed: None, options: chiral_proto::ValueMap::new() };

    fn step(rows: usize) -> Request {
        Request::Step { session: 0, episode: 0, actions: ActionChunk::new(1, vec![0.0; rows]).unwrap() }
    }

    #[test]
    fn requests_are_served_in_order_up_to_a_limit() {
        for mut requests in [RequestQueue::for_connection(), RequestQueue::for_shared_keys(false)] {
            assert_eq!(requests.pop(), None);
            for request in [RESET, Request::GetObs, Request::GetMetadata] {
                requests.push(Ok(request)).unwrap();
            }
            assert_eq!(requests.check_actions().unwrap_err().code, Code::Resetting);
            assert_eq!(requests.pop(), Some(Ok(RESET)));
            assert_eq!(requests.check_actions(), Ok(()));
            assert_eq!(requests.pop(), Some(Ok(Request::GetObs)));
            assert_eq!(requests.pop(), Some(Ok(Request::GetMetadata)));
            for _ in 0..MAX_PENDING {
                requests.push(Ok(Request::GetObs)).unwrap();
            }
            assert_eq!(requests.push(Ok(Request::GetObs)).unwrap_err().code, Code::QueueFull);
        }

        let mut requests = RequestQueue::for_connection();
        let half = || Ok(step(MAX_PENDING_ROWS / 2));
        for _ in 0..2 {
            requests.push(half()).unwrap();
        }
        assert_eq!(requests.push(half()).unwrap_err().code, Code::QueueFull);
        requests.push(Ok(Request::GetObs)).unwrap();
        requests.pop();
        requests.push(half()).unwrap();
    }

    #[test]
    fn a_client_whose_last_session_ended_moves_nothing_until_it_resets() {
        let mut requests = RequestQueue::for_shared_keys(true);
        for request in [Request::GetMetadata, step(1), RESET, step(1), RESET, step(2)] {
            requests.push(Ok(request)).unwrap();
        }
        assert_eq!(requests.pop(), Some(Ok(Request::GetMetadata)));
        for when in ["before the reset", "after a reset that failed"] {
            let refused = requests.pop();
            assert!(matches!(refused, Some(Err(fault)) if fault.code == Code::Stale), "{when}");
            assert_eq!(requests.pop(), Some(Ok(RESET)));
        }
        assert_eq!(requests.check_actions().unwrap_err().code, Code::Stale, "the reset is not over yet");
        requests.note_reset();
        assert_eq!(requests.check_actions(), Ok(()));
        assert_eq!(requests.pop(), Some(Ok(step(2))), "after the reset");
        requests.push(Ok(step(3))).unwrap();
        assert_eq!(requests.pop(), Some(Ok(step(3))));
    }
}
