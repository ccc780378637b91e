//! A session's two connections: which carries what, who may join, and that the end of either is the end of
//! both. Which of these run in real time, and why, is said in `holds.rs`.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, sync::Mutex, time::Duration};

use bytes::Bytes;
use chiral_client::{Code, Error, PolicyClient, PolicyClientBuilder};
use chiral_proto::{
    Codec, Fault, Message, Notice, Rate, Reply, Request, Timestamp, Transport, ValueMap,
    message::{Hello, Role, Subscribe},
};
use chiral_sim::link::{LinkControl, LinkEnd, LinkOptions, link};
use futures_util::future::join_all;
use support::harness::{self, DIMENSION, Event, Harness, Raw, hello};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{sleep, timeout},
};

const ROW: [f32; DIMENSION] = [0.1, 0.2, 0.3];
/// For what must come; no test measures time by it.
const GUARD: Duration = Duration::from_secs(20);
const LEFT: [Event; 2] = [Event::Held, Event::Disconnected];
const RESET: [Event; 2] = [Event::ResetBegan, Event::ResetDone];

async fn within<T>(what: impl Future<Output = T>) -> T {
    timeout(GUARD, what).await.expect("it must not hang")
}

/// Runs on a paused clock what the robot's thread has no part in.
async fn virtually<T>(future: impl Future<Output = T>) -> T {
    tokio::time::pause();
    let outcome = future.await;
    tokio::time::resume();
    outcome
}

fn goodbye(reason: &str) -> Message {
    Message::Notice(Notice::Goodbye { reason: reason.to_owned() })
}

/// A second connection's hello, and its answer.
async fn join(stand: &Harness, token: &[u8]) -> Result<Raw, Fault> {
    let mut raw = Raw::silent(stand.dial(LinkOptions::default()).0);
    let hello = Hello { attach_token: Bytes::copy_from_slice(token), ..hello(Role::Controller) };
    raw.say(&Message::Request { id: 1, request: Request::Hello(hello) }).await;
    match raw.hear().await {
        Message::Reply { reply: Reply::Welcome(welcome), .. } if welcome.attach_token.is_empty() => {
            raw.welcome = *welcome
        }
        Message::Reply { reply: Reply::Error(fault), .. } => return Err(fault),
        other => panic!("expected a welcome without a token or an error, found {other:?}"),
    }
    Ok(raw)
}

async fn check_refused(stand: &Harness, token: &[u8], why: &str) {
    match join(stand, token).await {
        Err(fault) => {
            assert_eq!((fault.code, &*fault.field), (Code::Invalid, "hello.attach_token"), "{why}: {fault}")
        }
        Ok(joined) => panic!("{why}, and joined session {}", joined.welcome.session),
    }
}

/// What a message is, such as `Reply Reset`: the names of its variants.
fn kind(message: &Message) -> String {
    let text = format!("{message:?}");
    let (_, inner) = ["request: ", "reply: ", "("].iter().find_map(|before| text.split_once(before)).unwrap();
    [&text, inner].map(|text| text.split([' ', '(']).next().unwrap()).join(" ")
}

/// The next messages on a connection, or fewer if it is closed.
async fn kinds(raw: &Raw, at_most: usize) -> Vec<String> {
    let mut kinds = Vec::new();
    while kinds.len() < at_most
        && let Ok(Some(frame)) = within(raw.end.recv()).await
    {
        kinds.push(kind(&Codec::Protobuf.decode(frame).unwrap()));
    }
    kinds
}

/// A client on two links of the stand.
async fn connect_by(stand: &Harness, builder: PolicyClientBuilder) -> (PolicyClient, [LinkControl; 2]) {
    let ((control, first), (observations, second)) =
        (stand.dial(LinkOptions::default()), stand.dial(LinkOptions::default()));
    (builder.connect_over_two(control, observations).await.unwrap(), [first, second])
}

/// The robot is free at once, and was told once that its controller has left.
async fn check_left(stand: &Harness, before: &[Event]) {
    let (next, _links) = connect_by(stand, stand.builder()).await;
    stand.script.reset_gate.open();
    next.reset().await.unwrap();
    assert_eq!(stand.script.events(), [before, &LEFT, &RESET].concat());
    stand.until("only the next is left", |stand| stand.handle.stats().sessions == 1).await;
}

