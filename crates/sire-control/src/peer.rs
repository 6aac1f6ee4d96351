//! Who is at the other end of a connection, as the kernel says.
//!
//! Not through `rustix`: its process number cannot be 0, which is what the kernel says of a process in another PID namespace (another container).

use crate::place;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// What the kernel noted when the other end connected, or began to listen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    /// Its number in our PID namespace; None: it has none here.
    pub(crate) pid: Option<u32>,
    uid: u32,
}

impl Peer {
    /// None if the kernel does not say.
    pub(crate) fn of(stream: BorrowedFd<'_>) -> Option<Peer> {
        let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut size = libc::socklen_t::try_from(size_of::<libc::ucred>()).ok()?;
        // SAFETY: the descriptor is open (it is borrowed), and `found` is a live struct of `size` bytes in which any numbers are allowed.
        let status = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut found).cast(),
                &mut size,
            )
        };
        let is_whole = status == 0 && size as usize == size_of::<libc::ucred>();
        is_whole.then(|| Peer { pid: u32::try_from(found.pid).ok().filter(|pid| *pid > 0), uid: found.uid })
    }
}

/// Whether the process at the other end of a connection belongs to this user.
#[must_use]
pub(crate) fn is_ours(stream: BorrowedFd<'_>) -> bool {
    is_same_user(Peer::of(stream).map(|peer| peer.uid), place::user())
}

/// Root is nobody special: it can become the user if it wants to.
fn is_same_user(peer: Option<u32>, own: u32) -> bool {
    peer == Some(own)
}

#[cfg(test)]
mod tests {
    use super::{Peer, is_ours, is_same_user};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_the_same_user_is_ours() {
        assert!(is_same_user(Some(1000), 1000));
        for stranger in [Some(0), Some(1001), None] {
            assert!(!is_same_user(stranger, 1000), "{stranger:?}");
        }
    }

    #[test]
    fn the_kernel_knows_both_ends() -> std::io::Result<()> {
        let (one, other) = UnixStream::pair()?;
        for end in [&one, &other] {
            assert!(is_ours(end.as_fd()));
            assert_eq!(Peer::of(end.as_fd()).and_then(|peer| peer.pid), Some(std::process::id()));
        }
        assert!(Peer::of(std::fs::File::open("/dev/null")?.as_fd()).is_none());
        Ok(())
    }
}
