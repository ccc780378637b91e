//! Second connections: which session a token joins, once, and not for long. Pure: `now` is passed in.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use chiral_proto::Timestamp;

/// 128 random bits.
pub(crate) type Token = [u8; 16];

/// The sessions that a second connection may join.
#[derive(Debug)]
pub(crate) struct AttachTokens<S> {
    waiting: Vec<Waiting<S>>,
}

#[derive(Debug)]
struct Waiting<S> {
    token: Token,
    until: Timestamp,
    session: Weak<S>,
}

impl<S> Default for AttachTokens<S> {
    fn default() -> AttachTokens<S> {
        AttachTokens { waiting: Vec::new() }
    }
}

impl<S> AttachTokens<S> {
    /// For so long a token is good.
    const LIMIT: Duration = Duration::from_secs(5);

    /// Whoever shows this token joins this session.
    pub(crate) fn expect(&mut self, token: Token, session: &Arc<S>, now: Timestamp) {
        self.forget(now);
        self.waiting.push(Waiting { token, until: now + Self::LIMIT, session: Arc::downgrade(session) });
    }

    /// The session that the token joins, which no other then will.
    pub(crate) fn join(&mut self, token: &[u8], now: Timestamp) -> Option<Arc<S>> {
        self.forget(now);
        let place = self.waiting.iter().position(|waiting| waiting.token == token)?;
        self.waiting.swap_remove(place).session.upgrade()
    }

    fn forget(&mut self, now: Timestamp) {
        self.waiting.retain(|waiting| now < waiting.until && waiting.session.strong_count() > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_token_is_good_once_for_five_seconds_and_no_longer_than_its_session() {
        let sessions = [Arc::new(1), Arc::new(2), Arc::new(3)];
        let mut lobby = AttachTokens::default();
        for (session, token) in sessions.iter().zip([[1; 16], [2; 16], [3; 16]]) {
            lobby.expect(token, session, Timestamp(0));
        }
        let [_, _, third] = sessions.clone();
        drop(sessions);
        assert_eq!(lobby.join(&[3; 16], Timestamp(SECOND)), Some(third.clone()));
        assert_eq!(lobby.join(&[3; 16], Timestamp(SECOND)), None, "used");
        assert_eq!(lobby.join(&[1; 16], Timestamp(SECOND)), None, "its session has ended");
        assert_eq!(lobby.join(&[], Timestamp(SECOND)), None);
        lobby.expect([4; 16], &third, Timestamp(0));
        assert_eq!(lobby.join(&[4; 16], Timestamp(5 * SECOND)), None, "too late");
    }
}
