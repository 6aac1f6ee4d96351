//! Faults: which calls fail, how, and the counters behind that.
//!
//! A plan is a text of entries separated by `;`, each `FUNCTION WHEN = WHAT` (spaces are ignored):
//!
//! | part | form | meaning |
//! |---|---|---|
//! | function | `cuMemCreate`, `*` | calls of this name; all calls |
//! | when | `#3` | the third call (counted from 1, per entry) |
//! | | `#3+` | the third call and all after it |
//! | | `%0.1@7` | each call with probability 0.1, by a generator seeded with 7 |
//! | | `+64MiB` | the call that takes the function's bytes beyond 64 MiB, once |
//! | | nothing | every call |
//! | what | `error:2` | the call returns error 2 and does nothing |
//! | | `delay:5000` | the call takes 5000 microseconds longer |
//! | | `kill` | the process kills itself (`SIGKILL`) at the entry of the call |
//!
//! For example `cuMemCreate#3=error:2; cuMemMap%0.1@7=error:1; cudaMemcpyAsync+64MiB=kill; cuMemUnmap#1=delay:5000`.

use crate::core::locked;
use crate::error::Code;
use sire_core::size;
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq)]
enum When {
    Always,
    Nth(u64),
    From(u64),
    Chance { threshold: u64, state: u64 },
    AfterBytes { limit: u64, seen: u64, fired: bool },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Error(Code),
    Delay(Duration),
    Kill,
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    function: String,
    when: When,
    what: What,
    calls: u64,
}

#[derive(Debug, Default)]
struct State {
    plan: Vec<Entry>,
    counts: HashMap<String, u64>,
}

/// A fault plan at work, and call counters.
#[derive(Debug, Default)]
pub struct Faults(Mutex<State>);

impl Faults {
    /// The plan that the text describes.
    ///
    /// # Errors
    /// A sentence about the entry that cannot be read.
    pub fn new(plan: &str) -> Result<Faults, String> {
        Ok(Faults(Mutex::new(State { plan: parse(plan)?, counts: HashMap::new() })))
    }

    /// Starts again with another plan.
    ///
    /// # Errors
    /// As [`Faults::new`].
    pub fn replace(&self, plan: &str) -> Result<(), String> {
        *locked(&self.0) = State { plan: parse(plan)?, counts: HashMap::new() };
        Ok(())
    }

    /// Counts a call; delays, kills, or says which error it must return.
    pub fn enter(&self, name: &str, bytes: u64) -> Option<Code> {
        let mut state = locked(&self.0);
        match state.counts.get_mut(name) {
            Some(count) => *count += 1,
            None => drop(state.counts.insert(name.to_string(), 1)),
        }
        if state.plan.is_empty() {
            return None;
        }
        let due: Vec<What> = state.plan.iter_mut().filter_map(|entry| entry.due(name, bytes)).collect();
        drop(state);
        let mut error = None;
        for what in due {
            match what {
                What::Error(code) => error = error.or(Some(code)),
                What::Delay(time) => std::thread::sleep(time),
                What::Kill => die(),
            }
        }
        error
    }

    /// How often each function was entered.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        locked(&self.0).counts.iter().map(|(name, count)| (name.clone(), *count)).collect()
    }
}

fn die() {
    // SAFETY: kill and getpid take and return plain numbers.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
}

impl Entry {
    fn due(&mut self, name: &str, bytes: u64) -> Option<What> {
        if self.function != "*" && self.function != name {
            return None;
        }
        self.calls += 1;
        let now = match &mut self.when {
            When::Always => true,
            When::Nth(n) => self.calls == *n,
            When::From(n) => self.calls >= *n,
            When::Chance { threshold, state } => next_random(state) >> 11 < *threshold,
            When::AfterBytes { limit, seen, fired } => {
                *seen = seen.saturating_add(bytes);
                let first = *seen > *limit && !*fired;
                *fired |= first;
                first
            }
        };
        now.then_some(self.what)
    }
}

