//! Many threads at once: copies that race with unmaps end in the sticky error, never in a crash; heap and
//! virtual memory stay whole under contention; random operations agree with a naive twin.

use sire_sim::{AccessDesc, Code, CopyKind, Executor, Machine, Options, Pattern, PhysicalId, Prot, StreamId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const RW: [AccessDesc; 1] = [AccessDesc { device: 0, prot: Prot::ReadWrite }];
const PAGE: u64 = 4096;

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

#[test]
fn copies_that_race_with_unmaps_never_crash() -> Outcome {
    let mut losses = 0;
    for round in 0..60 {
        let machine = Machine::new(Options::tiny(16 << 20))?;
        let size = 8 << 20;
        let addr = machine.reserve(size, 0, 0)?;
        let physical = machine.create(0, size, 0)?;
        machine.map(addr, size, 0, physical)?;
        machine.set_access(addr, size, &RW)?;
        let stream = machine.stream_create(0, false, 0)?;
        for byte in 0..4 {
            machine.memset_async(addr, Pattern::U8(byte), size, stream)?;
        }
        std::thread::sleep(std::time::Duration::from_micros(round * 50));
        machine.unmap(addr, size)?;
        match machine.stream_synchronize(stream) {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error.code, Code::ILLEGAL_ADDRESS);
                losses += 1;
            }
        }
    }
    assert!(losses > 0, "no race was ever lost: the test shows nothing");
    Ok(())
}

/// Puts work on two streams that others use as well, and waits for its own in every way there is.
fn push_and_wait(machine: &Machine, streams: [StreamId; 2], seed: u64) -> Result<(), sire_sim::SimError> {
    let mut random = Random(seed * 0x9E37 + 1);
    let mut flying = VecDeque::new();
    for _ in 0..2000 {
        let mine = random.next(2) as usize;
        let (done, event) = (Arc::new(AtomicBool::new(false)), machine.event_create(0, false)?);
        let sets = Arc::clone(&done);
        machine.launch_host(streams[mine], Arc::new(move || sets.store(true, Ordering::SeqCst)))?;
        machine.event_record(event, streams[mine])?;
        flying.push_back((done, event));
        match random.next(4) {
            0 => machine.stream_wait_event(streams[1 - mine], event)?,
            1 => machine.stream_synchronize(streams[mine])?,
            _ => {}
        }
        while flying.len() > random.next(4) as usize {
            let Some((done, event)) = flying.pop_front() else { break };
            machine.event_synchronize(event)?;
            assert!(done.load(Ordering::SeqCst), "an event has passed before what it is behind");
            machine.event_destroy(event)?;
        }
    }
    machine.device_synchronize(0)
}

/// A machine whose streams have threads.
fn with_workers(spin: bool, engines: bool) -> Result<Machine, sire_sim::SimError> {
    Machine::new(Options { executor: Executor::Threads, spin, engines, ..Options::tiny(1 << 20) })
}

#[test]
fn nobody_sleeps_for_what_has_passed() -> Outcome {
    for (spin, engines) in [(false, false), (true, false), (false, true), (true, true)] {
        wait_in_every_way(&with_workers(spin, engines)?)?;
    }
    Ok(())
}

fn wait_in_every_way(machine: &Machine) -> Outcome {
    let streams = [machine.stream_create(0, false, 0)?, machine.stream_create(0, false, 0)?];
    let (ended, ends) = mpsc::channel();
    for seed in 1..5 {
        let (machine, ended) = (machine.clone(), ended.clone());
        std::thread::spawn(move || ended.send(push_and_wait(&machine, streams, seed)));
    }
    for _ in 1..5 {
        assert_eq!(ends.recv_timeout(Duration::from_secs(60)), Ok(Ok(())), "a thread sleeps for ever");
    }
    Ok(())
}

#[test]
fn who_has_more_to_do_leaves_the_work_to_the_worker() -> Outcome {
    let machine = with_workers(false, false)?;
    let stream = machine.stream_create(0, false, 0)?;
    let event = machine.event_create(0, false)?;
    for _ in 0..200 {
        let (ran, runs) = mpsc::channel();
        let runs_here = move || ran.send(std::thread::current().id()).unwrap_or_default();
        machine.launch_host(stream, Arc::new(runs_here))?;
        machine.event_record(event, stream)?;
        machine.launch_host(stream, Arc::new(|| ()))?;
        machine.event_synchronize(event)?;
        assert_ne!(runs.try_recv()?, std::thread::current().id());
        machine.stream_synchronize(stream)?;
    }
    Ok(())
}

