//! A real socket, and clients of every kind: proper, too many, slow, loud, talking nonsense, of another user.

use super::{AGREEMENTS, AT_ONCE, Connection, Descriptors, IDLE, LINE, Lines, Outbox, PLACES, Server, Service, Ticket};
use crate::client::{Client, Failure, ask, ask_all};
use crate::lock;
use crate::message::{Answer, Code, LONGEST_REQUEST, Refusal, Verb};
use crate::place::{Found, Name, Place};
use serde_json::json;
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn Error>>;
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers `list` at once; `pause` only when it is told to.
#[derive(Default)]
struct Teller {
    waiting: Mutex<Vec<Ticket>>,
    forgotten: Mutex<Vec<Ticket>>,
    let_go: Mutex<Vec<Ticket>>,
}

impl Service for Arc<Teller> {
    fn answer(&self, ticket: Ticket, verb: Verb) -> Option<Answer> {
        match verb {
            Verb::Reclaim { mark: 0, .. } => Some(Err(Refusal::new(Code::Refused, "no"))),
            Verb::Pause { .. } | Verb::Reclaim { mark: 2, .. } => {
                self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(ticket);
                None
            }
            // Larger than what a socket takes at once.
            Verb::Trace => Some(Ok(json!("x".repeat(4 << 20)))),
            _ => Some(Ok(json!({"ticket": ticket.0}))),
        }
    }

    fn forget(&self, ticket: Ticket) {
        self.forgotten.lock().unwrap_or_else(PoisonError::into_inner).push(ticket);
    }

    fn let_go(&self, ticket: Ticket) {
        self.let_go.lock().unwrap_or_else(PoisonError::into_inner).push(ticket);
    }

    fn tick(&self) -> Option<Instant> {
        None
    }
}

