//! A session's two lanes: what each carries, which connection may attach to a session, and that the end of
//! either lane ends both. `guarantees/main.rs` explains which tests run in real time.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use chiral_client::{Code, Error, PolicyClient, PolicyClientBuilder};
use chiral_proto::{
    Codec, Fault, Message, Notice, Reply, Request, Timestamp, Transport, ValueMap,
    clock::Rate,
    message::{Hello, Role, Subscribe},
};
use chiral_sim::link::{LinkControl, LinkEnd, LinkOptions, link};
use futures_util::future::join_all;
use support::{
    TEST_TIMEOUT, client_builder,
    harness::{self, DIMENSION, Event, Harness, RawPeer, hello, on_paused_clock},
    in_time,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::sleep,
};

const ROW: [f32; DIMENSION] = [0.1, 0.2, 0.3];
const END: [Event; 2] = [Event::Held, Event::Disconnected];
const RESET: [Event; 2] = [Event::ResetStarted, Event::ResetFinished];

fn goodbye(reason: &str) -> Message {
    Message::Notice(Notice::Goodbye { reason: reason.to_owned() })
}

/// Opens a second connection and attaches it with this token.
async fn attach(harness: &Harness, token: &[u8]) -> Result<RawPeer, Fault> {
    let mut raw = RawPeer::without_hello(harness.open_link(LinkOptions::default()).0);
    let hello = Hello { attach_token: Bytes::copy_from_slice(token), ..hello(Role::Controller) };
    raw.send(&Message::Request { id: 1, request: Request::Hello(hello) }).await;
    match raw.receive().await {
        Message::Reply { reply: Reply::Welcome(welcome), .. } if welcome.attach_token.is_empty() => {
            raw.welcome = *welcome
        }
        Message::Reply { reply: Reply::Error(fault), .. } => return Err(fault),
        other => panic!("expected a welcome without a token or an error, found {other:?}"),
    }
    Ok(raw)
}

async fn check_refused(harness: &Harness, token: &[u8], why: &str) {
    match attach(harness, token).await {
        Err(fault) => {
            assert_eq!((fault.code, &*fault.field), (Code::Invalid, "hello.attach_token"), "{why}: {fault}")
        }
        Ok(peer) => panic!("{why}: expected an error, found a welcome to session {}", peer.welcome.session),
    }
}

/// The names of a message's variants, such as `Reply Reset`.
fn kind(message: &Message) -> String {
    let text = format!("{message:?}");
    let (_, inner) = ["request: ", "reply: ", "("].iter().find_map(|before| text.split_once(before)).unwrap();
    [&text, inner].map(|text| text.split([' ', '(']).next().unwrap()).join(" ")
}

/// Receives up to `at_most` messages, fewer if the connection closes; returns their kinds.
async fn kinds(raw: &RawPeer, at_most: usize) -> Vec<String> {
    let mut kinds = Vec::new();
    while kinds.len() < at_most
        && let Ok(Some(frame)) = in_time(raw.end.recv()).await
    {
        let kind = kind(&Codec::Protobuf.decode(frame).unwrap());
        // The server pings its controller at any time.
        kinds.extend(Some(kind).filter(|kind| kind != "Notice Ping"));
    }
    kinds
}

/// Connects a client over two links.
async fn connect_over_two(
    harness: &Harness,
    builder: PolicyClientBuilder,
) -> (PolicyClient, [LinkControl; 2]) {
    let ((control, first), (observations, second)) =
        (harness.open_link(LinkOptions::default()), harness.open_link(LinkOptions::default()));
    (builder.connect_over_two(control, observations).await.unwrap(), [first, second])
}

/// Checks that the robot is free and received the end of its last session once.
async fn check_released(harness: &Harness, before: &[Event]) {
    let (next, _links) = connect_over_two(harness, harness.builder()).await;
    harness.script.reset_gate.open();
    next.reset().await.unwrap();
    assert_eq!(harness.script.events(), [before, &END, &RESET].concat());
    harness.wait_until("only the next session is left", |harness| harness.handle.stats().sessions == 1).await;
}

/// The messages on a connection: those of the client, and those of the server.
type Messages = [Arc<Mutex<Vec<Message>>>; 2];

