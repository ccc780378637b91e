"""A simulated Panda with two cameras. Its task is to move its hand to a red ball and hold it."""

import arm
import numpy as np

CONTROL_HZ = 20.0
PHYSICS_S = 0.01
REACH, HOLD, TIME_LIMIT = 0.02, 0.2, 6.0
START = np.array([0, -0.95, 0, -2.45, 0, 2.17, np.pi / 4])
BALL_RADIUS = 0.025
RED, BLUE, TABLE = (220, 12, 16), (12, 40, 220), (110, 105, 100)


def look_at(eye, at):
    forward = np.subtract(at, eye) / np.linalg.norm(np.subtract(at, eye))
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.column_stack([right, np.cross(forward, right), forward, eye])
    return pose


HEAD = look_at([0.62, -1.0, 0.86], [0.5, 0.0, 0.2])
# Beside the gripper and tilted towards the fingers, which are at the lower edge of its upright image.
TILT = np.array([[1, 0, 0], [0, np.cos(0.32), np.sin(0.32)], [0, -np.sin(0.32), np.cos(0.32)]])
WRIST_IN_HAND = np.eye(4)
WRIST_IN_HAND[:3] = np.column_stack([np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]) @ TILT, [0.07, 0, -0.08]])


class World:
    """The world of one episode. Only `advance` advances its time."""

    def __init__(self, rng, width, height):
        self.width, self.height = width, height
        self.ball = rng.uniform([0.34, -0.26, 0.08], [0.75, 0.26, 0.40])
        # Further away from the head camera than the ball, so that it does not hide the ball.
        self.decoy = np.array([rng.uniform(0.4, 0.7), self.ball[1] + rng.uniform(0.15, 0.3), 0.05])
        self.joints = START + rng.uniform(-0.06, 0.06, 7)
        self.target = self.joints
        self.seconds = self.held = self.reward = 0.0
        self.terminated = self.truncated = False

    def distance(self):
        return np.linalg.norm(arm.hand_point(self.joints) - self.ball)

    def command(self, joints):
        self.target = np.clip(joints, arm.LOWER, arm.UPPER)

    def advance(self, seconds):
        """Moves each joint towards its target as fast as it may; returns the reward."""
        before = self.distance()
        for _ in range(round(seconds / PHYSICS_S)):
            reach = arm.MAX_VELOCITY * PHYSICS_S
            self.joints = self.joints + np.clip(self.target - self.joints, -reach, reach)
            self.seconds += PHYSICS_S
            self.held = self.held + PHYSICS_S if self.distance() <= REACH else 0.0
            if not (self.terminated or self.truncated):
                self.terminated = self.held >= HOLD
                self.truncated = not self.terminated and self.seconds >= TIME_LIMIT
        reward = float(before - self.distance())
        self.reward += reward
        return reward

    def cameras(self, timestamp):
        hand = arm.frames(self.joints)[-1]
        wrist = self.draw("wrist_cam", timestamp, hand @ WRIST_IN_HAND, 78)
        return [wrist, self.draw("head_cam", timestamp, HEAD, 50)]

    def draw(self, name, timestamp, pose, degrees):
        """Casts a ray through every pixel. Its z in the camera's frame is 1: its parameter is the depth."""
        focal = self.width / 2 / np.tan(np.radians(degrees) / 2)
        K = np.array([[focal, 0, (self.width - 1) / 2], [0, focal, (self.height - 1) / 2], [0, 0, 1]])
        rows, columns = np.mgrid[: self.height, : self.width]
        rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(K).T @ pose[:3, :3].T
        eye = pose[:3, 3]

        image = np.full((self.height, self.width, 3), 200, np.uint8)
        with np.errstate(divide="ignore"):
            depth = np.where(rays[..., 2] < 0, -eye[2] / rays[..., 2], np.inf)
        image[np.isfinite(depth)] = TABLE
        for center, color in (self.ball, RED), (self.decoy, BLUE):
            a, b = (rays**2).sum(axis=-1), rays @ (center - eye)
            root = b**2 - a * (((center - eye) ** 2).sum() - BALL_RADIUS**2)
            z = np.where(root >= 0, (b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
            seen = (z > 0) & (z < depth)
            height = (eye + rays[seen] * z[seen][:, None] - center)[:, 2:] / BALL_RADIUS
            image[seen] = np.array(color) * (0.7 + 0.3 * height)
            depth[seen] = z[seen]
        depth = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
        return {"name": name, "timestamp": timestamp, "image": image, "depth": depth, "K": K, "T": pose}