struct House {
    _root: tempfile::TempDir,
    place: Place,
    found: Found,
    teller: Arc<Teller>,
    outbox: Arc<Outbox>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl House {
    fn open() -> Result<House, Box<dyn Error>> {
        let root = tempfile::tempdir()?;
        let place = Place::at(&root.path().join("sire"))?;
        let (listener, path) = place.listen(1)?;
        let (teller, outbox) = (Arc::new(Teller::default()), Arc::new(Outbox::new()?));
        let server = Server::new(listener, Arc::clone(&teller), Arc::clone(&outbox), Arc::default());
        let stop = server.stop();
        let thread = Some(std::thread::spawn(|| server.run()));
        Ok(House {
            _root: root,
            place,
            found: Found { name: Name { pid: 1, namesake: 0 }, path },
            teller,
            outbox,
            stop,
            thread,
        })
    }

    fn connect(&self) -> Result<UnixStream, Box<dyn Error>> {
        let stream = UnixStream::connect(&self.found.path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    fn waiting(&self) -> Vec<Ticket> {
        self.teller.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.outbox.wake();
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(matches!(ended, Some(Ok(()))), "the server did not end well");
    }
}

/// Everything that is said until the other side hangs up.
fn rest(stream: &UnixStream) -> String {
    let mut text = String::new();
    let _ = BufReader::new(stream).read_to_string(&mut text);
    text
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn questions_are_answered_in_any_pieces_and_any_number_on_one_connection() -> Outcome {
    let house = House::open()?;
    let mut stream = house.connect()?;
    for piece in b"{\"id\":5,\"verb\":\"list\"}\n\n{\"id\":6,\"verb\":\"hello\"}\n".chunks(3) {
        stream.write_all(piece)?;
    }
    let mut lines = BufReader::new(&stream).lines();
    // Other servers of the process have tickets from the same roll.
    let mut ticket = |id: u32| -> Result<Option<u64>, Box<dyn Error>> {
        let line = lines.next().transpose()?.unwrap_or_default();
        let number = line.strip_prefix(&format!(r#"{{"id":{id},"ok":{{"ticket":"#));
        Ok(number.and_then(|rest| rest.strip_suffix("}}")).and_then(|number| number.parse().ok()))
    };
    let (first, second) = (ticket(5)?, ticket(6)?);
    assert!(first.is_some() && first < second, "{first:?}, {second:?}");
    Ok(())
}

#[test]
fn an_answer_that_comes_later_finds_its_way_and_others_do_not_wait_for_it() -> Outcome {
    let house = House::open()?;
    let mut stream = house.connect()?;
    stream.write_all(b"{\"id\":41,\"verb\":\"pause\"}\n")?;
    // Half a connection is enough to get an answer.
    stream.shutdown(std::net::Shutdown::Write)?;
    wait_until("the pause did not arrive", || house.waiting().len() == 1);
    assert!(ask(&house.found, Verb::List, PATIENCE)?.is_ok());
    house.outbox.put(house.waiting()[0], Ok(json!("done")));
    assert_eq!(rest(&stream), "{\"id\":41,\"ok\":\"done\"}\n");
    Ok(())
}

/// A program that was resumed and ended soon afterwards: whoever had resumed it was told that nobody listens any more, and asked whether it is stopped.
#[test]
fn what_was_answered_before_the_end_is_said() -> Outcome {
    let house = House::open()?;
    let mut stream = house.connect()?;
    stream.write_all(b"{\"id\":41,\"verb\":\"pause\"}\n")?;
    wait_until("the pause did not arrive", || house.waiting().len() == 1);
    // There before the end is, and nobody is woken in between.
    lock(&house.outbox.finished).push((house.waiting()[0], Ok(json!("done"))));
    house.stop.store(true, Ordering::Release);
    house.outbox.wake();
    assert_eq!(rest(&stream), "{\"id\":41,\"ok\":\"done\"}\n");
    Ok(())
}

#[test]
fn who_hangs_up_is_forgotten() -> Outcome {
    let house = House::open()?;
    let mut stream = house.connect()?;
    stream.write_all(b"{\"verb\":\"pause\"}\n")?;
    wait_until("the pause did not arrive", || house.waiting().len() == 1);
    drop(stream);
    let forgotten = || house.teller.forgotten.lock().unwrap_or_else(PoisonError::into_inner).clone();
    wait_until("nobody noticed", || forgotten() == house.waiting());
    // An answer to nobody is dropped.
    house.outbox.put(house.waiting()[0], Ok(json!(1)));
    assert!(ask(&house.found, Verb::List, PATIENCE)?.is_ok());
    Ok(())
}

#[test]
fn a_line_too_long_and_garbage_are_refused_and_cut_off() -> Outcome {
    let house = House::open()?;
    let long = "x".repeat(LONGEST_REQUEST + 1);
    for (said, why) in
        [(long.as_str(), "at most 4096 bytes"), ("\0\u{1}\n", "not a request"), ("GET / HTTP/1.1\r\n", "not a request")]
    {
        let mut stream = house.connect()?;
        // The server may have hung up before all is written.
        let _ = stream.write_all(said.as_bytes());
        let said = rest(&stream);
        assert!(said.contains(why) && said.contains(r#""code":"invalid""#), "{said}");
    }
    assert!(ask(&house.found, Verb::List, PATIENCE)?.is_ok());
    Ok(())
}

#[test]
fn a_slow_writer_is_told_and_cut_off_while_others_are_served() -> Outcome {
    let house = House::open()?;
    let mut slow = house.connect()?;
    slow.write_all(b"{\"verb\":")?;
    let began = Instant::now();
    assert!(ask(&house.found, Verb::List, PATIENCE)?.is_ok());
    // Bytes that trickle in do not extend the line's time.
    let said = std::thread::scope(|scope| {
        let reading = scope.spawn(|| rest(&slow));
        let mut trickle = &slow;
        while began.elapsed() < LINE + PATIENCE && trickle.write_all(b" ").is_ok() && !reading.is_finished() {
            std::thread::sleep(Duration::from_millis(100));
        }
        reading.join().unwrap_or_default()
    });
    assert!(said.contains("no whole request came within 5 s"), "{said}");
    assert!(began.elapsed() < LINE + PATIENCE);
    Ok(())
}

#[test]
fn who_does_not_read_keeps_nothing_but_its_own_place() -> Outcome {
    let house = House::open()?;
    let mut deaf = house.connect()?;
    deaf.write_all(b"{\"id\":1,\"verb\":\"trace\"}\n")?;
    assert!(ask(&house.found, Verb::List, PATIENCE)?.is_ok());
    // A patient reader gets all of it.
    let answer = ask(&house.found, Verb::Trace, PATIENCE)?;
    assert_eq!(answer.ok().and_then(|value| value.as_str().map(str::len)), Some(4 << 20));
    Ok(())
}

#[test]
fn many_connections_at_once_do_not_keep_anybody_out_for_long() -> Outcome {
    let house = House::open()?;
    let crowd: Vec<UnixStream> = (0..4 * PLACES).filter_map(|_| house.connect().ok()).collect();
    let turned_away = crowd
        .iter()
        .skip(PLACES)
        .filter(|stream| rest(stream).contains(&format!("{PLACES} clients are connected already")))
        .count();
    assert_eq!(turned_away, crowd.len() - PLACES);
    let refused = ask(&house.found, Verb::List, PATIENCE)?;
    assert_eq!(refused.map_err(|refusal| refusal.code), Err(Code::Busy));
    drop(crowd);
    wait_until("the door stayed shut", || matches!(ask(&house.found, Verb::List, PATIENCE), Ok(Ok(_))));
    Ok(())
}

#[test]
fn one_connection_gets_only_its_share_of_unanswered_requests() -> Outcome {
    let house = House::open()?;
    let mut stream = house.connect()?;
    for number in 1..=AT_ONCE + 1 {
        writeln!(stream, "{{\"id\":{number},\"verb\":\"pause\"}}")?;
    }
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    assert!(line.starts_with("{\"error\":{\"code\":\"busy\"") && line.contains("\"id\":9"), "{line}");
    Ok(())
}

#[test]
fn half_a_line_is_refused_once_while_an_earlier_answer_is_on_its_way() -> Outcome {
    let (stream, client) = UnixStream::pair()?;
    client.set_nonblocking(true)?;
    let (lines, out, open) = (Lines::new(LONGEST_REQUEST), Vec::new(), vec![(Ticket(1), 7)]);
    let mut connection = Connection {
        stream,
        lines,
        out,
        open,
        agreed: Vec::new(),
        deadline: Instant::now(),
        ending: false,
        gone: false,
    };
    assert!(connection.take(b"{\"verb\":").is_ok_and(|lines| lines.is_empty()));
    for _ in 0..3 {
        connection.give_up();
        assert!(!connection.is_over(), "its answer is still to come");
    }
    assert!(connection.deadline > Instant::now() + IDLE / 2, "it is we who take long");
    connection.open.clear();
    assert!(connection.is_over());
    drop(connection);
    assert_eq!(rest(&client).matches("no whole request came").count(), 1);
    Ok(())
}

#[test]
fn a_server_leaves_no_descriptor_behind_whether_it_ran_or_not() -> Outcome {
    let root = tempfile::tempdir()?;
    let place = Place::at(&root.path().join("sire"))?;
    let descriptors: Arc<Descriptors> = Arc::default();
    let noted = || descriptors.0.iter().filter(|slot| slot.load(Ordering::Acquire) >= 0).count();
    let make = || -> Result<_, Box<dyn Error>> {
        let (listener, outbox) = (place.listen(1)?.0, Arc::new(Outbox::new()?));
        Ok((Server::new(listener, Arc::new(Teller::default()), Arc::clone(&outbox), Arc::clone(&descriptors)), outbox))
    };
    let (server, _) = make()?;
    assert_eq!(noted(), 2);
    drop(server);
    assert_eq!(noted(), 0, "its thread could not be started");
    let (server, outbox) = make()?;
    server.stop().store(true, Ordering::Release);
    outbox.wake();
    server.run();
    assert_eq!(noted(), 0);
    Ok(())
}

#[test]
fn everybody_is_asked_and_what_the_dead_left_is_removed() -> Outcome {
    let house = House::open()?;
    drop(house.place.listen(2)?);
    assert_eq!(house.place.sockets()?.len(), 2);
    let answers = ask_all(&house.place, &Verb::List, PATIENCE)?;
    assert!(matches!(&answers[..], [(found, Ok(Ok(_)))] if found.name.pid == 1), "{answers:?}");
    assert_eq!(house.place.sockets()?.len(), 1);
    Ok(())
}

#[test]
fn who_listens_and_does_not_answer_is_called_silent() -> Outcome {
    let root = tempfile::tempdir()?;
    let place = Place::at(&root.path().join("sire"))?;
    let (_listener, path) = place.listen(3)?;
    let silence = Client::connect(&path, PATIENCE)?.ask(Verb::Hello, Duration::from_millis(50));
    assert!(matches!(silence, Err(Failure::Silent(_))), "{silence:?}");
    Ok(())
}

fn reclaim(mark: u64) -> Verb {
    Verb::Reclaim { mark, priority: 0, timeout: 1.0 }
}

#[test]
fn an_agreement_ends_with_its_connection_and_a_refusal_is_none() -> Outcome {
    let house = House::open()?;
    let ended = || house.teller.let_go.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut client = Client::connect(&house.found.path, PATIENCE)?;
    let granted = client.ask(reclaim(1), PATIENCE)?.map_err(|refusal| refusal.message)?;
    assert!(client.ask(reclaim(0), PATIENCE)?.is_err());
    assert!(ended().is_empty());
    drop(client);
    wait_until("the agreement outlasts its connection", || !ended().is_empty());
    assert_eq!(json!(ended().iter().map(|ticket| ticket.0).collect::<Vec<_>>()), json!([granted["ticket"]]));
    // One that was not answered yet ends as well.
    let mut asking = house.connect()?;
    asking.write_all(b"{\"id\":1,\"verb\":\"reclaim\",\"mark\":2}\n")?;
    wait_until("it was not asked", || house.waiting().len() == 1);
    drop(asking);
    wait_until("nobody heard of its end", || ended().len() == 2);
    assert_eq!(ended()[1], house.waiting()[0]);
    Ok(())
}

#[test]
fn agreements_leave_room_for_other_clients() -> Outcome {
    let house = House::open()?;
    let mut clients = Vec::new();
    for _ in 0..AGREEMENTS {
        let mut client = Client::connect(&house.found.path, PATIENCE)?;
        assert!(client.ask(reclaim(1), PATIENCE)?.is_ok());
        clients.push(client);
    }
    let mut late = Client::connect(&house.found.path, PATIENCE)?;
    let ended = || house.teller.let_go.lock().unwrap_or_else(PoisonError::into_inner).len();
    assert_eq!(late.ask(reclaim(1), PATIENCE)?.err().map(|refusal| refusal.code), Some(Code::Busy));
    assert!(late.ask(Verb::List, PATIENCE)?.is_ok());
    clients.pop();
    wait_until("a place was not free again", || ended() == 1);
    assert!(late.ask(reclaim(1), PATIENCE)?.is_ok());
    Ok(())
}
