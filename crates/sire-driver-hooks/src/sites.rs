//! Where calls of exported functions go, by the place that they come from: read without a lock, and it only grows.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

const SITES: usize = 1024;
/// How many neighbours of its own place a site may take; a full neighbourhood only makes that site slower.
const PROBES: usize = 16;
/// More than there are names.
const NAMES: usize = 64;

const _: () = assert!(crate::names::EXPORTED.len() <= NAMES);

/// Whoever sets `target` owns the place, and then sets `key`.
struct Site {
    key: AtomicUsize,
    target: AtomicPtr<c_void>,
}

static TABLE: [Site; SITES] =
    [const { Site { key: AtomicUsize::new(0), target: AtomicPtr::new(ptr::null_mut()) } }; SITES];

/// A pointer may be called from anywhere, so the function belongs to the key.
fn key(function: usize, caller: usize) -> usize {
    caller.wrapping_mul(NAMES) + function
}

fn places(key: usize) -> impl Iterator<Item = &'static Site> {
    let first = (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) % SITES;
    (0..PROBES).map(move |probe| &TABLE[(first + probe) % SITES])
}

/// The target that was remembered.
pub(crate) fn known(function: usize, caller: usize) -> Option<*mut c_void> {
    let key = key(function, caller);
    places(key).find(|site| site.key.load(Ordering::Acquire) == key).map(|site| site.target.load(Ordering::Relaxed))
}

/// Remembers a target (not null).
pub(crate) fn remember(function: usize, caller: usize, target: *mut c_void) {
    let key = key(function, caller);
    let claim = |site: &&Site| {
        site.target.compare_exchange(ptr::null_mut(), target, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    };
    if let Some(site) = places(key).find(claim) {
        site.key.store(key, Ordering::Release);
    }
}
