//! Small file operations that are safe against being cut off: a file is whole or as it was.

use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use sha2::{Digest as _, Sha256};

use crate::failure::{Failure, While as _};
use crate::output;

/// Writes a file under a temporary name beside it and renames it. Returns whether the content changed.
pub fn replace(path: &Path, content: &[u8]) -> Result<bool, Failure> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    let doing = || format!("write {}", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).while_(doing)?;
    }
    let temporary = beside(path);
    fs::write(&temporary, content).while_(doing)?;
    fs::rename(&temporary, path).while_(doing)?;
    Ok(true)
}

/// Makes `link` a symbolic link to `target`, replacing whatever file or link has the name.
pub fn link(link: &Path, target: &str) -> Result<bool, Failure> {
    if fs::read_link(link).is_ok_and(|old| old == Path::new(target)) {
        return Ok(false);
    }
    let doing = || format!("make the link {}", link.display());
    let temporary = beside(link);
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(target, &temporary).while_(doing)?;
    fs::rename(&temporary, link).while_(doing)?;
    Ok(true)
}

/// SHA-256 in hexadecimal, as `sha256sum` prints it.
pub fn sha256(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => digest.update(&buffer[..read]),
        }
    }
    Ok(hexadecimal(&digest.finalize()))
}

/// SHA-256 of named pieces: renaming one changes it too.
pub fn sha256_of_all<'a>(pieces: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut digest = Sha256::new();
    for (name, content) in pieces {
        digest.update(name.as_bytes());
        digest.update([0]);
        digest.update(content.len().to_le_bytes());
        digest.update(content);
    }
    hexadecimal(&digest.finalize())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.new", std::process::id()))
}

/// Keeps a second command from building the same directory at the same time; the kernel drops it with the process.
pub struct Lock {
    _file: fs::File,
}

impl Lock {
    /// Waits, and says so, until the directory is ours.
    pub fn take(path: &Path) -> Result<Self, Failure> {
        let doing = || format!("lock {}", path.display());
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path).while_(doing)?;
        if !flock(&file, libc::LOCK_EX | libc::LOCK_NB).while_(doing)? {
            output::progress("another sire command is working in this directory; waiting for it");
            while !flock(&file, libc::LOCK_EX).while_(doing)? {}
        }
        Ok(Self { _file: file })
    }
}

/// Whether the lock was granted; false if somebody else holds it or a signal came.
fn flock(file: &fs::File, operation: libc::c_int) -> io::Result<bool> {
    // SAFETY: the descriptor belongs to `file`, which lives longer than the call.
    if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
        _ => Err(error),
    }
}
