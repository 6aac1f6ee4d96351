//! The desk's bargain, with threads that do as programs do: nothing happens outside safe points, and everything that is asked is answered once.

use super::{Action, Back, Desk, Member, Outcome, Part, Terms};
use crate::message::{Answer, Code, Refusal};
use crate::server::Ticket;
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);
const NOW: Duration = Duration::ZERO;

type Answers = mpsc::Receiver<(Ticket, Answer)>;

fn desk() -> (Arc<Desk>, Answers) {
    let (sender, answers) = mpsc::channel();
    let sender = Mutex::new(sender);
    let deliver = move |ticket, answer| {
        let _ = sender.lock().unwrap_or_else(PoisonError::into_inner).send((ticket, answer));
    };
    (Arc::new(Desk::new(Box::new(deliver))), answers)
}

fn pause(tag: &str) -> Action {
    Action::Pause { tag: Some(tag.to_owned()) }
}

fn resume(tag: Option<&str>) -> Action {
    Action::Resume { tag: tag.map(str::to_owned), wait: NOW }
}

/// The step of a resume that undoes a pause of a tag.
fn undo(tag: Option<&str>) -> Action {
    Action::Undo { back: tag.map_or(Back::Everything, |tag| Back::Under(tag.to_owned())), wait: NOW }
}

/// What gives way by a mark: a region of the same number.
fn lent(mark: u64) -> Back {
    let part = Part { region: mark as u32, tag: format!("mark/{mark}"), pauses: 1 };
    Back::Exactly { asked: Some("mark".to_owned()), parts: vec![part] }
}

/// Does what it is told: a pause's undo is its tag.
fn obey(action: &Action) -> Outcome {
    let undo = match action {
        Action::Pause { tag } => vec![tag.clone().map_or(Back::Everything, Back::Under)],
        Action::Yield => vec![Back::Everything],
        Action::Lend { mark, .. } => vec![lent(*mark)],
        _ => Vec::new(),
    };
    Outcome::Done { report: json!(format!("{action:?}")), undo }
}

/// One look, without waiting.
fn glance(desk: &Desk, member: &Member, run: &mut dyn FnMut(&Action) -> Outcome) -> bool {
    desk.pass(member, NOW, run)
}

fn refused(answer: Option<(Ticket, Answer)>) -> (Ticket, Code, String) {
    match answer {
        Some((ticket, Err(Refusal { code, message, .. }))) => (ticket, code, message),
        other => (Ticket(0), Code::Failed, format!("not refused: {other:?}")),
    }
}

#[test]
fn a_program_that_is_paused_stays_until_it_is_resumed() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert!(!glance(&desk, &member, &mut |_| unreachable!("nothing was asked")));
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    assert!(glance(&desk, &member, &mut obey));
    assert!(matches!(answers.try_recv(), Ok((Ticket(1), Ok(_)))));
    for _ in 0..3 {
        assert!(glance(&desk, &member, &mut obey), "it was let go while it was paused");
    }
    assert_eq!(desk.summary()["paused"], json!(["a"]));
    assert_eq!(desk.ask(Ticket(2), resume(None), LONG), Ok(()));
    assert!(!glance(&desk, &member, &mut obey));
    assert!(matches!(answers.try_recv(), Ok((Ticket(2), Ok(_)))));
    assert_eq!(desk.summary()["paused"], json!([]));
}

/// A thread that passes a safe point for as long as it is held there; and whether it has gone on.
fn stays(desk: &Arc<Desk>, member: &Member) -> (std::thread::JoinHandle<bool>, Arc<AtomicBool>) {
    let gone = Arc::new(AtomicBool::new(false));
    let held = std::thread::spawn({
        let (desk, gone, member) = (Arc::clone(desk), Arc::clone(&gone), member.clone());
        move || {
            let held = desk.pass(&member, LONG, &mut obey);
            gone.store(true, Ordering::SeqCst);
            held
        }
    });
    (held, gone)
}

