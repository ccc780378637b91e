//! The pending requests of a legacy client, and which of them is served when. Pure: `now` is passed in.
//!
//! On a connection of its own every request is served, one after another. On the Zenoh keys that all of a
//! network shares, clients cannot be told apart and a reply reaches every subscriber, so a second client must
//! be recognized by its requests before it gets a reply:
//!
//! - A client has one request in flight at a time. Another request before the reply is out of turn: it is
//!   dropped.
//! - A client probes: it sends `metadata` every half a second until it receives a reply. While a session has
//!   had no other request, a probe is answered at once, but not again while a reply is in flight: any one
//!   reply will do, and the client may receive the others late. The client may go on after the reply to an
//!   earlier probe, so its next request is in turn.
//! - Later, `metadata` is either the client's own request or a second client's probe. It is held for a
//!   second. If another request arrives meanwhile, its sender was not pending for `metadata`. If `metadata`
//!   arrives again, a second client is probing, and every `metadata` is dropped until a second has passed
//!   without one. Otherwise the client is pending for its reply, and gets it.

use std::{collections::VecDeque, time::Duration};

use chiral_proto::{Code, Fault, Request, Timestamp};

/// Pending requests of one connection: minutes of a client that sends 30 requests a second during a long
/// reset, some 100 bytes each.
const MAX_PENDING: usize = 4096;
/// Rows in the pending steps of one connection, each of some 30 to 130 bytes.
const MAX_PENDING_ROWS: usize = 1 << 16;
/// Twice the period of a client's probes.
const METADATA_HOLD_PERIOD: Duration = Duration::from_secs(1);

/// A request, or why it is refused when its turn comes.
pub(crate) type CheckedRequest = Result<Request, Fault>;

/// What the send loop does next.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    Serve(CheckedRequest),
    /// Wait for the next request, at most for this long where a limit is given.
    Wait(Option<Duration>),
    /// End the session: its idle timeout has passed.
    Idle,
}

/// The pending requests of a session.
pub(crate) enum RequestQueue {
    /// Those of one client's own connection, oldest first.
    Connection(VecDeque<CheckedRequest>),
    /// Those that arrived on the shared keys.
    Shared(SharedQueue),
}

/// The state of the session on the shared keys.
pub(crate) struct SharedQueue {
    idle_timeout: Duration,
    /// When the session's own client last sent something or was sent a reply.
    last_activity: Timestamp,
    /// Whether anything but `metadata` has arrived.
    has_other_requests: bool,
    /// At most two: `metadata`, one other request, or first the one and then the other.
    pending: VecDeque<Request>,
    in_progress: Option<Kind>,
    /// When the `metadata` arrived that is being held.
    held_since: Option<Timestamp>,
    /// When the newest `metadata` arrived that was taken for a second client's probe.
    last_probe_at: Option<Timestamp>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Metadata,
    Other,
}

impl Kind {
    fn of(request: &Request) -> Kind {
        if *request == Request::GetMetadata { Kind::Metadata } else { Kind::Other }
    }
}

impl RequestQueue {
    /// The queue of a client's own connection.
    pub(crate) fn for_connection() -> RequestQueue {
        RequestQueue::Connection(VecDeque::new())
    }

    /// The queue for the shared keys, on which a session ends once its client has been idle for
    /// `idle_timeout`.
    pub(crate) fn for_shared_keys(idle_timeout: Duration, now: Timestamp) -> RequestQueue {
        RequestQueue::Shared(SharedQueue {
            idle_timeout,
            last_activity: now,
            has_other_requests: false,
            pending: VecDeque::new(),
            in_progress: None,
            held_since: None,
            last_probe_at: None,
        })
    }

