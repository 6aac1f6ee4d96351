//! How the library is linked: under its own name, and to stay.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Programs hold addresses of its functions: it must never be unloaded.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libsire_driver.so");
}
