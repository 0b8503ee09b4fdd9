//! The results as a picture: bars and lines in an SVG, with the goals drawn in.

use std::path::Path;

use anyhow::anyhow;
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{figures::Part, models::MLP, results::Results, tail::PERCENTILES};

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const WIDTH: u32 = 1200;
const ROW_HEIGHT: u32 = 400;
const TITLE_HEIGHT: u32 = 50;
const INK: RGBColor = RGBColor(40, 44, 52);
const GOAL: RGBColor = RGBColor(200, 60, 50);
/// For what is told apart within a panel.
const COLOURS: [RGBColor; 4] = [RGBColor(160, 170, 185), RGBColor(54, 116, 181), RGBColor(232, 142, 54), RGBColor(84, 158, 96)];

/// One bar: what stands under it, how high it is, how far its rounds lie apart, and its goal.
pub(super) struct Bar {
    label: String,
    value: f64,
    spread: (f64, f64),
    colour: usize,
    goal: Option<f64>,
}

/// A line of points, evenly spaced.
pub(super) struct Line {
    /// Its name in the legend.
    pub(super) label: String,
    /// Its points, one for each place along the axis.
    pub(super) values: Vec<f64>,
    /// Its number among the colours.
    pub(super) colour: usize,
}

impl Bar {
    /// A figure of a part; none if it wasn't measured.
    fn of(part: &Part, name: &str, label: &str, colour: usize, goal: Option<f64>) -> Option<Self> {
        let (value, spread) = part.median(name).zip(part.spread(name))?;
        Some(Self { label: label.to_owned(), value, spread, colour, goal })
    }
}

/// What a panel shows.
pub(super) enum Content {
    /// Bars beside each other.
    Bars(Vec<Bar>),
    /// The places along the axis, and whether the other axis is logarithmic.
    Lines(Vec<String>, Vec<Line>, bool),
}

/// Draws what was measured.
///
/// # Errors
/// When the file can't be written.
pub fn draw(results: &Results, path: &Path) -> anyhow::Result<()> {
    let machine = &results.machine;
    let title = format!("{}, {} cores, torch {}, {}", machine.cpu, machine.cores, machine.torch, machine.date);
    draw_panels(&title, &panels(results), path)
}

