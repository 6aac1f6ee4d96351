//! What is said: requests and replies, each one JSON object on a line of its own. docs/control.md shows them all.
//!
//! A request says what is wanted and nothing else: no path, no program, no name of a function. What does not belong to its verb is refused
//! rather than ignored, so that a typing error cannot pass for something else.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fmt;

/// The version of the protocol; it changes when an old client would misunderstand.
pub const PROTOCOL: u32 = 1;
/// Bytes of the longest request.
pub const LONGEST_REQUEST: usize = 4096;
/// Bytes of the longest reply that a client accepts.
pub const LONGEST_REPLY: usize = 64 << 20;
/// Bytes of the longest tag.
pub const LONGEST_TAG: usize = 255;
/// Seconds that a request waits for a safe point unless it says otherwise.
pub const PATIENCE: f64 = 10.0;
/// The most that it may say.
pub const LONGEST_PATIENCE: f64 = 3600.0;

/// What is asked.
#[derive(Clone, PartialEq, Debug)]
pub enum Verb {
    /// Who is there.
    Hello,
    /// All figures.
    List,
    /// What happened after event number `since`.
    Events {
        /// 0: everything that is still known.
        since: u64,
    },
    /// Pause a tag, or everything.
    Pause {
        /// None: everything.
        tag: Option<String>,
        /// Seconds to wait for a safe point.
        timeout: f64,
    },
    /// Resume a tag, or all that was paused from outside.
    Resume {
        /// None: all that was paused from outside.
        tag: Option<String>,
        /// Seconds to wait for a safe point.
        timeout: f64,
        /// Seconds to wait for memory that somebody else holds.
        wait: f64,
    },
    /// Make what is held without need give its memory back.
    Evict {
        /// None: everywhere.
        device: Option<u32>,
        /// None: all of it.
        bytes: Option<u64>,
    },
    /// What a device's managed memory may take from now on.
    Budget {
        /// Which device, as the process counts.
        device: u32,
        /// None: what there is.
        limit: Option<u64>,
        /// Bytes that stay free for others.
        headroom: u64,
        /// Seconds for which what was just used is spared.
        residency: f64,
    },
    /// Record calls from now on, in the private directory.
    Trace,
    /// What the program would give way with, and on which terms.
    Marks,
    /// Give way with what a mark means, until this connection ends.
    Reclaim {
        /// The mark's number.
        mark: u64,
        /// The need's priority.
        priority: i32,
        /// Seconds to wait for a safe point.
        timeout: f64,
    },
}

impl Verb {
    /// Whether what is granted lasts until the connection ends.
    #[must_use]
    pub fn binds(&self) -> bool {
        matches!(self, Verb::Reclaim { .. })
    }
}

/// A request: a number of the client's, which comes back with the reply, and what is asked.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// The client's number.
    pub id: u64,
    /// What is asked.
    pub verb: Verb,
}

/// Why there was no answer, for programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request makes no sense.
    Invalid,
    /// There was no moment at which it could be done; nothing has changed.
    Refused,
    /// Too many ask at once; try again.
    Busy,
    /// It was tried and failed; the message says what became of it.
    Failed,
}

/// Why there was no answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// The class.
    pub code: Code,
    /// The engine's status by name, if the engine said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// The sentence.
    pub message: String,
}

impl Refusal {
    /// A refusal of a class, in a sentence.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Refusal {
        Refusal { code, status: None, message: message.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// An answer, or why there is none.
pub type Answer = Result<Value, Refusal>;

/// As it is written: every field that any verb has.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    #[serde(default)]
    id: u64,
    verb: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    timeout: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    wait: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    limit: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    headroom: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    residency: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    since: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mark: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    priority: Option<i32>,
}

impl Request {
    /// Reads a line.
    ///
    /// # Errors
    /// What is wrong with it, and the request's number as far as that could be read.
    pub fn parse(line: &[u8]) -> Result<Request, (u64, Refusal)> {
        let wire: Wire = serde_json::from_slice(line).map_err(|error| {
            (0, Refusal::new(Code::Invalid, format!("this is not a request: {error}; docs/control.md lists them")))
        })?;
        let id = wire.id;
        read(wire).map(|verb| Request { id, verb }).map_err(|message| (id, Refusal::new(Code::Invalid, message)))
    }

