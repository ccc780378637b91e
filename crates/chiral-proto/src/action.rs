//! What flows from the policy to the robot: [`Action`], [`ActionChunk`], and [`ActionSpec`], against which
//! the actions are checked.

use std::{ops::Deref, time::Duration};

use nalgebra::{Dim, Matrix, RawStorage};
use ndarray::{ArrayBase, Data, Ix1, Ix2};

use crate::error::{Code, Fault};

/// One action: D values.
///
/// Converts from slices, arrays, `Vec`s, one-dimensional `ndarray` arrays and nalgebra vectors of `f32` or
/// `f64`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Action {
    /// The values, in the order and unit of the robot's [`ActionSpec`].
    pub values: Vec<f32>,
}

impl Deref for Action {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

/// N actions predicted together: (N, D), row-major, in one buffer.
///
/// Converts from `f32` or `f64`: everything that converts to an [`Action`] becomes a chunk of one row; arrays
/// of arrays, two-dimensional `ndarray` arrays and nalgebra matrices become N rows. A nalgebra *column
/// vector* (one column by its type) is one action.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ActionChunk {
    values: Vec<f32>,
    dimension: usize,
    is_single: bool,
}

impl ActionChunk {
    /// The greatest number of rows in a chunk.
    pub const MAX_ROWS: usize = 4096;
    /// The rows that a server accepts in one action if its welcome does not say.
    pub const OLD_MAX_ROWS: usize = 16;

    /// Creates a chunk from rows of `dimension` values each.
    ///
    /// # Errors
    /// [`InvalidAction::Ragged`] if the last row is incomplete.
    pub fn new(dimension: usize, values: Vec<f32>) -> Result<ActionChunk, InvalidAction> {
        if !values.len().is_multiple_of(dimension) {
            return Err(InvalidAction::Ragged { dimension, found: values.len() });
        }
        Ok(ActionChunk { values, dimension, is_single: false })
    }

    /// The same row as a single action, of shape (D). Chunks of several rows stay as they are.
    #[must_use]
    pub fn into_single(self) -> ActionChunk {
        ActionChunk { is_single: self.rows() <= 1, ..self }
    }

    /// Whether the policy gave one action of shape (D), not a chunk of shape (N, D).
    pub fn is_single(&self) -> bool {
        self.is_single
    }

    /// N, the number of rows.
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.dimension).unwrap_or(0)
    }

    /// D, the number of values in a row.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// All values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Iterates over the rows.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.dimension.max(1))
    }
}

/// What the values of an action mean.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ActionMeaning {
    /// Target joint positions.
    JointPosition,
    /// Target joint velocities.
    JointVelocity,
    /// A change of the end effector's pose.
    EndEffectorDelta,
    /// Anything else, as a description.
    Other(String),
}

/// The robot's action space, declared by the robot and checked by both peers.
#[derive(Clone, Debug, PartialEq)]
pub struct ActionSpec {
    /// D, the number of values in one action; 0 if undeclared, which stands for any.
    pub dimension: usize,
    /// One name per value, or empty.
    pub names: Vec<String>,
    /// The smallest values that the robot can follow, one per value, or empty. They are information for the
    /// policy; clamping values outside them is up to the robot.
    pub low: Vec<f32>,
    /// The greatest values that the robot can follow, one per value, or empty.
    pub high: Vec<f32>,
    /// The unit, such as `rad`; may be empty.
    pub unit: String,
    /// What the values mean.
    pub meaning: ActionMeaning,
    /// The rate at which the robot applies the rows of a chunk, in hertz; 0 if undeclared: rows are then
    /// applied as they come.
    pub control_hz: f64,
}

impl ActionSpec {
    /// Creates a spec for the positions of `dimension` joints in radians.
    pub fn joint_positions(dimension: usize, control_hz: f64) -> ActionSpec {
        ActionSpec {
            dimension,
            names: Vec::new(),
            low: Vec::new(),
            high: Vec::new(),
            unit: "rad".to_owned(),
            meaning: ActionMeaning::JointPosition,
            control_hz,
        }
    }

    /// Creates a spec that declares neither dimension nor rate: actions are only checked to be finite, and
    /// none is paced.
    pub fn undeclared() -> ActionSpec {
        ActionSpec {
            unit: String::new(),
            meaning: ActionMeaning::Other(String::new()),
            ..ActionSpec::joint_positions(0, 0.0)
        }
    }

    /// The time between two rows of a chunk, 1 / `control_hz`; `None` if no rate is declared.
    pub fn control_period(&self) -> Option<Duration> {
        Duration::try_from_secs_f64(1.0 / self.control_hz).ok().filter(|period| !period.is_zero())
    }

