//! Zenoh networks as operators set them up, with the files of `docs/zenoh`: routers, TLS, users, access
//! control. Also robots that are found without an address.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    mem::ManuallyDrop,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use chiral_client::{DiscoveredRobot, Error, PolicyClient, PolicyClientBuilder, blocking};
use chiral_proto::keys;
use chiral_server::{Error as ServerError, PolicyServer, PolicyServerBuilder, ProprioSpec, Sensors};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use support::{
    TEST_TIMEOUT, client_builder, free_address, free_locator,
    harness::{self, Harness, ScriptedRobot, run_guide_loop, zenoh_session},
    processes::Process,
};
use tokio::task::JoinHandle;
use zenoh::Wait;

/// Long enough for two attempts to connect.
const SHORT_DEADLINE: Duration = Duration::from_secs(4);

/// A configuration file of the documentation.
fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/zenoh").canonicalize().unwrap().join(name)
}

/// A directory for one test, removed at its end. Its name is short enough for a socket's path.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = env::temp_dir().join(format!("chiral-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn directory(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `chiral-sim` in this directory, with its output piped.
fn chiral_sim(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Process::command(arguments);
    command.current_dir(directory).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env_remove("RUST_LOG");
    command
}

/// A `chiral-sim` that runs beside the test. Dropping it kills it; if the test fails, that prints its log.
struct LoggedProcess {
    process: Process,
    log: Arc<Mutex<String>>,
}

impl LoggedProcess {
    /// Returns once a line on stderr contains `ready`.
    fn start(directory: &Path, arguments: &[&str], ready: &str) -> LoggedProcess {
        let mut process = Process::spawn(chiral_sim(directory, arguments).stdout(Stdio::null()));
        let log = Arc::new(Mutex::new(format!("---- {arguments:?}\n")));
        let lines = BufReader::new(process.0.stderr.take().unwrap()).lines();
        let (ready, (is_ready, becomes_ready)) = (ready.to_owned(), mpsc::channel());
        let written = Arc::clone(&log);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                written.lock().unwrap().push_str(&format!("{line}\n"));
                if line.contains(&ready) {
                    let _ = is_ready.send(());
                }
            }
        });
        let process = LoggedProcess { process, log };
        becomes_ready.recv_timeout(TEST_TIMEOUT).expect("the process gets ready");
        process
    }

    fn router(directory: &Path, config: &str, locators: &[&str]) -> LoggedProcess {
        let config = example(config);
        let listen = locators.iter().flat_map(|locator| ["--listen", locator]);
        let arguments: Vec<&str> =
            ["router", "--zenoh-config", config.to_str().unwrap()].into_iter().chain(listen).collect();
        LoggedProcess::start(directory, &arguments, "routing")
    }
}

impl Drop for LoggedProcess {
    fn drop(&mut self) {
        self.process.kill();
        if thread::panicking() {
            println!("{}", self.log.lock().unwrap());
        }
    }
}

/// Runs `chiral-sim` to its end; returns its status and all it printed.
fn run(directory: &Path, arguments: &[&str]) -> (ExitStatus, String) {
    let output = chiral_sim(directory, arguments).output().unwrap();
    let printed = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
    (output.status, printed)
}

type Serving = JoinHandle<Result<(), ServerError>>;

fn serve(name: &str, network: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder) -> (Harness, Serving) {
    let harness = Harness::configured(|builder| network(builder.name(name)));
    let serving = tokio::spawn(harness.server.clone().serve());
    (harness, serving)
}

/// Connects and drives the robot.
async fn check_drives(builder: PolicyClientBuilder, robot: &str) {
    let env = builder.connect().await.unwrap();
    assert_eq!(env.robot().name, robot);
    run_guide_loop(&env).await;
    env.close().await.unwrap();
}

/// Checks that connecting fails fast with the error of a refused client.
async fn check_network_refuses(builder: PolicyClientBuilder) {
    let error = builder.connect().await.unwrap_err();
    assert!(
        matches!(&error, Error::Zenoh(_)) && error.to_string().contains("not let into the Zenoh network at"),
        "{error}"
    );
}

