//! Makes the bindings to libibverbs and librdmacm that the feature `rdma` needs, from the headers of this
//! system.
//!
//! Only types and constants: the functions are looked up at run time (`src/rdma/verbs.rs`), so that one
//! binary serves machines with and without the libraries.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "rdma")]
    bindings();
}

#[cfg(feature = "rdma")]
fn bindings() {
    let header = "#include <infiniband/verbs.h>\n#include <rdma/rdma_cma.h>\n";
    // Without libclang bindgen panics.
    std::panic::set_hook(Box::new(|_| {}));
    let generated = std::panic::catch_unwind(|| {
        bindgen::builder()
            .header_contents("rdma.h", header)
            .allowlist_type("(ibv|rdma)_.*")
            .allowlist_var("(IBV|RDMA)_.*")
            .ignore_functions()
            .prepend_enum_name(false)
            .derive_default(true)
            .layout_tests(false)
            .generate_comments(false)
            .generate()
            .map_err(|error| error.to_string())
    });
    let _ = std::panic::take_hook();
    let why = match generated {
        Ok(Ok(bindings)) => {
            let out =
                std::path::Path::new(&std::env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("verbs.rs");
            match bindings.write_to_file(&out) {
                Ok(()) => return,
                Err(error) => format!("{} cannot be written: {error}", out.display()),
            }
        }
        Ok(Err(error)) => error.lines().next().unwrap_or_default().to_owned(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("bindgen failed");
            text.lines().next().unwrap_or_default().to_owned()
        }
    };
    println!(
        "cargo::error=The RDMA transport needs the headers of libibverbs and librdmacm, and libclang to read \
         them ({why}). Install the packages libibverbs-dev, librdmacm-dev and libclang-dev (Debian's names), \
         or build without RDMA: cargo build --no-default-features."
    );
    std::process::exit(1);
}
