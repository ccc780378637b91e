//! Decodes the MessagePack of a header into values. Depth and number of values are bounded, and no length in
//! the header is trusted.

use bytes::{Buf, Bytes};
use rmp::Marker;

use crate::{
    error::DecodeError,
    value::{Value, ValueMap},
};

type Result<T> = std::result::Result<T, DecodeError>;

/// The greatest number of values in a header. One byte can encode a value, so this bounds their memory, to
/// about 100 MB.
const MAX_VALUES: usize = 1 << 20;
/// A map that is not empty counts as this many additional values, because it allocates room for several
/// entries.
const MAP_COST: usize = 8;

/// Decodes a header, which is one map. Its values may be nested as deeply as the free-form maps in it
/// require.
pub(super) fn header(bytes: Bytes) -> Result<ValueMap> {
    let mut reader = Reader { rest: bytes, values: MAX_VALUES };
    let map = match reader.value(Value::MAX_DEPTH + 2)? {
        Value::Map(map) => map,
        other => return Err(DecodeError::new("header", "a map", describe(&other))),
    };
    match reader.rest.len() {
        0 => Ok(map),
        more => Err(DecodeError::new("header", "one map", format_args!("{more} bytes after it"))),
    }
}

/// Describes a value in an error text, which stays short however large the value is.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) => format!("{value:?}"),
        Value::Str(text) if text.len() <= 40 => format!("{text:?}"),
        Value::Str(text) => format!("text of {} bytes", text.len()),
        Value::Bytes(bytes) => format!("{} bytes", bytes.len()),
        Value::List(items) => format!("a list of {}", items.len()),
        Value::Map(map) => format!("a map of {}", map.len()),
    }
}

struct Reader {
    rest: Bytes,
    /// How many more values there may be.
    values: usize,
}

impl Reader {
    /// Decodes the next value, in which values may be nested `depth` deep, itself included.
    fn value(&mut self, depth: usize) -> Result<Value> {
        let too_deep = || {
            DecodeError::new(
                "header",
                format_args!("values nested at most {} deep", Value::MAX_DEPTH),
                "deeper nesting",
            )
        };
        let depth = depth.checked_sub(1).ok_or_else(too_deep)?;
        self.count(1)?;
        let [marker] = self.array()?;
        Ok(match Marker::from_u8(marker) {
            Marker::Null => Value::Null,
            Marker::False => Value::Bool(false),
            Marker::True => Value::Bool(true),
            Marker::FixPos(value) => Value::Int(value.into()),
            Marker::U8 => Value::Int(u8::from_be_bytes(self.array()?).into()),
            Marker::U16 => Value::Int(u16::from_be_bytes(self.array()?).into()),
            Marker::U32 => Value::Int(u32::from_be_bytes(self.array()?).into()),
            Marker::U64 => {
                let value = u64::from_be_bytes(self.array()?);
                i64::try_from(value).map_or(Value::Float(value as f64), Value::Int)
            }
            Marker::FixNeg(value) => Value::Int(value.into()),
            Marker::I8 => Value::Int(i8::from_be_bytes(self.array()?).into()),
            Marker::I16 => Value::Int(i16::from_be_bytes(self.array()?).into()),
            Marker::I32 => Value::Int(i32::from_be_bytes(self.array()?).into()),
            Marker::I64 => Value::Int(i64::from_be_bytes(self.array()?)),
            Marker::F32 => Value::Float(f32::from_be_bytes(self.array()?).into()),
            Marker::F64 => Value::Float(f64::from_be_bytes(self.array()?)),
            Marker::FixStr(len) => self.text(len.into())?,
            Marker::Str8 => self.len8().and_then(|len| self.text(len))?,
            Marker::Str16 => self.len16().and_then(|len| self.text(len))?,
            Marker::Str32 => self.len32().and_then(|len| self.text(len))?,
            Marker::Bin8 => self.len8().and_then(|len| self.bytes(len))?,
            Marker::Bin16 => self.len16().and_then(|len| self.bytes(len))?,
            Marker::Bin32 => self.len32().and_then(|len| self.bytes(len))?,
            Marker::FixExt1 => self.extension(1)?,
            Marker::FixExt2 => self.extension(2)?,
            Marker::FixExt4 => self.extension(4)?,
            Marker::FixExt8 => self.extension(8)?,
            Marker::FixExt16 => self.extension(16)?,
            Marker::Ext8 => self.len8().and_then(|len| self.extension(len))?,
            Marker::Ext16 => self.len16().and_then(|len| self.extension(len))?,
            Marker::Ext32 => self.len32().and_then(|len| self.extension(len))?,
            Marker::FixArray(len) => self.list(len.into(), depth)?,
            Marker::Array16 => self.len16().and_then(|len| self.list(len, depth))?,
            Marker::Array32 => self.len32().and_then(|len| self.list(len, depth))?,
            Marker::FixMap(len) => self.map(len.into(), depth)?,
            Marker::Map16 => self.len16().and_then(|len| self.map(len, depth))?,
            Marker::Map32 => self.len32().and_then(|len| self.map(len, depth))?,
            Marker::Reserved => {
                return Err(DecodeError::new("header", "MessagePack", "the reserved byte 0xc1"));
            }
        })
    }

