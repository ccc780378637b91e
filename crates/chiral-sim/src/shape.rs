//! The shapes of a scene (planes, spheres, capsules and boxes), the colours of their surfaces, and where a
//! ray meets them.
//!
//! Which shapes a scene has is in `scene`, how they are lit in `shade`.
//!
//! Lengths are metres in the world frame, which `arm` defines. Formulas: the quadratic of each shape, as in
//! I. Quilez, "Intersectors" (iquilezles.org/articles/intersectors), for directions of any length.

use nalgebra::{Matrix3, Point3, Vector3};

/// The part of a line ahead of its origin: the points `origin + t direction` with `t > 0`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ray {
    /// Where the ray begins.
    pub origin: Point3<f64>,
    /// Its direction; its length is the unit of `t`.
    pub direction: Vector3<f64>,
}

impl Ray {
    /// The point at `t`.
    pub fn at(&self, t: f64) -> Point3<f64> {
        self.origin + self.direction * t
    }
}

/// A body's surface.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shape {
    /// The ground: all points `p` with `normal . p = height`. Everything else is on the side that `normal`
    /// points to.
    Plane {
        /// Unit vector.
        normal: Vector3<f64>,
        /// Distance of the plane from the world's origin along `normal`, m.
        height: f64,
    },
    /// All points at `radius` from `center`.
    Sphere {
        /// The centre.
        center: Point3<f64>,
        /// m.
        radius: f64,
    },
    /// All points at `radius` from the segment between `ends`.
    Capsule {
        /// The centres of the two caps.
        ends: [Point3<f64>; 2],
        /// m.
        radius: f64,
    },
    /// A box in any orientation.
    Box {
        /// The centre.
        center: Point3<f64>,
        /// The box's three axes as columns, orthonormal.
        axes: Matrix3<f64>,
        /// The distance from the centre to each pair of faces, m.
        half: Vector3<f64>,
    },
}

/// How a surface's colour varies over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One colour.
    Plain,
    /// Planks along the world's x axis.
    Wood,
    /// Lighter lines every 10 cm along the world's x and y axes.
    Grid,
}

/// What a body looks like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Surface {
    /// Reflectance of red, green and blue, linear, 0 to 1.
    pub color: [f32; 3],
    /// How the colour varies.
    pub pattern: Pattern,
    /// Strength of the highlight, 0 (chalk) to 1 (lacquer).
    pub gloss: f32,
}

/// One body of a scene.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Primitive {
    /// Where its surface is.
    pub shape: Shape,
    /// What its surface looks like.
    pub surface: Surface,
}

impl Shape {
    /// A box along the world's axes.
    pub fn upright_box(center: Point3<f64>, half: Vector3<f64>) -> Self {
        Self::Box { center, axes: Matrix3::identity(), half }
    }

    /// The smallest `t > 0` at which the ray enters the shape from outside.
    #[inline]
    pub fn hit(&self, ray: &Ray) -> Option<f64> {
        match self {
            Self::Plane { normal, height } => {
                let approach = -normal.dot(&ray.direction);
                let t = (normal.dot(&ray.origin.coords) - height) / approach;
                (approach > 0.0 && t > 0.0).then_some(t)
            }
            Self::Sphere { center, radius } => hit_sphere(ray, center, *radius),
            Self::Capsule { ends, radius } => hit_capsule(ray, ends, *radius),
            Self::Box { center, axes, half } => hit_box(ray, center, axes, half),
        }
    }

    /// The unit normal, pointing outwards, at a point of the surface.
    pub fn normal(&self, point: &Point3<f64>) -> Vector3<f64> {
        match self {
            Self::Plane { normal, .. } => *normal,
            Self::Sphere { center, radius } => (point - center) / *radius,
            Self::Capsule { ends: [a, b], radius } => {
                let along = b - a;
                let share =
                    ((point - a).dot(&along) / along.norm_squared().max(f64::MIN_POSITIVE)).clamp(0.0, 1.0);
                (point - (a + along * share)) / *radius
            }
            Self::Box { center, axes, half } => {
                let local = along(axes, &(point - center)).component_div(half);
                let face = local.iamax();
                axes.column(face) * local[face].signum()
            }
        }
    }

