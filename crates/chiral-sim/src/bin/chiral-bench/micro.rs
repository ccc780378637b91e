//! What runs within one process: a copy of an observation's bytes, a snapshot, encoding and decoding.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use chiral_proto::{Codec, Frame, Message, Notice};

use crate::report::{Report, percentile};
use crate::workload::{Prepared, Workload};

const REPEATS: usize = 200;

pub(crate) fn run(rounds: usize) -> Result<()> {
    for workload in [Workload::L, Workload::M, Workload::S] {
        let report = Report::new(workload.to_string());
        let mut prepared = Prepared::new(workload)?;
        prepared.prepare()?;
        let obs = prepared.sensors.snapshot().context("a sensor has not published yet")?;
        let message = Message::Notice(Notice::Observation(Arc::new(obs)));
        let frame = Codec::Protobuf.encode(&message)?;
        let whole = frame.clone().into_bytes();
        let mut copy = vec![1_u8; whole.len()];

        let memcpy = timed(rounds, REPEATS / 10, || black_box(&mut copy).copy_from_slice(black_box(&whole)));
        let snapshot = timed(rounds, REPEATS, || drop(black_box(prepared.sensors.snapshot())));
        let encode = timed(rounds, REPEATS, || drop(black_box(Codec::Protobuf.encode(black_box(&message)))));
        let decode =
            timed(rounds, REPEATS, || drop(black_box(Codec::Protobuf.decode(Frame::from(whole.clone())))));
        for (row, rounds) in
            [("memcpy", memcpy), ("snapshot", snapshot), ("encode", encode), ("decode", decode)]
        {
            report.print(row, "chiral", "p50_us", &rounds);
        }
    }
    Ok(())
}

/// Returns the median of each round, in microseconds.
fn timed(rounds: usize, repeats: usize, mut run: impl FnMut()) -> Vec<f64> {
    let round = |_| {
        let once = |_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64() * 1e6
        };
        percentile(&(0..repeats).map(once).collect::<Vec<_>>(), 50)
    };
    (0..rounds).map(round).collect()
}
