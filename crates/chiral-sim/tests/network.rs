//! What operators of a network set up, by the very files of `docs/zenoh`: routers, TLS, users, access
//! control; and robots found without an address.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    mem::ManuallyDrop,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use chiral_client::{DiscoveredRobot, Error, PolicyClient, PolicyClientBuilder, blocking};
use chiral_proto::keys;
use chiral_server::{Error as ServerError, PolicyServer, PolicyServerBuilder, ProprioSpec, Sensors};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use support::harness::{self, GUARD, Harness, ScriptedRobot, drive, free_address, session};
use tokio::task::JoinHandle;
use zenoh::Wait;

/// Longer than two attempts to connect.
const SHORTLY: Duration = Duration::from_secs(4);

/// A file of the documentation.
fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/zenoh").canonicalize().unwrap().join(name)
}

/// A directory of this test's own, with a name short enough for a socket's; gone at its end.
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

/// `chiral-sim`, started in this directory.
fn chiral_sim(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chiral-sim"));
    command
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.env_remove("RUST_LOG");
    command
}

/// A process that runs beside the test, and is killed at its end. If the test fails, its log is shown.
struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Process {
    /// Returns when it has said `ready` on stderr.
    fn start(directory: &Path, arguments: &[&str], ready: &str) -> Process {
        let mut child = chiral_sim(directory, arguments).stdout(Stdio::null()).spawn().unwrap();
        let log = Arc::new(Mutex::new(format!("---- {arguments:?}\n")));
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (ready, is_ready) = (ready.to_owned(), mpsc::channel());
        let (told, said) = (is_ready.0, Arc::clone(&log));
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                said.lock().unwrap().push_str(&format!("{line}\n"));
                if line.contains(&ready) {
                    let _ = told.send(());
                }
            }
        });
        let process = Process { child, log };
        is_ready.1.recv_timeout(GUARD).expect("it gets ready");
        process
    }

    fn router(directory: &Path, config: &str, locators: &[&str]) -> Process {
        let config = example(config);
        let listen = locators.iter().flat_map(|locator| ["--listen", locator]);
        let arguments: Vec<&str> =
            ["router", "--zenoh-config", config.to_str().unwrap()].into_iter().chain(listen).collect();
        Process::start(directory, &arguments, "routing")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            println!("{}", self.log.lock().unwrap());
        }
    }
}

/// Runs to its end, and what it said.
fn run(directory: &Path, arguments: &[&str]) -> (Output, String) {
    let output = chiral_sim(directory, arguments).output().unwrap();
    let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
    (output, said)
}

type Serving = JoinHandle<Result<(), ServerError>>;

fn serve(name: &str, network: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder) -> (Harness, Serving) {
    let stand = Harness::with(Arc::default(), 8, 8, |builder| network(builder.name(name)));
    let serving = tokio::spawn(stand.server.clone().serve());
    (stand, serving)
}

fn builder(uri: &str) -> PolicyClientBuilder {
    PolicyClient::builder(uri).quiet().deadline(GUARD)
}

/// Connects, and drives the robot.
async fn check_drives(builder: PolicyClientBuilder, robot: &str) {
    let env = builder.connect().await.unwrap();
    assert_eq!(env.robot().name, robot);
    drive(&env).await;
    env.close().await.unwrap();
}

/// Who is not let in is told so, and soon.
async fn check_not_let_in(builder: PolicyClientBuilder) {
    let error = builder.connect().await.unwrap_err();
    assert!(
        matches!(&error, Error::Zenoh(_)) && error.to_string().contains("not let into the Zenoh network at"),
        "{error}"
    );
}

#[tokio::test]
async fn robot_and_policy_meet_at_a_router_that_their_configuration_names() {
    let scratch = Scratch::new("router");
    let locator = format!("tcp/{}", free_address());
    let _router = Process::router(&scratch.0, "router.json5", &[&locator]);
    let joining = scratch.file("joining.json5", &format!("{{ connect: {{ endpoints: [{locator:?}] }} }}"));
    let (_arm, _serving) = serve("arm", |builder| builder.zenoh_config(&joining));
    let (_leg, _leg_serving) = serve("leg", |builder| builder.join_zenoh(&locator));
    check_drives(builder("zenoh:arm").zenoh_config(&joining), "arm").await;
    check_drives(builder("zenoh:").robot("leg").zenoh_config(&joining), "leg").await;
    check_drives(builder(&locator).robot("leg"), "leg").await;
}