#[test]
fn whoever_gives_up_lets_nobody_go_before_the_memory_is_back() {
    let (desk, _answers) = desk();
    let member = desk.join("held");
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    assert!(glance(&desk, &member, &mut obey));
    let (held, gone) = stays(&desk, &member);
    assert_eq!(desk.give_up(|_| Err("no memory")), Err("no memory"));
    assert_eq!(desk.summary()["paused"], json!(["a"]), "what is not back is still paused");
    let resumed = desk.give_up(|back| {
        assert_eq!(back, &Back::Under("a".to_owned()));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!gone.load(Ordering::SeqCst), "it went on with memory that is not there");
        Ok::<(), ()>(())
    });
    assert_eq!(resumed, Ok(()));
    assert_eq!(held.join().ok(), Some(false));
    assert_eq!(desk.summary()["paused"], json!([]));
}

#[test]
fn a_callback_of_an_action_may_pass_a_safe_point_itself() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    let mut inner = Vec::new();
    let held = glance(&desk, &member, &mut |action| {
        assert!(desk.is_carrying());
        inner.push(desk.pass(&member, LONG, &mut |_| unreachable!("it is under way")));
        assert_eq!(desk.give_up(|_| Err("not now")), Ok(()), "whoever carries it out cannot wait for it");
        obey(action)
    });
    assert_eq!((held, inner), (true, vec![false]));
    assert!(!desk.is_carrying());
    assert!(matches!(answers.try_recv(), Ok((Ticket(1), Ok(_)))));
}

#[test]
fn a_thread_that_is_held_tries_again_what_found_no_good_moment() {
    let (desk, answers) = desk();
    let member = desk.join("held");
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(2), pause("b"), LONG), Ok(()));
    let held = std::thread::spawn({
        let desk = Arc::clone(&desk);
        move || {
            let mut busy = 3;
            // One pass, as long as it takes.
            desk.pass(&member, LONG, &mut |action| match action {
                Action::Pause { tag: Some(tag) } if tag == "b" && busy > 0 => {
                    busy -= 1;
                    Outcome::NotNow("a thread is inside 'b'".to_owned())
                }
                action => obey(action),
            })
        }
    });
    assert!(matches!(answers.recv_timeout(LONG), Ok((Ticket(1), Ok(_)))));
    assert!(matches!(answers.recv_timeout(LONG), Ok((Ticket(2), Ok(_)))));
    assert_eq!(desk.ask(Ticket(3), resume(None), LONG), Ok(()));
    assert!(matches!(answers.recv_timeout(LONG), Ok((Ticket(3), Ok(_)))));
    assert_eq!(held.join().ok(), Some(false));
}

#[test]
fn what_is_paused_after_a_failure_holds_like_any_pause() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    let stuck = |_: &Action| Outcome::Stuck {
        refusal: Refusal::new(Code::Failed, "the device is lost"),
        undo: vec![Back::Under("a".to_owned())],
    };
    assert!(glance(&desk, &member, &mut { stuck }), "its memory is away");
    assert_eq!(refused(answers.try_recv().ok()).2, "the device is lost");
    assert_eq!(desk.ask(Ticket(2), resume(None), LONG), Ok(()));
    assert!(!glance(&desk, &member, &mut obey));
}

#[test]
fn a_desk_that_closes_refuses_what_waits_and_what_comes() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    desk.close();
    assert_eq!(refused(answers.try_recv().ok()).2, "the control socket is being closed");
    assert!(desk.ask(Ticket(2), pause("a"), LONG).is_err());
    assert!(!glance(&desk, &member, &mut |_| unreachable!("it was refused")));
    desk.open();
    assert_eq!(desk.ask(Ticket(3), pause("a"), LONG), Ok(()));
    assert!(glance(&desk, &member, &mut |action| {
        desk.close();
        obey(action)
    }));
    assert_eq!(desk.give_up(|_| Ok::<(), ()>(())), Ok(()), "what was under way when it closed");
    assert!(!glance(&desk, &member, &mut obey));
}

#[test]
fn a_resume_undoes_what_was_paused_in_its_order_and_each_once() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    for (number, tag) in ["a", "b/c", "a"].into_iter().enumerate() {
        assert_eq!(desk.ask(Ticket(number as u64), pause(tag), LONG), Ok(()));
    }
    assert!(glance(&desk, &member, &mut obey));
    let mut done = Vec::new();
    assert_eq!(desk.ask(Ticket(9), resume(None), LONG), Ok(()));
    glance(&desk, &member, &mut |action| {
        done.push(action.clone());
        obey(action)
    });
    assert_eq!(done, [undo(Some("a")), undo(Some("b/c"))]);
}

