//! What a forked child must not keep. It shares its parent's open file descriptions, and with them the locks: those of a dead parent would
//! live on in it. So every description that may hold a lock is noted here, in a child each of them is replaced by an empty one, and no
//! fork begins while one is being opened or closed. A child of a bare `clone` runs no such handler.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::FromRawFd;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

/// Descriptions that a child must not keep: how many are possible, and their descriptors (-1: none).
const MOST: usize = 1024;
static OURS: [AtomicI32; MOST] = [const { AtomicI32::new(-1) }; MOST];

/// Threads that are just opening or closing a description; and forks under way. Each side announces itself
/// and then looks for the other, so (with sequential consistency) never both go on.
static OPENING: AtomicU32 = AtomicU32::new(0);
static FORKS: AtomicU32 = AtomicU32::new(0);

/// A noted description.
#[derive(Debug)]
pub(crate) struct Description {
    place: usize,
    file: ManuallyDrop<File>,
}

impl Deref for Description {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for Description {
    /// Closed and struck from the list, and no fork sees the one without the other.
    fn drop(&mut self) {
        begin();
        OURS[self.place].store(-1, Ordering::SeqCst);
        // SAFETY: dropped here only, once, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.file) };
        end();
    }
}

/// Opens the file for reading and writing, with `flags` beside that, and notes it in the same breath.
pub(crate) fn open(path: &CStr, flags: i32) -> io::Result<Description> {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: three extern "C" functions without arguments; the one for the child calls only what is allowed there.
        unsafe { libc::pthread_atfork(Some(before), Some(after), Some(in_child)) };
    });
    begin();
    let opened = open_noted(path, flags);
    end();
    opened?.ok_or_else(|| io::Error::other("this process has too many ledgers open"))
}

/// `None` if the list is full. Allocates nothing: an allocator may be locked by the fork that waits for us.
fn open_noted(path: &CStr, flags: i32) -> io::Result<Option<Description>> {
    // SAFETY: `path` is NUL-terminated.
    let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_RDWR | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor has just been opened here, so it is nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    let free = |at: &AtomicI32| at.compare_exchange(-1, fd, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    let place = OURS.iter().position(free);
    Ok(place.map(|place| Description { place, file: ManuallyDrop::new(file) }))
}

/// Waits until no fork is under way, and keeps others from beginning until [`end`].
fn begin() {
    loop {
        OPENING.fetch_add(1, Ordering::SeqCst);
        if FORKS.load(Ordering::SeqCst) == 0 {
            return;
        }
        OPENING.fetch_sub(1, Ordering::SeqCst);
        std::thread::yield_now();
    }
}

fn end() {
    OPENING.fetch_sub(1, Ordering::SeqCst);
}

extern "C" fn before() {
    FORKS.fetch_add(1, Ordering::SeqCst);
    while OPENING.load(Ordering::SeqCst) > 0 {
        std::thread::yield_now();
    }
}

extern "C" fn after() {
    // A fork that began before the handlers were there ends without having been counted.
    let _ = FORKS.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |forks| forks.checked_sub(1));
}

/// The parent's locks must not live on with us.
extern "C" fn in_child() {
    // No other thread is left.
    FORKS.store(0, Ordering::SeqCst);
    OPENING.store(0, Ordering::SeqCst);
    for noted in &OURS {
        let fd = noted.load(Ordering::SeqCst);
        if fd < 0 {
            continue;
        }
        // SAFETY: open, dup3 and close are async-signal-safe and take a literal and plain numbers; `fd` is one of ours, open as
        // long as it is noted, so nothing of anybody else is replaced.
        unsafe {
            let empty = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
            if empty >= 0 {
                libc::dup3(empty, fd, libc::O_CLOEXEC);
                libc::close(empty);
            } else {
                libc::close(fd);
            }
        }
    }
}
