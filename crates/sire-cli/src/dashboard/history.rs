//! What was seen over time, for the page's memory timeline: bytes per tag on devices, and bytes per tier.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use crate::control::view::View;

/// Looks that are kept: ten minutes at one a second.
const KEPT: usize = 600;
/// Series of one look; what is smaller is summed up as the rest.
const MOST: usize = 24;

/// One look: bytes by name.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Moment {
    /// Seconds since the epoch.
    pub time: f64,
    /// `PID tag`: bytes on devices.
    pub tags: BTreeMap<String, u64>,
    /// Tier: bytes of all processes.
    pub tiers: BTreeMap<String, u64>,
}

/// The last looks, the oldest first.
#[derive(Debug, Default)]
pub struct History(VecDeque<Moment>);

impl History {
    /// Keeps a look.
    pub fn add(&mut self, view: &View) {
        let mut moment = Moment { time: view.time, ..Moment::default() };
        for process in &view.processes {
            for region in process.stats.regions.iter().filter(|region| region.resident_bytes > 0) {
                *moment.tags.entry(format!("{} {}", process.name, region.tag)).or_default() += region.resident_bytes;
            }
            for tier in process.stats.tiers.iter().filter(|tier| tier.used_bytes > 0) {
                *moment.tiers.entry(tier.tier.clone()).or_default() += tier.used_bytes;
            }
        }
        moment.tags = largest(moment.tags);
        self.0.push_back(moment);
        if self.0.len() > KEPT {
            self.0.pop_front();
        }
    }

    /// The looks after `time`.
    pub fn since(&self, time: f64) -> Vec<&Moment> {
        self.0.iter().filter(|moment| moment.time > time).collect()
    }
}

fn largest(all: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    if all.len() <= MOST {
        return all;
    }
    let mut by_size: Vec<(String, u64)> = all.into_iter().collect();
    by_size.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let rest: u64 = by_size.drain(MOST - 1..).map(|(_, bytes)| bytes).sum();
    by_size.into_iter().chain([("others".to_owned(), rest)]).collect()
}

#[cfg(test)]
mod tests {
    use super::{History, KEPT, MOST};
    use crate::control::view::{Process, Region, View};

    fn view(time: f64, tags: usize) -> View {
        let region =
            |number: usize| Region { tag: number.to_string(), resident_bytes: number as u64 + 1, ..Region::default() };
        let mut process = Process::default();
        process.stats.regions = (0..tags).map(region).collect();
        View { time, processes: vec![process], ..View::default() }
    }

    #[test]
    fn no_byte_is_lost_and_no_look_is_kept_for_ever() {
        let mut history = History::default();
        for look in 0..KEPT + 3 {
            history.add(&view(look as f64, 100));
        }
        let all = history.since(-1.0);
        assert_eq!((all.len(), all[0].time), (KEPT, 3.0));
        assert_eq!(all[0].tags.len(), MOST);
        assert_eq!(all[0].tags.values().sum::<u64>(), 100 * 101 / 2);
        assert_eq!(history.since(KEPT as f64 + 1.0).len(), 1);
    }
}
