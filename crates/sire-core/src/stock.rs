//! The stock: physical memory of a device that this process owns ahead of its need, so that nobody else can have it. Whatever the engine makes
//! comes out of the stock first; what it gives back goes into the stock again. It is a driver in front of the driver, so that all who make
//! memory find it without knowing of it.
//!
//! For each device three numbers: the *target* (bytes that the process wants to own through the stock), what *lies* there, and what was *taken*. As
//! long as nobody interferes, target = lying + taken. A piece is handed out whole, without a driver call, where its size is just what is
//! wanted. Elsewhere pieces go back to the driver and the wanted size is made at once: for that moment somebody else could have the memory, and
//! the target is missed by so much. What comes back comes in pieces of the size that it was taken in, as many as are to be had; the rest is tried again
//! when something else comes back, unless somebody was made room for who is still on his way to the driver: it would be his. Who keeps books about the stock with other processes [watches](Stock::watch) it: it hears of every byte that is
//! about to go to the driver before it goes, and of every byte that came back after it came.
//!
//! No lock is held while the driver is called, or who watches: pieces are on nobody's shelf meanwhile.

use crate::driver::{Device, Driver, DriverResult, MemoryInfo, Physical, Properties};
use crate::sync::{AtomicBool, Mutex, Ordering, lock};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

/// What is known of a device's stock. Bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Stocked {
    /// What the process wants to own through the stock.
    pub target: u64,
    /// What lies there.
    pub lying: u64,
    /// What was taken out of it and is in use.
    pub taken: u64,
}

impl Stocked {
    /// Bytes that the process owns because of the stock.
    #[must_use]
    pub fn owned(self) -> u64 {
        self.lying.saturating_add(self.taken)
    }

    /// Bytes that it wants and does not own at this moment.
    #[must_use]
    pub fn missing(self) -> u64 {
        self.target.saturating_sub(self.owned())
    }
}

/// Who is told of a device whose figures have changed, by the thread that changes them; the function says what they are when it is called.
pub type Watch = Box<dyn Fn(Device, &dyn Fn() -> Stocked) + Send + Sync>;

#[derive(Debug, Default)]
struct Shelf {
    target: u64,
    taken: u64,
    lying: u64,
    /// Of what is missing: what is free, or about to be, for somebody who is on his way to the driver.
    awaited: u64,
    /// Of what is missing: what is being made to come back.
    coming: u64,
    /// Bytes of the pieces that it is made of.
    piece: u64,
    /// By size; no list is empty.
    pieces: BTreeMap<u64, Vec<Physical>>,
}

impl Shelf {
    fn put(&mut self, size: u64, piece: Physical) {
        self.pieces.entry(size).or_default().push(piece);
        self.lying += size;
    }

    fn take(&mut self, size: u64) -> Option<Physical> {
        let pieces = self.pieces.get_mut(&size)?;
        let piece = pieces.pop();
        if pieces.is_empty() {
            self.pieces.remove(&size);
        }
        self.lying -= piece.map_or(0, |_| size);
        piece
    }

    /// The smallest piece of at least `bytes`, else the largest.
    fn take_about(&mut self, bytes: u64) -> Option<(u64, Physical)> {
        let size = self.pieces.range(bytes..).next().or_else(|| self.pieces.last_key_value())?;
        let size = *size.0;
        self.take(size).map(|piece| (size, piece))
    }

    /// Who was on his way has arrived, with what he wanted or without.
    fn arrived(&mut self, bytes: u64) {
        self.awaited = self.awaited.saturating_sub(bytes);
    }

    /// The size of the next piece that is to come back: of all that is missing, or of `bytes` while somebody else is on his way. `None`: there is none.
    fn next_missing(&mut self, bytes: u64) -> Option<u64> {
        let missing = self.figures().missing().saturating_sub(self.awaited + self.coming);
        let wanted = if self.awaited == 0 { missing } else { missing.min(bytes) };
        let size = wanted.min(self.piece);
        self.coming += size;
        (size > 0).then_some(size)
    }

    fn figures(&self) -> Stocked {
        Stocked { target: self.target, lying: self.lying, taken: self.taken }
    }
}

/// See the [module documentation](self).
pub(crate) struct Stock {
    inner: Arc<dyn Driver>,
    shelves: Mutex<BTreeMap<Device, Shelf>>,
    /// Whether any device has a target: most processes never do.
    used: AtomicBool,
    watch: OnceLock<Watch>,
}

impl fmt::Debug for Stock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stock").field("inner", &self.inner).field("shelves", &self.shelves).finish_non_exhaustive()
    }
}