/// What was said on a connection, by the client and by the server.
type Said = [Arc<Mutex<Vec<Message>>>; 2];

/// A link to the stand on which somebody listens in.
fn tapped(stand: &Harness) -> (LinkEnd, Said) {
    let (ours, middle, _) = link(LinkOptions::default());
    let (beyond, _) = stand.dial(LinkOptions::default());
    let said = Said::default();
    let noted = said.clone();
    let pass = async |noted: &Mutex<Vec<Message>>, from: &LinkEnd, to: &LinkEnd| {
        while let Ok(Some(frame)) = from.recv().await {
            noted.lock().unwrap().push(Codec::Protobuf.decode(frame.clone()).unwrap());
            let _ = to.send(frame).await;
        }
        to.close().await;
    };
    tokio::spawn(async move {
        tokio::join!(pass(&noted[0], &middle, &beyond), pass(&noted[1], &beyond, &middle))
    });
    (ours, said)
}

async fn check_everything_works(stand: &Harness, env: &PolicyClient) {
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("scripted"));
    let (obs, _) = env.reset().await.unwrap();
    assert!(env.get_obs().await.unwrap().seq > obs.seq);
    assert_eq!(env.step(ROW).await.unwrap().obs.episode, obs.episode);
    env.start_obs_stream(100.0).await.unwrap();
    // More than may be under way without credit.
    for _ in 0..10 {
        env.next_obs(GUARD).await.unwrap();
    }
    env.stop_obs_stream().await.unwrap();
    env.send_action(ROW).await.unwrap();
    env.start_action_dispatch(100.0).unwrap();
    env.put_action(ROW).await.unwrap();
    stand.until("a step and two actions", |stand| stand.script.applied() == vec![ROW.to_vec(); 3]).await;
}

#[tokio::test]
async fn every_frame_with_an_observation_comes_by_the_second_connection_wherever_it_was_asked_for() {
    let stand = Harness::new();
    let control = stand.raw().await;
    let observations = join(&stand, &control.welcome.attach_token).await.unwrap();
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
    let mut asked = 10;
    for (asking, episode) in [(&control, 1), (&observations, 3)] {
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
            *stand.script.reset_fails.lock().unwrap() = (n == 7).then(|| "no power".to_owned());
            asked += 1;
            asking.say(&Message::Request { id: asked, request }).await;
            let reply = within(observations.answer(asked)).await;
            assert_eq!(kind(&Message::Reply { id: asked, reply }), expected, "request {n}");
            if expected == "Reply Subscribed" {
                assert_eq!(kinds(&observations, 1).await, ["Notice Observation"]);
            }
        }
    }
    for raw in [&control, &observations] {
        raw.say(&Message::Request { id: 1, request: Request::GetMetadata }).await;
        raw.say(&Message::Notice(Notice::Ping { t1: Timestamp(1) })).await;
        raw.act(session, 99, 1, ROW).await;
    }
    assert_eq!(kinds(&observations, 3).await, ["Reply Metadata", "Notice Pong", "Notice Error"]);
    control.say(&goodbye("")).await;
    assert_eq!(kinds(&observations, usize::MAX).await, ["Notice Goodbye"]);
    // All that was ever said on the first.
    assert_eq!(
        kinds(&control, usize::MAX).await,
        ["Reply Metadata", "Notice Pong", "Notice Error", "Notice Goodbye"]
    );
}

#[tokio::test]
async fn the_client_says_what_concerns_observations_by_the_second_connection_and_the_rest_by_the_first() {
    let stand = Harness::new();
    let ((control, control_said), (observations, said)) = (tapped(&stand), tapped(&stand));
    let env = stand.builder().connect_over_two(control, observations).await.unwrap();
    check_everything_works(&stand, &env).await;
    let cases = [
        (
            &control_said[0],
            "Notice Action, Notice Ping, Request GetMetadata, Request Hello, Request Reset, Request Step",
        ),
        (&control_said[1], "Notice Pong, Reply Metadata, Reply Welcome"),
        (
            &said[0],
            "Notice Credit, Notice Ping, Request GetObs, Request Hello, Request Subscribe, Request Unsubscribe",
        ),
    ];
    for (said, expected) in cases {
        let kinds = || {
            BTreeSet::from_iter(said.lock().unwrap().iter().map(kind))
                .into_iter()
                .collect::<Vec<_>>()
                .join(", ")
        };
        stand.until("it is pinged", |_| kinds().contains("Notice P")).await;
        assert_eq!(kinds(), expected);
    }
}

