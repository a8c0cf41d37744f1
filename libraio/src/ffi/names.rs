//! Calls on paths: each waits for its answer.

use std::ffi::{OsString, c_char, c_int, c_longlong, c_uint, c_ulonglong, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null_mut;

use super::abi::{
    PATH_EXCL, PATH_FSYNC, PATH_NOFOLLOW, check_sized, fill_in, raio_dirent, raio_stat, raio_statfs,
};
use super::descriptor;
use super::errors::{fail, int, invalid, named, run, ssize};
use super::handle::Handle;
use super::state::{DIRS, Directory, idle_dir, new_dir, no_directory, raio_dir};
use super::submit::{check_room, put_options};
use crate::error::Error;
use crate::names::Attributes;
use crate::session::Session;

/// Fails if a call was given flags that it does not take.
fn check_flags(flags: c_uint, known: c_uint) -> Result<(), Error> {
    if flags & !known == 0 {
        return Ok(());
    }
    Err(invalid(format!("Flags {:#x} are not of this call. Clear them.", flags & !known)))
}

/// The caller's bytes.
///
/// # Safety
/// `bytes` is null or points at `len` readable bytes that outlive the result.
unsafe fn bytes_of<'a>(bytes: *const c_void, len: usize) -> Result<&'a [u8], Error> {
    if len == 0 {
        return Ok(&[]);
    }
    if bytes.is_null() || len > isize::MAX as usize {
        return Err(invalid("The buffer is NULL or longer than memory can be. Pass one, and its length."));
    }
    // SAFETY: not null, and the caller vouches for the rest.
    Ok(unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), len) })
}

/// Copies to the caller's memory, which has room. Returns how much.
///
/// # Safety
/// `to` has room for as many bytes, or there are none.
unsafe fn copy_out(bytes: &[u8], to: *mut c_void) -> isize {
    if !bytes.is_empty() {
        // SAFETY: the caller vouches for the room.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast::<u8>(), bytes.len()) };
    }
    bytes.len() as isize
}

/// Names, with a zero byte behind each.
pub(super) fn joined(names: &[OsString]) -> Vec<u8> {
    names.iter().flat_map(|name| name.as_bytes().iter().copied().chain([0])).collect()
}

/// Copies all of these bytes, or says with ERANGE that there is no room. Of size 0 it copies nothing.
///
/// # Safety
/// `to` has room for `size` bytes.
pub(super) unsafe fn copy_all(bytes: &[u8], to: *mut c_void, size: usize) -> Result<isize, Error> {
    match size {
        0 => Ok(bytes.len() as isize),
        _ if bytes.len() > size => {
            let text = format!("{} bytes do not fit in {size}. Pass a larger buffer.", bytes.len());
            Err(Error::call(libc::ERANGE, text))
        }
        // SAFETY: there is room.
        _ => Ok(unsafe { copy_out(bytes, to) }),
    }
}

/// Calls that do something to a path, and have no result.
macro_rules! export {
    ($($name:ident($path:ident $(, $argument:ident: $type:ty)*) => |$session:ident| $call:expr;)*) => {$(
        /// See libraio.h.
        ///
        /// # Safety
        /// The strings are null or C strings.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(fd: c_int, $path: *const c_char $(, $argument: $type)*) -> c_int {
            int(|| {
                let ($session, _) = descriptor::session_of(fd)?;
                // SAFETY: the caller vouches for the strings.
                let $path = unsafe { named($path, "path") }?;
                $call.map(|()| 0)
            })
        }
    )*};
}

/// A second string of such a call.
macro_rules! second {
    ($text:ident) => {
        // SAFETY: the caller of the call vouches for the string.
        unsafe { named($text, "path") }?
    };
}

export! {
    raio_mkdir(path, mode: libc::mode_t) => |session| session.create_dir(path, mode);
    raio_rmdir(path) => |session| session.remove_dir(path);
    raio_unlink(path) => |session| session.remove_file(path);
    raio_rename(from, to: *const c_char, flags: c_uint)
        => |session| rename(&session, from, second!(to), flags);
    raio_link(original, link: *const c_char) => |session| session.hard_link(original, second!(link));
    raio_symlink(target, link: *const c_char) => |session| session.symlink(target, second!(link));
    raio_truncate(path, size: c_ulonglong)
        => |session| session.set_attributes(path, &Attributes { size: Some(size), ..Attributes::default() });
    raio_chmod(path, mode: libc::mode_t)
        => |session| session.set_attributes(path, &Attributes { mode: Some(mode), ..Attributes::default() });
    raio_utimens(path, modified_ns: c_longlong, flags: c_uint)
        => |session| utimens(&session, path, modified_ns, flags);
    raio_removexattr(path, name: *const c_char) => |session| session.remove_xattr(path, second!(name));
}

