//! What a pause has taken, for the resume that undoes it: exactly that, and nothing that the program had paused itself.

use super::is_under;

/// A region that a pause has taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// The engine's number of it.
    pub region: u32,
    /// Its tag.
    pub tag: String,
    /// How often it had been paused then: if it is more often now, it is away for another reason.
    pub pauses: u64,
}

/// What a resume brings back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Back {
    /// Everything.
    Everything,
    /// A tag and what is under it, as somebody asked for.
    Under(String),
    /// These regions.
    Exactly {
        /// What was asked for when they were paused (None: everything): what the program hears of.
        asked: Option<String>,
        /// Which ones.
        parts: Vec<Part>,
    },
}

/// What a pause has taken, in the order in which it comes back.
pub type Undo = Vec<Back>;

impl Back {
    /// Without what lies under `top`; whether anything is left.
    pub(super) fn leave_out(&mut self, top: &str) -> bool {
        match self {
            Back::Everything => true,
            Back::Under(tag) => !is_under(Some(tag), top),
            Back::Exactly { parts, .. } => {
                parts.retain(|part| !is_under(Some(&part.tag), top));
                !parts.is_empty()
            }
        }
    }

    /// The tag of which the program hears; None: everything.
    #[must_use]
    pub fn asked(&self) -> Option<&str> {
        match self {
            Back::Everything => None,
            Back::Under(tag) => Some(tag),
            Back::Exactly { asked, .. } => asked.as_deref(),
        }
    }
}
