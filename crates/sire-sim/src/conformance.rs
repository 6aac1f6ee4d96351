//! The bargain of `Driver`, as questions that any implementation must answer.
//!
//! [`suite`] asks all that leave the device healthy; [`losing_suite`] those after which the device is lost
//! (a real context would be, too: run them in a process of their own). Each question is a function that takes
//! a driver, so that a failing one can be asked alone. A wrong answer is a failed assertion.
//!
//! The first device needs 16 granules of free memory, and nobody else who allocates on it meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::missing_panics_doc)]

use sire_core::digest::Digest;
use sire_core::driver::{
    Access, Addr, Device, Driver, DriverErrorKind, DriverResult, Event, Physical, ProgramStream, Rights, Stream,
};
use std::fmt::Debug;

const HERE: Device = Device(0);

/// One question.
pub type Question<D> = fn(&D);

/// The questions of [`suite`], by name.
#[must_use]
pub fn questions<D: Driver>() -> Vec<(&'static str, Question<D>)> {
    vec![
        ("devices", devices),
        ("reservations", reservations),
        ("physicals", physicals),
        ("exhaustion", exhaustion),
        ("mapping_rules", mapping_rules),
        ("whole_unmap", whole_unmap),
        ("access_rules", access_rules),
        ("released_but_mapped", released_but_mapped),
        ("content_belongs_to_the_physical", content_belongs_to_the_physical),
        ("mapped_twice", mapped_twice),
        ("stream_order", stream_order),
        ("events", events),
        ("copies", copies),
        ("copies_across_mappings", copies_across_mappings),
        ("fills", fills),
        ("hashes", hashes),
        ("registration", registration),
        ("synchronize", synchronize),
        ("dead_handles", dead_handles),
        ("no_capture", no_capture),
        ("program_streams", program_streams),
        ("threads", threads),
    ]
}

/// Asks every question of a fresh driver.
pub fn suite<D: Driver>(make: impl Fn() -> D) {
    for (name, question) in questions::<D>() {
        let driver = make();
        eprintln!("conformance: {name}");
        question(&driver);
    }
}

/// Asks the questions after which the device is lost, each of a fresh driver.
pub fn losing_suite<D: Driver>(make: impl Fn() -> D) {
    for question in
        [no_access_before_set_access::<D>, no_access_once_it_is_taken_back::<D>, unmapped_range_is_lost::<D>]
    {
        question(&make());
    }
}

fn refused<T: Debug>(result: DriverResult<T>, kind: DriverErrorKind, what: &str) {
    match result {
        Ok(value) => panic!("{what}: accepted ({value:?}), expected {kind:?}"),
        Err(error) => assert_eq!(error.kind, kind, "{what}: {error}"),
    }
}

fn invalid<T: Debug>(result: DriverResult<T>, what: &str) {
    refused(result, DriverErrorKind::Invalid, what);
}

fn grain<D: Driver>(driver: &D) -> u64 {
    driver.granularity(HERE).unwrap()
}

fn free<D: Driver>(driver: &D) -> u64 {
    driver.memory_info(HERE).unwrap().free
}

const RIGHTS: [Access; 1] = [Access { device: HERE, rights: Rights::ReadWrite }];

/// Mapped memory with access: `granules` of it, at a reservation of its own.
struct Memory {
    addr: Addr,
    size: u64,
}

impl Memory {
    fn new<D: Driver>(driver: &D, granules: u64) -> Memory {
        let size = granules * grain(driver);
        let addr = driver.reserve(size, 0).unwrap();
        let physical = driver.create(HERE, size).unwrap();
        driver.map(addr, size, physical).unwrap();
        driver.set_access(addr, size, &RIGHTS).unwrap();
        driver.release(physical).unwrap();
        Memory { addr, size }
    }

    fn drop<D: Driver>(self, driver: &D) {
        driver.synchronize(HERE).unwrap();
        driver.unmap(self.addr, self.size).unwrap();
        driver.unreserve(self.addr, self.size).unwrap();
    }
}

