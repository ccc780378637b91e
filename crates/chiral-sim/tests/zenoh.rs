//! Sessions over a Zenoh network, with real sockets on loopback: all calls, which robot a client reaches, and
//! what third parties may put on our keys.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    net::TcpListener,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use chiral_client::{Error, blocking};
use chiral_proto::keys;
use chiral_server::{Error as ServerError, PolicyServer, ProprioSpec, Sensors};
use support::{
    TEST_TIMEOUT, client_builder, free_locator,
    harness::{
        CAMERA, DIMENSION, Event, Harness, ScriptedRobot, run_guide_loop, wait_until_alive,
        wait_until_none_alive, zenoh_session,
    },
};
use tokio::{task::JoinHandle, time::timeout};
use zenoh::Wait;

type Serving = JoinHandle<Result<(), ServerError>>;

/// Serves a robot of this name at the locator `listen` and on the network that it joins.
fn serve(name: &str, listen: Option<&str>, join: Option<&str>) -> (Harness, Serving) {
    serve_pixels(name, listen, join, 8, 8)
}

fn serve_pixels(
    name: &str,
    listen: Option<&str>,
    join: Option<&str>,
    height: usize,
    width: usize,
) -> (Harness, Serving) {
    let harness = Harness::with(Arc::default(), height, width, |builder| {
        let builder = builder.name(name);
        let builder =
            if let Some(locator) = listen { builder.listen_zenoh(locator).discovery(false) } else { builder };
        if let Some(locator) = join { builder.join_zenoh(locator) } else { builder }
    });
    let serving = tokio::spawn(harness.server.clone().serve());
    (harness, serving)
}

