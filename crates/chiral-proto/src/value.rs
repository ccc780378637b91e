//! Free-form values, as in dynamic languages. Metadata, `info` and `extra` are maps of them.

use std::collections::BTreeMap;

use bytes::Bytes;

/// A map of free-form values.
pub type ValueMap = BTreeMap<String, Value>;

/// Creates a map from entries.
///
/// ```
/// let info = chiral_proto::value::map([("success", true.into()), ("joints", vec![0.1, 0.2].into())]);
/// assert_eq!(info["success"].as_bool(), Some(true));
/// ```
pub fn map<const N: usize>(entries: [(&str, Value); N]) -> ValueMap {
    entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A free-form value.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// No value.
    #[default]
    Null,
    /// True or false.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// Text.
    Str(String),
    /// Raw bytes.
    Bytes(Bytes),
    /// A list of values.
    List(Vec<Value>),
    /// Values by name.
    Map(ValueMap),
}

impl Value {
    /// How deeply values may be nested, so that no peer can exhaust the stack.
    pub const MAX_DEPTH: usize = 24;

    /// The boolean, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        if let Value::Bool(value) = self { Some(*value) } else { None }
    }

    /// The integer, if it is one.
    pub fn as_i64(&self) -> Option<i64> {
        if let Value::Int(value) = self { Some(*value) } else { None }
    }

    /// The number as `f64`, if it is an integer or a float.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Float(value) => Some(*value),
            Value::Int(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::Str(value) = self { Some(value) } else { None }
    }

    /// The list, if it is one.
    pub fn as_list(&self) -> Option<&[Value]> {
        if let Value::List(value) = self { Some(value) } else { None }
    }

    /// The map, if it is one.
    pub fn as_map(&self) -> Option<&ValueMap> {
        if let Value::Map(value) = self { Some(value) } else { None }
    }
}

macro_rules! from_variants {
    ($($rust:ty => $kind:ident),*) => {$(
        impl From<$rust> for Value {
            fn from(value: $rust) -> Value {
                Value::$kind(value.into())
            }
        }
    )*};
}
from_variants!(
    bool => Bool, i32 => Int, i64 => Int, u32 => Int, f32 => Float, f64 => Float, &str => Str, String => Str,
    Bytes => Bytes, ValueMap => Map
);

impl From<usize> for Value {
    fn from(value: usize) -> Value {
        Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(items: Vec<T>) -> Value {
        Value::List(items.into_iter().map(Into::into).collect())
    }
}

impl<T: Into<Value>> FromIterator<T> for Value {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Value {
        Value::List(items.into_iter().map(Into::into).collect())
    }
}