    /// The smallest box along the axes of another frame that contains the shape, as its lowest and highest
    /// corner in that frame, where `rotation` and `origin` take a world point to `rotation (p - origin)`.
    /// `None` for a plane, which is infinite.
    pub fn extent(
        &self,
        rotation: &Matrix3<f64>,
        origin: &Point3<f64>,
    ) -> Option<(Vector3<f64>, Vector3<f64>)> {
        let local = |point: &Point3<f64>| rotation * (point - origin);
        let (low, high, margin) = match self {
            Self::Plane { .. } => return None,
            Self::Sphere { center, radius } => (local(center), local(center), Vector3::repeat(*radius)),
            Self::Capsule { ends: [a, b], radius } => {
                let (a, b) = (local(a), local(b));
                (a.inf(&b), a.sup(&b), Vector3::repeat(*radius))
            }
            Self::Box { center, axes, half } => {
                (local(center), local(center), (rotation * axes).abs() * half)
            }
        };
        Some((low - margin, high + margin))
    }
}

fn hit_sphere(ray: &Ray, center: &Point3<f64>, radius: f64) -> Option<f64> {
    let offset = ray.origin - center;
    let (a, b, c) =
        (ray.direction.norm_squared(), offset.dot(&ray.direction), offset.norm_squared() - radius * radius);
    let discriminant = b * b - a * c;
    if discriminant < 0.0 {
        return None;
    }
    let t = (-b - discriminant.sqrt()) / a;
    (t > 0.0).then_some(t)
}

fn hit_capsule(ray: &Ray, [start, end]: &[Point3<f64>; 2], radius: f64) -> Option<f64> {
    let (axis, offset) = (end - start, ray.origin - start);
    let (length2, along, aside) = (axis.norm_squared(), axis.dot(&ray.direction), axis.dot(&offset));
    let a = length2 * ray.direction.norm_squared() - along * along;
    let b = length2 * offset.dot(&ray.direction) - aside * along;
    let c = length2 * (offset.norm_squared() - radius * radius) - aside * aside;
    let discriminant = b * b - a * c;
    if discriminant < 0.0 {
        return None;
    }
    // A ray along the axis never meets the cylinder (a = 0): the first cap on its way decides.
    let place = if a > 0.0 { aside + along * (-b - discriminant.sqrt()) / a } else { -along };
    if a > 0.0 && (0.0..=length2).contains(&place) {
        let t = (-b - discriminant.sqrt()) / a;
        return (t > 0.0).then_some(t);
    }
    hit_sphere(ray, if place < 0.0 { start } else { end }, radius)
}

/// The components of `v` along the columns of `axes`. nalgebra's `tr_mul` does the same in a loop that is
/// several times slower.
fn along(axes: &Matrix3<f64>, v: &Vector3<f64>) -> Vector3<f64> {
    Vector3::new(axes.column(0).dot(v), axes.column(1).dot(v), axes.column(2).dot(v))
}

