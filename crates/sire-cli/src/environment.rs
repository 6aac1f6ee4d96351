//! Changes to a process environment: collected first, then applied to a child or printed as shell lines.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::process::Command;

/// Variables to set, in the order in which they were decided.
#[derive(Debug, Default)]
pub struct Changes {
    set: Vec<(String, OsString)>,
}

impl Changes {
    /// Sets a variable, whatever it was.
    pub fn set(&mut self, name: &str, value: impl Into<OsString>) {
        self.set.retain(|(known, _)| known != name);
        self.set.push((name.to_owned(), value.into()));
    }

    /// Sets a variable unless the person has set it already.
    pub fn set_default(&mut self, name: &str, value: impl Into<OsString>) {
        if self.value(name).is_none() {
            self.set(name, value);
        }
    }

    /// Puts `entry` first in a list that is separated by colons, once.
    pub fn prepend(&mut self, name: &str, entry: impl AsRef<OsStr>) {
        let entry = entry.as_ref();
        let old = self.value(name).unwrap_or_default();
        let mut new = entry.to_os_string();
        for part in old.as_bytes().split(|byte| *byte == b':') {
            if !part.is_empty() && part != entry.as_bytes() {
                new.push(":");
                new.push(OsStr::from_bytes(part));
            }
        }
        self.set(name, new);
    }

    /// What the program will see: the change, else this process's own value.
    pub fn value(&self, name: &str) -> Option<OsString> {
        self.set.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()).or_else(|| std::env::var_os(name))
    }

    /// Applies the changes to a child.
    pub fn apply(&self, child: &mut Command) {
        child.envs(self.set.iter().map(|(name, value)| (name, value)));
    }

    /// `export NAME='value'` lines that any POSIX shell can evaluate.
    pub fn shell_lines(&self) -> Vec<String> {
        self.set.iter().map(|(name, value)| format!("export {name}={}", quoted(&value.to_string_lossy()))).collect()
    }
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
}
