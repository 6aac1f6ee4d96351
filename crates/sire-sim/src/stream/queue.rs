//! One stream: a queue of operations, who takes them off it, and points in it that others wait for.

use crate::clock::{Clock, Mark, Step};
use crate::core::{Core, Work, locked};
use crate::error::Code;
use crate::options::Executor;
use crate::types::StreamId;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long whoever waits for what another thread does spins before it sleeps: a few pieces of a pipeline.
const SPINNING: Duration = Duration::from_millis(2);

/// A point in a stream.
#[derive(Clone, Debug)]
pub struct Point {
    pub(super) stream: Arc<StreamInner>,
    pub(super) number: u64,
    pub(super) mark: Option<Mark>,
}

/// An operation, what it comes after, and where the time of its end is noted.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) after: Vec<Point>,
    pub(super) work: Work,
    pub(super) stamp: Option<Arc<OnceLock<Instant>>>,
}

impl Item {
    /// Whether it only marks a point of its own stream.
    fn is_marker(&self) -> bool {
        matches!(self.work, Work::Empty) && self.after.is_empty()
    }

    fn note_end(&self) {
        if let Some(stamp) = &self.stamp {
            let _ = stamp.set(Instant::now());
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    submitted: u64,
    completed: u64,
    /// The mark of the last operation.
    mark: Option<Mark>,
    running: bool,
    closing: bool,
    worker: Option<JoinHandle<()>>,
    /// Whether the worker sleeps.
    idle: bool,
    /// What others sleep for, one number each.
    awaited: Vec<u64>,
}

impl Queue {
    /// The first operation, if there is one and nobody else is at it.
    fn take(&mut self) -> Option<Item> {
        let item = if self.running { None } else { self.items.pop_front() };
        self.running |= item.is_some();
        item
    }

    /// The operation that was taken is over, and so are the events right behind it.
    fn complete(&mut self) {
        (self.running, self.completed) = (false, self.completed + 1);
        while self.items.front().is_some_and(Item::is_marker) {
            self.items.pop_front().iter().for_each(Item::note_end);
            self.completed += 1;
        }
    }

    /// Whether there is a worker, which has not been told to end.
    fn has_worker(&self) -> bool {
        self.worker.is_some() && !self.closing
    }

    /// Whether somebody who sleeps has something to do now.
    fn concerns_others(&self) -> bool {
        !self.has_worker() || self.awaited.iter().any(|number| *number <= self.completed)
    }

    /// Whether the worker sleeps and has something to do now, or is to end.
    fn concerns_worker(&self) -> bool {
        self.idle && !self.running && (self.closing || !self.items.is_empty())
    }
}

/// One stream. See the module's documentation.
#[derive(Debug)]
pub struct StreamInner {
    /// Its handle.
    pub id: StreamId,
    /// Its device.
    pub device: u32,
    /// Whether it is ordered with the legacy stream.
    pub blocking: bool,
    /// Whether it is the legacy stream.
    pub legacy: bool,
    pub(super) priority: i32,
    queue: Mutex<Queue>,
    /// How many operations are completed, for whoever looks without the lock.
    seen: AtomicU64,
    /// There is something for the worker to do.
    pending: Condvar,
    /// Something that is awaited is completed; where there is no worker, anything is.
    passed: Condvar,
}

impl StreamInner {
    pub(super) fn new(id: StreamId, device: u32, blocking: bool, legacy: bool, priority: i32) -> StreamInner {
        StreamInner {
            id,
            device,
            blocking,
            legacy,
            priority,
            queue: Mutex::default(),
            seen: AtomicU64::new(0),
            pending: Condvar::new(),
            passed: Condvar::new(),
        }
    }

    fn submitted(&self) -> u64 {
        locked(&self.queue).submitted
    }

    /// The point behind all that was submitted.
    pub(super) fn end(self: &Arc<Self>) -> Point {
        let queue = locked(&self.queue);
        Point { stream: Arc::clone(self), number: queue.submitted, mark: queue.mark.clone() }
    }

    /// Whether nobody can wait for anything here any more, in real or virtual time.
    pub(super) fn is_over(&self) -> bool {
        let queue = locked(&self.queue);
        queue.completed >= queue.submitted && queue.mark.as_ref().is_none_or(|mark| mark.settled().is_some())
    }

    fn is_done(&self, number: u64) -> bool {
        self.seen.load(Ordering::Acquire) >= number
    }

    pub(super) fn push(self: &Arc<Self>, core: &Arc<Core>, item: Item) -> Point {
        let steps = core.steps(self.device, &item.work);
        let marker =
            matches!(item.work, Work::Empty) && item.after.iter().all(|point| point.stream.is_done(point.number));
        let mut queue = locked(&self.queue);
        queue.mark = core.clock.as_ref().map(|clock| mark(clock, queue.mark.take(), &item, &steps));
        let point =
            |queue: &Queue| Point { stream: Arc::clone(self), number: queue.submitted, mark: queue.mark.clone() };
        if marker && queue.completed == queue.submitted {
            // An event behind nothing has passed at once; no worker is woken for it.
            (queue.submitted, queue.completed) = (queue.submitted + 1, queue.completed + 1);
            self.seen.store(queue.completed, Ordering::Release);
            item.note_end();
            return point(&queue);
        }
        queue.items.push_back(item);
        queue.submitted += 1;
        let point = point(&queue);
        if core.options.executor == Executor::Threads && queue.worker.is_none() {
            queue.worker = self.start_worker(core);
        }
        let for_worker = queue.concerns_worker();
        drop(queue);
        if for_worker {
            self.pending.notify_one();
        }
        if core.options.executor == Executor::Inline {
            self.wait(core, point.number);
        }
        point
    }

    fn start_worker(self: &Arc<Self>, core: &Arc<Core>) -> Option<JoinHandle<()>> {
        let (stream, core) = (Arc::clone(self), Arc::clone(core));
        let name = format!("sim-stream-{:x}", self.id.0);
        // Without a thread (limits), waiters run the queue themselves.
        std::thread::Builder::new().name(name).spawn(move || stream.work(&core)).ok()
    }

    fn work(&self, core: &Core) {
        let mut queue = locked(&self.queue);
        loop {
            if let Some(item) = queue.take() {
                queue = self.step(core, queue, item);
            } else if queue.closing && queue.items.is_empty() {
                return;
            } else {
                queue.idle = true;
                queue = self.pending.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle = false;
            }
        }
    }

    /// Carries out the operation that was taken, without the lock, and wakes whom its end concerns. A thread is woken only if
    /// there is something for it to do: being woken costs more than copying a page.
    fn step<'a>(&'a self, core: &Core, queue: MutexGuard<'a, Queue>, item: Item) -> MutexGuard<'a, Queue> {
        drop(queue);
        item.after.iter().for_each(|point| point.stream.wait(core, point.number));
        self.carry_out(core, &item);
        drop(item);
        let mut queue = locked(&self.queue);
        queue.complete();
        self.seen.store(queue.completed, Ordering::Release);
        let (for_others, for_worker) = (queue.concerns_others(), queue.concerns_worker());
        if !for_others && !for_worker {
            return queue;
        }
        // Whoever is woken wants the lock at once.
        drop(queue);
        if for_others {
            self.passed.notify_all();
        }
        if for_worker {
            self.pending.notify_one();
        }
        locked(&self.queue)
    }

    fn carry_out(&self, core: &Core, item: &Item) {
        if core.lost(self.device) == Code::SUCCESS {
            let run = std::panic::AssertUnwindSafe(|| core.run(self.device, &item.work));
            match std::panic::catch_unwind(run) {
                Ok(Ok(())) => {}
                Ok(Err(code)) => core.lose(self.device, code),
                Err(_) => core.lose(self.device, Code::LAUNCH_FAILED),
            }
        }
        item.note_end();
    }

    /// Waits until operation `number` is completed. Who waits for all that there is does it himself while nobody is at it: that
    /// saves two changes of thread. Who waits for less has more to do meanwhile, and leaves it to the worker, if there is one. With engines the worker
    /// does everything: what a program waits for must not decide which thread copies. What comes after the worker has been told to end is anybody's.
    pub(super) fn wait(&self, core: &Core, number: u64) {
        let mut may_spin = core.options.spin;
        let mut queue = locked(&self.queue);
        while queue.completed < number && queue.submitted >= number {
            let mine = !queue.has_worker() || (queue.submitted == number && !core.options.engines);
            queue = match if mine { queue.take() } else { None } {
                Some(item) => self.step(core, queue, item),
                None if std::mem::take(&mut may_spin) => {
                    drop(queue);
                    if self.spin(number) {
                        return;
                    }
                    locked(&self.queue)
                }
                None => self.sleep(queue, number),
            };
        }
    }

    /// Whether operation `number` is completed soon. Whoever else wants the processor may have it.
    fn spin(&self, number: u64) -> bool {
        let until = Instant::now() + SPINNING;
        while !self.is_done(number) && Instant::now() < until {
            std::thread::yield_now();
        }
        self.is_done(number)
    }

    fn sleep<'a>(&'a self, mut queue: MutexGuard<'a, Queue>, number: u64) -> MutexGuard<'a, Queue> {
        queue.awaited.push(number);
        let mut queue = self.passed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = queue.awaited.iter().position(|each| *each == number) {
            queue.awaited.swap_remove(at);
        }
        queue
    }

    pub(super) fn wait_all(&self, core: &Core) {
        self.wait(core, self.submitted());
    }

    /// Whether `number` is completed. A deferred queue takes one step, so that polling gets there.
    pub(super) fn poll(&self, core: &Core, number: u64) -> bool {
        if core.options.executor == Executor::Deferred && !self.is_done(number) {
            let first = locked(&self.queue).items.front().map(|item| item.after.clone());
            match first.into_iter().flatten().find(|point| !point.stream.is_done(point.number)) {
                Some(point) => drop(point.stream.poll(core, point.number)),
                None => self.take_step(core),
            }
        }
        self.is_done(number)
    }

    fn take_step(&self, core: &Core) {
        let mut queue = locked(&self.queue);
        if let Some(item) = queue.take() {
            drop(self.step(core, queue, item));
        }
    }

    /// No more will come: the worker finishes its queue and ends by itself.
    pub(super) fn end_worker(&self) {
        locked(&self.queue).closing = true;
        self.pending.notify_all();
    }

    /// The same; the worker, to be waited for.
    pub(super) fn close(&self) -> Option<JoinHandle<()>> {
        let mut queue = locked(&self.queue);
        queue.closing = true;
        let worker = queue.worker.take();
        drop(queue);
        self.pending.notify_all();
        self.passed.notify_all();
        worker
    }
}

/// The mark of an operation that is about to be pushed behind `before`.
fn mark(clock: &Clock, before: Option<Mark>, item: &Item, steps: &[Step]) -> Mark {
    let after = item.after.iter().filter_map(|point| point.mark.clone()).chain(before).collect();
    let calls = &clock.profile.calls;
    let cost = if matches!(item.work, Work::Empty) { calls.record_us } else { calls.submit_us };
    clock.submit(steps, after, cost)
}

#[cfg(test)]
mod tests {
    use crate::core::Work;
    use crate::machine::Machine;
    use crate::options::{Executor, Options};
    use crate::stream::queue::{Item, Queue, StreamInner, locked};
    use std::collections::BTreeSet;
    use std::sync::{Arc, Mutex, mpsc};
    use std::time::Duration;

    /// A stream that was looked up before it was destroyed, and whose worker has ended.
    fn destroyed(machine: &Machine) -> crate::Result<Arc<StreamInner>> {
        let stream = machine.stream_create(0, false, 0)?;
        let inner = machine.stream(stream)?;
        machine.launch_host(stream, Arc::new(|| ()))?;
        machine.stream_destroy(stream)?;
        while !locked(&inner.queue).worker.as_ref().is_none_or(|worker| worker.is_finished()) {
            std::thread::yield_now();
        }
        Ok(inner)
    }

    /// Two operations come when there is nobody but who waits for them: the first while the second is waited for already.
    #[test]
    fn what_comes_after_the_worker_is_done_by_whoever_waits() -> crate::Result<()> {
        for engines in [false, true] {
            let machine = Machine::new(Options { executor: Executor::Threads, engines, ..Options::tiny(1 << 20) })?;
            let inner = destroyed(&machine)?;
            let (open, opened) = mpsc::channel::<()>();
            let opened = Mutex::new(opened);
            let first = move || locked(&opened).recv().unwrap_or_default();
            let (said, says) = mpsc::channel();
            for work in [Work::Host(Arc::new(first)), Work::Host(Arc::new(|| ()))] {
                let point = inner.push(machine.core(), Item { after: Vec::new(), work, stamp: None });
                let (there, machine, said) = (Arc::clone(&inner), machine.clone(), said.clone());
                let waits = move || {
                    there.wait(machine.core(), point.number);
                    said.send(point.number).unwrap_or_default();
                };
                std::thread::spawn(waits);
                let is_taken = |queue: &Queue| queue.running && queue.items.len() == queue.awaited.len();
                while !is_taken(&locked(&inner.queue)) {
                    std::thread::yield_now();
                }
            }
            drop(open);
            let heard: BTreeSet<_> = [(); 2].iter().flat_map(|()| says.recv_timeout(Duration::from_secs(20))).collect();
            assert_eq!(heard, BTreeSet::from([2, 3]), "engines: {engines}");
        }
        Ok(())
    }
}
