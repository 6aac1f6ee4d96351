//! `sire dashboard`: the live view as a web page on this machine.
//!
//! A sampler looks at all processes at a steady pace and keeps what it saw; requests are answered from that, so that many watchers cost no more than
//! one. Whoever wants figures shows the token, because any user of the machine can reach a loopback port; the page itself holds none.

mod door;
mod history;
mod server;

use std::io;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::json;
use sire_control::message::{Answer, Code, Refusal, Verb};
use sire_control::place::Place;
use tokio::net::TcpListener;
use tokio::runtime::{self, Runtime};

use crate::arguments::DashboardOptions;
use crate::control::act;
use crate::control::view::View;
use crate::control::who::Who;
use crate::control::{metrics, place};
use crate::failure::Failure;
use crate::output;
use door::{Door, Pass};
use history::History;

const PAGE: &str = include_str!("page.html");
/// Bytes of the longest order.
const LONGEST_BODY: usize = 4096;
/// Orders that are carried out at once; each waits for a process.
const ORDERS: usize = 8;
/// How long a process may take to answer the sampler.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long an order waits for a safe point, in seconds.
const SAFE_POINT: f64 = 10.0;

/// What requests share.
struct Dashboard {
    door: Door,
    place: Place,
    seen: Mutex<(View, History)>,
}

/// `sire dashboard`.
pub fn dashboard(options: &DashboardOptions) -> Result<ExitCode, Failure> {
    let runtime =
        workers().map_err(|error| Failure::new(format!("cannot start threads that serve the page: {error}")))?;
    let listener = runtime.block_on(TcpListener::bind(options.listen)).map_err(|error| {
        Failure::new(format!("cannot listen on {}: {error}", options.listen))
            .advice("Another port: sire dashboard --listen 127.0.0.1:0")
    })?;
    let address = listener.local_addr().unwrap_or(options.listen);
    let door = Door::new(address, options.token_file.as_deref(), options.public_view)?;
    if !address.ip().is_loopback() {
        output::progress("this address can be reached from other machines, and what is sent there is not encrypted");
    }
    output::line(&format!("http://{address}/#token={}", door.token()));
    let dashboard = Arc::new(Dashboard { door, place: place()?, seen: Mutex::default() });
    runtime.spawn(server::serve(listener, routes(Arc::clone(&dashboard))));
    dashboard.sample(Duration::from_secs_f64(options.interval))
}

fn workers() -> io::Result<Runtime> {
    runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(ORDERS).enable_all().build()
}

fn routes(dashboard: Arc<Dashboard>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/api/view", get(view))
        .route("/metrics", get(figures))
        .route("/api/order", post(order))
        .fallback(async || refuse(StatusCode::NOT_FOUND, "there is nothing at this address"))
        .method_not_allowed_fallback(async || {
            refuse(StatusCode::METHOD_NOT_ALLOWED, "this address takes another method")
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&dashboard), only_if_addressed))
        .with_state(dashboard)
}

impl Dashboard {
    fn seen(&self) -> MutexGuard<'_, (View, History)> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sample(&self, interval: Duration) -> ! {
        let mut said = None;
        loop {
            let began = Instant::now();
            match View::look(&self.place, PATIENCE) {
                Ok(view) => {
                    let mut seen = self.seen();
                    seen.1.add(&view);
                    seen.0 = view;
                    said = None;
                }
                // Too many connections hold descriptors, say: what was seen last stays, and the next look may do better.
                Err(failure) => {
                    let why = failure.to_string();
                    if said.as_ref() != Some(&why) {
                        output::progress(&format!("nothing new is seen: {why}"));
                        said = Some(why);
                    }
                }
            }
            std::thread::sleep(interval.saturating_sub(began.elapsed()));
        }
    }

    fn carry_out(&self, who: Who, verb: Verb) -> Answer {
        let mut client = act::connect(&self.place, who).map_err(|unreached| unreached.as_refusal(who))?;
        let patience = Duration::from_secs_f64(SAFE_POINT) + act::GREETING;
        client
            .ask_alive(verb, patience, patience + act::WORK)
            .unwrap_or_else(|silence| Err(Refusal::new(Code::Failed, silence.to_string())))
    }
}

/// What the page's buttons send.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    pid: Who,
    verb: String,
    tag: Option<String>,
}