/// splitmix64.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn parse(plan: &str) -> Result<Vec<Entry>, String> {
    plan.split(';').map(str::trim).filter(|text| !text.is_empty()).map(parse_entry).collect()
}

fn parse_entry(text: &str) -> Result<Entry, String> {
    let wrong = |what: &str| format!("fault plan entry '{text}': {what}");
    let (left, right) = text.split_once('=').ok_or_else(|| wrong("expected FUNCTION WHEN = WHAT"))?;
    let left = left.trim();
    let end = left.find(['#', '%', '+']).unwrap_or(left.len());
    let function = left[..end].trim().to_string();
    if function.is_empty() {
        return Err(wrong("the function is missing"));
    }
    let when = parse_when(left[end..].trim())
        .ok_or_else(|| wrong("expected #N, #N+, %P@SEED or +BYTES after the function"))?;
    let what = parse_what(right.trim()).ok_or_else(|| wrong("expected error:CODE, delay:MICROSECONDS or kill"))?;
    Ok(Entry { function, when, what, calls: 0 })
}

fn parse_when(text: &str) -> Option<When> {
    let Some(sign) = text.chars().next() else { return Some(When::Always) };
    let rest = text[1..].trim();
    match sign {
        '#' => match rest.strip_suffix('+') {
            Some(number) => number.parse().ok().filter(|n| *n > 0).map(When::From),
            None => rest.parse().ok().filter(|n| *n > 0).map(When::Nth),
        },
        '%' => {
            let (chance, seed) = rest.split_once('@')?;
            let chance: f64 = chance.trim().parse().ok().filter(|p| (0.0..=1.0).contains(p))?;
            let threshold = (chance * (1u64 << 53) as f64) as u64;
            Some(When::Chance { threshold, state: seed.trim().parse().ok()? })
        }
        '+' => Some(When::AfterBytes { limit: size::parse(rest)?, seen: 0, fired: false }),
        _ => None,
    }
}

fn parse_what(text: &str) -> Option<What> {
    if text == "kill" {
        return Some(What::Kill);
    }
    let (kind, number) = text.split_once(':')?;
    match kind.trim() {
        "error" => number.trim().parse().ok().map(|code| What::Error(Code(code))),
        "delay" => number.trim().parse().ok().map(|micros| What::Delay(Duration::from_micros(micros))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Faults {
        match Faults::new(text) {
            Ok(faults) => faults,
            Err(message) => unreachable!("{message}"),
        }
    }

    #[test]
    fn nth_and_from() {
        let faults = plan("a#2=error:2; b#2+=error:1");
        let answers = |name: &str| [(); 4].map(|()| faults.enter(name, 0).map(|code| code.0));
        assert_eq!(answers("a"), [None, Some(2), None, None]);
        assert_eq!(answers("b"), [None, Some(1), Some(1), Some(1)]);
        assert_eq!(answers("c"), [None; 4]);
        assert_eq!(faults.counts().get("c"), Some(&4));
    }

    #[test]
    fn bytes_fire_once() {
        let faults = plan("copy + 1k = error:719");
        assert_eq!([600, 600, 600].map(|n| faults.enter("copy", n).map(|code| code.0)), [None, Some(719), None]);
    }

    #[test]
    fn chance_is_reproducible_and_about_right() {
        let run = || {
            let faults = plan("*%0.25@7=error:1");
            (0..4000).filter(|_| faults.enter("x", 0).is_some()).count()
        };
        assert_eq!(run(), run());
        assert!((900..1100).contains(&run()), "{}", run());
    }

    #[test]
    fn delays_take_time() {
        let faults = plan("a=delay:2000");
        let start = std::time::Instant::now();
        assert_eq!(faults.enter("a", 0), None);
        assert!(start.elapsed() >= Duration::from_millis(2));
    }

    #[test]
    fn nonsense_is_named() {
        for text in ["a", "=kill", "a#0=kill", "a%2@1=kill", "a=error:x", "a#1=explode", "a+many=kill"] {
            assert!(Faults::new(text).is_err_and(|message| message.contains(text)), "{text}");
        }
    }
}