/// Waits until `stream` has passed everything it holds.
fn pass<D: Driver>(driver: &D, stream: Stream) -> DriverResult<()> {
    let event = driver.open_event(HERE).unwrap();
    let result = driver.record(event, stream).and_then(|()| driver.wait(event));
    driver.close_event(event).unwrap();
    result
}

fn write<D: Driver>(driver: &D, addr: Addr, bytes: &[u8]) {
    let stream = driver.open_stream(HERE).unwrap();
    // SAFETY: `bytes` outlives the wait that follows.
    unsafe { driver.copy_to_device(stream, addr, bytes.as_ptr(), bytes.len() as u64) }.unwrap();
    pass(driver, stream).unwrap();
    driver.close_stream(stream).unwrap();
}

fn read<D: Driver>(driver: &D, addr: Addr, len: u64) -> Vec<u8> {
    let stream = driver.open_stream(HERE).unwrap();
    let mut bytes = vec![0; len as usize];
    // SAFETY: `bytes` outlives the wait that follows, and is not touched before.
    unsafe { driver.copy_to_host(stream, bytes.as_mut_ptr(), addr, len) }.unwrap();
    pass(driver, stream).unwrap();
    driver.close_stream(stream).unwrap();
    bytes
}

/// Bytes that differ from place to place and from seed to seed (a prime period, so that no page repeats another).
fn pattern(len: u64, seed: u64) -> Vec<u8> {
    let period: Vec<u8> = (0..4099u64).map(|n| (n.wrapping_mul(31) + (n >> 8) + seed * 97) as u8).collect();
    let mut bytes = period.repeat(len as usize / period.len() + 1);
    bytes.truncate(len as usize);
    bytes
}

/// Devices exist, have a sensible granularity and memory, and those that do not exist are `Invalid`.
pub fn devices<D: Driver>(driver: &D) {
    let count = driver.device_count().unwrap();
    assert!(count > 0);
    for device in (0..count).map(Device) {
        assert!(driver.granularity(device).unwrap().is_power_of_two());
        let info = driver.memory_info(device).unwrap();
        assert!(info.free <= info.total && info.total > 0);
    }
    invalid(driver.granularity(Device(count)), "granularity of a device that does not exist");
    invalid(driver.memory_info(Device(count)), "memory of a device that does not exist");
    invalid(driver.can_access_peer(HERE, Device(count)), "a peer that does not exist");
    invalid(driver.create(Device(count), grain(driver)), "create on a device that does not exist");
}

/// Reservations use no memory, keep alignment, do not overlap, and are given back whole and once.
pub fn reservations<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let before = free(driver);
    let plain = driver.reserve(4 * grain, 0).unwrap();
    let aligned = driver.reserve(grain, 8 * grain).unwrap();
    assert_eq!(plain.0 % grain, 0);
    assert_eq!(aligned.0 % (8 * grain), 0);
    assert!(plain.0 + 4 * grain <= aligned.0 || aligned.0 + grain <= plain.0, "reservations overlap");
    assert_eq!(free(driver), before, "a reservation took memory");
    invalid(driver.reserve(grain + 1, 0), "a size that is no multiple");
    invalid(driver.reserve(0, 0), "nothing");
    invalid(driver.unreserve(plain, 2 * grain), "half a reservation");
    invalid(driver.unreserve(plain.offset(grain), grain), "the middle of a reservation");
    driver.unreserve(plain, 4 * grain).unwrap();
    invalid(driver.unreserve(plain, 4 * grain), "a reservation given back twice");
    driver.unreserve(aligned, grain).unwrap();
}

/// Physicals take memory when made, give it back when released, and are released once.
pub fn physicals<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let before = free(driver);
    let physical = driver.create(HERE, 4 * grain).unwrap();
    assert!(free(driver) <= before - 4 * grain, "create took no memory");
    invalid(driver.create(HERE, grain - 1), "a size that is no multiple");
    invalid(driver.create(HERE, 0), "nothing");
    let during = free(driver);
    driver.release(physical).unwrap();
    assert!(free(driver) >= during + 4 * grain, "release gave no memory back");
    invalid(driver.release(physical), "a physical released twice");
}

