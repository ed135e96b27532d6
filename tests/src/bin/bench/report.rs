//! The report: one HTML file that needs nothing besides itself.

use anyhow::{Result, anyhow};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use plotters::prelude::*;

use crate::jobs::Job;
use crate::results::{Results, Spread};
use crate::table;

const STYLE: &str = "
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
td:first-child, th:first-child, td.text { text-align: left; white-space: normal }
code { font: 12px/1.4 ui-monospace, monospace; word-break: break-all }
.missed { color: #a00; font-weight: 600 } .ok { color: #070 }
.spread { color: #777; font-size: 12px; display: block }
.plots { display: flex; flex-wrap: wrap; gap: 1em }
";

/// The colour of ours, and of theirs.
const OURS: RGBColor = RGBColor(0x1b, 0x6e, 0xc2);
const THEIRS: RGBColor = RGBColor(0x9a, 0x9a, 0x9a);

/// A bar for each system, as long as an operation takes, with a line from the least to the most.
fn plot(results: &Results, job: &str, systems: &[&str]) -> Result<Option<String>> {
    let figures: Vec<(&str, Spread)> =
        systems.iter().filter_map(|system| Some((*system, results.time(system, job)?))).collect();
    let Some(longest) = figures.iter().map(|(_, spread)| spread.median).max_by(f64::total_cmp)
    else {
        return Ok(None);
    };
    const ROW: u32 = 22;
    const NAMES: i32 = 130;
    const BARS: f64 = 270.0;
    let size = (520, ROW * figures.len() as u32 + 8);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let failed = |error: DrawingAreaErrorKind<std::io::Error>| anyhow!("{error}");
        let style = TextStyle::from(("sans-serif", 13).into_font()).color(&BLACK);
        for (row, (system, spread)) in figures.iter().enumerate() {
            let top = (row as u32 * ROW) as i32 + 4;
            let length = |value: f64| NAMES + (value.min(longest * 1.1) / longest * BARS) as i32;
            let color = if system.starts_with("oriel") { OURS } else { THEIRS };
            area.draw(&Text::new((*system).to_owned(), (2, top + 3), style.clone()))
                .map_err(|e| anyhow!("{e}"))?;
            let bar = [(NAMES, top), (length(spread.median).max(NAMES + 1), top + 16)];
            area.draw(&Rectangle::new(bar, color.filled())).map_err(|e| anyhow!("{e}"))?;
            let line = [(length(spread.least), top + 8), (length(spread.most), top + 8)];
            area.draw(&PathElement::new(line, BLACK)).map_err(|e| anyhow!("{e}"))?;
            let at = (length(spread.median.max(spread.most)) + 6, top + 3);
            let text = table::figure(job, spread.median);
            area.draw(&Text::new(text, at, style.clone())).map_err(|e| anyhow!("{e}"))?;
        }
        area.present().map_err(failed)?;
    }
    Ok(Some(svg))
}

fn spread_cell(job: &str, spread: Option<Spread>) -> Markup {
    match spread {
        None => html! { td { "–" } },
        Some(spread) => html! {
            td {
                (table::figure(job, spread.median))
                span.spread { (table::figure(job, spread.least)) " … " (table::figure(job, spread.most)) }
            }
        },
    }
}

fn table_of(names: &[&str], systems: &[&str], cell: impl Fn(&str, &str) -> Markup) -> Markup {
    html! {
        table {
            tr { th { } @for system in systems { th { (system) } } }
            @for name in names { tr { td { (name) } @for system in systems { (cell(system, name)) } } }
        }
    }
}

/// The report of `results`.
pub fn html(
    results: &Results,
    jobs: &[Job],
    systems: &[(&str, &str)],
    rounds: usize,
    repeat: &str,
) -> Result<String> {
    let names: Vec<&str> = systems.iter().map(|(name, _)| *name).collect();
    let figures: Vec<&str> = ["boot", "run-true"]
        .into_iter()
        .chain(jobs.iter().map(|job| job.name))
        .chain(["memory"])
        .filter(|job| names.iter().any(|system| results.time(system, job).is_some()))
        .collect();
    let counted: Vec<&str> = jobs.iter().map(|job| job.name).collect();
    let about = |name: &str| match name {
        "boot" => "from exec to the guest's first program",
        "run-true" => "from exec to the end of a guest that starts /bin/true and powers off",
        "memory" => "of the VMM's processes, beyond guest memory and window (PSS)",
        _ => jobs.iter().find(|job| job.name == name).map_or("", |job| job.about),
    };
    let mut plots = Vec::new();
    for job in &figures {
        if let Some(svg) = plot(results, job, &names)? {
            plots.push((*job, svg));
        }
    }
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head { meta charset="utf-8"; title { "Oriel: a comparison" } style { (PreEscaped(STYLE)) } }
            body {
                h1 { "Oriel beside QEMU, virtiofsd, 9p and alioth" }
                p {
                    "One run on one machine, the systems in turn, " (rounds) " rounds. Figures are medians, with the least \
                     and the most below them. Where the processor is emulated, only ratios mean anything. Repeat it with "
                    code { (repeat) } "."
                }
                table { @for (name, value) in &results.machine { tr { td { (name) } td { (value) } } } }
                h2 { "What we hold ourselves to" }
                table {
                    tr { th { "" } th { "figure" } th { "at most" } th { "" } th { "of" } }
                    @for held in results.bars() {
                        tr {
                            td { (held.what) } td { (format!("{:.2}", held.figure)) } td { (format!("{:.2}", held.most)) }
                            @if held.holds { td.ok { "ok" } } @else { td.missed { "missed" } }
                            td { (held.ours) " " (held.theirs) }
                        }
                    }
                }
                h2 { "Time of an operation" }
                (table_of(&figures, &names, |system, job| spread_cell(job, results.time(system, job))))
                div.plots {
                    @for (job, svg) in &plots { figure { figcaption { b { (job) } ": " (about(job)) } (PreEscaped(svg)) } }
                }
                h2 { "Exits of the guest, an operation" }
                p { "From KVM's own counter." }
                (table_of(&counted, &names, |system, job| html! {
                    td { (results.exits(system, job).map_or("–".into(), |spread| format!("{:.2}", spread.median))) }
                }))
                h2 { "Processors' time on the host, an operation" }
                p { "Of the VMM's processes, the guest's own time included." }
                (table_of(&counted, &names, |system, job| html! {
                    td { (results.cpu(system, job).map_or("–".into(), |spread| table::time(spread.median))) }
                }))
                h2 { "What was not measured" }
                p {
                    "NFS over vsock, the last candidate of 2018, never reached the kernel: there is nothing to run."
                }
                @if !results.missed.is_empty() {
                    table {
                        @for (system, job, why) in &results.missed { tr { td { (system) } td { (job) } td { (why) } } }
                    }
                }
                h2 { "Jobs" }
                p { "What runs in the guest, in the shared directory, after what brings caches into the same state everywhere." }
                table {
                    @for job in jobs {
                        tr { td { (job.name) } td.text { (job.about) } td.text { code { (job.typed()) } } }
                    }
                }
                h2 { "Command lines" }
                table { @for (system, about) in systems { tr { td { (system) } td.text { (about) } } } }
                @for (system, line) in &results.commands { p { b { (system) } br; code { (line) } } }
            }
        }
    };
    Ok(page.into_string())
}
