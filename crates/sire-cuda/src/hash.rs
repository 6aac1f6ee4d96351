//! Hashing on the device: the kernel in `hash.ptx`, which the driver compiles for each device when it is first needed, and the buffer that a
//! stream's digests pass through. Buffers are made for several streams at a time, when hashing is to be made ready: a stream that hashes first while
//! memory is short finds one. Whatever of that cannot be had makes hashing unsupported, which callers can live with.

use crate::driver::CudaDriver;
use crate::result::{SUCCESS, failure, invalid};
use crate::table::{Code, DevicePtr, EntryPoints, Opaque};
use sire_core::digest::Digest;
use sire_core::driver::{Addr, Device, DriverError, DriverErrorKind, DriverResult, Stream};
use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The kernel, NUL-terminated for the driver.
const PTX: &str = concat!(include_str!("hash.ptx"), "\0");
const NAME: &CStr = c"sire_hash_1";
/// Bytes of a page that one block hashes, and its threads.
const PART: u64 = 128 << 10;
const THREADS: u32 = 256;
/// Digests that one launch makes.
const SLOTS: u64 = 2048;
const DIGEST: u64 = size_of::<Digest>() as u64;
/// Streams of a device that are made ready at once: so many pauses may hash at the same time. Their buffers are half a MiB.
const STREAMS: usize = 8;

/// The kernel of each device's context, and how often contexts went: a kernel that was loaded before belongs to none that is there.
#[derive(Debug, Default)]
struct Functions {
    known: HashMap<Device, usize>,
    forgotten: u64,
}

/// What has been made ready. Functions and buffers are numbers here, since nobody dereferences them.
#[derive(Debug, Default)]
pub(crate) struct Hashing {
    functions: Mutex<Functions>,
    buffers: Mutex<HashMap<Stream, DevicePtr>>,
    /// Buffers that no stream has yet.
    spare: Mutex<HashMap<Device, Vec<DevicePtr>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One call's work.
struct Work {
    src: Addr,
    len: u64,
    page: u64,
    out: *mut Digest,
}

impl Hashing {
    /// The buffer of a stream that is being closed.
    pub(crate) fn forget(&self, stream: Stream) -> Option<DevicePtr> {
        locked(&self.buffers).remove(&stream)
    }

    /// The stream has this buffer after all.
    pub(crate) fn keep(&self, stream: Stream, buffer: DevicePtr) {
        locked(&self.buffers).insert(stream, buffer);
    }

    /// The context of `device` goes, and with it the kernel and the buffers of these streams.
    pub(crate) fn forget_device(&self, device: Device, streams: &[u64]) {
        let mut functions = locked(&self.functions);
        functions.known.remove(&device);
        functions.forgotten += 1;
        drop(functions);
        locked(&self.spare).remove(&device);
        locked(&self.buffers).retain(|stream, _| !streams.contains(&stream.0));
    }
}

impl CudaDriver {
    /// See `Driver::hash`; the stream's context is current.
    ///
    /// # Safety
    /// As for `Driver::hash`.
    pub(crate) unsafe fn hash_pages(
        &self,
        (stream, device): (Stream, Device),
        src: Addr,
        len: u64,
        page: u64,
        out: *mut Digest,
    ) -> DriverResult<()> {
        if !src.0.is_multiple_of(16) || !page.is_multiple_of(16) || page == 0 {
            return Err(invalid(
                "hash",
                format!("hashing at {src:?} by pages of {page} bytes: both must be multiples of 16"),
            ));
        }
        let function = self.hash_function(device).map_err(|code| self.cannot(code, "compiling the kernel"))?;
        let buffer = self.hash_buffer(stream, device).map_err(|code| self.cannot(code, "allocating its buffer"))?;
        if len == 0 {
            self.make_spare_buffers(device);
        }
        let at_once = SLOTS * page;
        for done in (0..len).step_by(at_once as usize) {
            // SAFETY: the caller has room for a digest of each page.
            let out = unsafe { out.add((done / page) as usize) };
            let work = Work { src: src.offset(done), len: at_once.min(len - done), page, out };
            let queued = self.queue_hash(stream, function, buffer, &work);
            if queued != SUCCESS {
                if done > 0 {
                    // What was queued before writes to the caller's memory, which the caller may reuse after an error.
                    // SAFETY: the call takes no argument.
                    let _ = self.raw(|table| unsafe { (table.ctx_synchronize)() });
                }
                return Err(failure(self.table(), "hash", queued, &format!("hashing {len} bytes at {src:?}")));
            }
        }
        Ok(())
    }

