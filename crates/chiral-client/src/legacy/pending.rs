//! Which request a reply belongs to, on a wire whose replies carry no id. Pure.

use std::collections::VecDeque;

use chiral_proto::{Reply, Request};

/// Kinds of requests, and of the replies to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Metadata,
    Reset,
    Observation,
    Step,
}

impl Kind {
    /// `None` if the wire has no such request.
    pub(crate) fn of(request: &Request) -> Option<Kind> {
        match request {
            Request::GetMetadata => Some(Kind::Metadata),
            Request::Reset { .. } => Some(Kind::Reset),
            Request::GetObs => Some(Kind::Observation),
            Request::Step { .. } => Some(Kind::Step),
            Request::Hello(_) | Request::Subscribe(_) | Request::Unsubscribe => None,
        }
    }

    /// `None` if the wire has no such reply.
    pub(crate) fn of_reply(reply: &Reply) -> Option<Kind> {
        match reply {
            Reply::Metadata(_) => Some(Kind::Metadata),
            Reply::Reset { .. } => Some(Kind::Reset),
            Reply::Observation(_) => Some(Kind::Observation),
            Reply::Step(_) => Some(Kind::Step),
            _ => None,
        }
    }

    /// The reply's type on the wire.
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

/// The requests whose replies may still arrive, in the order in which they were sent; also those whose
/// callers have given up.
#[derive(Debug, Default)]
pub(crate) struct PendingRequests(VecDeque<(u64, Kind)>);

/// The request that a reply belongs to.
#[derive(Debug, PartialEq)]
pub(crate) struct Matched {
    pub(crate) id: u64,
    /// Earlier requests, which will have no reply any more: replies come in order.
    pub(crate) unanswered: Vec<u64>,
}

impl PendingRequests {
    pub(crate) fn push(&mut self, id: u64, kind: Kind) {
        self.0.push_back((id, kind));
    }

    pub(crate) fn contains(&self, kind: Kind) -> bool {
        self.0.iter().any(|(_, pending)| *pending == kind)
    }

    /// Removes the request that a reply of this kind belongs to; `None` if none of the kind is pending.
    pub(crate) fn take(&mut self, kind: Kind, is_waited_for: impl Fn(u64) -> bool) -> Option<Matched> {
        let first = self.0.iter().position(|(_, pending)| *pending == kind)?;
        let mut waiting = (0..self.0.len()).filter(|&at| is_waited_for(self.0[at].0));
        // Metadata is the same for every request, and earlier requests may have been lost. So if the only
        // request that is waited for is one for metadata, any such reply is its reply. Replies to those
        // before it may still arrive.
        let at = match (waiting.next(), waiting.next()) {
            (Some(at), None) if kind == Kind::Metadata && self.0[at].1 == Kind::Metadata => at,
            _ => first,
        };
        drop(waiting);
        let (id, _) = self.0.remove(at)?;
        let unanswered = self.0.drain(..first.min(at)).map(|(id, _)| id).collect();
        Some(Matched { id, unanswered })
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind::*, *};

    /// A reply, the request that it belongs to, and the earlier ones that will have none.
    type Expected<'a> = (Kind, Option<(u64, &'a [u64])>);

    /// Sends requests in this order, of which those with ids from 10 on were given up, and receives these
    /// replies.
    fn check(requests: &[(u64, Kind)], replies: &[Expected<'_>]) {
        let mut pending = PendingRequests::default();
        requests.iter().for_each(|&(id, kind)| pending.push(id, kind));
        for (n, &(kind, expected)) in replies.iter().enumerate() {
            let expected = expected.map(|(id, unanswered)| Matched { id, unanswered: unanswered.to_vec() });
            assert_eq!(pending.take(kind, |id| id < 10), expected, "reply {n} to {requests:?}");
        }
    }

    #[test]
    fn replies_come_in_the_order_of_the_requests() {
        check(&[(1, Reset)], &[(Reset, Some((1, &[]))), (Reset, None)]);
        check(&[(1, Observation)], &[(Step, None), (Metadata, None), (Observation, Some((1, &[])))]);
    }

    #[test]
    fn a_request_that_was_given_up_gets_its_reply_first() {
        check(&[(10, Reset), (1, Observation)], &[(Reset, Some((10, &[]))), (Observation, Some((1, &[])))]);
        check(&[(10, Step), (1, Step)], &[(Step, Some((10, &[]))), (Step, Some((1, &[])))]);
    }

    #[test]
    fn a_request_that_a_later_reply_overtakes_has_none() {
        check(&[(1, Observation), (2, Metadata)], &[(Metadata, Some((2, &[1]))), (Observation, None)]);
        check(
            &[(1, Observation), (2, Metadata)],
            &[(Observation, Some((1, &[]))), (Metadata, Some((2, &[])))],
        );
        check(&[(10, Metadata), (11, Metadata), (1, Reset)], &[(Reset, Some((1, &[10, 11])))]);
    }

    #[test]
    fn any_metadata_is_the_reply_if_only_metadata_is_waited_for() {
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
        // It was requested after the observation, whose reply will not come any more.
        check(
            &[(10, Observation), (11, Metadata), (1, Metadata)],
            &[(Metadata, Some((1, &[10]))), (Metadata, Some((11, &[])))],
        );
        // Not while an observation is waited for as well: then the order decides.
        check(
            &[(10, Metadata), (1, Observation), (2, Metadata)],
            &[(Metadata, Some((10, &[]))), (Observation, Some((1, &[])))],
        );
    }
}
