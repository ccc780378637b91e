//! What a legacy client has asked for, and what of it is answered when. Pure: `now` is passed in.
//!
//! On a connection of its own every request is answered, one after another. On the keys that all of a Zenoh
//! network shares nobody can be told from anybody else, and an answer goes to whoever listens; so a second
//! client must be noticed by what it asks, before it is answered:
//!
//! - A client has one request under way at a time. Another one, before the answer, is out of turn: it is
//!   dropped.
//! - A client says `metadata` every half a second until it is answered. In a session in which nothing else
//!   was reply_sent yet, that is answered at once, and not again while the answer is on its way: any one answer
//!   will do, and of the others the client may hear late. It may be an answer to an earlier probe that the
//!   client goes on with, so what it asks next is in turn.
//! - Later, `metadata` may be the client's own question, or a second client's probe. It is held back for a
//!   second: if anything else is asked meanwhile, its asker was not waiting for it; if `metadata` comes
//!   again, somebody is probing, and everything of that kind is dropped until a second has passed without it.
//!   Else the client is waiting for its answer, and gets it.

use std::{collections::VecDeque, time::Duration};

use chiral_proto::{Code, Fault, Request, Timestamp};

/// Requests of a connection that may wait for their answers: minutes of a client that asks 30 times a second
/// during a long reset, some 100 bytes each.
const MAX_PENDING: usize = 4096;
/// Rows in those of them that are steps, each of some 30 to 130 bytes.
const MAX_PENDING_ROWS: usize = 1 << 16;
/// Twice as long as a client waits between two probes.
const METADATA_HOLD_PERIOD: Duration = Duration::from_secs(1);

/// Something asked, or why it is refused when its turn comes.
pub(crate) type CheckedRequest = Result<Request, Fault>;

/// What is to be done now.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    Serve(CheckedRequest),
    /// Nothing for so long, unless more is asked; without a limit if there is none.
    Wait(Option<Duration>),
    /// Nothing was heard for as long as may be.
    Idle,
}

pub(crate) enum RequestQueue {
    /// A connection's own.
    Connection(VecDeque<CheckedRequest>),
    Shared(SharedQueue),
}

/// Whoever speaks on the shared keys.
pub(crate) struct SharedQueue {
    idle_timeout: Duration,
    /// The last that was heard of the client whose session it is, or reply_sent to it.
    last_activity: Timestamp,
    /// Something else than `metadata` was heard.
    has_other_requests: bool,
    /// `metadata`, or something else, or the one before the other.
    pending: VecDeque<Request>,
    in_progress: Option<Kind>,
    /// When `metadata` came that is not answered yet.
    held_since: Option<Timestamp>,
    /// When the newest of several came.
    last_foreign_probe: Option<Timestamp>,
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
    pub(crate) fn for_connection() -> RequestQueue {
        RequestQueue::Connection(VecDeque::new())
    }

    /// The keys that all share, on which a session ends after a silence of so long.
    pub(crate) fn for_shared_keys(idle_timeout: Duration, now: Timestamp) -> RequestQueue {
        RequestQueue::Shared(SharedQueue {
            idle_timeout,
            last_activity: now,
            has_other_requests: false,
            pending: VecDeque::new(),
            in_progress: None,
            held_since: None,
            last_foreign_probe: None,
        })
    }

    pub(crate) fn is_shared(&self) -> bool {
        matches!(self, RequestQueue::Shared(_))
    }

    /// Something was asked; or why that, or what was asked before, is not answered at all.
    pub(crate) fn push(&mut self, request: CheckedRequest, now: Timestamp) -> Result<(), Fault> {
        match self {
            RequestQueue::Connection(waiting) => {
                let held = waiting.iter().map(rows).sum::<usize>() + rows(&request);
                let refuse = |text| Err(Fault::new(Code::QueueFull, text).retryable());
                if waiting.len() == MAX_PENDING {
                    return refuse(format!(
                        "expected at most {MAX_PENDING} requests that wait for their answers, found more"
                    ));
                }
                if held > MAX_PENDING_ROWS {
                    return refuse(format!(
                        "expected at most {MAX_PENDING_ROWS} rows in steps that wait for their turn, found {held}"
                    ));
                }
                waiting.push_back(request);
                Ok(())
            }
            RequestQueue::Shared(shared) => shared.push(request?, now),
        }
    }

