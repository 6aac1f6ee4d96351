//! The engine on the software device: real worker threads, real device memory behind real mappings. Every driver call of
//! a short life fails once, with every kind of failure that a device recovers from; the bytes are read back by
//! the device itself, and at the end all of its memory is free again.

use sire_core::driver::{Addr, Device, Driver, DriverErrorKind, ProgramStream};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use sire_sim::{Faulty, Options, Planned, SimDriver};
use std::sync::Arc;

const MEMORY: u64 = 1 << 20;
const CHUNK: u64 = 16 << 10;
const DEVICE: Device = Device(0);

struct Life {
    driver: Faulty<SimDriver>,
    engine: Engine,
}

impl Life {
    fn new() -> Life {
        let driver = Faulty::new(SimDriver::new(Options::tiny(MEMORY)).unwrap());
        driver.partial_copies(true);
        let config = Config { chunk: CHUNK, small: 4096, copy_piece: 4096, ..Config::default() };
        let engine = Engine::new(Arc::new(driver.clone()), config);
        Life { driver, engine }
    }

    /// The program copies its bytes to the device, or back: through the driver beneath, so that no planned fault hits it.
    fn program<R>(&self, with: impl FnOnce(&SimDriver, sire_core::driver::Stream) -> R) -> R {
        let device = self.driver.inner();
        let stream = device.open_stream(DEVICE).unwrap();
        let result = with(device, stream);
        device.synchronize(DEVICE).unwrap();
        device.close_stream(stream).unwrap();
        result
    }

    fn write(&self, addr: Addr, bytes: &[u8]) {
        self.program(|device, stream| {
            // SAFETY: `bytes` outlives the synchronisation in `program`.
            unsafe { device.copy_to_device(stream, addr, bytes.as_ptr(), bytes.len() as u64) }.unwrap();
        });
    }

    fn read(&self, addr: Addr, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.program(|device, stream| {
            // SAFETY: `bytes` outlives the synchronisation in `program`.
            unsafe { device.copy_to_host(stream, bytes.as_mut_ptr(), addr, len as u64) }.unwrap();
        });
        bytes
    }

    /// Repeats a step until it succeeds; one fault costs at most one repetition (a shortage may cost none).
    fn step<T>(&self, mut step: impl FnMut(&Engine) -> Result<T, Error>) -> T {
        step(&self.engine).unwrap_or_else(|first| {
            assert_ne!(first.status, Status::Internal, "{first}");
            step(&self.engine).unwrap_or_else(|second| panic!("{first}; and then: {second}"))
        })
    }

    fn pause(&self) {
        self.step(|engine| engine.pause(&Selection::All, PauseOptions::default()));
        let info = self.driver.inner().memory_info(DEVICE).unwrap();
        assert_eq!(info.free, info.total, "a pause releases everything");
    }

    fn resume(&self) {
        self.step(|engine| engine.resume(&Selection::All, ResumeOptions::default()));
    }

    fn live(&self, policy: Policy) {
        let region = self.engine.region("r", policy).unwrap();
        let sizes = [2 * CHUNK + 4096, 700];
        let mut live = Vec::new();
        for (i, size) in sizes.into_iter().enumerate() {
            let request = Request { region, device: DEVICE, size, stream: ProgramStream(0), capturing: false };
            let addr = self.step(|engine| engine.allocate(request));
            let bytes: Vec<u8> = (0..size).map(|j| (j / 97) as u8 ^ i as u8).collect();
            self.write(addr, &bytes);
            live.push((addr, bytes));
        }
        for round in 0..2 {
            let (addr, bytes) = &mut live[0];
            bytes[5000..5003].fill(round);
            self.write(*addr, bytes);
            self.pause();
            self.resume();
            for (addr, bytes) in &live {
                assert!(self.read(*addr, bytes.len()) == *bytes, "the bytes at {addr:?} have changed");
            }
        }
        for (addr, _) in live {
            self.step(|engine| engine.free(addr, false));
        }
    }

    fn check_no_leak(&self) {
        self.driver.plan([]);
        self.engine.trim();
        let info = self.driver.inner().memory_info(DEVICE).unwrap();
        assert_eq!(info.free, info.total, "device memory has leaked");
    }
}

const KINDS: [DriverErrorKind; 3] = [DriverErrorKind::OutOfMemory, DriverErrorKind::Other, DriverErrorKind::Invalid];

fn sweep(policy: Policy, kinds: &[DriverErrorKind]) {
    for &kind in kinds {
        for call in 1.. {
            let life = Life::new();
            life.driver.plan([Planned::call(call, kind)]);
            life.live(policy);
            let fired = life.driver.fired();
            life.check_no_leak();
            if fired == 0 {
                assert!(call > 50, "the life made only {call} calls");
                break;
            }
        }
    }
}

#[test]
fn every_call_fails_once_with_a_host_backup() {
    sweep(Policy { backup: Backup::Host, ..Policy::default() }, &KINDS);
}

#[test]
fn every_call_fails_once_with_a_disk_backup() {
    sweep(Policy { backup: Backup::Disk, ..Policy::default() }, &KINDS);
}

#[test]
fn every_call_fails_once_with_a_verified_backup() {
    sweep(Policy { backup: Backup::Host, clean: Clean::Verified, ..Policy::default() }, &KINDS[1..2]);
}
