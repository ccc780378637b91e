"""The Franka Panda's kinematics and joint limits, from its published numbers."""

import numpy as np

LOWER = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
UPPER = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
MAX_VELOCITY = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
READY = np.array([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4])

# a, d, alpha: Denavit-Hartenberg parameters in Craig's convention. Flange and fingertips follow on the last
# axis.
DH = [
    (0, 0.333, 0),
    (0, 0, -np.pi / 2),
    (0, 0.316, np.pi / 2),
    (0.0825, 0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0, 0, np.pi / 2),
    (0.088, 0, np.pi / 2),
]
FLANGE, TOOL = 0.107, 0.1034


def link(a, d, alpha, angle):
    ca, sa, c, s = np.cos(alpha), np.sin(alpha), np.cos(angle), np.sin(angle)
    rows = [c, -s, 0, a], [s * ca, c * ca, -sa, -d * sa], [s * sa, c * sa, ca, d * ca], [0, 0, 0, 1]
    return np.array(rows)


def frames(q):
    """Returns the pose of each joint, then the hand's: the hand points along z, its fingers open along y."""
    poses = [np.eye(4)]
    for row, angle in zip(DH, q):
        poses.append(poses[-1] @ link(*row, angle))
    return poses[1:] + [poses[-1] @ link(0, FLANGE + TOOL, 0, -np.pi / 4)]


def hand_point(q):
    return frames(q)[-1][:3, 3]


def inverse_kinematics(point, start):
    """Finds joint positions with the hand at `point`, as close to READY as possible, by damped least squares.

    Returns None if there are none.
    """
    for q in (start, READY, np.array([0.5, 0.3, 0.5, -1.5, 0, 1.8, 0.8])):
        for _ in range(150):
            *joints, hand = frames(q)
            error = point - hand[:3, 3]
            columns = [np.cross(pose[:3, 2], hand[:3, 3] - pose[:3, 3]) for pose in joints]
            jacobian = np.column_stack(columns)
            inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-4 * np.eye(3))
            pull = 0.2 * (READY - q)
            step = inverse @ error + pull - inverse @ (jacobian @ pull)
            q = np.clip(q + step * min(1, 0.3 / np.abs(step).max()), LOWER, UPPER)
            if np.linalg.norm(point - hand_point(q)) < 1e-3:
                return q
    return None
