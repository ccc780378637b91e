"""A policy that moves the Panda's hand to the red ball, as a legacy client of either generation.

Connects over WebSocket or Zenoh and uses the msgpack wire.

Usage: client.py ws://HOST:PORT | tcp/HOST:PORT [--generation streaming|gym] [--episodes N] [--seed S]
                 [--json] [--quiet]
"""

import argparse
import contextlib
import json
import queue
import sys
import time

import arm
import numpy as np
import wire

BALL_RADIUS = 0.025
MIN_POINTS, MIN_FLATNESS, MAX_DISAGREEMENT = 6, 0.003, 0.025
OBS_HZ = 30
CHUNK = 4  # rows of an action in the gym-like generation
LEAD = 3  # how many rows the targets are ahead of the arm, so that it does not brake for each of them
EPISODE_TIMEOUT = 30.0


@contextlib.contextmanager
def over_websocket(uri):
    """Waits for a server; yields functions that send and receive a frame."""
    from websockets.sync.client import connect

    with contextlib.ExitStack() as stack:
        while True:
            try:
                connection = stack.enter_context(connect(uri, max_size=None))
                break
            except ConnectionError:
                time.sleep(0.1)
        yield connection.send, connection.recv


@contextlib.contextmanager
def over_zenoh(locator):
    """Probes until a server replies, drops that reply, and yields functions that send and receive frames."""
    import zenoh

    config = zenoh.Config()
    config.insert_json5("mode", '"peer"')
    config.insert_json5("connect/endpoints", json.dumps([locator]))
    config.insert_json5("scouting/multicast/enabled", "false")
    frames = queue.Queue()
    with zenoh.open(config) as session:
        session.declare_subscriber("chiral/s2c", lambda sample: frames.put(sample.payload.to_bytes()))
        publisher = session.declare_publisher("chiral/c2s", congestion_control=zenoh.CongestionControl.BLOCK)
        replied = False
        while not replied:
            publisher.put(wire.pack({"type": "metadata"}))
            with contextlib.suppress(queue.Empty):
                replied = frames.get(timeout=0.5)
        yield publisher.put, lambda: frames.get(timeout=60)


class Client:
    def __init__(self, send, recv):
        self.send, self.recv = send, recv

    def request(self, frame, kind):
        self.send(frame)
        while True:
            header, payload = wire.unpack(self.recv())
            if header["type"] == kind:
                return header, payload
            # Over Zenoh, replies to earlier probes may arrive at any time.
            if header["type"] != "metadata_response":
                raise RuntimeError(f"expected {kind}, found {header['type']}")

    def metadata(self):
        return self.request(wire.pack({"type": "metadata"}), "metadata_response")[0]["data"]

    def reset(self):
        return wire.unpack_observation(*self.request(wire.pack({"type": "reset"}), "reset_response"))

    def get_obs(self):
        return wire.unpack_observation(*self.request(wire.pack({"type": "obs_request"}), "obs_response"))

    def apply_action(self, action, obs):
        self.send(wire.pack_action("apply_action", action, capture_times(obs)))

    def step(self, actions, obs):
        frame = wire.pack_action("action", actions, capture_times(obs))
        header, payload = self.request(frame, "step_response")
        return wire.unpack_observation(header, payload), header


def capture_times(obs):
    return {camera["name"]: camera["timestamp"] for camera in obs["cameras"]}


def red_points(camera):
    """Returns the world points of the camera's red pixels."""
    red, green, blue = (camera["image"][..., i].astype(int) for i in range(3))
    depth = camera["depth"]
    rows, columns = np.nonzero((red > 60) & (red > 2 * np.maximum(green, blue)) & (depth > 0))
    pixels = np.stack([columns, rows, np.ones_like(rows)])
    local = np.linalg.inv(camera["K"]) @ pixels * depth[rows, columns]
    return (camera["T"][:3, :3] @ local + camera["T"][:3, 3:]).T


def flatness(points):
    """Returns how far points lie from the plane that fits them best.

    Points close to a plane fit two balls, one on each side of it.
    """
    return np.linalg.svd(points - points.mean(axis=0), compute_uv=False)[-1] / np.sqrt(len(points))


def fit_ball(points, eye):
    """Fits a ball of the known radius to points on its surface with Gauss-Newton; returns its centre."""
    mean = points.mean(axis=0)
    center = mean + (mean - eye) / np.linalg.norm(mean - eye) * BALL_RADIUS * 2 / 3
    for _ in range(10):
        offsets = center - points
        distances = np.linalg.norm(offsets, axis=1)
        directions = offsets / distances[:, None]
        gradient = directions.T @ (distances - BALL_RADIUS)
        center = center - np.linalg.solve(directions.T @ directions + 1e-3 * np.eye(3), gradient)
    return center


