//! The private directory in which the sockets of a user's processes lie, one `PID.sock` each; where PID namespaces (containers) share it, several processes
//! may have one number, and the later ones listen at `PID-1.sock` and so on.
//!
//! It is `sire` in `XDG_RUNTIME_DIR`, or else `sire-control-UID` in the temporary directory, where anybody may have put something of that name: it is
//! opened without following links, and used only if it is a directory, this user's, and closed to all others.
//!
//! A name appears a moment before somebody listens there, and a name that was left behind may be taken over by the next process of that number. So
//! sockets are made, and removed for being dead, under a lock of the directory: who finds nobody behind a name, with the lock, is right.

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, flock, fstat, mkdirat, open, openat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Serialize, Serializer};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of the longest path of a socket, by the kernel's rule, its NUL included.
const LONGEST_PATH: usize = 108;
/// Sockets of one process number: more than one in a directory that several PID namespaces share.
const NAMESAKES: u32 = 64;
/// How long to try for the lock of the directory, which others hold for a few system calls, unless they are stopped meanwhile.
const TURN: Duration = Duration::from_millis(500);

/// A directory that was found to be private. Paths are used after the check, which is safe because nobody else can change what is in it.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    directory: OwnedFd,
}

/// What a process is called in the directory: nobody else who lives there is called so.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Name {
    /// Its number, as it counts itself.
    pub pid: u32,
    /// Which one of those with that number; the first is 0.
    pub namesake: u32,
}

impl Name {
    /// `12.sock` is of the first process 12, `12-3.sock` of another one.
    fn of_socket(name: &str) -> Option<Name> {
        let stem = name.strip_suffix(".sock")?;
        let (pid, namesake) = match stem.split_once('-') {
            Some((pid, namesake)) => (pid, number(namesake)?),
            None => (stem, 0),
        };
        Some(Name { pid: number(pid)?, namesake })
    }
}

/// A number above 0: digits and nothing else.
fn number(text: &str) -> Option<u32> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|number| is_plain && *number > 0)
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namesake {
            0 => f.pad(&self.pid.to_string()),
            namesake => f.pad(&format!("{}-{namesake}", self.pid)),
        }
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A socket that somebody may listen on.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Found {
    /// Whose it is.
    pub name: Name,
    /// Where it is.
    pub path: PathBuf,
}

/// What the environment says about where this user's directory is, read once: a program may change its environment while another thread reads it.
#[derive(Clone, Debug)]
pub struct Directions {
    runtime: Option<PathBuf>,
    temporary: PathBuf,
}

impl Directions {
    /// From the environment of this process.
    #[must_use]
    pub fn of_this_process() -> Directions {
        Directions { runtime: std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from), temporary: std::env::temp_dir() }
    }

    /// The directory, made if there is none. It may be another one later: a runtime directory goes when its user logs out.
    ///
    /// # Errors
    /// As [`Place::of_this_user`].
    pub fn place(&self) -> io::Result<Place> {
        let private = |directory: &&PathBuf| directory.is_absolute() && is_ours_alone(directory);
        match self.runtime.as_ref().filter(private) {
            Some(runtime) => Place::at(&runtime.join("sire")),
            None => Place::at(&self.temporary.join(format!("sire-control-{}", user()))),
        }
    }
}

/// Which file is at a path: its device and its number.
#[must_use]
pub fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

impl Place {
    /// This user's directory, made if there is none.
    ///
    /// # Errors
    /// The system's, or `PermissionDenied` for one that is not private; the sentence names it.
    pub fn of_this_user() -> io::Result<Place> {
        Directions::of_this_process().place()
    }