#[tokio::test]
async fn a_router_asks_for_user_and_password() {
    let scratch = Scratch::new("users");
    let locator = format!("tcp/{}", free_address());
    let _router = Process::router(&example(""), "router-users.json5", &[&locator]);
    let (_arm, _serving) =
        serve("arm", |builder| builder.join_zenoh(&locator).zenoh_config(example("user-robots.json5")));
    check_drives(builder(&locator).zenoh_config(example("user-alice.json5")), "arm").await;

    check_not_let_in(builder(&locator)).await;
    let alice = fs::read_to_string(example("user-alice.json5")).unwrap();
    let wrong = scratch.file("wrong.json5", &alice.replace("example of alice", "guessed"));
    check_not_let_in(builder(&locator).zenoh_config(wrong)).await;
    let (_leg, serving) = serve("leg", |builder| builder.join_zenoh(&locator));
    let error = serving.await.unwrap().unwrap_err();
    let ServerError::Zenoh(source) = &error else { panic!("{error}") };
    assert!(source.to_string().contains("not let into the Zenoh network at"), "{source}");
}

#[tokio::test]
async fn an_access_control_list_lets_a_policy_reach_one_robot_only() {
    let locator = format!("tcp/{}", free_address());
    let _router = Process::router(&example(""), "router-acl.json5", &[&locator]);
    let robot =
        |name| serve(name, |builder| builder.join_zenoh(&locator).zenoh_config(example("user-robots.json5")));
    let ((_arm, _arm_serving), (leg, _leg_serving)) = (robot("arm"), robot("leg"));
    let robots = || builder(&locator).zenoh_config(example("user-robots.json5"));
    check_drives(robots().robot("leg"), "leg").await;
    check_drives(robots().robot("arm"), "arm").await;

    let alice = || builder(&locator).zenoh_config(example("user-alice.json5"));
    // Of two robots it sees one.
    check_drives(alice(), "arm").await;
    let error = alice().robot("leg").deadline(SHORTLY).connect().await.unwrap_err();
    let expected = "no robot named \"leg\" is alive there, or we may not reach it; there are: arm";
    assert!(matches!(&error, Error::NoServer { .. }) && error.to_string().contains(expected), "{error}");

    // And who does not go by what is alive, does not get further.
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
    let answers = async |key: String| {
        let answers = session.get(key).timeout(GUARD).await.unwrap();
        let mut count = 0;
        while answers.recv_async().await.is_ok() {
            count += 1;
        }
        count
    };
    assert_eq!(answers(keys::open("arm")).await, 1);
    assert_eq!(answers(keys::info("arm")).await, 1);
    assert_eq!(answers(keys::open("leg")).await, 0);
    assert_eq!(answers(keys::info("leg")).await, 0);
    assert_eq!(leg.handle.stats().sessions, 0);
    thread::spawn(move || drop(session)).join().unwrap();
}

