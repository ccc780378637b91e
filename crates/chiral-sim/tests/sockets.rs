//! What only real sockets show: waiting for a server, replies from something that is not one, TLS, limits,
//! embedding and shutdown.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use axum::{Router, http::StatusCode, routing::get};
use chiral_client::{Error, ErrorKind, PolicyClient, blocking};
use futures_util::{SinkExt, StreamExt};
use support::{
    TEST_TIMEOUT, client_builder,
    harness::{DIMENSION, Event, Harness},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest};

const CERTIFICATE: &[u8] = include_bytes!("tls/cert.pem");
const KEY: &[u8] = include_bytes!("tls/test-only-key.pem");

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Connecting fails immediately with an error that `is_expected`.
async fn check_fails_at_once(uri: impl std::fmt::Display, is_expected: impl Fn(&Error) -> bool) {
    let error = client_builder(uri).connect().await.unwrap_err();
    assert!(is_expected(&error), "{error:?}");
}

#[tokio::test]
async fn connect_waits_until_a_server_listens() {
    let (reserved, address) = listener().await;
    drop(reserved);
    let connecting = tokio::spawn(client_builder(format!("ws://{address}")).connect());
    sleep(Duration::from_millis(250)).await;
    assert!(!connecting.is_finished());
    let harness = Harness::new();
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(harness.server.clone().serve_on(listener));
    let env = connecting.await.unwrap().unwrap();
    assert_eq!(env.robot().name, "test-robot");
    assert_eq!(env.reset().await.unwrap().0.episode, 1);
}

#[tokio::test]
async fn a_deadline_ends_the_wait_with_an_error_that_names_the_address() {
    let (reserved, address) = listener().await;
    drop(reserved);
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uris = [
        format!("ws://{address}"),
        format!("ws://{}", silent.local_addr().unwrap()),
        "ws://no-such-host.invalid:1".to_owned(),
    ];
    for uri in uris {
        let error = PolicyClient::builder(&uri)
            .quiet()
            .deadline(Duration::from_millis(300))
            .connect()
            .await
            .unwrap_err();
        assert!(matches!(&error, Error::NoServer { .. }), "{error:?}");
        assert!(error.to_string().contains(&uri), "{error}");
    }
}

#[tokio::test]
async fn connecting_to_anything_but_a_chiral_server_fails_at_once() {
    for uri in ["localhost:8765", "http://localhost", "udp/localhost:7447", "ws://", ""] {
        check_fails_at_once(uri, |error| matches!(error, Error::Address { .. })).await;
    }
    let (listener, address) = listener().await;
    let app = Router::new().route("/teapot", get(|| async { (StatusCode::IM_A_TEAPOT, "short and stout") }));
    tokio::spawn(axum::serve(listener, app).into_future());
    check_fails_at_once(
        format!("ws://{address}/teapot"),
        |error| matches!(error, Error::Http { status: 418, text } if text == "short and stout"),
    )
    .await;
    check_fails_at_once(format!("ws://{address}/"), |error| matches!(error, Error::Http { status: 404, .. }))
        .await;
    // A server without TLS.
    check_fails_at_once(format!("wss://localhost:{}/", address.port()), |error| {
        matches!(error, Error::Tls(_))
    })
    .await;
}

#[tokio::test]
async fn the_error_of_a_busy_robot_names_its_controller() {
    let harness = Harness::new();
    let (address, _serving) = harness.serve_websocket().await;
    let _controller =
        client_builder(format!("ws://{address}")).name("the night shift").connect().await.unwrap();
    check_fails_at_once(
        format!("ws://{address}"),
        |error| matches!(error, Error::Busy(fault) if fault.text.contains("the night shift")),
    )
    .await;
}

