//! A contact sheet of an episode, for people: what the policy received from each camera, depth in colours.
//!
//! The drawing operations are in `canvas`.

use std::fs::File;
use std::io;
use std::path::Path;

use chiral_proto::Camera;
use nalgebra::{Point3, Vector4};

use crate::canvas::{Canvas, LETTER, Rgb};
use crate::episode::{Episode, Snapshot};

/// The space between and around images, pixels.
const MARGIN: usize = 8;
/// Height of a caption, pixels.
const LINE: usize = 15;
/// Height of the title, pixels.
const TITLE: usize = 34;
/// Images are enlarged to at least this width, pixels.
const MIN_WIDTH: usize = 320;

const DARK: Rgb = [17, 19, 24];
const TEXT: Rgb = [150, 158, 172];
const BRIGHT: Rgb = [236, 240, 246];
const GOOD: Rgb = [120, 220, 140];
const BAD: Rgb = [255, 120, 100];

/// Writes the sheet as PNG: colour and depth of each camera, the first observation above the last, with a
/// ring where the policy believed the target to be.
///
/// # Errors
/// Those of the file.
pub fn save(episode: &Episode, path: &Path) -> io::Result<()> {
    draw(episode).encode(File::create(path)?)
}

fn draw(episode: &Episode) -> Canvas {
    let cameras = &episode.first.obs.cameras;
    let panels: Vec<Panel> = cameras.iter().filter_map(|camera| Panel::of(camera, episode)).collect();
    let columns = (1..).find(|n| n * n >= panels.len()).unwrap_or(1).max(panels.len().min(2));
    let block = |f: fn(&Panel) -> usize| panels.iter().map(f).max().unwrap_or(0);
    let (block_width, block_height) =
        (block(|p| 2 * (p.width() + MARGIN)), block(|p| 2 * (p.height() + LINE + MARGIN)));
    let rows = panels.len().div_ceil(columns);
    let mut canvas = Canvas::new(MARGIN + columns * block_width, TITLE + rows * block_height, DARK);
    title(&mut canvas, episode);
    for (i, panel) in panels.iter().enumerate() {
        let corner = [MARGIN + i % columns * block_width, TITLE + i / columns * block_height];
        for (row, snapshot, when) in [(0, &episode.first, "first"), (1, &episode.last, "last")] {
            panel.draw(
                &mut canvas,
                [corner[0], corner[1] + row * (panel.height() + LINE + MARGIN)],
                snapshot,
                when,
            );
        }
    }
    canvas
}

fn title(canvas: &mut Canvas, episode: &Episode) {
    let at = [MARGIN, MARGIN + 3];
    let name = format!("seed {}", episode.seed);
    canvas.write(at, 2, BRIGHT, &name);
    let (outcome, color) = if episode.success { ("reached", GOOD) } else { ("not reached", BAD) };
    canvas.write([at[0] + (name.len() + 2) * LETTER * 2, at[1]], 2, color, outcome);
    let figures = format!("{:.2} s, {} actions", episode.last.obs.timestamp, episode.steps);
    canvas.write([at[0] + (name.len() + outcome.len() + 4) * LETTER * 2, at[1]], 2, TEXT, &figures);
}

/// The layout of one camera's images.
struct Panel {
    camera: String,
    size: [usize; 2],
    scale: usize,
    /// The range of depths in both observations, m.
    nearest: f32,
    farthest: f32,
}

impl Panel {
    /// `None` for a camera whose images are not 8-bit red, green and blue.
    fn of(camera: &Camera, episode: &Episode) -> Option<Panel> {
        let &[height, width, 3] = camera.image.shape() else { return None };
        camera.image.values::<u8>().ok()?;
        let snapshots = [&episode.first, &episode.last];
        let mut depths: Vec<f32> =
            snapshots.into_iter().flat_map(|snapshot| depths(find(snapshot, &camera.name))).collect();
        depths.retain(|z| z.is_finite() && *z > 0.0);
        depths.sort_unstable_by(f32::total_cmp);
        // Ignore a few extreme pixels at either end, so that the colours cover the others.
        let share = |percent: usize| depths.get(depths.len().saturating_sub(1) * percent / 100).copied();
        Some(Panel {
            camera: camera.name.to_string(),
            size: [width, height],
            scale: MIN_WIDTH.div_ceil(width),
            nearest: share(4).unwrap_or(0.1),
            farthest: share(86).unwrap_or(1.0),
        })
    }

