//! What the fuzzers do with their bytes: nothing may panic, and what is understood must be said again without
//! loss. The fuzzers and the plain test `crates/chiral-proto/tests/seeds.rs` share this file.

use bytes::Bytes;
use chiral_proto::codec::msgpack::{self, TimedMessage};
use chiral_proto::error::EncodeError;
use chiral_proto::{Codec, DType, Frame, Message, Notice, Observation, Reply, Tensor, error::DecodeError};

/// Takes the bytes for a frame.
pub(crate) fn frame(data: &[u8]) {
    drop(check(Frame::from(Bytes::copy_from_slice(data))));
}

/// Takes the bytes for a frame's header, before a payload that is there already: a frame's own lengths are
/// hard to guess.
pub(crate) fn header(data: &[u8]) {
    let mut frame = (data.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(data);
    frame.resize(frame.len().next_multiple_of(64), 0);
    frame.extend((0..1024).map(|i| i as u8));
    drop(check(Frame::from(Bytes::from(frame))));
}

/// Takes the first byte for a number of cuts, as many pairs of bytes for where they are, and the rest for a
/// frame: in pieces it must say what it says in one.
pub(crate) fn segments(data: &[u8]) {
    let Some((&count, rest)) = data.split_first() else { return };
    let Some((cuts, frame)) = rest.split_at_checked(2 * usize::from(count)) else { return };
    let cuts = cuts.chunks_exact(2).map(|pair| usize::from(u16::from_le_bytes([pair[0], pair[1]])));
    let mut cuts: Vec<usize> = cuts.map(|cut| cut % (frame.len() + 1)).collect();
    cuts.sort_unstable();

    let mut rest = Bytes::copy_from_slice(frame);
    let mut pieces: Vec<Bytes> = Vec::new();
    for cut in cuts.into_iter().rev() {
        pieces.push(rest.split_off(cut));
    }
    pieces.push(rest);
    pieces.reverse();

    let whole = check(Frame::from(Bytes::copy_from_slice(frame)));
    let pieces = Codec::Protobuf.decode(Frame::from(pieces));
    match (whole, pieces) {
        (Ok(whole), Ok(pieces)) => assert_same(&whole, &pieces),
        (whole, pieces) => assert_eq!(whole.err(), pieces.err()),
    }
}

/// Takes the bytes for a frame of the msgpack wire: in pieces it must say what it says in one. That is
/// written in bytes that are read and written again as they are: only the first reading may round a camera's
/// time.
pub(crate) fn msgpack(data: &[u8]) {
    let decoded = msgpack::decode(Frame::from(Bytes::copy_from_slice(data)));
    let pieces: Vec<Bytes> = data.chunks(7).map(Bytes::copy_from_slice).collect();
    assert_eq!(format!("{:?}", msgpack::decode(Frame::from(pieces))), format!("{decoded:?}"));
    let Ok(decoded) = decoded else { return };
    view_tensors(&decoded.message);
    if decoded.message == (Message::Unknown { id: 0 }) {
        return;
    }
    let write = |decoded: &TimedMessage| {
        msgpack::encode(&decoded.message, &decoded.capture_times)
            .expect("what was decoded is encoded")
            .into_bytes()
    };
    let ours = write(&decoded);
    let again = msgpack::decode(Frame::from(ours.clone())).expect("what was encoded is decoded");
    assert_eq!(write(&again), ours);
    if let Message::Notice(_) | Message::Request { .. } = decoded.message {
        assert_eq!(format!("{again:?}"), format!("{decoded:?}"));
    }
}

/// Decodes the frame, and what is understood must come back from a frame of our own.
fn check(frame: Frame) -> Result<Message, DecodeError> {
    let message = Codec::Protobuf.decode(frame)?;
    view_tensors(&message);
    match Codec::Protobuf.encode(&message) {
        Ok(frame) => {
            let again = Codec::Protobuf.decode(frame).expect("what was encoded is decoded");
            assert_same(&message, &again);
        }
        Err(error) => {
            let unknown = matches!(message, Message::Unknown { .. });
            assert!(unknown && error == EncodeError::Unknown, "decoded, but not encoded: {error}");
        }
    }
    Ok(message)
}

/// What is written of both is the same bit for bit, NaN and all, and what is read of both is the same: only
/// the sign of a zero may be lost, since proto3 may leave out -0 as if it were 0.
fn assert_same(one: &Message, other: &Message) {
    let written = |message| Codec::Protobuf.encode(message).map(Frame::into_bytes);
    assert_eq!(written(one), written(other));
    let read = |message: &Message| format!("{message:#?}").replace("-0.0,\n", "0.0,\n");
    assert_eq!(read(one), read(other));
}

/// Reads every tensor, as an application would.
fn view_tensors(message: &Message) {
    let obs: &Observation = match message {
        Message::Reply { reply: Reply::Observation(obs) | Reply::Reset { obs, .. }, .. } => obs,
        Message::Reply { reply: Reply::Step(result), .. } => &result.obs,
        Message::Notice(Notice::Observation(obs)) => obs,
        _ => return,
    };
    for camera in &obs.cameras {
        view_tensor(&camera.image);
        camera.depth.iter().for_each(view_tensor);
    }
    for proprio in &obs.proprios {
        view_tensor(&proprio.data);
    }
}

fn view_tensor(tensor: &Tensor) {
    use ndarray::IxDyn;
    let elements = match tensor.dtype() {
        DType::U8 => tensor.view::<u8, IxDyn>().map(|view| view.len()),
        DType::I8 => tensor.view::<i8, IxDyn>().map(|view| view.len()),
        DType::U16 => tensor.view::<u16, IxDyn>().map(|view| view.len()),
        DType::I16 => tensor.view::<i16, IxDyn>().map(|view| view.len()),
        DType::U32 => tensor.view::<u32, IxDyn>().map(|view| view.len()),
        DType::I32 => tensor.view::<i32, IxDyn>().map(|view| view.len()),
        DType::U64 => tensor.view::<u64, IxDyn>().map(|view| view.len()),
        DType::I64 => tensor.view::<i64, IxDyn>().map(|view| view.len()),
        DType::F32 => tensor.view::<f32, IxDyn>().map(|view| view.len()),
        DType::F64 => tensor.view::<f64, IxDyn>().map(|view| view.len()),
        other => panic!("no decoder should know {other}"),
    };
    let elements = elements.expect("a view of the tensor's own element type, of any number of axes");
    assert_eq!(elements * tensor.dtype().size(), tensor.data().len());
}
