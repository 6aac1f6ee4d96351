//! Needers and owners with real sockets between them: who is asked, what is kept of what was given, and when it ends.

use super::Borrower;
use crate::instance;
use crate::message::{Answer, Code, Refusal, Verb};
use crate::place::Place;
use crate::server::{Outbox, Server, Service, Ticket};
use serde_json::json;
use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn Error>>;

/// Has one mark of so many bytes, and more on another GPU, and gives them or not; what is given is not offered.
struct Owner {
    bytes: u64,
    gives: bool,
    /// Which process it says to be: with its marks, and to whoever greets it.
    instances: [String; 2],
    asked: Mutex<Vec<i32>>,
    ended: AtomicUsize,
}

impl Service for Arc<Owner> {
    fn answer(&self, _ticket: Ticket, verb: Verb) -> Option<Answer> {
        let there = if self.gives && self.asked().len() > self.ended() { 0 } else { self.bytes };
        let gpus = json!([{"gpu": "GPU-a", "bytes": there}, {"gpu": "GPU-b", "bytes": 1000}]);
        let [with_marks, greeting] = &self.instances;
        Some(match verb {
            Verb::Hello => Ok(json!({"instance": greeting})),
            Verb::Marks => Ok(
                json!({"instance": with_marks, "marks": [{"mark": 1, "tag": "m", "gpus": gpus, "idle_seconds": 5.0}], "more": 1}),
            ),
            Verb::Reclaim { priority, .. } => {
                self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(priority);
                let refusal = || Refusal::new(Code::Refused, "not now, I am busy");
                if self.gives { Ok(json!({"bytes": self.bytes + 1000})) } else { Err(refusal()) }
            }
            _ => Ok(json!(null)),
        })
    }

    fn forget(&self, _ticket: Ticket) {}

    fn let_go(&self, _ticket: Ticket) {
        self.ended.fetch_add(1, Ordering::SeqCst);
    }

    fn tick(&self) -> Option<Instant> {
        None
    }
}

impl Owner {
    fn asked(&self) -> Vec<i32> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn ended(&self) -> usize {
        self.ended.load(Ordering::SeqCst)
    }
}

/// Owners of so many bytes each, who give them or not.
struct Street {
    root: tempfile::TempDir,
    owners: Vec<Arc<Owner>>,
    running: Vec<(Arc<Outbox>, Arc<AtomicBool>, std::thread::JoinHandle<()>)>,
}

impl Street {
    fn of(owners: &[(u64, bool)]) -> Result<Street, Box<dyn Error>> {
        let owners = owners.iter().enumerate().map(|(number, &(bytes, gives))| {
            let instances = [number.to_string(), number.to_string()];
            Owner { bytes, gives, instances, asked: Mutex::default(), ended: AtomicUsize::new(0) }
        });
        Street::with(owners.collect())
    }

    fn with(owners: Vec<Owner>) -> Result<Street, Box<dyn Error>> {
        let mut street = Street { root: tempfile::tempdir()?, owners: Vec::new(), running: Vec::new() };
        for owner in owners.into_iter().map(Arc::new) {
            // All of them have one number, and the needer has it, too: as in containers that share a directory.
            let (listener, _) = street.place()?.listen(std::process::id())?;
            let outbox = Arc::new(Outbox::new()?);
            let server = Server::new(listener, Arc::clone(&owner), Arc::clone(&outbox), Arc::default());
            let stop = server.stop();
            street.running.push((outbox, stop, std::thread::spawn(|| server.run())));
            street.owners.push(owner);
        }
        Ok(street)
    }

    fn place(&self) -> Result<Place, Box<dyn Error>> {
        Ok(Place::at(&self.root.path().join("sire"))?)
    }

    fn borrower(&self) -> Result<Borrower, Box<dyn Error>> {
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
        };
        Ok(Borrower::new(self.place()?, "GPU-a", 3, spawn, None))
    }
}

