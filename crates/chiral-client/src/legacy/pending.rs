//! Which request an answer is to, on a wire that does not say: pure.

use std::collections::VecDeque;

use chiral_proto::{Reply, Request};

/// What a request asks for and an answer brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Metadata,
    Reset,
    Observation,
    Step,
}

impl Kind {
    /// `None` of what this wire has no words for.
    pub(crate) fn of(request: &Request) -> Option<Kind> {
        match request {
            Request::GetMetadata => Some(Kind::Metadata),
            Request::Reset { .. } => Some(Kind::Reset),
            Request::GetObs => Some(Kind::Observation),
            Request::Step { .. } => Some(Kind::Step),
            Request::Hello(_) | Request::Subscribe(_) | Request::Unsubscribe => None,
        }
    }

    /// `None` of what this wire has no words for.
    pub(crate) fn of_answer(reply: &Reply) -> Option<Kind> {
        match reply {
            Reply::Metadata(_) => Some(Kind::Metadata),
            Reply::Reset { .. } => Some(Kind::Reset),
            Reply::Observation(_) => Some(Kind::Observation),
            Reply::Step(_) => Some(Kind::Step),
            _ => None,
        }
    }

    /// The answer's name on the wire.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Metadata => "metadata_response",
            Kind::Reset => "reset_response",
            Kind::Observation => "obs_response",
            Kind::Step => "step_response",
        }
    }

    pub(crate) fn named(name: &str) -> Option<Kind> {
        [Kind::Metadata, Kind::Reset, Kind::Observation, Kind::Step]
            .into_iter()
            .find(|kind| kind.name() == name)
    }
}

/// The answers that may still come, in the order in which they were asked for; those among them for which
/// nobody waits any more.
#[derive(Debug, Default)]
pub(crate) struct PendingRequests(VecDeque<(u64, Kind)>);

/// To which request an answer is.
#[derive(Debug, PartialEq)]
pub(crate) struct Answered {
    pub(crate) id: u64,
    /// What was asked before it and will never be answered: answers come in order.
    pub(crate) unanswered: Vec<u64>,
}

impl PendingRequests {
    pub(crate) fn ask(&mut self, id: u64, kind: Kind) {
        self.0.push_back((id, kind));
    }

    pub(crate) fn is_owed(&self, kind: Kind) -> bool {
        self.0.iter().any(|(_, owed)| *owed == kind)
    }

    /// An answer has come; `None` if nothing of the kind was asked for.
    pub(crate) fn answered(&mut self, kind: Kind, is_waited_for: impl Fn(u64) -> bool) -> Option<Answered> {
        let first = self.0.iter().position(|(_, owed)| *owed == kind)?;
        let mut waiting = (0..self.0.len()).filter(|&at| is_waited_for(self.0[at].0));
        // Metadata is the same whoever asked for it, and what asked before may have been lost. So if it is
        // all that is waited for, whichever answer comes is it; those before it may still come.
        let at = match (waiting.next(), waiting.next()) {
            (Some(at), None) if kind == Kind::Metadata && self.0[at].1 == Kind::Metadata => at,
            _ => first,
        };
        drop(waiting);
        let (id, _) = self.0.remove(at)?;
        let unanswered = self.0.drain(..first.min(at)).map(|(id, _)| id).collect();
        Some(Answered { id, unanswered })
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind::*, *};

    /// An answer, and to which request it is, and which before it are never answered.
    type Told<'a> = (Kind, Option<(u64, &'a [u64])>);

    /// Asks in this order, those of id 10 and above given up, and hears these answers.
    fn check(asked: &[(u64, Kind)], answers: &[Told<'_>]) {
        let mut owed = PendingRequests::default();
        asked.iter().for_each(|&(id, kind)| owed.ask(id, kind));
        for (n, &(kind, expected)) in answers.iter().enumerate() {
            let expected = expected.map(|(id, unanswered)| Answered { id, unanswered: unanswered.to_vec() });
            assert_eq!(owed.answered(kind, |id| id < 10), expected, "answer {n} of {asked:?}");
        }
    }

    #[test]
    fn answers_come_in_the_order_of_the_requests() {
        check(&[(1, Reset)], &[(Reset, Some((1, &[]))), (Reset, None)]);
        check(&[(1, Observation)], &[(Step, None), (Metadata, None), (Observation, Some((1, &[])))]);
    }

    #[test]
    fn what_was_given_up_is_answered_first() {
        check(&[(10, Reset), (1, Observation)], &[(Reset, Some((10, &[]))), (Observation, Some((1, &[])))]);
        check(&[(10, Step), (1, Step)], &[(Step, Some((10, &[]))), (Step, Some((1, &[])))]);
    }

    #[test]
    fn what_a_later_answer_overtakes_is_never_answered() {
        check(&[(1, Observation), (2, Metadata)], &[(Metadata, Some((2, &[1]))), (Observation, None)]);
        check(
            &[(1, Observation), (2, Metadata)],
            &[(Observation, Some((1, &[]))), (Metadata, Some((2, &[])))],
        );
        check(&[(10, Metadata), (11, Metadata), (1, Reset)], &[(Reset, Some((1, &[10, 11])))]);
    }

    #[test]
    fn metadata_that_alone_is_waited_for_is_whichever_comes_first() {
        let probes = [(10, Metadata), (11, Metadata), (1, Metadata)];
        check(
            &probes,
            &[
                (Metadata, Some((1, &[]))),
                (Metadata, Some((10, &[]))),
                (Metadata, Some((11, &[]))),
                (Metadata, None),
            ],
        );
        // It was asked after the observation, which is late no more.
        check(
            &[(10, Observation), (11, Metadata), (1, Metadata)],
            &[(Metadata, Some((1, &[10]))), (Metadata, Some((11, &[])))],
        );
        // Not while an observation is waited for as well: then the order tells.
        check(
            &[(10, Metadata), (1, Observation), (2, Metadata)],
            &[(Metadata, Some((10, &[]))), (Observation, Some((1, &[])))],
        );
    }
}
