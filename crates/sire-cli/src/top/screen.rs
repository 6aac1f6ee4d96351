//! What is on the screen: lines made for the width there is, from the last two looks. A process is chosen, and shown in detail.

use std::collections::BTreeMap;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style, Stylize as _};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use sire_control::place::Name;

use super::slices;
use crate::control::view::{Gpu, Process, Region, View, short_uuid, size};

/// Narrower screens, such as a phone's, leave columns out.
pub(super) const WIDE: usize = 64;

/// The screen's state.
#[derive(Debug, Default)]
pub struct Screen {
    view: View,
    /// Bytes copied per second, by process.
    rates: BTreeMap<Name, f64>,
    name: Option<Name>,
    tag: Option<String>,
    said: String,
    /// Whether any look has worked.
    has_seen: bool,
    /// Why the last one has not.
    trouble: Option<String>,
}

impl Screen {
    /// A new look.
    pub fn see(&mut self, view: View) {
        self.rates = rates(&self.view, &view);
        self.view = view;
        (self.has_seen, self.trouble) = (true, None);
        if self.process().is_none() {
            self.name = self.view.processes.first().map(|process| process.name);
            self.tag = None;
        }
    }

    /// A look that failed: what was seen last stays, and the next one may do better.
    pub fn see_nothing(&mut self, why: String) {
        self.trouble = Some(why);
    }

    /// Whether there is anything to show.
    pub fn has_seen(&self) -> bool {
        self.has_seen
    }

    /// A sentence for the last line.
    pub fn say(&mut self, text: String) {
        self.said = text;
    }

    /// The process that is chosen, and a tag of it.
    pub fn chosen(&self) -> Option<(Name, Option<String>)> {
        self.name.map(|name| (name, self.tag.clone()))
    }

    fn process(&self) -> Option<&Process> {
        self.view.processes.iter().find(|process| Some(process.name) == self.name)
    }

    /// The next process, or the one before.
    pub fn choose(&mut self, step: isize) {
        let names: Vec<Name> = self.view.processes.iter().map(|process| process.name).collect();
        let at = names.iter().position(|name| Some(*name) == self.name).unwrap_or(0);
        let next = at.saturating_add_signed(step).min(names.len().saturating_sub(1));
        if names.get(next).copied() != self.name {
            self.tag = None;
        }
        self.name = names.get(next).copied();
    }

    /// The next tag of the process, or the one before; before the first one is the process itself.
    pub fn choose_tag(&mut self, step: isize) {
        let tags: Vec<String> = self.process().map(tags).unwrap_or_default();
        let at = tags.iter().position(|tag| Some(tag) == self.tag.as_ref()).map_or(0, |at| at + 1);
        let next = at.saturating_add_signed(step).min(tags.len());
        self.tag = next.checked_sub(1).and_then(|at| tags.get(at).cloned());
    }

