//! The client's side of the protocol, before a server whose every message is the test's own.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use chiral_client::{Error, ErrorKind, PolicyClient, PolicyClientBuilder, PutMode, PutOptions};
use chiral_proto::{
    ActionChunk, Clock, Codec, Message, Notice, Observation, Proprio, Reply, Request, Tensor, Timestamp,
    Transport, ValueMap,
    action::InvalidAction,
    message::{ActionMessage, ActionsDropped, Welcome},
};
use chiral_sim::link::{LinkEnd, LinkOptions, link};
use tokio::time::sleep;

use crate::{
    ROW, ms,
    support::harness::{DIMENSION, on_paused_clock, tokio_clock, welcome},
};

/// A server's end of a connection.
struct Server(LinkEnd);

impl Server {
    async fn send(&self, message: Message) {
        self.0.send(Codec::Protobuf.encode(&message).unwrap()).await.unwrap();
    }

    async fn notify(&self, notice: Notice) {
        self.send(Message::Notice(notice)).await;
    }

    async fn reply(&self, id: u64, reply: Reply) {
        self.send(Message::Reply { id, reply }).await;
    }

    /// The next message but pings.
    async fn receive(&self) -> Message {
        loop {
            let frame = self.0.recv().await.unwrap().expect("the client is connected");
            match Codec::Protobuf.decode(frame).unwrap() {
                Message::Notice(Notice::Ping { .. }) => {}
                message => return message,
            }
        }
    }

    async fn receive_action(&self) -> ActionMessage {
        match self.receive().await {
            Message::Notice(Notice::Action(action)) => action,
            other => panic!("expected an action, found {other:?}"),
        }
    }

    async fn receive_request(&self) -> (u64, Request) {
        match self.receive().await {
            Message::Request { id, request } => (id, request),
            other => panic!("expected a request, found {other:?}"),
        }
    }

    /// Answers a ping by a clock that is ahead of the client's.
    async fn answer_ping(&self, clock: &Clock, ahead: Duration) {
        loop {
            let frame = self.0.recv().await.unwrap().expect("the client is connected");
            if let Message::Notice(Notice::Ping { t1 }) = Codec::Protobuf.decode(frame).unwrap() {
                let now = clock.now() + ahead;
                self.notify(Notice::Pong { t1, t2: now, t3: now }).await;
                // By then it has arrived.
                return sleep(ms(1)).await;
            }
        }
    }

    /// Answers a `get_obs` of the client's.
    async fn observe(&self, env: &PolicyClient, observation: Observation) -> Arc<Observation> {
        let answer = async {
            let (id, request) = self.receive_request().await;
            assert_eq!(request, Request::GetObs);
            self.reply(id, Reply::Observation(Arc::new(observation))).await;
        };
        tokio::join!(env.get_obs(), answer).0.unwrap()
    }
}

/// Connects a client, on the test's clock, to a server that sends this welcome.
async fn connect_with(
    welcome: Welcome,
    configure: impl FnOnce(PolicyClientBuilder) -> PolicyClientBuilder,
) -> (PolicyClient, Server, Clock) {
    let (client_end, server_end, _) = link(LinkOptions::default());
    let (server, clock) = (Server(server_end), tokio_clock());
    let accept = async {
        let (id, request) = server.receive_request().await;
        assert!(matches!(request, Request::Hello(_)), "{request:?}");
        server.reply(id, Reply::Welcome(welcome.into())).await;
    };
    let builder = configure(PolicyClient::builder("link").clock(clock.clone()));
    let (env, ()) = tokio::join!(builder.connect_over(client_end), accept);
    (env.unwrap(), server, clock)
}

async fn connect() -> (PolicyClient, Server, Clock) {
    connect_with(welcome(), |builder| builder).await
}

/// An observation with joints that were captured at this time.
fn observation(episode: u64, seq: u64, captured_at: Timestamp) -> Observation {
    let data = Tensor::from_vec([1], vec![0.0_f32]).unwrap();
    let proprios = vec![Arc::new(Proprio { name: "joint_pos".into(), captured_at, data })];
    Observation { session: 1, episode, seq, proprios, ..Observation::default() }
}

