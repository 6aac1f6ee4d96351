//! Which process this is, among all that share a private directory: numbers of processes repeat where containers share it, and with time.

use std::io::Read as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// 0: none yet.
static OWN: AtomicU64 = AtomicU64::new(0);

/// This process's own: random, the same until it ends, and another one in a forked child that has called [`forget`].
#[must_use]
pub fn own() -> u64 {
    let fresh = || OWN.compare_exchange(0, random(), Ordering::AcqRel, Ordering::Acquire).unwrap_or_else(|found| found);
    match OWN.load(Ordering::Acquire) {
        0 => match fresh() {
            0 => OWN.load(Ordering::Acquire),
            found => found,
        },
        found => found,
    }
}

/// Whether that is this process. Wait-free.
#[must_use]
pub fn is_own(instance: u64) -> bool {
    OWN.load(Ordering::Acquire) == instance
}

/// In a forked child: it is somebody else. Async-signal-safe.
pub fn forget() {
    OWN.store(0, Ordering::Release);
}

/// As others are told: a JSON number does not hold all of it everywhere.
#[must_use]
pub fn spoken(instance: u64) -> String {
    format!("{instance:016x}")
}

/// From the kernel; without it, from what differs between processes that begin at the same moment.
fn random() -> u64 {
    let mut bytes = [0; 8];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    let found = match read {
        Ok(()) => u64::from_ne_bytes(bytes),
        Err(_) => {
            use std::hash::{BuildHasher as _, Hasher as _};
            let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
            hasher.write_u32(std::process::id());
            hasher.write_u128(std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos());
            hasher.finish()
        }
    };
    found.max(1)
}

#[cfg(test)]
mod tests {
    use super::{is_own, own, random, spoken};

    #[test]
    fn it_stays_the_same_in_all_threads_and_no_two_are_alike() {
        let first = own();
        let others: Vec<_> = (0..4).map(|_| std::thread::spawn(own)).collect();
        assert!(others.into_iter().all(|thread| thread.join().is_ok_and(|other| other == first)));
        assert!(first != 0 && is_own(first) && !is_own(0));
        assert_ne!(random(), random());
        assert_eq!(spoken(255), "00000000000000ff");
    }
}