#[tokio::test]
async fn a_client_connects_through_a_tls_proxy_and_rejects_an_unknown_certificate_at_once() {
    let harness = Harness::new();
    let (address, _serving) = harness.serve_websocket().await;
    let (listener, proxy) = listener().await;
    tokio::spawn(async move {
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
        let certificate = CertificateDer::from_pem_slice(CERTIFICATE).unwrap();
        let key = PrivateKeyDer::from_pem_slice(KEY).unwrap();
        let config =
            rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![certificate], key)
                .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(mut outside) = acceptor.accept(stream).await {
                    let mut inside = TcpStream::connect(address).await.unwrap();
                    let _ = copy_bidirectional(&mut outside, &mut inside).await;
                }
            });
        }
    });
    let uri = format!("wss://localhost:{}", proxy.port());
    check_fails_at_once(&uri, |error| matches!(error, Error::Tls(_))).await;
    let env = client_builder(&uri).root_certificates(CERTIFICATE).connect().await.unwrap();
    assert_eq!(env.get_obs().await.unwrap().cameras.len(), 1);
}

#[tokio::test]
async fn a_server_that_shuts_down_sends_the_reason_holds_the_robot_and_returns() {
    let harness = Harness::new();
    let (address, serving) = harness.serve_websocket().await;
    let env = client_builder(format!("ws://{address}")).connect().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    env.next_obs(TEST_TIMEOUT).await.unwrap();
    // A connection that never sends anything does not delay the shutdown.
    let _idle = TcpStream::connect(address).await.unwrap();
    harness.handle.shutdown();
    timeout(TEST_TIMEOUT, serving).await.expect("serve returns").unwrap().unwrap();
    let error = loop {
        if let Err(error) = env.next_obs(TEST_TIMEOUT).await {
            break error;
        }
    };
    assert_eq!(error.to_string(), "disconnected: the server is shutting down");
    assert_eq!(harness.script.events(), [Event::Held, Event::Disconnected]);
}

#[tokio::test]
async fn dropping_a_client_releases_the_robot() {
    let harness = Harness::new();
    let (address, _serving) = harness.serve_websocket().await;
    for _ in 0..3 {
        let env = client_builder(format!("ws://{address}")).connect().await.unwrap();
        env.reset().await.unwrap();
        drop(env);
        harness.wait_until_robot_is_free().await;
    }
}

#[tokio::test]
async fn garbage_text_and_oversized_messages_end_only_their_own_connection() {
    let harness = Harness::new();
    let (address, _serving) = harness.serve_websocket().await;
    let observer = client_builder(format!("ws://{address}")).observer().connect().await.unwrap();

    let mut garbage = TcpStream::connect(address).await.unwrap();
    garbage.write_all(&[0xff; 4096]).await.unwrap();
    let mut response = Vec::new();
    let _ = timeout(TEST_TIMEOUT, garbage.read_to_end(&mut response)).await.expect("the connection ends");

    let offer = || {
        let mut request = format!("ws://{address}").into_client_request().unwrap();
        request.headers_mut().insert("Sec-WebSocket-Protocol", "chiral.v1".parse().unwrap());
        request
    };
    for message in [Message::text("hello"), Message::binary(vec![0; 17 << 20]), Message::Close(None)] {
        let (mut socket, _) = tokio_tungstenite::connect_async(offer()).await.unwrap();
        let _ = socket.send(message).await;
        let ended = async { while let Some(Ok(_)) = socket.next().await {} };
        timeout(TEST_TIMEOUT, ended).await.expect("the connection ends");
    }

    assert!(observer.get_obs().await.is_ok());
    harness
        .wait_until("only the observer is connected", |harness| harness.handle.stats().sessions == 1)
        .await;
}

