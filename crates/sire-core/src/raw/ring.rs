//! The kernel's own queue for requests to files (io_uring(7)): the only way to have many under way without a thread for each. What makes it
//! sound is what makes copies sound: until the kernel has said that a request ended, the ring keeps its [`Span`] and its file;
//! of a request of which the kernel never says so, the span is leaked, and whoever sent it must not use its buffer again (`give_up`).

use super::{Flight, Span};
use io_uring::{IoUring, opcode, types};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What is done with a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// The span's bytes go to the file.
    Write,
    /// The file's bytes come into the span.
    Read,
}

/// Whoever holds a file open.
pub(crate) trait Holder {
    /// The file, if it takes requests of the kernel's queue; it stays open for as long as the holder lives.
    fn file(&self) -> Option<BorrowedFd<'_>>;
}

/// A request that has ended: whose it was, its buffer, and how many bytes went.
#[derive(Debug)]
pub(crate) struct Ended<H> {
    pub(crate) holder: H,
    pub(crate) span: Span,
    pub(crate) outcome: io::Result<u64>,
}

/// See the [module documentation](self). Requests are known by their holders.
pub(crate) struct Ring<H> {
    ring: IoUring,
    flying: HashMap<u64, (Flight, H)>,
    next: u64,
}

impl<H> std::fmt::Debug for Ring<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("flying", &self.flying.len()).finish_non_exhaustive()
    }
}

impl<H: Holder> Ring<H> {
    /// A queue for at least `depth` requests.
    ///
    /// # Errors
    /// What the kernel says: it may be too old, or forbid it (`kernel.io_uring_disabled`, a container's seccomp filter).
    pub(crate) fn new(depth: usize) -> io::Result<Ring<H>> {
        let entries = u32::try_from(depth.next_power_of_two()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let ring = IoUring::builder().dontfork().build(entries)?;
        Ok(Ring { ring, flying: HashMap::new(), next: 0 })
    }

    /// Sends a request for all of `span` at offset `at` of the holder's file.
    ///
    /// # Errors
    /// The holder comes back if it has no such file or the queue is full: nothing is under way.
    pub(crate) fn send(&mut self, way: Way, at: u64, span: &Span, holder: H) -> Result<(), H> {
        let (Some(fd), Ok(len)) = (holder.file().map(|file| types::Fd(file.as_raw_fd())), u32::try_from(span.len()))
        else {
            return Err(holder);
        };
        let entry = match way {
            Way::Write => opcode::Write::new(fd, span.ptr(), len).offset(at).build(),
            Way::Read => opcode::Read::new(fd, span.ptr(), len).offset(at).build(),
        };
        // SAFETY: the entry's buffer is `span`, which `flying` keeps mapped until the kernel is done with it, and which nobody else
        // touches meanwhile; its file stays open because `flying` keeps the holder for as long as the entry may wait here.
        if unsafe { self.ring.submission().push(&entry.user_data(self.next)) }.is_err() {
            return Err(holder);
        }
        self.flying.insert(self.next, (Flight(Some(span.clone())), holder));
        self.next += 1;
        // What the kernel does not take now, it takes when somebody waits.
        let _ = self.ring.submit();
        Ok(())
    }

    /// A request that has ended. With `wait`, the next one that does; `None` if none is under way, or none has ended.
    ///
    /// # Errors
    /// The kernel cannot be asked any more. Whatever is under way stays so.
    pub(crate) fn next(&mut self, wait: bool) -> io::Result<Option<Ended<H>>> {
        loop {
            let ended = self.ring.completion().next().map(|entry| (entry.user_data(), entry.result()));
            if let Some((number, result)) = ended {
                let Some((flight, holder)) = self.flying.remove(&number) else { continue };
                let Some(span) = flight.land() else { continue };
                let outcome = u64::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
                return Ok(Some(Ended { holder, span, outcome }));
            }
            if !wait || self.flying.is_empty() {
                return Ok(None);
            }
            match self.ring.submit_and_wait(1) {
                Err(error) if !is_passing(&error) => return Err(error),
                Err(_) => std::thread::yield_now(),
                Ok(_) => {}
            }
        }
    }

    /// Gives the queue up, after an error: whose requests will never be known to have ended. Their spans are leaked.
    pub(crate) fn give_up(mut self) -> Vec<H> {
        self.flying.drain().map(|(_, (_, holder))| holder).collect()
    }
}

/// Whether the call that failed so works when it is repeated.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}
