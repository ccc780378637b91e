//! The processes around a server on the Zenoh keys that all legacy clients share: whether the server alone is
//! meant there, and which process sent a frame. Pure: `now` is passed in.
//!
//! A legacy frame names neither robot nor client. A server that is reached by its address only, whose network
//! has no router, no other robot and no other receiver of these frames, is meant by every one of them.
//!
//! Zenoh tells apart the connections by which frames come, its *senders*, but not to which process each
//! belongs. That is one of those that were connected when the first frame came by it, and did not leave since.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    hash::Hash,
};

use chiral_proto::Timestamp;
use chiral_transport::zenoh::{Neighbour, NeighbourKind, NetworkEvent};

/// How many processes are remembered that had a session.
const MAX_SERVED: usize = 256;

/// What is known of the network; `S` identifies a sender.
pub(crate) struct Neighbours<S> {
    /// Why no legacy client is served, whatever the network.
    never: Option<String>,
    processes: BTreeMap<String, Process>,
    /// Other robots that are alive.
    robots: BTreeSet<String>,
    has_other_receiver: bool,
    senders: HashMap<S, Sender>,
    /// The processes that had a session, oldest first.
    served: VecDeque<String>,
}

struct Process {
    kind: NeighbourKind,
    locator: Option<String>,
}

struct Sender {
    /// The processes that it may belong to, at least one.
    candidates: BTreeSet<String>,
    /// Another candidate has left, and no frame has come since: it may have been the sender's.
    doubted_at: Option<Timestamp>,
}

impl Sender {
    /// The process that it belongs to, once that is known.
    fn process(&self) -> Option<&String> {
        self.candidates.first().filter(|_| self.candidates.len() == 1)
    }
}

/// Whether a sender's process is still there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Presence {
    Present,
    /// Unless a frame comes, it may have left at this time.
    Doubtful(Timestamp),
    Gone,
}

impl<S: Copy + Eq + Hash> Neighbours<S> {
    /// A server without neighbours; `never` is why it serves no legacy client at all.
    pub(crate) fn new(never: Option<String>) -> Neighbours<S> {
        Neighbours {
            never,
            processes: BTreeMap::new(),
            robots: BTreeSet::new(),
            has_other_receiver: false,
            senders: HashMap::new(),
            served: VecDeque::new(),
        }
    }

    /// Takes note of a change.
    pub(crate) fn apply(&mut self, event: NetworkEvent, now: Timestamp) {
        match event {
            NetworkEvent::Connected(Neighbour { id, kind, .. }) => {
                self.processes.insert(id, Process { kind, locator: None });
            }
            NetworkEvent::Located { id, locator } => {
                if let Some(process) = self.processes.get_mut(&id) {
                    process.locator.get_or_insert(locator);
                }
            }
            NetworkEvent::Disconnected { id } => {
                self.processes.remove(&id);
                for sender in self.senders.values_mut() {
                    if sender.candidates.remove(&id) {
                        sender.doubted_at.get_or_insert(now);
                    }
                }
                self.senders.retain(|_, sender| !sender.candidates.is_empty());
            }
            NetworkEvent::Robot { robot, is_alive: true } => drop(self.robots.insert(robot)),
            NetworkEvent::Robot { robot, is_alive: false } => drop(self.robots.remove(&robot)),
            NetworkEvent::OtherReceiver(is_there) => self.has_other_receiver = is_there,
            _ => {}
        }
    }

    /// Takes note of a frame. Returns whether the process that sent it is among those that are connected.
    pub(crate) fn note_frame(&mut self, sender: S) -> bool {
        if !self.senders.contains_key(&sender) {
            let candidates = self.candidates();
            if candidates.is_empty() {
                return false;
            }
            self.senders.insert(sender, Sender { candidates, doubted_at: None });
        }
        let known = self.senders.get_mut(&sender).expect("it is there, or was inserted just now");
        known.doubted_at = None;
        // A process whose sender is known is no other sender's.
        if let Some(id) = known.process().cloned() {
            for (_, other) in self.senders.iter_mut().filter(|(other, _)| **other != sender) {
                other.candidates.remove(&id);
            }
            self.senders.retain(|_, sender| !sender.candidates.is_empty());
        }
        true
    }

