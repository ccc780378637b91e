//! Which of this crate's values stand for which of the schema's.

use crate::{codec::wire, error::Code, tensor::DType};

/// This crate's element types and the schema's.
pub(super) const DTYPES: [(DType, wire::DType); 10] = [
    (DType::U8, wire::DType::U8),
    (DType::I8, wire::DType::I8),
    (DType::U16, wire::DType::U16),
    (DType::I16, wire::DType::I16),
    (DType::U32, wire::DType::U32),
    (DType::I32, wire::DType::I32),
    (DType::U64, wire::DType::U64),
    (DType::I64, wire::DType::I64),
    (DType::F32, wire::DType::F32),
    (DType::F64, wire::DType::F64),
];

/// This crate's error codes and the schema's.
pub(super) const CODES: [(Code, wire::Code); 17] = [
    (Code::Unspecified, wire::Code::Unspecified),
    (Code::Malformed, wire::Code::Malformed),
    (Code::Invalid, wire::Code::Invalid),
    (Code::Unsupported, wire::Code::Unsupported),
    (Code::VersionMismatch, wire::Code::VersionMismatch),
    (Code::Unauthenticated, wire::Code::Unauthenticated),
    (Code::Busy, wire::Code::Busy),
    (Code::NotController, wire::Code::NotController),
    (Code::Stale, wire::Code::Stale),
    (Code::Resetting, wire::Code::Resetting),
    (Code::QueueFull, wire::Code::QueueFull),
    (Code::RobotFailed, wire::Code::RobotFailed),
    (Code::OutOfService, wire::Code::OutOfService),
    (Code::SensorTimeout, wire::Code::SensorTimeout),
    (Code::ShuttingDown, wire::Code::ShuttingDown),
    (Code::Protocol, wire::Code::Protocol),
    (Code::Holding, wire::Code::Holding),
];