/// Opens a link to the server and records its messages.
fn open_tapped_link(harness: &Harness) -> (LinkEnd, Messages) {
    let (client_end, client_side, _) = link(LinkOptions::default());
    let (server_side, _) = harness.open_link(LinkOptions::default());
    let messages = Messages::default();
    let recorded = messages.clone();
    let forward = async |recorded: &Mutex<Vec<Message>>, from: &LinkEnd, to: &LinkEnd| {
        while let Ok(Some(frame)) = from.recv().await {
            recorded.lock().unwrap().push(Codec::Protobuf.decode(frame.clone()).unwrap());
            let _ = to.send(frame).await;
        }
        to.close().await;
    };
    tokio::spawn(async move {
        tokio::join!(
            forward(&recorded[0], &client_side, &server_side),
            forward(&recorded[1], &server_side, &client_side)
        )
    });
    (client_end, messages)
}

async fn check_all_calls(harness: &Harness, env: &PolicyClient) {
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("scripted"));
    let (obs, _) = env.reset().await.unwrap();
    assert!(env.get_obs().await.unwrap().seq > obs.seq);
    assert_eq!(env.step(ROW).await.unwrap().obs.episode, obs.episode);
    env.start_obs_stream(100.0).await.unwrap();
    // More than the client may receive without granting credit.
    for _ in 0..10 {
        env.next_obs(TEST_TIMEOUT).await.unwrap();
    }
    env.stop_obs_stream().await.unwrap();
    env.send_action(ROW).await.unwrap();
    env.start_action_dispatch(100.0).unwrap();
    env.put_action(ROW).await.unwrap();
    harness
        .wait_until("a step and two actions are applied", |harness| {
            harness.script.applied() == vec![ROW.to_vec(); 3]
        })
        .await;
}

#[tokio::test]
async fn every_observation_arrives_on_the_observations_lane_whichever_lane_requested_it() {
    let harness = Harness::new();
    let control = harness.connect_raw().await;
    let observations = attach(&harness, &control.welcome.attach_token).await.unwrap();
    let session = control.welcome.session;
    let reset = || Request::Reset { seed: None, options: ValueMap::new() };
    let subscribe = |camera: &str| {
        Request::Subscribe(Subscribe {
            rate: Rate::new(99.0).unwrap(),
            cameras: vec![camera.into()],
            depth: true,
            window: 2,
        })
    };
    let mut id = 10;
    for (requester, episode) in [(&control, 1), (&observations, 3)] {
        let step = |episode| Request::Step { session, episode, actions: ROW.into() };
        let cases = [
            (reset(), "Reply Reset"),
            (step(episode), "Reply Step"),
            (step(episode + 7), "Reply Error"),
            (Request::GetObs, "Reply Observation"),
            (subscribe("no_cam"), "Reply Error"),
            (subscribe(harness::CAMERA), "Reply Subscribed"),
            (Request::Unsubscribe, "Reply StreamEnd"),
            (reset(), "Reply Error"),
        ];
        for (n, (request, expected)) in cases.into_iter().enumerate() {
            *harness.script.reset_error.lock().unwrap() = (n == 7).then(|| "no power".to_owned());
            id += 1;
            requester.send(&Message::Request { id, request }).await;
            let reply = in_time(observations.reply_to(id)).await;
            assert_eq!(kind(&Message::Reply { id, reply }), expected, "request {n}");
            if expected == "Reply Subscribed" {
                assert_eq!(kinds(&observations, 1).await, ["Notice Observation"]);
            }
        }
    }
    for raw in [&control, &observations] {
        raw.send(&Message::Request { id: 1, request: Request::GetMetadata }).await;
        raw.send(&Message::Notice(Notice::Ping { t1: Timestamp(1) })).await;
        raw.send_action(session, 99, 1, ROW).await;
    }
    assert_eq!(kinds(&observations, 3).await, ["Reply Metadata", "Notice Pong", "Notice Error"]);
    control.send(&goodbye("")).await;
    assert_eq!(kinds(&observations, usize::MAX).await, ["Notice Goodbye"]);
    // These are all messages that the control lane ever carried.
    assert_eq!(
        kinds(&control, usize::MAX).await,
        ["Reply Metadata", "Notice Pong", "Notice Error", "Notice Goodbye"]
    );
}