impl Stock {
    /// No stock yet, in front of `inner`.
    pub(crate) fn new(inner: Arc<dyn Driver>) -> Stock {
        Stock { inner, shelves: Mutex::default(), used: AtomicBool::new(false), watch: OnceLock::new() }
    }

    /// Whether anything was ever taken in.
    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// `watch` is told whenever bytes that are wanted are about to go, or have come. Only the first one is.
    pub(crate) fn watch(&self, watch: Watch) {
        let _ = self.watch.set(watch);
    }

    fn tell(&self, device: Device) {
        if let Some(watch) = self.watch.get() {
            watch(device, &|| self.figures(device));
        }
    }

    fn on<R>(&self, device: Device, with: impl FnOnce(&mut Shelf) -> R) -> R {
        with(lock(&self.shelves).entry(device).or_default())
    }

    /// What is known of a device's stock.
    pub(crate) fn figures(&self, device: Device) -> Stocked {
        if self.is_used() { self.on(device, |shelf| shelf.figures()) } else { Stocked::default() }
    }

    /// Makes the stock `bytes` larger, in pieces of `piece`; `grown` hears after each how much lies there. All or nothing.
    pub(crate) fn grow(&self, device: Device, bytes: u64, piece: u64, grown: &mut dyn FnMut(u64)) -> DriverResult<()> {
        self.used.store(true, Ordering::Relaxed);
        let mut made = Vec::new();
        let mut left = bytes;
        while left > 0 {
            let size = left.min(piece);
            match self.inner.create(device, size) {
                Ok(physical) => made.push((size, physical)),
                Err(error) => {
                    // Whoever keeps the books hears of it before others can have the memory.
                    grown(0);
                    made.into_iter().for_each(|(size, physical)| self.drop_piece(device, size, physical));
                    return Err(error);
                }
            }
            left -= size;
            grown(bytes - left);
        }
        self.on(device, |shelf| {
            shelf.target += bytes;
            shelf.piece = piece;
            made.into_iter().for_each(|(size, physical)| shelf.put(size, physical));
        });
        Ok(())
    }

    /// Wants `bytes` fewer: what lies there goes back to the driver; what is in use counts as in use without the stock. What the driver refuses
    /// to take lies there until the next time.
    pub(crate) fn shrink(&self, device: Device, bytes: u64) {
        let excess = self.on(device, |shelf| {
            shelf.target = shelf.target.saturating_sub(bytes);
            shelf.taken = shelf.taken.min(shelf.target);
            shelf.awaited = shelf.awaited.min(shelf.figures().missing());
            (shelf.lying + shelf.taken).saturating_sub(shelf.target)
        });
        let freed = self.open(device, excess);
        self.on(device, |shelf| shelf.arrived(freed.min(excess)));
        self.regain(device, freed.saturating_sub(excess));
    }

    /// Gives pieces of `bytes` or somewhat more back to the driver, if so much lies there. Returns how much it was, all of which is awaited now.
    fn open(&self, device: Device, bytes: u64) -> u64 {
        let (mut pieces, mut size) = (Vec::new(), 0);
        self.on(device, |shelf| {
            while size < bytes
                && let Some(piece) = shelf.take_about(bytes - size)
            {
                size += piece.0;
                pieces.push(piece);
            }
            shelf.awaited += size;
        });
        if pieces.is_empty() {
            return 0;
        }
        self.tell(device);
        let mut kept = 0;
        for (size, piece) in pieces {
            if self.inner.release(piece).is_err() {
                self.on(device, |shelf| {
                    shelf.put(size, piece);
                    shelf.arrived(size);
                });
                kept += size;
            }
        }
        if kept > 0 {
            self.tell(device);
        }
        size - kept
    }

    /// `bytes` that are wanted and missing are to be had again: back into the stock, as far as nobody was faster, with what else is missing. What could not be
    /// had is tried again the next time.
    pub(crate) fn regain(&self, device: Device, bytes: u64) {
        self.on(device, |shelf| shelf.arrived(bytes));
        let (mut left, mut back) = (bytes, 0);
        while let Some(size) = self.on(device, |shelf| shelf.next_missing(left))
            && self.bring_back(device, size)
        {
            left = left.saturating_sub(size);
            back += size;
        }
        if back > 0 {
            self.tell(device);
        }
    }

    /// One piece that is missing comes back; false if it is not to be had.
    fn bring_back(&self, device: Device, size: u64) -> bool {
        let made = self.inner.create(device, size).ok();
        self.on(device, |shelf| {
            shelf.coming -= size;
            made.into_iter().for_each(|piece| shelf.put(size, piece));
        });
        made.is_some()
    }