    /// Draws it.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let width = usize::from(frame.area().width);
        let [body, foot] = Layout::vertical([Constraint::Min(0), Constraint::Length(2)]).areas(frame.area());
        frame.render_widget(Paragraph::new(self.lines(width)), body);
        let keys = if width < WIDE {
            "↑↓←→ p r e q"
        } else {
            "↑↓ process  ←→ tag  p pause  r resume  e evict  q quit"
        };
        let foot_lines = vec![Line::from(cut(&self.said, width)), Line::from(keys).style(Style::new().dim())];
        frame.render_widget(Paragraph::new(foot_lines), foot);
    }

    fn lines(&self, width: usize) -> Vec<Line<'static>> {
        let mut lines = vec![title(&self.view)];
        let trouble = self.trouble.as_ref().map(|why| Line::from(cut(&format!("nothing new is seen: {why}"), width)));
        lines.extend(trouble.map(|line| line.style(Style::new().fg(Color::Red))));
        lines.extend(self.view.devices.iter().map(|gpu| device(gpu, width)));
        lines.push(heading(&process_columns(width)));
        lines.extend(self.view.processes.iter().map(|process| self.process_line(process, width)));
        if self.view.processes.is_empty() {
            lines.push(Line::from("nobody can be asked: SIRE_CONTROL=1"));
        }
        lines.extend(slices::of_devices(&self.view.processes, width));
        if let Some(process) = self.process() {
            lines.extend(self.detail(process, width));
        }
        lines
    }

    fn process_line(&self, process: &Process, width: usize) -> Line<'static> {
        let (device, away) = (size(process.resident()), size(process.away()));
        let mut text = format!("{:>8} {:<8}{device:>9}{away:>9}", process.name, process.state());
        if width >= WIDE {
            let rate = self.rates.get(&process.name).copied().unwrap_or(0.0);
            let said = process.silence.as_deref().unwrap_or(&process.command);
            text += &format!("{:>9}{:>11}  {said}", size(process.backups()), format!("{}/s", size(rate as u64)));
        }
        let is_chosen = Some(process.name) == self.name && self.tag.is_none();
        Line::from(cut(&text, width)).style(emphasis(is_chosen, process.state()))
    }

    fn detail(&self, process: &Process, width: usize) -> Vec<Line<'static>> {
        let mut lines = vec![Line::default(), Line::from(cut(&process.command, width)).bold()];
        lines.push(heading(&tag_columns(width)));
        lines.extend(process.stats.regions.iter().map(|region| self.tag_line(region, width)));
        let models = process.models();
        if !models.is_empty() {
            lines.push(heading("MODELS"));
            lines.extend(models.iter().map(|(name, loaded, bytes, uses)| {
                let state = if *loaded { "loaded" } else { "offloaded" };
                Line::from(cut(&format!("{state:<9} {:>8} {uses} uses {name}", size(*bytes)), width))
            }));
        }
        lines.extend(slices::of_models(&process.units(), width));
        let tiers: Vec<String> =
            process.stats.tiers.iter().map(|tier| format!("{} {}", tier.tier, size(tier.used_bytes))).collect();
        lines.push(labelled("tiers", &tiers.join("  "), width));
        lines.push(labelled("safe points", &safe_points(process), width));
        lines.push(heading("EVENTS"));
        lines.extend(events(process).into_iter().map(|text| Line::from(cut(&text, width))));
        lines
    }

    fn tag_line(&self, region: &Region, width: usize) -> Line<'static> {
        let (device, backup) = (size(region.resident_bytes), size(region.backup_bytes));
        let text = if width < WIDE {
            format!("{:<8}{device:>9}  {}", region.state, region.tag)
        } else {
            let away = size(region.paused_bytes);
            let counts = format!("{}/{}", region.pauses, region.resumes);
            format!(
                "{:<8}{device:>9}{away:>9}{backup:>9} {:<5}{counts:>8}  {}",
                region.state, region.backup, region.tag
            )
        };
        let is_chosen = self.tag.as_ref() == Some(&region.tag);
        Line::from(cut(&text, width)).style(emphasis(is_chosen, &region.state))
    }
}

fn process_columns(width: usize) -> String {
    let narrow = format!("{:>8} {:<8}{:>9}{:>9}", "PID", "STATE", "DEVICE", "AWAY");
    if width < WIDE { narrow } else { format!("{narrow}{:>9}{:>11}  COMMAND", "BACKUPS", "COPIED") }
}

fn tag_columns(width: usize) -> String {
    if width < WIDE {
        return format!("{:<8}{:>9}  TAG", "STATE", "DEVICE");
    }
    format!("{:<8}{:>9}{:>9}{:>9} {:<5}{:>8}  TAG", "STATE", "DEVICE", "AWAY", "BACKUP", "IN", "P/R")
}

fn title(view: &View) -> Line<'static> {
    let seconds = view.time as u64 % 86400;
    let clock = format!("{:02}:{:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60, seconds % 60);
    let count = view.processes.len();
    let noun = if count == 1 { "process" } else { "processes" };
    Line::from(vec![Span::from("sire top").bold(), Span::from(format!("  {count} {noun}  {clock}"))])
}

