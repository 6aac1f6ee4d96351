//! `std::function` of libstdc++, as far as PyTorch makes us meet it: one that is handed to us (the filter of a private pool), and ones that we hand over
//! (what PyTorch is to call). Its layout has been the same since GCC 5 and is part of libstdc++'s ABI: 16 bytes for what is called, a manager that
//! copies and destroys them, and an invoker that takes every argument by reference.

use std::ffi::{c_int, c_void};

/// What is called, or where it is.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Callee([usize; 2]);

/// What a manager is to do (`std::_Manager_operation`).
const CLONE: c_int = 2;
const DESTROY: c_int = 3;

type Manager = unsafe extern "C-unwind" fn(*mut Callee, *const Callee, c_int) -> bool;

/// A `std::function`. Whoever made it destroys it.
#[repr(C)]
pub(super) struct Function {
    callee: Callee,
    manager: Option<Manager>,
    invoker: *const c_void,
}

impl Function {
    /// One that calls `invoker`, which takes a `*const Callee` and a pointer to each argument, and keeps nothing.
    pub(super) fn of(invoker: *const c_void) -> Function {
        Function { callee: Callee([0; 2]), manager: Some(manage_nothing), invoker }
    }
}

/// Nothing is kept: there is nothing to copy but the bytes, and nothing to destroy.
unsafe extern "C-unwind" fn manage_nothing(to: *mut Callee, from: *const Callee, operation: c_int) -> bool {
    if operation == CLONE {
        // SAFETY: for this operation libstdc++ passes two callees.
        unsafe { *to = *from };
    }
    false
}

/// Our copy of a `std::function<bool(cudaStream_t)>`: which streams' allocations a private pool takes.
pub(super) struct Filter(Function);

// SAFETY: PyTorch calls its own copy from every thread that allocates, at the same time; so may we.
unsafe impl Send for Filter {}
// SAFETY: as above.
unsafe impl Sync for Filter {}

impl Filter {
    /// Copies what the caller passed.
    ///
    /// # Safety
    /// `filter` is NULL or a `std::function<bool(cudaStream_t)>`.
    pub(super) unsafe fn copy(filter: *const c_void) -> Filter {
        let mut copy = Function { callee: Callee([0; 2]), manager: None, invoker: std::ptr::null() };
        let filter = filter.cast::<Function>();
        if filter.is_null() {
            return Filter(copy);
        }
        // SAFETY: the caller's promise; the fields are read, not moved.
        let (manager, invoker) = unsafe { ((*filter).manager, (*filter).invoker) };
        if let Some(manager) = manager {
            // SAFETY: the manager belongs to this callee, and constructs a copy in ours.
            unsafe { manager(&raw mut copy.callee, &raw const (*filter).callee, CLONE) };
            (copy.manager, copy.invoker) = (Some(manager), invoker);
        }
        Filter(copy)
    }

    /// Whether an allocation on `stream` is the pool's. An empty function takes all.
    pub(super) fn takes(&self, stream: *mut c_void) -> bool {
        if self.0.invoker.is_null() {
            return true;
        }
        type Invoker = unsafe extern "C-unwind" fn(*const Callee, *const *mut c_void) -> bool;
        // SAFETY: an invoker of a function that takes a stream and returns a bool has this signature.
        let invoker = unsafe { std::mem::transmute::<*const c_void, Invoker>(self.0.invoker) };
        // SAFETY: the callee is a copy that its own manager made.
        unsafe { invoker(&raw const self.0.callee, &raw const stream) }
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        if let Some(manager) = self.0.manager {
            // SAFETY: the callee is a copy that this manager made, and is destroyed once.
            unsafe { manager(&raw mut self.0.callee, &raw const self.0.callee, DESTROY) };
        }
    }
}
