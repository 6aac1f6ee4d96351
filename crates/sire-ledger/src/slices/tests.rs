//! The queue's fairness as a model in which time is a number, and the turn itself with a file.

use super::*;
use proptest::prelude::*;

fn other(state: State, ticket: u64) -> Other {
    Other { state, ticket, bytes: 0, owned: 0, silent: false }
}

#[test]
fn who_came_first_is_next_unless_it_sleeps() {
    let mut first = other(State::Waiting, 1);
    assert_eq!(next(2, &[first]), Next::Behind(1));
    assert_eq!(next(2, &[other(State::Waiting, 3)]), Next::Mine);
    assert_eq!(next(2, &[first, other(State::Holding, 9)]), Next::Taken);
    first.silent = true;
    assert_eq!(next(2, &[first]), Next::Mine);
}

#[test]
fn a_turn_ends_only_for_somebody_and_not_before_it_was_worth_it() {
    let seconds = Duration::from_secs;
    assert_eq!(residency(seconds(10), seconds(2)), seconds(10));
    assert_eq!(residency(seconds(10), seconds(3)), seconds(12));
    assert!(!is_over(seconds(99), seconds(10), 0));
    assert!(!is_over(seconds(9), seconds(10), 1));
    assert!(is_over(seconds(10), seconds(10), 1));
}

#[test]
fn a_file_passes_the_turn_on() -> Result<()> {
    let dir = tempfile::tempdir().map_err(|error| crate::Error::io("make", Path::new("a directory"), error))?;
    let join = |group| Turn::join(dir.path(), "GPU-1", group);
    let (a, b, apart) = (join("")?, join("")?, join("apart")?);
    for turn in [&a, &b, &apart] {
        turn.queue()?;
    }
    assert_eq!((a.take()?, b.take()?, apart.take()?), (Next::Mine, Next::Taken, Next::Mine));
    assert_eq!((a.waiting()?, b.waiting()?), (1, 0));
    a.queue()?;
    assert_eq!((a.take()?, b.take()?), (Next::Behind(1), Next::Mine));
    // As the end of its process would.
    drop(b);
    assert_eq!(a.take()?, Next::Mine);
    a.leave()?;
    assert_eq!(entries(dir.path(), "GPU-1", "")?.len(), 1);
    Ok(())
}

/// Whoever is stopped at the desk keeps it: that must not keep others from saying that they still wait.
#[test]
fn who_merely_looks_needs_no_desk() -> Result<()> {
    let dir = tempfile::tempdir().map_err(|error| crate::Error::io("make", Path::new("a directory"), error))?;
    let join = || Turn::join(dir.path(), "GPU-1", "");
    let (a, b) = (join()?, join()?);
    a.queue()?;
    b.queue()?;
    assert_eq!(a.take()?, Next::Mine);
    let stopped = crate::file::Desk::open(&dir.path().join("sire-ledger-slices-GPU-1"))?;
    assert!(stopped.sit_down()?);
    assert_eq!(b.take()?, Next::Taken);
    stopped.stand_up();
    a.leave()?;
    assert_eq!(b.take()?, Next::Mine);
    Ok(())
}

/// A process of the model: when it wants the device, for how long in all, and what changing places costs it.
#[derive(Clone, Debug)]
struct Job {
    arrives: u64,
    work: u64,
    quantum: u64,
    switch: u64,
}

fn job() -> impl Strategy<Value = Job> {
    (0..200u64, 1..300u64, 1..40u64, 0..12u64).prop_map(|(arrives, work, quantum, switch)| Job {
        arrives,
        work,
        quantum,
        switch,
    })
}

/// One process as it goes: its ticket while it waits or holds; what is left of its work and of the change of places that is under way.
#[derive(Clone, Debug)]
struct Going {
    job: Job,
    state: State,
    ticket: u64,
    left: u64,
    since: u64,
    waits_since: u64,
    changing: u64,
    switched: u64,
}

impl Going {
    fn residency(&self) -> u64 {
        let ticks = Duration::from_secs;
        residency(ticks(self.job.quantum), ticks(self.job.switch)).as_secs()
    }
}

/// Plays the jobs out, tick by tick: all finish; one has the device at a time; whoever waits gets it after at most one turn of each other; and where nobody
/// waits nobody changes. The tick in which a process takes the device is spent on taking it: its turn begins with the next one.
fn play_out(jobs: Vec<Job>) -> std::result::Result<(), TestCaseError> {
    let mut all: Vec<Going> = jobs
        .into_iter()
        .map(|job| Going {
            state: State::Idle,
            ticket: 0,
            left: job.work,
            since: 0,
            waits_since: 0,
            changing: 0,
            switched: 0,
            job,
        })
        .collect();
    let longest: u64 = all.iter().map(|each| each.residency() + 2 * each.job.switch + 2).sum();
    let mut tickets = 0;
    for now in 0..20_000u64 {
        for at in 0..all.len() {
            let others: Vec<Other> = all
                .iter()
                .enumerate()
                .filter(|(index, _)| *index != at)
                .map(|(_, each)| other(each.state, each.ticket))
                .collect();
            let waiting = others.iter().filter(|each| is_waiting(each)).count();
            let me = &mut all[at];
            match me.state {
                State::Idle if me.left > 0 && me.job.arrives <= now => {
                    tickets += 1;
                    (me.state, me.ticket, me.waits_since) = (State::Waiting, tickets, now);
                }
                State::Waiting if next(me.ticket, &others) == Next::Mine => {
                    prop_assert!(now - me.waits_since <= longest, "it waited {} of {longest}", now - me.waits_since);
                    (me.state, me.since, me.changing) = (State::Holding, now + 1, me.job.switch);
                }
                State::Holding if me.changing > 0 => {
                    me.changing -= 1;
                    me.since = now + 1;
                }
                State::Holding if me.left == 0 => me.state = State::Idle,
                State::Holding => {
                    let resident = Duration::from_secs(now - me.since);
                    if is_over(resident, Duration::from_secs(me.residency()), waiting) {
                        prop_assert!(waiting > 0);
                        prop_assert!(now - me.since >= WORTH as u64 * me.job.switch, "it changed places too early");
                        tickets += 1;
                        (me.state, me.ticket, me.waits_since) = (State::Waiting, tickets, now);
                        me.switched += 1;
                    } else {
                        me.left -= 1;
                    }
                }
                _ => {}
            }
        }
        prop_assert!(all.iter().filter(|each| each.state == State::Holding).count() <= 1);
        if all.iter().all(|each| each.left == 0) {
            break;
        }
    }
    prop_assert!(all.iter().all(|each| each.left == 0), "somebody starved: {all:?}");
    if all.len() == 1 {
        prop_assert_eq!(all[0].switched, 0);
    }
    Ok(())
}

proptest! {
    #[test]
    fn everybody_gets_turns_and_nobody_thrashes(jobs in proptest::collection::vec(job(), 1..6)) {
        play_out(jobs)?;
    }
}

/// The shortest turns that can be asked for, and places that change for nothing: each turn is still one tick of work.
#[test]
fn the_shortest_turns_get_work_done() -> std::result::Result<(), TestCaseError> {
    let job = |work| Job { arrives: 0, work, quantum: 1, switch: 0 };
    play_out(vec![job(85), job(2)])
}
