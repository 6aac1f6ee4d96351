//! `sire dashboard`: the live view as a web page on this machine.
//!
//! A sampler looks at all processes at a steady pace and keeps what it saw; requests are answered from that, so that many watchers cost no more than
//! one. Whoever wants figures shows the token, because any user of the machine can reach a loopback port; the page itself holds none.

mod door;
mod history;

use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use sire_control::message::{Answer, Code, Refusal, Verb};
use sire_control::place::Place;
use tiny_http::{Header, Method, Request, Response, Server};

use crate::arguments::DashboardOptions;
use crate::control::act;
use crate::control::view::View;
use crate::control::{metrics, place};
use crate::failure::Failure;
use crate::output;
use door::{Door, Pass};
use history::History;

const PAGE: &str = include_str!("page.html");
/// Bytes of the longest order.
const LONGEST_BODY: u64 = 4096;
/// Whoever announces more gets no answer.
const LONGEST_ANNOUNCED: usize = 1 << 16;
/// Requests that are answered at once.
const WORKERS: usize = 4;
/// How long a process may take to answer the sampler.
const PATIENCE: Duration = Duration::from_secs(2);

/// What workers share.
struct Dashboard {
    address: SocketAddr,
    door: Door,
    place: Place,
    seen: Mutex<(View, History)>,
}

/// `sire dashboard`.
pub fn dashboard(options: &DashboardOptions) -> Result<ExitCode, Failure> {
    let server = Server::http(options.listen).map_err(|error| {
        Failure::new(format!("cannot listen on {}: {error}", options.listen))
            .advice("Another port: sire dashboard --listen 127.0.0.1:0")
    })?;
    let address = server.server_addr().to_ip().unwrap_or(options.listen);
    let door = Door::new(address, options.token_file.as_deref(), options.public_view)?;
    if !address.ip().is_loopback() {
        output::progress("this address can be reached from other machines, and what is sent there is not encrypted");
    }
    output::line(&format!("http://{address}/#token={}", door.token()));
    let dashboard = Arc::new(Dashboard { address, door, place: place()?, seen: Mutex::default() });
    let server = Arc::new(server);
    for _ in 0..WORKERS {
        let (dashboard, server) = (Arc::clone(&dashboard), Arc::clone(&server));
        std::thread::spawn(move || server.incoming_requests().for_each(|request| dashboard.serve(request)));
    }
    dashboard.sample(Duration::from_secs_f64(options.interval))
}