/// More than there is: `OutOfMemory`, and nothing else is disturbed.
pub fn exhaustion<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let info = driver.memory_info(HERE).unwrap();
    let size = info.total.next_multiple_of(grain) + grain;
    refused(driver.create(HERE, size), DriverErrorKind::OutOfMemory, "more than the device has");
    assert_eq!(free(driver), info.free, "the failed create kept memory");
    let memory = Memory::new(driver, 1);
    memory.drop(driver);
}

/// `map` takes a whole physical, inside one reservation, where nothing is.
pub fn mapping_rules<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let addr = driver.reserve(4 * grain, 0).unwrap();
    let physical = driver.create(HERE, 2 * grain).unwrap();
    invalid(driver.map(addr, grain, physical), "half a physical");
    invalid(driver.map(addr, 4 * grain, physical), "more than the physical");
    invalid(driver.map(addr.offset(grain / 2), 2 * grain, physical), "a misaligned address");
    invalid(driver.map(addr.offset(3 * grain), 2 * grain, physical), "across the reservation's end");
    driver.map(addr.offset(grain), 2 * grain, physical).unwrap();
    let other = driver.create(HERE, grain).unwrap();
    invalid(driver.map(addr.offset(2 * grain), grain, other), "where something is mapped");
    driver.map(addr.offset(3 * grain), grain, other).unwrap();
    invalid(driver.unreserve(addr, 4 * grain), "a reservation with memory in it");
    for (at, size) in [(grain, 2 * grain), (3 * grain, grain)] {
        driver.unmap(addr.offset(at), size).unwrap();
    }
    driver.release(physical).unwrap();
    invalid(driver.map(addr, 2 * grain, physical), "a released physical");
    driver.release(other).unwrap();
    driver.unreserve(addr, 4 * grain).unwrap();
}

/// `unmap` takes exactly one mapping; a refused one changes nothing.
pub fn whole_unmap<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let memory = Memory::new(driver, 4);
    let bytes = pattern(memory.size, 1);
    write(driver, memory.addr, &bytes);
    invalid(driver.unmap(memory.addr, 2 * grain), "the first half of a mapping");
    invalid(driver.unmap(memory.addr.offset(2 * grain), 2 * grain), "the second half of a mapping");
    invalid(driver.unmap(memory.addr, 8 * grain), "more than a mapping");
    assert_eq!(read(driver, memory.addr, memory.size), bytes, "a refused unmap changed something");
    driver.unmap(memory.addr, memory.size).unwrap();
    invalid(driver.unmap(memory.addr, memory.size), "a mapping removed twice");
    driver.unreserve(memory.addr, memory.size).unwrap();
}

/// `set_access` may span mappings, but no hole.
pub fn access_rules<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let addr = driver.reserve(3 * grain, 0).unwrap();
    let physicals: Vec<Physical> = (0..2).map(|_| driver.create(HERE, grain).unwrap()).collect();
    invalid(driver.set_access(addr, grain, &RIGHTS), "access where nothing is mapped");
    for (n, physical) in physicals.iter().enumerate() {
        driver.map(addr.offset(n as u64 * grain), grain, *physical).unwrap();
    }
    invalid(driver.set_access(addr, 3 * grain, &RIGHTS), "access over a hole");
    invalid(driver.set_access(addr.offset(1), grain, &RIGHTS), "access to a misaligned range");
    driver.set_access(addr, 2 * grain, &RIGHTS).unwrap();
    let bytes = pattern(2 * grain, 2);
    write(driver, addr, &bytes);
    assert_eq!(read(driver, addr, 2 * grain), bytes);
    for (n, physical) in physicals.iter().enumerate() {
        driver.unmap(addr.offset(n as u64 * grain), grain).unwrap();
        driver.release(*physical).unwrap();
    }
    driver.unreserve(addr, 3 * grain).unwrap();
}

/// A released physical that is mapped keeps its memory until it is unmapped.
pub fn released_but_mapped<D: Driver>(driver: &D) {
    let before = free(driver);
    let memory = Memory::new(driver, 4); // its handle is released already
    let size = memory.size;
    let bytes = pattern(size, 3);
    write(driver, memory.addr, &bytes);
    assert!(free(driver) <= before - size, "mapped memory went back to the device");
    assert_eq!(read(driver, memory.addr, size), bytes);
    let during = free(driver);
    memory.drop(driver);
    assert!(free(driver) >= during + size, "unmapped memory did not go back to the device");
}

