//! The lines of the screen about slices of both kinds: turns on a device that processes take, and slices of models that are on the device by turns.

use ratatui::text::Line;
use sire_control::place::Name;

use super::screen::{WIDE, cut, emphasis, heading};
use crate::control::view::{Process, TimeSlice, Unit, short_uuid, size, turns};

/// Per device and group: who has the turn, who waits, and for how long.
pub fn of_devices(processes: &[Process], width: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    for ((gpu, group), members) in turns(processes) {
        lines.push(heading(&cut(&turn_columns(gpu, group, width), width)));
        for (name, turn) in members {
            lines.push(Line::from(cut(&turn_line(name, turn, width), width)).style(emphasis(false, &turn.state)));
            let error = turn.last_error.iter().map(|error| Line::from(cut(&format!("{:>8} {error}", ""), width)));
            lines.extend(error);
        }
    }
    lines
}

fn turn_columns(gpu: &str, group: &str, width: usize) -> String {
    let narrow = format!("{:>8} {:<9}{:>9}{:>9}", "PID", "STATE", "RESIDENT", "WAITED");
    if width < WIDE {
        return narrow;
    }
    format!("{narrow}{:>7}{:>9}{:>9}  {} {group}", "TURNS", "LASTING", "SWITCH", short_uuid(gpu))
}

fn turn_line(name: Name, turn: &TimeSlice, width: usize) -> String {
    let seconds = |seconds: f64| format!("{seconds:.1} s");
    let (resident, waited) = (seconds(turn.resident_seconds), seconds(turn.waited_seconds));
    let narrow = format!("{name:>8} {:<9}{resident:>9}{waited:>9}", turn.state);
    if width < WIDE {
        return narrow;
    }
    let (lasting, switch) = (seconds(turn.residency_seconds), seconds(turn.switch_seconds));
    format!("{narrow}{:>7}{lasting:>9}{switch:>9}", turn.turns)
}

/// Of one process: the slices of its models, and where each is.
pub fn of_models(units: &[Unit], width: usize) -> Vec<Line<'static>> {
    if units.is_empty() {
        return Vec::new();
    }
    let line =
        |tier: &str, bytes: &str, uses: &str, name: &str| cut(&format!("{tier:<9}{bytes:>9}{uses:>7}  {name}"), width);
    let of_unit = |unit: &Unit| {
        let (bytes, uses) = (size(unit.bytes), unit.uses.to_string());
        Line::from(line(&unit.tier, &bytes, &uses, &format!("{}: {}", unit.of, unit.name)))
    };
    let titles = heading(&line("SLICE IN", "SIZE", "USES", "NAME"));
    std::iter::once(titles).chain(units.iter().map(of_unit)).collect()
}

#[cfg(test)]
mod tests {
    use super::{of_devices, of_models};
    use crate::control::view::{Process, TimeSlice, Unit};
    use ratatui::text::Line;
    use sire_control::place::Name;

    fn texts(lines: &[Line<'_>]) -> Vec<String> {
        lines.iter().map(Line::to_string).collect()
    }

    fn process(pid: u32, state: &str, group: &str) -> Process {
        let mut process = Process { name: Name { pid, namesake: 0 }, ..Process::default() };
        process.stats.time_slice = Some(TimeSlice {
            gpu: "GPU-0123-89abcdef".to_owned(),
            group: group.to_owned(),
            state: state.to_owned(),
            resident_seconds: 12.34,
            turns: 3,
            ..TimeSlice::default()
        });
        process
    }

    #[test]
    fn those_that_share_a_device_stand_together() {
        let mut all = vec![process(11, "resident", ""), process(12, "waiting", "night"), process(13, "waiting", "")];
        all.push(Process { name: Name { pid: 14, namesake: 0 }, ..Process::default() });
        let lines = texts(&of_devices(&all, 80));
        assert_eq!(lines.len(), 5, "{lines:?}");
        assert!(lines[0].contains("RESIDENT") && lines[0].contains("89abcdef"), "{lines:?}");
        assert!(lines[1].contains("11 resident") && lines[1].contains("12.3 s"), "{lines:?}");
        assert!(lines[2].contains("13 waiting"), "{lines:?}");
        assert!(lines[3].contains("89abcdef night") && lines[4].contains("12 waiting"), "{lines:?}");
        for width in [10, 40, 80] {
            assert!(texts(&of_devices(&all, width)).iter().all(|line| line.chars().count() <= width));
        }
        assert!(of_devices(&all[3..], 80).is_empty());
    }

    #[test]
    fn each_slice_says_where_it_is() {
        let unit = |name: &str, tier: &str| Unit {
            of: "slyce 1".to_owned(),
            name: name.to_owned(),
            tier: tier.to_owned(),
            bytes: 3 << 20,
            uses: 7,
        };
        let lines = texts(&of_models(&[unit("encoder", "gpu"), unit("evil\u{1b}[2J", "not made")], 80));
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("gpu        3.0 MiB      7  slyce 1: encoder"), "{lines:?}");
        assert!(lines[2].starts_with("not made ") && lines[2].ends_with("evil?[2J"), "{lines:?}");
        assert!(of_models(&[], 80).is_empty());
    }
}