/// An authority, and the certificates that it gives.
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

    /// A certificate for `name` on this host, and what it takes to check others'.
    fn give(&self, directory: &Path, name: &str, file: &str, trusted: &Authority) {
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
fn mutual_tls_lets_those_in_who_have_a_certificate() {
    let scratch = Scratch::new("tls");
    let (ours, theirs) = (Authority::new(), Authority::new());
    let [router, arm, alice, mallory] =
        ["router", "arm", "alice", "mallory"].map(|name| scratch.directory(name));
    ours.give(&router, "router", "router", &ours);
    ours.give(&arm, "arm", "me", &ours);
    ours.give(&alice, "alice", "me", &ours);
    theirs.give(&mallory, "alice", "me", &ours);

    let [tls, quic, own] = [(); 3].map(|()| free_address());
    let [listen_tls, listen_quic, listen_own] =
        [format!("tls/{tls}"), format!("quic/{quic}"), format!("quic/{own}")];
    // The name in the certificates.
    let [tls, quic, own] =
        [&listen_tls, &listen_quic, &listen_own].map(|listen| listen.replace("127.0.0.1", "localhost"));
    let config = example("tls.json5");
    let config = config.to_str().unwrap();
    let _router = Process::router(&router, "router-tls.json5", &[&listen_tls, &listen_quic]);
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
    let _arm = Process::start(
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
        let (output, said) = policy(&alice, uri, &with_certificate, "20");
        assert!(output.status.success() && !said.contains("WARN"), "{uri}: {said}");
    }
    // Zenoh's tls/ breaks off once in a few dozen sessions, which is why it is warned of.
    let tries: Vec<_> = (0..3).map(|_| policy(&alice, &tls, &with_certificate, "20")).collect();
    assert!(tries.iter().any(|(output, _)| output.status.success()), "{tries:?}");
    assert!(tries.iter().all(|(_, said)| said.contains("not sound")), "{tries:?}");
    for (directory, config) in [(&mallory, &with_certificate[..]), (&alice, &[])] {
        let (output, said) = policy(directory, &tls, config, "5");
        assert!(!output.status.success() && said.contains("not let into the Zenoh network at"), "{said}");
        // QUIC does not tell a refusal from nobody's being there.
        for uri in [&quic, &own] {
            let (output, said) = policy(directory, uri, config, "3");
            assert!(!output.status.success() && said.contains("no server at quic/localhost"), "{said}");
        }
    }
}

#[tokio::test]
async fn a_unix_socket_is_an_address() {
    let scratch = Scratch::new("unix");
    let locator = format!("unixsock-stream/{}", scratch.0.join("robot.sock").display());
    let (_arm, _serving) = serve("arm", |builder| builder.listen_zenoh(&locator).discovery(false));
    check_drives(builder(&locator), "arm").await;
}

#[tokio::test]
async fn a_configuration_that_cannot_be_used_is_named_and_not_told() {
    let scratch = Scratch::new("bad");
    let bad = scratch.file("bad.json5", "{ transport: { auth: { usrpwd: { pasword: \"secret\" } } } }");
    let errors = [
        builder("tcp/localhost:1").zenoh_config(&bad).connect().await.unwrap_err(),
        builder("zenoh:").zenoh_config(&bad).connect().await.unwrap_err(),
        builder("zenoh:").zenoh_config(&bad).discover(SHORTLY).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(&error, Error::ZenohConfig { file, .. } if *file == bad), "{error}");
        assert!(error.to_string().contains("pasword") && !error.to_string().contains("secret"), "{error}");
    }
    let error = builder("ws://localhost:1").zenoh_config(&bad).connect().await.unwrap_err();
    assert!(matches!(error, Error::Address { .. }), "{error}");
    let (output, said) =
        run(&scratch.0, &["serve", "--zenoh-config", "bad.json5", "--width", "8", "--height", "8"]);
    assert!(
        !output.status.success()
            && said.contains("bad.json5: ")
            && said.contains("pasword")
            && !said.contains("secret"),
        "{said}"
    );
}

#[test]
fn a_second_robot_of_a_name_is_told_who_has_it() {
    let scratch = Scratch::new("names");
    let locator = format!("tcp/{}", free_address());
    let small = ["--name", "arm", "--width", "8", "--height", "8"];
    let first = [&["serve", "--zenoh", &locator, "--no-discovery"], &small[..]].concat();
    let _first = Process::start(&scratch.0, &first, "serving robot \"arm\" on Zenoh");
    let (output, said) = run(&scratch.0, &[&["serve", "--zenoh-join", &locator], &small[..]].concat());
    let host = keys::robot_of_host(fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim());
    assert!(
        !output.status.success() && said.contains("a robot named \"arm\" is alive on this network (server "),
        "{said}"
    );
    assert!(said.contains(&format!("@{host})")), "{said}");
}

#[test]
fn a_robot_is_called_as_its_host_unless_it_has_a_name() {
    let sensors = Sensors::new([], [ProprioSpec::new("joint_pos", harness::DIMENSION, "rad")]).unwrap();
    let server = PolicyServer::new(ScriptedRobot(Arc::default()), sensors).unwrap();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert!(format!("{server:?}").contains(&format!("{:?}", keys::robot_of_host(host.trim()))), "{server:?}");
}