/// Draws panels, each with a heading, two beside each other. One without anything to show is left out.
///
/// # Errors
/// When the file can't be written.
pub(super) fn draw_panels(title: &str, panels: &[(&'static str, Content)], path: &Path) -> anyhow::Result<()> {
    let panels: Vec<_> = panels.iter().filter(|(_, content)| content.has_any()).collect();
    let rows = (panels.len() as u32).div_ceil(2).max(1);
    let root = SVGBackend::new(path, (WIDTH, TITLE_HEIGHT + rows * ROW_HEIGHT)).into_drawing_area();
    let drawn = picture(title, &panels, rows, &root).and_then(|()| Ok(root.present()?));
    drawn.map_err(|error| anyhow!("can't draw {}: {error}", path.display()))
}

impl Content {
    /// Whether there is anything to show.
    fn has_any(&self) -> bool {
        match self {
            Self::Bars(bars) => !bars.is_empty(),
            Self::Lines(_, lines, _) => lines.iter().any(|line| !line.values.is_empty()),
        }
    }
}

/// The panels of `make bench`.
fn panels(results: &Results) -> Vec<(&'static str, Content)> {
    let tenths: Vec<_> = (1..=10).map(|tenth| format!("{tenth}0%")).collect();
    vec![
        ("Latency of one call at a time (784-512-10 MLP), µs", Content::Bars(latencies(results))),
        ("CPU per request (784-512-10 MLP), µs", Content::Bars(costs(results))),
        ("Throughput over libtorch's best in process, by requests in flight", Content::Bars(ratios(results))),
        ("Latency in an open loop, µs", Content::Lines(PERCENTILES.map(str::to_owned).to_vec(), tails(results), true)),
        ("Resident memory, MiB", Content::Bars(memories(results))),
        ("The worker's resident memory over many requests and streams, MiB", Content::Lines(tenths, flatness(results), false)),
    ]
}

fn picture(
    title: &str,
    panels: &[&(&'static str, Content)],
    rows: u32,
    root: &Panel<'_>,
) -> Result<(), Box<dyn std::error::Error>> {
    root.fill(&WHITE)?;
    root.draw(&Text::new(title.to_owned(), (24, 20), words(17, &INK)))?;
    let (_, body) = root.split_vertically(TITLE_HEIGHT);
    for (panel, (heading, content)) in body.split_evenly((rows as usize, 2)).iter().zip(panels) {
        panel.draw(&Text::new((*heading).to_owned(), (24, 12), words(16, &INK)))?;
        match content {
            Content::Bars(shown) => bars(panel, shown)?,
            Content::Lines(places, shown, is_log) => lines(panel, places, shown, *is_log)?,
        }
    }
    Ok(())
}

fn latencies(results: &Results) -> Vec<Bar> {
    let Some(part) = &results.overhead else { return vec![] };
    let ways = [("in_process", "in process", 0), ("direct_whole", "straight", 1), ("coordinator_whole", "by coordinator", 2)];
    let bar = |percentile: &'static str| {
        ways.iter().filter_map(move |(name, label, colour)| {
            Bar::of(part, &format!("{name}_{percentile}_us"), &format!("{percentile} {label}"), *colour, None)
        })
    };
    bar("p50").chain(bar("p99")).collect()
}

fn costs(results: &Results) -> Vec<Bar> {
    let Some(part) = &results.overhead else { return vec![] };
    let figures = [
        ("worker_cpu_us_at_1", "worker, 1 in flight", 1, 120.0),
        ("worker_cpu_us", "worker, 64", 1, 50.0),
        ("coordinator_cpu_us_at_1", "coordinator, 1", 2, 100.0),
        ("coordinator_cpu_us", "coordinator, 64", 2, 40.0),
    ];
    figures.iter().filter_map(|(name, label, colour, goal)| Bar::of(part, name, label, *colour, Some(*goal))).collect()
}

fn ratios(results: &Results) -> Vec<Bar> {
    let mut bars = Vec::new();
    for (place, (model, part)) in results.models().enumerate() {
        for concurrency in [1, 8, 32, 64] {
            let goal = (model.name != MLP.name).then_some(0.95);
            // The model's name under the first of its bars: there is no room for more.
            let label = if concurrency == 1 { format!("1 {}", model.name) } else { concurrency.to_string() };
            bars.extend(Bar::of(part, &format!("ratio_at_{concurrency}"), &label, 1 + place % 3, goal));
        }
    }
    bars
}

fn tails(results: &Results) -> Vec<Line> {
    let Some(part) = &results.tail else { return vec![] };
    let ways = [
        ("", "", "70% load", 1),
        ("neighbour_", "", "70%, neighbour loading", 2),
        ("", "_at_30_percent", "30% load", 0),
        ("neighbour_", "_at_30_percent", "30%, neighbour loading", 3),
    ];
    let line = |(before, after, label, colour): (&str, &str, &str, usize)| {
        let value = |percentile: &&str| part.median(&format!("{before}{percentile}_us{after}"));
        let values = PERCENTILES.iter().filter_map(value).collect();
        Line { label: label.to_owned(), values, colour }
    };
    ways.into_iter().map(line).collect()
}

fn memories(results: &Results) -> Vec<Bar> {
    let Some(part) = &results.memory else { return vec![] };
    let goal = part.median("reference_mib").map(|reference| reference + 30.0);
    let figures = [
        ("libtorch_mib", "libtorch", 0, None),
        ("weights_mib", "weights", 0, None),
        ("reference_mib", "both, after calls", 0, None),
        ("worker_mib", "worker, after calls", 1, goal),
    ];
    figures.into_iter().filter_map(|(name, label, colour, goal)| Bar::of(part, name, label, colour, goal)).collect()
}

fn flatness(results: &Results) -> Vec<Line> {
    let Some(part) = &results.memory else { return vec![] };
    let line = |(what, colour): (&str, usize)| {
        let count = part.known(&format!("flat_{what}"))?;
        let samples = part.known(&format!("worker_mib_over_{what}"))?.as_array()?;
        let values = samples.iter().filter_map(serde_json::Value::as_f64).collect();
        Some(Line { label: format!("{count} {what}"), values, colour })
    };
    [("requests", 1), ("streams", 2)].into_iter().filter_map(line).collect()
}

fn words(size: i32, colour: &RGBColor) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(colour)
}

fn bars(panel: &Panel<'_>, bars: &[Bar]) -> Result<(), Box<dyn std::error::Error>> {
    let top = bars.iter().flat_map(|bar| [bar.value, bar.spread.1, bar.goal.unwrap_or(0.0)]).fold(0.0, f64::max) * 1.12;
    let mut chart = ChartBuilder::on(panel)
        .margin(12)
        .margin_top(40)
        .x_label_area_size(48)
        .y_label_area_size(54)
        .build_cartesian_2d(0.0..bars.len() as f64, 0.0..top.max(f64::MIN_POSITIVE))?;
    let value = |at: &f64| number(*at);
    let mut mesh = chart.configure_mesh();
    mesh.disable_x_mesh().disable_x_axis().light_line_style(WHITE).label_style(words(12, &INK));
    mesh.y_label_formatter(&value).draw()?;
    let label = words(12, &INK).pos(Pos::new(HPos::Center, VPos::Bottom));
    for (place, bar) in bars.iter().enumerate() {
        let (left, middle, right) = (place as f64 + 0.15, place as f64 + 0.5, place as f64 + 0.85);
        let colour = COLOURS[bar.colour % COLOURS.len()];
        chart.draw_series([Rectangle::new([(left, 0.0), (right, bar.value)], colour.filled())])?;
        let spread = vec![(middle, bar.spread.0), (middle, bar.spread.1)];
        chart.draw_series([PathElement::new(spread, INK.stroke_width(1))])?;
        if let Some(goal) = bar.goal {
            chart.draw_series([PathElement::new(vec![(left - 0.1, goal), (right + 0.1, goal)], GOAL.stroke_width(2))])?;
        }
        chart.draw_series([Text::new(number(bar.value), (middle, bar.value.max(bar.spread.1)), label.clone())])?;
        // Two lines under each bar: its last words on the second one.
        let (x, y) = chart.backend_coord(&(middle, 0.0));
        let (at_x, at_y) = panel.get_base_pixel();
        let (first, second) = bar.label.split_once(' ').unwrap_or((&bar.label, ""));
        for (line, text) in [first, second].into_iter().enumerate() {
            let style = words(12, &INK).pos(Pos::new(HPos::Center, VPos::Top));
            panel.draw(&Text::new(text.to_owned(), (x - at_x, y - at_y + 6 + 15 * line as i32), style))?;
        }
    }
    Ok(())
}

fn lines(panel: &Panel<'_>, places: &[String], lines: &[Line], is_log: bool) -> Result<(), Box<dyn std::error::Error>> {
    let all = || lines.iter().flat_map(|line| line.values.iter().copied());
    let (low, high) = (all().fold(f64::MAX, f64::min), all().fold(0.0, f64::max));
    if low > high || low <= 0.0 {
        return Ok(());
    }
    let mut builder = ChartBuilder::on(panel);
    builder.margin(12).margin_top(40).x_label_area_size(48).y_label_area_size(64);
    let x = -0.3..places.len() as f64 - 0.7;
    let label = |at: &f64| {
        let place = at.round();
        let name = places.get(place as usize).filter(|_| (at - place).abs() < 1e-6 && place >= 0.0);
        name.cloned().unwrap_or_default()
    };
    // The two kinds of axes are types of their own.
    macro_rules! draw {
        ($y:expr) => {{
            let mut chart = builder.build_cartesian_2d(x, $y)?;
            let (text, value) = (words(12, &INK), |at: &f64| number(*at));
            let mut mesh = chart.configure_mesh();
            mesh.disable_x_mesh().light_line_style(WHITE).label_style(text).x_labels(places.len() * 2);
            mesh.x_label_formatter(&label).y_label_formatter(&value).draw()?;
            for line in lines {
                let colour = COLOURS[line.colour % COLOURS.len()];
                let points = || line.values.iter().enumerate().map(|(place, value)| (place as f64, *value));
                let drawn = chart.draw_series(LineSeries::new(points(), colour.stroke_width(2)))?;
                drawn
                    .label(&line.label)
                    .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2)));
                chart.draw_series(points().map(|point| Circle::new(point, 3, colour.filled())))?;
            }
            let mut legend = chart.configure_series_labels();
            legend
                .position(SeriesLabelPosition::UpperLeft)
                .label_font(words(12, &INK))
                .background_style(WHITE.mix(0.8))
                .draw()?;
        }};
    }
    if is_log {
        draw!((low * 0.7..high * 4.0).log_scale());
    } else {
        draw!(0.0..high * 1.3);
    }
    Ok(())
}

/// A number with as many digits as say something.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size < 1e-9 => "0".to_owned(),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::Machine;

    #[test]
    fn a_picture_is_drawn_of_whatever_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.svg");
        let mut memory = Part::default();
        for name in ["libtorch_mib", "weights_mib", "reference_mib", "worker_mib"] {
            memory.add(name, 123.0);
        }
        memory.fact("flat_requests", 10);
        memory.fact("worker_mib_over_requests", vec![100.0, 101.0]);
        let machine = Machine::ask(2);
        let results = Results {
            machine,
            rounds: 1,
            routing: None,
            overhead: None,
            throughput: None,
            tail: None,
            overload: None,
            survival: None,
            memory: Some(memory),
        };
        draw(&results, &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(!svg.contains("Latency") && svg.contains("Resident memory"), "only what was measured has a panel");
        assert!(svg.contains("worker") && svg.contains("10 requests"));
    }
}