    /// Actions came, which ask for nothing.
    pub(crate) fn note_actions(&mut self, now: Timestamp) {
        if let RequestQueue::Shared(shared) = self {
            (shared.last_activity, shared.has_other_requests) = (now, true);
        }
    }

    /// Whether a reset was asked for and has not reached the robot: actions that come now would overtake it.
    pub(crate) fn has_pending_reset(&self) -> bool {
        let is_reset = |request: &Request| matches!(request, Request::Reset { .. });
        match self {
            RequestQueue::Connection(waiting) => waiting.iter().flatten().any(is_reset),
            RequestQueue::Shared(shared) => shared.pending.iter().any(is_reset),
        }
    }

    pub(crate) fn next(&mut self, now: Timestamp) -> Next {
        match self {
            RequestQueue::Connection(waiting) => waiting.pop_front().map_or(Next::Wait(None), Next::Serve),
            RequestQueue::Shared(shared) => shared.next(now),
        }
    }

    /// What was asked last is about to be answered, or was refused. Not later: whoever hears the answer may
    /// ask again before all of it is known to be sent.
    pub(crate) fn begin_reply(&mut self) {
        if let RequestQueue::Shared(shared) = self {
            shared.in_progress = None;
        }
    }

    /// The answer is sent, which may have taken long.
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
            return Err(second_client("asked before the last request was answered"));
        }
        self.last_activity = now;
        self.pending.push_back(request);
        match held {
            Some(_) => Err(second_client("asked for metadata, and somebody did not wait for it")),
            None => Ok(()),
        }
    }

    fn hold(&mut self, now: Timestamp) -> Result<(), Fault> {
        let is_probing = self
            .last_foreign_probe
            .is_some_and(|last_foreign_probe| now.since(last_foreign_probe) < METADATA_HOLD_PERIOD);
        if self.held_since.take().is_some() || is_probing {
            self.last_foreign_probe = Some(now);
            return Err(second_client("asks for metadata again and again"));
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

/// How much of a robot's time is asked for.
fn rows(request: &CheckedRequest) -> usize {
    match request {
        Ok(Request::Step { actions, .. }) => actions.rows(),
        _ => 0,
    }
}

fn second_client(what: &str) -> Fault {
    let text = format!(
        "two legacy clients seem to be on this network, of which one is not answered: somebody {what}"
    );
    Fault::new(Code::Busy, text).retryable()
}

#[cfg(test)]
mod tests {
    use chiral_proto::ActionChunk;

    use super::*;

    const RESET: Request = Request::Reset { seed: None, options: chiral_proto::ValueMap::new() };
    const LIMIT: Duration = Duration::from_secs(10);

    /// What happens, and when in milliseconds.
    enum Step {
        /// Asked; whether it is found to be a second client's.
        Ask(i64, Request, bool),
        Act(i64),
        Next(i64, Option<Request>),
        Answered(i64),
        Idle(i64),
    }
    use Step::{Act, Answered, Ask, Idle};

    fn check(what: &str, steps: impl IntoIterator<Item = Step>) {
        let at = |ms: i64| Timestamp(ms * 1_000_000);
        let mut requests = RequestQueue::for_shared_keys(LIMIT, at(0));
        for step in steps {
            match step {
                Ask(ms, request, is_foreign) => {
                    let taken = requests.push(Ok(request.clone()), at(ms));
                    assert_eq!(taken.is_err(), is_foreign, "{what}: {request:?} at {ms} ms: {taken:?}");
                }
                Act(ms) => requests.note_actions(at(ms)),
                Step::Next(ms, Some(expected)) => {
                    assert_eq!(requests.next(at(ms)), Next::Serve(Ok(expected)), "{what}: at {ms} ms");
                }
                Step::Next(ms, None) => {
                    let next = requests.next(at(ms));
                    assert!(matches!(next, Next::Wait(Some(_))), "{what}: at {ms} ms, found {next:?}");
                }
                Answered(ms) => {
                    requests.begin_reply();
                    requests.reply_sent(at(ms));
                }
                Idle(ms) => assert_eq!(requests.next(at(ms)), Next::Idle, "{what}: at {ms} ms"),
            }
        }
    }

    fn probe(ms: i64) -> Step {
        Ask(ms, Request::GetMetadata, false)
    }

    fn foreign_probe(ms: i64) -> Step {
        Ask(ms, Request::GetMetadata, true)
    }

    fn ask(ms: i64, request: Request) -> Step {
        Ask(ms, request, false)
    }

    fn answer(ms: i64, request: Request) -> Step {
        Step::Next(ms, Some(request))
    }

    fn nothing(ms: i64) -> Step {
        Step::Next(ms, None)
    }

    #[test]
    fn a_connection_is_a_queue() {
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
    fn a_client_that_begins_is_answered_at_once() {
        let begin = [probe(0), probe(1), answer(2, Request::GetMetadata), probe(3), Answered(4), nothing(4)];
        let again = [
            probe(500),
            answer(500, Request::GetMetadata),
            Answered(501),
            ask(502, RESET),
            answer(502, RESET),
        ];
        check("probes are answered, but not while an answer is on its way", begin.into_iter().chain(again));
        let together = [
            probe(0),
            ask(0, RESET),
            Ask(1, Request::GetObs, true),
            answer(1, Request::GetMetadata),
            Answered(1),
        ];
        check("a late probe", together.into_iter().chain([answer(2, RESET), Answered(3), nothing(4)]));
        check(
            "on its way",
            [probe(0), answer(0, Request::GetMetadata), ask(1, RESET), Answered(2), answer(2, RESET)],
        );
    }

    #[test]
    fn metadata_is_answered_later_if_somebody_waits_for_it() {
        let played = || [ask(0, RESET), answer(0, RESET), Answered(5000)];
        let waited =
            [probe(6000), nothing(6999), answer(7000, Request::GetMetadata), Answered(7001), nothing(7002)];
        check("the client itself asks", played().into_iter().chain(waited));
        let acting = [probe(6000), Act(6500), answer(7000, Request::GetMetadata)];
        check("actions need nobody who waits", played().into_iter().chain(acting));
        let together =
            [ask(0, Request::GetObs), probe(0), answer(1, Request::GetObs), Answered(2), nothing(3)];
        check(
            "asked together with something else",
            together.into_iter().chain([answer(1000, Request::GetMetadata)]),
        );
        let busy = [
            ask(0, RESET),
            answer(0, RESET),
            probe(10),
            Answered(45_000),
            answer(45_000, Request::GetMetadata),
        ];
        check("not before what was asked first", busy);
    }

    #[test]
    fn a_second_client_is_noticed_and_not_answered() {
        let out_of_turn = [
            ask(0, RESET),
            answer(0, RESET),
            Ask(1, RESET, true),
            Ask(2, Request::GetObs, true),
            Answered(3),
            nothing(3),
        ];
        check("out of turn", out_of_turn);
        let played = || [Act(0), probe(1000)];
        let not_waited_for = [
            Ask(1500, Request::GetObs, true),
            answer(1500, Request::GetObs),
            Answered(1501),
            nothing(1501),
            nothing(3000),
        ];
        check("somebody did not wait", played().into_iter().chain(not_waited_for));
        let probing = (1..20).map(|i| foreign_probe(1000 + 500 * i)).flat_map(|probe| [probe, nothing(1000)]);
        check(
            "probes, and no answer to the last of them",
            played().into_iter().chain(probing).chain([nothing(9999)]),
        );
        let gone = [foreign_probe(1500), nothing(3000), probe(3100), answer(4100, Request::GetMetadata)];
        check("the probing has stopped", played().into_iter().chain(gone));
    }

    #[test]
    fn silence_is_the_clients_own() {
        check("nothing was said", [nothing(9999), Idle(10_000)]);
        check(
            "the robot is busy for it",
            [ask(0, RESET), answer(0, RESET), Answered(45_000), nothing(54_999), Idle(55_000)],
        );
        let last_foreign_probe = (1..19).map(|i| foreign_probe(500 + 500 * i));
        let began = [Act(0), probe(500)];
        check(
            "another one does not speak for it",
            began.into_iter().chain(last_foreign_probe).chain([Idle(10_000)]),
        );
    }
}
