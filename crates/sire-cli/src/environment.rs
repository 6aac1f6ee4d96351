//! Changes to a process environment: collected first, then applied to a child or printed as shell lines.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::process::Command;

/// Variables to set, in the order in which they were decided.
#[derive(Debug, Default)]
pub struct Changes {
    set: Vec<(String, Change)>,
}

#[derive(Debug, Clone)]
enum Change {
    /// The whole value.
    Value(OsString),
    /// Entries before whatever a colon-separated list holds.
    Before(OsString),
}

impl Changes {
    /// Sets a variable, whatever it was.
    pub fn set(&mut self, name: &str, value: impl Into<OsString>) {
        self.put(name, Change::Value(value.into()));
    }

    /// Sets a variable unless the person has set it already.
    pub fn set_default(&mut self, name: &str, value: impl Into<OsString>) {
        if self.value(name).is_none() {
            self.set(name, value);
        }
    }

    /// Puts `entry` first in a list that is separated by colons.
    pub fn prepend(&mut self, name: &str, entry: impl AsRef<OsStr>) {
        let entry = entry.as_ref();
        let change = match self.change(name) {
            Some(Change::Value(old)) => Change::Value(joined(entry, old)),
            Some(Change::Before(old)) => Change::Before(joined(entry, old)),
            None => Change::Before(entry.to_os_string()),
        };
        self.put(name, change);
    }

    /// What the program will see: the change, else this process's own value.
    pub fn value(&self, name: &str) -> Option<OsString> {
        let own = std::env::var_os(name);
        match self.change(name) {
            None => own,
            Some(Change::Value(value)) => Some(value.clone()),
            Some(Change::Before(entries)) => Some(joined(entries, &own.unwrap_or_default())),
        }
    }

    /// Applies the changes to a child.
    pub fn apply(&self, child: &mut Command) {
        for (name, _) in &self.set {
            if let Some(value) = self.value(name) {
                child.env(name, value);
            }
        }
    }

    /// Lines that any POSIX shell can evaluate, here or on another machine: lists keep what they hold there.
    pub fn shell_lines(&self) -> Vec<String> {
        let line = |(name, change): &(String, Change)| match change {
            Change::Value(value) => format!("export {name}={}", quoted(&value.to_string_lossy())),
            Change::Before(entries) => {
                format!("export {name}={}\"${{{name}:+:${name}}}\"", quoted(&entries.to_string_lossy()))
            }
        };
        self.set.iter().map(line).collect()
    }

    fn change(&self, name: &str) -> Option<&Change> {
        self.set.iter().find(|(known, _)| known == name).map(|(_, change)| change)
    }

    fn put(&mut self, name: &str, change: Change) {
        self.set.retain(|(known, _)| known != name);
        self.set.push((name.to_owned(), change));
    }
}

/// Both lists, `first` before `rest`, each entry once and no empty ones: an empty entry means the working directory.
fn joined(first: &OsStr, rest: &OsStr) -> OsString {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in [first, rest].into_iter().flat_map(|list| list.as_bytes().split(|byte| *byte == b':')) {
        if !part.is_empty() && !parts.contains(&part) {
            parts.push(part);
        }
    }
    OsString::from_vec(parts.join(&b':'))
}

/// `text` as one word of a POSIX shell.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_word_survives_quotes() {
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
    }

    #[test]
    fn prepending_twice_keeps_one_entry() {
        let mut changes = Changes::default();
        changes.set("SIRE_TEST_LIST", "/b:/a");
        changes.prepend("SIRE_TEST_LIST", "/a");
        changes.prepend("SIRE_TEST_LIST", "/a");
        assert_eq!(changes.value("SIRE_TEST_LIST"), Some("/a:/b".into()));
    }

    #[test]
    fn a_default_yields_to_what_is_set() {
        let mut changes = Changes::default();
        changes.set("SIRE_TEST_DEFAULT", "mine");
        changes.set_default("SIRE_TEST_DEFAULT", "theirs");
        assert_eq!(changes.shell_lines(), ["export SIRE_TEST_DEFAULT='mine'"]);
    }

    #[test]
    fn a_list_keeps_what_the_shell_has() {
        let mut changes = Changes::default();
        changes.prepend("SIRE_TEST_PATHS", "/x y");
        let line = r#"export SIRE_TEST_PATHS='/x y'"${SIRE_TEST_PATHS:+:$SIRE_TEST_PATHS}""#;
        assert_eq!(changes.shell_lines(), [line]);
    }
}
