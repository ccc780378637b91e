//! What must hold over a Zenoh network, with real sockets on loopback: the whole loop, who meets whom, and
//! what strangers put on our keys.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    net::TcpListener,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use chiral_client::{Error, PolicyClient, PolicyClientBuilder, blocking};
use chiral_proto::keys;
use chiral_server::{Error as ServerError, PolicyServer, ProprioSpec, Sensors};
use support::harness::{
    CAMERA, DIMENSION, Event, GUARD, Harness, ScriptedRobot, drive, free_address, session,
};
use tokio::{task::JoinHandle, time::timeout};
use zenoh::Wait;

/// A locator on loopback that was free a moment ago: Zenoh does not tell which port it was given.
fn free() -> String {
    format!("tcp/{}", free_address())
}

type Serving = JoinHandle<Result<(), ServerError>>;

/// A stand of this name that serves at `listen`, and on the network that it joins.
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
    let stand = Harness::with(Arc::default(), height, width, |builder| {
        let builder = builder.name(name);
        let builder =
            if let Some(locator) = listen { builder.listen_zenoh(locator).discovery(false) } else { builder };
        if let Some(locator) = join { builder.join_zenoh(locator) } else { builder }
    });
    let serving = tokio::spawn(stand.server.clone().serve());
    (stand, serving)
}

fn builder(uri: &str) -> PolicyClientBuilder {
    PolicyClient::builder(uri).quiet().deadline(GUARD)
}

/// Waits until the network at `uri` knows these robots.
async fn until_alive(uri: &str, names: &[&str]) {
    let began = Instant::now();
    loop {
        let error = builder(uri)
            .robot("nobody")
            .deadline(Duration::from_millis(900))
            .connect()
            .await
            .unwrap_err()
            .to_string();
        if names.iter().all(|name| error.contains(name)) {
            return;
        }
        assert!(began.elapsed() < GUARD, "{error}");
    }
}

/// Waits until the network at `uri` knows no robot.
async fn until_gone(uri: &str) {
    let began = Instant::now();
    loop {
        let error = builder(uri)
            .robot("nobody")
            .deadline(Duration::from_millis(900))
            .connect()
            .await
            .unwrap_err()
            .to_string();
        if error.contains("no robot is alive there") {
            return;
        }
        assert!(began.elapsed() < GUARD, "{error}");
    }
}

