//! The environment's own record of what was put into it, written whole or not at all.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::files;

const FILE: &str = "sire-software-env.json";

/// What is in the environment. Its presence alone says that the directory is ours to change.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Marker {
    /// Version of the command that worked here last.
    pub sire: String,
    /// Whether every step is done.
    pub complete: bool,
    /// Version of Python, such as 3.11.7.
    pub python: String,
    /// Version of PyTorch, once pip has finished installing it.
    pub torch: Option<String>,
    /// Empty distributions, as name==version.
    pub empty: Vec<String>,
    /// Extra packages that pip has finished installing.
    pub extra: Vec<String>,
    /// SHA-256 of the software device's library.
    pub stand_in_sha256: String,
    /// SHA-256 of the Python files of the software device.
    pub op_layer_sha256: String,
}

impl Marker {
    /// The record in `dir`, if there is a readable one.
    pub fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(dir.join(FILE)).ok()?).ok()
    }

    /// Replaces the record in `dir`.
    pub fn write(&self, dir: &Path) -> Result<(), Failure> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|error| Failure::new(format!("could not write the marker: {error}")))?;
        text.push(b'\n');
        files::replace(&dir.join(FILE), &text).map(|_| ())
    }
}
