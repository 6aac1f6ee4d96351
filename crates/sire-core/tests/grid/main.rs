//! Every suite of the engine that runs on ordinary threads, as one program: compiled together they take a third of the
//! time. What measures its whole process (`arena.rs`) and what needs the model checker (`concurrency`) are programs of their own.
#![cfg(not(feature = "shuttle"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod ahead;
mod caching;
mod clean;
mod damage;
mod disk;
mod engine;
mod fault_sweep;
mod files;
mod lazy;
mod left;
mod lending;
mod live_map;
mod model;
mod namespaces;
mod order;
mod progress;
mod refusals;
mod regressions;
mod resets;
mod segment_lives;
mod segments;
mod shared;
mod sim;
mod stock;
mod stride;
mod switch;
mod tend;
mod tiers;
mod trace;
mod veils;
