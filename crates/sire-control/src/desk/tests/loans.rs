//! Memory that gives way at the desk: who gets it, for how long, and how it comes back.

use super::{
    Action, Back, COME_BACK, Desk, LONG, Member, NOW, Outcome, Part, Terms, Ticket, desk, glance, lent, obey, pause,
    refused, resume,
};
use serde_json::json;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Instant;

const WAITS: Terms = Terms { waits: true, returns: true };
const GOES_ON: Terms = Terms { waits: false, returns: true };

fn lend(mark: u64, terms: Terms) -> Action {
    Action::Lend { mark, priority: 0, terms }
}

/// Passes once; what was done.
fn done(desk: &Desk, member: &Member, run: &dyn Fn(&Action) -> Outcome) -> (bool, Vec<Action>) {
    let mut done = Vec::new();
    let held = glance(desk, member, &mut |action| {
        done.push(action.clone());
        run(action)
    });
    (held, done)
}

fn back(mark: u64) -> Action {
    Action::Recover { mark, undo: vec![lent(mark)] }
}

#[test]
fn what_was_lent_comes_back_when_the_needer_ends_and_the_program_waits_until_then() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), lend(7, WAITS), LONG), Ok(()));
    assert_eq!(done(&desk, &member, &obey), (true, vec![lend(7, WAITS)]));
    assert!(matches!(answers.try_recv(), Ok((Ticket(1), Ok(_)))));
    assert_eq!((desk.lent(), desk.summary()["paused"].clone()), (vec![(7, false)], json!([])));
    assert_eq!(done(&desk, &member, &obey), (true, vec![]));
    desk.let_go(Ticket(2));
    assert_eq!(done(&desk, &member, &obey), (true, vec![]), "another one has ended");
    desk.let_go(Ticket(1));
    assert_eq!(desk.lent(), [(7, true)]);
    assert_eq!(done(&desk, &member, &obey), (false, vec![back(7)]));
    assert!(desk.lent().is_empty() && !desk.is_wanted());
}

#[test]
fn a_program_that_does_not_wait_goes_on_and_gets_it_back_all_the_same() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), lend(7, GOES_ON), LONG), Ok(()));
    assert_eq!(done(&desk, &member, &obey), (false, vec![lend(7, GOES_ON)]));
    assert_eq!(done(&desk, &member, &obey), (false, vec![]));
    desk.let_go(Ticket(1));
    assert_eq!(done(&desk, &member, &obey), (false, vec![back(7)]));
    // What does not come back by itself is the program's own pause when the need is over.
    let stays_away = Terms { returns: false, ..GOES_ON };
    assert_eq!(desk.ask(Ticket(2), lend(8, stays_away), LONG), Ok(()));
    assert_eq!(done(&desk, &member, &obey).1, [lend(8, stays_away)]);
    desk.let_go(Ticket(2));
    assert_eq!((done(&desk, &member, &obey), desk.lent()), ((false, vec![]), vec![]));
}

#[test]
fn a_needer_that_ends_while_memory_is_given_way_gets_nothing_that_lasts() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), lend(7, WAITS), LONG), Ok(()));
    let ends = |action: &Action| {
        if matches!(action, Action::Lend { .. }) {
            // As the server does for a connection that has ended.
            desk.forget(Ticket(1));
            desk.let_go(Ticket(1));
        }
        obey(action)
    };
    assert_eq!(done(&desk, &member, &ends), (false, vec![lend(7, WAITS), back(7)]));
    assert!(desk.lent().is_empty());
    // One that has not begun is not done.
    assert_eq!(desk.ask(Ticket(2), lend(7, WAITS), LONG), Ok(()));
    desk.forget(Ticket(2));
    assert_eq!(done(&desk, &member, &obey), (false, vec![]));
    assert_eq!(answers.try_iter().filter(|(ticket, _)| *ticket == Ticket(2)).count(), 0);
}

#[test]
fn what_finds_no_memory_is_tried_again_and_the_programs_own_resume_wins() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), lend(7, WAITS), LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(2), lend(8, WAITS), LONG), Ok(()));
    assert_eq!(done(&desk, &member, &obey).1.len(), 2);
    desk.let_go(Ticket(1));
    let (tries, mut said) = (AtomicI32::new(0), false);
    let short = |action: &Action| match action {
        Action::Recover { .. } if tries.fetch_add(1, Ordering::SeqCst) < 2 => Outcome::NotNow("no memory".to_owned()),
        action => obey(action),
    };
    let began = Instant::now();
    while desk.lent() != [(8, false)] {
        assert!(began.elapsed() < LONG && glance(&desk, &member, &mut { short }), "it went on without its memory");
        said |= desk.why_away(7).as_deref() == Some("no memory");
    }
    assert_eq!((said, desk.why_away(7)), (true, None));
    assert_eq!(tries.load(Ordering::SeqCst), 3);
    // The program brings the other one back itself.
    desk.came_back(|_| false);
    assert_eq!((done(&desk, &member, &obey), desk.lent()), ((false, vec![]), vec![]));
    desk.let_go(Ticket(2));
    assert_eq!(done(&desk, &member, &obey), (false, vec![]), "nothing is owed any more");
}

