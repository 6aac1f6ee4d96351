//! Raising a C++ exception from Rust, without linking C++.
//!
//! The process that wants the exception has libc10 and libstdc++ loaded; what is needed of them is looked up when the time comes,
//! through libc10's own library first. The exception object is made as the C++ compiler would: allocate it, construct it in
//! place, throw it with its type's `typeinfo` and destructor.
//!
//! If nothing can be thrown (a C program that calls `sire_torch_malloc`), NULL is returned after all.

use super::library::Library;
use crate::log;
use sire_core::error::{Error, Status};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::mem::transmute;
use std::ptr;

/// Bytes set aside for a c10 exception. Its class has about 130; the constructor writes as many as it needs.
const EXCEPTION_ROOM: usize = 1024;

/// Raises the exception for `error`, or returns NULL if nothing can be thrown.
pub(super) fn raise(error: Error, bytes: isize, device: c_int) -> *mut c_void {
    let short = error.status == Status::OutOfDeviceMemory;
    let text = if short {
        format!("CUDA out of memory. Tried to allocate {bytes} bytes on device {device} through Sire: {error}")
    } else {
        format!("Sire could not allocate {bytes} bytes on device {device}: {error}")
    };
    drop(error);
    // Nothing with a destructor may be alive when the exception leaves: `Ready` is plain pointers.
    match prepare(short, &text) {
        Some(ready) => {
            drop(text);
            // SAFETY: the object is constructed, and type and destructor are its class's.
            unsafe { (ready.throw)(ready.object, ready.type_info, ready.destructor) }
        }
        None => {
            log::error!("{text} (no C++ runtime is loaded that could raise it)");
            ptr::null_mut()
        }
    }
}

type Destructor = Option<unsafe extern "C" fn(*mut c_void)>;
type Throw = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, Destructor) -> !;

/// A constructed exception, about to be thrown.
#[derive(Clone, Copy)]
struct Ready {
    throw: Throw,
    object: *mut c_void,
    type_info: *mut c_void,
    destructor: Destructor,
}

fn prepare(short: bool, text: &str) -> Option<Ready> {
    // libc10_cuda's search order covers libc10, and has the type of older releases, which libc10 itself lacks.
    let library = Library::loaded(c"libc10_cuda.so").or_else(|| Library::loaded(c"libc10.so"));
    let from_torch =
        library.and_then(
            |library| if short { library.c10_error(&OUT_OF_MEMORY, text) } else { library.c10_error(&PLAIN, text) },
        );
    from_torch.or_else(|| {
        let library = Library::loaded(c"libstdc++.so.6")?;
        if short { library.bad_alloc() } else { library.runtime_error(text) }
    })
}

/// The mangled names of one exception class of libc10.
struct Class {
    constructor: &'static CStr,
    type_info: &'static CStr,
    vtable: &'static CStr,
}

/// `c10::OutOfMemoryError(SourceLocation, std::string)`. Releases before 2.15 inherit the constructor and export only the type.
const OUT_OF_MEMORY: Class = Class {
    constructor:
        c"_ZN3c1016OutOfMemoryErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
    type_info: c"_ZTIN3c1016OutOfMemoryErrorE",
    vtable: c"_ZTVN3c1016OutOfMemoryErrorE",
};

/// `c10::Error(SourceLocation, std::string)`: Python's RuntimeError.
const PLAIN: Class = Class {
    constructor: c"_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
    type_info: c"_ZTIN3c105ErrorE",
    vtable: c"_ZTVN3c105ErrorE",
};

/// `c10::SourceLocation`.
#[repr(C)]
#[derive(Clone, Copy)]
struct SourceLocation {
    function: *const c_char,
    file: *const c_char,
    line: c_uint,
}

/// A `std::string` of libstdc++'s new ABI (the one that the mangled names speak of).
#[repr(C)]
struct CxxString {
    start: *mut c_char,
    len: usize,
    /// Short text lies here; long text leaves its capacity in the first word.
    inline: [usize; 2],
}

impl Library {
    fn throw(self) -> Option<Throw> {
        let found = self.symbol(c"__cxa_throw")?;
        // SAFETY: the signature is the C++ ABI's.
        Some(unsafe { transmute::<*mut c_void, Throw>(found) })
    }

    fn allocate(self, bytes: usize) -> Option<*mut c_void> {
        let found = self.symbol(c"__cxa_allocate_exception")?;
        // SAFETY: the signature is the C++ ABI's.
        let allocate = unsafe { transmute::<*mut c_void, unsafe extern "C" fn(usize) -> *mut c_void>(found) };
        // SAFETY: never returns NULL; it terminates if there is nothing left at all.
        let object = unsafe { allocate(bytes) };
        // SAFETY: `bytes` were just allocated.
        unsafe { object.cast::<u8>().write_bytes(0, bytes) };
        Some(object)
    }