#[test]
fn a_resume_by_tag_ends_the_holds_under_it_and_no_others() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    for (number, tag) in ["model/a", "model", "modelb"].into_iter().enumerate() {
        assert_eq!(desk.ask(Ticket(number as u64), pause(tag), LONG), Ok(()));
    }
    glance(&desk, &member, &mut obey);
    assert_eq!(desk.ask(Ticket(9), resume(Some("model")), LONG), Ok(()));
    glance(&desk, &member, &mut obey);
    assert_eq!(desk.summary()["paused"], json!(["modelb"]));
}

#[test]
fn a_failed_resume_leaves_the_program_paused_and_can_be_repeated() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(2), resume(None), LONG), Ok(()));
    let full = |action: &Action| match action {
        Action::Pause { .. } => obey(action),
        _ => Outcome::Failed(Refusal::new(Code::Failed, "no memory")),
    };
    assert!(glance(&desk, &member, &mut { full }));
    let _ = answers.try_recv();
    assert_eq!(refused(answers.try_recv().ok()), (Ticket(2), Code::Failed, "no memory".to_owned()));
    assert_eq!(desk.ask(Ticket(3), resume(None), LONG), Ok(()));
    assert!(!glance(&desk, &member, &mut obey));
}

#[test]
fn a_request_that_finds_no_safe_point_is_refused_with_the_reason_and_does_not_happen() {
    let (desk, answers) = desk();
    assert_eq!(desk.ask(Ticket(1), pause("a"), NOW), Ok(()));
    assert_eq!(desk.expire(), None);
    let (_, code, why) = refused(answers.try_recv().ok());
    assert_eq!(code, Code::Refused);
    assert!(why.contains("and never before"), "{why}");
    let member = desk.join("worker");
    assert_eq!(desk.ask(Ticket(2), pause("a"), NOW), Ok(()));
    desk.expire();
    let (_, _, why) = refused(answers.try_recv().ok());
    assert!(why.contains("thread 'worker' passed its last one"), "{why}");
    assert!(!glance(&desk, &member, &mut |_| unreachable!("it was refused")));
}

#[test]
fn what_has_expired_does_not_happen_even_before_anybody_says_so() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), pause("a"), NOW), Ok(()));
    assert!(!glance(&desk, &member, &mut |_| unreachable!("its time was over")));
}

#[test]
fn a_bad_moment_lets_the_thread_go_on_and_is_tried_again() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), pause("a"), Duration::from_secs(2)), Ok(()));
    let mut tries = 0;
    for _ in 0..3 {
        let held = desk.pass(&member, LONG, &mut |_| {
            tries += 1;
            Outcome::NotNow("somebody is inside".to_owned())
        });
        assert!(!held, "the thread could never leave what it is inside of");
    }
    assert_eq!(tries, 3);
    std::thread::sleep(Duration::from_millis(2010));
    desk.expire();
    let (_, code, why) = refused(answers.try_recv().ok());
    assert_eq!(code, Code::Refused);
    assert_eq!(why, "no good moment came within 2.0 s: somebody is inside");
}

const COME_BACK: Action = Action::Return { wait: NOW };

#[test]
fn a_process_that_is_away_waits_for_its_turn_whatever_is_asked_from_outside() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    let mut done = Vec::new();
    let mut run = |action: &Action| {
        done.push(action.clone());
        match action {
            // What is paused already is no change.
            Action::Pause { .. } if done.contains(&Action::Yield) => {
                Outcome::Done { report: json!(null), undo: Vec::new() }
            }
            _ => obey(action),
        }
    };
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(2), Action::Yield, LONG), Ok(()));
    assert!(glance(&desk, &member, &mut run));
    assert!(desk.is_away());
    // One pauses more, another resumes all: nothing of it happens before the turn.
    assert_eq!(desk.ask(Ticket(3), Action::Pause { tag: None }, LONG), Ok(()));
    assert!(glance(&desk, &member, &mut run));
    assert!(desk.is_held());
    assert_eq!(desk.ask(Ticket(4), resume(None), LONG), Ok(()));
    assert!(glance(&desk, &member, &mut run));
    assert!(!desk.is_held());
    assert_eq!(desk.give_up(|_| Err("it is not ours now")), Ok(()));
    assert_eq!(answers.try_iter().filter(|(_, answer)| answer.is_ok()).count(), 4);
    assert_eq!(desk.ask(Ticket(5), COME_BACK, LONG), Ok(()));
    assert!(!glance(&desk, &member, &mut run));
    assert!(!desk.is_away());
    let resumed: Vec<_> = done.iter().filter(|action| matches!(action, Action::Undo { .. })).cloned().collect();
    assert_eq!(resumed, [undo(None), undo(Some("a"))]);
}

