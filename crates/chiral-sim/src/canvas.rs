//! An image in memory to draw on: pasted images, rings, small capital letters, PNG.
//!
//! What is drawn is decided in `sheet`.

use std::io::{self, BufWriter, Write};

/// 8-bit red, green and blue.
pub(crate) type Rgb = [u8; 3];

/// Width of a letter with the gap after it, pixels, at scale 1.
pub(crate) const LETTER: usize = 6;

/// An image of 8-bit red, green and blue.
#[derive(Clone, Debug)]
pub(crate) struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<Rgb>,
}

impl Canvas {
    pub(crate) fn new(width: usize, height: usize, color: Rgb) -> Canvas {
        Canvas { width, height, pixels: vec![color; width * height] }
    }

    /// Sets a pixel; does nothing outside the image.
    fn set(&mut self, x: isize, y: isize, color: Rgb) {
        if (0..self.width as isize).contains(&x) && (0..self.height as isize).contains(&y) {
            self.pixels[y as usize * self.width + x as usize] = color;
        }
    }

    /// A square of `side` pixels with its upper left corner at `(x, y)`.
    fn square(&mut self, [x, y]: [usize; 2], side: usize, color: Rgb) {
        for (dx, dy) in (0..side * side).map(|k| (k % side, k / side)) {
            self.set((x + dx) as isize, (y + dy) as isize, color);
        }
    }

    /// Pastes an image of `width` columns with its upper left corner at `(x, y)`, each pixel enlarged `scale`
    /// times.
    pub(crate) fn paste(
        &mut self,
        [x, y]: [usize; 2],
        width: usize,
        scale: usize,
        image: impl Iterator<Item = Rgb>,
    ) {
        for (i, color) in image.enumerate() {
            self.square([x + i % width * scale, y + i / width * scale], scale, color);
        }
    }

    /// Draws a ring with dark edges and four ticks that leaves its inside visible. It is clipped to the box
    /// from `low` to `high`.
    pub(crate) fn ring(
        &mut self,
        [x, y]: [f64; 2],
        radius: f64,
        low: [usize; 2],
        high: [usize; 2],
        color: Rgb,
    ) {
        let reach = radius + 10.0;
        let span = |middle: f64, low: usize, high: usize| {
            let (first, last) = ((middle - reach).floor() as isize, (middle + reach).ceil() as isize);
            first.max(low as isize)..(last + 1).min(high as isize)
        };
        for row in span(y, low[1], high[1]) {
            for column in span(x, low[0], high[0]) {
                let (dx, dy) = ((column as f64 - x).abs(), (row as f64 - y).abs());
                let from_ring = (dx.hypot(dy) - radius).abs();
                let is_tick = dx.min(dy) <= 0.6 && (radius + 2.0..radius + 8.0).contains(&dx.max(dy));
                if from_ring <= 1.0 || is_tick {
                    self.set(column, row, color);
                } else if from_ring <= 2.0 {
                    self.set(column, row, [0, 0, 0]);
                }
            }
        }
    }

    /// Writes text with its upper left corner at `(x, y)`: capital letters, digits and a few signs. Lower
    /// case is written in capitals, unknown characters as spaces.
    pub(crate) fn write(&mut self, [x, y]: [usize; 2], scale: usize, color: Rgb, text: &str) {
        for (i, letter) in text.chars().enumerate() {
            let letter = letter.to_ascii_uppercase();
            let bits = LETTERS.iter().find(|(known, _)| *known == letter).map_or(0, |(_, bits)| *bits);
            for k in (0..35).filter(|k| bits >> (34 - k) & 1 == 1) {
                self.square([x + (i * LETTER + k % 5) * scale, y + k / 5 * scale], scale, color);
            }
        }
    }

    /// Writes the image as a PNG file.
    pub(crate) fn encode(&self, writer: impl Write) -> io::Result<()> {
        let mut encoder = png::Encoder::new(BufWriter::new(writer), self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(self.pixels.as_flattened())?;
        Ok(writer.finish()?)
    }
}

/// Letters of 5 x 7 pixels, row by row, the first pixel in the highest of 35 bits.
#[rustfmt::skip]
const LETTERS: [(char, u64); 40] = [
    ('A', 0x3a31fc631), ('B', 0x7a31f463e), ('C', 0x3a308422e), ('D', 0x7a318c63e), ('E', 0x7e10f421f),
    ('F', 0x7e10f4210), ('G', 0x3a30bc62f), ('H', 0x4631fc631), ('I', 0x38842108e), ('J', 0x1c4210a4c),
    ('K', 0x4654c5251), ('L', 0x42108421f), ('M', 0x4775ac631), ('N', 0x47359c631), ('O', 0x3a318c62e),
    ('P', 0x7a31f4210), ('Q', 0x3a318d64d), ('R', 0x7a31f5251), ('S', 0x3e107043e), ('T', 0x7c8421084),
    ('U', 0x46318c62e), ('V', 0x46318c544), ('W', 0x4631ad771), ('X', 0x462a22a31), ('Y', 0x462a21084),
    ('Z', 0x7c222221f), ('0', 0x3a33ae62e), ('1', 0x11842108e), ('2', 0x3a213221f), ('3', 0x78217043e),
    ('4', 0x08ca97c42), ('5', 0x7e1e0862e), ('6', 0x1910f462e), ('7', 0x7c2222108), ('8', 0x3a317462e),
    ('9', 0x3a317844c), ('.', 0x00000018c), (',', 0x000003088), ('-', 0x000070000), (':', 0x018c03180),
];