#[tokio::test]
async fn a_token_is_good_once_for_5_s_and_as_long_as_its_session_lasts() {
    let stand = Harness::new();
    let mut raw = stand.raw().await;
    let token = raw.welcome.attach_token.to_vec();
    assert_eq!(token.len(), 16);
    let wrong: Vec<u8> = token.iter().map(|byte| byte ^ 1).collect();
    for wrong in [&wrong[..], &token[..15], &[&token[..], &[0]].concat()] {
        check_refused(&stand, wrong, "it is wrong").await;
    }
    virtually(sleep(Duration::from_millis(4900))).await;
    let mut second = join(&stand, &token).await.unwrap();
    assert_eq!(second.welcome.session, raw.welcome.session);
    check_refused(&stand, &token, "it was used").await;
    // None of which harmed the session.
    assert!(matches!(within(second.ask(Request::GetObs)).await, Reply::Observation(_)));
    assert!(matches!(within(raw.ask(Request::GetMetadata)).await, Reply::Metadata(_)));
    assert_eq!(stand.script.events(), []);
    drop((raw, second));
    stand.until("the robot is free", |stand| stand.handle.stats().sessions == 0).await;

    let mut raw = stand.raw().await;
    virtually(sleep(Duration::from_secs(5))).await;
    check_refused(&stand, &raw.welcome.attach_token, "it is too old").await;
    assert!(matches!(within(raw.ask(Request::GetObs)).await, Reply::Observation(_)));
    drop(raw);
    stand.until("the robot is free", |stand| stand.handle.stats().sessions == 0).await;

    let token = stand.raw().await.welcome.attach_token.clone();
    stand.until("the robot is free", |stand| stand.handle.stats().sessions == 0).await;
    check_refused(&stand, &token, "its session has ended").await;
}

#[tokio::test(start_paused = true)]
async fn nobody_joins_a_session_that_is_still_saying_goodbye() {
    let stand = Harness::new();
    let (end, _link) = stand.dial(LinkOptions { bandwidth: Some(10e3), ..LinkOptions::default() });
    let leaving = Raw::greet(end).await;
    leaving.say(&goodbye("")).await;
    let _next = stand.raw().await;
    check_refused(&stand, &leaving.welcome.attach_token, "its session has ended").await;
}

#[tokio::test]
async fn after_a_stream_has_begun_it_is_too_late_for_a_second_connection() {
    let stand = Harness::new();
    let mut control = stand.raw().await;
    let asked = Subscribe { rate: Rate::new(10.0).unwrap(), cameras: vec![], depth: true, window: 1 };
    assert!(matches!(control.ask(Request::Subscribe(asked)).await, Reply::Subscribed { .. }));
    check_refused(&stand, &control.welcome.attach_token.clone(), "has no stream").await;
    assert!(matches!(control.ask(Request::Unsubscribe).await, Reply::StreamEnd { .. }));
}

#[tokio::test]
async fn when_close_returns_the_robot_is_free_for_the_next_client() {
    let stand = Harness::new();
    let far = LinkOptions { latency: Duration::from_millis(100), ..LinkOptions::default() };
    let (env, _link) = stand.connect_over(far).await;
    env.close().await.unwrap();
    // Much nearer: it would overtake a goodbye that is still on its way.
    stand.connect().await;
}