/// What is written at one address is read at another, when the physical has moved there.
pub fn content_belongs_to_the_physical<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let (from, to) = (driver.reserve(grain, 0).unwrap(), driver.reserve(grain, 0).unwrap());
    let physical = driver.create(HERE, grain).unwrap();
    let bytes = pattern(grain, 4);
    driver.map(from, grain, physical).unwrap();
    driver.set_access(from, grain, &RIGHTS).unwrap();
    write(driver, from, &bytes);
    driver.unmap(from, grain).unwrap();
    driver.map(to, grain, physical).unwrap();
    driver.set_access(to, grain, &RIGHTS).unwrap();
    assert_eq!(read(driver, to, grain), bytes);
    driver.unmap(to, grain).unwrap();
    driver.release(physical).unwrap();
    driver.unreserve(from, grain).unwrap();
    driver.unreserve(to, grain).unwrap();
}

/// One physical at two addresses is the same bytes; it goes when both mappings and the handle are gone.
pub fn mapped_twice<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let addr = driver.reserve(2 * grain, 0).unwrap();
    let physical = driver.create(HERE, grain).unwrap();
    driver.map(addr, grain, physical).unwrap();
    driver.map(addr.offset(grain), grain, physical).unwrap();
    driver.set_access(addr, 2 * grain, &RIGHTS).unwrap();
    driver.release(physical).unwrap();
    let bytes = pattern(grain, 5);
    write(driver, addr, &bytes);
    assert_eq!(read(driver, addr.offset(grain), grain), bytes);
    let during = free(driver);
    driver.unmap(addr, grain).unwrap();
    assert_eq!(free(driver), during, "memory went while it was mapped elsewhere");
    assert_eq!(read(driver, addr.offset(grain), grain), bytes);
    driver.unmap(addr.offset(grain), grain).unwrap();
    driver.unreserve(addr, 2 * grain).unwrap();
}

/// Work on one stream runs in order.
pub fn stream_order<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 2);
    let stream = driver.open_stream(HERE).unwrap();
    let mut seen = vec![[0u8; 64]; 32];
    for (n, out) in seen.iter_mut().enumerate() {
        driver.fill(stream, memory.addr, memory.size, n as u8 + 1).unwrap();
        // SAFETY: `seen` outlives the wait below.
        unsafe { driver.copy_to_host(stream, out.as_mut_ptr(), memory.addr.offset(memory.size - 64), 64) }.unwrap();
    }
    pass(driver, stream).unwrap();
    for (n, out) in seen.iter().enumerate() {
        assert_eq!(*out, [n as u8 + 1; 64], "operation {n} ran out of order");
    }
    driver.close_stream(stream).unwrap();
    memory.drop(driver);
}

/// Events: passed if never recorded; behind their stream's work when recorded; moved by recording again.
pub fn events<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 1);
    let stream = driver.open_stream(HERE).unwrap();
    let event = driver.open_event(HERE).unwrap();
    assert!(driver.query(event).unwrap(), "an event never recorded has passed");
    driver.wait(event).unwrap();
    for byte in 1..4u8 {
        let mut out = [0u8; 16];
        driver.fill(stream, memory.addr, 16, byte).unwrap();
        // SAFETY: `out` lives until the event behind the copy has passed.
        unsafe { driver.copy_to_host(stream, out.as_mut_ptr(), memory.addr, 16) }.unwrap();
        driver.record(event, stream).unwrap();
        if byte == 2 {
            assert!(poll(driver, event), "an event never passed");
        } else {
            driver.wait(event).unwrap();
        }
        assert!(driver.query(event).unwrap());
        assert_eq!(out, [byte; 16]);
    }
    driver.close_event(event).unwrap();
    driver.close_stream(stream).unwrap();
    memory.drop(driver);
}

