"""Writes frames of the legacy msgpack wire with Python's `msgpack`, from the wire's description alone.

Usage: golden_msgpack.py FRAMES SEEDS, which are crates/chiral-proto/tests/msgpack and fuzz/seeds/msgpack

Writes valid frames to the directory FRAMES. The test `msgpack` of chiral-proto decodes them and must encode
the same bytes, except for frames named `varied-...`: they encode content in the various ways in which legacy
peers do. Writes the same frames to the directory SEEDS, and invalid ones named `hostile-...`, for the fuzzers
and the same test. The content of the frames is also in msgpack.rs: keep the two files in step.
"""

import pathlib
import struct
import sys

import msgpack


def frame(header, payload=b"", **options):
    packed = header if isinstance(header, bytes) else msgpack.packb(header, **options)
    return struct.pack("<I", len(packed)) + packed + payload


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


K = [1 + 0.5 * i for i in range(9)]
T = [101 + 0.5 * i for i in range(16)]
IMAGE = bytes(range(1, 19))
DEPTH = floats(0.5, 1.0, 1.5, 0.0, 2.5, 3.0)
HEAD = bytes(range(100, 175))
JOINTS = floats(0.25, -0.5)
WRIST_TIME = 1.000000007
TIMES = {"head_cam": 123456.789012345, "wrist_cam": WRIST_TIME}


def array(prefix, shape, dtype, offset, size):
    return {
        f"{prefix}_shape": shape,
        f"{prefix}_dtype": dtype,
        f"{prefix}_offset": offset,
        f"{prefix}_size": size,
    }


def camera(name, timestamp, *arrays):
    entry = {"name": name, "timestamp": timestamp, "intrinsics": K, "extrinsics": T}
    for item in arrays:
        entry |= item
    return entry


def wrist(**changes):
    image, depth = array("image", [2, 3, 3], "uint8", 0, 18), array("depth", [2, 3], "float32", 18, 24)
    return camera("wrist_cam", WRIST_TIME, image, depth) | changes


def head(offset, **changes):
    return camera("head_cam", TIMES["head_cam"], array("image", [5, 5, 3], "uint8", offset, 75)) | changes


def observed(kind, **more):
    cameras = [wrist(), head(42)]
    proprios = [
        {"name": "joint_pos", "dtype": "float32", "offset": 117, "size": 8},
        {"name": "nothing", "dtype": "float32", "offset": 0, "size": 0},
    ]
    return {
        "type": kind,
        "timestamp": 12.1,
        "extra": {"phase": "approach"},
        "cameras": cameras,
        "proprios": proprios,
    } | more


def observation(kind, **more):
    return frame(observed(kind, **more), IMAGE + DEPTH + HEAD + JOINTS)


def of_cameras(*cameras, payload=IMAGE + DEPTH, **more):
    return frame({"type": "obs_response", "timestamp": 12.1, "cameras": list(cameras)} | more, payload)


def action(kind, shape, *values, **more):
    return frame({"type": kind, "shape": shape, "dtype": "float32"} | more, floats(*values))


def backwards(value):
    """Returns the value with the keys of every map in reverse order."""
    if isinstance(value, dict):
        return {key: backwards(inner) for key, inner in reversed(value.items())}
    return [backwards(inner) for inner in value] if isinstance(value, list) else value


def canonical():
    values = {
        "": "",
        "bool": True,
        "bytes": b"\0\xff",
        "float": 1.7976931348623157e308,
        "int": -3,
        "ints": [0, 127, 128, 2**16, 2**32, 2**63 - 1, -32, -33, -129, -(2**15) - 1, -(2**63)],
        "list": [None, False, []],
        "map": {"inner": {}},
        "null": None,
        "str": "größer als λ",
    }
    yield "metadata", frame({"type": "metadata"})
    yield "reset", frame({"type": "reset"})
    yield "obs_request", frame({"type": "obs_request"})
    yield "apply_action", action("apply_action", [3], 0.5, -0.25, 3.0, obs_timestamps=TIMES)
    yield "apply_action-rows", action(
        "apply_action", [2, 2], 0.5, -0.25, 3.0, 4.0, obs_timestamps={"nanos": 1_700_000_000_123_456_789}
    )
    yield "action", action("action", [1, 2], 0.5, -0.25, obs_timestamps=TIMES)
    yield "metadata_response", frame({"type": "metadata_response", "data": values})
    yield "reset_response", observation("reset_response", info={"seed": 0})
    yield "obs_response", observation("obs_response")
    yield "step_response", observation(
        "step_response", reward=-1.25, terminated=True, truncated=False, info={"success": True}
    )


def varied():
    bare = array("image", [2, 3, 3], "uint8", 0, 18)
    whole = {"intrinsics": list(range(9)), "extrinsics": [0.5] * 15 + [1]}
    singles = {
        "type": "step_response",
        "timestamp": 7,
        "cameras": [{"name": "a"} | whole | bare],
        "reward": 0.1,
    }
    singles |= {"terminated": False, "truncated": True, "info": {"x": 0.5}}
    yield "varied-backwards", frame(backwards(observed("obs_response")), IMAGE + DEPTH + HEAD + JOINTS)
    yield "varied-singles", frame(backwards(singles), IMAGE, use_single_float=True)
    nil = dict.fromkeys(["depth_shape", "depth_dtype", "depth_offset", "depth_size"])
    yield "varied-nil", of_cameras(
        {"name": "a", "timestamp": None} | whole | bare | nil, payload=IMAGE, extra=None, proprios=None
    )
    yield "varied-nanos", of_cameras(
        wrist(timestamp=1_700_000_000_123_456_789), head(42, timestamp=1.5e18), payload=IMAGE + DEPTH + HEAD
    )
    yield "varied-unix", of_cameras(
        wrist(timestamp=1_700_000_000), payload=IMAGE + DEPTH + b"more than the header says"
    )
    yield "varied-one_action", action("action", [2], 0.5, -0.25)
    yield "varied-chunk", action("action", [2, 1], 0.5, -0.25, obs_timestamps={"a": 3}, newer=[1])
    values = {
        "big": 2**64 - 1,
        "ext": msgpack.ExtType(5, b"five"),
        "keys": {None: "nil", 7: "int", 0.5: "float", True: "bool"},
    }
    yield "varied-values", frame({"type": "metadata_response", "data": values})
    raw = b"\x82\xa4type\xb1metadata_response\xa4data\x81\xa3raw\xa2\xff\xfe"
    yield "varied-raw", frame(raw)
    yield "varied-twice", frame(b"\x83\xa4type\xa5reset\xa4type\xa8metadata\xa1x\xcf\0\0\0\0\0\0\0\1")
    yield "varied-unknown", frame({"type": "levitate"})


def nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


def hostile():
    deep = {"type": "metadata_response", "data": {}}
    yield "empty", b""
    yield "short", b"\x01\0"
    yield "header_len", struct.pack("<I", 2**32 - 1) + msgpack.packb({"type": "reset"})
    yield "no_header", frame(b"")
    yield "no_map", frame([1, 2])
    yield "two_maps", frame(msgpack.packb({"type": "reset"}) * 2)
    yield "no_type", frame({"kind": "reset"})
    yield "number_type", frame({"type": 3})
    yield "reserved", frame(b"\x81\xa4type\xc1")
    yield "list_key", frame(b"\x81\x90\xa4type")
    yield "deep_list", frame(deep | {"data": {"x": nested(1000, lambda inner: [inner])}})
    yield "deep_map", frame(deep | {"data": nested(300, lambda inner: {"x": inner})})
    yield "deep_keys", frame(b"\x81" * 1000)
    yield "too_deep_by_one", frame(deep | {"data": {"x": nested(24, lambda inner: [inner])}})
    begin = b"\x83\xa4type\xacobs_response\xa9timestamp\0\xa7cameras"
    yield "billion_cameras", frame(begin + b"\xdd" + struct.pack(">I", 10**9) + b"\x80" * 50)
    yield "billion_fields", frame(b"\xdf" + struct.pack(">I", 10**9) + b"\xa4type")
    yield "long_text", frame(b"\x81\xa4type\xdb" + struct.pack(">I", 2**32 - 1) + b"reset")
    yield "long_bytes", frame(b"\x81\xa4type\xc6" + struct.pack(">I", 2**31) + b"reset")
    yield "no_timestamp", frame({"type": "obs_response", "cameras": []})
    yield "no_cameras", frame({"type": "obs_response", "timestamp": 0.5})
    yield "camera_is_text", of_cameras("wrist_cam")
    yield "far_offset", of_cameras(wrist(image_offset=1000))
    yield "far_end", of_cameras(wrist(depth_offset=19))
    yield "wrapped_offset", of_cameras(wrist(image_offset=2**63 - 1))
    yield "huge_offset", of_cameras(wrist(image_offset=2**64 - 1))
    yield "negative_offset", of_cameras(wrist(image_offset=-1))
    yield "overflowing_shape", of_cameras(wrist(image_shape=[2**62, 4, 4]))
    yield "overflowing_empty", of_cameras(wrist(image_shape=[2**62, 0, 4], image_size=0))
    yield "negative_shape", of_cameras(wrist(image_shape=[-2, -3, 3]))
    yield "large_image", of_cameras(wrist(image_shape=[10**6, 10**6, 3], image_size=3 * 10**12))
    yield "wrong_size", of_cameras(wrist(image_size=17))
    yield "two_axes", of_cameras(wrist(image_shape=[6, 3]))
    yield "image_dtype", of_cameras(wrist(image_dtype="complex64"))
    yield "depth_dtype", of_cameras(wrist(depth_dtype="int32"))
    yield "depth_shape", of_cameras(wrist(depth_shape=[3, 2]))
    yield "half_depth", of_cameras(wrist(depth_offset=None))
    yield "overlap", of_cameras(wrist(), head(0), payload=bytes(200))
    yield "eight_numbers", of_cameras(wrist(intrinsics=K[:8]))
    yield "text_numbers", of_cameras(wrist(extrinsics=["1"] * 16))
    yield "text_time", of_cameras(wrist(timestamp="now"))
    yield "odd_proprio", of_cameras(proprios=[{"name": "a", "dtype": "float32", "offset": 0, "size": 7}])
    yield "double_proprio", of_cameras(proprios=[{"name": "a", "dtype": "float64", "offset": 0, "size": 8}])
    yield "short_action", action("action", [2, 2], 1.0, 2.0, 3.0)
    yield "long_action", action("apply_action", [2], 1.0, 2.0, 3.0)
    yield "cube_action", action("apply_action", [1, 1, 1], 1.0)
    yield "double_action", action("action", [1], 1.0, dtype="float64")
    yield "wide_action", action("action", [2**61, 2**61], 1.0)
    yield "text_times", action("apply_action", [1], 1.0, obs_timestamps={"a": "now"})
    yield "no_end", observation("step_response", reward=0.5, terminated=1, truncated=False)


def main(frames, seeds):
    valid = dict(canonical()) | dict(varied())
    invalid = {f"hostile-{name}": content for name, content in hostile()}
    for directory, files in (frames, valid), (seeds, valid | invalid):
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("*.bin"):
            stale.unlink()
        for name, content in files.items():
            (directory / f"{name}.bin").write_bytes(content)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