    /// The processes that a new sender may belong to. Legacy clients are Zenoh peers, and ours Zenoh clients: any
    /// other process is considered only if there is no peer.
    fn candidates(&self) -> BTreeSet<String> {
        let known: BTreeSet<&String> = self.senders.values().filter_map(Sender::process).collect();
        let unknown = || self.processes.iter().filter(|(id, _)| !known.contains(id));
        let peers = unknown().filter(|(_, process)| process.kind == NeighbourKind::Peer);
        let peers: BTreeSet<String> = peers.map(|(id, _)| id.clone()).collect();
        if peers.is_empty() { unknown().map(|(id, _)| id.clone()).collect() } else { peers }
    }

    /// Fails, with the reason, unless this server alone is meant by what legacy clients send.
    pub(crate) fn check_alone(&self) -> Result<(), String> {
        if let Some(never) = &self.never {
            return Err(never.clone());
        }
        let router = self.processes.iter().find(|(_, process)| process.kind == NeighbourKind::Router);
        let found = match (router, self.robots.first()) {
            (Some((id, _)), _) => format!("the router {}", self.describe_process(id)),
            (None, Some(robot)) => format!("robot {robot}"),
            (None, None) if self.has_other_receiver => {
                "another process that receives what legacy clients send (chiral/c2s)".to_owned()
            }
            (None, None) => return Ok(()),
        };
        Err(format!(
            "expected this robot to be alone on its network, since legacy clients name no robot, found {found}"
        ))
    }

    /// Whether the sender's process is still there.
    pub(crate) fn presence(&self, sender: S) -> Presence {
        match self.senders.get(&sender) {
            None => Presence::Gone,
            Some(Sender { doubted_at: Some(at), .. }) => Presence::Doubtful(*at),
            Some(_) => Presence::Present,
        }
    }

    /// The processes that a sender may belong to, for people.
    pub(crate) fn describe(&self, sender: S) -> String {
        let candidates = self.senders.get(&sender).into_iter().flat_map(|sender| &sender.candidates);
        candidates.map(|id| self.describe_process(id)).collect::<Vec<_>>().join(" or ")
    }

    fn describe_process(&self, id: &str) -> String {
        match self.processes.get(id).and_then(|process| process.locator.as_deref()) {
            Some(locator) => format!("{locator} (Zenoh id {id})"),
            None => format!("Zenoh id {id}"),
        }
    }

    /// Begins a session of this sender. Returns whether its process had one before: what it sends may be of
    /// the time before that one ended.
    pub(crate) fn begin_session(&mut self, sender: S) -> bool {
        let candidates =
            self.senders.get(&sender).map(|sender| sender.candidates.clone()).unwrap_or_default();
        let had_session = self.served.iter().any(|id| candidates.contains(id));
        self.served.extend(candidates);
        let excess = self.served.len().saturating_sub(MAX_SERVED);
        self.served.drain(..excess);
        had_session
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp(seconds * 1_000_000_000)
    }

    fn connected(id: &str, kind: NeighbourKind) -> NetworkEvent {
        NetworkEvent::Connected(Neighbour::new(id, kind))
    }

    fn peer(id: &str) -> NetworkEvent {
        connected(id, NeighbourKind::Peer)
    }

    fn left(id: &str) -> NetworkEvent {
        NetworkEvent::Disconnected { id: id.to_owned() }
    }

    fn neighbours(events: impl IntoIterator<Item = NetworkEvent>) -> Neighbours<u8> {
        let mut neighbours = Neighbours::new(None);
        events.into_iter().for_each(|event| neighbours.apply(event, at(0)));
        neighbours
    }

    #[test]
    fn a_server_is_meant_unless_another_may_be() {
        let robot = |is_alive| NetworkEvent::Robot { robot: "leg (ab@host)".to_owned(), is_alive };
        let alone = [
            vec![],
            vec![peer("a"), peer("b"), connected("c", NeighbourKind::Client)],
            vec![connected("r", NeighbourKind::Router), left("r")],
            vec![robot(true), robot(false)],
            vec![NetworkEvent::OtherReceiver(true), NetworkEvent::OtherReceiver(false)],
        ];
        for events in alone {
            assert_eq!(neighbours(events.clone()).check_alone(), Ok(()), "{events:?}");
        }
        let locator = "tcp/10.0.0.1:7447".to_owned();
        let others = [
            (
                vec![
                    connected("r", NeighbourKind::Router),
                    NetworkEvent::Located { id: "r".to_owned(), locator },
                ],
                "found the router tcp/10.0.0.1:7447 (Zenoh id r)",
            ),
            (vec![robot(true), NetworkEvent::OtherReceiver(true)], "found robot leg (ab@host)"),
            (vec![NetworkEvent::OtherReceiver(true)], "found another process that receives"),
        ];
        for (events, expected) in others {
            let refusal = neighbours(events).check_alone().unwrap_err();
            assert!(refusal.contains(expected), "{refusal}");
        }
        let never = Neighbours::<u8>::new(Some("it is not configured to".to_owned()));
        assert_eq!(never.check_alone().unwrap_err(), "it is not configured to");
    }

