//! Kernels: registration, launch configuration, launches, attributes, occupancy.

use super::memory::stream_of;
use crate::abi::{Dim3, FuncAttributes, Handle, LaunchConfig};
use crate::boundary::{In, Out, contain, export};
use crate::{kernels, state};
use sire_sim::{Code, Machine, Result, StreamId};
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint, c_void};

/// A library announces its kernels; the handle is the address of a pointer to its image.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFatBinary(image: *mut c_void) -> *mut *mut c_void {
    Box::into_raw(Box::new(image))
}

/// The announcement is over.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFatBinaryEnd(_handle: *mut *mut c_void) {}

/// The library goes away. Its few bytes stay: destructors of other libraries may still name them.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaUnregisterFatBinary(_handle: *mut *mut c_void) {}

/// Old initialisation hook.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaInitModule(_handle: *mut *mut c_void) -> c_char {
    1
}

/// One kernel of a library.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub extern "C" fn __cudaRegisterFunction(
    _handle: *mut *mut c_void,
    host: *const c_void,
    _device: *mut c_char,
    name: *const c_char,
    _thread_limit: c_int,
    _thread: *mut c_void,
    _block: *mut c_void,
    _block_dim: *mut c_void,
    _grid_dim: *mut c_void,
    _warp_size: *mut c_int,
) {
    contain("__cudaRegisterFunction", (), || kernels::register(host, name));
}

#[derive(Clone, Copy, Default)]
struct Configuration {
    grid: Dim3,
    block: Dim3,
    shared: usize,
    stream: u64,
}

const DEPTH: usize = 8;

thread_local! {
    /// Configurations of `<<<...>>>` whose launch is still to come, innermost last.
    static CONFIGURATIONS: Cell<([Configuration; DEPTH], usize)> = const {
        let dim = Dim3 { x: 1, y: 1, z: 1 };
        Cell::new(([Configuration { grid: dim, block: dim, shared: 0, stream: 0 }; DEPTH], 0))
    };
}

/// The `<<<grid, block, shared, stream>>>` of the launch that follows.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaPushCallConfiguration(grid: Dim3, block: Dim3, shared: usize, stream: Handle) -> c_uint {
    let (mut kept, depth) = CONFIGURATIONS.get();
    if depth == DEPTH {
        return Code::UNKNOWN.0 as c_uint;
    }
    kept[depth] = Configuration { grid, block, shared, stream: stream as u64 };
    CONFIGURATIONS.set((kept, depth + 1));
    0
}

/// The configuration that was pushed last.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaPopCallConfiguration(
    grid: Out<Dim3>,
    block: Out<Dim3>,
    shared: Out<usize>,
    stream: Out<Handle>,
) -> c_int {
    let (kept, depth) = CONFIGURATIONS.get();
    let Some(top) = depth.checked_sub(1) else { return 52 };
    CONFIGURATIONS.set((kept, top));
    grid.set_if(kept[top].grid);
    block.set_if(kept[top].block);
    shared.set_if(kept[top].shared);
    stream.set_if(kept[top].stream as Handle);
    0
}

/// The name of a registered kernel.
fn registered(function: *const c_void) -> Result<String> {
    kernels::name_of(function).ok_or_else(|| Code(98).because(format!("{function:?} is not a registered kernel")))
}

/// The stream of a launch: of the thread's device, as CUDA wants it of kernels, though not of copies.
pub fn launch_stream(machine: &Machine, stream: Handle) -> Result<StreamId> {
    let (stream, current) = (stream_of(machine, stream)?, state::current_device(machine));
    let device = machine.stream_device(stream)?;
    if device != current {
        let message = format!("a kernel for device {current} on a stream of device {device}");
        return Err(Code::INVALID_HANDLE.because(message));
    }
    Ok(stream)
}

/// Queues the kernel, or refuses it by name.
pub fn launch(machine: &Machine, function: *const c_void, arguments: *mut *mut c_void, stream: Handle) -> Result<()> {
    let name = registered(function)?;
    let stream = launch_stream(machine, stream)?;
    machine.check_alive(machine.stream_device(stream)?)?;
    // SAFETY: the program launches this kernel with these arguments.
    match unsafe { kernels::recognise(&name, arguments) } {
        Some(kernel) => machine.launch(stream, &name, kernel),
        None => {
            let message = format!("kernel not simulated: {}", kernels::readable(&name));
            state::say("launch", &message);
            Err(Code::NOT_SUPPORTED.because(message))
        }
    }
}

/// How many blocks of this size fit on a multiprocessor, by threads alone.
fn occupancy(block_size: c_int) -> Result<c_int> {
    match block_size {
        1..=1024 => Ok((2048 / ((block_size + 31) / 32 * 32)).min(32)),
        _ => Err(Code::INVALID_VALUE.because(format!("a block of {block_size} threads"))),
    }
}

export! { Runtime:
    fn cudaLaunchKernel(function: *const c_void, _grid: Dim3, _block: Dim3, arguments: *mut *mut c_void, _shared: usize, stream: Handle) |machine| {
        launch(machine, function, arguments, stream)
    }
    fn __cudaLaunchKernel(function: *const c_void, _grid: Dim3, _block: Dim3, arguments: *mut *mut c_void, _shared: usize, stream: Handle) |machine| {
        launch(machine, function, arguments, stream)
    }
    fn cudaLaunchKernelExC(config: In<LaunchConfig>, function: *const c_void, arguments: *mut *mut c_void) |machine| {
        launch(machine, function, arguments, config.get()?.stream)
    }
    fn cudaLaunchCooperativeKernel(function: *const c_void, _grid: Dim3, _block: Dim3, arguments: *mut *mut c_void, _shared: usize, stream: Handle) |machine| {
        launch(machine, function, arguments, stream)
    }
    fn cudaFuncGetAttributes(out: Out<FuncAttributes>, function: *const c_void) |_machine| {
        registered(function)?;
        // SAFETY: `FuncAttributes` consists of integers, for which all zeros is a value.
        let mut attributes: FuncAttributes = unsafe { std::mem::zeroed() };
        attributes.max_threads_per_block = 1024;
        attributes.num_regs = 32;
        attributes.ptx_version = 90;
        attributes.binary_version = 90;
        attributes.max_dynamic_shared_size_bytes = 49152;
        out.set(attributes)
    }
    fn cudaFuncSetAttribute(function: *const c_void, _attribute: c_int, _value: c_int) |_machine| { registered(function).map(drop) }
    fn cudaFuncSetCacheConfig(function: *const c_void, _config: c_int) |_machine| { registered(function).map(drop) }
    fn cudaKernelSetAttributeForDevice(function: *const c_void, _attribute: c_int, _value: c_int, device: c_int) |machine| {
        state::check_device(machine, device)?;
        registered(function).map(drop)
    }
    fn cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks: Out<c_int>, function: *const c_void, block_size: c_int, _shared: usize) |_machine| {
        registered(function)?;
        blocks.set(occupancy(block_size)?)
    }
    fn cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks: Out<c_int>, function: *const c_void, block_size: c_int, _shared: usize, _flags: c_uint) |_machine| {
        registered(function)?;
        blocks.set(occupancy(block_size)?)
    }
}

export! { RuntimeQuery:
    fn __cudaGetKernel(kernel: Out<Handle>, function: *const c_void) |_machine| {
        registered(function)?;
        kernel.set(function.cast_mut())
    }
    fn cudaGetKernel(kernel: Out<Handle>, function: *const c_void) |_machine| {
        registered(function)?;
        kernel.set(function.cast_mut())
    }
}