    /// Whether other clients may send on the same keys.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self, RequestQueue::Shared(_))
    }

    /// Adds a request. An error says why this request, or the `metadata` that was held, gets no reply at all.
    pub(crate) fn push(&mut self, request: CheckedRequest, now: Timestamp) -> Result<(), Fault> {
        match self {
            RequestQueue::Connection(pending) => {
                let rows = pending.iter().map(step_rows).sum::<usize>() + step_rows(&request);
                let refuse = |text| Err(Fault::new(Code::QueueFull, text).retryable());
                if pending.len() == MAX_PENDING {
                    return refuse(format!("expected at most {MAX_PENDING} pending requests, found more"));
                }
                if rows > MAX_PENDING_ROWS {
                    return refuse(format!(
                        "expected at most {MAX_PENDING_ROWS} rows in pending steps, found {rows}"
                    ));
                }
                pending.push_back(request);
                Ok(())
            }
            RequestQueue::Shared(shared) => shared.push(request?, now),
        }
    }

    /// Records that actions arrived, which get no reply.
    pub(crate) fn note_actions(&mut self, now: Timestamp) {
        if let RequestQueue::Shared(shared) = self {
            (shared.last_activity, shared.has_other_requests) = (now, true);
        }
    }

    /// Whether a reset has not reached the robot yet: actions that arrive now would overtake it.
    pub(crate) fn has_pending_reset(&self) -> bool {
        let is_reset = |request: &Request| matches!(request, Request::Reset { .. });
        match self {
            RequestQueue::Connection(pending) => pending.iter().flatten().any(is_reset),
            RequestQueue::Shared(shared) => shared.pending.iter().any(is_reset),
        }
    }

    /// What the send loop does next. A request that it serves is in progress until
    /// [`RequestQueue::begin_reply`].
    pub(crate) fn next(&mut self, now: Timestamp) -> Next {
        match self {
            RequestQueue::Connection(pending) => pending.pop_front().map_or(Next::Wait(None), Next::Serve),
            RequestQueue::Shared(shared) => shared.next(now),
        }
    }

    /// Records that the reply is about to be sent, or that the request was refused. Call it before sending:
    /// the client may send its next request before the send of the reply returns.
    pub(crate) fn begin_reply(&mut self) {
        if let RequestQueue::Shared(shared) = self {
            shared.in_progress = None;
        }
    }

    /// Records that the reply was sent, which may have taken long.
    pub(crate) fn reply_sent(&mut self, now: Timestamp) {
        if let RequestQueue::Shared(shared) = self {
            shared.last_activity = now;
        }
    }
}

impl SharedQueue {
    fn push(&mut self, request: Request, now: Timestamp) -> Result<(), Fault> {
        let mut outstanding = self.pending.iter().map(Kind::of).chain(self.in_progress);
        if Kind::of(&request) == Kind::Metadata {
            match (self.has_other_requests, outstanding.next().is_some()) {
                (true, _) => return self.hold(now),
                (false, true) => return Ok(()),
                (false, false) => {}
            }
        }
        let is_out_of_turn = outstanding.any(|kind| kind == Kind::Other);
        let held = self.held_since.take();
        self.has_other_requests |= Kind::of(&request) == Kind::Other;
        if is_out_of_turn {
            return Err(second_client("sent a request before the reply to the last one"));
        }
        self.last_activity = now;
        self.pending.push_back(request);
        match held {
            Some(_) => Err(second_client("requested metadata, and another request arrived before the reply")),
            None => Ok(()),
        }
    }

    /// Holds a `metadata`, or drops it as a second client's probe.
    fn hold(&mut self, now: Timestamp) -> Result<(), Fault> {
        let is_probing = self.last_probe_at.is_some_and(|at| now.since(at) < METADATA_HOLD_PERIOD);
        if self.held_since.take().is_some() || is_probing {
            self.last_probe_at = Some(now);
            return Err(second_client("requests metadata repeatedly"));
        }
        self.held_since = Some(now);
        Ok(())
    }

    fn next(&mut self, now: Timestamp) -> Next {
        if let Some(request) = self.pending.pop_front() {
            self.in_progress = Some(Kind::of(&request));
            return Next::Serve(Ok(request));
        }
        let idle = now.since(self.last_activity);
        match self.held_since {
            Some(since) if now.since(since) >= METADATA_HOLD_PERIOD => {
                self.held_since = None;
                (self.last_activity, self.in_progress) = (now, Some(Kind::Metadata));
                Next::Serve(Ok(Request::GetMetadata))
            }
            Some(since) => Next::Wait(Some(METADATA_HOLD_PERIOD - now.since(since))),
            None if idle >= self.idle_timeout => Next::Idle,
            None => Next::Wait(Some(self.idle_timeout - idle)),
        }
    }
}

