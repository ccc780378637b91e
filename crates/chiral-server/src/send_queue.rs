//! The queue of a connection's send loop, filled by the receive loop and the control thread. A permit for a
//! reply is reserved before its request is read.

use chiral_proto::{Fault, Message, Notice, Reply, Timestamp, message::Subscribe};
use tokio::sync::mpsc::{self, OwnedPermit};

use crate::control::MAX_WAITING_ROWS;

/// The items and permits of one queue. While all are in use, nothing more is read from the peer. An action
/// holds one until its rows are applied, so that there are twice as many as rows that may wait.
pub(crate) const SEND_QUEUE_CAPACITY: usize = 2 * MAX_WAITING_ROWS;

/// The sending half of a connection's queue.
pub(crate) type SendQueue = mpsc::Sender<SendItem>;

/// One task of the send loop. The loop handles items in order.
pub(crate) enum SendItem {
    Message(Message),
    /// Replies with an observation that is taken when the item is handled, so that it is never old.
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

/// Room for one item. It is reserved before a message is read, so that a reply never waits for room and a
/// flood of requests cannot fill the memory.
pub(crate) type SendPermit = OwnedPermit<SendItem>;

/// An error, as the reply to request `id` or, with 0, as a notice.
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
