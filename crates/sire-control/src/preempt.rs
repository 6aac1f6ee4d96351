//! How a process that needs memory asks others of the same user to give way: what they offer ([`plan`]), and the loans that it gets.
//!
//! The bargain. An owner gives way because it has said that it would (a *mark*), at a safe point, with everything kept that its regions keep. The loan lasts
//! as long as the needer's connection: when that ends, however it ends, the owner takes back what it gave, as soon as it can be had. So a needer that
//! is killed leaves nothing behind, and nobody has to be trusted to give anything back.
//!
//! A [`Borrower`] belongs to one wait. Whoever waits tells it at each look what is missing, and never waits for it: asking takes as long as owners take to
//! come to a safe point, and happens in a thread of its own. One round of asking gets all that is missing, or gives back at once what it got.

pub mod plan;

use crate::client::{Client, ask_all};
use crate::instance;
use crate::lock;
use crate::message::Verb;
use crate::place::{Found, Name, Place};
use crate::server::Descriptors;
use plan::{Mark, Need, Offer};
use serde::Deserialize;
use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long to wait for what processes offer: those that are stopped do not answer.
const LOOK: Duration = Duration::from_secs(1);
/// How long an owner may take to come to a safe point.
const PATIENCE: Duration = Duration::from_secs(5);
/// How much longer its copies may take: it says that it has begun by not refusing.
const COPYING: Duration = Duration::from_secs(600);
/// For how long who has refused is not asked again.
const REFUSED: Duration = Duration::from_secs(10);
/// How long to rest when what is offered is not enough: at first, and at most.
const REST: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Loans of one wait.
const MOST: usize = 24;
/// Offers of which a sentence speaks.
const SPOKEN_OF: usize = 4;

/// Starts a thread with this name.
pub type Spawn = fn(&str, Box<dyn FnOnce() + Send>) -> io::Result<()>;

/// Somebody who waits for memory of one GPU. When it is dropped its loans end.
#[derive(Debug)]
pub struct Borrower(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    place: Place,
    gpu: String,
    priority: i32,
    spawn: Spawn,
    /// What a forked child has to close, so that this process's end is the end of its loans.
    descriptors: Option<&'static Descriptors>,
    /// This process's.
    instance: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    loans: Vec<Loan>,
    is_asking: bool,
    /// The connection on which an owner is being asked.
    asking: Option<Arc<UnixStream>>,
    /// When the last round of asking was over: what was seen before is no reason for another.
    settled: Instant,
    rest_until: Instant,
    tries: u32,
    refused: HashMap<(Name, u64), (Instant, String)>,
    why: String,
    /// What was needed is there: nobody else is asked.
    is_met: bool,
    ended: bool,
}

impl State {
    fn is_over(&self) -> bool {
        self.is_met || self.ended
    }

