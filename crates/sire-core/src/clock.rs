//! Time: reading it and letting it pass. Under the model checker sleeping is only a chance for others to run.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Now.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Seconds since `start`.
pub(crate) fn seconds_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}

/// Milliseconds since this was first asked for.
pub(crate) fn milliseconds() -> u64 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    FIRST.get_or_init(now).elapsed().as_millis() as u64
}

/// Sleeps for `time`.
pub(crate) fn sleep(time: Duration) {
    #[cfg(feature = "shuttle")]
    {
        let _ = time;
        shuttle::thread::yield_now();
    }
    #[cfg(not(feature = "shuttle"))]
    std::thread::sleep(time);
}
