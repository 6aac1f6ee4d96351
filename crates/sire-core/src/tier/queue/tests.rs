//! Who carries requests out: the kernel where a room has a file, threads elsewhere, and the room itself for what the kernel leaves undone.

use super::*;
use crate::raw::{Keeper, Kept, Pages};
use crate::tier::Room;
use crate::tier::direct::{BLOCK, DirectFile};
use std::io::{PipeReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const LEN: u64 = 64 << 10;
const RECORDS: u64 = 12;

fn must<T, E: std::fmt::Display>(outcome: std::result::Result<T, E>) -> T {
    outcome.unwrap_or_else(|e| unreachable!("{e}"))
}

/// A file that counts how often it is asked as a room.
#[derive(Debug)]
struct Counted {
    file: DirectFile,
    /// Whether it shows that it is a file.
    shows: bool,
    asked: AtomicUsize,
}

impl Room for Counted {
    fn len(&self) -> u64 {
        LEN * RECORDS
    }
    fn align(&self) -> u64 {
        BLOCK
    }
    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.direct().filter(|_| self.shows)
    }
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.file.write(bytes, at).map_err(|e| Error::new(Status::BackupIo, e.to_string()))
    }
    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match self.file.read(into, at) {
            Ok(count) if count == into.len() => Ok(()),
            Ok(count) => Err(Error::new(Status::BackupIo, format!("it ends after {count}"))),
            Err(e) => Err(Error::new(Status::BackupIo, e.to_string())),
        }
    }
}

impl Counted {
    fn new(shows: bool) -> Arc<Counted> {
        let file = must(tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")));
        must(file.set_len(LEN * RECORDS));
        Arc::new(Counted { file: DirectFile::new(file, true), shows, asked: AtomicUsize::new(0) })
    }

    fn record(self: &Arc<Counted>, number: u64) -> Record {
        Record { room: Arc::clone(self) as Arc<dyn Room>, at: number * LEN, len: LEN - 100 }
    }

    fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::SeqCst)
    }
}

/// One for each record.
pub(crate) fn buffers() -> Vec<Span> {
    let pages = must(Pages::new(LEN * RECORDS, LEN * RECORDS));
    must(pages.bring_in(0..LEN * RECORDS));
    let kept: Arc<dyn Keeper> = Arc::new(Kept(pages));
    (0..RECORDS).filter_map(|i| Span::new(Arc::clone(&kept), i * LEN, LEN)).collect()
}

/// The kernel lets this process have a queue. Where it does not, only threads are there to be tested.
pub(crate) fn has_ring() -> bool {
    let allowed = Ring::<Sent<u64>>::new(4).is_ok();
    if !allowed {
        eprintln!("the kernel refuses io_uring here: threads only");
    }
    allowed
}

fn content(number: u64) -> u8 {
    number as u8 + 1
}

/// Writes all records through a queue, overwrites the buffers, reads them back; the sums must be those of the content.
fn there_and_back(room: &Arc<Counted>, ring: bool) -> (usize, usize) {
    let buffers = buffers();
    let mut queue = Queue::new(4, ring);
    let mut sums = vec![Sum::default(); RECORDS as usize];
    for (number, buffer) in (0u64..).zip(&buffers) {
        buffer.write(|bytes| bytes.fill(content(number)));
        queue.write(room.record(number), buffer.clone(), number);
    }
    while let Some(done) = queue.wait() {
        sums[done.ticket as usize] = must(done.outcome).sum;
    }
    let written = room.asked();
    for (number, buffer) in (0u64..).zip(&buffers) {
        buffer.write(|bytes| bytes.fill(0xEE));
        queue.read(room.record(number), buffer.clone(), Some(sums[number as usize]), number);
    }
    let mut seen = 0;
    while let Some(done) = queue.wait() {
        let right = must(done.outcome).bytes.read(|bytes| bytes.iter().all(|&byte| byte == content(done.ticket)));
        assert!(right, "record {} came back changed", done.ticket);
        seen += 1;
    }
    assert_eq!(seen, RECORDS);
    (written, room.asked())
}

#[test]
fn the_kernel_carries_out_what_a_file_holds() {
    let room = Counted::new(true);
    let all = RECORDS as usize;
    let expected = if has_ring() && room.file().is_some() { (0, 0) } else { (all, all) };
    assert_eq!(there_and_back(&room, true), expected);
}

