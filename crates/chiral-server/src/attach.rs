//! The tokens with which second connections join their sessions, each valid once and for 5 s. Pure: `now` is
//! passed in.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use chiral_proto::Timestamp;

/// 128 random bits.
pub(crate) type Token = [u8; 16];

/// The valid tokens and the session that each joins.
#[derive(Debug)]
pub(crate) struct AttachTokens<S> {
    entries: Vec<Entry<S>>,
}

#[derive(Debug)]
struct Entry<S> {
    token: Token,
    expires_at: Timestamp,
    session: Weak<S>,
}

impl<S> Default for AttachTokens<S> {
    fn default() -> AttachTokens<S> {
        AttachTokens { entries: Vec::new() }
    }
}

impl<S> AttachTokens<S> {
    /// How long a token is valid.
    const LIFETIME: Duration = Duration::from_secs(5);

    /// Adds a token for this session.
    pub(crate) fn insert(&mut self, token: Token, session: &Arc<S>, now: Timestamp) {
        self.remove_expired(now);
        self.entries.push(Entry {
            token,
            expires_at: now + Self::LIFETIME,
            session: Arc::downgrade(session),
        });
    }

    /// Takes the token out, and returns the session that it joins.
    pub(crate) fn redeem(&mut self, token: &[u8], now: Timestamp) -> Option<Arc<S>> {
        self.remove_expired(now);
        let index = self.entries.iter().position(|entry| entry.token == token)?;
        self.entries.swap_remove(index).session.upgrade()
    }

    fn remove_expired(&mut self, now: Timestamp) {
        self.entries.retain(|entry| now < entry.expires_at && entry.session.strong_count() > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_token_is_valid_once_for_five_seconds_while_its_session_lasts() {
        let sessions = [Arc::new(1), Arc::new(2), Arc::new(3)];
        let mut tokens = AttachTokens::default();
        for (session, token) in sessions.iter().zip([[1; 16], [2; 16], [3; 16]]) {
            tokens.insert(token, session, Timestamp(0));
        }
        let [_, _, third] = sessions.clone();
        drop(sessions);
        assert_eq!(tokens.redeem(&[3; 16], Timestamp(SECOND)), Some(third.clone()));
        assert_eq!(tokens.redeem(&[3; 16], Timestamp(SECOND)), None, "used already");
        assert_eq!(tokens.redeem(&[1; 16], Timestamp(SECOND)), None, "its session has ended");
        assert_eq!(tokens.redeem(&[], Timestamp(SECOND)), None);
        tokens.insert([4; 16], &third, Timestamp(0));
        assert_eq!(tokens.redeem(&[4; 16], Timestamp(5 * SECOND)), None, "too late");
    }
}