fn rename(session: &Session, from: &Path, to: &Path, flags: c_uint) -> Result<(), Error> {
    check_flags(flags, PATH_EXCL)?;
    match flags & PATH_EXCL {
        0 => session.rename(from, to),
        _ => session.rename_no_replace(from, to),
    }
}

fn utimens(session: &Session, path: &Path, modified_ns: i64, flags: c_uint) -> Result<(), Error> {
    check_flags(flags, PATH_NOFOLLOW)?;
    let nofollow = flags & PATH_NOFOLLOW != 0;
    session.set_attributes(
        path,
        &Attributes { modified_ns: Some(modified_ns), nofollow, ..Attributes::default() },
    )
}

/// See libraio.h.
///
/// # Safety
/// `path` is null or a C string; `buf` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_stat_path(
    fd: c_int,
    path: *const c_char,
    buf: *mut raio_stat,
    size: usize,
) -> c_int {
    // SAFETY: the caller's contract is the same.
    int(|| unsafe { stat_path(fd, path, buf, size, true) })
}

/// See libraio.h.
///
/// # Safety
/// As [`raio_stat_path`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_lstat_path(
    fd: c_int,
    path: *const c_char,
    buf: *mut raio_stat,
    size: usize,
) -> c_int {
    // SAFETY: the caller's contract is the same.
    int(|| unsafe { stat_path(fd, path, buf, size, false) })
}

/// # Safety
/// As [`raio_stat_path`].
unsafe fn stat_path(
    fd: c_int,
    path: *const c_char,
    buf: *mut raio_stat,
    size: usize,
    follows: bool,
) -> Result<c_int, Error> {
    let (session, _) = descriptor::session_of(fd)?;
    check_sized(buf, size)?;
    // SAFETY: the caller vouches for the string.
    let path = unsafe { named(path, "path") }?;
    let status = if follows { session.metadata(path) } else { session.symlink_metadata(path) }?;
    // SAFETY: just checked, and the caller vouches for `size` bytes.
    unsafe { fill_in(raio_stat::from(&status), buf, size) };
    Ok(0)
}

/// See libraio.h.
///
/// # Safety
/// `path` is null or a C string; `buf` is null or has room for `count` bytes, `stat` for `size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_get(
    fd: c_int,
    path: *const c_char,
    buf: *mut c_void,
    count: usize,
    stat: *mut raio_stat,
    size: usize,
) -> isize {
    ssize(|| {
        let (session, _) = descriptor::session_of(fd)?;
        check_room(buf, count)?;
        if !stat.is_null() {
            check_sized(stat, size)?;
        }
        // SAFETY: the caller vouches for the string.
        let (bytes, status) = session.get(unsafe { named(path, "path") }?, count)?;
        if !stat.is_null() {
            // SAFETY: just checked, and the caller vouches for `size` bytes.
            unsafe { fill_in(raio_stat::from(&status), stat, size) };
        }
        // SAFETY: there are at most `count`, and the caller vouches for as many.
        Ok(unsafe { copy_out(&bytes, buf) })
    })
}

