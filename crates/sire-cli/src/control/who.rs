//! Which process somebody means: by its number, or by the name that tells it from others of that number in containers that share the directory.

use serde::{Deserialize, Deserializer, de::Error as _};
use sire_control::place::Name;
use std::fmt;
use std::str::FromStr;

/// `41873`: the process with this number; `41873-1`: of several, that one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Who {
    /// Its number, as it counts itself.
    pub pid: u32,
    /// Which one; None: there is but one.
    namesake: Option<u32>,
}

impl Who {
    /// Whether it may be that one.
    pub fn means(self, name: Name) -> bool {
        self.pid == name.pid && self.namesake.is_none_or(|namesake| namesake == name.namesake)
    }
}

impl From<Name> for Who {
    fn from(name: Name) -> Who {
        Who { pid: name.pid, namesake: Some(name.namesake) }
    }
}

impl FromStr for Who {
    type Err = String;

    fn from_str(text: &str) -> Result<Who, String> {
        let wrong = || format!("'{text}' is no process: write its number, as sire ps shows it (41873, or 41873-1)");
        let (pid, namesake) = match text.split_once('-') {
            Some((pid, namesake)) => (pid, Some(namesake.parse().map_err(|_| wrong())?)),
            None => (text, None),
        };
        Ok(Who { pid: pid.parse().map_err(|_| wrong())?, namesake })
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namesake {
            None | Some(0) => write!(f, "{}", self.pid),
            Some(namesake) => write!(f, "{}-{namesake}", self.pid),
        }
    }
}

/// A number, or a text as on the command line.
impl<'de> Deserialize<'de> for Who {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Who, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u32),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(pid) => Ok(Who { pid, namesake: None }),
            Written::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Name, Who};

    #[test]
    fn a_number_means_all_that_have_it_and_a_name_means_one() {
        let means = |text: &str, namesake| text.parse().map(|who: Who| who.means(Name { pid: 7, namesake }));
        assert_eq!(
            [means("7", 0), means("7", 3), means("7-3", 3), means("7-3", 0)],
            [Ok(true), Ok(true), Ok(true), Ok(false)]
        );
        assert_eq!([means("7-0", 0), means("7-0", 3), means("8", 0)], [Ok(true), Ok(false), Ok(false)]);
        assert!(["", "-", "7-", "-7", "x", "7-x", "7-1-2"].iter().all(|text| text.parse::<Who>().is_err()));
        for (json, text) in [("7", "7"), ("\"7\"", "7"), ("\"7-2\"", "7-2"), ("\"7-0\"", "7")] {
            let who: Result<Who, _> = serde_json::from_str(json);
            assert!(who.is_ok_and(|who| who.to_string() == text), "{json}");
        }
        assert!(["-1", "1.5", "null", "{}", "\"x\""].iter().all(|json| serde_json::from_str::<Who>(json).is_err()));
    }
}
