//! Whether the kernel has TLS.

use raio_transport::tcp;

/// Whether the kernel cannot seal and open records: then it says that `what` is skipped. It panics instead if
/// RAIO_TEST_NEEDS_KTLS is set.
pub fn no_kernel_tls(what: &str) -> bool {
    let Some(why) = tcp::no_kernel_tls() else { return false };
    assert!(std::env::var_os("RAIO_TEST_NEEDS_KTLS").is_none(), "there is no TLS of the kernel's: {why}");
    eprintln!("SKIPPED: {what} needs TLS of the kernel's: {why}.");
    true
}