#[tokio::test]
async fn when_either_connection_is_cut_every_call_fails_and_the_robot_is_free() {
    for lost in [0, 1] {
        let stand = Harness::new();
        let (env, links) = connect_by(&stand, stand.builder().queue_capacity(1)).await;
        env.reset().await.unwrap();
        env.start_obs_stream(0.001).await.unwrap();
        env.next_obs(GUARD).await.unwrap();
        stand.script.reset_gate.close();
        env.start_action_dispatch(10.0).unwrap();
        let [resetting, watching, acting] = [env.clone(), env.clone(), env.clone()];
        let waiting: [JoinHandle<Result<(), Error>>; 3] = [
            tokio::spawn(async move { resetting.reset().await.map(drop) }),
            tokio::spawn(async move { watching.next_obs(GUARD).await.map(drop) }),
            tokio::spawn(async move {
                loop {
                    acting.put_action(ROW).await?
                }
            }),
        ];
        stand
            .until("all wait", |stand| {
                stand.script.reset_gate.is_waited_at() && env.stats().actions_queued == 1
            })
            .await;
        assert!(waiting.iter().all(|call| !call.is_finished()));
        links[lost].cut();
        let waited = within(join_all(waiting)).await.into_iter().map(Result::unwrap);
        let later = [
            env.next_obs(GUARD).await.map(drop),
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
        let outcomes: Vec<_> = waited.chain(later).collect();
        assert!(
            outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Disconnected { .. }))),
            "{lost}: {outcomes:?}"
        );

        // Even though the robot is still busy with the lost one's reset.
        check_left(&stand, &[RESET, RESET].concat()).await;
    }
}

#[tokio::test]
async fn when_either_connection_goes_silent_both_sides_notice() {
    for silent in [0, 1] {
        let stand = Harness::new();
        let (env, links) = connect_by(&stand, stand.builder()).await;
        env.start_obs_stream(30.0).await.unwrap();
        links[silent].silence();
        virtually(async { while env.next_obs(Duration::from_secs(60)).await.is_ok() {} }).await;
        let error = env.latest_obs().unwrap_err();
        assert!(
            matches!(error, Error::Disconnected { .. }) && error.to_string().contains("nothing heard"),
            "{silent}: {error}"
        );
        // The server may still try to say goodbye, for a second.
        virtually(sleep(Duration::from_secs(3))).await;
        check_left(&stand, &[]).await;
    }
}

#[tokio::test]
async fn when_the_client_drops_either_connection_the_other_is_told_and_closed() {
    for is_first in [false, true] {
        let stand = Harness::new();
        let first = stand.raw().await;
        let second = join(&stand, &first.welcome.attach_token).await.unwrap();
        let [lost, left] = if is_first { [first, second] } else { [second, first] };
        drop(lost);
        assert_eq!(within(left.hear()).await, goodbye("the peer closed the connection"));
        assert!(matches!(within(left.end.recv()).await, Ok(None)));
        check_left(&stand, &[]).await;
    }
}

#[tokio::test]
async fn who_ends_a_session_on_purpose_says_so_on_both_connections() {
    for (side, how) in [(0, "close"), (0, "drop"), (1, "shut down")] {
        let stand = Harness::new();
        let ((control, control_said), (observations, said)) = (tapped(&stand), tapped(&stand));
        let env = stand.builder().connect_over_two(control, observations).await.unwrap();
        let clone = env.clone();
        match how {
            "close" => env.close().await.unwrap(),
            "drop" => {
                drop(env);
                clone.get_obs().await.expect("a clone is left");
                drop(clone);
            }
            _ => within(stand.handle.shutdown_and_wait()).await,
        }
        let goodbye = goodbye(["the client was closed", "the server is shutting down"][side]);
        for said in [&control_said[side], &said[side]] {
            stand.until(how, |_| said.lock().unwrap().contains(&goodbye)).await;
        }
        stand.until("the session ends", |stand| stand.handle.stats().sessions == 0).await;
        match side {
            0 => check_left(&stand, &[]).await,
            _ => assert_eq!(stand.script.events(), LEFT),
        }
    }
}

