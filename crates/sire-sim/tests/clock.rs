//! The model clock: schedules worked out by hand, what threads tell each other through objects, and that the same calls take the
//! same virtual time to the last bit, whoever carries out the work. Times are microseconds unless they say otherwise.

use sire_core::driver::{Driver, Stream};
use sire_sim::{
    AccessDesc, CopyKind, Executor, Machine, Options, Poison, Profile, Prot, SimDriver, SimError, StreamId,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// 100 us to the device.
const MB: u64 = 1_000_000;
const FRAME: u64 = 2 << 20;

/// Round numbers: 10 GB/s in, 5 GB/s out, half of each while both are busy.
const ROUND: &str = r#"{
  "name": "round", "device": "none", "sources": ["invented for tests"],
  "calls": { "submit_us": 1, "record_us": 1, "query_us": 1, "wait_us": 2, "synchronize_us": 5 },
  "copies": { "latency_us": 0, "to_device_gb_s": 10, "to_host_gb_s": 5, "duplex": 0.5, "pageable_gb_s": 1,
              "on_device_gb_s": 100, "kernel_us": 7 },
  "vmm": { "one_at_a_time": true, "reserve": { "us": 0 }, "create": { "us": 100 }, "map": { "us": 10 },
           "set_access": { "us": 20 }, "unmap": { "us": 30 }, "release": { "us": 40 }, "scrub_gb_s": null },
  "memory": { "malloc": { "us": 0 }, "free": { "us": 0 }, "host_alloc": { "us": 0 }, "host_free": { "us": 0 },
              "host_register": { "us": 50 }, "host_unregister": { "us": 0 } }
}"#;

fn options(profile: &str) -> Result<Options, String> {
    let profile = Some(Profile::parse(profile)?);
    Ok(Options { memory: 64 << 20, poison: Poison::Off, profile, hollow: true, ..Options::default() })
}

fn machine() -> Result<Machine, Box<dyn std::error::Error>> {
    Ok(Machine::new(options(ROUND)?)?)
}

/// The calling thread's clock, in picoseconds.
fn mine(machine: &Machine) -> u64 {
    machine.thread_now().map_or(u64::MAX, |seconds| (seconds * 1e12).round() as u64)
}

/// The calling thread's clock in whole microseconds; anything else is no hand-computed time.
fn us(machine: &Machine) -> Option<u64> {
    Some(mine(machine)).filter(|picos| picos.is_multiple_of(1_000_000)).map(|picos| picos / 1_000_000)
}

/// A stream, device memory, and pinned host memory, on which copies are made.
struct Lane<'a> {
    machine: &'a Machine,
    stream: StreamId,
    device: u64,
    host: u64,
}

