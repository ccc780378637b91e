//! [`Image`]: a camera's image or depth as it was sent, which may be encoded, and the tensor of its pixels.

use std::{borrow::Cow, fmt};

use bytes::Bytes;
use ndarray::{CowArray, Dimension};

use crate::tensor::{DType, Element, Tensor, TensorError};

/// How the bytes of an [`Image`] represent its pixels: a number of `Encoding` in the schema, which newer
/// peers may know more of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Encoding(pub i32);

impl Encoding {
    /// The elements themselves: little-endian, row-major.
    pub const RAW: Encoding = Encoding(0);
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Encoding::RAW => f.write_str("raw"),
            Encoding(number) => write!(f, "encoding {number}"),
        }
    }
}

/// An image or a depth image, over reference-counted memory. Cloning it copies no data.
///
/// ```
/// use chiral_proto::{DType, Encoding, Image, Tensor, ndarray::Ix3};
///
/// let raw = Image::from(Tensor::new(DType::U8, [1, 2, 3], vec![9, 8, 7, 6, 5, 4])?);
/// assert_eq!(raw.view::<u8, Ix3>()?[[0, 1, 0]], 6);
///
/// let newer = Image::new(Encoding(7), DType::U8, [480, 640, 3], vec![1, 2])?;
/// assert_eq!(newer.pixels().unwrap_err().to_string(), "expected an image that is raw, found encoding 7");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, PartialEq)]
pub struct Image {
    content: Content,
}

#[derive(Clone, PartialEq)]
enum Content {
    Raw(Tensor),
    Encoded { encoding: Encoding, dtype: DType, shape: Vec<usize>, data: Bytes },
}

impl Image {
    /// Creates an image from its bytes. `dtype` and `shape` are those of the decoded pixels: (H, W, C), or
    /// (H, W) for depth.
    ///
    /// # Errors
    /// [`TensorError::Length`] if the image is raw and the length of `data` does not match the shape.
    pub fn new(
        encoding: Encoding,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        data: impl Into<Bytes>,
    ) -> Result<Image, TensorError> {
        let content = match encoding {
            Encoding::RAW => Content::Raw(Tensor::new(dtype, shape, data)?),
            _ => Content::Encoded { encoding, dtype, shape: shape.into(), data: data.into() },
        };
        Ok(Image { content })
    }

    /// How the bytes represent the pixels.
    pub fn encoding(&self) -> Encoding {
        match &self.content {
            Content::Raw(_) => Encoding::RAW,
            Content::Encoded { encoding, .. } => *encoding,
        }
    }

    /// The element type of the pixels.
    pub fn dtype(&self) -> DType {
        match &self.content {
            Content::Raw(tensor) => tensor.dtype(),
            Content::Encoded { dtype, .. } => *dtype,
        }
    }

    /// The shape of the pixels: (H, W, C), or (H, W) for depth.
    pub fn shape(&self) -> &[usize] {
        match &self.content {
            Content::Raw(tensor) => tensor.shape(),
            Content::Encoded { shape, .. } => shape,
        }
    }

    /// The bytes, as they were sent.
    pub fn data(&self) -> &Bytes {
        match &self.content {
            Content::Raw(tensor) => tensor.data(),
            Content::Encoded { data, .. } => data,
        }
    }

    /// The pixels. Nothing is copied if the image is raw.
    ///
    /// # Errors
    /// [`ImageError::Encoding`] if this version cannot decode the image.
    pub fn pixels(&self) -> Result<&Tensor, ImageError> {
        match &self.content {
            Content::Raw(tensor) => Ok(tensor),
            Content::Encoded { encoding, .. } => Err(ImageError::Encoding { found: *encoding }),
        }
    }

    /// The same as [`Image::pixels`], for a caller that keeps them.
    ///
    /// # Errors
    /// As [`Image::pixels`].
    pub fn into_pixels(self) -> Result<Tensor, ImageError> {
        match self.content {
            Content::Raw(tensor) => Ok(tensor),
            Content::Encoded { encoding, .. } => Err(ImageError::Encoding { found: encoding }),
        }
    }

    /// The pixels' values in row-major order: [`Tensor::values`].
    ///
    /// # Errors
    /// [`ImageError`] if the image cannot be decoded or its elements are not `T`.
    pub fn values<T: Element>(&self) -> Result<Cow<'_, [T]>, ImageError> {
        Ok(self.pixels()?.values()?)
    }

    /// The pixels as an `ndarray` array, such as `view::<u8, Ix3>()`: [`Tensor::view`].
    ///
    /// # Errors
    /// [`ImageError`] if the image cannot be decoded, its elements are not `T`, or it does not have the
    /// number of axes of `D`.
    pub fn view<T: Element, D: Dimension>(&self) -> Result<CowArray<'_, T, D>, ImageError> {
        Ok(self.pixels()?.view()?)
    }
}

impl From<Tensor> for Image {
    fn from(pixels: Tensor) -> Image {
        Image { content: Content::Raw(pixels) }
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Image({} {}{:?}, {} bytes)",
            self.encoding(),
            self.dtype(),
            self.shape(),
            self.data().len()
        )
    }
}

/// Why an image's pixels cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// This version cannot decode the image.
    #[error("expected an image that is raw, found {found}")]
    Encoding {
        /// The image's encoding.
        found: Encoding,
    },
    /// The pixels have another element type or number of axes than the requested one.
    #[error(transparent)]
    Pixels(#[from] TensorError),
}