/// Asks until the event has passed, for at most ten seconds.
fn poll<D: Driver>(driver: &D, event: Event) -> bool {
    let start = std::time::Instant::now();
    while start.elapsed().as_secs() < 10 {
        if driver.query(event).unwrap() {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

/// Copies of all sizes, at odd addresses, arrive whole and touch nothing else.
pub fn copies<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 4);
    let whole = pattern(memory.size, 6);
    write(driver, memory.addr, &whole);
    assert_eq!(read(driver, memory.addr, memory.size), whole);
    assert!(read(driver, memory.addr, 0).is_empty());
    let mut expected = whole;
    for (at, len) in [(0u64, 1u64), (3, 5), (memory.size / 2 - 7, 777), (memory.size - 1, 1)] {
        let piece = pattern(len, at + 7);
        write(driver, memory.addr.offset(at), &piece);
        expected[at as usize..(at + len) as usize].copy_from_slice(&piece);
        assert_eq!(read(driver, memory.addr.offset(at), len), piece);
    }
    assert_eq!(read(driver, memory.addr, memory.size), expected);
    memory.drop(driver);
}

/// A copy may cross from one mapping into the next.
pub fn copies_across_mappings<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let addr = driver.reserve(3 * grain, 0).unwrap();
    for n in [2, 0, 1] {
        let physical = driver.create(HERE, grain).unwrap();
        driver.map(addr.offset(n * grain), grain, physical).unwrap();
        driver.release(physical).unwrap();
    }
    driver.set_access(addr, 3 * grain, &RIGHTS).unwrap();
    let bytes = pattern(2 * grain, 8);
    write(driver, addr.offset(grain / 2), &bytes);
    assert_eq!(read(driver, addr.offset(grain / 2), 2 * grain), bytes);
    for n in 0..3 {
        driver.unmap(addr.offset(n * grain), grain).unwrap();
    }
    driver.unreserve(addr, 3 * grain).unwrap();
}

/// Fills of odd lengths touch nothing else.
pub fn fills<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 1);
    let stream = driver.open_stream(HERE).unwrap();
    driver.fill(stream, memory.addr, memory.size, 0x11).unwrap();
    driver.fill(stream, memory.addr.offset(5), 1001, 0x22).unwrap();
    driver.fill(stream, memory.addr.offset(9), 0, 0x33).unwrap();
    pass(driver, stream).unwrap();
    let mut expected = vec![0x11; memory.size as usize];
    expected[5..1006].fill(0x22);
    assert!(read(driver, memory.addr, memory.size) == expected, "a fill missed bytes, or touched others");
    driver.close_stream(stream).unwrap();
    memory.drop(driver);
}

/// Digests are those of the definition, page by page, at the end of a range and across mappings; or the driver says that it cannot.
pub fn hashes<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 2);
    let bytes = pattern(memory.size, 10);
    write(driver, memory.addr, &bytes);
    let Some(whole) = hash(driver, memory.addr, memory.size, memory.size) else { return memory.drop(driver) };
    assert_eq!(whole, [Digest::of(&bytes)]);
    for (at, len, page) in [(0u64, memory.size, 4096u64), (16, 1, 16), (48, 4099, 1024), (32, memory.size - 39, 65_552)]
    {
        let found = hash(driver, memory.addr.offset(at), len, page).unwrap();
        let pages = bytes[at as usize..(at + len) as usize].chunks(page as usize);
        assert!(found.into_iter().eq(pages.map(Digest::of)), "{len} bytes at {at} by {page}");
    }
    write(driver, memory.addr, &vec![7; memory.size as usize]);
    let same = hash(driver, memory.addr, memory.size, 4096).unwrap();
    assert!(same.iter().all(|digest| digest.constant() == Some(0x0707_0707_0707_0707)));
    assert!(hash(driver, memory.addr, 0, 4096).unwrap().is_empty());
    let stream = driver.open_stream(HERE).unwrap();
    let mut out = [Digest::default(); 1];
    // SAFETY: refused calls write nothing.
    unsafe {
        invalid(
            driver.hash(stream, memory.addr.offset(8), 16, 16, out.as_mut_ptr()),
            "a start that is no multiple of 16",
        );
        invalid(driver.hash(stream, memory.addr, 16, 8, out.as_mut_ptr()), "a page that is no multiple of 16");
        invalid(driver.hash(stream, memory.addr, 16, 0, out.as_mut_ptr()), "pages of nothing");
    }
    driver.close_stream(stream).unwrap();
    memory.drop(driver);
}