/// What Sire holds, what others hold, what is free.
fn device(gpu: &Gpu, width: usize) -> Line<'static> {
    let used = gpu.total_bytes.saturating_sub(gpu.free_bytes);
    let figures = format!(" {} of {}", size(used), size(gpu.total_bytes));
    let name = format!("{:<9}", short_uuid(&gpu.uuid));
    let room = width.saturating_sub(name.len() + figures.len() + 2).min(60);
    let cells = |bytes: u64| (u128::from(bytes) * room as u128 / u128::from(gpu.total_bytes.max(1))) as usize;
    let ours = cells(gpu.sire_bytes).min(room);
    let all = cells(used).clamp(ours, room);
    Line::from(vec![
        Span::from(name).bold(),
        Span::from("["),
        Span::from("#".repeat(ours)).fg(Color::Blue),
        Span::from("+".repeat(all - ours)).fg(Color::DarkGray),
        Span::from(".".repeat(room - all)).dim(),
        Span::from("]"),
        Span::from(figures),
    ])
}

pub(super) fn heading(text: &str) -> Line<'static> {
    Line::from(text.to_owned()).style(Style::new().add_modifier(Modifier::UNDERLINED))
}

fn labelled(label: &str, text: &str, width: usize) -> Line<'static> {
    let text = cut(text, width.saturating_sub(label.len() + 1));
    Line::from(vec![Span::from(format!("{label} ")).dim(), Span::from(text)])
}

pub(super) fn emphasis(is_chosen: bool, state: &str) -> Style {
    let colour = match state {
        "paused" | "held" => Style::new().fg(Color::Yellow),
        "silent" => Style::new().fg(Color::Red),
        _ => Style::new(),
    };
    if is_chosen { colour.add_modifier(Modifier::REVERSED) } else { colour }
}

fn tags(process: &Process) -> Vec<String> {
    let mut tags: Vec<String> = process.stats.regions.iter().map(|region| region.tag.clone()).collect();
    tags.sort();
    tags.dedup();
    tags
}

fn safe_points(process: &Process) -> String {
    let point = |point: &crate::control::view::SafePoint| match point.waiting {
        true => format!("{} waits", point.thread),
        false => format!("{} {:.1} s ago", point.thread, point.seconds_ago),
    };
    let points: Vec<String> = process.control.safe_points.iter().map(point).collect();
    if points.is_empty() { "none passed".to_owned() } else { points.join(", ") }
}

/// The newest first.
fn events(process: &Process) -> Vec<String> {
    let of_models = process.program["events"].as_array().map(Vec::as_slice).unwrap_or_default();
    let of_models = of_models.iter().map(|event| {
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        (event["time"].as_f64().unwrap_or(0.0), format!("{} {} {}", text("kind"), text("name"), text("detail")))
    });
    let own = process.journal.iter().map(|event| (event.time, format!("{} {}", event.what, event.text)));
    let mut all: Vec<(f64, String)> = of_models.chain(own).collect();
    all.sort_by(|one, other| other.0.total_cmp(&one.0));
    let clock = |time: f64| {
        let seconds = time as u64 % 86400;
        format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
    };
    all.into_iter().map(|(time, text)| format!("{} {text}", clock(time))).collect()
}

/// Bytes copied per second between two looks.
fn rates(before: &View, now: &View) -> BTreeMap<Name, f64> {
    let seconds = now.time - before.time;
    let known: BTreeMap<Name, u64> = before.processes.iter().map(|process| (process.name, process.copied())).collect();
    let rate = |process: &Process| {
        let more = process.copied().saturating_sub(*known.get(&process.name)?);
        Some((process.name, if seconds > 0.0 { more as f64 / seconds } else { 0.0 }))
    };
    now.processes.iter().filter_map(rate).collect()
}