    fn width(&self) -> usize {
        self.size[0] * self.scale
    }

    fn height(&self) -> usize {
        self.size[1] * self.scale
    }

    /// Draws colour and depth side by side with captions above.
    fn draw(&self, canvas: &mut Canvas, corner: [usize; 2], snapshot: &Snapshot, when: &str) {
        let camera = find(snapshot, &self.camera);
        let [left, top] = [corner[0], corner[1] + LINE];
        let right = left + self.width() + MARGIN;
        canvas.write([left, corner[1] + 3], 1, BRIGHT, &self.camera);
        let time = format!("{when}, {:.2} s", snapshot.obs.timestamp);
        canvas.write([left + (self.camera.len() + 2) * LETTER, corner[1] + 3], 1, TEXT, &time);
        canvas.write(
            [right, corner[1] + 3],
            1,
            TEXT,
            &format!("depth {:.2} - {:.2} m", self.nearest, self.farthest),
        );

        let Some(camera) = camera else { return };
        let image = camera.image.values::<u8>().unwrap_or_default();
        canvas.paste(
            [left, top],
            self.size[0],
            self.scale,
            image.chunks_exact(3).map(|rgb| [rgb[0], rgb[1], rgb[2]]),
        );
        canvas.paste(
            [right, top],
            self.size[0],
            self.scale,
            depths(Some(camera)).into_iter().map(|z| self.color(z)),
        );
        let Some((x, y, radius)) = snapshot.target.and_then(|target| self.place(camera, &target)) else {
            return;
        };
        for left in [left, right] {
            let high = [left + self.width(), top + self.height()];
            canvas.ring([left as f64 + x, top as f64 + y], radius, [left, top], high, BRIGHT);
        }
    }

    /// The target's position in the scaled image, and the radius of a ring around it.
    fn place(&self, camera: &Camera, target: &Point3<f64>) -> Option<(f64, f64, f64)> {
        const RING: f64 = 0.032;
        let to_camera = camera.extrinsics.try_inverse()?;
        let local = (to_camera * Vector4::new(target.x, target.y, target.z, 1.0)).xyz();
        let image = camera.intrinsics * local;
        // A pixel's centre is at its integer coordinates; in the scaled image it is half a large pixel
        // further.
        let scaled = |image: f64| (image + 0.5) * self.scale as f64;
        let radius = (camera.intrinsics[(0, 0)] * RING / local.z * self.scale as f64).max(7.0);
        (local.z > 0.01).then(|| (scaled(image.x / image.z), scaled(image.y / image.z), radius))
    }

    /// Near depths are warm, far ones cold, unknown ones dark.
    fn color(&self, z: f32) -> Rgb {
        if !(z.is_finite() && z > 0.0) {
            return [34, 36, 42];
        }
        // A logarithmic scale separates near depths as well as far ones.
        let share = (self.farthest / z).ln() / (self.farthest / self.nearest).ln().max(1e-3);
        turbo(0.05 + 0.9 * share.clamp(0.0, 1.0))
    }
}

fn find<'a>(snapshot: &'a Snapshot, name: &str) -> Option<&'a Camera> {
    snapshot.obs.camera(name).ok()
}

fn depths(camera: Option<&Camera>) -> Vec<f32> {
    let depth = camera.and_then(|camera| camera.depth.as_ref());
    depth.and_then(|depth| depth.values().ok()).unwrap_or_default().into_owned()
}

/// The colour map Turbo, from dark blue at 0 to dark red at 1 (A. Mikhailov, 2019; polynomials by R. Du).
fn turbo(x: f32) -> Rgb {
    const RED: [f32; 6] = [0.1357, 4.6154, -42.66, 132.131, -152.942, 59.286];
    const GREEN: [f32; 6] = [0.0914, 2.1942, 4.843, -14.185, 4.2773, 2.8296];
    const BLUE: [f32; 6] = [0.1067, 12.642, -60.582, 110.363, -89.903, 27.348];
    [RED, GREEN, BLUE].map(|polynomial| {
        let value = polynomial.iter().rev().fold(0.0, |sum, factor| sum * x + factor);
        (value.clamp(0.0, 1.0) * 255.0) as u8
    })
}
