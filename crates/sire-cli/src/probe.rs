//! `sire probe`: runs a program and says how much memory of a GPU it and its children had at most, libraries and context included.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::arguments::ProbeOptions;
use crate::failure::Failure;
use crate::gpu::{self, nvml, watched};
use crate::output;

/// As timeout(1) has it.
const TOO_LONG: u8 = 124;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// The whole command.
pub fn probe(options: &ProbeOptions) -> Result<ExitCode, Failure> {
    gpu::enter_environment(&options.job)?;
    let gpu = nvml::find(&options.job.gpu)?;
    let begun = Instant::now();
    let mut child = watched::start(&options.job.command, &[("CUDA_VISIBLE_DEVICES", gpu.uuid.clone())])?;
    let (mut peak, mut over) = (0, false);
    let status = watched::wait(&mut child, |pid| {
        peak = peak.max(watched::used(&gpu, pid));
        over = options.timeout.is_some_and(|seconds| begun.elapsed().as_secs_f64() >= seconds);
        (!over).then_some(LOOK)
    })?;
    let code = if over { TOO_LONG } else { watched::exit_code(status) };
    let seconds = begun.elapsed().as_secs_f64();
    if options.json {
        let figures =
            json!({ "gpu": gpu.uuid, "peak_bytes": peak, "seconds": seconds, "timed_out": over, "exit_code": code });
        output::line(&figures.to_string());
    } else {
        let end = if over { "ended after the time given".to_owned() } else { format!("exit code {code}") };
        output::line(&format!("{peak} bytes of {} at most, in {seconds:.1} s; {end}", gpu.uuid));
    }
    Ok(ExitCode::from(code))
}