/// The digests of a range; `None` if the driver does not hash.
fn hash<D: Driver>(driver: &D, src: Addr, len: u64, page: u64) -> Option<Vec<Digest>> {
    let stream = driver.open_stream(HERE).unwrap();
    let mut out = vec![Digest::default(); len.div_ceil(page) as usize];
    // SAFETY: `out` outlives the wait that follows, and is not touched before.
    let queued = unsafe { driver.hash(stream, src, len, page, out.as_mut_ptr()) };
    if queued.as_ref().is_err_and(|error| error.kind == DriverErrorKind::Unsupported) {
        driver.close_stream(stream).unwrap();
        return None;
    }
    queued.unwrap();
    pass(driver, stream).unwrap();
    driver.close_stream(stream).unwrap();
    Some(out)
}

/// Registered host memory carries copies both ways; it is unregistered once.
pub fn registration<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 2);
    let (page, len) = (4096, memory.size as usize);
    let mut buffer = vec![0u8; len + page];
    let skip = buffer.as_ptr().align_offset(page);
    let host = &mut buffer[skip..skip + len];
    let (ptr, size) = (host.as_mut_ptr(), memory.size);
    invalid(driver.unregister_host(ptr), "host memory that was never registered");
    // SAFETY: `buffer` lives to the end of this function, and is unregistered before.
    unsafe { driver.register_host(ptr, size) }.unwrap();
    let bytes = pattern(size, 9);
    host.copy_from_slice(&bytes);
    let stream = driver.open_stream(HERE).unwrap();
    // SAFETY: the host range is valid, and is not touched before the stream has passed the copy.
    unsafe { driver.copy_to_device(stream, memory.addr, ptr, size) }.unwrap();
    pass(driver, stream).unwrap();
    host.fill(0);
    // SAFETY: as above.
    unsafe { driver.copy_to_host(stream, ptr, memory.addr, size) }.unwrap();
    pass(driver, stream).unwrap();
    assert!(host == bytes.as_slice(), "the bytes came back different");
    driver.unregister_host(ptr).unwrap();
    invalid(driver.unregister_host(ptr), "host memory unregistered twice");
    driver.close_stream(stream).unwrap();
    memory.drop(driver);
}

/// `synchronize` waits for all streams; a closed stream's work is still done.
pub fn synchronize<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 2);
    let mut seen = [[0u8; 8]; 3];
    for (n, out) in seen.iter_mut().enumerate() {
        let stream = driver.open_stream(HERE).unwrap();
        let at = memory.addr.offset(n as u64 * 256);
        driver.fill(stream, at, 256, n as u8 + 1).unwrap();
        // SAFETY: `seen` outlives the synchronize below.
        unsafe { driver.copy_to_host(stream, out.as_mut_ptr(), at, 8) }.unwrap();
        driver.close_stream(stream).unwrap();
    }
    driver.synchronize(HERE).unwrap();
    assert_eq!(seen, [[1; 8], [2; 8], [3; 8]]);
    memory.drop(driver);
}

/// What was closed cannot be used.
pub fn dead_handles<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 1);
    let (stream, event) = (driver.open_stream(HERE).unwrap(), driver.open_event(HERE).unwrap());
    driver.close_stream(stream).unwrap();
    invalid(driver.close_stream(stream), "a stream closed twice");
    invalid(driver.fill(stream, memory.addr, 1, 0), "a fill on a closed stream");
    let other = driver.open_stream(HERE).unwrap();
    driver.close_event(event).unwrap();
    invalid(driver.close_event(event), "an event closed twice");
    invalid(driver.record(event, other), "a closed event");
    driver.close_stream(other).unwrap();
    memory.drop(driver);
}

/// Without a capture, no stream captures.
pub fn no_capture<D: Driver>(driver: &D) {
    assert!(!driver.is_capturing(HERE, ProgramStream(0)).unwrap());
}