/// Two programs of which one waits for streams and the other for events can be compared only if the same threads do their work.
#[test]
fn an_engine_does_everything_whatever_is_waited_for() -> Outcome {
    let machine = with_workers(false, true)?;
    let stream = machine.stream_create(0, false, 0)?;
    let event = machine.event_create(0, false)?;
    let waits: [&dyn Fn() -> Result<(), sire_sim::SimError>; 3] =
        [&|| machine.stream_synchronize(stream), &|| machine.event_synchronize(event), &|| {
            machine.device_synchronize(0)
        }];
    for _ in 0..100 {
        for wait in waits {
            let (ran, runs) = mpsc::channel();
            let runs_here = move || ran.send(std::thread::current().id()).unwrap_or_default();
            machine.launch_host(stream, Arc::new(runs_here))?;
            machine.event_record(event, stream)?;
            wait()?;
            assert_ne!(runs.try_recv()?, std::thread::current().id());
        }
    }
    Ok(())
}

/// How many threads of this process have such a name.
fn threads_named(name: &str) -> std::io::Result<usize> {
    let tasks = std::fs::read_dir("/proc/self/task")?.flatten();
    Ok(tasks
        .filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name))
        .count())
}

/// A worker that was woken for nothing, because somebody who waits has taken the last operation, ends with its stream all the same.
#[test]
fn the_worker_of_a_destroyed_stream_ends_whoever_does_its_last_work() -> Outcome {
    let machine = with_workers(false, false)?;
    let here = std::thread::current().id();
    // Streams, and with them threads, of names that no other test's have.
    for _ in 0..1000 {
        machine.event_destroy(machine.event_create(0, false)?)?;
    }
    for _ in 0..2000 {
        let stream = machine.stream_create(0, false, 0)?;
        let event = machine.event_create(0, false)?;
        let ((ran, runs), (open, opened)) = (mpsc::channel(), mpsc::channel::<()>());
        let opened = Mutex::new(opened);
        let work = move || {
            let _ = ran.send(std::thread::current().id());
            let _ = opened.lock().map(|opened| opened.recv());
        };
        machine.launch_host(stream, Arc::new(work))?;
        machine.event_record(event, stream)?;
        let other = machine.clone();
        let destroyer = std::thread::spawn(move || {
            let who = runs.recv();
            let destroyed = other.stream_destroy(stream);
            // The worker looks once more, and sleeps.
            std::thread::sleep(Duration::from_millis(1));
            drop(open);
            destroyed.map(|()| who)
        });
        // The stream may be gone already.
        let _ = machine.stream_synchronize(stream);
        let who = destroyer.join().map_err(|_| "it panicked")??;
        let name: String = format!("sim-stream-{:x}", stream.0).chars().take(15).collect();
        let until = Instant::now() + Duration::from_secs(20);
        while threads_named(&name)? > 0 {
            assert!(Instant::now() < until, "{name} sleeps for ever");
            std::thread::yield_now();
        }
        if who? == here {
            return Ok(());
        }
    }
    Err("it was always the worker".into())
}

#[test]
fn heap_under_contention_loses_nothing() -> Outcome {
    let machine = Machine::new(Options::tiny(32 << 20))?;
    let work = |seed: u64| -> Result<(), sire_sim::SimError> {
        let mut random = Random(seed * 0x9E37 + 1);
        let stream = machine.stream_create(0, seed.is_multiple_of(2), 0)?;
        let mut held: Vec<(u64, u64, u8)> = Vec::new();
        for _ in 0..300 {
            if random.next(2) == 0 && held.len() < 20 {
                let size = 1 + random.next(20_000);
                let ptr = machine.malloc(0, size)?;
                let byte = random.next(250) as u8;
                machine.memset_async(ptr, Pattern::U8(byte), size, stream)?;
                held.push((ptr, size, byte));
            } else if !held.is_empty() {
                let (ptr, size, byte) = held.swap_remove(random.next(held.len() as u64) as usize);
                let mut out = vec![0u8; size as usize];
                // SAFETY: `out` is valid during the call, which waits because it is pageable.
                unsafe { machine.memcpy_async(out.as_mut_ptr() as u64, ptr, size, CopyKind::DeviceToHost, stream) }?;
                assert!(out.iter().all(|have| *have == byte), "somebody else wrote here");
                machine.free(ptr)?;
            }
        }
        held.into_iter().try_for_each(|(ptr, ..)| machine.free(ptr))
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..5).map(|seed| scope.spawn(move || work(seed))).collect();
        threads.into_iter().for_each(|thread| assert_eq!(thread.join().ok(), Some(Ok(()))));
    });
    assert_eq!(machine.memory_info(0)?.0, 32 << 20);
    assert_eq!(machine.census()["devices"][0]["committed_bytes"], 0);
    Ok(())
}

/// What the twin knows: physicals with their content, and where they are mapped.
#[derive(Default)]
struct Twin {
    physicals: BTreeMap<u64, (u64, Option<u8>, bool)>, // id -> (size, content if written, handle is live)
    mappings: BTreeMap<u64, u64>,                      // offset -> id
}

