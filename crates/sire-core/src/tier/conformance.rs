//! The bargain of [`Tier`], as questions that any implementation must answer.
//!
//! [`suite`] asks all of them, each of a fresh tier; [`questions`] lists them, so that a failing one can be asked alone. A wrong answer is a failed
//! assertion. A tier must be able to lend 24 MiB at once; nobody else may use it meanwhile. docs/add-a-tier.md shows how to run this.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::missing_panics_doc)]

use super::{Room, Tier};
use crate::error::{Result, Status};
use std::fmt::Debug;
use std::sync::Arc;
use std::thread;

/// One question.
pub type Question = fn(&Arc<dyn Tier>);

/// What the engine moves at once, at most.
const PIECE: u64 = 4 << 20;
/// The largest alignment allowed.
const LARGEST_ALIGN: u64 = 4096;
/// Addresses of buffers are multiples of this.
const PAGE: usize = 4096;

/// The questions of [`suite`], by name.
#[must_use]
pub fn questions() -> Vec<(&'static str, Question)> {
    vec![
        ("has_a_name_and_a_depth", has_a_name_and_a_depth),
        ("lends_what_was_asked_for", lends_what_was_asked_for),
        ("counts_what_it_lends", counts_what_it_lends),
        ("gives_back_what_it_got", gives_back_what_it_got),
        ("takes_every_byte_of_its_room", takes_every_byte_of_its_room),
        ("later_writes_win", later_writes_win),
        ("rooms_do_not_mix", rooms_do_not_mix),
        ("serves_many_threads", serves_many_threads),
        ("refuses_what_is_outside", refuses_what_is_outside),
        ("refuses_what_cannot_be", refuses_what_cannot_be),
        ("room_may_go_on_any_thread", room_may_go_on_any_thread),
    ]
}

/// Asks every question of a fresh tier.
pub fn suite(make: impl Fn() -> Arc<dyn Tier>) {
    for (name, question) in questions() {
        eprintln!("conformance: {name}");
        question(&make());
    }
}

/// Bytes that begin on a page, as the engine's staging buffers do.
struct Buffer {
    bytes: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Buffer {
    fn new(len: u64) -> Buffer {
        let len = usize::try_from(len).unwrap();
        let bytes = vec![0; len + PAGE];
        let skip = bytes.as_ptr().align_offset(PAGE);
        Buffer { bytes, skip, len }
    }

    /// Content that belongs to this offset of this room.
    fn of(room: u64, at: u64, len: u64) -> Buffer {
        let mut buffer = Buffer::new(len);
        buffer.content().chunks_mut(8).zip(at / 8..).for_each(|(part, word)| {
            let value = (word ^ room << 48).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes();
            part.copy_from_slice(&value[..part.len()]);
        });
        buffer
    }

    fn content(&mut self) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + self.len]
    }
}

fn write(room: &dyn Room, name: u64, at: u64, len: u64) {
    room.write(at, Buffer::of(name, at, len).content()).unwrap();
}

fn expect(room: &dyn Room, name: u64, at: u64, len: u64) {
    let mut found = Buffer::new(len);
    room.read(at, found.content()).unwrap();
    assert!(found.content() == Buffer::of(name, at, len).content(), "{len} bytes at {at} are not what was written");
}

fn failed<T: Debug>(outcome: Result<T>, allowed: &[Status], what: &str) {
    match outcome {
        Ok(value) => panic!("{what}: accepted ({value:?})"),
        Err(error) => {
            assert!(allowed.contains(&error.status), "{what}: {:?} is none of {allowed:?}: {error}", error.status);
            assert!(!error.message.is_empty(), "{what}: an error without a message helps nobody");
        }
    }
}

/// The smallest piece that the room takes, at least `len` bytes.
fn unit(room: &dyn Room, len: u64) -> u64 {
    len.next_multiple_of(room.align())
}

fn has_a_name_and_a_depth(tier: &Arc<dyn Tier>) {
    assert!(!tier.name().is_empty() && tier.name().len() < 64, "a name for messages: {:?}", tier.name());
    assert!((1..=256).contains(&tier.depth()), "a depth of {}", tier.depth());
}

fn lends_what_was_asked_for(tier: &Arc<dyn Tier>) {
    for len in [1, 511, 4096, PIECE + 1] {
        let room = tier.reserve(len).unwrap();
        assert!(room.len() >= len, "asked for {len}, got {}", room.len());
        assert!(!room.is_empty());
        let align = room.align();
        assert!(align.is_power_of_two() && align <= LARGEST_ALIGN, "an alignment of {align}");
        assert!(room.len().is_multiple_of(align), "{} bytes in blocks of {align}", room.len());
    }
}