// The runtime has one thread; in such a runtime Zenoh itself would panic.
#[tokio::test(flavor = "current_thread")]
async fn the_guides_loop_works_and_sessions_end_cleanly() {
    let uri = free_locator();
    let (harness, serving) = serve("arm", Some(&uri), None);
    let env = client_builder(&uri).connect().await.unwrap();
    assert_eq!(env.robot().name, "arm");
    run_guide_loop(&env).await;
    harness.wait_until("the actions are applied", |harness| harness.script.applied().len() >= 6).await;
    env.close().await.unwrap();
    harness
        .wait_until("the client is disconnected", |harness| {
            harness.script.events().ends_with(&[Event::Held, Event::Disconnected])
        })
        .await;

    // A client that is dropped without a close also releases the robot. A server that shuts down sends the
    // reason.
    drop(client_builder(&uri).connect().await.unwrap());
    harness.wait_until_robot_is_free().await;
    let env = client_builder(&uri).connect().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    harness.handle.shutdown();
    timeout(TEST_TIMEOUT, serving).await.expect("serve returns").unwrap().unwrap();
    let error = loop {
        if let Err(error) = env.next_obs(TEST_TIMEOUT).await {
            break error;
        }
    };
    assert_eq!(error.to_string(), "disconnected: the server is shutting down");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_blocking_client_behaves_like_the_async_one() {
    let uri = free_locator();
    let (harness, _serving) = serve("arm", Some(&uri), None);
    let script = harness.script.clone();
    let driving = thread::spawn(move || {
        let env = client_builder(&uri).connect_blocking().unwrap();
        let (obs, _) = env.reset().unwrap();
        assert_eq!(obs[CAMERA].image.shape(), [8, 8, 3]);
        assert_eq!(env.step([0.5; DIMENSION]).unwrap().reward, 1.0);
        env.start_obs_stream(50.0).unwrap();
        env.start_action_dispatch(100.0).unwrap();
        for _ in 0..5 {
            env.put_action([0.25; DIMENSION]).unwrap();
        }
        // A row that the robot has not begun when its controller disconnects is never applied.
        while script.applied().len() < 6 {
            env.next_obs(TEST_TIMEOUT).unwrap();
        }
        assert_eq!(env.stats().actions_sent, 5);
        env.close().unwrap();
        assert!(matches!(env.latest_obs(), Err(Error::Closed)));
        drop(blocking::PolicyClient::connect(&uri).unwrap());
    });
    tokio::task::spawn_blocking(|| driving.join().unwrap()).await.unwrap();
    let disconnected = |harness: &Harness| {
        harness.script.events().iter().filter(|event| **event == Event::Disconnected).count()
    };
    harness.wait_until("both clients are disconnected", |harness| disconnected(harness) == 2).await;
    assert_eq!(harness.script.applied().len(), 6);
}

#[tokio::test]
async fn websocket_and_zenoh_serve_the_same_robot() {
    let uri = free_locator();
    let harness = Harness::configured(|builder| builder.name("arm").listen_zenoh(&uri).discovery(false));
    let (address, serving) = harness.serve_websocket().await;
    let websocket = format!("ws://{address}");
    let controller = client_builder(&uri).name("over zenoh").connect().await.unwrap();
    let error = client_builder(&websocket).connect().await.unwrap_err();
    assert!(matches!(&error, Error::Busy(fault) if fault.text.contains("over zenoh")), "{error}");
    let observer = client_builder(&websocket).observer().connect().await.unwrap();
    assert_eq!(controller.reset().await.unwrap().0.episode, 1);
    assert_eq!(observer.get_obs().await.unwrap().episode, 1);
    harness.handle.shutdown();
    timeout(TEST_TIMEOUT, serving).await.expect("serve returns").unwrap().unwrap();
}

#[tokio::test]
async fn connect_waits_until_the_robot_is_alive() {
    let uri = free_locator();
    let error = client_builder(&uri).deadline(Duration::from_millis(300)).connect().await.unwrap_err();
    assert!(matches!(&error, Error::NoServer { .. }) && error.to_string().contains(&uri), "{error}");
    let connecting = tokio::spawn(client_builder(&uri).connect());
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert!(!connecting.is_finished());
    let (_stand, _serving) = serve("arm", Some(&uri), None);
    assert_eq!(connecting.await.unwrap().unwrap().robot().name, "arm");
}

#[tokio::test]
async fn a_second_controller_gets_the_name_of_the_first() {
    let uri = free_locator();
    let (_stand, _serving) = serve("arm", Some(&uri), None);
    let _controller = client_builder(&uri).name("the night shift").connect().await.unwrap();
    let error = client_builder(&uri).connect().await.unwrap_err();
    assert!(matches!(&error, Error::Busy(fault) if fault.text.contains("the night shift")), "{error}");
    let observer = client_builder(&uri).observer().connect().await.unwrap();
    assert!(observer.get_obs().await.is_ok());
}

/// Two policies drive two robots on the network at `uri` at the same time, each its own.
async fn check_two_pairs(uri: &str, arm: &Harness, leg: &Harness) {
    wait_until_alive(uri, &["arm", "leg"]).await;
    let error = client_builder(uri).connect().await.unwrap_err();
    assert!(matches!(&error, Error::SeveralRobots { names, .. } if names == &["arm", "leg"]), "{error}");
    let drive = |name: &'static str, value: f32| {
        let connecting = client_builder(uri).robot(name).connect();
        async move {
            let env = connecting.await.unwrap();
            assert_eq!(env.robot().name, name);
            env.reset().await.unwrap();
            for _ in 0..50 {
                env.step([value; DIMENSION]).await.unwrap();
            }
            env.close().await.unwrap();
        }
    };
    timeout(TEST_TIMEOUT, async { tokio::join!(drive("arm", 1.0), drive("leg", 2.0)) })
        .await
        .expect("both robots are driven");
    assert_eq!(arm.script.applied(), vec![vec![1.0; DIMENSION]; 50]);
    assert_eq!(leg.script.applied(), vec![vec![2.0; DIMENSION]; 50]);
}

