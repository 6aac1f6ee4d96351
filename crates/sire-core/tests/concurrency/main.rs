//! The engine used by several threads at the same time, model-checked: shuttle runs each test under many schedules, in which a thread can
//! be interrupted at every lock, every atomic and every driver call. `operations.rs` has what a thread may call and what must hold afterwards,
//! `pairs.rs` runs these operations side by side, and `stories.rs` has what needs a world of its own.
//!
//! `cargo test -p sire-core --features shuttle --test concurrency`; `SHUTTLE_SCHEDULES=1000` looks longer.
#![cfg(feature = "shuttle")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod operations;
mod pairs;
mod stories;

use shuttle::scheduler::RandomScheduler;

fn schedules() -> usize {
    std::env::var("SHUTTLE_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(12)
}

/// A runner for operations that hash, which needs more stack than shuttle's threads have without being asked.
fn check_with_stack(once: impl Fn() + Send + Sync + 'static, schedules: usize) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 18;
    shuttle::Runner::new(RandomScheduler::new(schedules), config).run(once);
}
