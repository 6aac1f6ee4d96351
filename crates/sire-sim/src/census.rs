//! The census: what every frame of every device is used for, by whom, as JSON; and the operating system's
//! own count of the memory, to compare.

use crate::error::Result;
use crate::machine::Machine;

impl Machine {
    /// `{"devices": [{"device", "total_bytes", "frame_bytes", "used_bytes", "used_frames", "committed_bytes", "memory_file",
    /// "memory_inode", "runs": [{"first", "count", "pid", "api", "tag", "refs"}]}], "calls": {name: count}}`. `committed_bytes` is the
    /// operating system's count of the memory file's blocks; `memory_file` a path through which anybody can ask for it.
    #[must_use]
    pub fn census(&self) -> serde_json::Value {
        let device = |memory: &std::sync::Arc<crate::memory::DeviceMemory>| match memory.census() {
            Ok(census) => census,
            Err(error) => serde_json::json!({"device": memory.device, "error": error.to_string()}),
        };
        let devices: Vec<_> = self.core().devices.iter().map(device).collect();
        serde_json::json!({"devices": devices, "calls": self.call_counts()})
    }

    /// [`Machine::census`] as text.
    #[must_use]
    pub fn census_json(&self) -> String {
        self.census().to_string()
    }

    /// (pid, bytes) of every process that holds memory of the device.
    ///
    /// # Errors
    /// As [`Machine::check_alive`], less the sticky error.
    pub fn processes(&self, device: u32) -> Result<Vec<(u32, u64)>> {
        self.core().check_open()?;
        self.core().memory(device)?.holders()
    }
}