#[tokio::test]
async fn servers_can_be_nested_in_a_host_application_under_any_path() {
    let (left, right) = (Harness::new(), Harness::new());
    let app = Router::new()
        .route("/healthz", get(|| async { "the host is well" }))
        .nest("/robot/left", left.server.clone().into_router())
        .nest("/robot/right", right.server.clone().into_router())
        .nest("/robot/right/health", right.server.health_router());
    let (listener, address) = listener().await;
    tokio::spawn(axum::serve(listener, app).into_future());
    for (harness, path) in [(&left, "left"), (&right, "right")] {
        let env = client_builder(format!("ws://{address}/robot/{path}")).connect().await.unwrap();
        env.reset().await.unwrap();
        assert_eq!(harness.script.events().len(), 2, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blocking_wait_is_given_up_from_outside_and_the_session_goes_on() {
    let harness = Harness::new();
    let (address, _) = harness.serve_websocket().await;
    let (reserved, nobody) = listener().await;
    drop(reserved);
    let script = Arc::clone(&harness.script);
    let blocking = move || {
        // Each wait is given up when it asks for the third time.
        let asked_on = Arc::new(Mutex::new(Vec::new()));
        let asked = Arc::clone(&asked_on);
        let builder = |uri: String| {
            let asked = Arc::clone(&asked);
            PolicyClient::builder(&uri).quiet().interrupt_when(move || {
                let mut asked = asked.lock().unwrap();
                asked.push(thread::current().id());
                asked.len() % 3 == 0
            })
        };
        let error = builder(format!("ws://{nobody}")).connect_blocking().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);

        let env = loop {
            // On a busy machine connecting may take that long.
            match builder(format!("ws://{address}")).connect_blocking() {
                Err(Error::Interrupted) => {}
                connected => break connected.unwrap(),
            }
        };
        script.reset_gate.close();
        assert!(matches!(env.reset(), Err(Error::Interrupted)));
        assert!(matches!(env.next_obs(TEST_TIMEOUT), Err(Error::NotStreaming)), "the session goes on");
        script.reset_gate.open();
        // The late reply belongs to nobody.
        let episode = loop {
            match env.reset() {
                Err(Error::Interrupted) => {}
                reset => break reset.unwrap().0.episode,
            }
        };
        assert!(episode >= 2, "the reset that was given up began one, too");
        let asked_on = asked_on.lock().unwrap();
        assert!(asked_on.len() >= 6 && asked_on.iter().all(|id| *id == thread::current().id()));
    };
    tokio::task::spawn_blocking(blocking).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_blocking_client_behaves_like_the_async_one() {
    let harness = Harness::new();
    let (address, _serving) = harness.serve_websocket().await;
    let (uri, script) = (format!("ws://{address}"), Arc::clone(&harness.script));
    let blocking = move || {
        let env = blocking::PolicyClient::connect(&uri).unwrap();
        assert_eq!(env.get_metadata().unwrap()["kind"].as_str(), Some("scripted"));
        let (obs, _) = env.reset_with(Some(3), Default::default()).unwrap();
        assert_eq!(obs["wrist_cam"].image.shape(), [8, 8, 3]);
        assert_eq!(env.step([0.5; DIMENSION]).unwrap().reward, 1.0);
        env.start_obs_stream(50.0).unwrap();
        assert!(env.next_obs(TEST_TIMEOUT).unwrap().seq > obs.seq);
        assert!(env.latest_obs().unwrap().is_some());
        env.start_action_dispatch(100.0).unwrap();
        for _ in 0..5 {
            env.put_action([0.25; DIMENSION]).unwrap();
        }
        // A row that the robot has not begun when its controller disconnects is never applied.
        while script.applied().len() < 6 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(env.stats().actions_sent, 5);
        env.stop_obs_stream().unwrap();
        env.stop_action_dispatch();
        env.close().unwrap();
        assert!(matches!(env.latest_obs(), Err(Error::Closed)));
        // A client that is dropped without a close.
        drop(blocking::PolicyClient::connect(&uri).unwrap());
    };
    tokio::task::spawn_blocking(blocking).await.unwrap();
    harness
        .wait_until("both clients are disconnected", |harness| {
            harness.script.events().iter().filter(|event| **event == Event::Disconnected).count() == 2
        })
        .await;
    assert_eq!(harness.script.applied().len(), 6);
}
