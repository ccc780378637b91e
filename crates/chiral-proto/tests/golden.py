"""Checks the golden frames in Python, with nothing but the descriptor set of the schema.

Usage: golden.py SCHEMA GOLDEN FRAMES

Reads every frame in the directory GOLDEN and checks that it has no field that is unknown to the schema and
that its tensors lie where they should. Then encodes frames of every kind from scratch into the directory
FRAMES, which the test `golden` of chiral-proto reads. The messages of these frames are also in
frames/python.rs: keep the two files in step.
"""

import pathlib
import struct
import sys

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, unknown_fields

ALIGNMENT = 64
ELEMENT_SIZE = {
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "U32": 4,
    "I32": 4,
    "U64": 8,
    "I64": 8,
    "F32": 4,
    "F64": 8,
}


def load(schema):
    """Returns the message classes of the schema by their short names."""
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(schema.read_bytes())
    for file in files.file:
        pool.Add(file)
    names = [(file.package, message.name) for file in files.file for message in file.message_type]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for package, name in names
    }


def padded(length):
    return -(-length // ALIGNMENT) * ALIGNMENT


# ---- Decoding ----------------------------------------------------------------------------------------------


def split(frame):
    """Splits a frame into header and payload. The first comment of the schema specifies the layout."""
    (length,) = struct.unpack_from("<I", frame)
    end = 4 + length
    assert end <= len(frame), f"header_len: expected at most {len(frame) - 4}, found {length}"
    begin = padded(end)
    assert len(frame) >= begin, f"expected padding to {begin} bytes, found a frame of {len(frame)}"
    assert not any(frame[end:begin]), "expected zeros as padding after the header"
    return frame[4:end], frame[begin:]


def messages(message):
    """Yields the message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            values = value.values()
        else:
            values = value if field.is_repeated else [value]
        for inner in values:
            yield from messages(inner)


def check_tensors(header, payload):
    end = 0
    for tensor in messages(header):
        if tensor.DESCRIPTOR.name != "Tensor":
            continue
        name = tensor.DESCRIPTOR.fields_by_name["dtype"].enum_type.values_by_number[tensor.dtype].name
        size = ELEMENT_SIZE[name.removeprefix("D_TYPE_")]
        for axis in tensor.shape:
            size *= axis
        assert tensor.size == size, f"expected a tensor of {size} bytes, found {tensor.size}: {tensor}"
        if size == 0:
            assert tensor.offset == 0, f"expected an empty tensor at offset 0, found {tensor.offset}"
            continue
        assert (
            tensor.offset % ALIGNMENT == 0
        ), f"expected an offset that is a multiple of {ALIGNMENT}, found {tensor.offset}"
        assert tensor.offset >= end, f"expected an offset of at least {end}, found {tensor.offset}"
        assert not any(payload[end : tensor.offset]), "expected zeros as padding between tensors"
        end = tensor.offset + size
    assert end == len(payload), f"expected a payload of {end} bytes, found {len(payload)}"


def check_golden(types, path):
    header_bytes, payload = split(path.read_bytes())
    header = types["Header"].FromString(header_bytes)
    for message in messages(header):
        unknown = unknown_fields.UnknownFieldSet(message)
        assert len(unknown) == 0, f"{message.DESCRIPTOR.name} has fields that are not in the schema"
    again = header.SerializeToString(deterministic=True)
    assert types["Header"].FromString(again) == header, "the header changed in a round trip"
    kind = header.WhichOneof("kind")
    assert kind == path.stem.split("-")[0], f"expected the kind in the file's name, found {kind}"
    check_tensors(header, payload)
    return kind, header, payload


def floats(payload, tensor):
    return list(struct.unpack_from(f"<{tensor.size // 4}f", payload, tensor.offset))


def check_known_values(golden):
    """Checks a few values by field name, in case the encoder and the decoder agree on a wrong field."""
    hello = golden["hello"][0].hello
    assert (hello.protocol, hello.role, hello.client_name, hello.auth) == (
        1,
        1,
        "Ada's laptop",
        b"secret",
    ), hello
    assert golden["unsubscribe"][0].id == 2**64 - 1
    assert golden["reset"][0].reset.HasField("seed") and golden["reset"][0].reset.seed == 0
    assert not golden["reset-plain"][0].reset.HasField("seed")

    header, payload = golden["step"]
    assert list(header.step.actions.shape) == [2, 2], header
    assert floats(payload, header.step.actions)[:3] == [0.5, -0.5, 1.0]

    header, payload = golden["observation"]
    wrist, head = header.observation.cameras
    assert (wrist.name, wrist.seq, wrist.captured_at_ns, head.captured_at_ns) == (
        "wrist_cam",
        17,
        1_000_000_007,
        -5,
    ), header
    assert list(wrist.intrinsics) == [1 + 0.5 * i for i in range(9)], "K is not row-major"
    assert list(wrist.extrinsics) == [101 + 0.5 * i for i in range(16)], "T is not row-major"
    assert payload[wrist.image.offset :][:18] == bytes(range(1, 19))
    assert floats(payload, wrist.depth)[:3] == [0.5, 1.0, 1.5]
    assert not head.HasField("depth")
    assert floats(payload, header.observation.proprios[0].data) == [0.25, -0.5]
    assert header.observation.extra.entries["phase"].str == "approach"

    entries = golden["metadata"][0].metadata.data.entries
    assert {key: value.WhichOneof("kind") for key, value in entries.items() if key} == {
        key: key for key in entries if key
    }
    assert [item.WhichOneof("kind") for item in entries["list"].list.items] == ["null", "bool", "int", "list"]

    small, own = golden["observation-stale"][0].observation.cameras
    assert small.is_stale and own.is_stale and not wrist.is_stale
    assert list(small.depth.shape) == [2, 3] and list(own.depth.shape) == [4, 6]
    assert list(small.depth_intrinsics) == [0.5 + 0.25 * i for i in range(9)], "the depth's K is not row-major"
    (camera,) = golden["welcome-small_depth"][0].welcome.cameras
    assert list(camera.depth_shape) == [240, 320] and camera.has_depth
    assert not golden["welcome"][0].welcome.cameras[0].depth_shape, "the image's size is left out"

    spec = golden["welcome"][0].welcome.action_spec
    assert (spec.dimension, list(spec.names), list(spec.low), spec.control_hz) == (
        2,
        ["shoulder", "elbow"],
        [-2.5, -1.5],
        20.0,
    ), spec
    error = golden["error"][0].error
    assert (error.code, error.field, error.action_seq) == (8, "action.episode", 300), error
    pong = golden["pong"][0].pong
    assert (pong.t1_ns, pong.t2_ns, pong.t3_ns) == (-1, 2_000_000_000, 2**63 - 1), pong


# ---- Encoding ----------------------------------------------------------------------------------------------


class Payload:
    """Lays out tensors while their header is built."""

    def __init__(self):
        self.bytes = bytearray()

    def tensor(self, dtype, form, shape, values):
        self.bytes += bytes(padded(len(self.bytes)) - len(self.bytes))
        data = struct.pack(f"<{len(values)}{form}", *values)
        offset = len(self.bytes)
        self.bytes += data
        return {"dtype": dtype, "shape": shape, "offset": offset, "size": len(data)}

    def f32(self, shape, values):
        return self.tensor("D_TYPE_F32", "f", shape, values)

    def u8(self, shape, values):
        return self.tensor("D_TYPE_U8", "B", shape, values)


def frame(header, payload):
    head = struct.pack("<I", len(header)) + header
    return head + bytes(padded(len(head)) - len(head)) + bytes(payload.bytes)


def varint_field(number, value):
    """Encodes a varint field whose number is not in the schema."""
    encoded = bytearray()
    for part in (number << 3, value):
        while part > 0x7F:
            encoded.append(part & 0x7F | 0x80)
            part >>= 7
        encoded.append(part)
    return bytes(encoded)


def value_map(types, **entries):
    return types["ValueMap"](entries={key: types["Value"](**value) for key, value in entries.items()})


def observation(types, payload):
    camera = {
        "name": "a",
        "seq": 3,
        "captured_at_ns": -77,
        "image": payload.u8([1, 2, 3], [10, 20, 30, 40, 50, 60]),
        "depth": payload.f32([1, 2], [0.5, 4.0]),
        "intrinsics": [1.0 + 2.0 * i for i in range(9)],
        "extrinsics": [101.0 + 2.0 * i for i in range(16)],
    }
    coil = {"name": "coil", "captured_at_ns": 88, "data": payload.f32([3], [1.0, 2.0, 4.0])}
    extra = value_map(types, note={"str": "hi"})
    return types["Observation"](
        session=5, episode=6, seq=8, timestamp=99.5, cameras=[camera], proprios=[coil], extra=extra
    )


def welcome():
    spec = {
        "dimension": 2,
        "names": ["left", "right"],
        "low": [-1.0, -2.0],
        "high": [1.0, 2.0],
        "unit": "m/s",
        "meaning": "ACTION_MEANING_END_EFFECTOR_DELTA",
        "control_hz": 50.0,
    }
    return {
        "protocol": 1,
        "software": "python",
        "session": 5,
        "episode": 6,
        "controller": "day shift",
        "robot_name": "snake",
        "cameras": [{"name": "a", "image_shape": [4, 5, 6], "image_dtype": "D_TYPE_I16", "has_depth": True}],
        "proprios": [{"name": "coil", "size": 3, "unit": "N m"}],
        "action_spec": spec,
        "attach_token": bytes([7 + 2] * 16),
    }


def metadata(types):
    newer = types["Value"].FromString(varint_field(100, 1))
    assert newer.WhichOneof("kind") is None
    items = types["ValueList"](items=[types["Value"](int=0), types["Value"](str="x")])
    data = value_map(
        types,
        bool={"bool": False},
        bytes={"bytes": b"\xfe"},
        float={"float": 1.5},
        int={"int": 2**63 - 1},
        list={"list": items},
        map={"map": value_map(types, null={"null": types["Null"]()})},
        null={"null": types["Null"]()},
        str={"str": "λ"},
    )
    data.entries["newer"].CopyFrom(newer)
    return types["Metadata"](data=data)


def known_frames(types):
    """Yields frames of every kind: name, header, payload."""

    def simple(name, id=0, **kind):
        return name, types["Header"](id=id, **kind), Payload()

    hello = {
        "protocol": 1,
        "software": "python",
        "role": "ROLE_OBSERVER",
        "client_name": "schlängel",
        "auth": b"\0\1\2",
        "attach_token": bytes([7] * 16),
    }
    again = value_map(types, why={"str": "again"})
    yield simple("hello", 11, hello=hello)
    yield simple("get_metadata", 12, get_metadata={})
    yield simple("reset", 13, reset={"seed": 2**64 - 1, "options": again})
    yield simple("reset-plain", 13, reset={})
    yield simple("get_obs", 14, get_obs={})
    yield simple("subscribe", 16, subscribe={"hz": 12.5, "cameras": ["a"], "depth": True, "window": 3})
    yield simple("unsubscribe", 17, unsubscribe={})
    yield simple("welcome", 11, welcome=welcome())
    yield simple("metadata", 12, metadata=metadata(types))
    yield simple("subscribed", 16, subscribed={"hz": 10.0, "cameras": ["a"]})
    yield simple("stream_end", 17, stream_end={"reason": "asked"})
    yield simple("credit", credit={"received": 9, "window": 4})
    yield simple("ping", ping={"t1_ns": -123})
    yield simple("pong", pong={"t1_ns": -(2**63), "t2_ns": 0, "t3_ns": 456})
    yield simple("goodbye", goodbye={"reason": "bye"})
    yield simple("actions_dropped", actions_dropped={"late": 3, "superseded": 4, "accepted": 5})
    refused = {
        "code": "CODE_QUEUE_FULL",
        "text": "16 rows wait",
        "field": "action",
        "retryable": True,
        "action_seq": 7,
    }
    yield simple("error", error=refused)

    payload = Payload()
    actions = payload.f32([2, 3], [1.0, 2.0, 3.0, -1.0, -2.0, -3.0])
    yield "step", types["Header"](id=15, step={"session": 5, "episode": 6, "actions": actions}), payload
    payload = Payload()
    action = {
        "session": 5,
        "episode": 6,
        "seq": 7,
        "actions": payload.f32([1, 2], [0.25, 0.75]),
        "observation_seq": 8,
    }
    yield "action", types["Header"](action=action), payload
    payload = Payload()
    yield "observation", types["Header"](id=14, observation=observation(types, payload)), payload
    payload = Payload()
    result = types["ResetResult"](observation=observation(types, payload))
    yield "reset_result", types["Header"](id=13, reset_result=result), payload
    payload = Payload()
    info = value_map(types, rows={"int": 2})
    result = types["StepResult"](
        observation=observation(types, payload), reward=0.5, truncated=True, info=info
    )
    yield "step_result", types["Header"](id=15, step_result=result), payload


def newer_frames(types):
    """Yields frames that a later version may send: name, header bytes, payload."""
    # A field of Credit and a field of Header that do not exist yet.
    credit = types["Credit"](received=9, window=4).SerializeToString() + varint_field(99, 5)
    newer = types["Header"](credit=types["Credit"].FromString(credit)).SerializeToString()
    yield "credit-unknown_fields", newer + varint_field(9, 2**63), Payload()
    error = types["Header"](error={"code": 4242, "text": "new"}).SerializeToString()
    yield "error-unknown_code", error, Payload()
    # An encoding of images that does not exist yet. Its data has a size of its own.
    payload = Payload()
    picture = payload.tensor("D_TYPE_U8", "B", [480, 640, 3], b"picture")
    obs = observation(types, payload)
    # The proprioception follows in the payload; the raw image and depth that precede it are not referred to.
    obs.cameras[0].image.CopyFrom(types["Tensor"](encoding=4242, **picture))
    obs.cameras[0].depth.CopyFrom(types["Tensor"](encoding=4242, dtype="D_TYPE_F32", shape=[480, 640]))
    yield "observation-unknown_encoding", types["Header"](observation=obs).SerializeToString(), payload
    # A kind that does not exist yet: field 200 of Header, an empty message.
    kind = b"\xc2\x0c\x00"
    yield "unknown_kind", types["Header"](id=77).SerializeToString() + kind, Payload()
    yield "unknown_kind-notice", kind, Payload()


def main(schema, golden, frames):
    types = load(schema)
    kinds = {field.name for field in types["Header"].DESCRIPTOR.oneofs_by_name["kind"].fields}

    read = {}
    for path in sorted(golden.glob("*.bin")):
        try:
            kind, *read[path.stem] = check_golden(types, path)
        except Exception as error:
            raise SystemExit(f"{path.name}: {error!r}") from error
    missing = kinds - {name.split("-")[0] for name in read}
    assert not missing, f"kinds without a golden frame: {missing}"
    check_known_values(read)

    written = {}
    for name, header, payload in known_frames(types):
        check_tensors(header, bytes(payload.bytes))
        written[name] = frame(header.SerializeToString(), payload)
    missing = kinds - {name.split("-")[0] for name in written}
    assert not missing, f"kinds that this script does not write: {missing}"
    for name, header, payload in newer_frames(types):
        written[name] = frame(header, payload)
    for name, content in written.items():
        (frames / f"{name}.bin").write_bytes(content)
    print(
        f"Python decoded {len(read)} golden frames and encoded {len(written)} frames of {len(kinds)} kinds"
    )


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