/// Somebody has mistyped a tag: what is there comes back all the same, in this turn and not never.
#[test]
fn a_name_that_nothing_has_keeps_nothing_else_away() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    let mut run = |action: &Action| match action {
        Action::Yield => Outcome::Done { report: json!(null), undo: vec![Back::Under("model".to_owned())] },
        Action::Undo { back, .. } if back.asked() == Some("modle") => {
            Outcome::Failed(Refusal::new(Code::Invalid, "there is no region 'modle'"))
        }
        action => obey(action),
    };
    assert_eq!(desk.ask(Ticket(1), Action::Yield, LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(2), resume(Some("modle")), LONG), Ok(()));
    assert!(glance(&desk, &member, &mut run));
    assert_eq!(desk.ask(Ticket(3), COME_BACK, LONG), Ok(()));
    assert!(!glance(&desk, &member, &mut run), "it waits for what will never come");
    assert!(!desk.is_away());
    let reports = answers.try_iter().last().and_then(|(_, answer)| answer.ok());
    assert_eq!(reports.map(|reports| reports[1]["failed"].clone()), Some(json!("there is no region 'modle'")));
}

#[test]
fn what_is_paused_from_outside_stays_so_when_the_turn_comes() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(2), Action::Yield, LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(3), COME_BACK, LONG), Ok(()));
    let yields = |action: &Action| match action {
        Action::Yield => Outcome::Done { report: json!(null), undo: vec![Back::Under("b".to_owned())] },
        action => obey(action),
    };
    assert!(glance(&desk, &member, &mut { yields }), "it is still paused from outside");
    assert!(!desk.is_away());
    assert_eq!(desk.summary()["paused"], json!(["a"]));
}

#[test]
fn a_turn_that_cannot_be_used_is_tried_again_and_one_that_ends_lets_go() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    desk.close();
    assert_eq!(desk.ask(Ticket(1), Action::Yield, LONG), Ok(()), "no matter whether others may ask");
    assert!(glance(&desk, &member, &mut obey));
    let full = |_: &Action| Outcome::Failed(Refusal::new(Code::Failed, "no memory"));
    assert_eq!(desk.ask(Ticket(2), COME_BACK, LONG), Ok(()));
    assert!(glance(&desk, &member, &mut { full }));
    assert_eq!(refused(answers.try_iter().last()).2, "no memory");
    assert_eq!(desk.ask(Ticket(3), COME_BACK, LONG), Ok(()));
    assert!(desk.withdraw(Ticket(3)));
    assert!(!desk.withdraw(Ticket(3)));
    assert_eq!(desk.stay(|_| Err("no memory")), Err("no memory"));
    assert!(!desk.is_away());
    assert!(glance(&desk, &member, &mut obey), "it went on with memory that is not there");
    desk.open();
    assert_eq!(desk.ask(Ticket(4), resume(None), LONG), Ok(()));
    assert!(!glance(&desk, &member, &mut obey), "a resume from outside brings it back");
}

