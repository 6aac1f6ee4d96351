//! All regions: by number, by tag and policy, and which of them a tag means.

use super::Region;
use crate::error::{Error, Result, Status};
use crate::sync::{AtomicBool, Mutex, Ordering, RwLock, lock};
use crate::terms::{Backup, Policy, RegionId, Selection};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError};

/// The longest tag, in bytes.
const LONGEST_TAG: usize = 255;

/// All regions. They are never removed.
#[derive(Debug, Default)]
pub(crate) struct Regions {
    all: RwLock<Vec<Arc<Region>>>,
    ids: Mutex<HashMap<(String, Policy), RegionId>>,
    /// Regions by tag, in the order of tags: what lies under a tag lies side by side.
    by_tag: RwLock<BTreeMap<String, Vec<Arc<Region>>>>,
    /// There is one whose backups move by themselves.
    automatic: AtomicBool,
}

impl Regions {
    /// The region for (tag, policy), made if there is none.
    pub(crate) fn intern(&self, tag: &str, policy: Policy) -> Result<RegionId> {
        check_tag(tag)?;
        let mut ids = lock(&self.ids);
        if let Some(&id) = ids.get(&(tag.to_owned(), policy)) {
            return Ok(id);
        }
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        let number = u32::try_from(all.len()).ok().filter(|&n| n < u32::MAX);
        let number = number.ok_or_else(|| Error::new(Status::InvalidArgument, "there are too many regions"))?;
        let region = Arc::new(Region::new(RegionId(number), tag, policy));
        let mut by_tag = self.by_tag.write().unwrap_or_else(PoisonError::into_inner);
        by_tag.entry(tag.to_owned()).or_default().push(Arc::clone(&region));
        all.push(region);
        self.automatic.fetch_or(policy.backup == Backup::Auto, Ordering::Relaxed);
        ids.insert((tag.to_owned(), policy), RegionId(number));
        Ok(RegionId(number))
    }

    /// The region with this number.
    pub(crate) fn get(&self, id: RegionId) -> Result<Arc<Region>> {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        let unknown = || Error::new(Status::UnknownTag, format!("there is no region number {}", id.0));
        all.get(id.0 as usize).cloned().ok_or_else(unknown)
    }

    /// Whether there is a region whose backups move by themselves. Asked after every pause, so it costs nothing.
    pub(crate) fn any_automatic(&self) -> bool {
        self.automatic.load(Ordering::Relaxed)
    }

    /// Every region, by number.
    pub(crate) fn all(&self) -> Vec<Arc<Region>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The regions that `selection` means.
    pub(crate) fn select(&self, selection: &Selection) -> Result<Vec<Arc<Region>>> {
        let tag = match selection {
            Selection::All => return Ok(self.all()),
            Selection::Exact(ids) => {
                return ids.iter().collect::<BTreeSet<_>>().into_iter().map(|id| self.get(*id)).collect();
            }
            Selection::Tag(tag) => tag,
        };
        check_tag(tag)?;
        let found = self.under(tag);
        if found.is_empty() {
            return Err(self.unknown(tag));
        }
        Ok(found)
    }

    /// The regions of the tag itself.
    pub(crate) fn at(&self, tag: &str) -> Result<Vec<Arc<Region>>> {
        check_tag(tag)?;
        let by_tag = self.by_tag.read().unwrap_or_else(PoisonError::into_inner);
        let found = by_tag.get(tag).cloned();
        drop(by_tag);
        found.ok_or_else(|| self.unknown(tag))
    }

    /// Regions with the tag, and those with tags that begin with it and a slash.
    fn under(&self, tag: &str) -> Vec<Arc<Region>> {
        let by_tag = self.by_tag.read().unwrap_or_else(PoisonError::into_inner);
        let below = format!("{tag}/");
        let below = by_tag.range(below.clone()..).take_while(|(other, _)| other.starts_with(&below));
        by_tag.get(tag).into_iter().chain(below.map(|(_, regions)| regions)).flatten().cloned().collect()
    }