// A runtime of one thread, in which Zenoh itself would panic.
#[tokio::test(flavor = "current_thread")]
async fn the_whole_loop_and_an_orderly_end() {
    let uri = free();
    let (stand, serving) = serve("arm", Some(&uri), None);
    let env = builder(&uri).connect().await.unwrap();
    assert_eq!(env.robot().name, "arm");
    drive(&env).await;
    stand.until("the actions were applied", |stand| stand.script.applied().len() >= 6).await;
    env.close().await.unwrap();
    stand
        .until("the client has left", |stand| {
            stand.script.events().ends_with(&[Event::Held, Event::Disconnected])
        })
        .await;

    // A client that is only dropped frees the robot, too; and a server that stops says so.
    drop(builder(&uri).connect().await.unwrap());
    stand.until("the robot is free", |stand| stand.handle.stats().sessions == 0).await;
    let env = builder(&uri).connect().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    stand.handle.shutdown();
    timeout(GUARD, serving).await.expect("it returns").unwrap().unwrap();
    let error = loop {
        if let Err(error) = env.next_obs(GUARD).await {
            break error;
        }
    };
    assert_eq!(error.to_string(), "disconnected: the server is shutting down");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_blocking_client_is_the_same() {
    let uri = free();
    let (stand, _serving) = serve("arm", Some(&uri), None);
    let script = stand.script.clone();
    let driving = thread::spawn(move || {
        let env = PolicyClient::builder(&uri).quiet().deadline(GUARD).connect_blocking().unwrap();
        let (obs, _) = env.reset().unwrap();
        assert_eq!(obs[CAMERA].image.shape(), [8, 8, 3]);
        assert_eq!(env.step([0.5; DIMENSION]).unwrap().reward, 1.0);
        env.start_obs_stream(50.0).unwrap();
        env.start_action_dispatch(100.0).unwrap();
        for _ in 0..5 {
            env.put_action([0.25; DIMENSION]).unwrap();
        }
        // What the robot has not begun when its controller leaves, it never does.
        while script.applied().len() < 6 {
            env.next_obs(GUARD).unwrap();
        }
        assert_eq!(env.stats().actions_sent, 5);
        env.close().unwrap();
        assert!(matches!(env.latest_obs(), Err(Error::Closed)));
        drop(blocking::PolicyClient::connect(&uri).unwrap());
    });
    tokio::task::spawn_blocking(|| driving.join().unwrap()).await.unwrap();
    let disconnected =
        |stand: &Harness| stand.script.events().iter().filter(|event| **event == Event::Disconnected).count();
    stand.until("both have left", |stand| disconnected(stand) == 2).await;
    assert_eq!(stand.script.applied().len(), 6);
}

#[tokio::test]
async fn websocket_and_zenoh_serve_the_same_robot() {
    let uri = free();
    let stand = Harness::with(Arc::default(), 8, 8, |builder| {
        builder.name("arm").listen_zenoh(&uri).discovery(false)
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let websocket = format!("ws://{}", listener.local_addr().unwrap());
    let serving = tokio::spawn(stand.server.clone().serve_on(listener));
    let driver = builder(&uri).name("over zenoh").connect().await.unwrap();
    let error = builder(&websocket).connect().await.unwrap_err();
    assert!(matches!(&error, Error::Busy(fault) if fault.text.contains("over zenoh")), "{error}");
    let watcher = builder(&websocket).observer().connect().await.unwrap();
    assert_eq!(driver.reset().await.unwrap().0.episode, 1);
    assert_eq!(watcher.get_obs().await.unwrap().episode, 1);
    stand.handle.shutdown();
    timeout(GUARD, serving).await.expect("it returns").unwrap().unwrap();
}

#[tokio::test]
async fn connect_waits_until_the_robot_is_alive() {
    let uri = free();
    let error = builder(&uri).deadline(Duration::from_millis(300)).connect().await.unwrap_err();
    assert!(matches!(&error, Error::NoServer { .. }) && error.to_string().contains(&uri), "{error}");
    let connecting = tokio::spawn(builder(&uri).connect());
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert!(!connecting.is_finished());
    let (_stand, _serving) = serve("arm", Some(&uri), None);
    assert_eq!(connecting.await.unwrap().unwrap().robot().name, "arm");
}

#[tokio::test]
async fn a_second_controller_is_told_who_holds_the_robot() {
    let uri = free();
    let (_stand, _serving) = serve("arm", Some(&uri), None);
    let _holder = builder(&uri).name("the night shift").connect().await.unwrap();
    let error = builder(&uri).connect().await.unwrap_err();
    assert!(matches!(&error, Error::Busy(fault) if fault.text.contains("the night shift")), "{error}");
    let watcher = builder(&uri).observer().connect().await.unwrap();
    assert!(watcher.get_obs().await.is_ok());
}

/// Two robots and two policies on one network, which meet by this locator: each policy drives its own robot,
/// at the same time.
async fn check_two_pairs(uri: &str, arm: &Harness, leg: &Harness) {
    until_alive(uri, &["arm", "leg"]).await;
    let error = builder(uri).connect().await.unwrap_err();
    assert!(matches!(&error, Error::SeveralRobots { names, .. } if names == &["arm", "leg"]), "{error}");
    let drive = |name: &'static str, value: f32| {
        let connecting = builder(uri).robot(name).connect();
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
    timeout(GUARD, async { tokio::join!(drive("arm", 1.0), drive("leg", 2.0)) })
        .await
        .expect("both are driven");
    assert_eq!(arm.script.applied(), vec![vec![1.0; DIMENSION]; 50]);
    assert_eq!(leg.script.applied(), vec![vec![2.0; DIMENSION]; 50]);
}

#[tokio::test]
async fn two_robots_that_know_each_other_are_never_mixed_up() {
    let uri = free();
    let (arm, _arm) = serve("arm", Some(&uri), None);
    until_alive(&uri, &["arm"]).await;
    let (leg, _leg) = serve("leg", Some(&free()), Some(&uri));
    check_two_pairs(&uri, &arm, &leg).await;
}

/// A router, and nothing else of ours.
struct Router(Option<zenoh::Session>);

impl Router {
    fn start(uri: &str) -> Router {
        Router(Some(session("router", uri)))
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let session = self.0.take();
        thread::spawn(move || drop(session)).join().unwrap();
    }
}

#[tokio::test]
async fn two_robots_behind_a_router_are_never_mixed_up() {
    let uri = free();
    let _router = Router::start(&uri);
    let ((arm, _arm), (leg, _leg)) = (serve("arm", None, Some(&uri)), serve("leg", None, Some(&uri)));
    check_two_pairs(&uri, &arm, &leg).await;
}

#[tokio::test]
async fn a_name_that_is_alive_already_is_refused() {
    let uri = free();
    let (_arm, _serving) = serve("arm", Some(&uri), None);
    until_alive(&uri, &["arm"]).await;
    let (_second, serving) = serve("arm", Some(&free()), Some(&uri));
    let error = timeout(GUARD, serving).await.expect("it refuses").unwrap().unwrap_err();
    assert!(matches!(&error, ServerError::NameTaken { name, .. } if name == "arm"), "{error}");
    assert!(error.to_string().contains("a robot named \"arm\" is alive"), "{error}");
    let env = builder(&uri).connect().await.unwrap();
    assert_eq!(env.reset().await.unwrap().0.episode, 1);

    // Nor does it let anybody in by WebSocket before it knows.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let websocket = format!("ws://{}", listener.local_addr().unwrap());
    let eager = tokio::spawn(builder(&websocket).deadline(Duration::from_secs(3)).connect());
    let third = Harness::with(Arc::default(), 8, 8, |builder| builder.name("arm").join_zenoh(&uri));
    let error =
        timeout(GUARD, third.server.clone().serve_on(listener)).await.expect("it refuses").unwrap_err();
    assert!(matches!(&error, ServerError::NameTaken { .. }), "{error}");
    assert!(matches!(eager.await.unwrap(), Err(Error::NoServer { .. })));
    assert_eq!(third.handle.stats().sessions, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_of_one_name_that_come_at_the_same_time_at_most_one_stays() {
    let uri = free();
    let _router = Router::start(&uri);
    for _ in 0..5 {
        let (first, second) = (serve("arm", None, Some(&uri)), serve("arm", None, Some(&uri)));
        let both = [first.1, second.1];
        let began = Instant::now();
        while !both.iter().any(JoinHandle::is_finished) {
            assert!(began.elapsed() < GUARD, "both stay");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        [first.0, second.0].iter().for_each(|stand| stand.handle.shutdown());
        let mut refused = 0;
        for serving in both {
            match timeout(GUARD, serving).await.expect("it ends").unwrap() {
                Ok(()) => {}
                Err(ServerError::NameTaken { .. }) => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(refused > 0);
        // Until the router has forgotten them.
        until_gone(&uri).await;
    }
}

#[tokio::test]
async fn names_and_addresses_that_cannot_be_are_refused() {
    let sensors = Sensors::new([], [ProprioSpec::new("joint_pos", DIMENSION, "rad")]).unwrap();
    let robot = PolicyServer::builder(ScriptedRobot(Arc::default()), sensors);
    let error = robot.name("left arm").listen_zenoh("tcp/127.0.0.1:0").build().unwrap_err();
    assert!(matches!(&error, ServerError::Declaration(text) if text.contains("letters, digits")), "{error}");
    for uri in ["udp/localhost:7447", "tls/localhost", "tcp/localhost", "unixsock-stream/", "zenoh:left arm"]
    {
        let error = builder(uri).connect().await.unwrap_err();
        assert!(matches!(error, Error::Address { .. }), "{uri}: {error}");
    }
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let (_stand, serving) = serve("arm", Some(&format!("tcp/{}", held.local_addr().unwrap())), None);
    let error = timeout(GUARD, serving).await.expect("it refuses").unwrap().unwrap_err();
    assert!(matches!(error, ServerError::Zenoh(_)), "{error}");
}

#[tokio::test]
async fn an_observation_of_17_mb_arrives_as_it_was_taken() {
    let uri = free();
    // Colour and depth: 7 bytes a pixel.
    let (_stand, _serving) = serve_pixels("arm", Some(&uri), None, 1228, 2000);
    let env = builder(&uri).connect().await.unwrap();
    env.start_obs_stream(30.0).await.unwrap();
    for _ in 0..5 {
        let obs = env.next_obs(GUARD).await.unwrap();
        let camera = &obs[CAMERA];
        assert!(camera.image.data().len() + camera.depth.as_ref().unwrap().data().len() > 17_000_000);
        assert!(camera.image.data().iter().all(|byte| *byte == 1));
        assert!(camera.depth.as_ref().unwrap().values::<f32>().unwrap().iter().all(|depth| *depth == 1.0));
    }
    // While they flow, a small request is answered.
    assert!(env.get_metadata().await.is_ok());
    env.close().await.unwrap();
}

#[tokio::test]
async fn garbage_on_our_keys_harms_nobody() {
    let uri = free();
    let (stand, _serving) = serve("arm", Some(&uri), None);
    let env = builder(&uri).connect().await.unwrap();
    env.reset().await.unwrap();
    let stranger = session("client", &uri);
    let stray = "0123456789abcdef0123456789abcdef";
    let mut asked = Vec::new();
    for payload in [&b""[..], b"garbage", &[0xff; 5000]] {
        let keys = [
            "chiral/**".to_owned(),
            "chiral/v1/arm/c/*/c2s".to_owned(),
            "chiral/v1/arm/c/**".to_owned(),
            keys::open("arm"),
            keys::alive("arm", "ff"),
            keys::frames("arm", stray, keys::End::Client),
            keys::frames("arm", stray, keys::End::Server),
        ];
        for key in keys {
            stranger.put(&key, payload).wait().unwrap();
            stranger.put(&key, payload).attachment(&[5_u8][..]).wait().unwrap();
            stranger.delete(&key).wait().unwrap();
        }
        asked.push(stranger.get(keys::open("arm")).payload(payload).timeout(GUARD).wait().unwrap());
        asked.push(stranger.get("chiral/**").payload(payload).timeout(GUARD).wait().unwrap());
    }
    // Each is refused: none gets a connection, only what the robot tells everybody; and by then the puts
    // before it were heard.
    for answers in asked {
        while let Ok(answer) = answers.recv_async().await {
            assert!(
                answer.result().map_or(true, |told| told.key_expr().as_str() == keys::info("arm")),
                "{answer:?}"
            );
        }
    }
    assert_eq!(env.step([0.5; DIMENSION]).await.unwrap().reward, 1.0);
    assert!(env.get_obs().await.is_ok());
    let watcher = builder(&uri).observer().connect().await.unwrap();
    assert!(watcher.get_obs().await.is_ok());
    assert_eq!(stand.handle.stats().sessions, 2);
    thread::spawn(move || drop(stranger)).join().unwrap();
}
