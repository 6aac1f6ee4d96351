//! `libsire_driver.so`: preloaded beside `libsire_alloc.so` by who wants driver-level hooks (docs/driver-hooks.md), and by nobody else.
//!
//! It takes the place of `dlsym` and of the driver's functions in [`names`], and decides nothing: what a program gets in the place of
//! such a function is asked of the one `libsire_alloc.so` of the process ([`sire`]). Without that library everything passes through.
//!
//! [`dlsym`] and [`exported`] are what programs call, [`next`] is whoever would have been called without us, [`sites`] remembers where
//! calls go. Nothing runs before somebody calls; nothing here allocates, waits or prints, but for one sentence when `libsire_alloc.so` is missing.
#![allow(non_snake_case, reason = "CUDA's names")]

mod dlsym;
mod exported;
mod names;
mod next;
mod sire;
mod sites;

#[cfg(not(all(target_os = "linux", target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!("driver-level hooks are written for Linux with glibc on x86-64 and AArch64");
