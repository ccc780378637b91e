//! Images in observations: encoded ones, and depth of another size.
#![allow(clippy::unwrap_used, reason = "test helpers may panic")]

use std::sync::Arc;

use bytes::Bytes;
use chiral_proto::{
    Camera, Codec, DType, Encoding, Frame, Image, Message, Notice, Observation, Tensor, error::DecodeError,
};
use nalgebra::Matrix3;

fn encode(camera: Camera) -> Bytes {
    let obs = Observation { cameras: vec![Arc::new(camera)], ..Observation::default() };
    Codec::Protobuf.encode(&Message::Notice(Notice::Observation(Arc::new(obs)))).unwrap().into_bytes()
}

fn decode(frame: Bytes) -> Result<Camera, DecodeError> {
    match Codec::Protobuf.decode(Frame::from(frame))? {
        Message::Notice(Notice::Observation(obs)) => Ok(Camera::clone(&obs.cameras[0])),
        other => panic!("expected an observation, found {other:?}"),
    }
}

fn tensor(dtype: DType, shape: &[usize]) -> Tensor {
    let len = shape.iter().product::<usize>() * dtype.size();
    Tensor::new(dtype, shape, vec![7; len]).unwrap()
}

/// A camera whose depth has this shape and type.
fn with_depth(dtype: DType, shape: &[usize], depth_intrinsics: Option<Matrix3<f64>>) -> Camera {
    let depth = Some(tensor(dtype, shape).into());
    Camera { depth, depth_intrinsics, ..Camera::new("a", tensor(DType::U8, &[4, 6, 3])) }
}

#[test]
fn images_are_slices_of_the_frame_and_their_pixels_are_not_copied() {
    let encoded = Image::new(Encoding(7), DType::U8, [480, 640, 3], Bytes::from_static(b"picture")).unwrap();
    let depth = Some(tensor(DType::F32, &[480, 640]).into());
    let frame = encode(Camera { depth, ..Camera::new("a", encoded) });
    let camera = decode(frame.clone()).unwrap();
    let depth = camera.depth.unwrap();
    let place = |data: &Bytes| data.as_ptr() as usize - frame.as_ptr() as usize;
    assert_eq!(place(depth.data()), frame.len() - depth.data().len());
    assert_eq!(place(camera.image.data()), place(depth.data()) - 64, "padded");
    assert_eq!(depth.pixels().unwrap().data().as_ptr(), depth.data().as_ptr());
    assert_eq!(depth.clone().into_pixels().unwrap().data().as_ptr(), depth.data().as_ptr());
}

#[test]
fn depth_of_another_size_demands_a_k_of_its_own() {
    let k = Matrix3::new(2.0, 0.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0, 1.0);
    for camera in [
        with_depth(DType::F32, &[2, 3], Some(k)),
        with_depth(DType::F32, &[8, 12], Some(k)),
        with_depth(DType::F32, &[4, 6], None),
    ] {
        assert_eq!(decode(encode(camera.clone())).unwrap(), camera);
    }
    assert_eq!(*with_depth(DType::F32, &[2, 3], Some(k)).intrinsics_of_depth(), k);
    assert_eq!(*with_depth(DType::F32, &[4, 6], None).intrinsics_of_depth(), Matrix3::identity());
    let without = with_depth(DType::F32, &[2, 3], Some(k)).without_depth();
    assert_eq!((without.depth, without.depth_intrinsics), (None, None));

    let check = |camera, expected: &str| {
        let error = decode(encode(camera)).unwrap_err();
        assert_eq!(error.to_string(), format!("observation.cameras[0].{expected}"));
    };
    check(
        with_depth(DType::F32, &[2, 3], None),
        "depth_intrinsics: expected 9 values, since depth of [2, 3] is not of the image's size [4, 6], found none",
    );
    check(with_depth(DType::F32, &[2, 3, 1], Some(k)), "depth.shape: expected 2 values, found 3");
    check(with_depth(DType::U16, &[4, 6], None), "depth.dtype: expected float32, found uint16");
}

#[test]
fn the_data_of_an_encoded_image_lies_within_the_payload() {
    let encoded = Image::new(Encoding(7), DType::U8, [1, 1, 3], vec![7; 100]).unwrap();
    let frame = encode(Camera::new("a", encoded));
    let error = decode(frame.slice(..frame.len() - 1)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "observation.cameras[0].image.offset: expected a range within the 99 bytes of payload, \
         found 100 bytes at 0"
    );
    let huge = Image::new(Encoding(7), DType::U8, [usize::MAX, 2, 3], vec![7]).unwrap();
    let error = decode(encode(Camera::new("a", huge))).unwrap_err();
    assert_eq!(error.field, "observation.cameras[0].image.shape");
}