#[tokio::test]
async fn the_client_sends_observation_requests_on_the_observations_lane_and_the_rest_on_the_control_lane() {
    let harness = Harness::new();
    let ((control, control_messages), (observations, messages)) =
        (open_tapped_link(&harness), open_tapped_link(&harness));
    let env = harness.builder().connect_over_two(control, observations).await.unwrap();
    check_all_calls(&harness, &env).await;
    let cases = [
        (
            &control_messages[0],
            "Notice Action, Notice Ping, Notice Pong, Request GetMetadata, Request Hello, Request Reset, \
             Request Step",
        ),
        (&control_messages[1], "Notice Ping, Notice Pong, Reply Metadata, Reply Welcome"),
        (
            &messages[0],
            "Notice Credit, Notice Ping, Request GetObs, Request Hello, Request Subscribe, \
             Request Unsubscribe",
        ),
    ];
    for (messages, expected) in cases {
        let kinds = || {
            BTreeSet::from_iter(messages.lock().unwrap().iter().map(kind))
                .into_iter()
                .collect::<Vec<_>>()
                .join(", ")
        };
        harness.wait_until("pings and pongs have passed", |_| kinds() == expected).await;
    }
}

#[tokio::test]
async fn an_attach_token_is_valid_once_for_5_s_and_only_during_its_session() {
    let harness = Harness::new();
    let mut raw = harness.connect_raw().await;
    let token = raw.welcome.attach_token.to_vec();
    assert_eq!(token.len(), 16);
    let wrong: Vec<u8> = token.iter().map(|byte| byte ^ 1).collect();
    for wrong in [&wrong[..], &token[..15], &[&token[..], &[0]].concat()] {
        check_refused(&harness, wrong, "it is wrong").await;
    }
    on_paused_clock(sleep(Duration::from_millis(4900))).await;
    let mut second = attach(&harness, &token).await.unwrap();
    assert_eq!(second.welcome.session, raw.welcome.session);
    check_refused(&harness, &token, "it was used").await;
    // None of this harmed the session.
    assert!(matches!(in_time(second.request(Request::GetObs)).await, Reply::Observation(_)));
    assert!(matches!(in_time(raw.request(Request::GetMetadata)).await, Reply::Metadata(_)));
    assert_eq!(harness.script.events(), []);
    drop((raw, second));
    harness.wait_until_robot_is_free().await;

    let mut raw = harness.connect_raw().await;
    on_paused_clock(sleep(Duration::from_secs(5))).await;
    check_refused(&harness, &raw.welcome.attach_token, "it is too old").await;
    assert!(matches!(in_time(raw.request(Request::GetObs)).await, Reply::Observation(_)));
    drop(raw);
    harness.wait_until_robot_is_free().await;

    let token = harness.connect_raw().await.welcome.attach_token.clone();
    harness.wait_until_robot_is_free().await;
    check_refused(&harness, &token, "its session has ended").await;
}

#[tokio::test(start_paused = true)]
async fn no_connection_attaches_to_a_session_that_is_closing() {
    let harness = Harness::new();
    let (end, _link) = harness.open_link(LinkOptions { bandwidth: Some(10e3), ..LinkOptions::default() });
    let closing = RawPeer::connect(end).await;
    closing.send(&goodbye("")).await;
    let _next = harness.connect_raw().await;
    check_refused(&harness, &closing.welcome.attach_token, "its session has ended").await;
}

#[tokio::test]
async fn no_connection_attaches_after_a_stream_has_started() {
    let harness = Harness::new();
    let mut control = harness.connect_raw().await;
    let subscribe = Subscribe { rate: Rate::new(10.0).unwrap(), cameras: vec![], depth: true, window: 1 };
    assert!(matches!(control.request(Request::Subscribe(subscribe)).await, Reply::Subscribed { .. }));
    check_refused(&harness, &control.welcome.attach_token.clone(), "has no stream").await;
    assert!(matches!(control.request(Request::Unsubscribe).await, Reply::StreamEnd { .. }));
}

#[tokio::test]
async fn the_robot_is_free_for_the_next_client_when_close_returns() {
    let harness = Harness::new();
    let far = LinkOptions { latency: Duration::from_millis(100), ..LinkOptions::default() };
    let (env, _link) = harness.connect_over(far).await;
    env.close().await.unwrap();
    // This link has no latency: the client would arrive before a goodbye that is still being sent.
    harness.connect().await;
}

