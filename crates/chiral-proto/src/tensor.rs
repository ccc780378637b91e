//! [`Tensor`]: an n-dimensional array over shared memory. Images, depth, proprioception and actions are
//! tensors.

use std::{borrow::Cow, fmt};

use bytemuck::Pod;
use bytes::Bytes;
use ndarray::{ArrayView, CowArray, Dimension, IxDyn};

/// The element type of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// `u8`, the usual type of pixels.
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
    /// All element types.
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

    /// The size of one element in bytes.
    pub const fn size(self) -> usize {
        match self {
            DType::U8 | DType::I8 => 1,
            DType::U16 | DType::I16 => 2,
            DType::U32 | DType::I32 | DType::F32 => 4,
            DType::U64 | DType::I64 | DType::F64 => 8,
        }
    }

    /// The type's name in NumPy, such as `float32`.
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

/// A Rust type that can be a tensor's element.
pub trait Element: Pod + Send + Sync + sealed::Sealed {
    /// The corresponding element type.
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
elements!(
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f32 => F32, f64 => F64
);

/// An n-dimensional array, row-major, over reference-counted memory. Cloning it copies no data.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Bytes,
}

impl Tensor {
    /// Creates a tensor from its little-endian bytes.
    ///
    /// # Errors
    /// [`TensorError::Length`] if the length of `data` does not match the shape.
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

    /// Creates a tensor that takes ownership of `values`, without a copy.
    ///
    /// # Errors
    /// [`TensorError::Length`] if the number of values does not match the shape.
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

    /// The values in row-major order: borrowed if the memory is aligned for `T`, otherwise copied.
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

    /// The tensor as an `ndarray` array, such as `view::<u8, Ix3>()` for an image: borrowed if the memory is
    /// aligned for `T`, otherwise copied.
    ///
    /// # Errors
    /// [`TensorError::DType`] if the elements are not `T`, [`TensorError::Axes`] if the tensor does not have
    /// the number of axes of `D`.
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

/// A tensor whose length, element type or number of axes is not the expected one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The length of the data does not match the shape.
    #[error(
        "expected {} bytes for {dtype} of shape {shape:?}, found {found}",
        expected.map_or("2^63 or more".to_owned(), |len| len.to_string())
    )]
    Length {
        /// The element type.
        dtype: DType,
        /// The shape.
        shape: Vec<usize>,
        /// The expected length in bytes; `None` if it overflows.
        expected: Option<usize>,
        /// The length of the data in bytes.
        found: usize,
    },
    /// The elements have another type than the requested one.
    #[error("expected elements of {expected}, found {found}")]
    DType {
        /// The requested type.
        expected: DType,
        /// The tensor's type.
        found: DType,
    },
    /// The tensor has another number of axes than the requested one.
    #[error("expected {expected} axes, found shape {found:?}")]
    Axes {
        /// The requested number of axes.
        expected: usize,
        /// The tensor's shape.
        found: Vec<usize>,
    },
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({}{:?})", self.dtype, self.shape)
    }
}

/// The size in bytes of an array of this type and shape; `None` if it overflows. As in `ndarray`, the product
/// of the axes that are not 0 must fit even if the array is empty.
pub(crate) fn byte_len(dtype: DType, shape: &[usize]) -> Option<usize> {
    let len = shape.iter().try_fold(dtype.size(), |len, &axis| len.checked_mul(axis.max(1)))?;
    let is_empty = shape.contains(&0);
    (len <= isize::MAX as usize).then_some(if is_empty { 0 } else { len })
}

/// Owns the vector whose bytes a [`Bytes`] shares.
struct Owner<T>(Vec<T>);

impl<T: Element> AsRef<[u8]> for Owner<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