/// The rows of a step, a measure of the robot's time that it takes.
fn step_rows(request: &CheckedRequest) -> usize {
    match request {
        Ok(Request::Step { actions, .. }) => actions.rows(),
        _ => 0,
    }
}

fn second_client(what: &str) -> Fault {
    let text = format!(
        "two legacy clients seem to be on this network, one of which gets no replies: a client {what}"
    );
    Fault::new(Code::Busy, text).retryable()
}

#[cfg(test)]
mod tests {
    use chiral_proto::ActionChunk;

    use super::*;

    const RESET: Request = Request::Reset { seed: None, options: chiral_proto::ValueMap::new() };
    const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

    /// An event, and when it happens in milliseconds.
    enum Event {
        /// A request arrives; whether it is taken for a second client's.
        Request(i64, Request, bool),
        Actions(i64),
        Next(i64, Option<Request>),
        Replied(i64),
        Idle(i64),
    }
    use Event::{Actions, Idle, Replied};

    fn check(what: &str, events: impl IntoIterator<Item = Event>) {
        let at = |ms: i64| Timestamp(ms * 1_000_000);
        let mut requests = RequestQueue::for_shared_keys(IDLE_TIMEOUT, at(0));
        for event in events {
            match event {
                Event::Request(ms, request, is_foreign) => {
                    let added = requests.push(Ok(request.clone()), at(ms));
                    assert_eq!(added.is_err(), is_foreign, "{what}: {request:?} at {ms} ms: {added:?}");
                }
                Actions(ms) => requests.note_actions(at(ms)),
                Event::Next(ms, Some(expected)) => {
                    assert_eq!(requests.next(at(ms)), Next::Serve(Ok(expected)), "{what}: at {ms} ms");
                }
                Event::Next(ms, None) => {
                    let next = requests.next(at(ms));
                    assert!(matches!(next, Next::Wait(Some(_))), "{what}: at {ms} ms, found {next:?}");
                }
                Replied(ms) => {
                    requests.begin_reply();
                    requests.reply_sent(at(ms));
                }
                Idle(ms) => assert_eq!(requests.next(at(ms)), Next::Idle, "{what}: at {ms} ms"),
            }
        }
    }

    fn probe(ms: i64) -> Event {
        Event::Request(ms, Request::GetMetadata, false)
    }

    fn foreign_probe(ms: i64) -> Event {
        Event::Request(ms, Request::GetMetadata, true)
    }

    fn request(ms: i64, request: Request) -> Event {
        Event::Request(ms, request, false)
    }

    fn reply(ms: i64, request: Request) -> Event {
        Event::Next(ms, Some(request))
    }

    fn nothing(ms: i64) -> Event {
        Event::Next(ms, None)
    }

    #[test]
    fn requests_of_a_connection_are_served_in_order_up_to_a_limit() {
        let mut requests = RequestQueue::for_connection();
        let now = Timestamp(0);
        assert_eq!(requests.next(now), Next::Wait(None));
        for request in [RESET, Request::GetObs, Request::GetMetadata] {
            requests.push(Ok(request), now).unwrap();
        }
        assert!(requests.has_pending_reset());
        assert_eq!(requests.next(now), Next::Serve(Ok(RESET)));
        assert!(!requests.has_pending_reset());
        assert_eq!(requests.next(now), Next::Serve(Ok(Request::GetObs)));
        assert_eq!(requests.next(now), Next::Serve(Ok(Request::GetMetadata)));
        for _ in 0..MAX_PENDING {
            requests.push(Ok(Request::GetObs), now).unwrap();
        }
        assert_eq!(requests.push(Ok(Request::GetObs), now).unwrap_err().code, Code::QueueFull);

        let mut requests = RequestQueue::for_connection();
        let actions = ActionChunk::new(1, vec![0.0; MAX_PENDING_ROWS / 2]).unwrap();
        let step = || Ok(Request::Step { session: 0, episode: 0, actions: actions.clone() });
        for _ in 0..2 {
            requests.push(step(), now).unwrap();
        }
        assert_eq!(requests.push(step(), now).unwrap_err().code, Code::QueueFull);
        requests.push(Ok(Request::GetObs), now).unwrap();
        requests.next(now);
        requests.push(step(), now).unwrap();
    }

