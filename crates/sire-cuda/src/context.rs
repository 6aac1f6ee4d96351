//! Primary contexts: retained when first needed, current only while one of our calls needs it.
//!
//! The virtual-memory calls need no context; copies, streams, events, host registration and memory information
//! do. The thread's own current context is never replaced: ours is pushed on top, and popped again.

use crate::result::SUCCESS;
use crate::table::{DeviceHandle, EntryPoints, Opaque};
use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// The primary context of one device.
#[derive(Debug)]
pub(crate) struct PrimaryContext {
    device: DeviceHandle,
    /// Null until retained.
    context: AtomicPtr<c_void>,
}

impl PrimaryContext {
    pub(crate) const fn new(device: DeviceHandle) -> PrimaryContext {
        PrimaryContext { device, context: AtomicPtr::new(ptr::null_mut()) }
    }

    /// The context, retained by the first caller.
    pub(crate) fn retain(&self, table: &EntryPoints) -> Result<Opaque, i32> {
        let known = self.context.load(Ordering::Acquire);
        if !known.is_null() {
            return Ok(known);
        }
        let mut mine: Opaque = ptr::null_mut();
        // SAFETY: `device` came from cuDeviceGet; the call writes one pointer.
        let code = unsafe { (table.primary_ctx_retain)(&raw mut mine, self.device) };
        if code != SUCCESS {
            return Err(code);
        }
        let raced = self.context.compare_exchange(ptr::null_mut(), mine, Ordering::AcqRel, Ordering::Acquire);
        if raced.is_err() {
            // SAFETY: drops exactly the reference that this call took; the winner holds its own.
            unsafe { (table.primary_ctx_release)(self.device) };
        }
        Ok(mine)
    }

    /// Whether it exists: because somebody in this process uses the device.
    pub(crate) fn is_active(&self, table: &EntryPoints) -> bool {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: `device` came from cuDeviceGet; the call writes two integers.
        let code = unsafe { (table.primary_ctx_get_state)(self.device, &raw mut flags, &raw mut active) };
        code == SUCCESS && active != 0
    }

    /// Whether `context` is this one. It is not made for the question.
    pub(crate) fn is(&self, context: Opaque, table: &EntryPoints) -> bool {
        self.is_active(table) && self.retain(table) == Ok(context)
    }

    /// Gives the reference back, and takes another one when it is needed again: the program is about to reset the device.
    pub(crate) fn forget(&self, table: &EntryPoints) {
        if !self.context.swap(ptr::null_mut(), Ordering::AcqRel).is_null() {
            // SAFETY: `retain` took one reference, which nobody else can find any more.
            unsafe { (table.primary_ctx_release)(self.device) };
        }
    }

    /// Gives the reference back.
    pub(crate) fn release(&mut self, table: &EntryPoints) {
        if !self.context.get_mut().is_null() {
            *self.context.get_mut() = ptr::null_mut();
            // SAFETY: `retain` took one reference and nobody else can see `self`.
            unsafe { (table.primary_ctx_release)(self.device) };
        }
    }
}

/// A context that is current for as long as this value lives.
pub(crate) struct Current<'a> {
    table: &'a EntryPoints,
    /// The context stack belongs to a thread: this value must not leave it.
    _thread: PhantomData<*const ()>,
}

impl<'a> Current<'a> {
    pub(crate) fn push(table: &'a EntryPoints, context: Opaque) -> Result<Current<'a>, i32> {
        // SAFETY: `context` is retained, and stays so while the driver lives.
        let code = unsafe { (table.ctx_push_current)(context) };
        if code == SUCCESS { Ok(Current { table, _thread: PhantomData }) } else { Err(code) }
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut popped: Opaque = ptr::null_mut();
        // SAFETY: pops what `push` pushed on this thread; `Current` is not Send, so it is this thread's.
        unsafe { (self.table.ctx_pop_current)(&raw mut popped) };
    }
}

/// The calling thread's stream-capture mode is relaxed for as long as this value lives.
///
/// A thread is in the global mode unless it says otherwise, and in that mode a potentially unsafe call (mapping memory, registering host memory, asking
/// an event) fails while *any* thread captures globally, as PyTorch does, and voids that capture (CUDA driver manual,
/// `cuThreadExchangeStreamCaptureMode`). What is called here is never to be part of a capture, and a capture may begin at any moment: so the mode is
/// changed around every call, which costs two calls that only touch the thread's own state.
pub(crate) struct Relaxed<'a> {
    table: &'a EntryPoints,
    before: Option<c_int>,
    /// The mode belongs to a thread: this value must not leave it.
    _thread: PhantomData<*const ()>,
}

impl<'a> Relaxed<'a> {
    pub(crate) fn enter(table: &'a EntryPoints) -> Relaxed<'a> {
        Relaxed { table, before: exchange(table, RELAXED), _thread: PhantomData }
    }
}

impl Drop for Relaxed<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            exchange(self.table, before);
        }
    }
}

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const RELAXED: c_int = 2;

/// Sets the thread's mode; returns what it was, or nothing if the driver refuses even this (it is shut down, or the context is lost).
fn exchange(table: &EntryPoints, mode: c_int) -> Option<c_int> {
    let mut mode = mode;
    // SAFETY: the call reads and writes one integer, and concerns only this thread.
    let code = unsafe { (table.exchange_capture_mode)(&raw mut mode) };
    (code == SUCCESS).then_some(mode)
}
