//! Calls on sessions.

use std::ffi::{OsStr, c_char, c_int, c_uint};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use raio_transport::address::{Endpoint, Scheme};

use super::abi::{
    OPT_CRC, OPT_FD_ALWAYS, OPT_NO_CRC, OPT_NO_KEYS, OPT_NO_RECONNECT, OPT_NO_SPIN, OPT_REDO, raio_options,
};
use super::descriptor::{self, FirstFile};
use super::errors::{c_str, int, invalid, set_message};
use super::file_cache::FileCache;
use super::state::state;
use crate::context::Context;
use crate::error::Error;
use crate::session::{Crc, Keys, Options, Session};

/// See libraio.h.
///
/// # Safety
/// `transport` is null or a C string; `addr` is null or points at `addrlen` bytes (as far as that is a length
/// an address can have).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_start(
    transport: *const c_char,
    addr: *const libc::sockaddr,
    addrlen: libc::socklen_t,
) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the string.
        let transport = unsafe { c_str(transport, "transport") }?;
        if addr.is_null() {
            return Err(invalid("The address is NULL. Pass one."));
        }
        let scheme = match transport {
            b"tcp" => Scheme::Tcp,
            b"rdma" => Scheme::Rdma,
            b"unix" => Scheme::Unix,
            _ => {
                return Err(Error::call(
                    libc::EPROTONOSUPPORT,
                    format!(
                        "Transport {:?} is unknown. Use \"tcp\", \"rdma\" or \"unix\".",
                        String::from_utf8_lossy(transport)
                    ),
                ));
            }
        };
        // SAFETY: the caller vouches for `addrlen` bytes, and `socket_address` reads no more.
        let address = unsafe { socket_address(addr, addrlen as usize) }?;
        if (scheme == Scheme::Unix) != address.ip().is_none() {
            return Err(Error::call(
                libc::EAFNOSUPPORT,
                "The transport has no addresses of this family. \"unix\" has struct sockaddr_un, the others \
                 have sockaddr_in and sockaddr_in6.",
            ));
        }
        let session = Session::connect_to(scheme, address, &Options::default())?;
        Ok(descriptor::add_session(session, FirstFile::IsTheSession))
    })
}

/// Reads a `struct sockaddr`.
///
/// # Safety
/// `addr` points at `len` readable bytes, or `len` is not one that an address can have.
pub(super) unsafe fn socket_address(addr: *const libc::sockaddr, len: usize) -> Result<Endpoint, Error> {
    let wrong = || {
        invalid(format!(
            "The address cannot be {len} bytes long. Pass the size of its struct sockaddr_in, sockaddr_in6 \
             or sockaddr_un."
        ))
    };
    if len < size_of::<libc::sa_family_t>() || len > size_of::<libc::sockaddr_storage>() {
        return Err(wrong());
    }
    // SAFETY: the family is the first field, and there are enough bytes for it.
    let family = unsafe { addr.cast::<libc::sa_family_t>().read_unaligned() };
    match c_int::from(family) {
        libc::AF_INET if len >= size_of::<libc::sockaddr_in>() => {
            // SAFETY: there are enough bytes for one, and its fields are integers.
            let v4 = unsafe { addr.cast::<libc::sockaddr_in>().read_unaligned() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Ok(SocketAddr::from(SocketAddrV4::new(ip, u16::from_be(v4.sin_port))).into())
        }
        libc::AF_INET6 if len >= size_of::<libc::sockaddr_in6>() => {
            // SAFETY: as above.
            let v6 = unsafe { addr.cast::<libc::sockaddr_in6>().read_unaligned() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            let (port, flow) = (u16::from_be(v6.sin6_port), v6.sin6_flowinfo);
            Ok(SocketAddr::from(SocketAddrV6::new(ip, port, flow, v6.sin6_scope_id)).into())
        }
        libc::AF_UNIX if len <= size_of::<libc::sockaddr_un>() => {
            // SAFETY: the caller vouches for `len` bytes, of which those behind the family are the path.
            let path = unsafe {
                let path = addr.cast::<u8>().add(size_of::<libc::sa_family_t>());
                std::slice::from_raw_parts(path, len - size_of::<libc::sa_family_t>())
            };
            let path = path.split(|&byte| byte == 0).next().unwrap_or_default();
            if path.is_empty() {
                return Err(invalid("The address has no path. Pass that of the server's Unix socket."));
            }
            Ok(Endpoint::Unix(OsStr::from_bytes(path).into()))
        }
        libc::AF_INET | libc::AF_INET6 | libc::AF_UNIX => Err(wrong()),
        other => Err(Error::call(
            libc::EAFNOSUPPORT,
            format!("Address family {other} is not supported. Use AF_INET, AF_INET6 or AF_UNIX."),
        )),
    }
}

/// See libraio.h.
///
/// # Safety
/// `url` is null or a C string; `options` is null or points at as many bytes as its first field says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_connect(url: *const c_char, options: *const raio_options) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the string.
        let url = unsafe { c_str(url, "URL") }?;
        let url = std::str::from_utf8(url)
            .map_err(|_| invalid("The URL is not UTF-8. Write it as raio://HOST:PORT."))?;
        let (options, first_file) = if options.is_null() {
            (Options::default(), FirstFile::IsTheSession)
        } else {
            // SAFETY: the caller vouches for as many bytes as the first field says.
            unsafe { read_options(options) }?
        };
        let session = Session::connect(url, &options)?;
        set_message(session.why_tcp().unwrap_or_default());
        Ok(descriptor::add_session(session, first_file))
    })
}

