//! The driver's functions for programs that link `libcuda.so.1`, or that find them in the global order: each asks, once per call site,
//! where its call belongs, and jumps there with every argument as it was.

use crate::names::{self, driver_functions};
use crate::next;
use crate::sire::{self, Found};
use crate::sites;
use std::ffi::{c_int, c_void};

/// There is no driver that has the function (`CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND`).
const SYMBOL_NOT_FOUND: c_int = 302;

/// The address that a call of the table's function goes to. Never null.
extern "C" fn route(function: usize, caller: usize) -> *mut c_void {
    if let Some(target) = sites::known(function, caller) {
        return target;
    }
    let Some(name) = names::EXPORTED.get(function) else { return missing as *mut c_void };
    let found = next::definition(name, caller);
    if found.is_null() {
        // Not remembered: a driver may still come.
        return missing as *mut c_void;
    }
    let target = sire::answer(name, found, caller, Found::Next);
    sites::remember(function, caller, target);
    target
}

/// What is called where there is no driver.
extern "C" fn missing() -> c_int {
    SYMBOL_NOT_FOUND
}

macro_rules! exports {
    ($($name:ident)*) => { exports! { @ 0usize; $($name)* } };
    (@ $number:expr; $name:ident $($rest:ident)*) => {
        /// CUDA's function of this name.
        ///
        /// # Safety
        /// As CUDA's function.
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name() -> c_int {
            jump!($number)
        }
        exports! { @ $number + 1usize; $($rest)* }
    };
    (@ $number:expr;) => {};
}

/// Keeps the six argument registers, asks [`route`], puts them back and jumps.
#[cfg(target_arch = "x86_64")]
macro_rules! jump {
    ($number:expr) => {
        core::arch::naked_asm!(
            "push rdi",
            "push rsi",
            "push rdx",
            "push rcx",
            "push r8",
            "push r9",
            "sub rsp, 8",
            "mov edi, {number}",
            "mov rsi, qword ptr [rsp + 56]",
            "call {route}",
            "add rsp, 8",
            "pop r9",
            "pop r8",
            "pop rcx",
            "pop rdx",
            "pop rsi",
            "pop rdi",
            "jmp rax",
            number = const $number,
            route = sym route,
        )
    };
}

/// The same with AArch64's eight.
#[cfg(target_arch = "aarch64")]
macro_rules! jump {
    ($number:expr) => {
        core::arch::naked_asm!(
            "stp x29, x30, [sp, #-80]!",
            "stp x0, x1, [sp, #16]",
            "stp x2, x3, [sp, #32]",
            "stp x4, x5, [sp, #48]",
            "stp x6, x7, [sp, #64]",
            "mov x0, #{number}",
            "mov x1, x30",
            "bl {route}",
            "mov x16, x0",
            "ldp x0, x1, [sp, #16]",
            "ldp x2, x3, [sp, #32]",
            "ldp x4, x5, [sp, #48]",
            "ldp x6, x7, [sp, #64]",
            "ldp x29, x30, [sp], #80",
            "br x16",
            number = const $number,
            route = sym route,
        )
    };
}

driver_functions!(exports);