#[tokio::test]
async fn robot_and_policy_connect_through_a_router_named_in_their_configuration() {
    let scratch = Scratch::new("router");
    let locator = free_locator();
    let _router = LoggedProcess::router(&scratch.0, "router.json5", &[&locator]);
    let joining = scratch.file("joining.json5", &format!("{{ connect: {{ endpoints: [{locator:?}] }} }}"));
    let (_arm, _serving) = serve("arm", |builder| builder.zenoh_config(&joining));
    let (_leg, _leg_serving) = serve("leg", |builder| builder.join_zenoh(&locator));
    check_drives(client_builder("zenoh:arm").zenoh_config(&joining), "arm").await;
    check_drives(client_builder("zenoh:").robot("leg").zenoh_config(&joining), "leg").await;
    check_drives(client_builder(&locator).robot("leg"), "leg").await;
}

#[tokio::test]
async fn a_router_requires_user_and_password() {
    let scratch = Scratch::new("users");
    let locator = free_locator();
    let _router = LoggedProcess::router(&example(""), "router-users.json5", &[&locator]);
    let (_arm, _serving) =
        serve("arm", |builder| builder.join_zenoh(&locator).zenoh_config(example("user-robots.json5")));
    check_drives(client_builder(&locator).zenoh_config(example("user-alice.json5")), "arm").await;

    check_network_refuses(client_builder(&locator)).await;
    let alice = fs::read_to_string(example("user-alice.json5")).unwrap();
    let wrong = scratch.file("wrong.json5", &alice.replace("example of alice", "guessed"));
    check_network_refuses(client_builder(&locator).zenoh_config(wrong)).await;
    let (_leg, serving) = serve("leg", |builder| builder.join_zenoh(&locator));
    let error = serving.await.unwrap().unwrap_err();
    let ServerError::Zenoh(source) = &error else { panic!("{error}") };
    assert!(source.to_string().contains("not let into the Zenoh network at"), "{source}");
}

#[tokio::test]
async fn an_access_control_list_lets_a_policy_reach_one_robot_only() {
    let locator = free_locator();
    let _router = LoggedProcess::router(&example(""), "router-acl.json5", &[&locator]);
    let robot =
        |name| serve(name, |builder| builder.join_zenoh(&locator).zenoh_config(example("user-robots.json5")));
    let ((_arm, _arm_serving), (leg, _leg_serving)) = (robot("arm"), robot("leg"));
    let robots = || client_builder(&locator).zenoh_config(example("user-robots.json5"));
    check_drives(robots().robot("leg"), "leg").await;
    check_drives(robots().robot("arm"), "arm").await;

    let alice = || client_builder(&locator).zenoh_config(example("user-alice.json5"));
    // Alice sees one of the two robots.
    check_drives(alice(), "arm").await;
    let error = alice().robot("leg").deadline(SHORT_DEADLINE).connect().await.unwrap_err();
    let expected = "no robot named \"leg\" is alive there, or access to it is denied; alive are: arm";
    assert!(matches!(&error, Error::NoServer { .. }) && error.to_string().contains(expected), "{error}");

    // A client that does not look at the liveliness tokens gets no further.
    let mut config = zenoh::Config::from_file(example("user-alice.json5")).unwrap();
    let settings = [
        ("mode", "\"client\"".to_owned()),
        ("connect/endpoints", format!("[{locator:?}]")),
        ("scouting/multicast/enabled", "false".to_owned()),
    ];
    for (key, value) in settings {
        config.insert_json5(key, &value).unwrap();
    }
    let session = thread::spawn(move || zenoh::open(config).wait().unwrap()).join().unwrap();
    let reply_count = async |key: String| {
        let replies = session.get(key).timeout(TEST_TIMEOUT).await.unwrap();
        let mut count = 0;
        while replies.recv_async().await.is_ok() {
            count += 1;
        }
        count
    };
    assert_eq!(reply_count(keys::open("arm")).await, 1);
    assert_eq!(reply_count(keys::info("arm")).await, 1);
    assert_eq!(reply_count(keys::open("leg")).await, 0);
    assert_eq!(reply_count(keys::info("leg")).await, 0);
    assert_eq!(leg.handle.stats().sessions, 0);
    thread::spawn(move || drop(session)).join().unwrap();
}

