//! What a legacy client has asked for, and what of it is answered when. Pure: `now` is passed in.
//!
//! On a connection of its own every request is answered, one after another. On the keys that all of a Zenoh
//! network shares nobody can be told from anybody else, and an answer goes to whoever listens; so a second
//! client must be noticed by what it asks, before it is answered:
//!
//! - A client has one request under way at a time. Another one, before the answer, is out of turn: it is
//!   dropped.
//! - A client says `metadata` every half a second until it is answered. In a session in which nothing else
//!   was said yet, that is answered at once, and not again while the answer is on its way: any one answer
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
const MAX_OWED: usize = 4096;
/// Rows in those of them that are steps, each of some 30 to 130 bytes.
const MAX_OWED_ROWS: usize = 1 << 16;
/// Twice as long as a client waits between two probes.
const HELD: Duration = Duration::from_secs(1);

/// Something asked, or why it is refused when its turn comes.
pub(crate) type Asked = Result<Request, Fault>;

/// What is to be done now.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    Answer(Asked),
    /// Nothing for so long, unless more is asked; without a limit if there is none.
    Wait(Option<Duration>),
    /// Nothing was heard for as long as may be.
    Silent,
}

pub(crate) enum RequestQueue {
    /// A connection's own.
    Queue(VecDeque<Asked>),
    Shared(Shared),
}

/// Whoever speaks on the shared keys.
pub(crate) struct Shared {
    idle_timeout: Duration,
    /// The last that was heard of the client whose session it is, or said to it.
    last_word: Timestamp,
    /// Something else than `metadata` was heard.
    is_beyond_probing: bool,
    /// `metadata`, or something else, or the one before the other.
    asked: VecDeque<Request>,
    answering: Option<Kind>,
    /// When `metadata` came that is not answered yet.
    held: Option<Timestamp>,
    /// When the newest of several came.
    probed: Option<Timestamp>,
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
    pub(crate) fn queue() -> RequestQueue {
        RequestQueue::Queue(VecDeque::new())
    }

    /// The keys that all share, on which a session ends after a silence of so long.
    pub(crate) fn shared(idle_timeout: Duration, now: Timestamp) -> RequestQueue {
        RequestQueue::Shared(Shared {
            idle_timeout,
            last_word: now,
            is_beyond_probing: false,
            asked: VecDeque::new(),
            answering: None,
            held: None,
            probed: None,
        })
    }

    pub(crate) fn are_shared(&self) -> bool {
        matches!(self, RequestQueue::Shared(_))
    }

    /// Something was asked; or why that, or what was asked before, is not answered at all.
    pub(crate) fn ask(&mut self, asked: Asked, now: Timestamp) -> Result<(), Fault> {
        match self {
            RequestQueue::Queue(waiting) => {
                let held = waiting.iter().map(rows).sum::<usize>() + rows(&asked);
                let refuse = |text| Err(Fault::new(Code::QueueFull, text).retryable());
                if waiting.len() == MAX_OWED {
                    return refuse(format!(
                        "expected at most {MAX_OWED} requests that wait for their answers, found more"
                    ));
                }
                if held > MAX_OWED_ROWS {
                    return refuse(format!(
                        "expected at most {MAX_OWED_ROWS} rows in steps that wait for their turn, found {held}"
                    ));
                }
                waiting.push_back(asked);
                Ok(())
            }
            RequestQueue::Shared(shared) => shared.ask(asked?, now),
        }
    }

    /// Actions came, which ask for nothing.
    pub(crate) fn acted(&mut self, now: Timestamp) {
        if let RequestQueue::Shared(shared) = self {
            (shared.last_word, shared.is_beyond_probing) = (now, true);
        }
    }

    /// Whether a reset was asked for and has not reached the robot: actions that come now would overtake it.
    pub(crate) fn awaits_reset(&self) -> bool {
        let is_reset = |request: &Request| matches!(request, Request::Reset { .. });
        match self {
            RequestQueue::Queue(waiting) => waiting.iter().flatten().any(is_reset),
            RequestQueue::Shared(shared) => shared.asked.iter().any(is_reset),
        }
    }

    pub(crate) fn next(&mut self, now: Timestamp) -> Next {
        match self {
            RequestQueue::Queue(waiting) => waiting.pop_front().map_or(Next::Wait(None), Next::Answer),
            RequestQueue::Shared(shared) => shared.next(now),
        }
    }

    /// What was asked last is about to be answered, or was refused. Not later: whoever hears the answer may
    /// ask again before all of it is known to be sent.
    pub(crate) fn answered(&mut self) {
        if let RequestQueue::Shared(shared) = self {
            shared.answering = None;
        }
    }

    /// The answer is sent, which may have taken long.
    pub(crate) fn said(&mut self, now: Timestamp) {
        if let RequestQueue::Shared(shared) = self {
            shared.last_word = now;
        }
    }
}