/// The program's streams can be made to wait for ours, where the driver can do that: what is behind has seen what was before.
pub fn program_streams<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 1);
    let (stream, ours) = (driver.open_stream(HERE).unwrap(), driver.open_event(HERE).unwrap());
    let (program, theirs) = (ProgramStream(0), driver.open_event(HERE).unwrap());
    let mut seen = [0u8; 64];
    driver.fill(stream, memory.addr, 64, 7).unwrap();
    // SAFETY: `seen` lives until the event behind the copy has passed: the device is synchronised below.
    unsafe { driver.copy_to_host(stream, seen.as_mut_ptr(), memory.addr, 64) }.unwrap();
    driver.record(ours, stream).unwrap();
    match driver.wait_on(ours, HERE, program) {
        Ok(()) => {
            driver.record_on(theirs, program).unwrap();
            driver.wait(theirs).unwrap();
            assert!(driver.query(ours).unwrap(), "the program's stream did not wait");
            assert_eq!(seen, [7; 64]);
        }
        Err(error) => assert_eq!(error.kind, DriverErrorKind::Unsupported, "{error}"),
    }
    driver.synchronize(HERE).unwrap();
    [ours, theirs].into_iter().for_each(|event| driver.close_event(event).unwrap());
    assert!(driver.wait_on(ours, HERE, program).is_err(), "a closed event");
    driver.close_stream(stream).unwrap();
    memory.drop(driver);
}

/// Verbs work from any thread, at the same time.
pub fn threads<D: Driver>(driver: &D) {
    let before = free(driver);
    std::thread::scope(|scope| {
        for seed in 0..4u64 {
            scope.spawn(move || {
                for round in 0..8 {
                    let memory = Memory::new(driver, 2);
                    let bytes = pattern(memory.size, seed * 8 + round);
                    write(driver, memory.addr, &bytes);
                    assert!(read(driver, memory.addr, memory.size) == bytes, "threads see each other's bytes");
                    driver.unmap(memory.addr, memory.size).unwrap();
                    driver.unreserve(memory.addr, memory.size).unwrap();
                }
            });
        }
    });
    assert_eq!(free(driver), before, "memory leaked");
}

/// Rights can be taken back: then a copy is refused, or the device is lost.
pub fn no_access_once_it_is_taken_back<D: Driver>(driver: &D) {
    let memory = Memory::new(driver, 1);
    write(driver, memory.addr, &[1; 64]);
    driver.set_access(memory.addr, memory.size, &[Access { device: HERE, rights: Rights::None }]).unwrap();
    let stream = driver.open_stream(HERE).unwrap();
    let outcome = driver.fill(stream, memory.addr, 64, 2).and_then(|()| driver.synchronize(HERE));
    assert!(outcome.is_err(), "memory that may not be touched was filled");
}

/// A mapping has no access before `set_access`: a copy is refused, or the device is lost.
pub fn no_access_before_set_access<D: Driver>(driver: &D) {
    let grain = grain(driver);
    let addr = driver.reserve(grain, 0).unwrap();
    let physical = driver.create(HERE, grain).unwrap();
    driver.map(addr, grain, physical).unwrap();
    touch_and_lose(driver, addr);
}

/// Device work on a reserved range without memory is refused, or loses the device.
pub fn unmapped_range_is_lost<D: Driver>(driver: &D) {
    let addr = driver.reserve(grain(driver), 0).unwrap();
    touch_and_lose(driver, addr);
}

fn touch_and_lose<D: Driver>(driver: &D, addr: Addr) {
    let stream = driver.open_stream(HERE).unwrap();
    let mut out = [0u8; 8];
    // SAFETY: `out` lives until the stream has passed the copy (or the device is lost).
    let queued = unsafe { driver.copy_to_host(stream, out.as_mut_ptr(), addr, 8) };
    match queued {
        Err(error) => assert!(matches!(error.kind, DriverErrorKind::Invalid | DriverErrorKind::Lost), "{error}"),
        Ok(()) => {
            refused(driver.synchronize(HERE), DriverErrorKind::Lost, "synchronize after an illegal access");
            refused(driver.open_event(HERE), DriverErrorKind::Lost, "anything after an illegal access");
        }
    }
}