/// A host with one interface, which is up before anybody looks: a process of Zenoh's looks at interfaces
/// once.
const NETWORK: &str = "\
ip link set lo up && ip link add v0 type veth peer name v1 && ip address add 10.77.0.1/24 dev v0 && ip link set v1 up && ip link set v0 up &&
for attempt in $(seq 100); do ip link show v0 | grep -q 'state UP' && break; sleep 0.05; done";

/// Runs one of the tests below in a network that has nobody else in it.
fn in_own_network(test: &str) {
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "--mount", "sh", "-c", script]);
        command
    };
    if !unshare(NETWORK).output().is_ok_and(|output| output.status.success()) {
        println!("skipped: no network of its own can be made here");
        return;
    }
    let script = format!("{NETWORK}; exec \"$0\" --ignored --exact {test} --nocapture");
    assert!(unshare(&script).arg(env::current_exe().unwrap()).status().unwrap().success());
}

#[test]
fn robots_are_found_without_an_address() {
    in_own_network("in_own_network_robots_are_found");
}

#[test]
fn a_robot_is_reached_by_its_name() {
    in_own_network("in_own_network_a_robot_is_reached");
}

#[test]
fn without_shared_memory_observations_travel_by_the_network() {
    in_own_network("in_own_network_there_is_no_shared_memory");
}