fn hit_box(ray: &Ray, center: &Point3<f64>, axes: &Matrix3<f64>, half: &Vector3<f64>) -> Option<f64> {
    let (origin, direction) = (along(axes, &(ray.origin - center)), along(axes, &ray.direction));
    // For a ray along a face the quotients are infinite and the comparisons still correct. `f64::min` is
    // slow, since it handles NaN.
    let lesser = |a: f64, b: f64| if a < b { a } else { b };
    let greater = |a: f64, b: f64| if a > b { a } else { b };
    let inverse = direction.map(|d| 1.0 / d);
    let (low, high) = ((-half - origin).component_mul(&inverse), (half - origin).component_mul(&inverse));
    let (first, last) = (low.zip_map(&high, lesser), low.zip_map(&high, greater));
    let (enter, leave) =
        (greater(first.x, greater(first.y, first.z)), lesser(last.x, lesser(last.y, last.z)));
    (enter <= leave && enter > 0.0).then_some(enter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tilted() -> Matrix3<f64> {
        *nalgebra::Rotation3::from_euler_angles(0.4, -0.7, 1.1).matrix()
    }

    fn shapes() -> [Shape; 5] {
        let point = |x: f64, y: f64, z: f64| Point3::new(x, y, z);
        [
            Shape::Sphere { center: point(0.1, 0.2, -0.1), radius: 0.3 },
            Shape::Capsule { ends: [point(-0.3, 0.1, 0.0), point(0.2, 0.3, 0.4)], radius: 0.15 },
            Shape::Capsule { ends: [point(0.0, 0.1, 0.0); 2], radius: 0.2 },
            Shape::upright_box(point(0.1, 0.0, 0.0), Vector3::new(0.3, 0.2, 0.1)),
            Shape::Box { center: point(0.0, -0.1, 0.1), axes: tilted(), half: Vector3::new(0.3, 0.2, 0.1) },
        ]
    }

    /// How far outside a shape's surface a point is, by the definition of each shape (Euclidean outside,
    /// roughly so inside).
    fn distance(shape: &Shape, p: &Point3<f64>) -> f64 {
        match shape {
            Shape::Plane { normal, height } => normal.dot(&p.coords) - height,
            Shape::Sphere { center, radius } => (p - center).norm() - radius,
            Shape::Capsule { ends: [a, b], radius } => {
                let share = if a == b {
                    0.0
                } else {
                    ((p - a).dot(&(b - a)) / (b - a).norm_squared()).clamp(0.0, 1.0)
                };
                (p - (a + (b - a) * share)).norm() - radius
            }
            Shape::Box { center, axes, half } => {
                let local = axes.tr_mul(&(p - center));
                let outside = (local.abs() - half).sup(&Vector3::zeros()).norm();
                if outside > 0.0 { outside } else { (local.abs() - half).max() }
            }
        }
    }

    /// Rays from all sides towards, past and away from the shapes.
    fn rays() -> impl Iterator<Item = Ray> {
        (0..400).map(|k| {
            let k = f64::from(k);
            let origin = Vector3::new((k * 0.7).sin(), (k * 1.3).cos(), (k * 0.37).sin()).normalize() * 2.0;
            let aim = Vector3::new((k * 2.1).cos(), (k * 0.9).sin(), (k * 1.7).cos()) * 0.5;
            Ray { origin: origin.into(), direction: (aim - origin) * (0.5 + (k * 0.11).sin().abs()) }
        })
    }

    #[test]
    fn hits_lie_on_the_surface_and_no_part_of_the_shape_is_in_front() {
        for shape in shapes() {
            let (mut hits, mut misses) = (0, 0);
            for ray in rays() {
                let hit = shape.hit(&ray);
                let end = hit.unwrap_or(3.0);
                if let Some(t) = hit {
                    hits += 1;
                    let (point, normal) = (ray.at(t), shape.normal(&ray.at(t)));
                    assert!(distance(&shape, &point).abs() < 1e-6, "{shape:?} {ray:?}");
                    assert!((normal.norm() - 1.0).abs() < 1e-9 && normal.dot(&ray.direction) < 1e-9);
                    assert!(
                        (distance(&shape, &(point + normal * 0.01)) - 0.01).abs() < 1e-5,
                        "{shape:?} {ray:?}"
                    );
                } else {
                    misses += 1;
                }
                for k in 0..40 {
                    let before = ray.at(end * f64::from(k) / 40.0);
                    assert!(
                        distance(&shape, &before) > -1e-9,
                        "{shape:?} {ray:?} is inside the shape before {end}"
                    );
                }
            }
            assert!(hits > 30 && misses > 30, "{shape:?}: {hits} hits, {misses} misses");
        }
    }

    #[test]
    fn rays_along_an_axis_hit_too() {
        let check = |shape: Shape, origin: [f64; 3], direction: [f64; 3], expected: Option<f64>| {
            let found = shape.hit(&Ray { origin: origin.into(), direction: direction.into() });
            assert_eq!(found.map(|t| (t * 1e9).round()), expected.map(|t| (t * 1e9).round()), "{shape:?}");
        };
        let capsule =
            Shape::Capsule { ends: [Point3::new(0.0, 0.0, 0.2), Point3::new(0.0, 0.0, 0.8)], radius: 0.1 };
        check(capsule, [0.0, 0.0, 2.0], [0.0, 0.0, -1.0], Some(1.1));
        check(capsule, [0.0, 0.0, -1.0], [0.0, 0.0, 2.0], Some(0.55));
        check(capsule, [0.2, 0.0, 2.0], [0.0, 0.0, -1.0], None);
        check(capsule, [0.0, 0.0, 2.0], [0.0, 0.0, 1.0], None);
        let cube = Shape::upright_box(Point3::origin(), Vector3::repeat(0.5));
        check(cube, [0.0, 0.0, 2.0], [0.0, 0.0, -1.0], Some(1.5));
        check(cube, [0.6, 0.0, 2.0], [0.0, 0.0, -1.0], None);
        let floor = Shape::Plane { normal: Vector3::z(), height: -0.5 };
        check(floor, [0.0, 0.0, 1.0], [0.0, 1.0, -0.5], Some(3.0));
        check(floor, [0.0, 0.0, 1.0], [0.0, 1.0, 0.5], None);
        check(floor, [0.0, 0.0, -1.0], [0.0, 0.0, 1.0], None);
    }

    #[test]
    fn extents_contain_every_hit() {
        let (rotation, origin) = (tilted().transpose(), Point3::new(0.3, -0.2, 0.1));
        for shape in shapes() {
            let (low, high) = shape.extent(&rotation, &origin).expect("these shapes are finite");
            for point in rays().filter_map(|ray| shape.hit(&ray).map(|t| ray.at(t))) {
                let local = rotation * (point - origin);
                assert!((local - low).min() > -1e-9 && (high - local).min() > -1e-9, "{shape:?}");
            }
        }
    }
}