impl<'a> Lane<'a> {
    fn new(machine: &'a Machine) -> Result<Lane<'a>, SimError> {
        let stream = machine.stream_create(0, false, 0)?;
        Ok(Lane { machine, stream, device: machine.malloc(0, 4 * MB)?, host: machine.host_alloc(0, 4 * MB, 0)? })
    }

    fn copy_in(&self, bytes: u64) -> Result<(), SimError> {
        // SAFETY: the pinned range is longer, and nobody frees it.
        unsafe { self.machine.memcpy_async(self.device, self.host, bytes, CopyKind::HostToDevice, self.stream) }
    }

    fn copy_out(&self, bytes: u64) -> Result<(), SimError> {
        // SAFETY: as above.
        unsafe { self.machine.memcpy_async(self.host, self.device, bytes, CopyKind::DeviceToHost, self.stream) }
    }

    /// The thread's clock after waiting for the stream, without what the wait itself costs.
    fn end(&self) -> Result<Option<u64>, SimError> {
        self.machine.stream_synchronize(self.stream)?;
        Ok(us(self.machine).map(|end| end - 2))
    }
}

#[test]
fn one_stream_runs_in_order() -> Outcome {
    let machine = machine()?;
    let lane = Lane::new(&machine)?;
    lane.copy_in(MB)?; // submitted at 1: 1 to 101
    lane.copy_in(MB)?; // 101 to 201
    lane.copy_out(MB)?; // 201 to 401, and nothing goes the other way
    assert_eq!(us(&machine), Some(3), "submitting is all that the host has done");
    assert_eq!(lane.end()?, Some(401));
    machine.launch(lane.stream, "kernel", Arc::new(|_| Ok(())))?; // submitted at 404, takes 7
    assert_eq!(lane.end()?, Some(411));
    Ok(())
}

#[test]
fn streams_share_an_engine() -> Outcome {
    let machine = machine()?;
    let (first, second) = (Lane::new(&machine)?, Lane::new(&machine)?);
    first.copy_in(MB)?; // 1 to 101
    second.copy_in(2 * MB)?; // 101 to 301
    first.copy_in(MB)?; // ready at 101, as late as none: the second was ready at 2
    assert_eq!(second.end()?, Some(301));
    assert_eq!(first.end()?, Some(401));
    Ok(())
}

#[test]
fn opposite_directions_slow_each_other_down() -> Outcome {
    let machine = machine()?;
    let (inward, outward) = (Lane::new(&machine)?, Lane::new(&machine)?);
    inward.copy_in(MB)?; // 1 to 2 alone: 99 left
    outward.copy_out(MB)?; // from 2 both at half speed; the first ends at 2 + 198, and then 101 are left here
    assert_eq!(inward.end()?, Some(200));
    assert_eq!(outward.end()?, Some(301));
    Ok(())
}

#[test]
fn what_nobody_has_seen_is_still_slowed_down() -> Outcome {
    let machine = machine()?;
    let (inward, outward) = (Lane::new(&machine)?, Lane::new(&machine)?);
    inward.copy_in(MB)?; // would end at 101
    machine.create(0, FRAME, 0)?; // the host is at 101 now: too late to disturb it
    outward.copy_out(MB)?; // 102 to 302
    inward.copy_in(MB)?; // from 103 both at half speed: 199 left there, 100 here: ends at 303, the other at 402
    assert_eq!(outward.end()?, Some(402));
    assert_eq!(inward.machine.thread_now(), Some(404e-6));
    assert_eq!(inward.end()?, Some(404), "it ended at 303");
    Ok(())
}

#[test]
fn events_carry_time_across_streams() -> Outcome {
    let machine = machine()?;
    let (first, second) = (Lane::new(&machine)?, Lane::new(&machine)?);
    let (begin, end) = (machine.event_create(0, true)?, machine.event_create(0, true)?);
    first.copy_in(MB)?; // 1 to 101
    machine.event_record(begin, first.stream)?;
    machine.stream_wait_event(second.stream, begin)?;
    second.copy_out(MB)?; // 101 to 301
    machine.event_record(end, second.stream)?;
    assert_eq!(us(&machine), Some(5));
    assert!(machine.event_elapsed(begin, end).is_err_and(|error| error.code.0 == 600), "the host has not got there");
    machine.event_synchronize(end)?;
    assert_eq!(us(&machine), Some(303));
    assert!((machine.event_elapsed(begin, end)? - 0.2).abs() < 1e-9);
    assert!((machine.event_elapsed(end, begin)? + 0.2).abs() < 1e-9);
    machine.event_synchronize(begin)?;
    assert_eq!(us(&machine), Some(305), "an event of the past keeps nobody waiting");
    Ok(())
}

#[test]
fn virtual_memory_calls_run_beside_copies() -> Outcome {
    let machine = machine()?;
    let lane = Lane::new(&machine)?;
    let addr = machine.reserve(FRAME, 0, 0)?;
    lane.copy_in(2 * MB)?; // 1 to 201
    let physical = machine.create(0, FRAME, 0)?; // to 101
    machine.map(addr, FRAME, 0, physical)?; // to 111
    machine.set_access(addr, FRAME, &[AccessDesc { device: 0, prot: Prot::ReadWrite }])?; // to 131
    assert_eq!(us(&machine), Some(131));
    assert_eq!(lane.end()?, Some(201));
    machine.unmap(addr, FRAME)?; // 203 to 233
    machine.release(physical)?; // to 273
    assert_eq!(us(&machine), Some(273));
    assert!(machine.release(physical).is_err());
    assert_eq!(us(&machine), Some(273), "a call that fails costs nothing");
    machine.device_synchronize(0)?;
    assert_eq!(us(&machine), Some(278));
    Ok(())
}

#[test]
fn queries_let_time_pass_until_the_answer_is_yes() -> Outcome {
    let machine = machine()?;
    let lane = Lane::new(&machine)?;
    let event = machine.event_create(0, false)?;
    lane.copy_in(MB)?; // 1 to 101
    machine.event_record(event, lane.stream)?;
    while !machine.event_query(event)? {
        std::thread::yield_now();
    }
    assert_eq!(us(&machine), Some(102), "asked at 2, 3, ..., 101");
    Ok(())
}

/// Runs both at once on threads of their own, and gives the virtual time from before to after.
fn beside(machine: &Machine, one: impl FnOnce() + Send, other: impl FnOnce() + Send) -> Option<f64> {
    let before = machine.now()?;
    std::thread::scope(|scope| {
        scope.spawn(one);
        scope.spawn(other);
    });
    machine.now().map(|after| ((after - before) * 1e6).round())
}

#[test]
fn threads_have_clocks_of_their_own_and_share_the_driver() -> Outcome {
    let several = ROUND.replace("\"one_at_a_time\": true", "\"one_at_a_time\": false");
    for (profile, expected) in [(ROUND, 600.0), (several.as_str(), 300.0)] {
        let machine = Machine::new(options(profile)?)?;
        machine.create(0, FRAME, 0)?;
        let create = || (0..3).for_each(|_| assert!(machine.create(0, FRAME, 0).is_ok()));
        assert_eq!(beside(&machine, create, create), Some(expected));
        assert_eq!(machine.thread_now(), machine.now(), "reading the clock joins all threads");
    }
    Ok(())
}

#[test]
fn a_mapping_is_not_used_before_it_was_made_nor_removed_before_it_was_used() -> Outcome {
    let machine = machine()?;
    let stream = machine.stream_create(0, false, 0)?;
    let host = machine.host_alloc(0, MB, 0)?;
    let addr = machine.reserve(FRAME, 0, 0)?;
    let make = || -> Result<(), SimError> {
        let physical = machine.create(0, FRAME, 0)?;
        machine.map(addr, FRAME, 0, physical)?;
        machine.set_access(addr, FRAME, &[AccessDesc { device: 0, prot: Prot::ReadWrite }])?;
        machine.release(physical)
    };
    std::thread::scope(|scope| scope.spawn(make).join()).map_err(|_| "the thread panicked")??;
    assert_eq!(us(&machine), Some(0), "this thread has done nothing that costs");
    // SAFETY: the pinned range is that long, and stays.
    unsafe { machine.memcpy_async(addr, host, MB, CopyKind::HostToDevice, stream)? }; // usable at 130: ends at 230
    let unmap = || -> Result<Option<u64>, SimError> { machine.unmap(addr, FRAME).map(|()| us(&machine)) };
    // Until the copy is done. Asking costs this thread virtual time, but not the one that unmaps.
    while !machine.stream_query(stream)? {
        std::thread::yield_now();
    }
    let unmapped = std::thread::scope(|scope| scope.spawn(unmap).join()).map_err(|_| "the thread panicked")??;
    assert_eq!(unmapped, Some(260));
    Ok(())
}

#[test]
fn memory_cannot_be_had_before_it_was_given_back() -> Outcome {
    let scrubbing = ROUND.replace("\"scrub_gb_s\": null", "\"scrub_gb_s\": 2.097152"); // a frame in 1000
    for (profile, expected) in [(ROUND, 340), (scrubbing.as_str(), 1340)] {
        let machine = Machine::new(Options { memory: 2 * FRAME, ..options(profile)? })?;
        let (first, _second) = (machine.create(0, FRAME, 0)?, machine.create(0, FRAME, 0)?); // to 200
        machine.release(first)?; // to 240
        let create = || machine.create(0, FRAME, 0).map(|_| us(&machine));
        let made = std::thread::scope(|scope| scope.spawn(create).join()).map_err(|_| "the thread panicked")??;
        assert_eq!(made, Some(expected), "a thread whose clock stood at 0");
    }
    Ok(())
}

#[test]
fn a_late_submission_gets_the_time_that_was_left() -> Outcome {
    let machine = machine()?;
    let lanes = [Lane::new(&machine)?, Lane::new(&machine)?];
    lanes[0].copy_in(MB)?; // 1 to 101
    assert_eq!(lanes[0].end()?, Some(101));
    // Another thread's clock is at 0. The way out is free, but until 101 both directions are busy: 50 of 200 are done by then.
    let late = std::thread::scope(|scope| {
        let lane = &lanes[1];
        scope.spawn(move || lane.copy_out(MB).and_then(|()| lane.end())).join()
    });
    assert_eq!(late.map_err(|_| "the thread panicked")??, Some(251));
    Ok(())
}

/// Copies four times one way, and waits for each. Whoever dawdles is busy with something else, in real time, before each copy.
fn copies_and_waits(lane: &Lane<'_>, inward: bool, dawdles: bool) -> Result<Option<u64>, SimError> {
    let mut end = None;
    for _ in 0..4 {
        let begin = Instant::now();
        while dawdles && begin.elapsed() < Duration::from_millis(5) {
            std::hint::spin_loop();
        }
        if inward {
            lane.copy_in(MB)?
        } else {
            lane.copy_out(MB)?
        }
        end = lane.end()?;
    }
    Ok(end)
}

#[test]
fn threads_in_step_wait_for_whoever_is_late_in_real_time() -> Outcome {
    // Half speed while both are busy, and 3 us between a copy and the next one of the same thread, which the other has for itself.
    // In: 1 to 201, 204 to 401, 404 to 604, 607 to 804. Out: 1 to 398, 401 to 795, 798 to 1001, 1004 to 1204.
    for dawdling in [None, Some(true), Some(false)] {
        let machine = Machine::new(Options { paced: true, executor: Executor::Inline, ..options(ROUND)? })?;
        let lanes = [Lane::new(&machine)?, Lane::new(&machine)?];
        let ends = std::thread::scope(|scope| {
            let run = |inward: bool| {
                let lane = &lanes[usize::from(inward)];
                scope.spawn(move || copies_and_waits(lane, inward, dawdling == Some(inward)))
            };
            [run(true), run(false)].map(|thread| thread.join().map_err(|_| "a thread panicked"))
        });
        let [inward, outward] = ends;
        assert_eq!((inward??, outward??), (Some(804), Some(1204)), "dawdling: {dawdling:?}");
    }
    Ok(())
}

#[test]
fn pageable_memory_is_slow_and_waited_for() -> Outcome {
    let driver = SimDriver::new(options(ROUND)?)?;
    let machine = driver.machine();
    let (stream, device) = (Stream(machine.stream_create(0, false, 0)?.0), machine.malloc(0, MB)?);
    let mut host = vec![0u8; MB as usize];
    // SAFETY: the buffer outlives the copies, which the synchronisation below waits for.
    unsafe { driver.copy_to_host(stream, host.as_mut_ptr(), sire_core::driver::Addr(device), MB)? };
    assert_eq!(us(machine), Some(1003));
    // SAFETY: as above; the buffer is unregistered before it goes.
    unsafe { driver.register_host(host.as_mut_ptr(), MB)? };
    // SAFETY: as above.
    unsafe { driver.copy_to_host(stream, host.as_mut_ptr(), sire_core::driver::Addr(device), MB)? };
    assert_eq!(us(machine), Some(1054));
    driver.synchronize(sire_core::driver::Device(0))?;
    assert_eq!(us(machine), Some(1259));
    Ok(driver.unregister_host(host.as_mut_ptr())?)
}

#[test]
fn graphs_take_the_time_of_their_nodes() -> Outcome {
    let machine = machine()?;
    let lane = Lane::new(&machine)?;
    machine.capture_begin(lane.stream, sire_sim::CaptureMode::Relaxed)?;
    lane.copy_in(MB)?;
    machine.launch(lane.stream, "kernel", Arc::new(|_| Ok(())))?;
    let graph = machine.capture_end(lane.stream)?;
    assert_eq!(us(&machine), Some(0), "capturing is no work");
    let exec = machine.graph_instantiate(graph)?;
    machine.graph_launch(exec, lane.stream)?; // submitted at 1
    machine.graph_launch(exec, lane.stream)?;
    assert_eq!(lane.end()?, Some(1 + 2 * 107));
    Ok(())
}

#[test]
fn the_same_calls_take_the_same_time() -> Outcome {
    let run = |executor, delay| -> Result<Vec<u64>, Box<dyn std::error::Error>> {
        let profile = Some(Profile::find("h100-pcie5-kvcached")?);
        let machine = Machine::new(Options { executor, delay, profile, ..options(ROUND)? })?;
        let lanes = [Lane::new(&machine)?, Lane::new(&machine)?, Lane::new(&machine)?];
        let events = [machine.event_create(0, true)?, machine.event_create(0, true)?];
        let mut seed = 12345u64;
        let mut times = Vec::new();
        for _ in 0..300 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (kind, lane, other) = ((seed >> 33) % 8, &lanes[(seed >> 40) as usize % 3], (seed >> 50) as usize);
            let (event, bytes) = (events[other % 2], (seed >> 20) % (4 * MB) + 1);
            match kind {
                0 | 1 => lane.copy_in(bytes)?,
                2 | 3 => lane.copy_out(bytes)?,
                4 => machine.event_record(event, lane.stream)?,
                5 => machine.stream_wait_event(lane.stream, event)?,
                6 => machine.event_synchronize(event)?,
                _ => drop(machine.release(machine.create(0, FRAME, 0)?)),
            }
            times.push(mine(&machine));
        }
        machine.device_synchronize(0)?;
        times.push(mine(&machine));
        Ok(times)
    };
    let first = run(Executor::Threads, Duration::ZERO)?;
    assert!(first.is_sorted() && first.last() > first.first());
    for (executor, delay) in [
        (Executor::Threads, Duration::ZERO),
        (Executor::Threads, Duration::from_micros(200)),
        (Executor::Inline, Duration::ZERO),
        (Executor::Deferred, Duration::ZERO),
    ] {
        assert_eq!(run(executor, delay)?, first, "{executor:?}, {delay:?}");
    }
    Ok(())
}