/// Of `/dev/shm` so much is left, for this test alone; false where that cannot be.
fn leave_shared_memory(mib: u32) -> bool {
    let mount = |arguments: &[&str]| {
        Command::new("mount").args(arguments).status().is_ok_and(|status| status.success())
    };
    mount(&["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs", "/dev/shm"])
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "of a network of its own"]
async fn in_own_network_there_is_no_shared_memory() {
    let scratch = Scratch::new("unshared");
    let policy =
        ["policy", "tcp/127.0.0.1:7447", "--mode", "stream", "--episodes", "1", "--quiet", "--wait", "20"]
            .map(str::to_owned);
    // None for anybody; then for the policy's Zenoh, but not for the robot's eight observations.
    for mib in [1, 4] {
        if !leave_shared_memory(mib) {
            return println!("skipped: no /dev/shm of its own to be had");
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
        let panda = Process::start(&scratch.0, &serve, "serving robot \"panda\" on Zenoh");
        let (directory, policy) = (scratch.0.clone(), policy.clone());
        let policy =
            tokio::task::spawn_blocking(move || run(&directory, &policy.each_ref().map(String::as_str)));
        let (output, said) = policy.await.unwrap();
        assert!(output.status.success(), "{said}");
        let log = panda.log.lock().unwrap().clone();
        assert!(
            log.contains("MB of shared memory (/dev/shm, ulimit -l), so observations travel by the network"),
            "{log}"
        );
    }
}

/// Looks until these robots are found, and says what was found of them.
async fn until_found(names: &[&str]) -> Vec<DiscoveredRobot> {
    let began = Instant::now();
    loop {
        let looked = Instant::now();
        let robots = PolicyClient::discover(Duration::from_secs(1)).await.unwrap();
        assert!(looked.elapsed() < Duration::from_secs(3), "{:?}", looked.elapsed());
        if names.iter().all(|name| robots.iter().any(|robot| robot.name == *name)) {
            return robots;
        }
        assert!(began.elapsed() < GUARD, "{robots:?}");
    }
}

// A runtime of one thread, in which Zenoh itself would panic.
#[tokio::test]
#[ignore = "of a network of its own"]
async fn in_own_network_robots_are_found() {
    let scratch = Scratch::new("found");
    assert_eq!(PolicyClient::discover(Duration::from_millis(300)).await.unwrap(), []);
    let (output, said) = run(&scratch.0, &["discover", "--seconds", "0.3"]);
    assert!(
        output.status.code() == Some(1) && said.contains("no robot was found") && said.contains("multicast"),
        "{said}"
    );

    let (_arm, _s1) = serve("arm", |builder| builder.listen_zenoh("tcp/0.0.0.0:7450"));
    let (_near, _s2) = serve("near", |builder| builder.listen_zenoh("tcp/127.0.0.1:7447"));
    let (_hidden, _s3) = serve("hidden", |builder| builder.listen_zenoh("tcp/0.0.0.0:7451").discovery(false));
    let users = scratch.file("users.txt", "somebody:else\n");
    let users = format!(
        "{{ transport: {{ auth: {{ usrpwd: {{ user: \"x\", password: \"y\", dictionary_file: {users:?} }} }} }} }}"
    );
    let locked = scratch.file("locked.json5", &users);
    let (_locked, _s4) =
        serve("locked", |builder| builder.listen_zenoh("tcp/0.0.0.0:7452").zenoh_config(locked));
    let _router = Process::router(&scratch.0, "router.json5", &["tcp/10.77.0.1:7453"]);
    let (_leg, _s5) = serve("leg", |builder| builder.join_zenoh("tcp/10.77.0.1:7453"));
    // One that is alive, and is asked before the other, but never answers.
    let ghost = ManuallyDrop::new(session("client", "tcp/10.77.0.1:7453"));
    let _unanswered = ManuallyDrop::new(ghost.declare_queryable(keys::info("ghost")).await.unwrap());
    let _alive =
        ManuallyDrop::new(ghost.liveliness().declare_token(keys::alive("ghost", "0@nowhere")).await.unwrap());
    let _driver = builder("tcp/10.77.0.1:7450").name("the night shift").connect().await.unwrap();

    let robots = until_found(&["arm", "leg", "near"]).await;
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
    let robots = builder("zenoh:").zenoh_config(key).discover(Duration::from_secs(1)).await.unwrap();
    assert!(by_name(robots).contains(&"locked".to_owned()));
    let directory = scratch.0.clone();
    let (output, said) =
        tokio::task::spawn_blocking(move || run(&directory, &["discover", "--seconds", "1"])).await.unwrap();
    assert!(output.status.success(), "{said}");
    for expected in ["arm", "wrist_cam 8x8 + depth", "the night shift", "nobody", "tcp/10.77.0.1:7453"] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

#[tokio::test]
#[ignore = "of a network of its own"]
async fn in_own_network_a_robot_is_reached() {
    let scratch = Scratch::new("named");
    let error = builder("zenoh:arm").deadline(SHORTLY).connect().await.unwrap_err();
    assert!(
        matches!(&error, Error::NoServer { .. }) && error.to_string().contains("search by multicast"),
        "{error}"
    );
    // It waits, and looks again.
    let connecting = tokio::spawn(builder("zenoh:arm").connect());
    let (_arm, _s1) = serve("arm", |builder| builder.listen_zenoh("tcp/0.0.0.0:7450"));
    let env = connecting.await.unwrap().unwrap();
    drive(&env).await;
    env.close().await.unwrap();

    let _router = Process::router(&scratch.0, "router.json5", &["tcp/10.77.0.1:7453"]);
    let (_leg, _s2) = serve("leg", |builder| builder.join_zenoh("tcp/10.77.0.1:7453"));
    check_drives(builder("zenoh:leg"), "leg").await;
    until_found(&["arm", "leg"]).await;
    let error = builder("zenoh:").connect().await.unwrap_err();
    assert!(matches!(&error, Error::SeveralRobots { names, .. } if names == &["arm", "leg"]), "{error}");
    let error = builder("zenoh:head").deadline(SHORTLY).connect().await.unwrap_err();
    assert!(
        error.to_string().contains("no robot named \"head\"") && error.to_string().contains("arm, leg"),
        "{error}"
    );

    let serve =
        ["serve", "--zenoh", "tcp/0.0.0.0:7454", "--name", "panda", "--width", "160", "--height", "120"];
    let _panda = Process::start(&scratch.0, &serve, "serving robot \"panda\" on Zenoh");
    let policy = ["policy", "zenoh:panda", "--mode", "step", "--quiet", "--wait", "20"];
    let (output, said) = tokio::task::spawn_blocking(move || run(&scratch.0, &policy)).await.unwrap();
    assert!(output.status.success(), "{said}");
}