    /// The line, with its newline.
    #[must_use]
    pub fn line(&self) -> String {
        let wire = Wire { id: self.id, ..written(&self.verb) };
        // Plain fields: this cannot fail, and an empty line is nothing to a server.
        format!("{}\n", serde_json::to_string(&wire).unwrap_or_default())
    }
}

fn read(mut wire: Wire) -> Result<Verb, String> {
    let (tag, device, bytes) = (wire.tag.take(), wire.device.take(), wire.bytes.take());
    let verb = match wire.verb.as_str() {
        "hello" => Verb::Hello,
        "list" => Verb::List,
        "events" => Verb::Events { since: wire.since.take().unwrap_or(0) },
        "pause" => Verb::Pause { tag: tag.clone(), timeout: seconds("timeout", wire.timeout.take(), PATIENCE)? },
        "resume" => Verb::Resume {
            tag: tag.clone(),
            timeout: seconds("timeout", wire.timeout.take(), PATIENCE)?,
            wait: seconds("wait", wire.wait.take(), 0.0)?,
        },
        "evict" => Verb::Evict { device, bytes },
        "budget" => Verb::Budget {
            device: device.ok_or("budget needs a device")?,
            limit: wire.limit.take(),
            headroom: wire.headroom.take().unwrap_or(0),
            residency: seconds("residency", wire.residency.take(), 0.0)?,
        },
        "trace" => Verb::Trace,
        "marks" => Verb::Marks,
        "reclaim" => Verb::Reclaim {
            mark: wire.mark.take().ok_or("reclaim needs a mark; 'marks' lists them")?,
            priority: wire.priority.take().unwrap_or(0),
            timeout: seconds("timeout", wire.timeout.take(), PATIENCE)?,
        },
        other => return Err(format!("there is no verb '{}'; docs/control.md lists them", short(other))),
    };
    refuse_strangers(&verb, &wire, [tag.is_some(), device.is_some(), bytes.is_some()])?;
    check_tag(tag.as_deref())?;
    Ok(verb)
}

/// Whatever the verb has not taken does not belong to it.
fn refuse_strangers(verb: &Verb, wire: &Wire, [tag, device, bytes]: [bool; 3]) -> Result<(), String> {
    let given = [
        ("tag", tag && !matches!(verb, Verb::Pause { .. } | Verb::Resume { .. })),
        ("device", device && !matches!(verb, Verb::Evict { .. } | Verb::Budget { .. })),
        ("bytes", bytes && !matches!(verb, Verb::Evict { .. })),
        ("timeout", wire.timeout.is_some()),
        ("wait", wire.wait.is_some()),
        ("limit", wire.limit.is_some()),
        ("headroom", wire.headroom.is_some()),
        ("residency", wire.residency.is_some()),
        ("since", wire.since.is_some()),
        ("mark", wire.mark.is_some()),
        ("priority", wire.priority.is_some()),
    ];
    match given.iter().find(|(_, stranger)| *stranger) {
        Some((name, _)) => Err(format!("'{}' takes no '{name}'", wire.verb)),
        None => Ok(()),
    }
}

fn check_tag(tag: Option<&str>) -> Result<(), String> {
    let Some(tag) = tag else { return Ok(()) };
    if tag.len() > LONGEST_TAG || tag.contains('\0') || tag.split('/').any(str::is_empty) {
        return Err(format!(
            "'{}' is no tag: at most {LONGEST_TAG} bytes, segments that are not empty, separated by '/'",
            short(tag)
        ));
    }
    Ok(())
}

fn seconds(name: &str, given: Option<f64>, default: f64) -> Result<f64, String> {
    let seconds = given.unwrap_or(default);
    if !(0.0..=LONGEST_PATIENCE).contains(&seconds) {
        return Err(format!("{name} is {seconds}; it must be 0 to {LONGEST_PATIENCE} seconds"));
    }
    // To the millisecond: more digits need not survive being written and read again.
    Ok((seconds * 1000.0).round() / 1000.0)
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

fn written(verb: &Verb) -> Wire {
    let named = |verb: &str| Wire { verb: verb.to_owned(), ..Wire::default() };
    match verb.clone() {
        Verb::Hello => named("hello"),
        Verb::List => named("list"),
        Verb::Events { since } => Wire { since: Some(since), ..named("events") },
        Verb::Pause { tag, timeout } => Wire { tag, timeout: Some(timeout), ..named("pause") },
        Verb::Resume { tag, timeout, wait } => {
            Wire { tag, timeout: Some(timeout), wait: Some(wait), ..named("resume") }
        }
        Verb::Evict { device, bytes } => Wire { device, bytes, ..named("evict") },
        Verb::Budget { device, limit, headroom, residency } => Wire {
            device: Some(device),
            limit,
            headroom: Some(headroom),
            residency: Some(residency),
            ..named("budget")
        },
        Verb::Trace => named("trace"),
        Verb::Marks => named("marks"),
        Verb::Reclaim { mark, priority, timeout } => {
            Wire { mark: Some(mark), priority: Some(priority), timeout: Some(timeout), ..named("reclaim") }
        }
    }
}

/// The line of a reply, with its newline.
#[must_use]
pub fn reply(id: u64, answer: &Answer) -> String {
    let reply = match answer {
        Ok(value) => json!({"id": id, "ok": value}),
        Err(refusal) => json!({"id": id, "error": refusal}),
    };
    format!("{reply}\n")
}

/// A reply as a client reads it: the request's number, and the answer.
///
/// # Errors
/// What is wrong with the line.
pub fn parse_reply(line: &[u8]) -> Result<(u64, Answer), String> {
    #[derive(Deserialize)]
    struct Reply {
        id: u64,
        ok: Option<Value>,
        error: Option<Refusal>,
    }
    let reply: Reply = serde_json::from_slice(line).map_err(|error| format!("the reply is not one: {error}"))?;
    match (reply.ok, reply.error) {
        (Some(value), None) => Ok((reply.id, Ok(value))),
        (None, Some(refusal)) => Ok((reply.id, Err(refusal))),
        _ => Err("the reply holds neither an answer nor an error".to_owned()),
    }
}

#[cfg(test)]
mod tests;
