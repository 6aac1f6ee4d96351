//! Who may come in: the token, and requests that were really meant for this address.

use std::fs;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use axum::http::{HeaderMap, HeaderName, header};

use crate::failure::{Failure, While as _};

/// Bytes of a token that is made here; as many hexadecimal digits twice.
const BYTES: usize = 24;
/// A token of a person's own must not be shorter.
const SHORTEST: usize = 16;

/// What a request may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pass {
    /// It showed the token.
    Owner,
    /// It may look.
    Guest,
    /// Nothing.
    Nobody,
}

/// The door of a dashboard.
#[derive(Debug)]
pub struct Door {
    token: String,
    public_view: bool,
    address: SocketAddr,
}

impl Door {
    /// A door with the token in a file, or a new one.
    pub fn new(address: SocketAddr, file: Option<&Path>, public_view: bool) -> Result<Door, Failure> {
        let token = match file {
            Some(file) => read(file)?,
            None => fresh()?,
        };
        Ok(Door { token, public_view, address })
    }

    /// What opens it.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// What a request with these headers may do.
    pub fn check(&self, headers: &HeaderMap) -> Pass {
        let shown = text(headers, &header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
        match shown {
            Some(shown) if is_equal(shown.as_bytes(), self.token.as_bytes()) => Pass::Owner,
            _ if self.public_view => Pass::Guest,
            _ => Pass::Nobody,
        }
    }

    /// A page from elsewhere whose name was made to point here (DNS rebinding) has another host in its requests.
    pub fn is_addressed(&self, headers: &HeaderMap) -> Result<(), &'static str> {
        let host = text(headers, &header::HOST).unwrap_or_default();
        if is_own_host(host, self.address) {
            return Ok(());
        }
        Err("the request was addressed to another host; use the address that 'sire dashboard' has printed")
    }
}

fn is_own_host(host: &str, own: SocketAddr) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let address = name.parse::<IpAddr>();
    if own.ip().is_loopback() {
        return name == "localhost" || address.is_ok_and(|address| address.is_loopback());
    }
    // Numbers cannot be rebound.
    name == "localhost" || address.is_ok()
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Takes as long for a token that is wrong at its start as for one that is wrong at its end.
fn is_equal(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |differ, (one, other)| differ | (one ^ other)) == 0
}

fn fresh() -> Result<String, Failure> {
    let mut bytes = [0; BYTES];
    let mut source = fs::File::open("/dev/urandom").while_(|| "open /dev/urandom".to_owned())?;
    source.read_exact(&mut bytes).while_(|| "read /dev/urandom".to_owned())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn read(file: &Path) -> Result<String, Failure> {
    let shown = file.display();
    let found = fs::metadata(file).while_(|| format!("read the token in {shown}"))?;
    if found.mode() & 0o077 != 0 {
        return Err(Failure::new(format!("others can read the token in {shown}")).advice(format!("chmod 600 {shown}")));
    }
    let token = fs::read_to_string(file).while_(|| format!("read the token in {shown}"))?.trim().to_owned();
    let plain = token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte));
    if token.len() < SHORTEST || !plain {
        let advice = format!("At least {SHORTEST} letters, digits, or -_.~: openssl rand -hex 24 > {shown}");
        return Err(Failure::new(format!("what {shown} holds is no token")).advice(advice));
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::{is_equal, is_own_host};
    use std::net::SocketAddr;

    #[test]
    fn only_this_machines_names_are_ours_on_loopback() {
        let own = SocketAddr::from(([127, 0, 0, 1], 80));
        for host in ["localhost", "localhost:7473", "127.0.0.1:7473", "[::1]:7473", "127.1.2.3"] {
            assert!(is_own_host(host, own), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example:7473", "10.0.0.1", "127.0.0.1.evil.example"] {
            assert!(!is_own_host(host, own), "{host}");
        }
        let open = SocketAddr::from(([0, 0, 0, 0], 80));
        assert!(is_own_host("10.0.0.1:80", open) && !is_own_host("evil.example", open));
    }

    #[test]
    fn a_token_is_all_of_the_token() {
        assert!(is_equal(b"abc", b"abc"));
        for other in [&b""[..], b"ab", b"abd", b"abcd", b"bbc"] {
            assert!(!is_equal(other, b"abc"));
        }
    }
}