/// See libraio.h.
///
/// # Safety
/// `path` is null or a C string; `buf` is null or points at `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_put(
    fd: c_int,
    path: *const c_char,
    buf: *const c_void,
    count: usize,
    mode: libc::mode_t,
    flags: c_uint,
) -> c_int {
    int(|| {
        let (session, _) = descriptor::session_of(fd)?;
        check_flags(flags, PATH_EXCL | PATH_FSYNC)?;
        // SAFETY: the caller vouches for the string and the bytes.
        let (path, bytes) = unsafe { (named(path, "path")?, bytes_of(buf, count)?) };
        session.put(path, bytes, &put_options(mode, flags, 0)).map(|()| 0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `path` is null or a C string; `buf` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_readlink(
    fd: c_int,
    path: *const c_char,
    buf: *mut c_char,
    size: usize,
) -> isize {
    ssize(|| {
        let (session, _) = descriptor::session_of(fd)?;
        if buf.is_null() || size == 0 {
            return Err(invalid("The buffer for the link is NULL or empty. Pass one."));
        }
        // SAFETY: the caller vouches for the string.
        let target = session.read_link(unsafe { named(path, "path") }?)?;
        let target = target.as_os_str().as_bytes();
        // SAFETY: there is room.
        Ok(unsafe { copy_out(&target[..target.len().min(size)], buf.cast()) })
    })
}

/// See libraio.h.
///
/// # Safety
/// `path` is null or a C string; `buf` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_statfs_path(
    fd: c_int,
    path: *const c_char,
    buf: *mut raio_statfs,
    size: usize,
) -> c_int {
    int(|| {
        let (session, _) = descriptor::session_of(fd)?;
        check_sized(buf, size)?;
        // SAFETY: the caller vouches for the string.
        let status = session.statfs(unsafe { named(path, "path") }?)?;
        // SAFETY: just checked, and the caller vouches for `size` bytes.
        unsafe { fill_in(raio_statfs::from(&status), buf, size) };
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// The strings are null or C strings; `value` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_getxattr(
    fd: c_int,
    path: *const c_char,
    name: *const c_char,
    value: *mut c_void,
    size: usize,
) -> isize {
    ssize(|| {
        let (session, _) = descriptor::session_of(fd)?;
        check_room(value, size)?;
        // SAFETY: the caller vouches for the strings and the room.
        unsafe { copy_all(&session.get_xattr(named(path, "path")?, named(name, "attribute")?)?, value, size) }
    })
}

/// See libraio.h.
///
/// # Safety
/// The strings are null or C strings; `value` is null or points at `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_setxattr(
    fd: c_int,
    path: *const c_char,
    name: *const c_char,
    value: *const c_void,
    size: usize,
    flags: c_uint,
) -> c_int {
    int(|| {
        let (session, _) = descriptor::session_of(fd)?;
        check_flags(flags, PATH_EXCL)?;
        // SAFETY: the caller vouches for the strings and the bytes.
        let (path, name, value) =
            unsafe { (named(path, "path")?, named(name, "attribute")?, bytes_of(value, size)?) };
        session.set_xattr(path, name, value, flags & PATH_EXCL != 0).map(|()| 0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `path` is null or a C string; `list` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_listxattr(
    fd: c_int,
    path: *const c_char,
    list: *mut c_char,
    size: usize,
) -> isize {
    ssize(|| {
        let (session, _) = descriptor::session_of(fd)?;
        check_room(list.cast(), size)?;
        // SAFETY: the caller vouches for the string.
        let names = session.list_xattr(unsafe { named(path, "path") }?)?;
        // SAFETY: the caller vouches for the room.
        unsafe { copy_all(&joined(&names), list.cast(), size) }
    })
}

/// See libraio.h.
///
/// # Safety
/// `path` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_opendir(fd: c_int, path: *const c_char) -> *mut raio_dir {
    run(|| {
        let (session, _) = descriptor::session_of(fd)?;
        // SAFETY: the caller vouches for the string.
        Ok(new_dir(session.read_dir(unsafe { named(path, "path") }?)?))
    })
    .unwrap_or_else(|errno| fail(errno, null_mut()))
}

/// See libraio.h.
///
/// # Safety
/// `dir` is null or points at readable memory; `entry` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_readdir(dir: *mut raio_dir, entry: *mut raio_dirent, size: usize) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the directory.
        let directory = unsafe { idle_dir(dir) }?;
        check_sized(entry, size)?;
        let Directory::Idle(entries) = directory else { return Ok(0) };
        let Some(found) = entries.next().transpose()? else { return Ok(0) };
        // SAFETY: just checked, and the caller vouches for `size` bytes.
        unsafe { fill_in(raio_dirent::from(&found), entry, size) };
        Ok(1)
    })
}

/// See libraio.h.
///
/// # Safety
/// `dir` is null or points at readable memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_closedir(dir: *mut raio_dir) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the directory.
        unsafe { Handle::destroy(&DIRS, dir) }.ok_or_else(no_directory).map(|_| 0)
    })
}