    #[test]
    fn the_first_probes_are_answered_at_once() {
        let begin = [probe(0), probe(1), reply(2, Request::GetMetadata), probe(3), Replied(4), nothing(4)];
        let again = [
            probe(500),
            reply(500, Request::GetMetadata),
            Replied(501),
            request(502, RESET),
            reply(502, RESET),
        ];
        check("probes are answered, but not while a reply is in flight", begin.into_iter().chain(again));
        let together = [
            probe(0),
            request(0, RESET),
            Event::Request(1, Request::GetObs, true),
            reply(1, Request::GetMetadata),
            Replied(1),
        ];
        check(
            "a request after a probe",
            together.into_iter().chain([reply(2, RESET), Replied(3), nothing(4)]),
        );
        check(
            "a request during the reply",
            [probe(0), reply(0, Request::GetMetadata), request(1, RESET), Replied(2), reply(2, RESET)],
        );
    }

    #[test]
    fn later_metadata_is_answered_once_it_is_known_to_be_the_clients_own() {
        let played = || [request(0, RESET), reply(0, RESET), Replied(5000)];
        let waited =
            [probe(6000), nothing(6999), reply(7000, Request::GetMetadata), Replied(7001), nothing(7002)];
        check("the client's own request", played().into_iter().chain(waited));
        let acting = [probe(6000), Actions(6500), reply(7000, Request::GetMetadata)];
        check("actions do not show that nobody waits for metadata", played().into_iter().chain(acting));
        let together =
            [request(0, Request::GetObs), probe(0), reply(1, Request::GetObs), Replied(2), nothing(3)];
        check(
            "sent together with another request",
            together.into_iter().chain([reply(1000, Request::GetMetadata)]),
        );
        let busy = [
            request(0, RESET),
            reply(0, RESET),
            probe(10),
            Replied(45_000),
            reply(45_000, Request::GetMetadata),
        ];
        check("not before an earlier request", busy);
    }

    #[test]
    fn a_second_client_is_recognized_and_gets_no_reply() {
        let out_of_turn = [
            request(0, RESET),
            reply(0, RESET),
            Event::Request(1, RESET, true),
            Event::Request(2, Request::GetObs, true),
            Replied(3),
            nothing(3),
        ];
        check("out of turn", out_of_turn);
        let played = || [Actions(0), probe(1000)];
        let not_waited_for = [
            Event::Request(1500, Request::GetObs, true),
            reply(1500, Request::GetObs),
            Replied(1501),
            nothing(1501),
            nothing(3000),
        ];
        check("the sender did not wait for metadata", played().into_iter().chain(not_waited_for));
        let probing = (1..20).map(|i| foreign_probe(1000 + 500 * i)).flat_map(|probe| [probe, nothing(1000)]);
        check(
            "probes, and no reply to the last of them",
            played().into_iter().chain(probing).chain([nothing(9999)]),
        );
        let gone = [foreign_probe(1500), nothing(3000), probe(3100), reply(4100, Request::GetMetadata)];
        check("the probes have stopped", played().into_iter().chain(gone));
    }

    #[test]
    fn only_the_sessions_own_client_keeps_it_from_being_idle() {
        check("nothing arrived", [nothing(9999), Idle(10_000)]);
        check(
            "the robot was busy with its request",
            [request(0, RESET), reply(0, RESET), Replied(45_000), nothing(54_999), Idle(55_000)],
        );
        let probes = (1..19).map(|i| foreign_probe(500 + 500 * i));
        let began = [Actions(0), probe(500)];
        check("a second client's probes do not count", began.into_iter().chain(probes).chain([Idle(10_000)]));
    }
}