    /// The complete-object destructor: the first function of a class with a virtual destructor first, as std::exception.
    fn destructor_in(self, vtable: &CStr) -> Option<Destructor> {
        let table = self.symbol(vtable)?.cast::<*mut c_void>();
        // SAFETY: a vtable begins with the offset to the top and the typeinfo; functions follow.
        let first = unsafe { *table.add(2) };
        // SAFETY: destructors take the object and return nothing.
        Some(unsafe { transmute::<*mut c_void, Destructor>(first) })
    }

    /// Constructs a c10 exception that says `text`.
    fn c10_error(self, class: &Class, text: &str) -> Option<Ready> {
        type Construct = unsafe extern "C-unwind" fn(*mut c_void, SourceLocation, *mut CxxString);
        let constructor = self.symbol(class.constructor).or_else(|| self.symbol(PLAIN.constructor))?;
        let type_info = self.symbol(class.type_info)?;
        let vtable = self.symbol(class.vtable)?.cast::<*mut c_void>();
        let destructor = self.destructor_in(class.vtable)?;
        let throw = self.throw()?;
        let strings = Strings::of(self)?;
        let object = self.allocate(EXCEPTION_ROOM)?;
        let here = SourceLocation { function: c"sire_torch_malloc".as_ptr(), file: c"sire".as_ptr(), line: 0 };
        let mut message = strings.make(text);
        // SAFETY: the signature is what the mangled name spells: a 24-byte struct by value goes on the stack, a
        // class with a destructor by reference to a temporary of the caller's.
        let construct = unsafe { transmute::<*mut c_void, Construct>(constructor) };
        // SAFETY: the object has room; the string is a valid one, destroyed by us afterwards as C++'s caller does.
        unsafe { construct(object, here, &raw mut message) };
        strings.destroy(&mut message);
        // The class adds nothing to its base but its identity: what an inherited constructor would have stored last.
        // SAFETY: the object's first word is its vtable pointer, which points behind the table's two-word head.
        unsafe { object.cast::<*mut *mut c_void>().write(vtable.add(2)) };
        Some(Ready { throw, object, type_info, destructor })
    }

    /// `std::bad_alloc`: an object of nothing but its vtable.
    fn bad_alloc(self) -> Option<Ready> {
        let table = self.symbol(c"_ZTVSt9bad_alloc")?.cast::<*mut c_void>();
        let type_info = self.symbol(c"_ZTISt9bad_alloc")?;
        let destructor = self.destructor_in(c"_ZTVSt9bad_alloc")?;
        let throw = self.throw()?;
        let object = self.allocate(size_of::<*mut c_void>())?;
        // SAFETY: the object's only word points behind the vtable's two-word head.
        unsafe { object.cast::<*mut *mut c_void>().write(table.add(2)) };
        Some(Ready { throw, object, type_info, destructor })
    }

    /// `std::runtime_error(text)`.
    fn runtime_error(self, text: &str) -> Option<Ready> {
        let constructor = self.symbol(c"_ZNSt13runtime_errorC1EPKc")?;
        let type_info = self.symbol(c"_ZTISt13runtime_error")?;
        let destructor = self.destructor_in(c"_ZTVSt13runtime_error")?;
        let throw = self.throw()?;
        let text = CString::new(text).ok()?;
        let object = self.allocate(4 * size_of::<*mut c_void>())?;
        // SAFETY: the signature is what the mangled name spells.
        let construct =
            unsafe { transmute::<*mut c_void, unsafe extern "C-unwind" fn(*mut c_void, *const c_char)>(constructor) };
        // SAFETY: the object has room (two words); the text is copied by the constructor.
        unsafe { construct(object, text.as_ptr()) };
        Some(Ready { throw, object, type_info, destructor })
    }
}

/// C++'s `operator new` and `operator delete`, whichever the process uses.
struct Strings {
    new: unsafe extern "C-unwind" fn(usize) -> *mut c_void,
    delete: unsafe extern "C" fn(*mut c_void),
}

impl Strings {
    fn of(library: Library) -> Option<Strings> {
        let new = library.symbol(c"_Znwm")?;
        let delete = library.symbol(c"_ZdlPv")?;
        // SAFETY: the signatures are what the mangled names spell.
        Some(unsafe {
            Strings {
                new: transmute::<*mut c_void, unsafe extern "C-unwind" fn(usize) -> *mut c_void>(new),
                delete: transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void)>(delete),
            }
        })
    }

    /// A string on the heap: it may then be moved from like any other.
    fn make(&self, text: &str) -> CxxString {
        // SAFETY: room for the text and its NUL.
        let start = unsafe { (self.new)(text.len() + 1) }.cast::<u8>();
        // SAFETY: `start` has room for the text and its NUL.
        unsafe {
            ptr::copy_nonoverlapping(text.as_ptr(), start, text.len());
            start.add(text.len()).write(0);
        }
        CxxString { start: start.cast(), len: text.len(), inline: [text.len(), 0] }
    }

    /// What is left after the constructor moved from it, or not.
    fn destroy(&self, string: &mut CxxString) {
        if !ptr::eq(string.start.cast(), string.inline.as_ptr()) {
            // SAFETY: a start elsewhere than inline is memory of `operator new` that the string owns.
            unsafe { (self.delete)(string.start.cast()) };
        }
    }
}
