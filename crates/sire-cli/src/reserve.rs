//! `sire reserve`: waits until bytes of a GPU can be reserved, runs a program, and holds the reservation until it ends. Only the ledger keeps the
//! bytes; a program that uses Sire or `sire.torchtools` finds in SIRE_RESERVED that they are its.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;
use sire_control::place::Place;
use sire_control::preempt::Borrower;
use sire_ledger::layout::State;
use sire_ledger::{Entry, Error, Ledger, Member, Patience, Want};

use crate::arguments::ReserveOptions;
use crate::failure::{Failure, While as _};
use crate::gpu::gauge::{Gauge, Source};
use crate::gpu::{self, nvml, visible, watched};
use crate::output;

/// Exit code where the reservation was not to be had in time: sysexits' EX_TEMPFAIL.
const NOT_NOW: u8 = 75;
/// How often what the program has of the GPU is noted.
const LOOK: Duration = Duration::from_millis(100);

/// The whole command.
pub fn reserve(options: &ReserveOptions) -> Result<ExitCode, Failure> {
    gpu::enter_environment(&options.job)?;
    let want = options.bytes.map_or(Want::Rest { margin: 0 }, Want::Bytes);
    let timeout = options.timeout;
    let gpu = visible::chosen(&options.job)?;
    let begun = Instant::now();
    let ledger = Ledger::open(&sire_ledger::directory(), &gpu.uuid).map_err(|error| said(&error))?;
    let member = ledger.join().map_err(|error| said(&error))?;
    let patience = Patience { timeout, cancelled: &|| false };
    // What others lend is theirs again when this command ends, however it ends.
    let borrower = options.preempt.map(|priority| borrower(&gpu, priority)).transpose()?;
    let ask = |missing: u64, seen: Instant| borrower.iter().for_each(|borrower| borrower.missing(missing, seen));
    let reserved = member.reserve_asking(want, &|| gpu.memory(), patience, &ask);
    let bytes = reserved.map_err(|error| match (&borrower, said(&error)) {
        (Some(borrower), failure) if matches!(error, Error::TimedOut { .. }) => {
            Failure::new(format!("{failure}. Nobody gave way: {}", borrower.why())).exits_with(NOT_NOW)
        }
        (_, failure) => failure,
    })?;
    borrower.iter().for_each(Borrower::enough);
    if options.json {
        let waited = begun.elapsed().as_secs_f64();
        let report = json!({ "gpu": gpu.uuid, "reserved_bytes": bytes, "waited_seconds": waited });
        output::report(&report.to_string());
    }
    run(options, &gpu, &Reserved { ledger, member, bytes })
}

fn borrower(gpu: &nvml::Gpu, priority: i32) -> Result<Borrower, Failure> {
    let place = Place::of_this_user().while_(|| "find the processes that could give way".to_owned())?;
    let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
    };
    Ok(Borrower::new(place, &gpu.uuid, priority, spawn, None))
}

/// What the program may have.
struct Reserved {
    ledger: Ledger,
    member: Member,
    bytes: u64,
}

impl Reserved {
    /// Whether nobody else holds anything. Where that is not to be known, somebody may.
    fn is_alone(&self) -> bool {
        let holding = |entries: Vec<Entry>| entries.iter().filter(|entry| entry.state == State::Holding).count();
        self.ledger.entries().is_ok_and(|entries| holding(entries) <= 1)
    }

    /// How much of it the program has. What only the device's figures say may be somebody else's: it is more than before only if nobody else holds
    /// anything.
    fn owned(&self, gauge: &mut Gauge<'_>) -> u64 {
        let was_alone = gauge.source == Source::Processes || self.is_alone();
        let used = gauge.read().min(self.bytes);
        let is_certain = gauge.source == Source::Processes || (was_alone && self.is_alone());
        if is_certain { used } else { used.min(self.member.owned()) }
    }

    /// What cannot be noted is noted the next time: until then others see less room than there is.
    fn note(&self, gauge: &mut Gauge<'_>) {
        let owned = self.owned(gauge);
        if owned != self.member.owned() {
            let _ = self.member.note_owned(owned);
        }
    }
}

fn run(options: &ReserveOptions, gpu: &nvml::Gpu, reserved: &Reserved) -> Result<ExitCode, Failure> {
    let told = format!("{}:{}", gpu.uuid, reserved.bytes);
    let variables = [("SIRE_RESERVED", told), ("CUDA_VISIBLE_DEVICES", gpu.uuid.clone())];
    let mut gauge = Gauge::of(gpu);
    let mut child = watched::start(&options.job.command, &variables)?;
    let status = watched::wait(&mut child, || {
        reserved.note(&mut gauge);
        Some(LOOK)
    })?;
    Ok(ExitCode::from(watched::exit_code(status)))
}

fn said(error: &Error) -> Failure {
    let failure = Failure::new(error.to_string());
    match error {
        Error::TimedOut { .. } | Error::Stuck => failure.exits_with(NOT_NOW),
        Error::TooLarge { .. } => failure.exits_with(2),
        _ => failure,
    }
}
