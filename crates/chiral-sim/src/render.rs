//! A small ray caster: draws colour and depth of one instant through one camera.
//!
//! The bodies are in `scene`, the camera's position in `camera`, colours in `shade`. Here is which body each
//! pixel sees, whether the lamp reaches it, and the data structures that make this fast.
//!
//! Every pixel's depth belongs to the ray through its centre. Colours are smoothed along edges, but a pixel
//! takes on colour only from bodies behind the one its depth belongs to, never from one in front of it: **a
//! body's colour appears only where its depth does**.

use nalgebra::{Matrix3, Point3, Vector3};

use crate::camera::Pinhole;
pub use crate::shade::MAX_DEPTH;
use crate::shade::{Color, Place, background, shade, through_haze, to_display};
use crate::shape::{Primitive, Ray};

/// Bodies nearer to the camera than this, m, are not drawn.
const MIN_DEPTH: f64 = 1e-3;
/// Side of the square image tiles for which the visible bodies are listed, pixels.
const TILE: usize = 4;
/// The grid of shadow casters extends this far from `SHADOW_CENTER` across the light, m, with this many cells
/// each way.
const SHADOW_REACH: f64 = 1.6;
const SHADOW_CELLS: usize = 64;
const SHADOW_CENTER: Point3<f64> = Point3::new(0.4, 0.0, 0.0);

/// The bodies of one instant, prepared to be drawn by any number of cameras.
#[derive(Debug, Clone)]
pub struct Instant {
    bodies: Vec<Primitive>,
    /// The highest z of each body. Light comes from above, so a body shades only what is lower.
    tops: Vec<f64>,
    /// The light's axes as rows; the third points to the lamp.
    light: Matrix3<f64>,
    casters: Bins,
}

impl Instant {
    /// Prepares these bodies.
    pub fn new(bodies: Vec<Primitive>) -> Self {
        let to_light = Vector3::new(-0.38, -0.42, 1.0).normalize();
        let side = to_light.cross(&Vector3::x()).normalize();
        let light =
            Matrix3::from_rows(&[side.cross(&to_light).transpose(), side.transpose(), to_light.transpose()]);
        let mut casters: Vec<_> = (0..)
            .zip(&bodies)
            .filter_map(|(index, body)| {
                let (low, high) = body.shape.extent(&light, &SHADOW_CENTER)?;
                Some(Span {
                    index,
                    columns: [shadow_cell(low.x), shadow_cell(high.x)],
                    rows: [shadow_cell(low.y), shadow_cell(high.y)],
                    near: 0.0,
                })
            })
            .collect();
        let casters = Bins::new(SHADOW_CELLS, SHADOW_CELLS, &mut casters);
        let top = |body: &Primitive| {
            body.shape
                .extent(&Matrix3::identity(), &Point3::origin())
                .map_or(f64::INFINITY, |(_, high)| high.z)
        };
        let tops = bodies.iter().map(top).collect();
        Self { bodies, tops, light, casters }
    }

    /// Draws what `camera` sees into `rgb`, (H, W, 3) row by row, and `depth`, (H, W), metres along the
    /// optical axis, 0 where nothing is seen within [`MAX_DEPTH`].
    ///
    /// # Panics
    /// If a buffer's length does not fit the camera's width and height.
    pub fn render(&self, camera: &Pinhole, rgb: &mut [u8], depth: &mut [f32]) {
        let (width, height) = (camera.width, camera.height);
        assert_eq!(
            (rgb.len(), depth.len()),
            (width * height * 3, width * height),
            "rgb and depth of {width} x {height} pixels"
        );
        let visible = self.visible_bodies(camera);
        let pixels = || (0..height).flat_map(move |v| (0..width).map(move |u| (u, v)));
        let candidates = |u: usize, v: usize| visible.list(u / TILE, v / TILE);

        let samples: Vec<Sample> =
            pixels().map(|(u, v)| self.sample(&camera.ray(u as f64, v as f64), candidates(u, v))).collect();
        for (pixel, (u, v)) in pixels().enumerate() {
            let inside = [
                (u > 0, -1),
                (u + 1 < width, 1),
                (v > 0, -(width as isize)),
                (v + 1 < height, width as isize),
            ];
            let neighbour =
                |(inside, step): (bool, isize)| inside.then(|| &samples[pixel.wrapping_add_signed(step)]);
            let color = samples[pixel].smoothed(inside.map(neighbour));
            rgb[3 * pixel..][..3].copy_from_slice(&<[u8; 3]>::from(color.map(|c| (c * 255.0 + 0.5) as u8)));
            depth[pixel] = samples[pixel].depth;
        }
    }