    fn drop_piece(&self, device: Device, size: u64, piece: Physical) {
        // What the driver does not take back now is not lost: it lies in the stock.
        if self.inner.release(piece).is_err() {
            self.on(device, |shelf| shelf.put(size, piece));
        }
    }

    /// Something is about to take `bytes` of the device: it is to come out of the stock. Returns how much was made free for it, which is missing
    /// until it was [taken](Stock::settle), or could not be and is [back](Stock::regain).
    pub(crate) fn spend(&self, device: Device, bytes: u64) -> u64 {
        if !self.is_used() {
            return 0;
        }
        let freed = self.open(device, bytes);
        let spent = freed.min(bytes);
        if freed > spent {
            self.regain(device, freed - spent);
        }
        spent
    }

    /// What was made free was taken: it counts as the stock's.
    pub(crate) fn settle(&self, device: Device, bytes: u64) {
        let taken = self.on(device, |shelf| {
            shelf.arrived(bytes);
            let bytes = shelf.figures().missing().min(bytes);
            shelf.taken += bytes;
            bytes
        });
        if taken > 0 {
            self.tell(device);
        }
    }

    /// What was made free was taken, and nobody will hear of its end: it is missing, and nobody is on his way to it any more, so that it comes
    /// [back](Stock::regain) with the next that does.
    pub(crate) fn give_up(&self, device: Device, bytes: u64) {
        self.on(device, |shelf| shelf.arrived(bytes));
    }

    /// Something that had `bytes` from the stock is about to give them to the driver. Returns how much is missing from now on, until it is
    /// [back](Stock::regain).
    pub(crate) fn let_go(&self, device: Device, bytes: u64) -> u64 {
        let gone = self.on(device, |shelf| {
            let bytes = bytes.min(shelf.taken);
            shelf.taken -= bytes;
            shelf.awaited += bytes;
            bytes
        });
        if gone > 0 {
            self.tell(device);
        }
        gone
    }

    /// Makes memory of a size, or with properties, that no piece has.
    fn around(&self, device: Device, size: u64, make: impl Fn() -> DriverResult<Physical>) -> DriverResult<Physical> {
        let spent = self.spend(device, size);
        let made = make();
        match &made {
            Ok(_) => self.settle(device, spent),
            Err(_) => self.regain(device, spent),
        }
        made
    }

    /// Takes memory of no mapping back: into the stock, as long as something was taken out of it, else to the driver.
    pub(crate) fn take_back(&self, device: Device, size: u64, plain: bool, physical: Physical) -> DriverResult<()> {
        if !self.is_used() {
            return self.inner.release(physical);
        }
        let keeps = plain
            && self.on(device, |shelf| {
                let keeps = shelf.taken >= size;
                if keeps {
                    shelf.taken -= size;
                    shelf.put(size, physical);
                }
                keeps
            });
        if keeps {
            return Ok(());
        }
        let gone = self.let_go(device, size);
        let released = self.inner.release(physical);
        match &released {
            Ok(()) => self.regain(device, gone),
            Err(_) => self.settle(device, gone),
        }
        released
    }

    /// As [`Driver::memory_info`]; what lies in the stock is free for this process.
    pub(crate) fn count_free(&self, device: Device) -> DriverResult<MemoryInfo> {
        let info = self.inner.memory_info(device)?;
        Ok(MemoryInfo { free: info.free.saturating_add(self.figures(device).lying), ..info })
    }

    /// As [`Driver::create`].
    pub(crate) fn make(&self, device: Device, size: u64) -> DriverResult<Physical> {
        if !self.is_used() {
            return self.inner.create(device, size);
        }
        let found = self.on(device, |shelf| {
            let found = shelf.take(size);
            shelf.taken += found.map_or(0, |_| size);
            found
        });
        found.map_or_else(|| self.around(device, size, || self.inner.create(device, size)), Ok)
    }

    /// As [`Driver::create_with`]; no piece has properties.
    pub(crate) fn make_with(&self, device: Device, size: u64, properties: Properties) -> DriverResult<Physical> {
        self.around(device, size, || self.inner.create_with(device, size, properties))
    }

    /// The driver behind, for verbs that do not concern the stock.
    pub(crate) fn next(&self) -> &dyn Driver {
        &*self.inner
    }

    pub(crate) fn nearest_host_node(&self, device: Device) -> Option<u32> {
        self.inner.host_node(device)
    }
}
