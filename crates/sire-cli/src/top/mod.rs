//! `sire top`: everything on the whole screen, live. A thread looks at the processes, this one draws and listens to keys, so that a process
//! that does not answer holds up no key.

mod screen;
mod slices;

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use sire_control::message::Verb;
use sire_control::place::Place;

use crate::arguments::TopOptions;
use crate::control::view::View;
use crate::control::{act, place};
use crate::failure::Failure;
use crate::output;
use screen::Screen;

/// How long a process may take to answer a look.
const PATIENCE: Duration = Duration::from_secs(2);
/// Seconds that a pause or resume waits for a safe point.
const TIMEOUT: f64 = 10.0;

/// What the drawing thread hears.
enum News {
    Seen(Result<View, Failure>),
    Said(String),
}

/// `sire top`.
pub fn top(options: &TopOptions) -> Result<ExitCode, Failure> {
    let (place, interval) = (place()?, Duration::from_secs_f64(options.interval));
    if options.json {
        return lines_of_json(&place, interval, options.looks);
    }
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return Err(Failure::usage("sire top draws on a terminal, and this is none")
            .advice("sire top --json writes a line for each look; sire ps writes a table."));
    }
    let (sender, news) = channel();
    let watcher = sender.clone();
    let looks = options.looks.unwrap_or(u64::MAX);
    std::thread::spawn(move || watch(&place, interval, looks, &watcher));
    let mut terminal =
        ratatui::try_init().map_err(|error| Failure::new(format!("the terminal cannot be used: {error}")))?;
    let outcome = run(&mut terminal, &news, &sender, looks);
    ratatui::restore();
    outcome.map(|()| ExitCode::SUCCESS)
}

fn lines_of_json(place: &Place, interval: Duration, looks: Option<u64>) -> Result<ExitCode, Failure> {
    let (mut look, mut worked, mut said) = (0, false, None);
    loop {
        let began = Instant::now();
        match View::look(place, PATIENCE) {
            Ok(view) => {
                output::line(&serde_json::to_string(&view).unwrap_or_default());
                (worked, said) = (true, None);
            }
            Err(failure) if worked => say_once(&mut said, in_short(&failure)),
            Err(failure) => return Err(failure),
        }
        look += 1;
        if looks.is_some_and(|looks| look >= looks) {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(interval.saturating_sub(began.elapsed()));
    }
}

fn say_once(said: &mut Option<String>, why: String) {
    if said.as_ref() != Some(&why) {
        output::progress(&format!("nothing new is seen: {why}"));
        *said = Some(why);
    }
}

/// Without advice.
fn in_short(failure: &Failure) -> String {
    failure.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Ends when nobody listens any more.
fn watch(place: &Place, interval: Duration, looks: u64, news: &Sender<News>) {
    for _ in 0..looks {
        let began = Instant::now();
        if news.send(News::Seen(View::look(place, PATIENCE))).is_err() {
            return;
        }
        std::thread::sleep(interval.saturating_sub(began.elapsed()));
    }
}

fn run(
    terminal: &mut DefaultTerminal,
    news: &Receiver<News>,
    sender: &Sender<News>,
    looks: u64,
) -> Result<(), Failure> {
    let broken = |error: std::io::Error| Failure::new(format!("the terminal cannot be used: {error}"));
    let (mut screen, mut seen) = (Screen::default(), 0);
    loop {
        for each in news.try_iter() {
            match each {
                News::Seen(Err(failure)) if !screen.has_seen() => return Err(failure),
                News::Seen(look) => {
                    match look {
                        Ok(view) => screen.see(view),
                        Err(failure) => screen.see_nothing(in_short(&failure)),
                    }
                    seen += 1;
                }
                News::Said(text) => screen.say(text),
            }
        }
        terminal.draw(|frame| screen.draw(frame)).map_err(broken)?;
        if seen >= looks {
            return Ok(());
        }
        if event::poll(Duration::from_millis(100)).map_err(broken)?
            && let Event::Key(key) = event::read().map_err(broken)?
            && key.kind != KeyEventKind::Release
            && !obey(key, &mut screen, sender)
        {
            return Ok(());
        }
    }
}

/// False: end.
fn obey(key: KeyEvent, screen: &mut Screen, news: &Sender<News>) -> bool {
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
        KeyCode::Up | KeyCode::Char('k') => screen.choose(-1),
        KeyCode::Down | KeyCode::Char('j') => screen.choose(1),
        KeyCode::Left | KeyCode::Char('h') => screen.choose_tag(-1),
        KeyCode::Right | KeyCode::Char('l') => screen.choose_tag(1),
        KeyCode::Char('p') => ask(screen, news, "pause", |tag| Verb::Pause { tag, timeout: TIMEOUT }),
        KeyCode::Char('r') => ask(screen, news, "resume", |tag| Verb::Resume { tag, timeout: TIMEOUT, wait: 0.0 }),
        KeyCode::Char('e') => ask(screen, news, "evict", |_| Verb::Evict { device: None, bytes: None }),
        _ => {}
    }
    true
}

/// In a thread of its own, whose end is told.
fn ask(screen: &mut Screen, news: &Sender<News>, what: &'static str, verb: impl FnOnce(Option<String>) -> Verb) {
    let Some((name, tag)) = screen.chosen() else { return };
    let whom = tag.as_deref().map_or_else(|| name.to_string(), |tag| format!("{name} {tag}"));
    screen.say(format!("{what} {whom} …"));
    let (verb, news) = (verb(tag), news.clone());
    std::thread::spawn(move || {
        let said = match act::ask(name.into(), verb, TIMEOUT) {
            Ok(_) => format!("{what} {whom}: done"),
            Err(failure) => in_short(&failure),
        };
        // The screen may be gone.
        let _ = news.send(News::Said(said));
    });
}