    /// Lists the bodies that may be visible in each tile of the image.
    fn visible_bodies(&self, camera: &Pinhole) -> Bins {
        let (columns, rows) = (camera.width.div_ceil(TILE), camera.height.div_ceil(TILE));
        let (rotation, origin, k) = (camera.rotation().transpose(), camera.position(), &camera.intrinsics);
        let span = |(index, body): (u16, &Primitive)| {
            let Some((low, high)) = body.shape.extent(&rotation, &origin) else {
                // Every other body that a ray meets is in front of the plane.
                return Some(Span {
                    index,
                    near: MAX_DEPTH,
                    columns: [0, columns as isize - 1],
                    rows: [0, rows as isize - 1],
                });
            };
            if high.z < MIN_DEPTH {
                return None;
            }
            // A box in front of the camera appears widest at its near or at its far face. One pixel more
            // allows for rounding.
            let near = low.z.max(MIN_DEPTH);
            let tiles = |low_side: f64, high_side: f64, focal: f64, center: f64| {
                let first = focal * (low_side / near).min(low_side / high.z) + center - 1.0;
                let last = focal * (high_side / near).max(high_side / high.z) + center + 1.0;
                [first, last].map(|image| (image / TILE as f64).floor() as isize)
            };
            let columns = tiles(low.x, high.x, k[(0, 0)], k[(0, 2)]);
            Some(Span { index, near, columns, rows: tiles(low.y, high.y, k[(1, 1)], k[(1, 2)]) })
        };
        Bins::new(columns, rows, &mut (0..).zip(&self.bodies).filter_map(span).collect::<Vec<_>>())
    }

    /// Finds the nearest of the candidates along `ray`, whose parameter is the depth.
    fn sample(&self, ray: &Ray, candidates: &[(f64, u16)]) -> Sample {
        let mut nearest = (MAX_DEPTH, None);
        for &(near, index) in candidates {
            if near > nearest.0 {
                break;
            }
            if let Some(t) = self.bodies[index as usize].shape.hit(ray)
                && t < nearest.0
            {
                nearest = (t, Some(index));
            }
        }
        let (t, Some(index)) = nearest else {
            return Sample { color: to_display(background(&ray.direction)), depth: 0.0, surface_id: 0 };
        };
        let body = &self.bodies[index as usize];
        let point = ray.at(t);
        let normal = body.shape.normal(&point);
        let lit = normal.dot(&self.to_light()) > 0.0 && !self.in_shadow(&(point + normal * 1e-4));
        let color = shade(&body.surface, &Place { point, normal, lit }, &ray.direction, &self.to_light());
        let color = through_haze(color, t, &ray.direction);
        Sample { color: to_display(color), depth: t as f32, surface_id: 2 * index + 1 + u16::from(lit) }
    }

    fn to_light(&self) -> Vector3<f64> {
        self.light.row(2).transpose()
    }

    fn in_shadow(&self, point: &Point3<f64>) -> bool {
        let place = self.light * (point - SHADOW_CENTER);
        let (column, row) = (shadow_cell(place.x), shadow_cell(place.y));
        let cells = 0..SHADOW_CELLS as isize;
        if !cells.contains(&column) || !cells.contains(&row) {
            return false;
        }
        let ray = Ray { origin: *point, direction: self.to_light() };
        self.casters.list(column as usize, row as usize).iter().any(|&(_, index)| {
            self.tops[index as usize] > point.z && self.bodies[index as usize].shape.hit(&ray).is_some()
        })
    }
}

/// The result of one ray.
struct Sample {
    /// Display values, 0 to 1.
    color: Color,
    /// m along the optical axis, 0 for the background.
    depth: f32,
    /// Identifies the body and whether it is lit there. An edge is where this changes.
    surface_id: u16,
}

impl Sample {
    /// Mixes in a little of the neighbours that see another surface, which is behind this one or, where
    /// bodies touch, at the same depth.
    fn smoothed(&self, neighbours: [Option<&Self>; 4]) -> Color {
        const SAME_DEPTH: f32 = 0.02;
        const SHARE: f32 = 0.12;
        let mut color = self.color;
        for other in neighbours.into_iter().flatten().filter(|other| other.surface_id != self.surface_id) {
            let in_front = other.depth > 0.0 && (self.depth == 0.0 || other.depth < self.depth - SAME_DEPTH);
            if !in_front {
                color += (other.color - self.color) * SHARE;
            }
        }
        color
    }
}

fn shadow_cell(across: f64) -> isize {
    ((across / SHADOW_REACH + 1.0) / 2.0 * SHADOW_CELLS as f64) as isize
}