impl Dashboard {
    fn seen(&self) -> MutexGuard<'_, (View, History)> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sample(&self, interval: Duration) -> Result<ExitCode, Failure> {
        loop {
            let began = Instant::now();
            let view = View::look(&self.place, PATIENCE)?;
            {
                let mut seen = self.seen();
                seen.1.add(&view);
                seen.0 = view;
            }
            self.keep_moving();
            std::thread::sleep(interval.saturating_sub(began.elapsed()));
        }
    }

    /// A connection that arrives in the same moment as another may get no thread of the server's before one has nothing to do, and threads whose
    /// clients are silent always have. One that ends at once brings a thread that has nothing to do.
    fn keep_moving(&self) {
        drop(TcpStream::connect_timeout(&self.address, Duration::from_millis(100)));
    }

    fn serve(&self, mut request: Request) {
        if request.body_length().is_some_and(|length| length > LONGEST_ANNOUNCED) {
            // To drop it would be to read all of that, into a buffer of that size. Its connection stays until the client closes it.
            std::mem::forget(request);
            return;
        }
        let answer = self.answer(&mut request);
        // A client that has gone misses it.
        let _ = request.respond(answer);
    }

    fn answer(&self, request: &mut Request) -> Response<std::io::Cursor<Vec<u8>>> {
        let path = request.url().split(['?', '#']).next().unwrap_or_default().to_owned();
        if let Err(why) = self.door.is_addressed(request) {
            return refuse(421, why);
        }
        match (request.method().clone(), path.as_str()) {
            (Method::Get, "/") => page(),
            (Method::Get, "/api/view" | "/metrics") if self.door.check(request) == Pass::Nobody => unauthorized(),
            (Method::Get, "/api/view") => self.view(request.url()),
            (Method::Get, "/metrics") => {
                respond(200, "text/plain; version=0.0.4; charset=utf-8", metrics::text(&self.seen().0))
            }
            (Method::Post, "/api/order") if self.door.check(request) != Pass::Owner => unauthorized(),
            (Method::Post, "/api/order") => self.order(request),
            (_, "/" | "/api/view" | "/metrics" | "/api/order") => refuse(405, "this address takes another method"),
            _ => refuse(404, "there is nothing at this address"),
        }
    }

    /// The newest view, and the history after the time that the client knows.
    fn view(&self, url: &str) -> Response<std::io::Cursor<Vec<u8>>> {
        let since = url.split_once("since=").and_then(|(_, since)| since.parse::<f64>().ok()).unwrap_or(0.0);
        let seen = self.seen();
        let body = json!({"view": &seen.0, "history": seen.1.since(since)});
        respond(200, "application/json", body.to_string())
    }

    fn order(&self, request: &mut Request) -> Response<std::io::Cursor<Vec<u8>>> {
        let mut body = Vec::new();
        let read = request.as_reader().take(LONGEST_BODY + 1).read_to_end(&mut body);
        if read.is_err() || body.len() as u64 > LONGEST_BODY {
            return refuse(413, "an order has at most 4096 bytes");
        }
        let order = serde_json::from_slice::<Order>(&body).map_err(|error| error.to_string());
        match order.and_then(|order| Ok((order.pid, order.verb()?))) {
            Err(why) => refuse(400, &why),
            Ok((pid, verb)) => match self.carry_out(pid, verb) {
                Ok(answer) => respond(200, "application/json", json!({"ok": answer}).to_string()),
                Err(refusal) => {
                    let status = match refusal.code {
                        Code::Invalid => 400,
                        Code::Refused | Code::Failed => 409,
                        Code::Busy => 503,
                    };
                    respond(status, "application/json", json!({"error": refusal}).to_string())
                }
            },
        }
    }

    fn carry_out(&self, pid: u32, verb: Verb) -> Answer {
        let mut client = act::connect(&self.place, pid).map_err(|unreached| unreached.as_refusal(pid))?;
        client
            .ask(verb, Duration::from_secs(120))
            .unwrap_or_else(|silence| Err(Refusal::new(Code::Failed, silence.to_string())))
    }
}

/// What the page's buttons send.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    pid: u32,
    verb: String,
    tag: Option<String>,
}

impl Order {
    fn verb(self) -> Result<Verb, String> {
        const TIMEOUT: f64 = 10.0;
        let verb = match self.verb.as_str() {
            "pause" => Verb::Pause { tag: self.tag, timeout: TIMEOUT },
            "resume" => Verb::Resume { tag: self.tag, timeout: TIMEOUT, wait: 0.0 },
            "evict" if self.tag.is_none() => Verb::Evict { device: None, bytes: None },
            _ => return Err("an order is pause, resume (with or without a tag) or evict".to_owned()),
        };
        Ok(verb)
    }
}

// ---- answers -------------------------------------------------------------------------------------------------------------

fn respond(status: u16, kind: &str, body: String) -> Response<std::io::Cursor<Vec<u8>>> {
    let mut response = Response::from_data(body.into_bytes()).with_status_code(status);
    let headers = [
        ("Content-Type", kind),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("X-Frame-Options", "DENY"),
    ];
    for (name, value) in headers {
        if let Ok(header) = Header::from_bytes(name, value) {
            response.add_header(header);
        }
    }
    response
}

fn page() -> Response<std::io::Cursor<Vec<u8>>> {
    let mut response = respond(200, "text/html; charset=utf-8", PAGE.to_owned());
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                  img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    if let Ok(header) = Header::from_bytes("Content-Security-Policy", policy) {
        response.add_header(header);
    }
    response
}

fn refuse(status: u16, why: &str) -> Response<std::io::Cursor<Vec<u8>>> {
    let error: Value = json!({"error": {"code": "invalid", "message": why}});
    respond(status, "application/json", error.to_string())
}

fn unauthorized() -> Response<std::io::Cursor<Vec<u8>>> {
    let mut response =
        refuse(401, "this needs the token that 'sire dashboard' has printed, as 'Authorization: Bearer TOKEN'");
    if let Ok(header) = Header::from_bytes("WWW-Authenticate", "Bearer") {
        response.add_header(header);
    }
    response
}
