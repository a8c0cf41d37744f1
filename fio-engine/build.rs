//! Compiles `engine.c` against the headers of exactly the fio that will load it.
//!
//! `FIO_INCLUDE` is that fio's source tree, configured; `scripts/build-fio-engine` finds it. fio's structures
//! differ between its releases, and its own check at load does not see every difference, so the versions are
//! compared here already, and again when fio loads the engine. Without `FIO_INCLUDE` the crate is an empty
//! library, so that the whole workspace builds on a machine without fio's sources.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};

fn main() {
    println!("cargo::rerun-if-env-changed=FIO_INCLUDE");
    println!("cargo::rerun-if-env-changed=FIO");
    println!("cargo::rerun-if-changed=engine.c");
    println!("cargo::rerun-if-changed=../libraio/include/libraio.h");

    println!("cargo::rustc-check-cfg=cfg(fio_headers)");

    let Some(include) = std::env::var_os("FIO_INCLUDE").map(PathBuf::from) else {
        println!(
            "cargo::warning=FIO_INCLUDE is not set, so libraio_fio.so has no engine in it. Build the engine \
             with scripts/build-fio-engine, which finds the headers of the installed fio, or set FIO_INCLUDE \
             to the source tree of the fio that will load it."
        );
        return;
    };
    println!("cargo::rustc-cfg=fio_headers");
    let headers = headers_version(&include);
    match running_version() {
        Some(running) if running != headers => fail(&format!(
            "FIO_INCLUDE holds the headers of {headers}, but the fio in PATH is {running}. Set FIO_INCLUDE \
             to the source tree of {running}, or FIO to the fio that will load the engine."
        )),
        Some(_) => {}
        None => println!(
            "cargo::warning=fio does not run here, so its version was not compared with the headers'"
        ),
    }

    cc::Build::new()
        .file("engine.c")
        .std("gnu99")
        .include("../libraio/include")
        // fio's headers are not ours to warn about.
        .flag("-isystem")
        .flag(&include)
        .flag("-include")
        .flag(include.join("config-host.h"))
        .define("_GNU_SOURCE", None)
        .define("FIO_VERSION", format!("\"{headers}\"").as_str())
        .define("RAIO_FIO_VERSION", format!("\"{headers}\"").as_str())
        .extra_warnings(true)
        // A hook whose signature this fio has changed: older compilers than gcc 14 only warn.
        .flag("-Werror=incompatible-pointer-types")
        .compile("raio_fio_engine");

    // The engine calls the libraio inside it, even in a process that has loaded a libraio.so of its own.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-Bsymbolic");
}

/// The version that the tree's own `make` gives its fio.
fn headers_version(include: &Path) -> String {
    for (file, remedy) in [
        ("fio.h", "Set it to a fio source tree"),
        ("config-host.h", "Run ./configure there"),
        ("FIO-VERSION-FILE", "Run `make FIO-VERSION-FILE` there"),
    ] {
        let path = include.join(file);
        println!("cargo::rerun-if-changed={}", path.display());
        if !path.exists() {
            fail(&format!("There is no {file} in FIO_INCLUDE={}. {remedy}.", include.display()));
        }
    }
    let path = include.join("FIO-VERSION-FILE");
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    match text.trim().strip_prefix("FIO_VERSION = ") {
        Some(version) => version.to_owned(),
        None => fail(&format!("{} names no version. Run `make FIO-VERSION-FILE` there.", path.display())),
    }
}

/// What `fio --version` says, if there is a fio to ask.
fn running_version() -> Option<String> {
    let fio = std::env::var_os("FIO").unwrap_or_else(|| "fio".into());
    let output = Command::new(fio).arg("--version").output().ok()?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

fn fail(sentence: &str) -> ! {
    println!("cargo::error={sentence}");
    exit(1)
}
