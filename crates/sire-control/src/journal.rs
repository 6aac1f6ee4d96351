//! What happened last, numbered, so that a watcher can ask for what it has not seen.

use crate::lock;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::SystemTime;

/// Events that are kept.
const KEPT: usize = 1024;

/// The last events of a process.
#[derive(Debug, Default)]
pub struct Journal(Mutex<(u64, VecDeque<Value>)>);

impl Journal {
    /// Notes an event: `what` in a word, and a sentence.
    pub fn note(&self, what: &str, sentence: &str) {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut inner = lock(&self.0);
        inner.0 += 1;
        let number = inner.0;
        inner.1.push_back(json!({"number": number, "time": time, "what": what, "text": sentence}));
        if inner.1.len() > KEPT {
            inner.1.pop_front();
        }
    }

    /// The last `most` events, the oldest first.
    #[must_use]
    pub fn last(&self, most: usize) -> Value {
        let inner = lock(&self.0);
        inner.1.iter().skip(inner.1.len().saturating_sub(most)).cloned().collect()
    }

    /// The events after number `since`, the oldest first, and the newest number.
    #[must_use]
    pub fn since(&self, since: u64) -> Value {
        let inner = lock(&self.0);
        let newer: Vec<&Value> = inner.1.iter().filter(|event| event["number"].as_u64() > Some(since)).collect();
        json!({"events": newer, "newest": inner.0})
    }
}

#[cfg(test)]
mod tests {
    use super::{Journal, KEPT};

    #[test]
    fn a_watcher_sees_each_event_once_and_learns_what_it_missed() {
        let journal = Journal::default();
        for number in 0..KEPT + 5 {
            journal.note("pause", &number.to_string());
        }
        let all = journal.since(0);
        assert_eq!(all["events"].as_array().map(Vec::len), Some(KEPT));
        assert_eq!(all["events"][0]["number"], 6);
        let newest = all["newest"].as_u64().unwrap_or(0);
        assert_eq!(newest, KEPT as u64 + 5);
        assert_eq!(journal.since(newest)["events"], serde_json::json!([]));
        assert_eq!(journal.since(newest - 1)["events"][0]["text"], (KEPT + 4).to_string());
        assert_eq!(journal.last(2)[0]["number"], newest - 1);
    }
}