    fn unknown(&self, tag: &str) -> Error {
        let mut tags: Vec<String> = self.all().iter().map(|region| format!("'{}'", region.tag)).collect();
        tags.sort();
        tags.dedup();
        tags.truncate(8);
        let known = if tags.is_empty() { "there are none yet".to_owned() } else { tags.join(", ") };
        Error::new(Status::UnknownTag, format!("no region has the tag '{tag}', nor lies under it (known: {known})"))
    }
}

/// Whether `tag` is `top` or lies under it.
#[cfg(all(test, not(feature = "shuttle")))]
fn is_under(tag: &str, top: &str) -> bool {
    tag.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Tags are paths of non-empty segments, without NUL, at most 255 bytes.
fn check_tag(tag: &str) -> Result<()> {
    let wrong = if tag.is_empty() {
        "it is empty".to_owned()
    } else if tag.len() > LONGEST_TAG {
        format!("it has {} bytes; {LONGEST_TAG} are allowed", tag.len())
    } else if tag.contains('\0') {
        "it contains a NUL character".to_owned()
    } else if tag.split('/').any(str::is_empty) {
        "a segment between its slashes is empty".to_owned()
    } else {
        return Ok(());
    };
    let shown: String = tag.chars().take(40).collect();
    Err(Error::new(Status::InvalidArgument, format!("the tag {shown:?} cannot be used: {wrong}")))
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    fn status<T: std::fmt::Debug>(result: Result<T>) -> Status {
        result.map_or_else(|e| e.status, |value| unreachable!("{value:?}"))
    }

    #[test]
    fn tags_are_checked() {
        let long = "x".repeat(1 << 20);
        for bad in ["", "/", "a//b", "/a", "a/", "a\0b", &long] {
            assert_eq!(status(check_tag(bad)), Status::InvalidArgument, "{:?}", bad.get(..4));
        }
        for good in ["a", "model/weights", "größe/ß"] {
            assert_eq!(check_tag(good), Ok(()));
        }
    }

    #[test]
    fn a_tag_means_what_is_under_it() {
        assert!(is_under("model", "model") && is_under("model/weights", "model"));
        assert!(!is_under("models", "model") && !is_under("model", "model/weights"));
    }

    /// The twin is a filter over all regions.
    #[test]
    fn a_selection_is_what_a_filter_finds() -> Result<()> {
        let regions = Regions::default();
        for tag in
            ["m", "m/a", "m/a/b", "m-1", "m/", "m0", "mm", "a/m", "m/zz"].iter().filter(|tag| !tag.ends_with('/'))
        {
            regions.intern(tag, Policy::default())?;
            regions.intern(tag, Policy { backup: Backup::Host, ..Policy::default() })?;
        }
        for tag in ["m", "m/a", "a", "m/z"] {
            let ids = |mut found: Vec<Arc<Region>>| {
                found.sort_by_key(|region| region.id);
                found.iter().map(|region| region.id).collect::<Vec<_>>()
            };
            let filtered = regions.all().into_iter().filter(|region| is_under(&region.tag, tag)).collect();
            assert_eq!(ids(regions.under(tag)), ids(filtered), "{tag}");
        }
        Ok(())
    }

    #[test]
    fn same_tag_and_policy_is_the_same_region() -> Result<()> {
        let regions = Regions::default();
        let host = Policy { backup: Backup::Host, ..Policy::default() };
        let a = regions.intern("a", host)?;
        assert_eq!(regions.intern("a", host)?, a);
        assert_ne!(regions.intern("a", Policy::default())?, a);
        assert_eq!(regions.select(&Selection::Tag("a".into()))?.len(), 2);
        assert_eq!(status(regions.select(&Selection::Tag("b".into()))), Status::UnknownTag);
        Ok(())
    }
}