impl Drop for Street {
    fn drop(&mut self) {
        for (outbox, stop, thread) in self.running.drain(..) {
            stop.store(true, Ordering::Release);
            outbox.wake();
            assert!(thread.join().is_ok(), "a server did not end well");
        }
    }
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether so much is lent; if not, so much is missing still.
fn is_lent(borrower: &Borrower, missing: u64, lent: u64) -> bool {
    let seen = Instant::now();
    borrower.lent() == lent || {
        borrower.missing(missing, seen);
        false
    }
}

#[test]
fn who_refuses_is_passed_by_and_what_others_gave_lasts_as_long_as_the_need() -> Outcome {
    let street = Street::of(&[(10, false), (20, true)])?;
    let borrower = street.borrower()?;
    let before = Instant::now();
    wait_until("nobody gave way", || is_lent(&borrower, 8, 20));
    assert_eq!((street.owners[0].asked(), street.owners[1].asked()), (vec![3], vec![3]));
    // What was seen before the memory arrived is no reason to ask anybody else.
    borrower.missing(8, before);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((street.owners[1].asked().len(), street.owners[1].ended()), (1, 0));
    drop(borrower);
    wait_until("the loan outlasts the need", || street.owners[1].ended() == 1);
    Ok(())
}

#[test]
fn where_it_is_not_enough_nobody_is_disturbed_and_nothing_is_kept() -> Outcome {
    let street = Street::of(&[(10, false), (20, true)])?;
    let borrower = street.borrower()?;
    wait_until("it never says why", || {
        borrower.missing(31, Instant::now());
        borrower.why() == "all that others offer is 30 bytes"
    });
    assert!(street.owners.iter().all(|owner| owner.asked().is_empty()), "somebody was asked in vain");
    let other = street.borrower()?;
    wait_until("it never says why", || {
        other.missing(30, Instant::now());
        other.why().contains("not now, I am busy")
    });
    wait_until("it keeps what is not enough", || street.owners[1].ended() == street.owners[1].asked().len());
    assert_eq!(other.lent(), 0);
    Ok(())
}

#[test]
fn who_does_not_answer_is_spoken_of() -> Outcome {
    let street = Street::of(&[(20, true)])?;
    // As a process that is stopped: there is a queue, and nobody takes anything out of it.
    let (_listener, _) = street.place()?.listen(4711)?;
    let borrower = street.borrower()?;
    wait_until("it never says why", || {
        borrower.missing(31, Instant::now());
        borrower.why()
            == "others offer 20 bytes; what 4711 offers is not known: it did not answer within 1.0 s; is it stopped?"
    });
    wait_until("nobody gave way", || is_lent(&borrower, 20, 20));
    Ok(())
}

#[test]
fn what_an_earlier_round_got_goes_back_when_a_later_one_finds_nobody() -> Outcome {
    let street = Street::of(&[(20, true)])?;
    let borrower = street.borrower()?;
    wait_until("nobody gave way", || is_lent(&borrower, 20, 20));
    wait_until("it keeps what is not enough", || {
        if street.owners[0].ended() == 0 {
            borrower.missing(5, Instant::now());
        }
        street.owners[0].ended() == 1
    });
    assert_eq!((borrower.lent(), street.owners[0].asked().len()), (0, 1));
    Ok(())
}

#[test]
fn who_has_enough_keeps_it_and_asks_nobody_else() -> Outcome {
    let street = Street::of(&[(20, true), (30, true)])?;
    let borrower = street.borrower()?;
    wait_until("nobody gave way", || is_lent(&borrower, 20, 20));
    borrower.enough();
    borrower.missing(5, Instant::now());
    borrower.missing(500, Instant::now());
    std::thread::sleep(Duration::from_millis(20));
    assert!(street.owners[1].asked().is_empty(), "it asked on");
    assert_eq!((borrower.lent(), street.owners[0].ended()), (20, 0));
    Ok(())
}

#[test]
fn a_needer_does_not_ask_itself_nor_whoever_has_taken_over_an_owners_name() -> Outcome {
    let owner =
        |bytes, instances| Owner { bytes, gives: true, instances, asked: Mutex::default(), ended: AtomicUsize::new(0) };
    let own = instance::spoken(instance::own());
    let street = Street::with(vec![
        owner(40, [own.clone(), own]),
        // One that says nothing of the kind is told from this process by its number.
        owner(30, [String::new(), String::new()]),
        owner(20, ["gone".to_owned(), "its successor".to_owned()]),
    ])?;
    let borrower = street.borrower()?;
    wait_until("it never says why", || {
        borrower.missing(8, Instant::now());
        borrower.why().contains("it has ended, and another process has its name")
    });
    assert!(street.owners.iter().all(|owner| owner.asked().is_empty()), "one was asked that must not be");
    assert!(borrower.why().contains(&format!("{}-2's 'm'", std::process::id())), "{}", borrower.why());
    Ok(())
}