    #[test]
    fn a_sender_is_the_process_that_was_connected_when_its_first_frame_came() {
        let mut neighbours = neighbours([peer("a")]);
        assert!(neighbours.note_frame(1));
        neighbours.apply(peer("b"), at(1));
        assert!(neighbours.note_frame(2));
        assert_eq!(
            [neighbours.describe(1), neighbours.describe(2)],
            ["Zenoh id a", "Zenoh id b"],
            "a has a sender already"
        );
        assert!(!neighbours.note_frame(3), "every process has a sender already");
        neighbours.apply(left("b"), at(2));
        assert_eq!((neighbours.presence(1), neighbours.presence(2)), (Presence::Present, Presence::Gone));
        neighbours.apply(left("a"), at(3));
        assert_eq!(neighbours.presence(1), Presence::Gone);
    }

    #[test]
    fn clients_of_our_own_are_not_taken_for_legacy_clients() {
        let client = |id| connected(id, NeighbourKind::Client);
        let mut neighbours = neighbours([client("ours"), peer("a")]);
        assert!(neighbours.note_frame(1));
        assert_eq!(neighbours.describe(1), "Zenoh id a");
        neighbours.apply(left("ours"), at(1));
        assert_eq!(neighbours.presence(1), Presence::Present);
        neighbours.apply(client("c"), at(2));
        assert!(neighbours.note_frame(2));
        assert_eq!(neighbours.describe(2), "Zenoh id c", "there is no peer that it could be");
    }

    #[test]
    fn one_of_two_that_connected_together_is_known_once_the_other_has_left() {
        let together = || {
            let mut neighbours = neighbours([peer("a"), peer("b")]);
            assert!(neighbours.note_frame(1) && neighbours.note_frame(2));
            assert_eq!(neighbours.describe(2), "Zenoh id a or Zenoh id b");
            neighbours.apply(left("b"), at(5));
            let doubtful = Presence::Doubtful(at(5));
            assert_eq!((neighbours.presence(1), neighbours.presence(2)), (doubtful, doubtful));
            neighbours
        };
        for (remaining, gone) in [(1, 2), (2, 1)] {
            let mut neighbours = together();
            assert!(neighbours.note_frame(remaining));
            assert_eq!(
                (neighbours.presence(remaining), neighbours.presence(gone)),
                (Presence::Present, Presence::Gone)
            );
            assert_eq!(neighbours.describe(remaining), "Zenoh id a");
        }
        let mut neighbours = together();
        neighbours.apply(left("a"), at(6));
        assert_eq!((neighbours.presence(1), neighbours.presence(2)), (Presence::Gone, Presence::Gone));
        // Whoever comes later was not there when the frames came.
        let mut neighbours = together();
        neighbours.apply(peer("c"), at(6));
        neighbours.apply(left("c"), at(7));
        assert_eq!(neighbours.presence(1), Presence::Doubtful(at(5)));
    }

    #[test]
    fn a_process_that_had_a_session_is_known_when_it_comes_back() {
        let mut neighbours = neighbours([peer("a")]);
        neighbours.note_frame(1);
        assert!(!neighbours.begin_session(1));
        assert!(neighbours.begin_session(1), "it was connected all the time");
        neighbours.apply(left("a"), at(1));
        neighbours.apply(peer("b"), at(2));
        neighbours.note_frame(2);
        assert!(!neighbours.begin_session(2), "another process");
        neighbours.apply(peer("a"), at(3));
        neighbours.note_frame(3);
        assert!(neighbours.begin_session(3), "it was lost, and has connected again");
        for number in 0..300 {
            neighbours.apply(peer(&number.to_string()), at(4));
            neighbours.note_frame(4);
            neighbours.begin_session(4);
            neighbours.apply(left(&number.to_string()), at(5));
        }
        assert_eq!(neighbours.served.len(), MAX_SERVED);
    }
}
