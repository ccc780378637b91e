"""A robot as a legacy server of either generation, over WebSocket or Zenoh with the msgpack wire.

Usage: server.py ws://HOST:PORT | tcp/HOST:PORT [--generation streaming|gym] [--width W] [--height H]
                 [--seed S]
"""

import argparse
import asyncio
import contextlib
import json
import queue
import signal
import time
from urllib.parse import urlsplit

import numpy as np
import wire
from robot import CONTROL_HZ, PHYSICS_S, World

FRAGMENT = 32 * 1024


class Robot:
    """Replies to frames. It ignores unknown ones, such as requests of the other generation."""

    def __init__(self, arguments):
        self.rng = np.random.default_rng(arguments.seed)
        self.size = arguments.width, arguments.height
        self.handlers = {"metadata": self.metadata, "reset": self.reset}
        if arguments.generation == "streaming":
            self.handlers |= {"obs_request": self.observe, "apply_action": self.apply}
        else:
            self.handlers |= {"action": self.step}
        self.reset_world()

    def handle(self, frame):
        """Returns the reply to a frame, or None if there is none."""
        header, payload = wire.unpack(frame)
        handler = self.handlers.get(header["type"])
        return handler(header, payload) if handler else None

    def reset_world(self):
        self.world = World(self.rng, *self.size)
        # In the streaming generation, time starts with the first action.
        self.now = None

    def metadata(self, header, payload):
        data = {"robot": "Panda in Python", "cameras": ["wrist_cam", "head_cam"], "control_hz": CONTROL_HZ}
        data |= {"action_shape": [1, 7], "action_N": 1, "action_D": 7}
        return wire.pack({"type": "metadata_response", "data": data})

    def reset(self, header, payload):
        self.reset_world()
        return self.observation("reset_response", info={"instruction": "reach the red ball"})

    def observe(self, header, payload):
        self.catch_up()
        world = self.world
        extra = {"success": world.terminated, "terminated": world.terminated, "truncated": world.truncated}
        return self.observation("obs_response", extra=extra | {"reward": world.reward, "time": world.seconds})

    def apply(self, header, payload):
        self.catch_up()
        if self.now is None:
            self.now = time.monotonic()
        self.world.command(wire.unpack_action(header, payload).reshape(-1, 7)[-1])

    def step(self, header, payload):
        reward = 0.0
        for row in wire.unpack_action(header, payload).reshape(-1, 7):
            self.world.command(row)
            reward += self.world.advance(1 / CONTROL_HZ)
        world = self.world
        end = {"terminated": world.terminated, "truncated": world.truncated}
        return self.observation("step_response", reward=reward, info={"success": world.terminated}, **end)

    def catch_up(self):
        """Advances the world to the present."""
        if self.now is not None:
            ticks = int((time.monotonic() - self.now) / PHYSICS_S)
            self.now += ticks * PHYSICS_S
            self.world.advance(ticks * PHYSICS_S)

    def observation(self, kind, **more):
        header = {"type": kind, "timestamp": self.world.seconds}
        cameras = self.world.cameras(time.monotonic())
        return wire.pack_observation(header, cameras, {"joint_pos": self.world.joints}, **more)


async def serve_websocket(robot, address, fragmented):
    from websockets.asyncio.server import serve

    async def handler(connection):
        async for frame in connection:
            reply = robot.handle(frame)
            if reply is None:
                continue
            if fragmented and len(reply) > FRAGMENT:
                reply = [reply[i : i + FRAGMENT] for i in range(0, len(reply), FRAGMENT)]
            await connection.send(reply)

    async with serve(handler, address.hostname, address.port, max_size=None) as server:
        await server.serve_forever()


def serve_zenoh(robot, locator):
    import zenoh

    config = zenoh.Config()
    config.insert_json5("mode", '"peer"')
    config.insert_json5("listen/endpoints", json.dumps([locator]))
    config.insert_json5("scouting/multicast/enabled", "false")
    frames = queue.Queue()
    with zenoh.open(config) as session:
        session.declare_subscriber("chiral/c2s", lambda sample: frames.put(sample.payload.to_bytes()))
        publisher = session.declare_publisher("chiral/s2c", congestion_control=zenoh.CongestionControl.BLOCK)
        while True:
            # An interrupt just before the wait is handled only after it, so the wait must be short.
            with contextlib.suppress(queue.Empty):
                reply = robot.handle(frames.get(timeout=0.5))
                if reply is not None:
                    publisher.put(reply)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("uri")
    parser.add_argument("--generation", choices=["streaming", "gym"], default="streaming")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--height", type=int, default=72)
    parser.add_argument("--seed", type=int, help="seed of the first episode; the later ones follow from it")
    arguments = parser.parse_args()
    # A shell script starts its background processes with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    robot = Robot(arguments)
    try:
        if arguments.uri.startswith("ws"):
            # Servers of the gym-like generation send large messages in fragments.
            fragmented = arguments.generation == "gym"
            asyncio.run(serve_websocket(robot, urlsplit(arguments.uri), fragmented))
        else:
            serve_zenoh(robot, arguments.uri)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