#[tokio::test]
async fn an_action_carries_its_time_its_rank_and_its_observation() {
    on_paused_clock(async {
        let (env, server, clock) = connect().await;
        server.observe(&env, observation(0, 7, Timestamp(1234))).await;
        sleep(ms(300)).await;
        let now = clock.now();
        env.send_action(ROW).await.unwrap();
        env.send_action([ROW]).await.unwrap();
        for is_single in [true, false] {
            let action = server.receive_action().await;
            assert_eq!((action.sent_at, action.observed_at), (Some(now), Some(Timestamp(1234))));
            assert_eq!((action.observation_seq, action.actions.is_single()), (7, is_single));
            assert_eq!(action.valid_for, None);
        }
        // Dispatch stamps a row at its tick.
        env.start_action_dispatch(10.0).unwrap();
        env.put_chunk([ROW, ROW], PutMode::Append).await.unwrap();
        for tick in 0..2 {
            let action = server.receive_action().await;
            let late = action.sent_at.unwrap() - (now + ms(100) * tick);
            assert!((0..5_000_000).contains(&late), "tick {tick} is {late} ns late");
            assert!(action.actions.is_single(), "a row that is sent alone");
        }
    })
    .await;
}

#[tokio::test]
async fn a_start_is_on_the_servers_clock_once_the_clocks_were_compared() {
    on_paused_clock(async {
        let (env, server, clock) = connect().await;
        let hour = Duration::from_secs(3600);
        env.start_action_dispatch(10.0).unwrap();
        let started = clock.now();
        let options = PutOptions::default().start_at(started + hour + ms(250)).valid_for(ms(70));
        assert!(matches!(env.put_chunk([ROW], options).await, Err(Error::ClockUnknown)));
        server.answer_ping(&clock, hour).await;
        env.put_chunk([ROW, ROW], options).await.unwrap();
        for tick in [300, 400].map(ms) {
            let action = server.receive_action().await;
            let late = action.sent_at.unwrap() - (started + tick);
            assert!((0..5_000_000).contains(&late), "{late} ns after {tick:?}");
            assert_eq!(action.valid_for, Some(ms(70)));
        }
        env.put_chunk([ROW], options).await.unwrap();
        assert_eq!(env.stats().actions_missed, 1);
        env.stop_action_dispatch();
        assert!(matches!(env.try_put_chunk([ROW], options), Err(Error::InvalidArgument { .. })));
    })
    .await;
}

#[tokio::test]
async fn a_chunk_comes_from_the_observation_that_its_policy_names() {
    on_paused_clock(async {
        let (env, server, _) = connect().await;
        let first = server.observe(&env, observation(0, 1, Timestamp(10))).await;
        server.observe(&env.clone(), observation(0, 2, Timestamp(20))).await;
        env.put_chunk([ROW], PutOptions::default().predicted_from(&first)).await.unwrap();
        env.put_chunk([ROW], PutMode::Append).await.unwrap();
        env.start_action_dispatch(100.0).unwrap();
        for (seq, captured_at) in [(1, 10), (2, 20)] {
            let action = server.receive_action().await;
            assert_eq!((action.observation_seq, action.observed_at), (seq, Some(Timestamp(captured_at))));
        }
    })
    .await;
}

#[tokio::test]
async fn a_ping_of_the_servers_is_answered_with_the_clients_clock() {
    on_paused_clock(async {
        let (_env, server, clock) = connect().await;
        for t1 in [5, 6].map(Timestamp) {
            sleep(ms(100)).await;
            let now = clock.now();
            server.notify(Notice::Ping { t1 }).await;
            assert_eq!(server.receive().await, Message::Notice(Notice::Pong { t1, t2: now, t3: now }));
        }
    })
    .await;
}

#[tokio::test]
async fn dropped_actions_are_counted_and_fail_a_put_only_if_none_is_accepted_for_long() {
    on_paused_clock(async {
        let (env, server, _) = connect_with(welcome(), |builder| builder.late_limit(ms(3000))).await;
        let report = async |late, accepted| {
            server.notify(Notice::ActionsDropped(ActionsDropped { late, superseded: 2, accepted })).await;
            // By then it has arrived.
            sleep(ms(1)).await;
        };
        report(40, 10).await;
        let stats = env.stats();
        assert_eq!((stats.actions_late, stats.actions_superseded, stats.actions_refused), (40, 2, 0));
        env.try_put_action(ROW).unwrap();
        // All is well for a while; then there is another stall, and from then on every row is late.
        for n in 0..4 {
            sleep(ms(1000)).await;
            env.try_put_action(ROW).unwrap();
            report(41 + n, 100).await;
        }
        assert!(matches!(env.send_action(ROW).await, Err(Error::ActionsLate { dropped: 4, .. })));
        env.send_action(ROW).await.unwrap();
        assert_eq!(env.stats().actions_queued, 5);
    })
    .await;
}

