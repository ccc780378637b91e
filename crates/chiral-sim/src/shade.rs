//! How a surface is lit: its colour and pattern, one lamp, the light of sky and ground, a highlight, haze.
//!
//! Lives here: everything about colour. Does not live here: which surface a pixel sees and whether the lamp
//! reaches it (`render`). Shading keeps hues: a red surface stays red in the shade and under the highlight,
//! so that it can be found by its colour.

use nalgebra::{Point3, Vector3};

use crate::render::MAX_DEPTH;
use crate::shape::{Pattern, Surface};

/// Red, green and blue, linear light unless told otherwise.
pub(crate) type Color = Vector3<f32>;

/// A point of a surface.
pub(crate) struct Place {
    pub(crate) point: Point3<f64>,
    /// Unit vector outwards.
    pub(crate) normal: Vector3<f64>,
    /// Whether the lamp reaches the point.
    pub(crate) lit: bool,
}

/// The light that a surface sends back at `place` to where `view` comes from; the lamp is in the direction
/// `to_light` (unit).
pub(crate) fn shade(surface: &Surface, place: &Place, view: &Vector3<f64>, to_light: &Vector3<f64>) -> Color {
    const KEY: f32 = 0.78;
    const SKY: Color = Color::new(0.36, 0.39, 0.44);
    const GROUND: Color = Color::new(0.17, 0.15, 0.13);
    let (albedo, gloss) = (albedo(surface, &place.point), surface.gloss);
    let mut light = GROUND.lerp(&SKY, (place.normal.z * 0.5 + 0.5) as f32);
    if place.lit {
        light += Color::repeat(KEY * place.normal.dot(to_light) as f32);
    }
    let mut color = albedo.component_mul(&light);
    if gloss > 0.0 {
        let view = view.normalize();
        let rim = (1.0 + place.normal.dot(&view)).clamp(0.0, 1.0) as f32;
        color += SKY * (rim.powi(4) * 0.35 * gloss);
        if place.lit {
            let highlight = place.normal.dot(&(to_light - view).normalize()).max(0.0) as f32;
            color += Color::repeat(highlight.powi(40) * 0.5 * gloss);
        }
    }
    color
}

fn albedo(surface: &Surface, point: &Point3<f64>) -> Color {
    let color = Color::from(surface.color);
    match surface.pattern {
        Pattern::Plain => color,
        Pattern::Grid => {
            // As soft and wide as a pixel of a small picture, so that the lines do not break up in it.
            let line = |x: f64| 1.0 - (fraction(x / 0.1 + 0.08) / 0.08 - 1.0).abs().min(1.0);
            color * (1.0 + 0.8 * line(point.x - 0.04).max(line(point.y))) as f32
        }
        Pattern::Wood => {
            const PLANK: f64 = 0.145;
            let across = fraction(point.y / PLANK);
            let tone = fraction((point.y / PLANK - across) * 0.618 + 0.3);
            // Fine grain across the plank, bent by a slow wave along it.
            let grain = wave(across * 3.0 + 0.6 * wave(point.x * 0.7 + tone * 5.0));
            let seam = 0.22 * (1.0 - across / 0.08).max(0.0);
            color * (0.84 + 0.20 * tone - 0.10 * grain - seam) as f32
        }
    }
}

/// What `x` has more than the next lower whole number. Right for `x` above -1000, and faster than `floor`
/// without SSE 4.1.
fn fraction(x: f64) -> f64 {
    let x = x + 1000.0;
    x - x as i64 as f64
}

/// A smooth wave from 0 at whole numbers to 1 midway, made of parabolas.
fn wave(x: f64) -> f64 {
    let x = fraction(x);
    4.0 * x * (1.0 - x)
}

/// The colour behind everything: bright at the horizon, calmer above.
pub(crate) fn background(direction: &Vector3<f64>) -> Color {
    let up = (direction.z / direction.norm()) as f32;
    let (horizon, above) = (Color::new(0.70, 0.74, 0.78), Color::new(0.30, 0.40, 0.52));
    horizon.lerp(&above, (up * 1.6).clamp(0.0, 1.0))
}

/// `color` as seen through the haze from the depth `t`, in a direction: at [`MAX_DEPTH`] nothing but the
/// background is left of it.
pub(crate) fn through_haze(color: Color, t: f64, direction: &Vector3<f64>) -> Color {
    const START: f64 = 1.8;
    if t <= START {
        return color;
    }
    let share = ((t - START) / (MAX_DEPTH - START)) as f32;
    color.lerp(&background(direction), share * (2.0 - share))
}

/// From linear light to what is shown, 0 to 1, with a gamma of 2.
pub(crate) fn shown(light: Color) -> Color {
    light.map(|c| c.clamp(0.0, 1.0).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_red_surface_stays_red_in_any_light() {
        let red = Surface { color: [0.80, 0.008, 0.012], pattern: Pattern::Plain, gloss: 0.1 };
        let to_light = Vector3::new(-0.3, -0.4, 1.0).normalize();
        for k in 0..500 {
            let k = f64::from(k);
            let normal = Vector3::new((k * 0.7).sin(), (k * 1.3).cos(), (k * 0.37).sin()).normalize();
            let view =
                Vector3::new((k * 0.3).cos(), (k * 1.9).sin(), -(k * 0.77).sin().abs() - 0.2).normalize();
            if normal.dot(&view) >= 0.0 {
                continue;
            }
            let lit = normal.dot(&to_light) > 0.0 && k % 3.0 > 0.0;
            let seen = shown(shade(&red, &Place { point: Point3::origin(), normal, lit }, &view, &to_light));
            assert!(
                seen.x > 0.3 && seen.x > 2.0 * seen.y.max(seen.z),
                "{seen} with normal {normal} seen along {view}"
            );
        }
    }

    #[test]
    fn haze_ends_in_the_background() {
        let (color, direction) = (Color::new(0.1, 0.2, 0.3), Vector3::new(0.5, 0.5, -0.1));
        assert_eq!(through_haze(color, 1.0, &direction), color);
        assert!((through_haze(color, MAX_DEPTH, &direction) - background(&direction)).norm() < 1e-6);
    }

    #[test]
    fn waves_are_periodic() {
        for (x, expected) in [(0.0, 0.0), (0.5, 1.0), (1.0, 0.0), (-0.25, 0.75), (7.75, 0.75)] {
            assert!((wave(x) - expected).abs() < 1e-9, "wave({x})");
        }
    }
}
