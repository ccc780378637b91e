//! The messages of the test frames: `golden` has those of the golden frames, `python` those of the frames
//! that `golden.py` writes, with other values. A frame is named after its kind in the schema's `Header`;
//! variants of a kind add a suffix after a hyphen.

pub(crate) mod golden;
pub(crate) mod python;

use std::sync::Arc;

use chiral_proto::{
    Camera, DType, Image, Message, Notice, Proprio, Reply, Request, Tensor, Timestamp, tensor::Element,
};
use nalgebra::{Matrix3, Matrix4};

pub(crate) type Named = (&'static str, Message);

pub(crate) fn request(id: u64, request: Request) -> Message {
    Message::Request { id, request }
}

pub(crate) fn reply(id: u64, reply: Reply) -> Message {
    Message::Reply { id, reply }
}

pub(crate) fn notice(notice: Notice) -> Message {
    Message::Notice(notice)
}

pub(crate) fn strings<const N: usize>(items: [&str; N]) -> Vec<String> {
    items.map(str::to_owned).to_vec()
}

pub(crate) fn tensor<T: Element>(shape: &[usize], values: &[T]) -> Tensor {
    Tensor::from_vec(shape, values.to_vec()).unwrap()
}

/// A tensor whose bytes count up from `first`.
pub(crate) fn counting(dtype: DType, shape: &[usize], first: u8) -> Tensor {
    let len = shape.iter().product::<usize>() * dtype.size();
    let bytes: Vec<u8> = (0..len).map(|i| first.wrapping_add(i as u8)).collect();
    Tensor::new(dtype, shape, bytes).unwrap()
}

/// A camera whose K counts up from 1 and whose T counts up from 101, row by row, in steps of `step`.
pub(crate) fn camera(
    name: &str,
    seq: u64,
    captured_at: i64,
    step: f64,
    image: Tensor,
    depth: Option<Tensor>,
) -> Arc<Camera> {
    Arc::new(Camera {
        seq,
        captured_at: Timestamp(captured_at),
        depth: depth.map(Image::from),
        intrinsics: Matrix3::from_fn(|row, column| 1.0 + step * (3 * row + column) as f64),
        extrinsics: Matrix4::from_fn(|row, column| 101.0 + step * (4 * row + column) as f64),
        ..Camera::new(name, image)
    })
}

pub(crate) fn proprio(name: &str, captured_at: i64, values: &[f32]) -> Arc<Proprio> {
    Arc::new(Proprio {
        name: name.into(),
        captured_at: Timestamp(captured_at),
        data: tensor(&[values.len()], values),
    })
}