    /// The directory at `path`, made if there is none.
    ///
    /// # Errors
    /// As [`Place::of_this_user`].
    pub fn at(path: &Path) -> io::Result<Place> {
        match mkdirat(rustix::fs::CWD, path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(named(path, error.into())),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = open(path, flags, Mode::empty()).map_err(|error| named(path, error.into()))?;
        let found = fstat(&directory)?;
        if found.st_uid != user() || found.st_mode & 0o077 != 0 {
            let why = "is not this user's alone (owner, mode 0700); remove it, or set XDG_RUNTIME_DIR";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{} {why}", path.display())));
        }
        Ok(Place { path: path.to_path_buf(), directory })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A socket of process `pid`, which nobody else listens on; what a dead process left there is removed.
    ///
    /// # Errors
    /// The system's; `AddrInUse` if as many live ones have that number as are allowed.
    pub fn listen(&self, pid: u32) -> io::Result<(UnixListener, PathBuf)> {
        let turn = self.turn(TURN);
        for namesake in 0..NAMESAKES {
            let name = format!("{}.sock", Name { pid, namesake });
            let path = self.path.join(&name);
            refuse_long(&path)?;
            if let Some(listener) = self.listen_at(turn.as_ref(), &name, &path)? {
                listener.set_nonblocking(true)?;
                return Ok((listener, path));
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("{} has {NAMESAKES} of process {pid}", self.path.display()),
        ))
    }

    /// None if somebody lives there, or may.
    fn listen_at(&self, turn: Option<&Turn>, name: &str, path: &Path) -> io::Result<Option<UnixListener>> {
        for _ in 0..2 {
            match UnixListener::bind(path) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => match turn {
                    Some(turn) if is_dead(path) => self.remove(turn, name),
                    _ => return Ok(None),
                },
                bound => return bound.map(Some),
            }
        }
        Ok(None)
    }

    /// The lock of the directory, if it is to be had in time. Dropped by the kernel with a process that ends.
    fn turn(&self, patience: Duration) -> Option<Turn> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        // An open description of its own, so that threads of one process exclude each other, too.
        let directory = openat(&self.directory, ".", flags, Mode::empty()).ok()?;
        let until = Instant::now() + patience;
        while flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err() {
            if Instant::now() >= until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Some(Turn(directory))
    }

    /// Removes a socket; one that is gone is fine.
    fn remove(&self, _turn: &Turn, name: &str) {
        let _ = unlinkat(&self.directory, name, AtFlags::empty());
    }

    /// Removes a socket that nobody listens on, and never will. Where that is uncertain it stays.
    pub fn forget_if_dead(&self, found: &Found) {
        let Some(turn) = self.turn(TURN) else { return };
        if let Some(name) = found.path.file_name().and_then(|name| name.to_str())
            && is_dead(&found.path)
        {
            self.remove(&turn, name);
        }
    }

    /// Every socket that is there, by process number.
    ///
    /// # Errors
    /// The system's.
    pub fn sockets(&self) -> io::Result<Vec<Found>> {
        let mut found: Vec<Found> = std::fs::read_dir(&self.path)?
            .flatten()
            .filter_map(|entry| {
                let file = entry.file_name();
                let name = Name::of_socket(file.to_str()?)?;
                let status = statat(&self.directory, file.to_str()?, AtFlags::SYMLINK_NOFOLLOW).ok()?;
                let is_socket = FileType::from_raw_mode(status.st_mode) == FileType::Socket;
                is_socket.then(|| Found { name, path: entry.path() })
            })
            .collect();
        found.sort();
        Ok(found)
    }
}

/// The lock of a directory of sockets.
#[derive(Debug)]
struct Turn(OwnedFd);

impl Drop for Turn {
    fn drop(&mut self) {
        // By name: closing alone would leave it to a child that was forked meanwhile.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// A connection to whoever listens at `path`. A process that is stopped takes nobody out of its queue, and a full queue makes who comes next
/// wait: at most for `patience`, and then it is `WouldBlock`.
///
/// # Errors
/// The system's: `ConnectionRefused` if nobody listens.
pub fn knock(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let address = SocketAddrUnix::new(path)?;
    let until = Instant::now() + patience;
    loop {
        // On Linux this bounds the wait for a place in a local queue. Zero would mean without end.
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        set_socket_timeout(&socket, Timeout::Send, Some(left))?;
        match connect(&socket, &address) {
            Err(Errno::INTR) => {}
            connected => return Ok(connected.map(|()| UnixStream::from(socket))?),
        }
    }
}

/// Whether nobody listens there. Who holds the lock of the directory knows that nobody is about to, either.
fn is_dead(path: &Path) -> bool {
    knock(path, Duration::ZERO).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

fn is_ours_alone(directory: &Path) -> bool {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let found = open(directory, flags, Mode::empty()).and_then(|directory| fstat(&directory));
    found.is_ok_and(|found| found.st_uid == user() && found.st_mode & 0o077 == 0)
}

fn refuse_long(path: &Path) -> io::Result<()> {
    if path.as_os_str().len() < LONGEST_PATH {
        return Ok(());
    }
    let why = format!("{} is too long for a socket's path; set XDG_RUNTIME_DIR to a shorter one", path.display());
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The user that this process acts as.
#[must_use]
pub fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::{Directions, Found, Name, Place, TURN, is_dead, knock};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
    use std::fs::{self, Permissions};
    use std::io::ErrorKind;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::time::Duration;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn a_directory_that_others_can_enter_is_refused() -> Outcome {
        let root = tempfile::tempdir()?;
        let path = root.path().join("sire");
        Place::at(&path)?;
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o700);
        for mode in [0o701, 0o710, 0o777] {
            fs::set_permissions(&path, Permissions::from_mode(mode))?;
            let error = Place::at(&path).err().ok_or("it was accepted")?;
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
            assert!(error.to_string().contains("not this user's alone"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn links_and_files_are_not_followed() -> Outcome {
        let root = tempfile::tempdir()?;
        let (real, link, file) = (root.path().join("real"), root.path().join("link"), root.path().join("file"));
        Place::at(&real)?;
        symlink(&real, &link)?;
        fs::write(&file, "")?;
        assert!(Place::at(&link).is_err());
        assert!(Place::at(&file).is_err());
        Ok(())
    }

    #[test]
    fn a_runtime_directory_that_is_not_private_is_not_used() -> Outcome {
        let root = tempfile::tempdir()?;
        let runtime = root.path().join("run");
        let chosen =
            |runtime: PathBuf| Directions { runtime: Some(runtime), temporary: root.path().to_path_buf() }.place();
        fs::create_dir(&runtime)?;
        for (mode, inside) in [(0o700, true), (0o755, false)] {
            fs::set_permissions(&runtime, Permissions::from_mode(mode))?;
            let place = chosen(runtime.clone())?;
            assert_eq!(place.path().starts_with(&runtime), inside, "mode {mode:o}");
        }
        assert!(!chosen("run".into())?.path().starts_with(&runtime));
        Ok(())
    }

    #[test]
    fn what_a_dead_process_left_is_taken_over_and_a_living_one_is_spared() -> Outcome {
        let root = tempfile::tempdir()?;
        let place = Place::at(&root.path().join("sire"))?;
        drop(UnixListener::bind(place.path().join("7.sock"))?);
        let (first, path) = place.listen(7)?;
        assert!(path.ends_with("7.sock"));
        let (_second, other) = place.listen(7)?;
        assert!(other.ends_with("7-1.sock"));
        fs::write(place.path().join("9.sock"), "no socket")?;
        let name = |namesake| Name { pid: 7, namesake };
        let found = [Found { name: name(0), path }, Found { name: name(1), path: other }];
        assert_eq!(place.sockets()?, found);
        place.forget_if_dead(&found[0]);
        assert_eq!(place.sockets()?, found, "it lives");
        drop(first);
        place.forget_if_dead(&found[0]);
        assert_eq!(place.sockets()?, found[1..]);
        Ok(())
    }

    #[test]
    fn a_name_that_nobody_listens_behind_yet_is_not_taken_for_dead() -> Outcome {
        let root = tempfile::tempdir()?;
        let place = Place::at(&root.path().join("sire"))?;
        let path = place.path().join("7.sock");
        let found = Found { name: Name { pid: 7, namesake: 0 }, path: path.clone() };
        // What `listen` does, stopped half-way.
        let turn = place.turn(TURN).ok_or("nobody else is here")?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
        assert!(is_dead(&path), "as it looks from outside");
        place.forget_if_dead(&found);
        assert!(place.sockets()?.contains(&found));
        // Nor is it taken over by a namesake.
        assert!(place.listen(7)?.1.ends_with("7-1.sock"));
        rustix::net::listen(&socket, 1)?;
        drop(turn);
        place.forget_if_dead(&found);
        assert!(place.sockets()?.contains(&found), "it lives now");
        drop(socket);
        place.forget_if_dead(&found);
        assert!(!place.sockets()?.contains(&found));
        Ok(())
    }

    #[test]
    fn who_knocks_at_a_full_queue_goes_away_in_time() -> Outcome {
        let root = tempfile::tempdir()?;
        let path = root.path().join("full.sock");
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
        rustix::net::listen(&socket, 1)?;
        let mut queue = Vec::new();
        let full = loop {
            match knock(&path, Duration::from_millis(1)) {
                Ok(stream) if queue.len() < 64 => queue.push(stream),
                outcome => break outcome,
            }
        };
        assert_eq!(full.map(drop).map_err(|error| error.kind()), Err(ErrorKind::WouldBlock));
        assert!(!is_dead(&path));
        queue.clear();
        let greeted = crate::client::Client::connect(&path, Duration::from_millis(1));
        assert!(matches!(greeted, Err(crate::client::Failure::Silent(_))), "{greeted:?}");
        Ok(())
    }

    #[test]
    fn names_are_read_strictly() {
        for (text, namesake) in [("12.sock", 0), ("12-3.sock", 3)] {
            let name = Name { pid: 12, namesake };
            assert_eq!((Name::of_socket(text), format!("{name}.sock")), (Some(name), text.to_owned()));
        }
        for name in [
            "+1.sock",
            "1-+1.sock",
            "0.sock",
            ".sock",
            "-1.sock",
            "12.sock.old",
            "x.sock",
            "12-x.sock",
            "12-0.sock",
            "99999999999.sock",
        ] {
            assert_eq!(Name::of_socket(name), None, "{name}");
        }
    }
}
