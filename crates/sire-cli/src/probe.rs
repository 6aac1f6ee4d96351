//! `sire probe`: runs a program and says how much memory of a GPU it and its children had at most, libraries and context included.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::arguments::ProbeOptions;
use crate::failure::Failure;
use crate::gpu::gauge::{Gauge, Source};
use crate::gpu::nvml::Gpu;
use crate::gpu::{self, visible, watched};
use crate::output;

/// As timeout(1) has it.
const TOO_LONG: u8 = 124;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// The whole command.
pub fn probe(options: &ProbeOptions) -> Result<ExitCode, Failure> {
    gpu::enter_environment(&options.job)?;
    let gpu = visible::chosen(&options.job)?;
    let (begun, mut gauge) = (Instant::now(), Gauge::of(&gpu));
    watched::adopt_orphans();
    let mut child = watched::start(&options.job.command, &[("CUDA_VISIBLE_DEVICES", gpu.uuid.clone())])?;
    let mut over = false;
    let status = watched::wait(&mut child, || {
        gauge.read();
        over = options.timeout.is_some_and(|most| begun.elapsed() >= most);
        (!over).then_some(LOOK)
    })?;
    let code = if over { TOO_LONG } else { watched::exit_code(status) };
    say(options, &gpu, &gauge, &End { seconds: begun.elapsed().as_secs_f64(), over, code });
    Ok(ExitCode::from(code))
}

/// How the program ended.
struct End {
    seconds: f64,
    over: bool,
    code: u8,
}

fn say(options: &ProbeOptions, gpu: &Gpu, gauge: &Gauge<'_>, end: &End) {
    let (End { seconds, over, code }, peak) = (end, gauge.peak);
    if options.json {
        let figures = json!({
            "gpu": gpu.uuid, "peak_bytes": peak, "source": gauge.source.name(), "seconds": seconds, "timed_out": over, "exit_code": code
        });
        return output::line(&figures.to_string());
    }
    let by = if gauge.source == Source::Device { " by the device's figures" } else { "" };
    let how = if *over { "ended after the time given".to_owned() } else { format!("exit code {code}") };
    output::line(&format!("{peak} bytes of {} at most{by}, in {seconds:.1} s; {how}", gpu.uuid));
}
