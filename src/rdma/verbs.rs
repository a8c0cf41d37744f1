//! libibverbs and librdmacm, found at run time.
//!
//! The types are the system's own (bindgen, from `build.rs`); the functions are looked up in the libraries
//! when RDMA is first asked for. So one binary runs where there is no RDMA at all: [`verbs`] then says why.
//! The four calls of the data path are not functions of a library but go through the device's own table, as
//! the C headers' inline functions do.

use std::ffi::{c_char, c_int, c_void};
use std::io;
use std::sync::OnceLock;

pub(super) use bindings::*;

#[allow(
    missing_docs,
    dead_code,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    unsafe_op_in_unsafe_fn,
    unnecessary_transmutes,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/verbs.rs"));
}

/// Loads lib`name`.so.1, for ever.
fn open(name: &str) -> Result<std::mem::ManuallyDrop<libloading::Library>, String> {
    // SAFETY: the libraries of rdma-core, whose constructors set up their own state and nothing else.
    let library = unsafe { libloading::Library::new(format!("lib{name}.so.1")) };
    let library = library.map_err(|_| format!("the library of the package lib{name}1 is not installed"))?;
    Ok(std::mem::ManuallyDrop::new(library))
}

/// Declares the table of functions, and how it is filled.
macro_rules! functions {
    ($($library:ident { $(fn $name:ident($($type:ty),* $(,)?) $(-> $result:ty)?;)* })*) => {
        /// The functions of both libraries.
        pub(super) struct Verbs {
            $($(pub $name: unsafe extern "C" fn($($type),*) $(-> $result)?,)*)*
        }

        impl Verbs {
            fn load() -> Result<Self, String> {
                $(let $library = open(stringify!($library))?;)*
                Ok(Self {
                    $($(
                        // SAFETY: the type is that of the function's declaration in the library's header, and
                        // the library is never unloaded.
                        $name: unsafe { $library.get(concat!(stringify!($name), "\0").as_bytes()) }
                            .map(|symbol| *symbol)
                            .map_err(|_| concat!(
                                "the libraries of rdma-core are too old, they have no ", stringify!($name)
                            ).to_owned())?,
                    )*)*
                })
            }
        }
    };
}