#[tokio::test]
async fn two_directly_connected_robots_each_receive_only_their_own_actions() {
    let uri = free_locator();
    let (arm, _arm) = serve("arm", Some(&uri), None);
    wait_until_alive(&uri, &["arm"]).await;
    let (leg, _leg) = serve("leg", Some(&free_locator()), Some(&uri));
    check_two_pairs(&uri, &arm, &leg).await;
}

/// A Zenoh router that is not Chiral's.
struct Router(Option<zenoh::Session>);

impl Router {
    fn start(uri: &str) -> Router {
        Router(Some(zenoh_session("router", uri)))
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let session = self.0.take();
        thread::spawn(move || drop(session)).join().unwrap();
    }
}

#[tokio::test]
async fn two_robots_behind_a_router_each_receive_only_their_own_actions() {
    let uri = free_locator();
    let _router = Router::start(&uri);
    let ((arm, _arm), (leg, _leg)) = (serve("arm", None, Some(&uri)), serve("leg", None, Some(&uri)));
    check_two_pairs(&uri, &arm, &leg).await;
}

#[tokio::test]
async fn a_server_refuses_a_name_that_is_alive_already() {
    let uri = free_locator();
    let (_arm, _serving) = serve("arm", Some(&uri), None);
    wait_until_alive(&uri, &["arm"]).await;
    let (_second, serving) = serve("arm", Some(&free_locator()), Some(&uri));
    let error = timeout(TEST_TIMEOUT, serving).await.expect("serve fails").unwrap().unwrap_err();
    assert!(matches!(&error, ServerError::NameTaken { name, .. } if name == "arm"), "{error}");
    assert!(error.to_string().contains("a robot named \"arm\" is alive"), "{error}");
    let env = client_builder(&uri).connect().await.unwrap();
    assert_eq!(env.reset().await.unwrap().0.episode, 1);

    // A server accepts no WebSocket client either before it knows that its name is free.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let websocket = format!("ws://{}", listener.local_addr().unwrap());
    let early_client = tokio::spawn(client_builder(&websocket).deadline(Duration::from_secs(3)).connect());
    let third = Harness::configured(|builder| builder.name("arm").join_zenoh(&uri));
    let error = timeout(TEST_TIMEOUT, third.server.clone().serve_on(listener))
        .await
        .expect("serve fails")
        .unwrap_err();
    assert!(matches!(&error, ServerError::NameTaken { .. }), "{error}");
    assert!(matches!(early_client.await.unwrap(), Err(Error::NoServer { .. })));
    assert_eq!(third.handle.stats().sessions, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_most_one_of_two_servers_that_start_at_once_keeps_a_shared_name() {
    let uri = free_locator();
    let _router = Router::start(&uri);
    for _ in 0..5 {
        let (first, second) = (serve("arm", None, Some(&uri)), serve("arm", None, Some(&uri)));
        let both = [first.1, second.1];
        let started = Instant::now();
        while !both.iter().any(JoinHandle::is_finished) {
            assert!(started.elapsed() < TEST_TIMEOUT, "both servers keep running");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        [first.0, second.0].iter().for_each(|harness| harness.handle.shutdown());
        let mut refused = 0;
        for serving in both {
            match timeout(TEST_TIMEOUT, serving).await.expect("serve returns").unwrap() {
                Ok(()) => {}
                Err(ServerError::NameTaken { .. }) => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(refused > 0);
        // The next round starts once the router knows neither of them.
        wait_until_none_alive(&uri).await;
    }
}

#[tokio::test]
async fn invalid_names_and_addresses_are_refused() {
    let sensors = Sensors::new([], [ProprioSpec::new("joint_pos", DIMENSION, "rad")]).unwrap();
    let robot = PolicyServer::builder(ScriptedRobot(Arc::default()), sensors);
    let error = robot.name("left arm").listen_zenoh("tcp/127.0.0.1:0").build().unwrap_err();
    assert!(matches!(&error, ServerError::Declaration(text) if text.contains("letters, digits")), "{error}");
    for uri in ["udp/localhost:7447", "tls/localhost", "tcp/localhost", "unixsock-stream/", "zenoh:left arm"]
    {
        let error = client_builder(uri).connect().await.unwrap_err();
        assert!(matches!(error, Error::Address { .. }), "{uri}: {error}");
    }
    let occupied = TcpListener::bind("127.0.0.1:0").unwrap();
    let (_stand, serving) = serve("arm", Some(&format!("tcp/{}", occupied.local_addr().unwrap())), None);
    let error = timeout(TEST_TIMEOUT, serving).await.expect("serve fails").unwrap().unwrap_err();
    let ServerError::Zenoh(source) = error else { panic!("{error}") };
    assert!(source.to_string().starts_with("cannot listen at [\"tcp/127.0.0.1:"), "{source}");
}

#[tokio::test]
async fn an_observation_of_17_mb_arrives_unchanged() {
    let uri = free_locator();
    // Colour and depth take 7 bytes per pixel.
    let (_stand, _serving) = serve_pixels("arm", Some(&uri), None, 1228, 2000);
    let env = client_builder(&uri).connect().await.unwrap();
    env.start_obs_stream(30.0).await.unwrap();
    for _ in 0..5 {
        let obs = env.next_obs(TEST_TIMEOUT).await.unwrap();
        let camera = &obs[CAMERA];
        assert!(camera.image.data().len() + camera.depth.as_ref().unwrap().data().len() > 17_000_000);
        assert!(camera.image.data().iter().all(|byte| *byte == 1));
        assert!(camera.depth.as_ref().unwrap().values::<f32>().unwrap().iter().all(|depth| *depth == 1.0));
    }
    // A small request gets its reply while they are streamed.
    assert!(env.get_metadata().await.is_ok());
    env.close().await.unwrap();
}

#[tokio::test]
async fn garbage_on_our_keys_harms_no_session() {
    let uri = free_locator();
    let (harness, _serving) = serve("arm", Some(&uri), None);
    let env = client_builder(&uri).connect().await.unwrap();
    env.reset().await.unwrap();
    let third_party = zenoh_session("client", &uri);
    let unknown_session = "0123456789abcdef0123456789abcdef";
    let mut queries = Vec::new();
    for payload in [&b""[..], b"garbage", &[0xff; 5000]] {
        let keys = [
            "chiral/**".to_owned(),
            "chiral/v1/arm/c/*/c2s".to_owned(),
            "chiral/v1/arm/c/**".to_owned(),
            keys::open("arm"),
            keys::alive("arm", "ff"),
            keys::frames("arm", unknown_session, keys::End::Client),
            keys::frames("arm", unknown_session, keys::End::Server),
        ];
        for key in keys {
            third_party.put(&key, payload).wait().unwrap();
            third_party.put(&key, payload).attachment(&[5_u8][..]).wait().unwrap();
            third_party.delete(&key).wait().unwrap();
        }
        queries
            .push(third_party.get(keys::open("arm")).payload(payload).timeout(TEST_TIMEOUT).wait().unwrap());
        queries.push(third_party.get("chiral/**").payload(payload).timeout(TEST_TIMEOUT).wait().unwrap());
    }
    // The robot refuses each query: none gets a connection, only the public info. By then the puts before it
    // have arrived.
    for replies in queries {
        while let Ok(reply) = replies.recv_async().await {
            assert!(
                reply.result().map_or(true, |sample| sample.key_expr().as_str() == keys::info("arm")),
                "{reply:?}"
            );
        }
    }
    assert_eq!(env.step([0.5; DIMENSION]).await.unwrap().reward, 1.0);
    assert!(env.get_obs().await.is_ok());
    let observer = client_builder(&uri).observer().connect().await.unwrap();
    assert!(observer.get_obs().await.is_ok());
    assert_eq!(harness.handle.stats().sessions, 2);
    thread::spawn(move || drop(third_party)).join().unwrap();
}
