//! Gives libraio.so its soname: programs that are linked with it ask for this name when they start.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libraio.so.0");
}
