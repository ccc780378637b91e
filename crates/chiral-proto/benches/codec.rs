//! Benchmarks of encoding and decoding observations and actions, and of the buffer pool: what every frame
//! costs on any transport. Run with `cargo bench -p chiral-proto`.

use std::hint::black_box;
use std::sync::Arc;

use chiral_proto::bytes::Bytes;
use chiral_proto::message::ActionMessage;
use chiral_proto::pool::Pool;
use chiral_proto::{
    ActionChunk, Camera, Codec, DType, Frame, Message, Notice, Observation, Proprio, Tensor, Timestamp,
};
use criterion::{Criterion, criterion_group, criterion_main};

fn camera(i: usize) -> Arc<Camera> {
    let [height, width] = [480, 640];
    let tensor = |dtype: DType, shape: &[usize]| {
        let len = shape.iter().product::<usize>() * dtype.size();
        Tensor::new(dtype, shape, Bytes::from(vec![7; len])).expect("the length matches the shape")
    };
    Arc::new(Camera {
        seq: 1,
        captured_at: Timestamp(1),
        depth: Some(tensor(DType::F32, &[height, width]).into()),
        ..Camera::new(format!("cam_{i}"), tensor(DType::U8, &[height, width, 3]))
    })
}

fn observation(cameras: usize) -> Message {
    let data = Tensor::from_vec([7], vec![0.5_f32; 7]).expect("the length matches the shape");
    let proprio = Arc::new(Proprio { name: "joint_pos".into(), captured_at: Timestamp(1), data });
    let cameras = (0..cameras).map(camera).collect();
    Message::Notice(Notice::Observation(Arc::new(Observation {
        cameras,
        proprios: vec![proprio],
        ..Observation::default()
    })))
}

fn action() -> Message {
    let actions = ActionChunk::from([0.25_f32; 7]);
    Message::Notice(Notice::Action(ActionMessage {
        session: 7,
        episode: 1,
        seq: 1,
        actions,
        observation_seq: 42,
        sent_at: Some(Timestamp(1_700_000_000_000)),
        ..ActionMessage::default()
    }))
}

fn codec(criterion: &mut Criterion) {
    let messages = [("8 cameras", observation(8)), ("no camera", observation(0)), ("action", action())];
    for (name, message) in &messages {
        let frame = Codec::Protobuf.encode(message).expect("protobuf encodes every message");
        let whole = frame.into_bytes();
        criterion.bench_function(&format!("encode {name}"), |bencher| {
            bencher.iter(|| Codec::Protobuf.encode(black_box(message)));
        });
        criterion.bench_function(&format!("decode {name}"), |bencher| {
            bencher.iter(|| Codec::Protobuf.decode(Frame::from(black_box(&whole).clone())));
        });
    }
}

fn pool(criterion: &mut Criterion) {
    let pool = Pool::new(4);
    criterion.bench_function("take and return 17 MB", |bencher| {
        bencher.iter(|| drop(black_box(pool.take(17_203_200))))
    });
}

criterion_group!(benches, codec, pool);
criterion_main!(benches);