impl Order {
    fn verb(self) -> Result<Verb, String> {
        let verb = match self.verb.as_str() {
            "pause" => Verb::Pause { tag: self.tag, timeout: SAFE_POINT },
            "resume" => Verb::Resume { tag: self.tag, timeout: SAFE_POINT, wait: 0.0 },
            "evict" if self.tag.is_none() => Verb::Evict { device: None, bytes: None },
            _ => return Err("an order is pause, resume (with or without a tag) or evict".to_owned()),
        };
        Ok(verb)
    }
}

// ---- answers -------------------------------------------------------------------------------------------------------------

async fn only_if_addressed(State(dashboard): State<Arc<Dashboard>>, request: Request, next: Next) -> Response {
    match dashboard.door.is_addressed(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(why) => refuse(StatusCode::MISDIRECTED_REQUEST, why),
    }
}

async fn page() -> Response {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                  img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let page = respond(StatusCode::OK, "text/html; charset=utf-8", PAGE.to_owned());
    ([(header::CONTENT_SECURITY_POLICY, policy)], page).into_response()
}

/// From when on a client wants the history, in seconds since the epoch.
#[derive(Deserialize)]
struct Since {
    #[serde(default)]
    since: f64,
}

/// The newest view, and the history after the time that the client knows.
async fn view(
    State(dashboard): State<Arc<Dashboard>>,
    headers: HeaderMap,
    since: Result<Query<Since>, QueryRejection>,
) -> Response {
    if dashboard.door.check(&headers) == Pass::Nobody {
        return unauthorized();
    }
    let since = since.map_or(0.0, |Query(Since { since })| since);
    let seen = dashboard.seen();
    let body = json!({"view": &seen.0, "history": seen.1.since(since)});
    respond(StatusCode::OK, "application/json", body.to_string())
}

async fn figures(State(dashboard): State<Arc<Dashboard>>, headers: HeaderMap) -> Response {
    if dashboard.door.check(&headers) == Pass::Nobody {
        return unauthorized();
    }
    respond(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics::text(&dashboard.seen().0))
}

async fn order(State(dashboard): State<Arc<Dashboard>>, headers: HeaderMap, body: Body) -> Response {
    if dashboard.door.check(&headers) != Pass::Owner {
        return unauthorized();
    }
    let body = match whole(&headers, body).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    let order = serde_json::from_slice::<Order>(&body).map_err(|error| error.to_string());
    let (who, verb) = match order.and_then(|order| Ok((order.pid, order.verb()?))) {
        Ok(order) => order,
        Err(why) => return refuse(StatusCode::BAD_REQUEST, &why),
    };
    let done = tokio::task::spawn_blocking(move || dashboard.carry_out(who, verb)).await;
    match done.unwrap_or_else(|error| Err(Refusal::new(Code::Failed, error.to_string()))) {
        Ok(answer) => respond(StatusCode::OK, "application/json", json!({"ok": answer}).to_string()),
        Err(refusal) => {
            let status = match refusal.code {
                Code::Invalid => StatusCode::BAD_REQUEST,
                Code::Refused | Code::Failed => StatusCode::CONFLICT,
                Code::Busy => StatusCode::SERVICE_UNAVAILABLE,
            };
            respond(status, "application/json", json!({"error": refusal}).to_string())
        }
    }
}

/// All of an order, if it is not too long and comes in time.
async fn whole(headers: &HeaderMap, body: Body) -> Result<Bytes, Response> {
    let long = || refuse(StatusCode::PAYLOAD_TOO_LARGE, "an order has at most 4096 bytes");
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > LONGEST_BODY as u64) {
        return Err(long());
    }
    match tokio::time::timeout(server::REQUEST, to_bytes(body, LONGEST_BODY)).await {
        Ok(body) => body.map_err(|_| long()),
        Err(_) => Err(refuse(StatusCode::REQUEST_TIMEOUT, "the order did not come within 5 s")),
    }
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ];
    (status, headers, body).into_response()
}

fn refuse(status: StatusCode, why: &str) -> Response {
    let error = json!({"error": {"code": "invalid", "message": why}});
    respond(status, "application/json", error.to_string())
}

fn unauthorized() -> Response {
    let why = "this needs the token that 'sire dashboard' has printed, as 'Authorization: Bearer TOKEN'";
    ([(header::WWW_AUTHENTICATE, "Bearer")], refuse(StatusCode::UNAUTHORIZED, why)).into_response()
}
