"""Frames of the msgpack wire.

A frame is a little-endian u32, that many bytes of header (one MessagePack map), and the buffers that the
header refers to.
"""

import struct

import msgpack
import numpy as np


def pack(header, *buffers):
    head = msgpack.packb(header)
    return b"".join([struct.pack("<I", len(head)), head, *buffers])


def unpack(frame):
    (length,) = struct.unpack_from("<I", frame)
    return msgpack.unpackb(frame[4 : 4 + length]), memoryview(frame)[4 + length :]


def pack_action(kind, values, obs_timestamps):
    values = np.asarray(values, np.float32)
    header = {"type": kind, "shape": list(values.shape), "dtype": "float32", "obs_timestamps": obs_timestamps}
    return pack(header, values.tobytes())


def unpack_action(header, payload):
    return np.frombuffer(payload, header["dtype"]).reshape(header["shape"])


def pack_observation(header, cameras, proprios, **more):
    """Packs an observation into a frame.

    `header` has the message type. Each camera is a dict with name, timestamp, image, K, T and optionally
    depth. `proprios` maps names to vectors.
    """
    buffers, offset = [], 0

    def place(array):
        nonlocal offset
        buffers.append(array.tobytes())
        offset += array.nbytes
        return offset - array.nbytes, array.nbytes

    entries = []
    for camera in cameras:
        entry = {"name": camera["name"], "timestamp": camera["timestamp"]}
        entry["intrinsics"], entry["extrinsics"] = camera["K"].ravel().tolist(), camera["T"].ravel().tolist()
        for part in "image", "depth":
            if part in camera:
                array = camera[part]
                begin, size = place(array)
                entry |= {f"{part}_shape": list(array.shape), f"{part}_dtype": array.dtype.name}
                entry |= {f"{part}_offset": begin, f"{part}_size": size}
        entries.append(entry)
    vectors = []
    for name, values in proprios.items():
        begin, size = place(values.astype(np.float32))
        vectors.append({"name": name, "dtype": "float32", "offset": begin, "size": size})
    return pack(header | more | {"cameras": entries, "proprios": vectors}, *buffers)


def unpack_observation(header, payload):
    """Returns what `pack_observation` packed: `timestamp`, `extra`, `cameras` and `proprios` in one dict."""

    def array(shape, dtype, offset, size):
        return np.frombuffer(payload[offset : offset + size], dtype).reshape(shape)

    cameras = []
    for entry in header["cameras"]:
        camera = {"name": entry["name"], "timestamp": entry.get("timestamp", 0.0)}
        camera["K"] = np.reshape(entry["intrinsics"], (3, 3)).astype(float)
        camera["T"] = np.reshape(entry["extrinsics"], (4, 4)).astype(float)
        for part in "image", "depth":
            if f"{part}_shape" in entry:
                fields = "shape", "dtype", "offset", "size"
                camera[part] = array(*(entry[f"{part}_{field}"] for field in fields))
        cameras.append(camera)
    proprios = {p["name"]: array(-1, p["dtype"], p["offset"], p["size"]) for p in header.get("proprios", [])}
    obs = {"timestamp": header["timestamp"], "extra": header.get("extra", {})}
    return obs | {"cameras": cameras, "proprios": proprios}
