//! The engine of Sire: regions of device memory that can be paused and resumed.
//!
//! Modules, each using only those below it: `engine`, `transition`, `region` / `registry` / `heap`,
//! `transfer`, `tier`, [`driver`], then the leaves [`error`], `sync`, `clock`.

pub mod driver;
pub mod engine;
pub mod error;
