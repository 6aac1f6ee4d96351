//! Directories that are this user's alone. Where anybody may create one, what is found there is looked at before it is trusted.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The number of the user whose process this is.
pub(super) fn user() -> io::Result<u32> {
    fs::metadata("/proc/self").map(|process| process.uid())
}

/// `sire-<uid>` in `root`.
pub(super) fn home(root: &Path) -> io::Result<PathBuf> {
    private(&root.join(format!("sire-{}", user()?)))
}

/// Makes a directory with mode 0700, or makes sure that the one there is this user's and gives it that mode.
pub(super) fn private(dir: &Path) -> io::Result<PathBuf> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let found = fs::symlink_metadata(dir)?;
    if !found.is_dir() || found.uid() != user()? {
        let why = format!("{} is not a directory of this user; remove it or set another", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    }
    Ok(dir.to_path_buf())
}
