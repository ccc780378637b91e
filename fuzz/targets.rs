//! The functions of the fuzz targets. No input may cause a panic, and every message that is decoded must
//! survive a round trip. The fuzzers and the plain test `crates/chiral-proto/tests/seeds.rs` share this file.

use bytes::Bytes;
use chiral_proto::codec::msgpack::{self, TimedMessage};
use chiral_proto::error::EncodeError;
use chiral_proto::{
    Codec, DType, Encoding, Frame, Message, Notice, Observation, Reply, Tensor, error::DecodeError,
};

/// Decodes the bytes as a frame.
pub(crate) fn frame(data: &[u8]) {
    drop(check(Frame::from(Bytes::copy_from_slice(data))));
}

/// Decodes the bytes as the header of a frame with a valid prefix and a payload, since a fuzzer rarely
/// guesses the lengths of a frame.
pub(crate) fn header(data: &[u8]) {
    let mut frame = (data.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(data);
    frame.resize(frame.len().next_multiple_of(64), 0);
    frame.extend((0..1024).map(|i| i as u8));
    drop(check(Frame::from(Bytes::from(frame))));
}

/// Decodes a frame in one segment and in several, which must give the same message. The first byte is the
/// number of cuts, followed by a pair of bytes for the position of each cut, followed by the frame.
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

/// Decodes the bytes as a frame of the legacy msgpack wire, in one segment and in several, which must give
/// the same message. Encoding that message, decoding it and encoding it again must give the same bytes: only
/// the first decoding may round the capture time of a camera.
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
            .expect("a decoded message can be encoded")
            .into_bytes()
    };
    let encoded = write(&decoded);
    let again = msgpack::decode(Frame::from(encoded.clone())).expect("an encoded message can be decoded");
    assert_eq!(write(&again), encoded);
    if let Message::Notice(_) | Message::Request { .. } = decoded.message {
        // Whether one row is a single action is written as each generation expects it.
        let text =
            |message: &TimedMessage| format!("{message:?}").replace("is_single: true", "is_single: false");
        assert_eq!(text(&again), text(&decoded));
    }
}

/// Decodes the frame. A decoded message must survive encoding and decoding.
fn check(frame: Frame) -> Result<Message, DecodeError> {
    let message = Codec::Protobuf.decode(frame)?;
    view_tensors(&message);
    match Codec::Protobuf.encode(&message) {
        Ok(frame) => {
            let again = Codec::Protobuf.decode(frame).expect("an encoded message can be decoded");
            assert_same(&message, &again);
        }
        Err(error) => {
            let unknown = matches!(message, Message::Unknown { .. });
            assert!(unknown && error == EncodeError::Unknown, "a decoded message cannot be encoded: {error}");
        }
    }
    Ok(message)
}

/// Asserts that both messages encode to the same bytes, NaNs included, and have the same content, except for
/// the sign of zeros: proto3 may omit -0 like 0.
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
        for image in [Some(&camera.image), camera.depth.as_ref()].into_iter().flatten() {
            match image.pixels() {
                Ok(pixels) => view_tensor(pixels),
                Err(error) => assert_ne!(image.encoding(), Encoding::RAW, "{error}"),
            }
        }
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
        other => panic!("expected a known element type, found {other}"),
    };
    let elements = elements.expect("the view has the tensor's element type and any number of axes");
    assert_eq!(elements * tensor.dtype().size(), tensor.data().len());
}