/// A certificate authority.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { pem, issuer: Issuer::new(params, key) }
    }

    /// Writes a certificate for `name` on this host, its key, and the authority that it trusts.
    fn issue(&self, directory: &Path, name: &str, file: &str, trusted: &Authority) {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(directory.join(file).with_extension("pem"), certificate.pem()).unwrap();
        fs::write(directory.join(file).with_extension("key"), key.serialize_pem()).unwrap();
        fs::write(directory.join("ca.pem"), &trusted.pem).unwrap();
    }
}

#[test]
fn mutual_tls_admits_only_peers_with_a_certificate() {
    let scratch = Scratch::new("tls");
    let (trusted_ca, other_ca) = (Authority::new(), Authority::new());
    let [router, arm, alice, mallory] =
        ["router", "arm", "alice", "mallory"].map(|name| scratch.directory(name));
    trusted_ca.issue(&router, "router", "router", &trusted_ca);
    trusted_ca.issue(&arm, "arm", "me", &trusted_ca);
    trusted_ca.issue(&alice, "alice", "me", &trusted_ca);
    other_ca.issue(&mallory, "alice", "me", &trusted_ca);

    let [tls, quic, own] = [(); 3].map(|()| free_address());
    let [listen_tls, listen_quic, listen_own] =
        [format!("tls/{tls}"), format!("quic/{quic}"), format!("quic/{own}")];
    // The certificates name this host "localhost".
    let [tls, quic, own] =
        [&listen_tls, &listen_quic, &listen_own].map(|listen| listen.replace("127.0.0.1", "localhost"));
    let config = example("tls.json5");
    let config = config.to_str().unwrap();
    let _router = LoggedProcess::router(&router, "router-tls.json5", &[&listen_tls, &listen_quic]);
    let serve = [
        "serve",
        "--zenoh-config",
        config,
        "--zenoh",
        &listen_own,
        "--zenoh-join",
        &quic,
        "--name",
        "arm",
        "--no-discovery",
    ];
    let _arm = LoggedProcess::start(
        &arm,
        &[&serve[..], &["--width", "160", "--height", "120"]].concat(),
        "serving robot \"arm\" on Zenoh",
    );

    let policy = |directory: &Path, uri: &str, config: &[&str], wait: &str| {
        let arguments = ["policy", uri, "--mode", "step", "--quiet", "--wait", wait];
        run(directory, &[&arguments[..], config].concat())
    };
    let with_certificate = ["--zenoh-config", config];
    for uri in [&quic, &own] {
        let (status, output) = policy(&alice, uri, &with_certificate, "20");
        assert!(status.success() && !output.contains("WARN"), "{uri}: {output}");
    }
    // Zenoh's tls/ breaks off once in a few dozen sessions, which is why the client warns of it.
    let tries: Vec<_> = (0..3).map(|_| policy(&alice, &tls, &with_certificate, "20")).collect();
    assert!(tries.iter().any(|(status, _)| status.success()), "{tries:?}");
    assert!(tries.iter().all(|(_, output)| output.contains("not sound")), "{tries:?}");
    for (directory, config) in [(&mallory, &with_certificate[..]), (&alice, &[])] {
        let (status, output) = policy(directory, &tls, config, "5");
        assert!(!status.success() && output.contains("not let into the Zenoh network at"), "{output}");
        // With QUIC a client cannot tell a refusal from a missing server.
        for uri in [&quic, &own] {
            let (status, output) = policy(directory, uri, config, "3");
            assert!(!status.success() && output.contains("no server at quic/localhost"), "{output}");
        }
    }
}

#[tokio::test]
async fn a_robot_can_be_reached_at_a_unix_socket() {
    let scratch = Scratch::new("unix");
    let locator = format!("unixsock-stream/{}", scratch.0.join("robot.sock").display());
    let (_arm, _serving) = serve("arm", |builder| builder.listen_zenoh(&locator).discovery(false));
    check_drives(client_builder(&locator), "arm").await;
}