/// As much as fits; control characters, which a tag may hold, could do anything to a terminal.
pub(super) fn cut(text: &str, width: usize) -> String {
    let clean: Vec<char> = text.chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect();
    if clean.len() <= width {
        return clean.into_iter().collect();
    }
    clean.into_iter().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::{Screen, rates};
    use crate::control::view::{Process, Region, View};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use sire_control::place::Name;

    fn screen() -> Screen {
        let region = |tag: &str| Region { tag: tag.to_owned(), state: "resident".to_owned(), ..Region::default() };
        let process = |pid: u32, tags: &[&str]| {
            let name = who(pid);
            let mut process = Process { pid, name, command: format!("python {pid}.py"), ..Process::default() };
            process.stats.regions = tags.iter().map(|tag| region(tag)).collect();
            process
        };
        let mut screen = Screen::default();
        screen.see(View {
            processes: vec![process(11, &["a", "b"]), process(22, &["evil\u{1b}[2J"])],
            ..View::default()
        });
        screen
    }

    fn who(pid: u32) -> Name {
        Name { pid, namesake: 0 }
    }

    fn shown(screen: &Screen, width: u16) -> String {
        let Ok(mut terminal) = Terminal::new(TestBackend::new(width, 24));
        let Ok(_) = terminal.draw(|frame| screen.draw(frame));
        terminal.backend().buffer().content().iter().map(|cell| cell.symbol().to_owned()).collect()
    }

    #[test]
    fn keys_walk_through_processes_and_tags_and_stop_at_the_ends() {
        let mut screen = screen();
        assert_eq!(screen.chosen(), Some((who(11), None)));
        screen.choose_tag(1);
        screen.choose_tag(1);
        screen.choose_tag(1);
        assert_eq!(screen.chosen(), Some((who(11), Some("b".to_owned()))));
        screen.choose_tag(-1);
        screen.choose_tag(-1);
        assert_eq!(screen.chosen(), Some((who(11), None)));
        screen.choose(5);
        assert_eq!(screen.chosen(), Some((who(22), None)));
        screen.choose(-9);
        assert_eq!(screen.chosen(), Some((who(11), None)));
        screen.see(View::default());
        assert_eq!(screen.chosen(), None);
    }

    #[test]
    fn every_width_shows_the_state_and_no_tag_reaches_the_terminal_raw() {
        let mut screen = screen();
        screen.choose(1);
        for width in [1, 20, 40, 80, 200] {
            let text = shown(&screen, width);
            assert!(!text.contains('\u{1b}'), "width {width}");
            assert!(width < 40 || (text.contains("running") && text.contains("evil?[2J")), "width {width}: {text}");
        }
    }

    /// A look at this moment, with what each process has copied since its start, in two regions.
    fn look(time: f64, copied: &[(u32, u64)]) -> View {
        let region = |bytes_copied| Region { bytes_copied, ..Region::default() };
        let process = |&(pid, bytes): &(u32, u64)| {
            let mut process = Process { pid, name: who(pid), ..Process::default() };
            process.stats.regions = vec![region(bytes / 4), region(bytes - bytes / 4)];
            process
        };
        View { time, processes: copied.iter().map(process).collect(), ..View::default() }
    }

    #[test]
    fn a_rate_is_what_was_copied_since_the_look_before_by_the_seconds_between() {
        let before = look(100.0, &[(11, 1000), (22, 700), (33, 5)]);
        // 22 is another process of the same number; 33 has ended, and 44 has begun.
        let now = look(102.5, &[(11, 6000), (22, 200), (44, 900)]);
        assert_eq!(Vec::from_iter(rates(&before, &now)), [(who(11), 2000.0), (who(22), 0.0)]);
        // The clock may be set back.
        let earlier = look(99.0, &[(11, 6000)]);
        assert_eq!(Vec::from_iter(rates(&before, &earlier)), [(who(11), 0.0)]);
        assert_eq!(rates(&before, &look(100.0, &[(11, 6000)]))[&who(11)], 0.0);
    }

    #[test]
    fn the_screen_shows_the_rate_of_the_last_two_looks() {
        let mut screen = Screen::default();
        screen.see(look(1.0, &[(11, 0)]));
        assert!(shown(&screen, 80).contains(" 0 B/s "), "{}", shown(&screen, 80));
        screen.see(look(3.0, &[(11, 64 << 20)]));
        assert!(shown(&screen, 80).contains(" 32.0 MiB/s "), "{}", shown(&screen, 80));
        screen.see(look(4.0, &[(11, 64 << 20)]));
        assert!(shown(&screen, 80).contains(" 0 B/s "), "{}", shown(&screen, 80));
    }
}