    /// Checks that `chunk` has 1 to [`ActionChunk::MAX_ROWS`] rows of this dimension, if one is declared, and
    /// only finite values.
    ///
    /// # Errors
    /// [`InvalidAction`], which names what was expected and what was found.
    pub fn check(&self, chunk: &ActionChunk) -> Result<(), InvalidAction> {
        if self.dimension != 0 && chunk.dimension != self.dimension {
            return Err(InvalidAction::Dimension { expected: self.dimension, found: chunk.dimension });
        }
        if chunk.rows() == 0 || chunk.rows() > ActionChunk::MAX_ROWS {
            return Err(InvalidAction::Rows { limit: ActionChunk::MAX_ROWS, found: chunk.rows() });
        }
        match chunk.values.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => {
                let (row, index) = (at / chunk.dimension, at % chunk.dimension);
                let name = self.names.get(index).cloned().unwrap_or_else(|| format!("value {index}"));
                Err(InvalidAction::NotFinite { row, name, value: chunk.values[at] })
            }
        }
    }
}

/// The error for an action that does not match the robot's [`ActionSpec`].
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidAction {
    /// The rows have another dimension than the robot's actions.
    #[error("expected actions of dimension {expected}, found {found}")]
    Dimension {
        /// The robot's dimension D.
        expected: usize,
        /// The chunk's dimension.
        found: usize,
    },
    /// A value is NaN or infinite.
    #[error("expected finite values, found {value} at row {row}, {name}")]
    NotFinite {
        /// The row of the chunk.
        row: usize,
        /// The value's name in [`ActionSpec::names`], or its index.
        name: String,
        /// The value.
        value: f32,
    },
    /// The chunk has no row, or too many.
    #[error("expected 1 to {limit} rows, found {found}")]
    Rows {
        /// The greatest number of rows.
        limit: usize,
        /// The number of rows.
        found: usize,
    },
    /// The last row is incomplete.
    #[error("expected rows of {dimension} values, found {found} values")]
    Ragged {
        /// The number of values in a row.
        dimension: usize,
        /// The total number of values.
        found: usize,
    },
}

impl From<InvalidAction> for Fault {
    fn from(error: InvalidAction) -> Fault {
        Fault::new(Code::Invalid, error.to_string()).field("actions")
    }
}

/// A number that converts to an action's value: `f32`, or `f64`, which is rounded.
pub trait Number: Copy + 'static {
    /// The value as `f32`.
    fn to_f32(self) -> f32;
}

impl Number for f32 {
    fn to_f32(self) -> f32 {
        self
    }
}

impl Number for f64 {
    fn to_f32(self) -> f32 {
        self as f32
    }
}

impl From<Action> for ActionChunk {
    fn from(action: Action) -> ActionChunk {
        // Without values there is no row either.
        ActionChunk {
            dimension: action.values.len(),
            is_single: !action.values.is_empty(),
            values: action.values,
        }
    }
}

/// Conversions to one action, and therefore also to a chunk of one row.
macro_rules! from_one_action {
    ($([$($generics:tt)*] $source:ty;)*) => {$(
        impl<$($generics)*> From<$source> for Action {
            fn from(values: $source) -> Action {
                Action { values: values.iter().map(|value| value.to_f32()).collect() }
            }
        }

        impl<$($generics)*> From<$source> for ActionChunk {
            fn from(values: $source) -> ActionChunk {
                Action::from(values).into()
            }
        }
    )*};
}
from_one_action! {
    [T: Number] Vec<T>;
    [T: Number] &Vec<T>;
    [T: Number] &[T];
    [T: Number, const D: usize] [T; D];
    [T: Number, const D: usize] &[T; D];
    [T: Number, S: Data<Elem = T>] ArrayBase<S, Ix1>;
    [T: Number, S: Data<Elem = T>] &ArrayBase<S, Ix1>;
}

impl<T: Number, R: Dim, S: RawStorage<T, R, nalgebra::U1>> From<&Matrix<T, R, nalgebra::U1, S>> for Action {
    fn from(vector: &Matrix<T, R, nalgebra::U1, S>) -> Action {
        Action { values: vector.iter().map(|value| value.to_f32()).collect() }
    }
}

impl<T: Number, R: Dim, S: RawStorage<T, R, nalgebra::U1>> From<Matrix<T, R, nalgebra::U1, S>> for Action {
    fn from(vector: Matrix<T, R, nalgebra::U1, S>) -> Action {
        Action::from(&vector)
    }
}

impl<T: Number, R: Dim, C: Dim, S: RawStorage<T, R, C>> From<&Matrix<T, R, C, S>> for ActionChunk {
    fn from(matrix: &Matrix<T, R, C, S>) -> ActionChunk {
        let is_vector = C::try_to_usize() == Some(1);
        let dimension = if is_vector { matrix.nrows() } else { matrix.ncols() };
        // The column of a vector is the one row. nalgebra stores matrices column-major, chunks are row-major.
        let values: Vec<f32> = match is_vector {
            true => matrix.iter().map(|value| value.to_f32()).collect(),
            false => matrix
                .row_iter()
                .flat_map(|row| row.iter().map(|value| value.to_f32()).collect::<Vec<_>>())
                .collect(),
        };
        ActionChunk { is_single: is_vector && !values.is_empty(), values, dimension }
    }
}