    /// Ends the question that an owner has been asked, if there is one.
    fn hang_up(&mut self) {
        if let Some(asking) = self.asking.take() {
            let _ = asking.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// Memory of another process, as long as the connection lasts.
#[derive(Debug)]
struct Loan {
    stream: Arc<UnixStream>,
    descriptors: Option<&'static Descriptors>,
    /// The process that made it.
    instance: u64,
    bytes: u64,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if !instance::is_own(self.instance) {
            return;
        }
        if let Some(descriptors) = self.descriptors {
            descriptors.remove(self.stream.as_raw_fd());
        }
        // Also where a child that was forked has the descriptor still.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// What an owner says that it offers.
#[derive(Deserialize)]
struct Offered {
    /// Which process that is ([`instance::spoken`]); empty: one that does not say so.
    #[serde(default)]
    instance: String,
    marks: Vec<Mark>,
}

/// Somebody who offers something.
#[derive(Debug)]
struct Owner {
    found: Found,
    instance: String,
}

/// What all others say.
#[derive(Debug, Default)]
struct Answers {
    offers: Vec<(Owner, Vec<Offer>)>,
    /// Sentences about those who say nothing.
    missing: Vec<String>,
}

impl Borrower {
    /// Somebody who may wait for memory of the GPU with this UUID.
    #[must_use]
    pub fn new(
        place: Place,
        gpu: &str,
        priority: i32,
        spawn: Spawn,
        descriptors: Option<&'static Descriptors>,
    ) -> Borrower {
        let now = Instant::now();
        let state = State {
            loans: Vec::new(),
            is_asking: false,
            asking: None,
            settled: now,
            rest_until: now,
            tries: 0,
            refused: HashMap::new(),
            why: "nobody was asked to give way yet".to_owned(),
            is_met: false,
            ended: false,
        };
        let (gpu, instance) = (gpu.to_owned(), instance::own());
        Borrower(Arc::new(Shared { place, gpu, priority, spawn, descriptors, instance, state: Mutex::new(state) }))
    }

    /// It is our turn, and at `seen` so many bytes were missing. Begins a round of asking, unless one is under way or was just in vain; returns at once.
    pub fn missing(&self, bytes: u64, seen: Instant) {
        let mut state = lock(&self.0.state);
        let is_full = state.is_asking || state.loans.len() >= MOST;
        if is_full || state.is_over() || seen <= state.settled || Instant::now() < state.rest_until {
            return;
        }
        state.is_asking = true;
        let shared = Arc::clone(&self.0);
        let started = (self.0.spawn)("sire-reclaim", Box::new(move || shared.round(bytes)));
        if let Err(error) = started {
            (state.is_asking, state.why) = (false, format!("no thread could be started to ask: {error}"));
        }
    }

    /// What was needed is there. Who is being asked is not waited for, and what a round that is under way has got goes back; the loans that
    /// there are stay.
    pub fn enough(&self) {
        let mut state = lock(&self.0.state);
        state.is_met = true;
        state.hang_up();
    }

    /// Why nobody gave way, or not enough, for a sentence.
    #[must_use]
    pub fn why(&self) -> String {
        lock(&self.0.state).why.clone()
    }

    /// Bytes that others said to have given.
    #[must_use]
    pub fn lent(&self) -> u64 {
        lock(&self.0.state).loans.iter().map(|loan| loan.bytes).sum()
    }
}

impl Drop for Borrower {
    fn drop(&mut self) {
        if !instance::is_own(self.0.instance) {
            // A forked child: the lock may be held by a thread that it does not have, and descriptors with these numbers are not ours.
            std::mem::forget(Arc::clone(&self.0));
            return;
        }
        let mut state = lock(&self.0.state);
        state.ended = true;
        state.hang_up();
        let loans = std::mem::take(&mut state.loans);
        drop(state);
        drop(loans);
    }
}

impl Shared {
    /// Gets all that is missing, or nothing; then what earlier rounds got goes back, too.
    fn round(&self, missing: u64) {
        let mut got: Vec<Loan> = Vec::new();
        let outcome = self.collect(missing, &mut got);
        let mut state = lock(&self.state);
        (state.is_asking, state.asking, state.settled) = (false, None, Instant::now());
        match outcome {
            _ if state.is_over() => {}
            Ok(()) => {
                state.tries = 0;
                state.why = "what others gave was not enough, or somebody else took it".to_owned();
                state.loans.append(&mut got);
            }
            Err(why) => {
                // All or nothing, also of several rounds.
                got.append(&mut state.loans);
                state.rest_until = Instant::now() + REST.0.saturating_mul(1 << state.tries.min(8)).min(REST.1);
                state.tries += 1;
                state.why = why;
            }
        }
        // What is not kept ends without the lock.
        drop(state);
        drop(got);
    }

    fn collect(&self, missing: u64, got: &mut Vec<Loan>) -> Result<(), String> {
        let found = self.look().map_err(|error| format!("who could give way is not known: {error}"))?;
        let mut offers: Vec<Offer> = found.offers.iter().flat_map(|(_, offers)| offers.clone()).collect();
        let why = self.objections(&offers, &found.missing);
        loop {
            let lent: u64 = got.iter().map(|loan| loan.bytes).sum();
            if lent >= missing {
                return Ok(());
            }
            let need = Need { gpu: self.gpu.clone(), bytes: missing - lent, priority: self.priority };
            let asked = plan::plan(&self.without_refused(&offers), &need);
            let Some(first) = asked.into_iter().next() else { return Err(self.objections(&offers, &found.missing)) };
            if lock(&self.state).is_over() || got.len() >= MOST {
                return Err(why);
            }
            offers.retain(|each| (each.owner, each.mark.mark) != (first.owner, first.mark.mark));
            let owner = found.offers.iter().map(|(owner, _)| owner).find(|owner| owner.found.name == first.owner);
            match owner.map(|owner| self.ask(owner, &first)) {
                Some(Ok(loan)) => got.push(loan),
                Some(Err(why)) => self.note_refusal(first, why, &mut offers),
                None => {}
            }
        }
    }

    /// It is spoken of, and not asked again for a while.
    fn note_refusal(&self, offer: Offer, why: String, offers: &mut Vec<Offer>) {
        let key = (offer.owner, offer.mark.mark);
        lock(&self.state).refused.insert(key, (Instant::now(), why));
        offers.push(offer);
    }

    fn without_refused(&self, offers: &[Offer]) -> Vec<Offer> {
        let mut state = lock(&self.state);
        state.refused.retain(|_, (when, _)| when.elapsed() < REFUSED);
        offers.iter().filter(|each| !state.refused.contains_key(&(each.owner, each.mark.mark))).cloned().collect()
    }

    /// What everybody else offers. This process itself is not known by its number, which somebody else in the directory may have, too.
    fn look(&self) -> io::Result<Answers> {
        let mut answers = Answers::default();
        for (found, answer) in ask_all(&self.place, &Verb::Marks, LOOK)? {
            let said = match answer {
                Ok(Ok(said)) => said,
                // One that knows no marks.
                Ok(Err(_)) => continue,
                Err(failure) => {
                    answers.missing.push(format!("what {} offers is not known: {failure}", found.name));
                    continue;
                }
            };
            let Ok(Offered { instance, marks }) = serde_json::from_value(said) else { continue };
            let owner = Owner { found, instance };
            if !self.is_this(&owner) {
                let offers = marks.into_iter().map(|mark| Offer { owner: owner.found.name, mark }).collect();
                answers.offers.push((owner, offers));
            }
        }
        Ok(answers)
    }

    fn is_this(&self, owner: &Owner) -> bool {
        if owner.instance.is_empty() {
            owner.found.name.pid == std::process::id()
        } else {
            owner.instance == instance::spoken(self.instance)
        }
    }

    fn ask(&self, owner: &Owner, offer: &Offer) -> Result<Loan, String> {
        let mut client = Client::connect(&owner.found.path, LOOK).map_err(|failure| failure.to_string())?;
        let stream = client.stream();
        if let Some(descriptors) = self.descriptors {
            descriptors.add(stream.as_raw_fd());
        }
        let mut loan =
            Loan { stream: Arc::clone(&stream), descriptors: self.descriptors, instance: self.instance, bytes: 0 };
        {
            let mut state = lock(&self.state);
            if state.is_over() {
                return Err("the need is over".to_owned());
            }
            state.asking = Some(stream);
        }
        // Its name may be another one's by now, whose marks have the same numbers and mean something else.
        let hello = client.ask(Verb::Hello, LOOK);
        let is_another = |hello: &serde_json::Value| hello["instance"].as_str().unwrap_or_default() != owner.instance;
        if !hello.as_ref().is_ok_and(|hello| !hello.as_ref().is_ok_and(is_another)) {
            lock(&self.state).asking = None;
            let failure = hello.err().map(|failure| failure.to_string());
            return Err(failure.unwrap_or_else(|| "it has ended, and another process has its name".to_owned()));
        }
        let verb = Verb::Reclaim { mark: offer.mark.mark, priority: self.priority, timeout: PATIENCE.as_secs_f64() };
        let answer = client.ask_alive(verb, PATIENCE + LOOK, COPYING);
        lock(&self.state).asking = None;
        let answer = answer.map_err(|failure| failure.to_string())?.map_err(|refusal| refusal.message)?;
        // What it gave back on other GPUs is no part of what is needed here.
        loan.bytes = answer["bytes"].as_u64().unwrap_or(0).min(offer.mark.bytes_on(&self.gpu));
        Ok(loan)
    }

    /// A sentence about those who have something on the GPU and do not give way, or do not answer.
    fn objections(&self, offers: &[Offer], missing: &[String]) -> String {
        let state = lock(&self.state);
        let here = offers.iter().filter(|each| each.mark.bytes_on(&self.gpu) > 0 || each.mark.obstacle.is_some());
        let mut said: Vec<String> = Vec::new();
        let mut bytes = 0_u64;
        for each in here {
            let refused = state.refused.get(&(each.owner, each.mark.mark)).map(|(_, why)| why.clone());
            match each.mark.objection(self.priority).or(refused) {
                Some(why) => said.push(format!("{}'s '{}': {why}", each.owner, each.mark.tag)),
                None => bytes = bytes.saturating_add(each.mark.bytes_on(&self.gpu)),
            }
        }
        said.extend_from_slice(missing);
        let more = said.len().saturating_sub(SPOKEN_OF);
        said.truncate(SPOKEN_OF);
        let rest = if more > 0 { format!(", and {more} more") } else { String::new() };
        match (said.is_empty(), bytes) {
            (true, 0) => "no other process of this user offers memory there (sire.reclaimable)".to_owned(),
            (true, bytes) => format!("all that others offer is {bytes} bytes"),
            (false, bytes) => format!("others offer {bytes} bytes; {}{rest}", said.join("; ")),
        }
    }
}

#[cfg(test)]
mod tests;