impl Twin {
    fn used(&self) -> u64 {
        let kept = |id: &u64, live: bool| live || self.mappings.values().any(|mapped| mapped == id);
        self.physicals.iter().filter(|(id, (.., live))| kept(id, *live)).map(|(_, (size, ..))| size).sum()
    }

    /// Those with a handle.
    fn live(&self) -> Vec<u64> {
        self.physicals.iter().filter(|(_, (.., live))| *live).map(|(id, _)| *id).collect()
    }

    fn is_free(&self, at: u64, size: u64) -> bool {
        self.mappings.iter().all(|(base, id)| base + self.physicals[id].0 <= at || at + size <= *base)
    }
}

/// A machine with one reservation, and the twin of what is there.
struct Pair {
    machine: Machine,
    base: u64,
    twin: Twin,
    random: Random,
}

const SPACE: u64 = 64 * PAGE;
const BUDGET: u64 = 48 * PAGE;

impl Pair {
    fn new(seed: u64) -> sire_sim::Result<Pair> {
        let machine = Machine::new(Options { executor: Executor::Inline, ..Options::tiny(BUDGET) })?;
        let base = machine.reserve(SPACE, 0, 0)?;
        Ok(Pair { machine, base, twin: Twin::default(), random: Random(seed) })
    }

    fn step(&mut self) -> Outcome {
        let at = self.random.next(64) * PAGE;
        match self.random.next(5) {
            0 => self.create(),
            1 => self.map(at)?,
            2 => self.unmap(at),
            3 => self.release()?,
            _ => self.write()?,
        }
        assert_eq!(self.machine.memory_info(0)?.0, BUDGET - self.twin.used());
        Ok(())
    }

    fn create(&mut self) {
        let size = (1 + self.random.next(8)) * PAGE;
        match self.machine.create(0, size, 0) {
            Ok(id) => drop(self.twin.physicals.insert(id.0, (size, None, true))),
            Err(error) => assert!(error.code == Code::OUT_OF_MEMORY && self.twin.used() + size > BUDGET, "{error}"),
        }
    }

    /// Any of those with a handle, whether it fits there or not.
    fn map(&mut self, at: u64) -> Outcome {
        let live = self.twin.live();
        if live.is_empty() {
            return Ok(());
        }
        let id = live[self.random.next(live.len() as u64) as usize];
        let size = self.twin.physicals[&id].0;
        let fits = at + size <= SPACE && self.twin.is_free(at, size);
        let result = self.machine.map(self.base + at, size, 0, PhysicalId(id));
        assert_eq!(result.is_ok(), fits, "map {size} at {at}");
        if fits {
            self.machine.set_access(self.base + at, size, &RW)?;
            self.twin.mappings.insert(at, id);
        }
        Ok(())
    }

    fn unmap(&mut self, at: u64) {
        let known = self.twin.mappings.remove(&at);
        let size = known.map_or(PAGE, |id| self.twin.physicals[&id].0);
        assert_eq!(self.machine.unmap(self.base + at, size).is_ok(), known.is_some());
    }

    fn release(&mut self) -> Outcome {
        let Some(id) = self.twin.live().first().copied() else { return Ok(()) };
        self.machine.release(PhysicalId(id))?;
        if let Some(found) = self.twin.physicals.get_mut(&id) {
            found.2 = false;
        }
        Ok(())
    }

    fn write(&mut self) -> Outcome {
        let Some((at, id)) = self.twin.mappings.iter().next_back().map(|(at, id)| (*at, *id)) else { return Ok(()) };
        let byte = self.random.next(255) as u8;
        let Some(found) = self.twin.physicals.get_mut(&id) else { return Ok(()) };
        found.1 = Some(byte);
        Ok(self.machine.memset(0, self.base + at, Pattern::U8(byte), found.0)?)
    }

    /// What the device has is what the twin says.
    fn compare(&self) -> Outcome {
        for (at, id) in &self.twin.mappings {
            let (size, byte, _) = self.twin.physicals[id];
            let mut out = vec![0u8; size as usize];
            // SAFETY: `out` is valid during the call, which waits.
            unsafe { self.machine.memcpy(0, out.as_mut_ptr() as u64, self.base + at, size, CopyKind::DeviceToHost) }?;
            let poison = || sire_sim::POISON.repeat(size as usize / 4);
            assert!(
                out == byte.map_or_else(poison, |byte| vec![byte; size as usize]),
                "not what was written last at {at}"
            );
        }
        assert_eq!(self.machine.census()["devices"][0]["committed_bytes"], self.twin.used());
        Ok(())
    }
}

#[test]
fn random_virtual_memory_agrees_with_a_naive_twin() -> Outcome {
    for seed in 1..=20 {
        let mut pair = Pair::new(seed)?;
        for _ in 0..400 {
            pair.step().map_err(|error| format!("seed {seed}: {error}"))?;
        }
        pair.compare()?;
    }
    Ok(())
}