/// The first and last cells of a grid that a body may occupy. They may lie outside the grid.
struct Span {
    index: u16,
    columns: [isize; 2],
    rows: [isize; 2],
    /// No point of the body has a lower ray parameter than this.
    near: f64,
}

/// A grid of lists of bodies. Each body is stored with its `near`, and each list has the nearest first.
#[derive(Debug, Clone)]
struct Bins {
    columns: usize,
    starts: Vec<u32>,
    items: Vec<(f64, u16)>,
}

impl Bins {
    fn new(columns: usize, rows: usize, spans: &mut [Span]) -> Self {
        spans.sort_by(|a, b| a.near.total_cmp(&b.near));
        let mut entries = Vec::new();
        for span in spans {
            for row in span.rows[0].max(0)..(span.rows[1] + 1).min(rows as isize) {
                for column in span.columns[0].max(0)..(span.columns[1] + 1).min(columns as isize) {
                    entries.push((row as usize * columns + column as usize, (span.near, span.index)));
                }
            }
        }
        // A counting sort by cell, which keeps the order within a cell.
        let mut starts = vec![0; columns * rows + 1];
        for (cell, _) in &entries {
            starts[cell + 1] += 1;
        }
        for cell in 0..columns * rows {
            starts[cell + 1] += starts[cell];
        }
        let (mut next, mut items) = (starts.clone(), vec![(0.0, 0); entries.len()]);
        for (cell, item) in entries {
            items[next[cell] as usize] = item;
            next[cell] += 1;
        }
        Self { columns, starts, items }
    }