/// With a device that has room for so many of the two tags: what came back before a failure is asked for once, and goes again if the turn is given up.
#[test]
fn a_return_that_fails_in_the_middle_lets_nobody_go_on_and_leaves_nothing_half() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    let resident = RefCell::new(BTreeSet::from(["a".to_owned(), "b".to_owned()]));
    let room = Cell::new(1);
    let mut run = |action: &Action| {
        let mut resident = resident.borrow_mut();
        let undo = match action {
            Action::Yield => std::mem::take(&mut *resident).into_iter().map(Back::Under).collect(),
            Action::Undo { back: Back::Under(tag), .. } if resident.len() < room.get() => {
                assert!(resident.insert(tag.clone()), "{tag} came back twice");
                Vec::new()
            }
            _ => return Outcome::Failed(Refusal::new(Code::Failed, "no memory")),
        };
        Outcome::Done { report: json!(null), undo }
    };
    let mut ask = |number, action| {
        assert_eq!(desk.ask(Ticket(number), action, LONG), Ok(()));
        let waits = glance(&desk, &member, &mut run);
        (waits, desk.is_away(), resident.borrow().len())
    };
    assert_eq!(ask(1, Action::Yield), (true, true, 0));
    assert_eq!(ask(2, COME_BACK), (true, true, 1), "the program went on with half of its memory");
    assert_eq!(refused(answers.try_iter().last()).2, "no memory");
    assert_eq!(ask(3, Action::Yield), (true, true, 0), "the turn was given up with memory in the others' way");
    assert_eq!(ask(4, COME_BACK), (true, true, 1));
    room.set(2);
    assert_eq!(ask(5, COME_BACK), (false, false, 2));
    assert_eq!(answers.try_iter().filter(|(_, answer)| answer.is_ok()).count(), 2);
}

#[test]
fn what_is_paused_from_outside_in_anothers_turn_does_not_come_back_with_the_own_one() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), Action::Yield, LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(2), pause("a"), LONG), Ok(()));
    assert!(glance(&desk, &member, &mut obey));
    let (ticket, code, why) = refused(answers.try_iter().last());
    assert_eq!((ticket, code), (Ticket(2), Code::Refused));
    assert!(why.contains("another process has its turn"), "{why}");
    let nothing_more = |action: &Action| match action {
        Action::Pause { .. } => Outcome::Done { report: json!(null), undo: Vec::new() },
        action => obey(action),
    };
    assert_eq!(desk.ask(Ticket(3), Action::Pause { tag: None }, LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(4), COME_BACK, LONG), Ok(()));
    assert!(glance(&desk, &member, &mut { nothing_more }));
    assert_eq!(refused(answers.try_iter().last()).2, "everything is paused from outside");
    assert!(desk.is_away());
    assert_eq!(desk.stay(|_| Err("it is to stay paused")), Ok(()));
    assert!(glance(&desk, &member, &mut obey), "it went on though it is paused");
    assert_eq!(desk.ask(Ticket(5), resume(None), LONG), Ok(()));
    let mut done = Vec::new();
    assert!(!glance(&desk, &member, &mut |action| {
        done.push(action.clone());
        obey(action)
    }));
    assert_eq!(done, [undo(None)]);
}

#[test]
fn whoever_asked_hears_why_no_moment_was_good_so_far() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), Action::Yield, LONG), Ok(()));
    assert_eq!(desk.why(Ticket(1)), None);
    assert!(!glance(&desk, &member, &mut |_| Outcome::NotNow("a thread is inside 'a'".to_owned())));
    assert_eq!(desk.why(Ticket(1)).as_deref(), Some("a thread is inside 'a'"));
    assert!(desk.withdraw(Ticket(1)));
}

#[test]
fn what_a_time_slice_asks_for_is_withdrawn_by_it_and_refused_by_nobody() {
    let (desk, answers) = desk();
    assert_eq!(desk.ask(Ticket(1), Action::Yield, NOW), Ok(()));
    assert_eq!(desk.expire(), None);
    assert!(answers.try_recv().is_err(), "a pause that found no safe point has not failed");
    assert!(desk.withdraw(Ticket(1)));
}

#[test]
fn who_takes_turns_no_more_lets_nobody_go_before_the_memory_is_back() {
    let (desk, _answers) = desk();
    let member = desk.join("held");
    assert_eq!(desk.ask(Ticket(1), Action::Yield, LONG), Ok(()));
    assert!(glance(&desk, &member, &mut obey));
    let (held, gone) = stays(&desk, &member);
    let resumed = desk.stay(|back| {
        assert_eq!(back, &Back::Everything);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!gone.load(Ordering::SeqCst), "it went on with memory that is not there");
        Ok::<(), ()>(())
    });
    assert_eq!(resumed, Ok(()));
    assert_eq!(held.join().ok(), Some(false));
    assert!(!desk.is_away() && !desk.is_held());
}