#[test]
fn threads_carry_out_the_rest() {
    let all = RECORDS as usize;
    assert_eq!(there_and_back(&Counted::new(true), false), (all, all), "the kernel's queue is not wanted");
    assert_eq!(there_and_back(&Counted::new(false), true), (all, all), "the room shows no file");
}

#[test]
fn what_the_kernel_leaves_undone_the_room_is_asked_for() {
    let room = Counted::new(true);
    let buffers = buffers();
    // The file ends in the middle of the third record.
    must(room.file.plain().set_len(2 * LEN + BLOCK));
    let mut queue = Queue::new(4, true);
    for number in 0..4 {
        queue.read(room.record(number), buffers[number as usize].clone(), None, number);
    }
    let mut failed = Vec::new();
    while let Some(done) = queue.wait() {
        failed.extend(done.outcome.err().map(|error| (done.ticket, error.message)));
    }
    failed.sort();
    assert_eq!(failed, [(2, format!("it ends after {BLOCK}")), (3, "it ends after 0".to_owned())]);
    let expected = if has_ring() && room.file().is_some() { 2 } else { 4 };
    assert_eq!(room.asked(), expected);
}

#[test]
fn bytes_that_changed_on_the_disk_are_refused() {
    let room = Counted::new(true);
    let buffers = buffers();
    let mut queue = Queue::new(4, true);
    buffers[0].write(|bytes| bytes.fill(7));
    queue.write(room.record(0), buffers[0].clone(), 0);
    let sum = queue.wait().map(|done| must(done.outcome).sum);
    must(room.file.plain().write_all_at(&[8], 5000));
    queue.read(room.record(0), buffers[1].clone(), sum, 0);
    let outcome = queue.wait().map(|done| done.outcome.map_err(|error| error.message));
    assert!(matches!(&outcome, Some(Err(message)) if message.contains("checksum differs")), "{outcome:?}");
}

#[test]
fn a_queue_that_is_dropped_waits_for_the_kernel() {
    let room = Counted::new(true);
    let buffers = buffers();
    let mut queue = Queue::new(4, true);
    for (number, buffer) in (0u64..).zip(&buffers) {
        buffer.write(|bytes| bytes.fill(content(number)));
        queue.write(room.record(number), buffer.clone(), number);
    }
    drop(queue);
    let mut last = [0; 1];
    must(room.file.plain().read_exact_at(&mut last, 3 * LEN));
    assert_eq!(last[0], content(3), "a request that had begun was given up");
    let references = buffers.iter().map(|span| Arc::strong_count(span.keeper())).max();
    assert_eq!(references, Some(RECORDS as usize), "the ring still holds buffers");
}

/// What comes through a pipe, whatever is asked for.
#[derive(Debug)]
struct Pipe(PipeReader);

impl Room for Pipe {
    fn len(&self) -> u64 {
        BLOCK
    }
    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::new(Status::BackupIo, "the pipe was to be written to"))
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
        Err(Error::new(Status::BackupIo, "the pipe was to be read by a thread"))
    }
}

#[test]
fn the_kernel_has_two_requests_at_once() {
    if !has_ring() {
        return;
    }
    let buffers = buffers();
    let mut queue = Queue::new(2, true);
    let mut writers = Vec::new();
    for (number, buffer) in buffers.iter().enumerate().take(2) {
        let (reader, writer) = must(std::io::pipe());
        writers.push(writer);
        let record = Record { room: Arc::new(Pipe(reader)), at: 0, len: BLOCK };
        queue.read(record, buffer.clone(), None, number);
    }
    // The one that was asked for last is there first: it did not wait for the other.
    for number in [1, 0] {
        assert!(queue.poll().is_none());
        must(writers[number].write_all(&[content(number as u64); BLOCK as usize]));
        let deadline = Instant::now() + Duration::from_secs(10);
        let done = loop {
            match queue.poll() {
                Some(done) => break done,
                None => assert!(Instant::now() < deadline, "request {number} waits for another one"),
            }
            std::thread::yield_now();
        };
        assert_eq!(done.ticket, number);
        let answer = must(done.outcome);
        assert!(answer.bytes.read(|bytes| bytes.iter().all(|&byte| byte == content(number as u64))));
    }
}
