//! What the send loop of a connection has to do, and the queue that its receive loop and the control thread
//! put it in.

use chiral_proto::{Fault, Message, Notice, Reply, Timestamp, message::Subscribe};
use tokio::sync::mpsc::{self, OwnedPermit};

/// Replies that may wait or be owed; a peer that asks for more is not read from until some are sent.
pub(crate) const SEND_QUEUE_CAPACITY: usize = 256;

/// The sending half of a connection's queue.
pub(crate) type SendQueue = mpsc::Sender<SendItem>;

/// What the send loop has to do, in order.
pub(crate) enum SendItem {
    Message(Message),
    /// The observation is taken when its turn comes, so that it is never old.
    Observation {
        id: u64,
    },
    Pong {
        t1: Timestamp,
        t2: Timestamp,
    },
    Subscribe {
        id: u64,
        subscribe: Subscribe,
    },
    Unsubscribe {
        id: u64,
    },
    Credit {
        received: u64,
        window: u32,
    },
}

/// A permit in an outbox, reserved before a message is read, so that no answer ever waits and no flood of
/// requests fills the memory.
pub(crate) type SendPermit = OwnedPermit<SendItem>;

/// An error as the answer to a request, or to nothing that has an id.
pub(crate) fn error_message(id: u64, fault: Fault) -> Message {
    match id {
        0 => Message::Notice(Notice::Error(fault)),
        id => Message::Reply { id, reply: Reply::Error(fault) },
    }
}

pub(crate) fn enqueue(permit: SendPermit, item: SendItem) {
    drop(permit.send(item));
}

pub(crate) fn reply(permit: SendPermit, id: u64, outcome: Result<Reply, Fault>) {
    let message = match outcome {
        Ok(reply) => Message::Reply { id, reply },
        Err(fault) => error_message(id, fault),
    };
    enqueue(permit, SendItem::Message(message));
}
