//! Whoever reads memory that the program goes on using, such as a backup that is made ahead of a pause.

use super::Heap;
use crate::clock;
use crate::error::{Error, Result, Status};
use crate::extent::Extent;
use crate::sync::lock;
use std::sync::Arc;
use std::time::Duration;

/// As long as this lives, nothing of the extent is unmapped. Dropped after the last copy has landed, it gives back what was freed meanwhile.
#[derive(Debug)]
pub(crate) struct Reading<'a> {
    heap: &'a Heap,
    pub(crate) extent: Arc<Extent>,
}

impl Heap {
    /// Begins to read; `None` if the extent is freed or claimed.
    pub(crate) fn read(&self, extent: &Arc<Extent>) -> Option<Reading<'_>> {
        extent.begin_reading().then(|| {
            lock(&self.reading).push(Arc::clone(extent));
            Reading { heap: self, extent: Arc::clone(extent) }
        })
    }

    /// # Errors
    /// `Capturing` if a capture has begun, as far as is known.
    pub(crate) fn refuse_capture(&self) -> Result<()> {
        if !self.is_capturing() {
            return Ok(());
        }
        let message = "nothing is copied while a CUDA graph is being captured; what was copied before stays";
        Err(Error::new(Status::Capturing, message))
    }

    /// Waits until what was freed while somebody read it is given back: two pieces long, at most.
    pub(super) fn await_readers_of_freed(&self) {
        while lock(&self.reading).iter().any(|extent| extent.is_freed()) {
            clock::sleep(Duration::from_micros(50));
        }
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if let Some(claim) = self.extent.end_reading() {
            self.heap.finish_free(claim);
        }
        let mut reading = lock(&self.heap.reading);
        if let Some(index) = reading.iter().position(|extent| Arc::ptr_eq(extent, &self.extent)) {
            reading.swap_remove(index);
        }
    }
}