    fn list(&self, column: usize, row: usize) -> &[(f64, u16)] {
        let cell = row * self.columns + column;
        &self.items[self.starts[cell] as usize..self.starts[cell + 1] as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::camera::look_at;
    use crate::shape::{Pattern, Shape, Surface};

    const CENTER: Point3<f64> = Point3::new(0.5, 0.1, 0.2);
    const RADIUS: f64 = 0.15;

    fn body(shape: Shape, color: [f32; 3]) -> Primitive {
        Primitive { shape, surface: Surface { color, pattern: Pattern::Plain, gloss: 0.2 } }
    }

    fn ball(color: [f32; 3]) -> Primitive {
        body(Shape::Sphere { center: CENTER, radius: RADIUS }, color)
    }

    /// A camera whose optical axis goes through `at`, of odd size so that the middle pixel lies on it.
    fn camera(at: Point3<f64>) -> Pinhole {
        Pinhole::new(161, 121, 1.0, &look_at(Point3::new(0.3, -1.0, 0.8), at))
    }

    fn draw(bodies: Vec<Primitive>, camera: &Pinhole) -> (Vec<u8>, Vec<f32>) {
        let pixels = camera.width * camera.height;
        // The buffers' previous contents must not matter.
        let (mut rgb, mut depth) = (vec![77; pixels * 3], vec![f32::NAN; pixels]);
        Instant::new(bodies).render(camera, &mut rgb, &mut depth);
        (rgb, depth)
    }

    #[test]
    fn the_nearest_point_of_a_sphere_is_one_radius_in_front_of_its_centre() {
        let camera = camera(CENTER);
        let (_, depth) = draw(vec![ball([0.8, 0.0, 0.0])], &camera);
        let expected = (CENTER - camera.position()).norm() - RADIUS;
        assert!((f64::from(depth[60 * 161 + 80]) - expected).abs() < 1e-6);
        assert_eq!(depth[0], 0.0, "expected no body in the corner");
    }

    #[test]
    fn every_pixel_of_a_sphere_back_projects_onto_it() {
        let camera = camera(Point3::new(0.3, 0.0, 0.3));
        let (_, depth) = draw(vec![ball([0.8, 0.0, 0.0])], &camera);
        let hits = (0..depth.len()).filter(|&pixel| depth[pixel] > 0.0).inspect(|&pixel| {
            let point =
                camera.back_project((pixel % 161) as f64, (pixel / 161) as f64, f64::from(depth[pixel]));
            assert!(((point - CENTER).norm() - RADIUS).abs() < 1e-5, "{point}");
        });
        assert!(hits.count() > 500);
    }

    #[test]
    fn a_sphere_appears_where_its_centre_projects_in_its_own_colour() {
        let camera = camera(Point3::new(0.3, 0.0, 0.3));
        for (channel, color) in [[0.8, 0.0, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 0.8]].into_iter().enumerate() {
            let (rgb, _) = draw(vec![ball(color)], &camera);
            let value = |pixel: &usize, c: usize| i32::from(rgb[3 * pixel + c]);
            let strong =
                |pixel: &usize| (0..3).all(|c| c == channel || value(pixel, channel) > 2 * value(pixel, c));
            let found: Vec<_> = (0..161 * 121).filter(strong).collect();
            let mean = |of: fn(usize) -> usize| {
                found.iter().map(|&pixel| of(pixel) as f64).sum::<f64>() / found.len() as f64
            };
            let (u, v, _) = camera.project(&CENTER).unwrap();
            // A sphere off the axis appears as an ellipse, whose middle lies a little further out.
            let (du, dv) = (mean(|pixel| pixel % 161) - u, mean(|pixel| pixel / 161) - v);
            assert!(du.abs() < 1.0 && dv.abs() < 1.0, "channel {channel} is off by {du}, {dv}");
        }
    }

    #[test]
    fn tiles_omit_no_visible_body() {
        let boxed =
            |x: f64, y: f64, z: f64| Shape::upright_box(Point3::new(x, y, z), Vector3::new(0.1, 0.2, 0.05));
        let capsule =
            Shape::Capsule { ends: [Point3::new(0.2, -1.3, 1.0), Point3::new(0.4, -0.3, 0.2)], radius: 0.1 };
        let ground = Shape::Plane { normal: Vector3::z(), height: 0.0 };
        let shapes = [boxed(0.5, 0.0, 0.3), ground, capsule, boxed(0.2, -0.9, 0.2), boxed(-0.2, 0.3, 0.3)];
        let bodies: Vec<_> =
            shapes.map(|shape| body(shape, [0.5; 3])).into_iter().chain([ball([0.8, 0.0, 0.0])]).collect();
        for (width, height) in [(161, 121), (50, 70), (1, 1)] {
            let camera = Pinhole { width, height, ..camera(CENTER) };
            let (_, depth) = draw(bodies.clone(), &camera);
            for (pixel, depth) in depth.into_iter().enumerate() {
                let ray = camera.ray((pixel % width) as f64, (pixel / width) as f64);
                let nearest =
                    bodies.iter().filter_map(|body| body.shape.hit(&ray)).fold(f64::INFINITY, f64::min);
                let expected = if nearest < MAX_DEPTH { nearest as f32 } else { 0.0 };
                assert_eq!(depth, expected, "pixel {pixel} of {width} x {height}");
            }
        }
    }

    #[test]
    fn a_colour_appears_only_where_its_depth_does() {
        let camera = camera(Point3::new(0.3, 0.0, 0.3));
        let wall =
            body(Shape::upright_box(Point3::new(0.3, 1.0, 0.3), Vector3::new(3.0, 0.1, 3.0)), [0.1; 3]);
        let (rgb, depth) = draw(vec![wall, ball([0.8, 0.0, 0.0])], &camera);
        for (pixel, depth) in depth.into_iter().enumerate() {
            let point = camera.back_project((pixel % 161) as f64, (pixel / 161) as f64, f64::from(depth));
            let [r, g, _] = [0, 1, 2].map(|c| i32::from(rgb[3 * pixel + c]));
            let on_ball = (point - CENTER).norm() < RADIUS + 1e-3;
            assert!(on_ball || r <= g + 3, "{point} is red");
        }
    }

    #[test]
    fn bodies_cast_shadows_away_from_the_light() {
        let ground = body(Shape::Plane { normal: Vector3::z(), height: 0.0 }, [0.5; 3]);
        let camera = camera(CENTER);
        let (bare, _) = draw(vec![ground], &camera);
        let (shaded, depth) = draw(vec![ground, ball([0.8, 0.0, 0.0])], &camera);
        // The light comes from low x and low y.
        let darker = |pixel: &usize| i32::from(bare[3 * pixel]) > i32::from(shaded[3 * pixel]) + 40;
        let on_ground = |pixel: &usize| {
            camera.back_project((pixel % 161) as f64, (pixel / 161) as f64, f64::from(depth[*pixel]))
        };
        let shadow: Vec<_> = (0..161 * 121)
            .filter(darker)
            .map(|pixel| on_ground(&pixel))
            .filter(|point| point.z.abs() < 1e-3)
            .collect();
        assert!(shadow.len() > 100);
        let middle = shadow.iter().map(|point| point.coords).sum::<Vector3<f64>>() / shadow.len() as f64;
        assert!(middle.x > CENTER.x && middle.y > CENTER.y, "the shadow lies around {middle}");
    }

    #[test]
    #[should_panic(expected = "rgb and depth of 161 x 121 pixels")]
    fn buffers_of_another_size_are_refused() {
        Instant::new(Vec::new()).render(&camera(CENTER), &mut [0; 3], &mut [0.0; 1]);
    }
}