#[tokio::test]
async fn an_error_names_a_bad_configuration_file_but_does_not_show_its_secrets() {
    let scratch = Scratch::new("bad");
    let bad = scratch.file("bad.json5", "{ transport: { auth: { usrpwd: { pasword: \"secret\" } } } }");
    let errors = [
        client_builder("tcp/localhost:1").zenoh_config(&bad).connect().await.unwrap_err(),
        client_builder("zenoh:").zenoh_config(&bad).connect().await.unwrap_err(),
        client_builder("zenoh:").zenoh_config(&bad).discover(SHORT_DEADLINE).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(&error, Error::ZenohConfig { file, .. } if *file == bad), "{error}");
        assert!(error.to_string().contains("pasword") && !error.to_string().contains("secret"), "{error}");
    }
    let error = client_builder("ws://localhost:1").zenoh_config(&bad).connect().await.unwrap_err();
    assert!(matches!(error, Error::Address { .. }), "{error}");
    let (status, output) =
        run(&scratch.0, &["serve", "--zenoh-config", "bad.json5", "--width", "8", "--height", "8"]);
    assert!(
        !status.success()
            && output.contains("bad.json5: ")
            && output.contains("pasword")
            && !output.contains("secret"),
        "{output}"
    );
}

#[test]
fn a_second_robot_with_a_name_gets_the_host_of_the_first() {
    let scratch = Scratch::new("names");
    let locator = free_locator();
    let small = ["--name", "arm", "--width", "8", "--height", "8"];
    let first = [&["serve", "--zenoh", &locator, "--no-discovery"], &small[..]].concat();
    let _first = LoggedProcess::start(&scratch.0, &first, "serving robot \"arm\" on Zenoh");
    let (status, output) = run(&scratch.0, &[&["serve", "--zenoh-join", &locator], &small[..]].concat());
    let host = keys::robot_of_host(fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim());
    assert!(
        !status.success() && output.contains("a robot named \"arm\" is alive on this network (server "),
        "{output}"
    );
    assert!(output.contains(&format!("@{host})")), "{output}");
}

#[test]
fn a_robot_without_a_name_is_named_after_its_host() {
    let sensors = Sensors::new([], [ProprioSpec::new("joint_pos", harness::DIMENSION, "rad")]).unwrap();
    let server = PolicyServer::new(ScriptedRobot(Arc::default()), sensors).unwrap();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert!(format!("{server:?}").contains(&format!("{:?}", keys::robot_of_host(host.trim()))), "{server:?}");
}

/// Sets up one network interface and waits until it is up: a Zenoh process reads the interfaces only once.
const NETWORK: &str = "\
ip link set lo up && ip link add v0 type veth peer name v1 && ip address add 10.77.0.1/24 dev v0 &&
ip link set v1 up && ip link set v0 up &&
for attempt in $(seq 100); do ip link show v0 | grep -q 'state UP' && break; sleep 0.05; done";

/// Runs one of the tests below in a network of its own.
fn in_own_network(test: &str) {
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "--mount", "sh", "-c", script]);
        command
    };
    if !unshare(NETWORK).output().is_ok_and(|output| output.status.success()) {
        println!("skipped: no network namespace can be made here");
        return;
    }
    let script = format!("{NETWORK}; exec \"$0\" --ignored --exact {test} --nocapture");
    assert!(unshare(&script).arg(env::current_exe().unwrap()).status().unwrap().success());
}

#[test]
fn robots_are_discovered_without_an_address() {
    in_own_network("in_own_network_robots_are_discovered");
}

#[test]
fn a_client_connects_to_a_robot_by_its_name() {
    in_own_network("in_own_network_a_client_connects_by_name");
}

#[test]
fn without_shared_memory_observations_are_sent_over_the_network() {
    in_own_network("in_own_network_without_shared_memory");
}