functions! {
    ibverbs {
        fn ibv_get_device_list(*mut c_int) -> *mut *mut ibv_device;
        fn ibv_free_device_list(*mut *mut ibv_device);
        fn ibv_get_device_name(*mut ibv_device) -> *const c_char;
        fn ibv_query_device(*mut ibv_context, *mut ibv_device_attr) -> c_int;
        fn ibv_query_port(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
        fn _ibv_query_gid_ex(*mut ibv_context, u32, u32, *mut ibv_gid_entry, u32, usize) -> c_int;
        fn ibv_alloc_pd(*mut ibv_context) -> *mut ibv_pd;
        fn ibv_dealloc_pd(*mut ibv_pd) -> c_int;
        fn ibv_reg_mr(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
        fn ibv_dereg_mr(*mut ibv_mr) -> c_int;
        fn ibv_create_comp_channel(*mut ibv_context) -> *mut ibv_comp_channel;
        fn ibv_destroy_comp_channel(*mut ibv_comp_channel) -> c_int;
        fn ibv_create_cq(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
        fn ibv_destroy_cq(*mut ibv_cq) -> c_int;
        fn ibv_get_cq_event(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
        fn ibv_ack_cq_events(*mut ibv_cq, u32);
        fn ibv_create_qp(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
        fn ibv_destroy_qp(*mut ibv_qp) -> c_int;
        fn ibv_modify_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
        fn ibv_get_async_event(*mut ibv_context, *mut ibv_async_event) -> c_int;
        fn ibv_ack_async_event(*mut ibv_async_event);
        fn ibv_event_type_str(ibv_event_type) -> *const c_char;
        fn ibv_wc_status_str(ibv_wc_status) -> *const c_char;
    }
    rdmacm {
        fn rdma_get_devices(*mut c_int) -> *mut *mut ibv_context;
        fn rdma_create_event_channel() -> *mut rdma_event_channel;
        fn rdma_destroy_event_channel(*mut rdma_event_channel);
        fn rdma_create_id(
            *mut rdma_event_channel,
            *mut *mut rdma_cm_id,
            *mut c_void,
            rdma_port_space,
        ) -> c_int;
        fn rdma_destroy_id(*mut rdma_cm_id) -> c_int;
        fn rdma_migrate_id(*mut rdma_cm_id, *mut rdma_event_channel) -> c_int;
        fn rdma_bind_addr(*mut rdma_cm_id, *mut sockaddr) -> c_int;
        fn rdma_resolve_addr(*mut rdma_cm_id, *mut sockaddr, *mut sockaddr, c_int) -> c_int;
        fn rdma_resolve_route(*mut rdma_cm_id, c_int) -> c_int;
        fn rdma_create_qp(*mut rdma_cm_id, *mut ibv_pd, *mut ibv_qp_init_attr) -> c_int;
        fn rdma_listen(*mut rdma_cm_id, c_int) -> c_int;
        fn rdma_get_src_port(*mut rdma_cm_id) -> u16;
        fn rdma_connect(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
        fn rdma_accept(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
        fn rdma_reject(*mut rdma_cm_id, *const c_void, u8) -> c_int;
        fn rdma_disconnect(*mut rdma_cm_id) -> c_int;
        fn rdma_set_option(*mut rdma_cm_id, c_int, c_int, *mut c_void, usize) -> c_int;
        fn rdma_get_cm_event(*mut rdma_event_channel, *mut *mut rdma_cm_event) -> c_int;
        fn rdma_ack_cm_event(*mut rdma_cm_event) -> c_int;
    }
}

impl std::fmt::Debug for Verbs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verbs")
    }
}

/// The libraries' functions, or why there are none, as the rest of an error message.
pub(super) fn verbs() -> Result<&'static Verbs, &'static str> {
    static VERBS: OnceLock<Result<Verbs, String>> = OnceLock::new();
    VERBS.get_or_init(Verbs::load).as_ref().map_err(String::as_str)
}

/// What a call of the libraries gave: they say errors in errno (-1) or directly (an errno).
pub(super) fn check(result: c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        errno => Err(io::Error::from_raw_os_error(errno.abs())),
    }
}

/// The pointer that a call gave, or the error behind its being null.
pub(super) fn not_null<T>(pointer: *mut T) -> io::Result<std::ptr::NonNull<T>> {
    std::ptr::NonNull::new(pointer).ok_or_else(io::Error::last_os_error)
}

/// A string of the libraries'.
///
/// # Safety
/// `text` is null or a C string that is never freed.
pub(super) unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return "unknown".into();
    }
    // SAFETY: not null, and the caller vouches for the rest.
    unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// ibv_post_send(3): what the header has as an inline function.
///
/// # Safety
/// `qp` is alive, `wr` a chain of work requests with their lists, which need to live for the call only; the
/// memory that they name stays registered until their completions, or the queue pair's destruction.
pub(super) unsafe fn post_send(qp: *mut ibv_qp, wr: *mut ibv_send_wr) -> io::Result<()> {
    let mut bad = std::ptr::null_mut();
    // SAFETY: a live queue pair has a live context; providers always set this entry.
    let post = unsafe { (*(*qp).context).ops.post_send }.expect("the device can post");
    // SAFETY: the caller vouches for the arguments.
    check(unsafe { post(qp, wr, &mut bad) })
}

/// ibv_post_recv(3).
///
/// # Safety
/// As [`post_send`].
pub(super) unsafe fn post_recv(qp: *mut ibv_qp, wr: *mut ibv_recv_wr) -> io::Result<()> {
    let mut bad = std::ptr::null_mut();
    // SAFETY: as in `post_send`.
    let post = unsafe { (*(*qp).context).ops.post_recv }.expect("the device can post");
    // SAFETY: the caller vouches for the arguments.
    check(unsafe { post(qp, wr, &mut bad) })
}

/// ibv_alloc_mw(3), of type 2.
///
/// # Safety
/// `pd` is alive.
pub(super) unsafe fn alloc_window(pd: *mut ibv_pd) -> io::Result<std::ptr::NonNull<ibv_mw>> {
    // SAFETY: a live protection domain has a live context.
    let alloc = unsafe { (*(*pd).context).ops.alloc_mw };
    let alloc = alloc.ok_or_else(|| io::Error::from_raw_os_error(libc::EOPNOTSUPP))?;
    // SAFETY: the caller vouches for the domain.
    not_null(unsafe { alloc(pd, IBV_MW_TYPE_2) })
}

/// ibv_dealloc_mw(3).
///
/// # Safety
/// `window` is alive, and not used any more.
pub(super) unsafe fn dealloc_window(window: *mut ibv_mw) -> io::Result<()> {
    // SAFETY: a live window has a live context; providers that make windows can end them.
    let dealloc = unsafe { (*(*window).context).ops.dealloc_mw }.expect("the device made the window");
    // SAFETY: the caller vouches for the window.
    check(unsafe { dealloc(window) })
}

/// ibv_poll_cq(3): how many of `wcs` were filled.
///
/// # Safety
/// `cq` is alive.
pub(super) unsafe fn poll_cq(cq: *mut ibv_cq, wcs: &mut [ibv_wc]) -> io::Result<usize> {
    // SAFETY: a live queue has a live context; providers always set this entry.
    let poll = unsafe { (*(*cq).context).ops.poll_cq }.expect("the device can be polled");
    // SAFETY: the caller vouches for the queue, and there is room for `wcs.len()`.
    let n = unsafe { poll(cq, wcs.len() as c_int, wcs.as_mut_ptr()) };
    if n < 0 { Err(io::Error::from_raw_os_error(-n)) } else { Ok(n as usize) }
}

/// ibv_req_notify_cq(3).
///
/// # Safety
/// `cq` is alive.
pub(super) unsafe fn req_notify_cq(cq: *mut ibv_cq) -> io::Result<()> {
    // SAFETY: as in `poll_cq`.
    let notify = unsafe { (*(*cq).context).ops.req_notify_cq }.expect("the device can notify");
    // SAFETY: the caller vouches for the queue.
    check(unsafe { notify(cq, 0) })
}