#[test]
fn a_person_who_resumes_and_a_program_that_recalls_get_everything_back() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    let give = |ticket, mark| {
        assert_eq!(desk.ask(Ticket(ticket), lend(mark, WAITS), LONG), Ok(()));
        assert!(glance(&desk, &member, &mut obey));
    };
    give(1, 7);
    assert_eq!(desk.ask(Ticket(2), resume(None), LONG), Ok(()));
    assert_eq!(done(&desk, &member, &obey), (false, vec![Action::Undo { back: lent(7), wait: NOW }]));
    give(3, 7);
    assert_eq!(desk.ask(Ticket(4), resume(Some("mark")), LONG), Ok(()));
    assert_eq!(done(&desk, &member, &obey), (false, vec![resume(Some("mark"))]));
    give(5, 7);
    assert_eq!(desk.recall(8, |_| Err("another mark's")), Ok(()));
    assert_eq!(desk.recall(7, |_| Err("no memory")), Err("no memory"));
    assert_eq!(desk.lent(), [(7, true)], "it comes back later");
    assert_eq!(desk.recall(7, |_| Ok::<(), ()>(())), Ok(()));
    assert_eq!(done(&desk, &member, &obey), (false, vec![]));
}

#[test]
fn in_anothers_turn_nothing_is_lent_and_nothing_comes_back() {
    let (desk, answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), lend(7, WAITS), LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(2), Action::Yield, LONG), Ok(()));
    assert!(glance(&desk, &member, &mut obey));
    desk.let_go(Ticket(1));
    assert_eq!(done(&desk, &member, &obey), (true, vec![]));
    assert_eq!(desk.ask(Ticket(3), lend(8, WAITS), LONG), Ok(()));
    assert_eq!(done(&desk, &member, &obey), (true, vec![]));
    assert_eq!(refused(answers.try_iter().last()).0, Ticket(3));
    assert_eq!(desk.ask(Ticket(4), COME_BACK, LONG), Ok(()));
    let (held, done) = done(&desk, &member, &obey);
    assert_eq!((held, done.last()), (false, Some(&back(7))));
}

#[test]
fn what_was_paused_from_outside_meanwhile_comes_back_with_its_resume_and_not_before() {
    let nothing_more = |action: &Action| match action {
        Action::Pause { .. } => Outcome::Done { report: json!(null), undo: Vec::new() },
        action => obey(action),
    };
    for over in [Some("mark"), None] {
        let (desk, _answers) = desk();
        let member = desk.join("main");
        for (ticket, mark) in [(1, 7), (2, 8)] {
            assert_eq!(desk.ask(Ticket(ticket), lend(mark, GOES_ON), LONG), Ok(()));
        }
        assert!(!glance(&desk, &member, &mut obey));
        assert_eq!(desk.ask(Ticket(3), Action::Pause { tag: over.map(str::to_owned) }, LONG), Ok(()));
        desk.let_go(Ticket(1));
        let (held, done) = done(&desk, &member, &nothing_more);
        assert!(held && !done.contains(&back(7)), "it came back over the pause: {done:?}");
        assert_eq!(desk.recall(8, |_| Err("it is paused from outside")), Ok(()));
        assert!(glance(&desk, &member, &mut |_| unreachable!("it is paused from outside")), "it was let go");
        assert_eq!(desk.ask(Ticket(4), resume(over), LONG), Ok(()));
        assert!(!glance(&desk, &member, &mut obey));
        assert!(desk.lent().is_empty() && !desk.is_wanted());
    }
}

/// What gives way by a mark of several tags.
fn lent_of(tags: &[&str]) -> Back {
    let part = |(number, tag): (usize, &&str)| Part { region: number as u32, tag: (*tag).to_owned(), pauses: 1 };
    Back::Exactly { asked: Some("m".to_owned()), parts: tags.iter().enumerate().map(part).collect() }
}

/// The tags that a recovery brings back.
fn returned(actions: &[Action]) -> Vec<String> {
    let undone = actions.iter().filter_map(|action| match action {
        Action::Recover { undo, .. } => Some(undo),
        _ => None,
    });
    let parts = undone.flatten().filter_map(|back| match back {
        Back::Exactly { parts, .. } => Some(parts),
        _ => None,
    });
    parts.flatten().map(|part| part.tag.clone()).collect()
}

