//! The files that stood for content when a trace was recorded. One that is still where it was, as long as it was, is used as it is; for any other a
//! file of the same length is made, sparse, with bytes of the replay's own where the trace has a use for them. Such a file has lost its
//! name and its private directory before anything is written to it, so that nothing of it outlives this process.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sire_core::trace::{Attachment, Event};

use crate::failure::Failure;

use super::Trace;
use super::content::pattern;

/// Bytes that are written at once.
const PIECE: usize = 4 << 20;
/// Files that are told of by name.
const MOST_NAMES: usize = 20;

/// What tells files of a trace apart: a name may have had another file later.
type Key = (String, u64);

/// A file, here.
#[derive(Debug)]
pub struct Standing {
    /// Open for reading.
    pub file: Arc<File>,
    /// A name under which it can be opened as long as this lives.
    pub path: PathBuf,
    /// Whether it is the one that was recorded.
    pub is_original: bool,
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub struct Files {
    known: BTreeMap<Key, Standing>,
}

impl Files {
    /// All that the trace has a use for.
    ///
    /// # Errors
    /// If there is no room for one.
    pub fn of(trace: &Trace) -> Result<Files, Failure> {
        let mut known = BTreeMap::new();
        for (number, ((name, size), used)) in uses(trace).into_iter().enumerate() {
            let standing = match original(Path::new(&name), size) {
                Some(file) => Standing { file: Arc::new(file), path: PathBuf::from(&name), is_original: true },
                None => made(size, &used, number as u64).map_err(|error| no_room(&name, size, &used, &error))?,
            };
            known.insert((name, size), standing);
        }
        Ok(Files { known })
    }

    /// The file that an attachment means, if it was one.
    pub fn get(&self, attached: &Attachment) -> Option<&Standing> {
        self.known.get(&(attached.name.clone(), attached.size))
    }

    /// One line per file: which it is.
    pub fn describe(&self) -> Vec<String> {
        let line = |((name, size), standing): (&Key, &Standing)| {
            let which = if standing.is_original { "the recorded file itself" } else { "made here, content generated" };
            format!("backup file {name} ({size} bytes): {which}")
        };
        let mut lines: Vec<String> = self.known.iter().take(MOST_NAMES).map(line).collect();
        if let Some(more) = self.known.len().checked_sub(MOST_NAMES).filter(|more| *more > 0) {
            lines.push(format!("and {more} more"));
        }
        lines
    }
}

/// What of each file was attached.
pub fn uses(trace: &Trace) -> BTreeMap<Key, Vec<Range<u64>>> {
    let mut found: BTreeMap<Key, Vec<Range<u64>>> = BTreeMap::new();
    for record in &trace.records {
        if let Event::Attach(attached) = &record.event
            && let Some(range) = inside(attached)
        {
            found.entry((attached.name.clone(), attached.size)).or_default().push(range);
        }
    }
    found.values_mut().for_each(join);
    found
}

/// Each byte once, whoever attached it how often.
fn join(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let meets = next.start <= last.end;
        last.end = if meets { last.end.max(next.end) } else { last.end };
        meets
    });
}

/// The bytes of the file, of an attachment that worked.
fn inside(attached: &Attachment) -> Option<Range<u64>> {
    let end = attached.at.checked_add(attached.len).filter(|end| *end <= attached.size)?;
    (attached.status == 0 && attached.len > 0).then_some(attached.at..end)
}

/// Regular files only: opening anything else may wait for ever.
fn original(path: &Path, size: u64) -> Option<File> {
    let is_it = |found: fs::Metadata| found.is_file() && found.len() == size;
    if !path.is_absolute() || !fs::metadata(path).is_ok_and(is_it) {
        return None;
    }
    File::open(path).ok().filter(|file| file.metadata().is_ok_and(is_it))
}

fn made(size: u64, used: &[Range<u64>], number: u64) -> io::Result<Standing> {
    let file = nameless(&std::env::temp_dir())?;
    file.set_len(size)?;
    let mut bytes = vec![0; PIECE];
    for range in used {
        // Whole words of the file, so that what several attachments share is the same for each.
        let start = range.start / 8 * 8;
        for from in (start..range.end).step_by(PIECE) {
            let len = (range.end - from).min(PIECE as u64) as usize;
            pattern(&mut bytes[..len], !number, from);
            file.write_all_at(&bytes[..len], from)?;
        }
    }
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Ok(Standing { file: Arc::new(file), path, is_original: false })
}

/// In a directory that only this user can look into, and that is gone with the file's name.
fn nameless(parent: &Path) -> io::Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!("sire-replay-{}-{number}", std::process::id()));
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            outcome => outcome?,
        }
        let name = dir.join("content");
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&name);
        let _ = fs::remove_file(&name);
        let _ = fs::remove_dir(&dir);
        return file;
    }
}

fn no_room(name: &str, size: u64, used: &[Range<u64>], error: &io::Error) -> Failure {
    let bytes: u64 = used.iter().map(|range| range.end - range.start).fold(0, u64::saturating_add);
    let dir = std::env::temp_dir();
    let what = format!(
        "cannot make a file of {size} bytes, {bytes} of them used, in place of {name} in {}: {error}",
        dir.display()
    );
    Failure::new(what).advice("Name a directory with room in TMPDIR, or put the recorded file back where it was")
}
