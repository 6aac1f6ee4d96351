//! What the user should hear of though no call fails: kept until somebody asks, and never more than a few.

use crate::sync::{Mutex, lock};

const MOST: usize = 32;

/// Sentences not yet heard.
#[derive(Debug, Default)]
pub(crate) struct Notices(Mutex<Vec<String>>);

impl Notices {
    /// Adds a sentence, unless it already waits.
    pub(crate) fn add(&self, sentence: String) {
        let mut all = lock(&self.0);
        if all.len() < MOST && !all.contains(&sentence) {
            all.push(sentence);
        }
    }

    /// Takes all sentences.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.0))
    }
}