    fn count(&mut self, values: usize) -> Result<()> {
        let too_many = || DecodeError::new("header", format_args!("at most {MAX_VALUES} values"), "more");
        self.values = self.values.checked_sub(values).ok_or_else(too_many)?;
        Ok(())
    }

    fn take(&mut self, len: usize) -> Result<Bytes> {
        if len > self.rest.len() {
            return Err(self.short(len));
        }
        Ok(self.rest.split_to(len))
    }

    fn short(&self, len: usize) -> DecodeError {
        DecodeError::new("header", format_args!("{len} more bytes"), self.rest.len())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let array = self.rest.first_chunk().copied().ok_or_else(|| self.short(N))?;
        self.rest.advance(N);
        Ok(array)
    }

    fn len8(&mut self) -> Result<usize> {
        self.array().map(|len| u8::from_be_bytes(len).into())
    }

    fn len16(&mut self) -> Result<usize> {
        self.array().map(|len| u16::from_be_bytes(len).into())
    }

    fn len32(&mut self) -> Result<usize> {
        self.array().map(|len| u32::from_be_bytes(len) as usize)
    }

    fn text(&mut self, len: usize) -> Result<Value> {
        let bytes = self.take(len)?;
        Ok(match std::str::from_utf8(&bytes) {
            Ok(text) => Value::Str(text.to_owned()),
            Err(_) => Value::Bytes(bytes),
        })
    }

    fn bytes(&mut self, len: usize) -> Result<Value> {
        self.take(len).map(Value::Bytes)
    }

    fn extension(&mut self, len: usize) -> Result<Value> {
        let [_kind] = self.array()?;
        self.bytes(len)
    }

    fn list(&mut self, len: usize, depth: usize) -> Result<Value> {
        // A value takes at least one byte, so a list cannot be longer than the rest of the header.
        if len > self.rest.len() {
            return Err(DecodeError::new(
                "header",
                format_args!("a list of at most {} values", self.rest.len()),
                len,
            ));
        }
        // Collecting does not allocate for `len` values in advance; each value is counted as it is decoded.
        (0..len).map(|_| self.value(depth)).collect::<Result<_>>().map(Value::List)
    }

    fn map(&mut self, len: usize, depth: usize) -> Result<Value> {
        self.count(if len > 0 { MAP_COST } else { 0 })?;
        (0..len)
            .map(|_| Ok((self.key(depth)?, self.value(depth)?)))
            .collect::<Result<ValueMap>>()
            .map(Value::Map)
    }

    /// Decodes a key. In Python keys need not be text. A key is decoded with a depth of at most 1: maps as
    /// keys cannot nest.
    fn key(&mut self, depth: usize) -> Result<String> {
        match self.value(depth.min(1))? {
            Value::Str(text) => Ok(text),
            key @ (Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_)) => Ok(match key {
                Value::Null => "null".to_owned(),
                key => describe(&key),
            }),
            other => Err(DecodeError::new("header", "keys that are text or numbers", describe(&other))),
        }
    }
}
