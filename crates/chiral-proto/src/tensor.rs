//! The one deep type: an array of numbers with a shape, over shared memory.

use std::{borrow::Cow, fmt};

use bytemuck::Pod;
use bytes::Bytes;
use ndarray::{ArrayView, CowArray, Dimension, IxDyn};

/// What one element of a [`Tensor`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// `u8`, the usual pixel.
    U8,
    /// `i8`.
    I8,
    /// `u16`.
    U16,
    /// `i16`.
    I16,
    /// `u32`.
    U32,
    /// `i32`.
    I32,
    /// `u64`.
    U64,
    /// `i64`.
    I64,
    /// `f32`: depth, proprioception and actions.
    F32,
    /// `f64`.
    F64,
}

impl DType {
    /// Every element type there is.
    pub const ALL: [DType; 10] = [
        DType::U8,
        DType::I8,
        DType::U16,
        DType::I16,
        DType::U32,
        DType::I32,
        DType::U64,
        DType::I64,
        DType::F32,
        DType::F64,
    ];

    /// Bytes an element takes.
    pub const fn size(self) -> usize {
        match self {
            DType::U8 | DType::I8 => 1,
            DType::U16 | DType::I16 => 2,
            DType::U32 | DType::I32 | DType::F32 => 4,
            DType::U64 | DType::I64 | DType::F64 => 8,
        }
    }

    /// The name NumPy knows it by, such as `float32`.
    pub const fn numpy_name(self) -> &'static str {
        match self {
            DType::U8 => "uint8",
            DType::I8 => "int8",
            DType::U16 => "uint16",
            DType::I16 => "int16",
            DType::U32 => "uint32",
            DType::I32 => "int32",
            DType::U64 => "uint64",
            DType::I64 => "int64",
            DType::F32 => "float32",
            DType::F64 => "float64",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.numpy_name())
    }
}

/// A Rust type that a tensor can hold.
pub trait Element: Pod + Send + Sync + sealed::Sealed {
    /// Its name on the wire.
    const DTYPE: DType;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),*) => {$(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}
elements!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64, f32 => F32, f64 => F64);

/// An n-dimensional array, row-major, over reference-counted memory: a clone copies no data.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Bytes,
}

impl Tensor {
    /// The array of this element type and shape whose little-endian bytes are `data`.
    ///
    /// # Errors
    /// [`TensorError::Length`] if `data` is not as long as the shape says.
    pub fn new(
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        data: impl Into<Bytes>,
    ) -> Result<Tensor, TensorError> {
        let (shape, data) = (shape.into(), data.into());
        match byte_len(dtype, &shape) {
            Some(expected) if expected == data.len() => Ok(Tensor { dtype, shape, data }),
            expected => Err(TensorError::Length { dtype, shape, expected, found: data.len() }),
        }
    }

    /// The array of this shape that takes over `values`, without a copy.
    ///
    /// # Errors
    /// [`TensorError::Length`] if there are not as many values as the shape says.
    pub fn from_vec<T: Element>(shape: impl Into<Vec<usize>>, values: Vec<T>) -> Result<Tensor, TensorError> {
        Tensor::new(T::DTYPE, shape, Bytes::from_owner(Owner(values)))
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The size along each axis, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The bytes: little-endian, row-major.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// The values in row-major order; borrowed where the memory is aligned for `T`, else copied.
    ///
    /// # Errors
    /// [`TensorError::DType`] if the elements are not `T`.
    pub fn values<T: Element>(&self) -> Result<Cow<'_, [T]>, TensorError> {
        if T::DTYPE != self.dtype {
            return Err(TensorError::DType { expected: T::DTYPE, found: self.dtype });
        }
        Ok(match bytemuck::try_cast_slice(&self.data) {
            Ok(values) => Cow::Borrowed(values),
            Err(_) => {
                let mut values = vec![T::zeroed(); self.data.len() / size_of::<T>()];
                bytemuck::cast_slice_mut(&mut values).copy_from_slice(&self.data);
                Cow::Owned(values)
            }
        })
    }

    /// The array as `ndarray` sees it, such as `view::<u8, Ix3>()` for an image; borrowed where the memory is
    /// aligned for `T`, else copied.
    ///
    /// # Errors
    /// [`TensorError::DType`] if the elements are not `T`, [`TensorError::Axes`] if there are not as many
    /// axes as `D` has.
    pub fn view<T: Element, D: Dimension>(&self) -> Result<CowArray<'_, T, D>, TensorError> {
        let axes = || TensorError::Axes { expected: D::NDIM.unwrap_or(0), found: self.shape.clone() };
        let shape = IxDyn(&self.shape);
        let view = match self.values::<T>()? {
            Cow::Borrowed(values) => ArrayView::from_shape(shape, values).map(CowArray::from),
            Cow::Owned(values) => ndarray::Array::from_shape_vec(shape, values).map(CowArray::from),
        };
        view.expect("new checked the length against the shape").into_dimensionality().map_err(|_| axes())
    }
}

/// A tensor that is not what it is taken for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The data is not as long as the shape says.
    #[error("{dtype} of shape {shape:?} takes {} bytes, found {found}", expected.map_or("more than memory has".to_owned(), |len| len.to_string()))]
    Length {
        /// The element type.
        dtype: DType,
        /// The shape.
        shape: Vec<usize>,
        /// What they take; `None` where that overflows.
        expected: Option<usize>,
        /// The data's length.
        found: usize,
    },
    /// Another element type was asked for.
    #[error("expected elements of {expected}, found {found}")]
    DType {
        /// What was asked for.
        expected: DType,
        /// What it holds.
        found: DType,
    },
    /// Another number of axes was asked for.
    #[error("expected {expected} axes, found shape {found:?}")]
    Axes {
        /// What was asked for.
        expected: usize,
        /// Its shape.
        found: Vec<usize>,
    },
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({}{:?})", self.dtype, self.shape)
    }
}

/// Bytes an array of this type and shape takes; `None` where that overflows. As `ndarray` has it, also an
/// empty array's other axes must fit.
pub(crate) fn byte_len(dtype: DType, shape: &[usize]) -> Option<usize> {
    let len = shape.iter().try_fold(dtype.size(), |len, &axis| len.checked_mul(axis.max(1)))?;
    let is_empty = shape.contains(&0);
    (len <= isize::MAX as usize).then_some(if is_empty { 0 } else { len })
}

/// A vector whose bytes are shared.
struct Owner<T>(Vec<T>);

impl<T: Element> AsRef<[u8]> for Owner<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