impl Shared {
    fn ask(&mut self, request: Request, now: Timestamp) -> Result<(), Fault> {
        let mut owed = self.asked.iter().map(Kind::of).chain(self.answering);
        if Kind::of(&request) == Kind::Metadata {
            match (self.is_beyond_probing, owed.next().is_some()) {
                (true, _) => return self.hold(now),
                (false, true) => return Ok(()),
                (false, false) => {}
            }
        }
        let is_out_of_turn = owed.any(|kind| kind == Kind::Other);
        let held = self.held.take();
        self.is_beyond_probing |= Kind::of(&request) == Kind::Other;
        if is_out_of_turn {
            return Err(second_client("asked before the last request was answered"));
        }
        self.last_word = now;
        self.asked.push_back(request);
        match held {
            Some(_) => Err(second_client("asked for metadata, and somebody did not wait for it")),
            None => Ok(()),
        }
    }

    fn hold(&mut self, now: Timestamp) -> Result<(), Fault> {
        let is_probed = self.probed.is_some_and(|probed| now.since(probed) < HELD);
        if self.held.take().is_some() || is_probed {
            self.probed = Some(now);
            return Err(second_client("asks for metadata again and again"));
        }
        self.held = Some(now);
        Ok(())
    }

    fn next(&mut self, now: Timestamp) -> Next {
        if let Some(request) = self.asked.pop_front() {
            self.answering = Some(Kind::of(&request));
            return Next::Answer(Ok(request));
        }
        let silence = now.since(self.last_word);
        match self.held {
            Some(since) if now.since(since) >= HELD => {
                self.held = None;
                (self.last_word, self.answering) = (now, Some(Kind::Metadata));
                Next::Answer(Ok(Request::GetMetadata))
            }
            Some(since) => Next::Wait(Some(HELD - now.since(since))),
            None if silence >= self.idle_timeout => Next::Silent,
            None => Next::Wait(Some(self.idle_timeout - silence)),
        }
    }
}

/// How much of a robot's time is asked for.
fn rows(asked: &Asked) -> usize {
    match asked {
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
        Silent(i64),
    }
    use Step::{Act, Answered, Ask, Silent};

    fn check(what: &str, steps: impl IntoIterator<Item = Step>) {
        let at = |ms: i64| Timestamp(ms * 1_000_000);
        let mut turns = RequestQueue::shared(LIMIT, at(0));
        for step in steps {
            match step {
                Ask(ms, request, is_foreign) => {
                    let taken = turns.ask(Ok(request.clone()), at(ms));
                    assert_eq!(taken.is_err(), is_foreign, "{what}: {request:?} at {ms} ms: {taken:?}");
                }
                Act(ms) => turns.acted(at(ms)),
                Step::Next(ms, Some(expected)) => {
                    assert_eq!(turns.next(at(ms)), Next::Answer(Ok(expected)), "{what}: at {ms} ms");
                }
                Step::Next(ms, None) => {
                    let next = turns.next(at(ms));
                    assert!(matches!(next, Next::Wait(Some(_))), "{what}: at {ms} ms, found {next:?}");
                }
                Answered(ms) => {
                    turns.answered();
                    turns.said(at(ms));
                }
                Silent(ms) => assert_eq!(turns.next(at(ms)), Next::Silent, "{what}: at {ms} ms"),
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
        let mut turns = RequestQueue::queue();
        let now = Timestamp(0);
        assert_eq!(turns.next(now), Next::Wait(None));
        for request in [RESET, Request::GetObs, Request::GetMetadata] {
            turns.ask(Ok(request), now).unwrap();
        }
        assert!(turns.awaits_reset());
        assert_eq!(turns.next(now), Next::Answer(Ok(RESET)));
        assert!(!turns.awaits_reset());
        assert_eq!(turns.next(now), Next::Answer(Ok(Request::GetObs)));
        assert_eq!(turns.next(now), Next::Answer(Ok(Request::GetMetadata)));
        for _ in 0..MAX_OWED {
            turns.ask(Ok(Request::GetObs), now).unwrap();
        }
        assert_eq!(turns.ask(Ok(Request::GetObs), now).unwrap_err().code, Code::QueueFull);

        let mut turns = RequestQueue::queue();
        let actions = ActionChunk::new(1, vec![0.0; MAX_OWED_ROWS / 2]).unwrap();
        let step = || Ok(Request::Step { session: 0, episode: 0, actions: actions.clone() });
        for _ in 0..2 {
            turns.ask(step(), now).unwrap();
        }
        assert_eq!(turns.ask(step(), now).unwrap_err().code, Code::QueueFull);
        turns.ask(Ok(Request::GetObs), now).unwrap();
        turns.next(now);
        turns.ask(step(), now).unwrap();
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
        check("nothing was said", [nothing(9999), Silent(10_000)]);
        check(
            "the robot is busy for it",
            [ask(0, RESET), answer(0, RESET), Answered(45_000), nothing(54_999), Silent(55_000)],
        );
        let probed = (1..19).map(|i| foreign_probe(500 + 500 * i));
        let began = [Act(0), probe(500)];
        check("another one does not speak for it", began.into_iter().chain(probed).chain([Silent(10_000)]));
    }
}
