//! Whose turn it is, and whether there is room: a pure function of what the ledger and the driver say.
//!
//! The queue is fair: who came first is served first, whatever the sizes, so that a large request is not overtaken for ever by
//! small ones. Only a waiting process that does not even look any more (it is stopped) is passed by; it keeps its place for when it
//! wakes. What is free for a newcomer is what the driver calls free, less what others have reserved and do not own yet.

use crate::layout::State;

/// What one living member says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Other {
    /// What it is doing.
    pub state: State,
    /// Its place in the queue.
    pub ticket: u64,
    /// Bytes wanted or reserved.
    pub bytes: u64,
    /// Bytes of the reservation that it owns already.
    pub owned: u64,
    /// It waits, but has not looked for a while.
    pub silent: bool,
}

/// What a newcomer wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// So many bytes.
    Bytes(u64),
    /// The device for itself: nobody else holds a reservation, and everything that is free but so many bytes.
    Rest {
        /// Bytes that stay free.
        margin: u64,
    },
}

impl Want {
    /// The fewest bytes that would do.
    #[must_use]
    pub const fn at_least(self) -> u64 {
        match self {
            Want::Bytes(bytes) => bytes,
            Want::Rest { .. } => 0,
        }
    }
}

/// What the answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// So many bytes are yours.
    Take(u64),
    /// You want the device for yourself, and so many others hold reservations.
    Shared(usize),
    /// So many came first and still wait.
    Behind(usize),
    /// It is your turn, but so many bytes are missing.
    Short(u64),
}

/// Bytes that a newcomer can have, where the driver calls `free` bytes free.
#[must_use]
pub fn available(others: &[Other], free: u64) -> u64 {
    let holding = others.iter().filter(|other| other.state == State::Holding);
    holding.fold(free, |left, other| left.saturating_sub(other.bytes.saturating_sub(other.owned)))
}

/// Whether the holder of `ticket` may have what it wants now.
#[must_use]
pub fn verdict(ticket: u64, want: Want, others: &[Other], free: u64) -> Verdict {
    let before = |other: &&Other| other.state == State::Waiting && !other.silent && other.ticket < ticket;
    let ahead = others.iter().filter(before).count();
    let holding = others.iter().filter(|other| other.state == State::Holding).count();
    let available = available(others, free);
    match want {
        _ if ahead > 0 => Verdict::Behind(ahead),
        Want::Bytes(bytes) if bytes <= available => Verdict::Take(bytes),
        Want::Bytes(bytes) => Verdict::Short(bytes - available),
        Want::Rest { .. } if holding > 0 => Verdict::Shared(holding),
        Want::Rest { margin } => Verdict::Take(available.saturating_sub(margin)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn other(state: State, ticket: u64, bytes: u64, owned: u64) -> Other {
        Other { state, ticket, bytes, owned, silent: false }
    }

    #[test]
    fn what_others_own_is_not_counted_twice() {
        let others = [other(State::Holding, 1, 60, 20), other(State::Holding, 2, 10, 30), other(State::Idle, 3, 99, 0)];
        // The driver's figure has the 20 and the 30 in it already; 40 more are promised.
        assert_eq!(available(&others, 50), 10);
        assert_eq!(verdict(9, Want::Bytes(10), &others, 50), Verdict::Take(10));
        assert_eq!(verdict(9, Want::Bytes(11), &others, 50), Verdict::Short(1));
    }

    #[test]
    fn the_first_is_served_first_unless_it_sleeps() {
        let mut first = other(State::Waiting, 1, 1000, 0);
        assert_eq!(verdict(2, Want::Bytes(1), &[first], 50), Verdict::Behind(1));
        first.silent = true;
        assert_eq!(verdict(2, Want::Bytes(1), &[first], 50), Verdict::Take(1));
        assert_eq!(verdict(1, Want::Bytes(1), &[other(State::Waiting, 2, 1, 0)], 50), Verdict::Take(1));
    }

    #[test]
    fn who_wants_the_device_for_itself_gets_what_is_left_of_it() {
        let rest = Want::Rest { margin: 8 };
        assert_eq!(verdict(9, rest, &[], 50), Verdict::Take(42));
        assert_eq!(verdict(9, rest, &[], 5), Verdict::Take(0));
        assert_eq!(verdict(9, rest, &[other(State::Idle, 1, 10, 0)], 50), Verdict::Take(42));
        assert_eq!(verdict(9, rest, &[other(State::Holding, 1, 10, 10)], 50), Verdict::Shared(1));
        assert_eq!(verdict(9, rest, &[other(State::Waiting, 1, 10, 0)], 50), Verdict::Behind(1));
    }

    /// The naive twin: members arrive, take, allocate and leave on a model device, and nothing is ever promised twice.
    #[derive(Clone, Debug)]
    enum Step {
        Want(u64),
        Own(usize, u64),
        Leave(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (1..60u64).prop_map(Step::Want),
            2 => (0..8usize, 1..40u64).prop_map(|(who, bytes)| Step::Own(who, bytes)),
            2 => (0..8usize).prop_map(Step::Leave),
        ]
    }

    proptest! {
        #[test]
        fn never_more_than_the_device_has(steps in proptest::collection::vec(step(), 1..80)) {
            const TOTAL: u64 = 100;
            let mut members: Vec<Other> = Vec::new();
            for (ticket, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Want(bytes) => members.push(other(State::Waiting, ticket as u64, bytes, 0)),
                    Step::Own(who, bytes) => {
                        if let Some(member) = members.get_mut(who).filter(|member| member.state == State::Holding) {
                            member.owned = (member.owned + bytes).min(member.bytes);
                        }
                    }
                    Step::Leave(who) => drop((who < members.len()).then(|| members.remove(who))),
                }
                let free = TOTAL - members.iter().map(|member| member.owned).sum::<u64>();
                for index in 0..members.len() {
                    let me = members[index];
                    let others: Vec<Other> = members.iter().enumerate().filter(|(at, _)| *at != index).map(|(_, m)| *m).collect();
                    let want = Want::Bytes(me.bytes);
                    if me.state == State::Waiting && verdict(me.ticket, want, &others, free) == Verdict::Take(me.bytes) {
                        members[index].state = State::Holding;
                    }
                }
                let promised: u64 = members.iter().filter(|m| m.state == State::Holding).map(|m| m.bytes).sum();
                prop_assert!(promised <= TOTAL, "{promised} bytes are promised");
                let first = members.iter().filter(|m| m.state == State::Waiting).map(|m| m.ticket).min();
                let youngest = members.iter().filter(|m| m.state == State::Holding).map(|m| m.ticket).max();
                prop_assert!(first.zip(youngest).is_none_or(|(first, youngest)| first > youngest), "somebody was overtaken");
            }
        }
    }
}