#[test]
fn hollow_copies_move_nothing_and_still_check() -> Outcome {
    let machine = machine()?;
    let lane = Lane::new(&machine)?;
    // SAFETY: the pinned range is that long, and no copy is under way.
    unsafe { std::ptr::write_bytes(lane.host as *mut u8, 7, 4 * MB as usize) };
    lane.copy_out(MB)?;
    lane.end()?;
    // SAFETY: as above.
    assert_eq!(unsafe { *((lane.host + 8192) as *const u8) }, 0, "the pages went back to the system");
    machine.free(lane.device)?;
    lane.copy_in(MB)?;
    assert!(machine.stream_synchronize(lane.stream).is_err_and(|error| error.code.0 == 700));
    Ok(())
}

#[test]
fn without_a_profile_there_is_no_clock() -> Outcome {
    let machine = Machine::new(Options { profile: None, hollow: false, ..options(ROUND)? })?;
    let lane = Lane::new(&machine)?;
    let (begin, end) = (machine.event_create(0, true)?, machine.event_create(0, true)?);
    machine.event_record(begin, lane.stream)?;
    machine.launch(
        lane.stream,
        "kernel",
        Arc::new(|_| {
            std::thread::sleep(Duration::from_millis(20));
            Ok(())
        }),
    )?;
    machine.event_record(end, lane.stream)?;
    machine.event_synchronize(end)?;
    assert!(machine.event_elapsed(begin, end)? >= 19.0, "wall-clock milliseconds");
    assert_eq!((machine.now(), machine.thread_now()), (None, None));
    Ok(())
}