/// Gives this test a `/dev/shm` of this size; false if that is not possible.
fn limit_shared_memory(mib: u32) -> bool {
    let mount = |arguments: &[&str]| {
        Command::new("mount").args(arguments).status().is_ok_and(|status| status.success())
    };
    mount(&["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs", "/dev/shm"])
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by another test, in a network of its own"]
async fn in_own_network_without_shared_memory() {
    let scratch = Scratch::new("unshared");
    let policy =
        ["policy", "tcp/127.0.0.1:7447", "--mode", "stream", "--episodes", "1", "--quiet", "--wait", "20"]
            .map(str::to_owned);
    // First too little for anything; then enough for the policy's Zenoh, but not for the robot's eight
    // observations.
    for mib in [1, 4] {
        if !limit_shared_memory(mib) {
            return println!("skipped: /dev/shm cannot be replaced here");
        }
        let serve = [
            "serve",
            "--zenoh",
            "tcp/127.0.0.1:7447",
            "--name",
            "panda",
            "--width",
            "320",
            "--height",
            "240",
        ];
        let panda = LoggedProcess::start(&scratch.0, &serve, "serving robot \"panda\" on Zenoh");
        let (directory, policy) = (scratch.0.clone(), policy.clone());
        let policy =
            tokio::task::spawn_blocking(move || run(&directory, &policy.each_ref().map(String::as_str)));
        let (status, output) = policy.await.unwrap();
        assert!(status.success(), "{output}");
        let log = panda.log.lock().unwrap().clone();
        assert!(
            log.contains("MB of shared memory (/dev/shm, ulimit -l), so observations travel by the network"),
            "{log}"
        );
    }
}

/// Repeats the discovery until it finds these robots; returns all it found.
async fn discover_until_found(names: &[&str]) -> Vec<DiscoveredRobot> {
    let started = Instant::now();
    loop {
        let search_started = Instant::now();
        let robots = PolicyClient::discover(Duration::from_secs(1)).await.unwrap();
        assert!(search_started.elapsed() < Duration::from_secs(3), "{:?}", search_started.elapsed());
        if names.iter().all(|name| robots.iter().any(|robot| robot.name == *name)) {
            return robots;
        }
        assert!(started.elapsed() < TEST_TIMEOUT, "{robots:?}");
    }
}

// The runtime has one thread; in such a runtime Zenoh itself would panic.
#[tokio::test]
#[ignore = "started by another test, in a network of its own"]
async fn in_own_network_robots_are_discovered() {
    let scratch = Scratch::new("found");
    assert_eq!(PolicyClient::discover(Duration::from_millis(300)).await.unwrap(), []);
    let (status, output) = run(&scratch.0, &["discover", "--seconds", "0.3"]);
    assert!(
        status.code() == Some(1) && output.contains("no robot was found") && output.contains("multicast"),
        "{output}"
    );

    let (_arm, _s1) = serve("arm", |builder| builder.listen_zenoh("tcp/0.0.0.0:7450"));
    let (_near, _s2) = serve("near", |builder| builder.listen_zenoh("tcp/127.0.0.1:7447"));
    let (_hidden, _s3) = serve("hidden", |builder| builder.listen_zenoh("tcp/0.0.0.0:7451").discovery(false));
    let users = scratch.file("users.txt", "somebody:else\n");
    let users = format!(
        "{{ transport: {{ auth: {{ usrpwd: {{ \
         user: \"x\", password: \"y\", dictionary_file: {users:?} }} }} }} }}"
    );
    let locked = scratch.file("locked.json5", &users);
    let (_locked, _s4) =
        serve("locked", |builder| builder.listen_zenoh("tcp/0.0.0.0:7452").zenoh_config(locked));
    let _router = LoggedProcess::router(&scratch.0, "router.json5", &["tcp/10.77.0.1:7453"]);
    let (_leg, _s5) = serve("leg", |builder| builder.join_zenoh("tcp/10.77.0.1:7453"));
    // A robot that is alive and is queried before the others, but never replies.
    let ghost = ManuallyDrop::new(zenoh_session("client", "tcp/10.77.0.1:7453"));
    let _unanswered = ManuallyDrop::new(ghost.declare_queryable(keys::info("ghost")).await.unwrap());
    let _alive =
        ManuallyDrop::new(ghost.liveliness().declare_token(keys::alive("ghost", "0@nowhere")).await.unwrap());
    let _driver = client_builder("tcp/10.77.0.1:7450").name("the night shift").connect().await.unwrap();

    let robots = discover_until_found(&["arm", "leg", "near"]).await;
    let found: Vec<_> = robots
        .iter()
        .map(|robot| (&*robot.name, robot.controller.as_deref(), &robot.addresses[..]))
        .collect();
    let at = |locator: &str| vec![locator.to_owned()];
    let [arm, leg, near] = ["tcp/10.77.0.1:7450", "tcp/10.77.0.1:7453", "tcp/127.0.0.1:7447"].map(at);
    assert_eq!(
        found,
        [("arm", Some("the night shift"), &arm[..]), ("leg", None, &leg), ("near", None, &near)]
    );
    assert!(
        robots.iter().all(
            |robot| robot.cameras[0].name == harness::CAMERA && robot.cameras[0].image_shape == [8, 8, 3]
        )
    );

    let by_name =
        |robots: Vec<DiscoveredRobot>| robots.into_iter().map(|robot| robot.name).collect::<Vec<_>>();
    let blocking = thread::spawn(|| blocking::PolicyClient::discover(Duration::from_secs(1)).unwrap());
    let blocking = tokio::task::spawn_blocking(|| blocking.join().unwrap()).await.unwrap();
    assert_eq!(by_name(blocking), ["arm", "leg", "near"]);
    let key = scratch
        .file("key.json5", "{ transport: { auth: { usrpwd: { user: \"somebody\", password: \"else\" } } } }");
    let robots = client_builder("zenoh:").zenoh_config(key).discover(Duration::from_secs(1)).await.unwrap();
    assert!(by_name(robots).contains(&"locked".to_owned()));
    let directory = scratch.0.clone();
    let (status, output) =
        tokio::task::spawn_blocking(move || run(&directory, &["discover", "--seconds", "1"])).await.unwrap();
    assert!(status.success(), "{output}");
    for expected in ["arm", "wrist_cam 8x8 + depth", "the night shift", "none", "tcp/10.77.0.1:7453"] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
}

#[tokio::test]
#[ignore = "started by another test, in a network of its own"]
async fn in_own_network_a_client_connects_by_name() {
    let scratch = Scratch::new("named");
    let error = client_builder("zenoh:arm").deadline(SHORT_DEADLINE).connect().await.unwrap_err();
    assert!(
        matches!(&error, Error::NoServer { .. }) && error.to_string().contains("search by multicast"),
        "{error}"
    );
    // The client waits, and searches again.
    let connecting = tokio::spawn(client_builder("zenoh:arm").connect());
    let (_arm, _s1) = serve("arm", |builder| builder.listen_zenoh("tcp/0.0.0.0:7450"));
    let env = connecting.await.unwrap().unwrap();
    run_guide_loop(&env).await;
    env.close().await.unwrap();

    let _router = LoggedProcess::router(&scratch.0, "router.json5", &["tcp/10.77.0.1:7453"]);
    let (_leg, _s2) = serve("leg", |builder| builder.join_zenoh("tcp/10.77.0.1:7453"));
    check_drives(client_builder("zenoh:leg"), "leg").await;
    discover_until_found(&["arm", "leg"]).await;
    let error = client_builder("zenoh:").connect().await.unwrap_err();
    assert!(matches!(&error, Error::SeveralRobots { names, .. } if names == &["arm", "leg"]), "{error}");
    let error = client_builder("zenoh:head").deadline(SHORT_DEADLINE).connect().await.unwrap_err();
    assert!(
        error.to_string().contains("no robot named \"head\"") && error.to_string().contains("arm, leg"),
        "{error}"
    );

    let serve =
        ["serve", "--zenoh", "tcp/0.0.0.0:7454", "--name", "panda", "--width", "160", "--height", "120"];
    let _panda = LoggedProcess::start(&scratch.0, &serve, "serving robot \"panda\" on Zenoh");
    let policy = ["policy", "zenoh:panda", "--mode", "step", "--quiet", "--wait", "20"];
    let (status, output) = tokio::task::spawn_blocking(move || run(&scratch.0, &policy)).await.unwrap();
    assert!(status.success(), "{output}");
}