#[tokio::test]
async fn every_call_fails_and_the_robot_is_released_when_either_lane_is_cut() {
    for lost in [0, 1] {
        let harness = Harness::new();
        let (env, links) = connect_over_two(&harness, harness.builder().queue_capacity(1)).await;
        env.reset().await.unwrap();
        env.start_obs_stream(0.001).await.unwrap();
        env.next_obs(TEST_TIMEOUT).await.unwrap();
        harness.script.reset_gate.close();
        env.start_action_dispatch(10.0).unwrap();
        let [resetting, observing, acting] = [env.clone(), env.clone(), env.clone()];
        let pending: [JoinHandle<Result<(), Error>>; 3] = [
            tokio::spawn(async move { resetting.reset().await.map(drop) }),
            tokio::spawn(async move { observing.next_obs(TEST_TIMEOUT).await.map(drop) }),
            tokio::spawn(async move {
                loop {
                    acting.put_action(ROW).await?
                }
            }),
        ];
        harness
            .wait_until("all three calls are pending", |harness| {
                harness.script.reset_gate.is_blocking() && env.stats().actions_queued == 1
            })
            .await;
        assert!(pending.iter().all(|call| !call.is_finished()));
        links[lost].cut();
        let interrupted = in_time(join_all(pending)).await.into_iter().map(Result::unwrap);
        let later = [
            env.next_obs(TEST_TIMEOUT).await.map(drop),
            env.latest_obs().map(drop),
            env.get_obs().await.map(drop),
            env.get_metadata().await.map(drop),
            env.reset().await.map(drop),
            env.step(ROW).await.map(drop),
            env.put_action(ROW).await,
            env.send_action(ROW).await,
            env.start_obs_stream(30.0).await,
            env.start_action_dispatch(10.0),
        ];
        let outcomes: Vec<_> = interrupted.chain(later).collect();
        assert!(
            outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Disconnected { .. }))),
            "{lost}: {outcomes:?}"
        );

        // The robot is released although it is still busy with the reset of the lost client.
        check_released(&harness, &[RESET, RESET].concat()).await;
    }
}

#[tokio::test]
async fn both_sides_detect_it_when_either_lane_goes_silent() {
    for silent in [0, 1] {
        let harness = Harness::new();
        let (env, links) = connect_over_two(&harness, harness.builder()).await;
        env.start_obs_stream(30.0).await.unwrap();
        links[silent].go_silent();
        on_paused_clock(async { while env.next_obs(Duration::from_secs(60)).await.is_ok() {} }).await;
        let error = env.latest_obs().unwrap_err();
        assert!(
            matches!(error, Error::Disconnected { .. }) && error.to_string().contains("nothing received"),
            "{silent}: {error}"
        );
        // The server may try to send its goodbye for a second.
        on_paused_clock(sleep(Duration::from_secs(3))).await;
        check_released(&harness, &[]).await;
    }
}

#[tokio::test]
async fn the_server_sends_goodbye_and_closes_the_other_lane_when_the_client_drops_one() {
    for is_first in [false, true] {
        let harness = Harness::new();
        let first = harness.connect_raw().await;
        let second = attach(&harness, &first.welcome.attach_token).await.unwrap();
        let [dropped, other] = if is_first { [first, second] } else { [second, first] };
        drop(dropped);
        assert_eq!(in_time(other.receive()).await, goodbye("the peer closed the connection"));
        assert!(matches!(in_time(other.end.recv()).await, Ok(None)));
        check_released(&harness, &[]).await;
    }
}

#[tokio::test]
async fn the_peer_that_ends_a_session_sends_goodbye_on_both_lanes() {
    for (side, how) in [(0, "close"), (0, "drop"), (1, "shut down")] {
        let harness = Harness::new();
        let ((control, control_messages), (observations, messages)) =
            (open_tapped_link(&harness), open_tapped_link(&harness));
        let env = harness.builder().connect_over_two(control, observations).await.unwrap();
        let clone = env.clone();
        match how {
            "close" => env.close().await.unwrap(),
            "drop" => {
                drop(env);
                clone.get_obs().await.expect("the clone keeps the session");
                drop(clone);
            }
            _ => in_time(harness.handle.shutdown_and_wait()).await,
        }
        let goodbye = goodbye(["the client was closed", "the server is shutting down"][side]);
        for messages in [&control_messages[side], &messages[side]] {
            harness.wait_until(how, |_| messages.lock().unwrap().contains(&goodbye)).await;
        }
        harness.wait_until("the session ends", |harness| harness.handle.stats().sessions == 0).await;
        match side {
            0 => check_released(&harness, &[]).await,
            _ => assert_eq!(harness.script.events(), END),
        }
    }
}