#[test]
fn a_pause_from_outside_of_a_part_of_a_loan_keeps_that_part_and_no_other() {
    let tags = ["m", "m/a", "m/a/x", "m/ab", "n"];
    let obey = |action: &Action| match action {
        Action::Lend { .. } => Outcome::Done { report: json!(null), undo: vec![lent_of(&tags)] },
        // Of what is away already a pause takes nothing.
        _ => Outcome::Done { report: json!(null), undo: Vec::new() },
    };
    let is_kept = |top: &str, tag: &str| tag == top || tag.starts_with(&format!("{top}/"));
    for top in ["m", "m/a", "m/a/x", "m/ab", "n", "other"] {
        let (desk, _answers) = desk();
        let member = desk.join("main");
        assert_eq!(desk.ask(Ticket(1), lend(7, WAITS), LONG), Ok(()));
        assert_eq!(done(&desk, &member, &obey).1.len(), 1);
        assert_eq!(desk.ask(Ticket(2), pause(top), LONG), Ok(()));
        assert_eq!(returned(&done(&desk, &member, &obey).1), [""; 0]);
        desk.let_go(Ticket(1));
        let (held, actions) = done(&desk, &member, &obey);
        let (kept, free): (Vec<&str>, Vec<&str>) = tags.iter().copied().partition(|tag| is_kept(top, tag));
        assert_eq!((held, returned(&actions)), (true, free.iter().map(ToString::to_string).collect()), "{top}");
        assert_eq!(desk.lent().len(), usize::from(!kept.is_empty()), "{top}");
        let obstacle = desk.summary()["loans"][0]["obstacle"].to_string();
        assert_eq!(obstacle.contains("paused from outside"), !kept.is_empty(), "{top}: {obstacle}");
        assert_eq!(done(&desk, &member, &obey), (true, vec![]), "it is tried again without need: {top}");
        // Its resume is for everything that is left.
        assert_eq!(desk.ask(Ticket(3), resume(Some(top)), LONG), Ok(()));
        assert_eq!(done(&desk, &member, &obey), (false, vec![resume(Some(top))]));
        assert!(desk.lent().is_empty() && !desk.is_wanted(), "{top}");
    }
}

#[test]
fn a_recall_brings_back_what_is_free_and_the_rest_comes_with_its_resume() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    let tags = ["m/a", "m/b"];
    let obey = |action: &Action| match action {
        Action::Lend { .. } => Outcome::Done { report: json!(null), undo: vec![lent_of(&tags)] },
        _ => Outcome::Done { report: json!(null), undo: Vec::new() },
    };
    assert_eq!(desk.ask(Ticket(1), lend(7, GOES_ON), LONG), Ok(()));
    assert_eq!(desk.ask(Ticket(2), pause("m/a"), LONG), Ok(()));
    assert_eq!(done(&desk, &member, &obey).1.len(), 2);
    let mut seen = Vec::new();
    let bring = |back: &Back| {
        seen.push(back.clone());
        Ok::<(), ()>(())
    };
    assert_eq!(desk.recall(7, bring), Ok(()));
    // A callback of the program's about what stays away hears nothing of it.
    let part = Part { region: 1, tag: "m/b".to_owned(), pauses: 1 };
    assert_eq!(seen, [Back::Exactly { asked: Some("m/b".to_owned()), parts: vec![part] }]);
    assert_eq!(desk.lent(), [(7, true)]);
    // A resume of everything that somebody outside wanted away is one of the loan's rest, too.
    assert_eq!(desk.ask(Ticket(3), resume(None), LONG), Ok(()));
    let (held, actions) = done(&desk, &member, &obey);
    let left = Back::Exactly {
        asked: Some("m".to_owned()),
        parts: vec![Part { region: 0, tag: "m/a".to_owned(), pauses: 1 }],
    };
    assert_eq!((held, actions), (false, vec![Action::Undo { back: left, wait: NOW }]));
    assert!(desk.lent().is_empty() && !desk.is_wanted());
}

#[test]
fn a_recall_lets_nobody_go_who_is_paused_from_outside() {
    let (desk, _answers) = desk();
    let member = desk.join("main");
    assert_eq!(desk.ask(Ticket(1), lend(7, GOES_ON), LONG), Ok(()));
    assert!(!glance(&desk, &member, &mut obey));
    // All of it was paused by the program before: there is nothing to undo, and a program to stop.
    assert_eq!(desk.ask(Ticket(2), pause("other"), LONG), Ok(()));
    let nothing = |_: &Action| Outcome::Done { report: json!(null), undo: Vec::new() };
    assert!(glance(&desk, &member, &mut { nothing }));
    assert_eq!(desk.recall(7, |_| Ok::<(), ()>(())), Ok(()));
    assert!(desk.lent().is_empty());
    assert!(glance(&desk, &member, &mut obey), "it was let go");
    assert_eq!(desk.summary()["paused"], json!(["other"]));
}
