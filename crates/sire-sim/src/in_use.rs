//! Mappings whose bytes are being touched. Work on bytes looks an address up under the lock of the address table and then
//! goes on without it, so that mapping and unmapping elsewhere need not wait for a copy; the mapping itself is held
//! meanwhile, and whoever removes it or takes rights away waits until nobody does.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// How many operations touch the bytes of a mapping right now.
#[derive(Debug, Default)]
pub struct InUse {
    count: Mutex<usize>,
    idle: Condvar,
}

impl InUse {
    /// The mapping stays as it is while the answer lives. Only under the address table's lock, so that nobody begins while
    /// [`InUse::wait_idle`] waits under its write lock.
    pub fn hold(self: &Arc<InUse>) -> Held {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Held(Arc::clone(self))
    }

    /// Waits until no operation touches the bytes.
    pub fn wait_idle(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            count = self.idle.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One operation on the bytes of a mapping.
#[derive(Debug)]
pub struct Held(Arc<InUse>);

impl Drop for Held {
    fn drop(&mut self) {
        let mut count = self.0.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count -= 1;
        if *count == 0 {
            self.0.idle.notify_all();
        }
    }
}