#[tokio::test]
async fn actions_and_pings_do_not_wait_for_an_observation_on_a_slow_link() {
    // 17 Mbit at 0.4 Mbit/s.
    let harness = Harness::with(Arc::default(), 480, 640, |builder| builder);
    let (control, messages) = open_tapped_link(&harness);
    let (observations, _link) =
        harness.open_link(LinkOptions { bandwidth: Some(400e3), ..LinkOptions::default() });
    let builder =
        harness.builder().request_timeout(Duration::from_secs(100)).idle_timeout(Duration::from_secs(100));
    let env = builder.connect_over_two(control, observations).await.unwrap();
    // The observer counts observations, and so detects when the slow one is taken.
    let observer =
        harness.builder().observer().connect_over(harness.open_link(LinkOptions::default()).0).await.unwrap();
    let mut newest = observer.get_obs().await.unwrap().seq;
    let requesting = env.clone();
    let pending = tokio::spawn(async move { requesting.get_obs().await });
    let wait_until_taken = async {
        while observer.get_obs().await.unwrap().seq == newest + 1 {
            newest += 1;
        }
    };
    in_time(wait_until_taken).await;
    let row = |n: u8| vec![f32::from(n); DIMENSION];
    for n in 0..8 {
        env.send_action(row(n)).await.unwrap();
    }
    env.start_action_dispatch(100.0).unwrap();
    for n in 8..16 {
        env.put_action(row(n)).await.unwrap();
    }
    harness.wait_until("all rows are applied", |harness| harness.script.applied().len() == 16).await;
    assert_eq!(harness.script.applied(), (0..16).map(row).collect::<Vec<_>>());
    let pongs =
        || messages[1].lock().unwrap().iter().filter(|message| kind(message) == "Notice Pong").count();
    let before = pongs();
    on_paused_clock(sleep(Duration::from_secs(20))).await;
    assert!(pongs() >= before + 19, "{} pongs in 20 s", pongs() - before);
    assert!(env.stats().round_trip.unwrap() < Duration::from_secs(1), "{:?}", env.stats().round_trip);
    assert!(!pending.is_finished(), "the observation was being sent throughout");
    assert!(on_paused_clock(pending).await.unwrap().is_ok());
}

#[tokio::test]
async fn a_client_opens_two_connections_or_works_over_one() {
    let harness = Harness::new();
    check_all_calls(&harness, &harness.connect().await).await;
    for (admitted, only_one, expected) in [(usize::MAX, false, 2), (usize::MAX, true, 1), (1, false, 2)] {
        let harness = Harness::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (proxy, attempts) = proxy(listener.local_addr().unwrap(), admitted).await;
        tokio::spawn(harness.server.clone().serve_on(listener));
        let builder = client_builder(format!("ws://{proxy}"));
        let builder = if only_one { builder.one_connection() } else { builder };
        let env = builder.connect().await.unwrap();
        check_all_calls(&harness, &env).await;
        assert_eq!(
            (*attempts.lock().unwrap(), harness.handle.stats().sessions),
            (expected, 1),
            "{admitted} connections admitted"
        );
    }
}

/// A proxy in front of `server` that admits this many connections and counts all attempts.
async fn proxy(server: SocketAddr, admitted: usize) -> (SocketAddr, Arc<Mutex<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, attempts) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(0)));
    let counted = Arc::clone(&attempts);
    tokio::spawn(async move {
        while let Ok((mut outside, _)) = listener.accept().await {
            *counted.lock().unwrap() += 1;
            if *counted.lock().unwrap() <= admitted {
                let mut inside = TcpStream::connect(server).await.unwrap();
                tokio::spawn(async move { copy_bidirectional(&mut outside, &mut inside).await });
            }
        }
    });
    (address, attempts)
}

/// The number of dispatch threads in this process.
fn dispatch_threads() -> usize {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let names = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim() == "chiral-dispatch").count()
}

#[tokio::test]
async fn a_thread_dispatches_every_row_in_order_and_ends_with_the_session() {
    // These clients use the system's clock.
    let builder = PolicyClient::builder("link");
    for builder in [builder.clone().dispatch_spin(Duration::ZERO), builder] {
        let harness = Harness::new();
        let (env, links) = connect_over_two(&harness, builder).await;
        let rows: Vec<_> = (0..50_u8).map(|n| vec![f32::from(n); DIMENSION]).collect();
        env.start_action_dispatch(100.0).unwrap();
        for row in &rows {
            env.put_action(row).await.unwrap();
        }
        harness
            .wait_until("all rows are applied", |harness| harness.script.applied().len() >= rows.len())
            .await;
        assert_eq!(harness.script.applied(), rows);
        let stats = env.stats();
        assert!(stats.action_lateness_p50.unwrap() <= stats.action_lateness_p99.unwrap());
        assert_eq!((stats.actions_sent, stats.actions_queued, stats.actions_discarded), (50, 0, 0));
        // The thread waits for more rows.
        assert!(dispatch_threads() > 0);
        drop((env, links));
        harness.wait_until("the thread ends", |_| dispatch_threads() == 0).await;
    }
}