#[tokio::test]
async fn a_chunk_that_the_server_would_refuse_is_refused_at_the_call() {
    on_paused_clock(async {
        for (declared, action_limit, step_limit) in [(0, 16, 4096), (300, 300, 300)] {
            let welcome = Welcome { max_chunk_rows: declared, ..welcome() };
            let (env, server, _) = connect_with(welcome, |builder| builder).await;
            let chunk = |rows| ActionChunk::new(DIMENSION, vec![0.0; rows * DIMENSION]).unwrap();
            let limit = |error| match error {
                Err(Error::InvalidAction(InvalidAction::Rows { limit, found })) => Some((limit, found)),
                _ => None,
            };
            let sent = env.send_action(chunk(action_limit + 1)).await;
            assert_eq!(limit(sent), Some((action_limit, action_limit + 1)));
            let stepped = env.step(chunk(step_limit + 1)).await.map(drop);
            assert_eq!(limit(stepped), Some((step_limit, step_limit + 1)));
            env.send_action(chunk(action_limit)).await.unwrap();
            assert_eq!(server.receive_action().await.actions.rows(), action_limit);
            // Queued rows leave one by one.
            env.try_put_chunk(chunk(200), PutMode::Append).unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_silent_server_shows_in_the_statistics_before_it_counts_as_lost() {
    on_paused_clock(async {
        let (env, server, _) = connect().await;
        sleep(ms(1900)).await;
        assert_eq!(env.stats().silent_for, None);
        sleep(ms(1100)).await;
        assert!(env.stats().silent_for.is_some_and(|silent_for| silent_for >= ms(2900)));
        server.notify(Notice::Pong { t1: Timestamp(1), t2: Timestamp(1), t3: Timestamp(1) }).await;
        sleep(ms(10)).await;
        assert_eq!(env.stats().silent_for, None);
        sleep(ms(9900)).await;
        assert!(env.stats().silent_for.is_some_and(|silent_for| silent_for >= ms(9800)));
        sleep(ms(1100)).await;
        assert!(matches!(env.latest_obs(), Err(Error::Disconnected { .. })));
        assert_eq!(env.stats().silent_for, None, "the session is over");
    })
    .await;
}

#[tokio::test]
async fn a_late_reply_is_ignored_and_one_to_no_request_ends_the_session() {
    on_paused_clock(async {
        let (env, server, _) = connect().await;
        // One request is given up by its deadline, one because its future is dropped.
        let metadata = || Reply::Metadata(ValueMap::new());
        let mut given_up = Vec::new();
        let (timed_out, (id, _)) = tokio::join!(env.get_metadata(), server.receive_request());
        assert!(matches!(timed_out, Err(Error::Timeout { .. })), "{timed_out:?}");
        given_up.push(id);
        tokio::select! {
            _ = env.reset() => panic!("expected no reply"),
            (id, _) = server.receive_request() => given_up.push(id),
        }
        for id in given_up {
            server.reply(id, metadata()).await;
        }
        let answer = async {
            let (id, _) = server.receive_request().await;
            server.reply(id, metadata()).await;
            id
        };
        let (answered, id) = tokio::join!(env.get_metadata(), answer);
        answered.unwrap();
        server.reply(id + 1, metadata()).await;
        sleep(ms(1)).await;
        let error = env.latest_obs().unwrap_err();
        assert!(matches!(&error, Error::UnexpectedReply { .. }), "{error:?}");
        assert_eq!(error.kind(), ErrorKind::Protocol);
    })
    .await;
}

#[tokio::test]
async fn a_step_has_a_deadline_and_a_reset_none_but_reports_that_it_waits() {
    on_paused_clock(async {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let reported = Arc::clone(&lines);
        let configure = |builder: PolicyClientBuilder| {
            let builder = builder.idle_timeout(Duration::from_secs(10_000));
            builder.on_waiting(move |waiting| reported.lock().unwrap().push(waiting.to_string()))
        };
        let (env, server, clock) = connect_with(welcome(), configure).await;
        let started = clock.now();
        let (stepped, _) = tokio::join!(env.step(ROW), server.receive_request());
        let error = stepped.unwrap_err();
        assert_eq!(error.to_string(), "expected a reply to the step within 60 s, found none");
        let late = clock.now() - started - 60_000_000_000;
        assert!((0..5_000_000).contains(&late), "{late} ns late");

        let resetting = async {
            let (id, _) = server.receive_request().await;
            sleep(ms(3_025_000)).await;
            let obs = Arc::new(observation(1, 1, Timestamp(0)));
            server.reply(id, Reply::Reset { obs, info: ValueMap::new() }).await;
        };
        let (reset, ()) = tokio::join!(env.reset(), resetting);
        assert_eq!(reset.unwrap().0.episode, 1);
        let lines = lines.lock().unwrap();
        assert_eq!(lines.len(), 302, "every 10 s");
        assert_eq!(lines[1], "waiting for the robot to reset, for 20 s so far …");
    })
    .await;
}
