//! A log-log plot of latency over the observation's size, as SVG.

use std::fmt::Write;

use super::figures::Row;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 480.0;
const MARGIN: f64 = 70.0;
/// Decades of bytes: 1 kB to 100 MB.
const BYTES: [f64; 2] = [3.0, 8.0];
/// Decades of milliseconds: 10 µs to 100 ms.
const MS: [f64; 2] = [-2.0, 2.0];

/// The lines of the plot.
#[derive(Default)]
pub(super) struct Curve {
    lines: [Vec<(f64, f64)>; LINES.len()],
}

const LINES: [(&str, &str); 5] = [
    ("Chiral", "#0b6e4f"),
    ("Chiral over Zenoh, TCP", "#1f5fbf"),
    ("Chiral over Zenoh, shared memory", "#8c4fbf"),
    ("axum to tungstenite", "#c8553d"),
    ("raw TCP", "#3a3a3a"),
];

impl Curve {
    /// Adds the round trips at one size.
    pub(super) fn add(&mut self, bytes: f64, rows: &[Row]) {
        let median = |name: &str| {
            rows.iter().filter(|row| row.row == name && row.metric == "p50_ms").map(|row| row.value).next()
        };
        let raw =
            ["get_obs.raw_blocking", "get_obs.raw_tokio"].into_iter().filter_map(median).reduce(f64::min);
        let ours = ["get_obs", "get_obs.zenoh_tcp", "get_obs.zenoh_shm"];
        for (line, value) in
            self.lines.iter_mut().zip(ours.map(median).into_iter().chain([median("get_obs.naive"), raw]))
        {
            line.extend(value.map(|ms| (bytes, ms)));
        }
    }
}

/// Returns the plot as SVG.
pub(super) fn svg(curve: &Curve) -> String {
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    grid(&mut text);
    for (i, ((name, color), points)) in LINES.iter().zip(&curve.lines).enumerate() {
        let path: Vec<String> =
            points.iter().map(|&(bytes, ms)| format!("{:.1},{:.1}", x(bytes), y(ms))).collect();
        put(
            &mut text,
            format_args!(
                "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"2\" points=\"{}\"/>",
                path.join(" ")
            ),
        );
        for point in &path {
            let (cx, cy) = point.split_once(',').unwrap_or_default();
            put(&mut text, format_args!("<circle cx=\"{cx}\" cy=\"{cy}\" r=\"3\" fill=\"{color}\"/>"));
        }
        let at = MARGIN + 24.0 + 20.0 * i as f64;
        let left = MARGIN + 16.0;
        put(
            &mut text,
            format_args!(
                "<rect x=\"{left}\" y=\"{}\" width=\"18\" height=\"3\" fill=\"{color}\"/>",
                at - 5.0
            ),
        );
        put(&mut text, format_args!("<text x=\"{}\" y=\"{at}\">{name}</text>", left + 26.0));
    }
    text.push_str("</svg>\n");
    text
}

fn grid(text: &mut String) {
    let [left, right, top, bottom] = [MARGIN, WIDTH - MARGIN / 2.0, MARGIN / 2.0, HEIGHT - MARGIN];
    let decades = |[from, to]: [f64; 2]| (from as i32..=to as i32).map(|decade| 10_f64.powi(decade));
    for (bytes, label) in decades(BYTES).zip(["1 kB", "10 kB", "100 kB", "1 MB", "10 MB", "100 MB"]) {
        let at = x(bytes);
        put(
            text,
            format_args!("<line x1=\"{at}\" y1=\"{top}\" x2=\"{at}\" y2=\"{bottom}\" stroke=\"#ddd\"/>"),
        );
        put(
            text,
            format_args!("<text x=\"{at}\" y=\"{}\" text-anchor=\"middle\">{label}</text>", bottom + 20.0),
        );
    }
    for (ms, label) in decades(MS).zip(["10 µs", "100 µs", "1 ms", "10 ms", "100 ms"]) {
        let at = y(ms);
        put(
            text,
            format_args!("<line x1=\"{left}\" y1=\"{at}\" x2=\"{right}\" y2=\"{at}\" stroke=\"#ddd\"/>"),
        );
        put(
            text,
            format_args!("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{label}</text>", left - 8.0, at + 4.0),
        );
    }
    let middle = (left + right) / 2.0;
    put(
        text,
        format_args!(
            "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">observation</text>",
            bottom + 44.0
        ),
    );
    put(
        text,
        format_args!(
            "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">get_obs, median round trip, two cores</text>",
            top - 12.0
        ),
    );
}

fn put(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("writing to a string cannot fail");
}

fn x(bytes: f64) -> f64 {
    let [from, to] = BYTES;
    MARGIN + (bytes.log10() - from) / (to - from) * (WIDTH - MARGIN * 1.5)
}

fn y(ms: f64) -> f64 {
    let [from, to] = MS;
    HEIGHT - MARGIN - (ms.log10() - from) / (to - from) * (HEIGHT - MARGIN * 1.5)
}