    /// Without the kernel or its buffer there is no hashing. A lost device stays lost.
    fn cannot(&self, code: Code, doing: &str) -> DriverError {
        let error = failure(self.table(), "hash", code, &format!("hashing is not available: {doing}"));
        let kind = if error.kind == DriverErrorKind::Lost { error.kind } else { DriverErrorKind::Unsupported };
        DriverError { kind, ..error }
    }

    /// The kernel in the current context, which is `device`'s. Of several threads that load it at once one's counts; the others' modules lie idle.
    fn hash_function(&self, device: Device) -> Result<usize, Code> {
        let functions = || locked(&self.hashing().functions);
        let (known, before) = {
            let functions = functions();
            (functions.known.get(&device).copied(), functions.forgotten)
        };
        if let Some(known) = known {
            return Ok(known);
        }
        let loaded = self.load_function()?;
        let mut functions = functions();
        if functions.forgotten != before {
            return Ok(loaded);
        }
        Ok(*functions.known.entry(device).or_insert(loaded))
    }

    /// The kernel, compiled for the current context. Its module lives as long as that.
    fn load_function(&self) -> Result<usize, Code> {
        let (mut module, mut function): (Opaque, Opaque) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: PTX is NUL-terminated text; the calls write one handle each.
        let code = self.raw(|table| unsafe {
            match (table.module_load_data)(&raw mut module, PTX.as_ptr().cast::<c_void>()) {
                SUCCESS => (table.module_get_function)(&raw mut function, module, NAME.as_ptr()),
                code => code,
            }
        });
        if code == SUCCESS { Ok(function as usize) } else { Err(code) }
    }

    /// The stream's buffer: its own, one that was made beforehand, or a new one.
    fn hash_buffer(&self, stream: Stream, device: Device) -> Result<DevicePtr, Code> {
        let known = locked(&self.hashing().buffers).get(&stream).copied();
        if let Some(known) = known {
            return Ok(known);
        }
        // Nobody else makes this one meanwhile: a stream of ours has one user at a time.
        let spare = locked(&self.hashing().spare).get_mut(&device).and_then(Vec::pop);
        let buffer = spare.map_or_else(|| self.new_buffer(), Ok)?;
        self.hashing().keep(stream, buffer);
        Ok(buffer)
    }

    /// Makes buffers for streams of the device that have not hashed yet. Those that there is no memory for are made when they are needed.
    fn make_spare_buffers(&self, device: Device) {
        let missing = {
            let spare = locked(&self.hashing().spare);
            (STREAMS - 1).saturating_sub(spare.get(&device).map_or(0, Vec::len))
        };
        let made: Vec<DevicePtr> = (0..missing).map_while(|_| self.new_buffer().ok()).collect();
        locked(&self.hashing().spare).entry(device).or_default().extend(made);
    }

    /// A buffer in the current context.
    fn new_buffer(&self) -> Result<DevicePtr, Code> {
        let mut buffer = 0;
        // SAFETY: writes one address.
        let code = self.raw(|table| unsafe { (table.mem_alloc)(&raw mut buffer, (SLOTS * DIGEST) as usize) });
        if code == SUCCESS { Ok(buffer) } else { Err(code) }
    }

    /// Clears the buffer, launches, and fetches the digests. Nothing is written to host memory unless all of it is queued.
    fn queue_hash(&self, stream: Stream, function: usize, buffer: DevicePtr, work: &Work) -> Code {
        let stream = stream.0 as Opaque;
        let pages = work.len.div_ceil(work.page);
        let bytes = (pages * DIGEST) as usize;
        let parts = work.page.min(work.len).div_ceil(PART);
        let arguments: [u64; 4] = [work.src.0, work.len, work.page, buffer];
        let mut pointers = arguments.each_ref().map(|argument| ptr::from_ref(argument).cast_mut().cast::<c_void>());
        let launch = |table: &EntryPoints| {
            // SAFETY: the kernel takes four u64, which the driver reads before it returns; the buffer has room for `pages` digests.
            unsafe {
                (table.launch_kernel)(
                    function as Opaque,
                    pages as u32,
                    parts as u32,
                    1,
                    THREADS,
                    1,
                    1,
                    0,
                    stream,
                    pointers.as_mut_ptr(),
                    ptr::null_mut(),
                )
            }
        };
        // SAFETY: the buffer is device memory of at least `bytes`, used on this stream alone.
        let mut code = self.raw(|table| unsafe { (table.memset_d8_async)(buffer, 0, bytes, stream) });
        if code == SUCCESS {
            code = self.raw(launch);
        }
        if code == SUCCESS {
            // SAFETY: the caller of `hash` keeps room for the digests until the stream has passed the copy.
            code = self
                .raw(|table| unsafe { (table.memcpy_dtoh_async)(work.out.cast::<c_void>(), buffer, bytes, stream) });
        }
        code
    }
}