impl<T: Number, R: Dim, C: Dim, S: RawStorage<T, R, C>> From<Matrix<T, R, C, S>> for ActionChunk {
    fn from(matrix: Matrix<T, R, C, S>) -> ActionChunk {
        ActionChunk::from(&matrix)
    }
}

impl<T: Number, const D: usize, const N: usize> From<[[T; D]; N]> for ActionChunk {
    fn from(rows: [[T; D]; N]) -> ActionChunk {
        let values = rows.iter().flatten().map(|value| value.to_f32()).collect();
        ActionChunk { values, dimension: D, is_single: false }
    }
}

impl<T: Number, S: Data<Elem = T>> From<&ArrayBase<S, Ix2>> for ActionChunk {
    fn from(rows: &ArrayBase<S, Ix2>) -> ActionChunk {
        let values = rows.iter().map(|value| value.to_f32()).collect();
        ActionChunk { values, dimension: rows.ncols(), is_single: false }
    }
}

impl<T: Number, S: Data<Elem = T>> From<ArrayBase<S, Ix2>> for ActionChunk {
    fn from(rows: ArrayBase<S, Ix2>) -> ActionChunk {
        ActionChunk::from(&rows)
    }
}

#[cfg(test)]
mod tests {
    use nalgebra::{DMatrix, DVector, SMatrix, SVector};
    use ndarray::{Array1, Array2, array};

    use super::*;

    #[track_caller]
    fn check(chunk: impl Into<ActionChunk>, rows: usize, values: &[f32]) {
        let chunk = chunk.into();
        assert_eq!((chunk.rows(), chunk.values()), (rows, values));
    }

    #[test]
    fn a_chunk_converts_from_arrays_vectors_and_matrices() {
        check(vec![1.0, 2.0], 1, &[1.0, 2.0]);
        check([1.0f32, 2.0], 1, &[1.0, 2.0]);
        check(vec![1.0f64, 2.0], 1, &[1.0, 2.0]);
        check([[1.0f32, 2.0], [3.0, 4.0]], 2, &[1.0, 2.0, 3.0, 4.0]);
        check(&[1.0f32, 2.0][..], 1, &[1.0, 2.0]);
        check(array![1.0f64, 2.0], 1, &[1.0, 2.0]);
        check(Array1::<f32>::zeros(3).view(), 1, &[0.0; 3]);
        check(array![[1.0f32, 2.0], [3.0, 4.0]].t(), 2, &[1.0, 3.0, 2.0, 4.0]);
        check(Array2::<f64>::zeros((4, 2)), 4, &[0.0; 8]);
        check(DVector::from_vec(vec![1.0f64, 2.0]), 1, &[1.0, 2.0]);
        check(SVector::<f32, 2>::new(1.0, 2.0), 1, &[1.0, 2.0]);
        check(SMatrix::<f32, 2, 3>::new(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 2, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        check(DMatrix::<f64>::from_row_slice(2, 1, &[1.0, 2.0]), 2, &[1.0, 2.0]);
        assert_eq!(Action::from(DVector::from_vec(vec![1.0f64, 2.0])).values, [1.0, 2.0]);
        let singles: [ActionChunk; 2] = [[1.0, 2.0].into(), DVector::from_vec(vec![1.0f64, 2.0]).into()];
        assert!(singles.iter().all(ActionChunk::is_single));
        let others: [ActionChunk; 3] =
            [[[1.0, 2.0]].into(), vec![0.0; 0].into(), DVector::<f64>::zeros(0).into()];
        assert!(!others.iter().any(ActionChunk::is_single), "a chunk of one row, and none at all");
    }

    #[test]
    fn only_complete_rows_of_finite_values_pass() {
        let spec = ActionSpec {
            names: vec!["shoulder".into(), "elbow".into()],
            ..ActionSpec::joint_positions(2, 20.0)
        };
        assert_eq!(spec.check(&[1.0, 2.0].into()), Ok(()));
        assert_eq!(spec.check(&[1.0].into()), Err(InvalidAction::Dimension { expected: 2, found: 1 }));
        assert_eq!(
            spec.check(&ActionChunk::new(2, vec![]).unwrap()),
            Err(InvalidAction::Rows { limit: 4096, found: 0 })
        );
        assert_eq!(ActionChunk::new(2, vec![1.0; 3]), Err(InvalidAction::Ragged { dimension: 2, found: 3 }));
        let error = spec.check(&array![[0.0f64, 0.0], [0.0, 1e300]].into()).unwrap_err();
        assert_eq!(error.to_string(), "expected finite values, found inf at row 1, elbow");
    }
}