fn counts_what_it_lends(tier: &Arc<dyn Tier>) {
    let before = tier.used();
    let first = tier.reserve(PIECE).unwrap();
    let second = tier.reserve(PIECE).unwrap();
    assert!(tier.used() >= before + 2 * PIECE, "{} of {}", tier.used(), before + 2 * PIECE);
    let both = tier.used();
    drop(first);
    assert!(tier.used() <= both - PIECE, "what is given back does not count any more");
    drop(second);
    assert_eq!(tier.used(), before, "everything was given back");
}

fn gives_back_what_it_got(tier: &Arc<dyn Tier>) {
    let room = tier.reserve(2 * PIECE).unwrap();
    for (at, len) in [(0, unit(&*room, 1)), (PIECE, PIECE)] {
        write(&*room, 1, at, len);
        expect(&*room, 1, at, len);
    }
    expect(&*room, 1, 0, unit(&*room, 1));
}

/// Room is certain: each byte of it can be used, the last one too, in any order.
fn takes_every_byte_of_its_room(tier: &Arc<dyn Tier>) {
    let room = tier.reserve(4 * PIECE).unwrap();
    let len = room.len();
    let starts: Vec<u64> = (0..len).step_by(PIECE as usize).collect();
    starts.iter().rev().for_each(|&at| write(&*room, 2, at, PIECE.min(len - at)));
    starts.iter().for_each(|&at| expect(&*room, 2, at, PIECE.min(len - at)));
}

/// A room is used again by the next pause, in other pieces.
fn later_writes_win(tier: &Arc<dyn Tier>) {
    let room = tier.reserve(4 * PIECE).unwrap();
    let small = unit(&*room, 4096);
    write(&*room, 4, 0, PIECE);
    write(&*room, 4, PIECE, PIECE);
    write(&*room, 5, 0, small);
    write(&*room, 5, small, PIECE);
    expect(&*room, 5, 0, small);
    expect(&*room, 5, small, PIECE);
    write(&*room, 6, 0, PIECE);
    expect(&*room, 6, 0, PIECE);
}

fn rooms_do_not_mix(tier: &Arc<dyn Tier>) {
    let rooms: Vec<_> = (0..3).map(|_| tier.reserve(PIECE).unwrap()).collect();
    for (name, room) in (0..).zip(&rooms) {
        write(&**room, name, 0, PIECE);
    }
    for (name, room) in (0..).zip(&rooms) {
        expect(&**room, name, 0, PIECE);
    }
    let mut rooms = rooms.into_iter();
    drop(rooms.next());
    for (name, room) in (1..).zip(rooms) {
        expect(&*room, name, 0, PIECE);
    }
}

/// More threads than it likes, writing and reading different pieces of one room at the same time.
fn serves_many_threads(tier: &Arc<dyn Tier>) {
    let threads = (tier.depth() as u64 + 1).min(15);
    let room = tier.reserve(16 << 20).unwrap();
    let step = unit(&*room, 1 << 18);
    let share = (16 << 20) / threads / step * step;
    thread::scope(|scope| {
        for thread in 0..threads {
            let room = &*room;
            scope.spawn(move || {
                let range = thread * share..(thread + 1) * share;
                range.clone().step_by(step as usize).for_each(|at| write(room, 7, at, step));
                range.step_by(step as usize).for_each(|at| expect(room, 7, at, step));
            });
        }
    });
}

fn refuses_what_is_outside(tier: &Arc<dyn Tier>) {
    let room = tier.reserve(PIECE).unwrap();
    let (len, small) = (room.len(), unit(&*room, 1));
    write(&*room, 8, 0, small);
    for at in [len, len + small, u64::MAX - u64::MAX % LARGEST_ALIGN] {
        failed(room.write(at, Buffer::new(small).content()), &[Status::BackupIo], "a write behind the end");
        failed(room.read(at, Buffer::new(small).content()), &[Status::BackupIo], "a read behind the end");
    }
    failed(room.write(0, Buffer::new(len + small).content()), &[Status::BackupIo], "a write across the end");
    failed(room.read(0, Buffer::new(len + small).content()), &[Status::BackupIo], "a read across the end");
    write(&*room, 9, 0, len);
    expect(&*room, 9, 0, len);
}

fn refuses_what_cannot_be(tier: &Arc<dyn Tier>) {
    let before = tier.used();
    let allowed = [Status::OutOfBackupSpace, Status::BackupIo];
    for len in [1 << 62, u64::MAX] {
        failed(tier.reserve(len), &allowed, "room for more than there can be");
    }
    assert_eq!(tier.used(), before, "what was refused does not count");
}

fn room_may_go_on_any_thread(tier: &Arc<dyn Tier>) {
    let room = tier.reserve(PIECE).unwrap();
    write(&*room, 10, 0, PIECE);
    thread::spawn(move || expect(&*room, 10, 0, PIECE)).join().unwrap();
    assert_eq!(tier.used(), 0, "a fresh tier has lent nothing else");
}
