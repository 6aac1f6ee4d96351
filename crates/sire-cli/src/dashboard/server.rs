//! Connections of the dashboard: so many at once, each with a place. Whoever holds a place without asking anything makes way for whoever comes, and
//! whoever begins a request has a few seconds to end it: nobody can use up the descriptors, or keep others out, by doing nothing.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Connections at once.
const PLACES: usize = 64;
/// Of connections, also of those that are just being closed for others.
const DESCRIPTORS: usize = 2 * PLACES;
/// From a connection's beginning, or its last answer, to the last byte of its next request's head; and for a body.
pub const REQUEST: Duration = Duration::from_secs(5);
/// How long to wait where the system has no descriptor for a newcomer.
const SHORT_OF_DESCRIPTORS: Duration = Duration::from_millis(50);

/// Serves for ever.
pub async fn serve(listener: TcpListener, router: Router) {
    let (places, descriptors) = (Places::default(), Arc::new(Semaphore::new(DESCRIPTORS)));
    // It is never closed.
    while let Ok(descriptor) = Arc::clone(&descriptors).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Some(place) = places.take() {
                    tokio::spawn(attend(stream, router.clone(), place, descriptor));
                }
            }
            Err(_) => tokio::time::sleep(SHORT_OF_DESCRIPTORS).await,
        }
    }
}

async fn attend(stream: TcpStream, router: Router, place: Place, descriptor: OwnedSemaphorePermit) {
    let router = TowerToHyperService::new(router);
    let answer = service_fn(|request: Request<Incoming>| {
        let (answer, asking) = (router.call(request), place.asks());
        async move {
            let answer = answer.await;
            drop(asking);
            answer
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST)
        .serve_connection(TokioIo::new(stream), answer);
    tokio::select! {
        // However it ended, it has.
        _ = connection => {}
        () = place.seat.makes_way.notified() => {}
    }
    drop(descriptor);
}

/// Who is there, the oldest first.
#[derive(Debug, Default, Clone)]
struct Places(Arc<Mutex<VecDeque<Arc<Seat>>>>);

/// One connection.
#[derive(Debug, Default)]
struct Seat {
    /// It has asked, and is not answered yet.
    asks: Mutex<bool>,
    makes_way: Notify,
}

/// A connection's place; free when this is dropped.
#[derive(Debug)]
struct Place {
    places: Places,
    seat: Arc<Seat>,
}

impl Places {
    fn all(&self) -> MutexGuard<'_, VecDeque<Arc<Seat>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place, if need be of whoever has not asked anything for longest; none if all have asked.
    fn take(&self) -> Option<Place> {
        let mut all = self.all();
        if all.len() >= PLACES {
            let idle = all.iter().position(|seat| !seat.is_asking())?;
            all.remove(idle)?.makes_way.notify_one();
        }
        let seat = Arc::<Seat>::default();
        all.push_back(Arc::clone(&seat));
        Some(Place { places: self.clone(), seat })
    }
}

impl Seat {
    fn is_asking(&self) -> bool {
        *self.asks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_asking(&self, yes: bool) {
        *self.asks.lock().unwrap_or_else(PoisonError::into_inner) = yes;
    }
}

impl Place {
    /// It has asked, until this is dropped; from then on it is the one that came last.
    fn asks(&self) -> Asking {
        self.seat.set_asking(true);
        Asking { places: self.places.clone(), seat: Arc::clone(&self.seat) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.all().retain(|seat| !Arc::ptr_eq(seat, &self.seat));
    }
}

/// A request that is being answered.
#[derive(Debug)]
struct Asking {
    places: Places,
    seat: Arc<Seat>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.seat.set_asking(false);
        let mut all = self.places.all();
        if let Some(at) = all.iter().position(|seat| Arc::ptr_eq(seat, &self.seat)) {
            let seat = all.remove(at);
            all.extend(seat);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{PLACES, Places};

    #[test]
    fn who_has_asked_nothing_for_longest_makes_way_and_who_asks_stays() {
        let places = Places::default();
        let held: Vec<_> = (0..PLACES).filter_map(|_| places.take()).collect();
        assert_eq!(held.len(), PLACES);
        // The first waits for its answer, the second had one just now.
        let asking = held[0].asks();
        drop(held[1].asks());
        let newcomer = places.take();
        assert!(newcomer.is_some());
        let is_there = |at: usize| places.all().iter().any(|seat| std::sync::Arc::ptr_eq(seat, &held[at].seat));
        assert_eq!((is_there(0), is_there(1), is_there(2), is_there(3)), (true, true, false, true));
        assert_eq!(places.all().len(), PLACES);
        drop((asking, newcomer));
        drop(held);
        assert!(places.all().is_empty());
    }

    #[test]
    fn where_all_wait_for_answers_nobody_comes_in() {
        let places = Places::default();
        let held: Vec<_> = (0..PLACES).filter_map(|_| places.take()).collect();
        let asking: Vec<_> = held.iter().map(|place| place.asks()).collect();
        assert!(places.take().is_none());
        drop(asking);
        assert!(places.take().is_some());
    }
}
