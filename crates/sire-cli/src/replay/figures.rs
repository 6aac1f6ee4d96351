//! A replay as figures: the JSON list that the scripts print too, and a few lines for people.

use serde_json::{Value, json};

use crate::output;

use super::Trace;
use super::device::Device;
use super::needs::Needs;
use super::player::{Played, Timing};

const GIB: f64 = (1u64 << 30) as f64;

/// One object per kind of call: seconds, and for transitions also the rate at which device memory went or came.
pub fn list(played: &Played, device: &Device) -> Vec<Value> {
    let mut out = Vec::new();
    for (name, timing) in &played.timings {
        let mut seconds = timing.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        out.push(figure(&format!("replay.{name}"), "s", &seconds, timing, device));
        let whole: f64 = seconds.iter().sum();
        if timing.moved > 0 && whole > 0.0 {
            let rate = [timing.moved as f64 / GIB / whole];
            out.push(figure(&format!("replay.{name}.rate"), "GiB/s", &rate, timing, device));
        }
    }
    out
}

fn figure(name: &str, unit: &str, sorted: &[f64], timing: &Timing, device: &Device) -> Value {
    let mut recorded = timing.recorded.clone();
    recorded.sort_by(f64::total_cmp);
    json!({
        "name": name,
        "value": quantile(sorted, 0.5),
        "unit": unit,
        "ceiling": null,
        "ratio": null,
        "samples": timing.seconds.len(),
        "simulated": device.is_simulated(),
        "device": device.name,
        "min": quantile(sorted, 0.0),
        "max": quantile(sorted, 1.0),
        "p99": quantile(sorted, 0.99),
        "recorded": if recorded.is_empty() || unit != "s" { Value::Null } else { quantile(&recorded, 0.5).into() },
        "bytes_moved": timing.moved,
        "bytes_copied": timing.copied,
    })
}

/// The value below which this share of the sorted values lies.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get(((sorted.len() as f64 * share) as usize).min(last)).copied().unwrap_or(0.0)
}

/// What a person wants to know at the end.
pub fn summary(played: &Played) -> Vec<String> {
    let calls: usize = played.timings.values().map(|timing| timing.seconds.len()).sum();
    let mut lines = vec![format!("{calls} calls made, {} left out, {} failed", played.left_out, played.failed)];
    if played.compared > 0 {
        lines.push(format!("{} bytes compared, {} allocations wrong", played.compared, played.wrong.len()));
    }
    lines.extend(played.failures.iter().chain(&played.wrong).map(|what| format!("  {what}")));
    lines
}

/// `--info`: what a trace holds, without a device.
pub fn describe(trace: &Trace, needs: &Needs) {
    let threads: std::collections::BTreeSet<u32> = trace.records.iter().map(|record| record.thread).collect();
    let seconds = trace.records.last().map_or(0.0, |record| record.time.as_secs_f64());
    output::line(&format!("recorded by sire {}, format {}", trace.header.library, trace.header.version));
    output::line(&format!("{} calls by {} threads in {seconds:.3} s", trace.records.len(), threads.len()));
    output::line(&format!(
        "{} devices, at most {} allocations, {:.3} GiB resident on one, {:.3} GiB in all",
        needs.devices,
        needs.allocations,
        needs.peak as f64 / GIB,
        needs.virtual_bytes as f64 / GIB
    ));
    for ((name, size), used) in super::files::uses(trace) {
        let bytes: u64 = used.iter().map(|range| range.end - range.start).fold(0, u64::saturating_add);
        output::line(&format!("backup file {name} ({size} bytes), {bytes} bytes of it attached"));
    }
}
