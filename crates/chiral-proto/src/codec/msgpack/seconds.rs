//! Converts capture times: f64 seconds on the legacy wire, integer nanoseconds in this crate.

use crate::{clock::Timestamp, value::Value};

/// A capture time greater than this is in nanoseconds: as seconds it would be 30 million years.
pub const MAX_SECONDS: f64 = 1e15;

const NANOS: i64 = 1_000_000_000;

/// Converts a capture time from the wire; `None` if it is not a number.
pub fn timestamp(value: &Value) -> Option<Timestamp> {
    let seconds = value.as_f64()?;
    Some(Timestamp(match value {
        Value::Int(nanos) if seconds > MAX_SECONDS => *nanos,
        _ if seconds > MAX_SECONDS => seconds as i64,
        // Integer and fractional seconds are converted separately, because the product with 1e9 would be
        // rounded. Casts of floats saturate.
        _ => {
            let rest = (seconds.fract() * NANOS as f64).round() as i64;
            (seconds.trunc() as i64).saturating_mul(NANOS).saturating_add(rest)
        }
    }))
}

/// Converts a time to the same f64 that legacy peers compute: the quotient, rounded once.
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
    fn large_times_are_nanoseconds_others_are_seconds() {
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
        #![proptest_config(proptest::prelude::ProptestConfig {
            failure_persistence: None,
            ..Default::default()
        })]

        /// Nanoseconds are exact while a host has been up for at most 48 days.
        #[test]
        fn nanoseconds_survive_a_round_trip(nanos in -(1_i64 << 22) * NANOS..(1_i64 << 22) * NANOS) {
            proptest::prop_assert_eq!(timestamp(&seconds(Timestamp(nanos)).into()), Some(Timestamp(nanos)));
        }

        /// Larger times, such as Unix times, are exact as seconds, bit for bit.
        #[test]
        fn seconds_survive_a_round_trip(original in (1_u64 << 23) as f64..9.2e9) {
            let time = timestamp(&original.into()).map(seconds);
            proptest::prop_assert_eq!(time.map(f64::to_bits), Some(original.to_bits()));
        }
    }
}
