//! What work costs by the machine's profile: which engine it takes, for how long, and which memory it touches.

use crate::clock::{Clock, Engine, Step, Time, profile};
use crate::core::{Core, Work, locked};
use crate::types::Copy2d;

impl Core {
    /// The steps of `work` on a stream of `device`; none without a profile.
    pub fn steps(&self, device: u32, work: &Work) -> Vec<Step> {
        let Some(clock) = &self.clock else { return Vec::new() };
        let mut steps = Vec::new();
        self.add_steps(clock, device, work, &mut steps);
        steps
    }

    fn add_steps(&self, clock: &Clock, device: u32, work: &Work, steps: &mut Vec<Step>) {
        let copies = &clock.profile.copies;
        steps.push(match work {
            Work::Graph(nodes) => return nodes.iter().for_each(|node| self.add_steps(clock, device, node, steps)),
            Work::Empty | Work::Host(_) => Step::by_itself(0),
            Work::Kernel(_) => Step::by_itself(profile::picos(copies.kernel_us)),
            // A copy on the device moves each byte twice, so reading goes at twice its rate.
            Work::Hash { src, len, .. } => {
                let work = moving(clock, *len, 2.0 * copies.on_device_gb_s);
                Step { engine: Some((device, Engine::OnDevice)), work, touches: [(*src, *len), (0, 0)] }
            }
            Work::Copy(copy) => self.copy_step(clock, device, copy),
            Work::Staged { copy, .. } => self.copy_step(clock, device, copy),
            Work::Fill { dst, pitch, pattern, width, height } => {
                let width = width.saturating_mul(pattern.width());
                let touches = [(*dst, reach(*pitch, width, *height)), (0, 0)];
                let work = moving(clock, width.saturating_mul(*height), copies.on_device_gb_s);
                Step { engine: Some((device, Engine::OnDevice)), work, touches }
            }
        });
    }

    fn copy_step(&self, clock: &Clock, device: u32, copy: &Copy2d) -> Step {
        let copies = &clock.profile.copies;
        let (bytes, src_len, dst_len) = (
            copy.width.saturating_mul(copy.height),
            reach(copy.src_pitch, copy.width, copy.height),
            reach(copy.dst_pitch, copy.width, copy.height),
        );
        let space = self.space();
        let (from_device, to_device) = (space.contains(copy.src), space.contains(copy.dst));
        drop(space);
        let fast = |host, len, rate| if self.knows(host, len) { rate } else { copies.pageable_gb_s };
        let (engine, rate) = match (from_device, to_device) {
            (true, true) => (Some(Engine::OnDevice), copies.on_device_gb_s),
            (false, true) => (Some(Engine::ToDevice), fast(copy.src, src_len, copies.to_device_gb_s)),
            (true, false) => (Some(Engine::ToHost), fast(copy.dst, dst_len, copies.to_host_gb_s)),
            (false, false) => (None, copies.pageable_gb_s),
        };
        Step {
            engine: engine.map(|engine| (device, engine)),
            work: moving(clock, bytes, rate),
            touches: [
                (copy.src, if from_device { src_len } else { 0 }),
                (copy.dst, if to_device { dst_len } else { 0 }),
            ],
        }
    }

    /// Whether the whole host range is pinned or registered.
    pub fn knows(&self, host: u64, len: u64) -> bool {
        locked(&self.host).covers(host, len)
    }
}

fn moving(clock: &Clock, bytes: u64, gb_s: f64) -> Time {
    profile::picos(clock.profile.copies.latency_us) + profile::moving(bytes, gb_s)
}

/// Bytes from the first to the last of some rows.
fn reach(pitch: u64, width: u64, height: u64) -> u64 {
    if height <= 1 { width } else { pitch.saturating_mul(height - 1).saturating_add(width) }
}