def is_measurable(points):
    return len(points) >= MIN_POINTS and flatness(points) > MIN_FLATNESS


class Policy:
    def __init__(self, control_hz):
        self.reach = np.outer(np.arange(1, CHUNK + 1) + LEAD, arm.MAX_VELOCITY / control_hz)
        self.goal = None

    def act(self, obs):
        """Returns CHUNK rows of joint positions on the way to where the ball was seen last."""
        joints = obs["proprios"]["joint_pos"].astype(float)
        views = [(red_points(camera), camera["T"][:3, 3]) for camera in obs["cameras"]]
        views = [(points, eye) for points, eye in views if is_measurable(points)]
        if views:
            centers = [fit_ball(points, eye) for points, eye in views]
            if np.ptp(centers, axis=0).max() > MAX_DISAGREEMENT:
                # The cameras contradict each other.
                return np.tile(joints, (CHUNK, 1))
            ball = np.average(centers, axis=0, weights=[len(points) for points, _ in views])
            if self.goal is None or np.linalg.norm(arm.hand_point(self.goal) - ball) > 2e-3:
                self.goal = arm.inverse_kinematics(ball, joints)
        goal = joints if self.goal is None else self.goal
        return joints + np.clip(goal - joints, -self.reach, self.reach)


def has_ended(values):
    return bool(values.get("terminated") or values.get("truncated"))


def stream_episode(client, policy, measured):
    """Observes and acts at OBS_HZ in real time. Each observation's `extra` has the state of the episode."""
    obs, due = client.reset(), time.monotonic()
    deadline = due + EPISODE_TIMEOUT
    while not has_ended(obs["extra"]) and time.monotonic() < deadline:
        client.apply_action(policy.act(obs)[0], obs)
        due = max(due + 1 / OBS_HZ, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        obs = client.get_obs()
        measured.append(time.monotonic() - min(capture_times(obs).values()))
    return bool(obs["extra"].get("success"))


def gym_episode(client, policy, measured):
    """Steps a few rows at a time. Each reply has the state of the episode."""
    obs, result, deadline = client.reset(), {}, time.monotonic() + EPISODE_TIMEOUT
    while not has_ended(result) and time.monotonic() < deadline:
        actions, requested = policy.act(obs), time.monotonic()
        obs, result = client.step(actions, obs)
        measured.append(time.monotonic() - requested)
    return bool(result.get("info", {}).get("success"))


def play(client, arguments):
    """Plays all episodes; returns the measurements, the number of successes and the duration."""
    metadata = client.metadata()
    if not arguments.quiet:
        print(metadata, file=sys.stderr)
    episode = stream_episode if arguments.generation == "streaming" else gym_episode
    measured, successes, started = [], 0, time.monotonic()
    for number in range(arguments.episodes):
        success = episode(client, Policy(metadata.get("control_hz", 10)), measured)
        successes += success
        if not arguments.quiet:
            print(f"episode {number}: {'reached' if success else 'NOT REACHED'}", file=sys.stderr)
    return measured, successes, time.monotonic() - started


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("uri")
    parser.add_argument("--generation", choices=["streaming", "gym"], default="streaming")
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--seed", type=int, help="ignored: a reset on this wire has no seed")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()

    websocket = arguments.uri.startswith("ws")
    with (over_websocket if websocket else over_zenoh)(arguments.uri) as connection:
        measured, successes, seconds = play(Client(*connection), arguments)
    streaming = arguments.generation == "streaming"
    p50, p99 = (float(np.percentile(measured, percent)) * 1e3 for percent in (50, 99))
    report = {
        "client": "python",
        "mode": "stream" if streaming else "step",
        "transport": "websocket" if websocket else "zenoh-" + arguments.uri.split("/")[0],
        "codec": "msgpack",
        "episodes": arguments.episodes,
        "successes": successes,
        "obs_hz": len(measured) / seconds if streaming else None,
        "obs_age_ms_p50": p50 if streaming else None,
        "obs_age_ms_p99": p99 if streaming else None,
        "step_ms_p50": None if streaming else p50,
        "step_ms_p99": None if streaming else p99,
        "seconds": seconds,
    }
    summary = f"{successes} of {arguments.episodes} episodes reached the ball in {seconds:.1f} s"
    print(json.dumps(report) if arguments.json else summary)
    sys.exit(successes < arguments.episodes)


if __name__ == "__main__":
    main()