/// The flags of `struct raio_options` that there are.
const OPT_ALL: c_uint =
    OPT_CRC | OPT_NO_CRC | OPT_NO_SPIN | OPT_REDO | OPT_NO_RECONNECT | OPT_NO_KEYS | OPT_FD_ALWAYS;

/// Reads `struct raio_options`: the session's options, and how its first file is named.
///
/// # Safety
/// `options` points at as many readable bytes as its first field says, at least four.
pub(super) unsafe fn read_options(options: *const raio_options) -> Result<(Options, FirstFile), Error> {
    // Beyond a page it is garbage rather than a newer header.
    const SIZE_MAX: usize = 4096;
    // SAFETY: the size is the first field.
    let size = unsafe { options.cast::<c_uint>().read_unaligned() } as usize;
    if !(size_of::<raio_options>()..=SIZE_MAX).contains(&size) {
        return Err(invalid("raio_options.size is invalid. Set it to sizeof(struct raio_options)."));
    }
    // SAFETY: there are at least as many bytes, and all its fields are integers.
    let known = unsafe { options.read_unaligned() };
    let tail = size_of::<raio_options>()..size;
    // SAFETY: the caller vouches for `size` bytes.
    let newer = tail.map(|at| unsafe { options.cast::<u8>().add(at).read() }).any(|byte| byte != 0);
    if newer || known.reserved.iter().any(|&word| word != 0) || known.flags & !OPT_ALL != 0 {
        return Err(invalid(
            "raio_options has something set that this library does not know. Zero it first, and set only \
             what \
             this version's header has.",
        ));
    }
    let defaults = Options::default();
    let ms = |value: c_uint| (value != 0).then(|| Duration::from_millis(value.into()));
    let options = Options {
        queue_depth: known.queue_depth,
        connect_timeout: ms(known.connect_timeout_ms).unwrap_or(defaults.connect_timeout),
        call_timeout: ms(known.call_timeout_ms).unwrap_or(defaults.call_timeout),
        request_timeout: ms(known.request_timeout_ms),
        spin: match (known.flags & OPT_NO_SPIN != 0, known.spin_us) {
            (true, _) => Duration::ZERO,
            (false, 0) => defaults.spin,
            (false, us) => Duration::from_micros(us.into()),
        },
        crc: match known.flags & (OPT_CRC | OPT_NO_CRC) {
            0 => Crc::Auto,
            OPT_CRC => Crc::On,
            OPT_NO_CRC => Crc::Off,
            _ => {
                return Err(invalid(
                    "RAIO_OPT_CRC and RAIO_OPT_NO_CRC exclude each other. Pass one of them, or none.",
                ));
            }
        },
        reconnect: match known.flags & OPT_NO_RECONNECT {
            0 => ms(known.reconnect_ms).unwrap_or(defaults.reconnect),
            _ => Duration::ZERO,
        },
        redo: known.flags & OPT_REDO != 0,
        keys: if known.flags & OPT_NO_KEYS != 0 { Keys::Off } else { Keys::Auto },
    };
    let first_file =
        if known.flags & OPT_FD_ALWAYS != 0 { FirstFile::HasItsOwn } else { FirstFile::IsTheSession };
    Ok((options, first_file))
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_stop(fd: c_int) -> c_int {
    int(|| {
        let (_session, contexts) = descriptor::remove_session(fd)?;
        for address in contexts {
            // SAFETY: the table has addresses of our handles alone; the header forbids that another thread
            // uses them meanwhile.
            if let Ok(state) = unsafe { state(std::ptr::with_exposed_provenance_mut(address)) } {
                state.stats = state.context.as_ref().map_or(state.stats, Context::stats);
                state.context = None;
                state.files = FileCache::default();
            }
        }
        Ok(0)
    })
}
