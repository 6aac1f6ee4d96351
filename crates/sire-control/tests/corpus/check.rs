// What must hold for any bytes that a peer sends. Included by the fuzz target `control` and by the plain test that goes through the corpus.

use sire_control::line::Lines;
use sire_control::message::{self, LONGEST_REQUEST, LONGEST_TAG, Request, Verb};

/// Reads `bytes` as a server and as a client would, in pieces that depend on `bytes`.
pub fn check(bytes: &[u8]) {
    let piece = bytes.first().map_or(1, |byte| usize::from(*byte) % 61 + 1);
    let mut lines = Lines::new(LONGEST_REQUEST);
    for piece in bytes.chunks(piece) {
        let Ok(complete) = lines.push(piece) else { return };
        for line in complete {
            assert!(line.len() <= LONGEST_REQUEST && !line.contains(&b'\n'));
            check_request(&line);
            check_reply(&line);
        }
    }
}

/// What is accepted stays what it is when it is written and read again, and keeps the limits.
fn check_request(line: &[u8]) {
    let request = match Request::parse(line) {
        Ok(request) => request,
        Err((_, refusal)) => return assert!(!refusal.message.is_empty()),
    };
    let again = Request::parse(request.line().trim_end().as_bytes());
    assert_eq!(again.as_ref(), Ok(&request));
    if let Verb::Pause { tag, timeout } | Verb::Resume { tag, timeout, .. } = &request.verb {
        assert!(tag.as_ref().is_none_or(|tag| !tag.is_empty() && tag.len() <= LONGEST_TAG));
        assert!((0.0..=message::LONGEST_PATIENCE).contains(timeout));
    }
}

fn check_reply(line: &[u8]) {
    if let Ok((id, answer)) = message::parse_reply(line) {
        let written = message::reply(id, &answer);
        assert_eq!(message::parse_reply(written.trim_end().as_bytes()), Ok((id, answer)));
    }
}
