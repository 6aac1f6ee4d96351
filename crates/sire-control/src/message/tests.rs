//! Requests and replies there and back, and lines that are refused.

use super::{Answer, Code, Refusal, Request, Verb, parse_reply, reply};
use serde_json::json;

fn refused(line: &str) -> String {
    match Request::parse(line.as_bytes()) {
        Err((_, refusal)) => refusal.message,
        Ok(request) => format!("accepted as {request:?}"),
    }
}

#[test]
fn every_request_survives_the_way() {
    let tag = Some("model/weights \"ü\"".to_owned());
    let verbs = [
        Verb::Hello,
        Verb::List,
        Verb::Events { since: u64::MAX },
        Verb::Pause { tag: tag.clone(), timeout: 0.5 },
        Verb::Resume { tag, timeout: 3600.0, wait: 1.25 },
        Verb::Pause { tag: None, timeout: 0.0 },
        Verb::Evict { device: None, bytes: Some(1 << 40) },
        Verb::Budget { device: 7, limit: None, headroom: 3, residency: 2.0 },
        Verb::Trace,
        Verb::Marks,
        Verb::Reclaim { mark: u64::MAX, priority: -7, timeout: 1.5 },
    ];
    for (id, verb) in verbs.into_iter().enumerate() {
        let request = Request { id: id as u64, verb };
        let line = request.line();
        assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "{line:?}");
        assert_eq!(Request::parse(line.trim_end().as_bytes()), Ok(request));
    }
}

#[test]
fn what_does_not_belong_to_a_verb_is_refused_by_name() {
    assert_eq!(refused(r#"{"verb":"list","tag":"a"}"#), "'list' takes no 'tag'");
    assert_eq!(refused(r#"{"verb":"pause","wait":1}"#), "'pause' takes no 'wait'");
    assert_eq!(refused(r#"{"verb":"trace","bytes":1}"#), "'trace' takes no 'bytes'");
    assert_eq!(refused(r#"{"verb":"budget"}"#), "budget needs a device");
    assert_eq!(refused(r#"{"verb":"reclaim","priority":1}"#), "reclaim needs a mark; 'marks' lists them");
    assert_eq!(refused(r#"{"verb":"reclaim","mark":1,"tag":"a"}"#), "'reclaim' takes no 'tag'");
    assert_eq!(refused(r#"{"verb":"marks","mark":1}"#), "'marks' takes no 'mark'");
    assert!(refused(r#"{"verb":"reclaim","mark":-1}"#).starts_with("this is not a request"));
    assert!(refused(r#"{"verb":"pause","tags":"a"}"#).contains("unknown field `tags`"));
    assert!(refused(r#"{"verb":"exec"}"#).starts_with("there is no verb 'exec'"));
}

#[test]
fn nonsense_is_refused_with_a_reason() {
    for tag in ["", "/", "a//b", "a/", "x\\u0000y", &"t".repeat(256)] {
        assert!(refused(&format!(r#"{{"verb":"pause","tag":"{tag}"}}"#)).contains("is no tag"), "{tag:?}");
    }
    for timeout in ["-1", "3601", "1e300"] {
        assert!(refused(&format!(r#"{{"verb":"pause","timeout":{timeout}}}"#)).contains("must be 0 to 3600 seconds"));
    }
    for line in ["", "null", "[]", "pause", "{\"verb\":1}", "{\"verb\":\"list\"", "\u{0}", "{}"] {
        assert!(refused(line).starts_with("this is not a request"), "{line:?}: {}", refused(line));
    }
    assert!(refused(&"[".repeat(4000)).starts_with("this is not a request"));
}

#[test]
fn the_number_comes_back_with_a_refusal() {
    assert_eq!(Request::parse(br#"{"id":9,"verb":"nothing"}"#).map_err(|(id, _)| id), Err(9));
}

#[test]
fn replies_survive_the_way() {
    let refusal = Refusal { status: Some("SIRE_STATUS_BUSY".to_owned()), ..Refusal::new(Code::Failed, "so\nbusy") };
    for answer in [Ok(json!({"a": [1, "\n"]})), Err(refusal), Err(Refusal::new(Code::Refused, "no"))] as [Answer; 3] {
        let line = reply(3, &answer);
        assert_eq!(line.matches('\n').count(), 1);
        assert_eq!(parse_reply(line.as_bytes()), Ok((3, answer)));
    }
    assert!(parse_reply(br#"{"id":1}"#).is_err());
}
