//! Finds robots without an address.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use chiral_proto::{CameraSpec, Codec, Frame, Message, Reply};
use chiral_transport::zenoh::{Scout, ScoutedRobot, ZenohSessionOptions};

use crate::{error::Error, zenoh::failed};

/// A robot that was found on a Zenoh network. `PolicyClient::builder(&found.addresses[0]).robot(&found.name)`
/// leads to it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DiscoveredRobot {
    /// Its name, unique on its network.
    pub name: String,
    /// Its cameras: names, sizes, whether there is depth.
    pub cameras: Vec<CameraSpec>,
    /// The name of its controller, if it has one.
    pub controller: Option<String>,
    /// The addresses by which it was reached just now, such as `tcp/10.0.0.7:7447`: of its own server or, if
    /// that accepts no connections, of a router. At least one.
    pub addresses: Vec<String>,
}

/// Returns the robots that reply within `duration`, sorted by name.
pub(crate) async fn discover(
    config: Option<PathBuf>,
    duration: Duration,
) -> Result<Vec<DiscoveredRobot>, Error> {
    let options = ZenohSessionOptions { config, ..ZenohSessionOptions::default() };
    let mut scout = Scout::start(&options, duration).await.map_err(failed)?;
    let mut scouted = Vec::new();
    while let Some(robot) = scout.next().await {
        scouted.push(robot);
    }
    Ok(merge(scouted))
}

/// Lists each robot once, with the addresses of its own server or, if there are none, those of the routers
/// that lead to it.
fn merge(mut scouted: Vec<ScoutedRobot>) -> Vec<DiscoveredRobot> {
    scouted.sort_by(|a, b| (&a.robot, !a.is_direct, &a.locator).cmp(&(&b.robot, !b.is_direct, &b.locator)));
    let mut robots: Vec<DiscoveredRobot> = Vec::new();
    for same in scouted.chunk_by(|a, b| a.robot == b.robot) {
        let [first, ..] = same else { continue };
        let of_its_kind = same.iter().filter(|robot| robot.is_direct == first.is_direct);
        let mut addresses: Vec<String> = of_its_kind.map(|robot| robot.locator.clone()).collect();
        addresses.dedup();
        // Without a valid welcome it is not a robot of this protocol.
        let Some((cameras, controller)) = same.iter().find_map(|robot| robot_info(&robot.info)) else {
            continue;
        };
        robots.push(DiscoveredRobot { name: first.robot.clone(), cameras, controller, addresses });
    }
    robots
}

/// The cameras, and who controls the robot.
fn robot_info(info: &[u8]) -> Option<(Vec<CameraSpec>, Option<String>)> {
    match Codec::Protobuf.decode(Frame::from(Bytes::copy_from_slice(info))) {
        Ok(Message::Reply { reply: Reply::Welcome(welcome), .. }) => {
            let controller = Some(welcome.controller).filter(|name| !name.is_empty());
            Some((welcome.robot.cameras, controller))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use chiral_proto::{
        ActionSpec, PROTOCOL_VERSION,
        message::{RobotInfo, Welcome},
    };

    use super::*;

    #[test]
    fn a_robot_is_listed_once_at_its_own_address_if_it_has_one() {
        let info = |controller: &str| {
            let robot = RobotInfo {
                name: "whatever".to_owned(),
                cameras: vec![CameraSpec::rgbd("eye", 4, 6)],
                proprios: vec![],
                action_spec: ActionSpec::joint_positions(2, 20.0),
            };
            let welcome = Welcome {
                protocol: PROTOCOL_VERSION,
                software: String::new(),
                session: 0,
                episode: 0,
                robot,
                attach_token: Bytes::new(),
                controller: controller.to_owned(),
                max_chunk_rows: 256,
            };
            let frame = Codec::Protobuf
                .encode(&Message::Reply { id: 1, reply: Reply::Welcome(welcome.into()) })
                .unwrap();
            frame.into_bytes().to_vec()
        };
        let seen = |robot: &str, locator: &str, is_direct, info: &[u8]| ScoutedRobot {
            robot: robot.to_owned(),
            locator: locator.to_owned(),
            is_direct,
            info: info.to_vec(),
        };
        let robots = merge(vec![
            seen("leg", "tcp/router:1", false, &info("")),
            seen("arm", "tcp/router:1", false, &info("me")),
            seen("arm", "tcp/b:1", true, b"garbage"),
            seen("arm", "tcp/a:1", true, &info("me")),
            seen("stranger", "tcp/c:1", true, b"garbage"),
            seen("leg", "tcp/router:1", false, &info("")),
        ]);
        let found = |name: &str, controller: Option<&str>, addresses: &[&str]| DiscoveredRobot {
            name: name.to_owned(),
            cameras: vec![CameraSpec::rgbd("eye", 4, 6)],
            controller: controller.map(str::to_owned),
            addresses: addresses.iter().map(|address| address.to_string()).collect(),
        };
        assert_eq!(
            robots,
            [found("arm", Some("me"), &["tcp/a:1", "tcp/b:1"]), found("leg", None, &["tcp/router:1"])]
        );
    }
}