#[tokio::test]
async fn actions_and_pings_do_not_wait_for_an_observation_that_takes_long() {
    // 17 Mbit at 0.4 Mbit/s.
    let stand = Harness::with(Arc::default(), 480, 640, |builder| builder);
    let (control, said) = tapped(&stand);
    let (observations, _link) = stand.dial(LinkOptions { bandwidth: Some(400e3), ..LinkOptions::default() });
    let builder =
        stand.builder().request_timeout(Duration::from_secs(100)).idle_timeout(Duration::from_secs(100));
    let env = builder.connect_over_two(control, observations).await.unwrap();
    // Whoever counts the observations sees when the slow one was taken.
    let watching =
        stand.builder().observer().connect_over(stand.dial(LinkOptions::default()).0).await.unwrap();
    let mut newest = watching.get_obs().await.unwrap().seq;
    let asking = env.clone();
    let asking = tokio::spawn(async move { asking.get_obs().await });
    let until_taken = async {
        while watching.get_obs().await.unwrap().seq == newest + 1 {
            newest += 1;
        }
    };
    within(until_taken).await;
    let row = |n: u8| vec![f32::from(n); DIMENSION];
    for n in 0..8 {
        env.send_action(row(n)).await.unwrap();
    }
    env.start_action_dispatch(100.0).unwrap();
    for n in 8..16 {
        env.put_action(row(n)).await.unwrap();
    }
    stand.until("all are applied", |stand| stand.script.applied().len() == 16).await;
    assert_eq!(stand.script.applied(), (0..16).map(row).collect::<Vec<_>>());
    let pongs = || said[1].lock().unwrap().iter().filter(|message| kind(message) == "Notice Pong").count();
    let before = pongs();
    virtually(sleep(Duration::from_secs(20))).await;
    assert!(pongs() >= before + 19, "{} pongs in 20 s", pongs() - before);
    assert!(env.stats().round_trip.unwrap() < Duration::from_secs(1), "{:?}", env.stats().round_trip);
    assert!(!asking.is_finished(), "and all the while the observation was on its way");
    assert!(virtually(asking).await.unwrap().is_ok());
}

#[tokio::test]
async fn a_client_uses_two_sockets_or_makes_do_with_one_connection_for_everything() {
    let stand = Harness::new();
    check_everything_works(&stand, &stand.connect().await).await;
    for (let_through, only_one, expected) in [(usize::MAX, false, 2), (usize::MAX, true, 1), (1, false, 2)] {
        let stand = Harness::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (proxy, came) = proxy(listener.local_addr().unwrap(), let_through).await;
        tokio::spawn(stand.server.clone().serve_on(listener));
        let builder = PolicyClient::builder(&format!("ws://{proxy}")).quiet().deadline(GUARD);
        let builder = if only_one { builder.one_connection() } else { builder };
        let env = builder.connect().await.unwrap();
        check_everything_works(&stand, &env).await;
        assert_eq!(
            (*came.lock().unwrap(), stand.handle.stats().sessions),
            (expected, 1),
            "{let_through} may pass"
        );
    }
}

/// A way to `server` that lets so many connections through, and counts all.
async fn proxy(server: SocketAddr, let_through: usize) -> (SocketAddr, Arc<Mutex<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, came) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(0)));
    let counted = Arc::clone(&came);
    tokio::spawn(async move {
        while let Ok((mut outside, _)) = listener.accept().await {
            *counted.lock().unwrap() += 1;
            if *counted.lock().unwrap() <= let_through {
                let mut inside = TcpStream::connect(server).await.unwrap();
                tokio::spawn(async move { copy_bidirectional(&mut outside, &mut inside).await });
            }
        }
    });
    (address, came)
}

/// Threads of this process that wait for ticks.
fn dispatch_threads() -> usize {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim() == "chiral-dispatch").count()
}

#[tokio::test]
async fn a_thread_dispatches_every_row_in_order_and_ends_with_the_session() {
    // On the system's own clock.
    let builder = PolicyClient::builder("link");
    for builder in [builder.clone().dispatch_spin(Duration::ZERO), builder] {
        let stand = Harness::new();
        let (env, links) = connect_by(&stand, builder).await;
        let rows: Vec<_> = (0..50_u8).map(|n| vec![f32::from(n); DIMENSION]).collect();
        env.start_action_dispatch(100.0).unwrap();
        for row in &rows {
            env.put_action(row).await.unwrap();
        }
        stand.until("all are applied", |stand| stand.script.applied().len() >= rows.len()).await;
        assert_eq!(stand.script.applied(), rows);
        let stats = env.stats();
        assert!(stats.action_lateness_p50.unwrap() <= stats.action_lateness_p99.unwrap());
        assert_eq!((stats.actions_sent, stats.actions_queued, stats.actions_discarded), (50, 0, 0));
        // The thread waits for more.
        assert!(dispatch_threads() > 0);
        drop((env, links));
        stand.until("the thread ends", |_| dispatch_threads() == 0).await;
    }
}
