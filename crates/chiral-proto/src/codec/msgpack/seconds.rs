//! Times of capture: f64 seconds on the wire, whole nanoseconds with us.

use crate::{clock::Timestamp, value::Value};

/// Above this a time of capture is in nanoseconds: as seconds it would be 30 million years.
pub const MAX_SECONDS: f64 = 1e15;

const NANOS: i64 = 1_000_000_000;

/// `None` if it is no number.
pub(super) fn timestamp(value: &Value) -> Option<Timestamp> {
    let seconds = value.as_f64()?;
    Some(Timestamp(match value {
        Value::Int(nanos) if seconds > MAX_SECONDS => *nanos,
        _ if seconds > MAX_SECONDS => seconds as i64,
        // Whole seconds and the rest apart, since their product with 1e9 would be rounded. Casts of floats
        // saturate.
        _ => {
            let rest = (seconds.fract() * NANOS as f64).round() as i64;
            (seconds.trunc() as i64).saturating_mul(NANOS).saturating_add(rest)
        }
    }))
}

/// The f64 that other peers make of the same time: the quotient, rounded once.
pub(super) fn seconds(time: Timestamp) -> f64 {
    let Timestamp(nanos) = time;
    if nanos.unsigned_abs() <= 1 << 53 {
        nanos as f64 / NANOS as f64
    } else {
        (nanos / NANOS) as f64 + (nanos % NANOS) as f64 / NANOS as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(value: impl Into<Value>, nanos: i64) {
        assert_eq!(timestamp(&value.into()), Some(Timestamp(nanos)));
    }

    #[test]
    fn seconds_or_nanoseconds_by_their_size() {
        check(0.0, 0);
        check(12, 12_000_000_000);
        check(12.5_f32, 12_500_000_000);
        check(-0.25, -250_000_000);
        check(1_700_000_000_123_456_789_i64, 1_700_000_000_123_456_789);
        check(1.5e18, 1_500_000_000_000_000_000);
        check(f64::NAN, 0);
        for (far, nanos) in
            [(1e15, i64::MAX), (-1e15, i64::MIN), (f64::INFINITY, i64::MAX), (f64::NEG_INFINITY, i64::MIN)]
        {
            check(far, nanos);
        }
        assert_eq!(timestamp(&Value::Null), None);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        /// For as long as a host is up 48 days, the nanosecond comes back.
        #[test]
        fn nanoseconds_come_back(nanos in -(1_i64 << 22) * NANOS..(1_i64 << 22) * NANOS) {
            proptest::prop_assert_eq!(timestamp(&seconds(Timestamp(nanos)).into()), Some(Timestamp(nanos)));
        }

        /// Above, and so for Unix times, seconds do, bit for bit.
        #[test]
        fn seconds_come_back(original in (1_u64 << 23) as f64..9.2e9) {
            let time = timestamp(&original.into()).map(seconds);
            proptest::prop_assert_eq!(time.map(f64::to_bits), Some(original.to_bits()));
        }
    }
}
