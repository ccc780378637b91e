//! The colours of surfaces: albedo and pattern, one lamp, the light of sky and ground, a highlight, haze.
//!
//! Which surface a pixel sees and whether the lamp reaches it is decided in `render`. Shading keeps hues: a
//! red surface stays red in the shade and under the highlight, so that its colour identifies it.

use nalgebra::{Point3, Vector3};

use crate::shape::{Pattern, Surface};

/// Bodies further away than this along the optical axis, m, are background and have depth 0.
pub const MAX_DEPTH: f64 = 6.0;

/// Red, green and blue, linear light unless stated otherwise.
pub(crate) type Color = Vector3<f32>;

/// A point of a surface.
pub(crate) struct Place {
    pub(crate) point: Point3<f64>,
    /// The outward unit normal.
    pub(crate) normal: Vector3<f64>,
    /// Whether the lamp reaches the point.
    pub(crate) lit: bool,
}

/// The light that a surface reflects at `place` towards the origin of the ray `view`; `to_light` is the unit
/// direction of the lamp.
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
            // As soft and wide as a pixel of a small image, so that the lines do not break up.
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

/// The fractional part of `x`, for `x` above -1000. Faster than `floor` without SSE 4.1.
fn fraction(x: f64) -> f64 {
    let x = x + 1000.0;
    x - x as i64 as f64
}

/// A smooth wave of parabolas, 0 at integers and 1 midway.
fn wave(x: f64) -> f64 {
    let x = fraction(x);
    4.0 * x * (1.0 - x)
}

/// The colour of the background: bright at the horizon, darker above.
pub(crate) fn background(direction: &Vector3<f64>) -> Color {
    let up = (direction.z / direction.norm()) as f32;
    let (horizon, above) = (Color::new(0.70, 0.74, 0.78), Color::new(0.30, 0.40, 0.52));
    horizon.lerp(&above, (up * 1.6).clamp(0.0, 1.0))
}

/// `color` as seen through haze at the depth `t` in this direction. At [`MAX_DEPTH`] only the background
/// remains.
pub(crate) fn through_haze(color: Color, t: f64, direction: &Vector3<f64>) -> Color {
    const START: f64 = 1.8;
    if t <= START {
        return color;
    }
    let share = ((t - START) / (MAX_DEPTH - START)) as f32;
    color.lerp(&background(direction), share * (2.0 - share))
}

/// Converts linear light to display values, 0 to 1, with a gamma of 2.
pub(crate) fn to_display(light: Color) -> Color {
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
            let seen =
                to_display(shade(&red, &Place { point: Point3::origin(), normal, lit }, &view, &to_light));
            assert!(
                seen.x > 0.3 && seen.x > 2.0 * seen.y.max(seen.z),
                "{seen} with normal {normal} seen along {view}"
            );
        }
    }

    #[test]
    fn haze_fades_into_the_background() {
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