#[test]
fn who_leaves_is_not_waited_for_and_who_hangs_up_gets_nothing_done() {
    let (desk, answers) = desk();
    let (main, other) = (desk.join("main"), desk.join("other"));
    assert_eq!(desk.ask(Ticket(1), pause("a"), LONG), Ok(()));
    assert!(glance(&desk, &main, &mut |_| unreachable!("the other is not here")));
    desk.forget(Ticket(1));
    assert!(!glance(&desk, &main, &mut |_| unreachable!("nobody asks any more")));
    desk.leave(&other);
    assert_eq!(desk.ask(Ticket(2), pause("a"), LONG), Ok(()));
    assert!(glance(&desk, &main, &mut obey));
    assert!(matches!(answers.try_recv(), Ok((Ticket(2), Ok(_)))));
}

#[test]
fn no_more_requests_wait_than_there_is_room_for() {
    let (desk, _answers) = desk();
    let asked: Vec<_> = (0..super::MOST as u64 + 1).map(|number| desk.ask(Ticket(number), pause("a"), LONG)).collect();
    assert!(asked[..super::MOST].iter().all(Result::is_ok));
    assert_eq!(asked[super::MOST].as_ref().map_err(|refusal| refusal.code), Err(Code::Busy));
}

/// Set at the end, also if that is a failure: threads that wait for it must not wait for ever.
struct Sets<'a>(&'a AtomicBool);

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn nothing_is_paused_while_any_of_several_threads_works() {
    const THREADS: usize = 4;
    const ROUNDS: u64 = 40;
    let (desk, answers) = desk();
    let (working, paused, over) = (AtomicI32::new(0), AtomicI32::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for number in 0..THREADS {
            let (desk, working, paused, over) = (&desk, &working, &paused, &over);
            scope.spawn(move || {
                let member = desk.join(&number.to_string());
                let mut run = |action: &Action| {
                    assert_eq!(working.load(Ordering::SeqCst), 0, "memory went under a thread that works");
                    paused.store(i32::from(matches!(action, Action::Pause { .. })), Ordering::SeqCst);
                    obey(action)
                };
                // Who has not passed a safe point yet is not waited for.
                while desk.pass(&member, Duration::from_millis(1), &mut run) {}
                while !over.load(Ordering::SeqCst) {
                    working.fetch_add(1, Ordering::SeqCst);
                    assert_eq!(paused.load(Ordering::SeqCst), 0, "a thread works on paused memory");
                    working.fetch_sub(1, Ordering::SeqCst);
                    while desk.pass(&member, Duration::from_millis(1), &mut run) {}
                }
                desk.leave(&member);
            });
        }
        let _end = Sets(&over);
        let mut answered = BTreeMap::new();
        for round in 0..ROUNDS {
            for (ticket, action) in [(2 * round, pause("a")), (2 * round + 1, resume(None))] {
                assert_eq!(desk.ask(Ticket(ticket), action, LONG), Ok(()));
                let answer = answers.recv_timeout(LONG);
                assert!(matches!(&answer, Ok((_, Ok(_)))), "{answer:?}");
                *answered.entry(answer.map_or(Ticket(u64::MAX), |(ticket, _)| ticket)).or_insert(0) += 1;
            }
        }
        assert_eq!(answered.len() as u64, 2 * ROUNDS);
        assert!(answered.values().all(|times| *times == 1));
    });
}

#[test]
fn a_thread_that_waits_for_others_goes_on_when_the_request_expires() {
    let (desk, answers) = desk();
    let (main, _other) = (desk.join("main"), desk.join("other"));
    assert_eq!(desk.ask(Ticket(1), pause("a"), Duration::from_millis(50)), Ok(()));
    let began = Instant::now();
    while desk.pass(&main, Duration::from_millis(10), &mut |_| unreachable!("the other is not here")) {
        desk.expire();
    }
    assert!(began.elapsed() < LONG);
    desk.expire();
    assert_eq!(refused(answers.recv_timeout(LONG).ok()).1, Code::Refused);
}

mod loans;
