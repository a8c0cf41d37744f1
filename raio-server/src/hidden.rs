//! Why a service of systemd does not see, or may not write to, what is exported: the settings of a unit that
//! hide parts of the file system, and what to write into a drop-in.
//!
//! | setting | how it is told |
//! |---|---|
//! | `ProtectHome=yes` | /proc/self/mountinfo has a directory of systemd's on /home, /root or /run/user |
//! | `ProtectHome=tmpfs` | there is a tmpfs. It may be one of the machine's own, so the text says "perhaps" |
//! | `PrivateTmp=` | there is a directory `systemd-private-*` on /tmp or /var/tmp |
//! | `ProtectSystem=`, `ReadOnlyPaths=` | the mount is read-only, its file system is not; perhaps for all |
//! | `PrivateDevices=` | /dev is no devtmpfs |
//! | `DevicePolicy=` | the open of a device fails with EPERM, which permissions do not cause |

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use rustix::io::Errno;

/// The directories that `ProtectHome=` is about.
const HOMES: [&str; 3] = ["/home", "/root", "/run/user"];

/// Adds to the error of a path that is to be exported what hides it, if this is a service of systemd.
pub fn explain(error: anyhow::Error, path: &Path, is_writable: bool) -> anyhow::Error {
    let errno = error.chain().find_map(|cause| match cause.downcast_ref::<std::io::Error>() {
        Some(error) => error.raw_os_error().map(Errno::from_raw_os_error),
        None => cause.downcast_ref::<Errno>().copied(),
    });
    match errno.and_then(|errno| remedy(errno, path, is_writable)) {
        Some(remedy) => anyhow!("{}. {remedy}", format!("{error:#}").trim_end_matches('.')),
        None => error,
    }
}

/// What hides a path from this service, and how it can be changed. None: nothing that is known of.
pub fn remedy(errno: Errno, path: &Path, is_writable: bool) -> Option<String> {
    let unit = unit()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let path = std::path::absolute(path).ok()?;
    Some(Hiding::find(&mounts, &path, errno)?.remedy(&unit, &path, is_writable))
}

/// The unit of the system's manager that this process is the service of.
fn unit() -> Option<String> {
    std::env::var_os("INVOCATION_ID")?;
    unit_of(&std::fs::read_to_string("/proc/self/cgroup").ok()?)
}

fn unit_of(groups: &str) -> Option<String> {
    // The systemd hierarchy of version 1 of control groups, or the one of version 2.
    let path = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        matches!(controllers, "" | "name=systemd").then(|| path.to_owned())
    };
    let path = groups.lines().find_map(path)?;
    let (above, name) = path.rsplit_once('/')?;
    // A user's manager has its drop-ins elsewhere, and hides nothing that it cannot mount.
    (name.ends_with(".service") && !above.contains("/user@")).then(|| name.to_owned())
}

/// A mount, as /proc/self/mountinfo has it.
#[derive(Debug)]
struct Mount<'a> {
    /// What of its file system.
    root: PathBuf,
    point: PathBuf,
    is_read_only: bool,
    file_system: &'a str,
    has_read_only_file_system: bool,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (front, back) = line.split_once(" - ")?;
        let mut front = front.split(' ').skip(3);
        let (root, point, options) = (front.next()?, front.next()?, front.next()?);
        let mut back = back.split(' ');
        let (file_system, super_options) = (back.next()?, back.nth(1)?);
        let is_read_only = |options: &str| options.split(',').any(|option| option == "ro");
        Some(Self {
            root: unescaped(root),
            point: unescaped(point),
            is_read_only: is_read_only(options),
            file_system,
            has_read_only_file_system: is_read_only(super_options),
        })
    }

    /// The one that a path is on: of those that are mounted on the same directory the last.
    fn of(mounts: &'a str, path: &Path) -> Option<Self> {
        let mounts = mounts.lines().filter_map(Self::parse).filter(|mount| path.starts_with(&mount.point));
        mounts.max_by_key(|mount| mount.point.components().count())
    }
}

/// A path of mountinfo: blanks, line feeds and backslashes are `\` and three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, others @ ..] = rest {
        let digits = others.get(..3).filter(|_| *first == b'\\');
        let octal = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &others[3..] } else { others };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// What hides a path.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Hiding {
    /// `ProtectHome=` this directory; whether that is sure.
    Home(PathBuf, bool),
    /// `InaccessiblePaths=` has this one.
    Inaccessible(PathBuf),
    /// `PrivateTmp=` this directory.
    Temporary(PathBuf),
    /// What is mounted on this directory is read-only, by `ProtectSystem=` perhaps.
    ReadOnly(PathBuf),
    /// `PrivateDevices=`.
    Devices,
    /// `DevicePolicy=`.
    DevicePolicy,
}

impl Hiding {
    /// What has made an access to an absolute path fail in this way.
    fn find(mounts: &str, path: &Path, errno: Errno) -> Option<Self> {
        let mount = Mount::of(mounts, path)?;
        let point = mount.point;
        let is_home = HOMES.iter().any(|home| point == Path::new(home));
        match errno {
            Errno::NOENT | Errno::ACCESS => {
                let root = mount.root.to_string_lossy();
                let is_inaccessible = root.contains("/systemd/inaccessible/");
                if root.contains("/systemd-private-") {
                    return Some(Self::Temporary(point));
                }
                match (is_inaccessible, is_home) {
                    (true, true) => Some(Self::Home(point, true)),
                    (true, false) => Some(Self::Inaccessible(point)),
                    (false, true) if mount.file_system == "tmpfs" => Some(Self::Home(point, false)),
                    // Permissions are the usual reason for EACCES.
                    _ => {
                        let is_private = mount.file_system == "tmpfs" && point == Path::new("/dev");
                        (is_private && errno == Errno::NOENT).then_some(Self::Devices)
                    }
                }
            }
            Errno::ROFS => {
                (mount.is_read_only && !mount.has_read_only_file_system).then_some(Self::ReadOnly(point))
            }
            Errno::PERM => path.starts_with("/dev").then_some(Self::DevicePolicy),
            _ => None,
        }
    }

    /// What hides it, and the drop-in for the unit.
    fn remedy(&self, unit: &str, path: &Path, is_writable: bool) -> String {
        let quoted = quoted(path);
        let bind = if is_writable { "BindPaths" } else { "BindReadOnlyPaths" };
        let rights = if is_writable { "rw" } else { "r" };
        let (why, settings) = match self {
            Self::Home(home, is_sure) => {
                let perhaps = if *is_sure { "systemd hides" } else { "Perhaps systemd hides" };
                let why = format!("{perhaps} {} from this service (ProtectHome=)", home.display());
                (why, format!("ProtectHome=tmpfs\n{bind}={quoted}"))
            }
            Self::Inaccessible(point) => {
                let point = point.display();
                return format!(
                    "systemd hides {point} from this service (InaccessiblePaths=). Take {point} out of that \
                     setting of {unit}: `systemctl cat {unit}` shows where it is."
                );
            }
            Self::Temporary(point) => {
                let why =
                    format!("systemd gives this service a {} of its own (PrivateTmp=)", point.display());
                (why, format!("{bind}={quoted}"))
            }
            Self::ReadOnly(point) => {
                let why = format!(
                    "{} is mounted read-only where this service runs, and its file system is not: by systemd \
                     (ProtectSystem=, ProtectHome= or ReadOnlyPaths=), unless it is mounted so for all",
                    point.display()
                );
                (why, format!("ReadWritePaths={quoted}"))
            }
            Self::Devices => (
                "systemd gives this service a /dev without disks (PrivateDevices=)".to_owned(),
                format!("PrivateDevices=no\nDeviceAllow={quoted} {rights}"),
            ),
            Self::DevicePolicy => (
                "systemd does not let this service use the device (DevicePolicy=)".to_owned(),
                format!("DeviceAllow={quoted} {rights}"),
            ),
        };
        // Devices have no mount to wait for.
        let is_device = matches!(self, Self::Devices | Self::DevicePolicy);
        let mounts = if is_device { String::new() } else { format!("[Unit]\nRequiresMountsFor={quoted}\n") };
        // A message is one line of the log.
        let lines = format!("{mounts}[Service]\n{settings}");
        let lines: Vec<_> = lines.lines().map(|line| format!("`{line}`")).collect();
        format!(
            "{why}. Write /etc/systemd/system/{unit}.d/exports.conf with the lines {}. Then: systemctl \
             daemon-reload && systemctl restart {unit}",
            lines.join(", ")
        )
    }
}

/// A path, as a setting of a unit takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string().replace('%', "%%");
    let is_plain = |c: char| c.is_alphanumeric() || "/._-@+,=%".contains(c);
    if text.chars().all(is_plain) {
        return text;
    }
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What systemd 252 makes of a unit with ProtectSystem=strict, ProtectHome=yes and PrivateTmp=yes.
    const MOUNTS: &str = "\
        581 580 0:29 / / ro,relatime shared:1 master:2 - ext4 /dev/vda1 rw\n\
        582 581 0:5 / /dev rw,nosuid - devtmpfs devtmpfs rw,size=4k\n\
        583 581 0:24 /systemd/inaccessible/dir /home ro,nosuid - tmpfs tmpfs rw,mode=755\n\
        584 581 0:24 /systemd/inaccessible/dir /root ro,nosuid - tmpfs tmpfs rw,mode=755\n\
        585 581 0:29 /var/lib/raio /var/lib/raio rw,relatime - ext4 /dev/vda1 rw\n\
        586 581 0:29 /tmp/systemd-private-1b-raio.service-x/tmp /tmp rw - ext4 /dev/vda1 rw\n\
        587 581 0:24 /systemd/inaccessible/dir /srv/secret ro - tmpfs tmpfs rw\n\
        588 581 8:1 / /srv/with\\040blank ro,relatime - xfs /dev/sda1 ro\n\
        589 581 8:2 / /data ro,relatime - xfs /dev/sda2 rw\n";

    fn find(path: &str, errno: Errno) -> Option<Hiding> {
        Hiding::find(MOUNTS, Path::new(path), errno)
    }

    #[test]
    fn the_setting_that_hides_a_path_is_told_by_its_mount() {
        for errno in [Errno::NOENT, Errno::ACCESS] {
            assert_eq!(find("/home/x/y", errno), Some(Hiding::Home("/home".into(), true)));
            assert_eq!(find("/root", errno), Some(Hiding::Home("/root".into(), true)));
            assert_eq!(find("/tmp/x", errno), Some(Hiding::Temporary("/tmp".into())));
            assert_eq!(find("/srv/secret/x", errno), Some(Hiding::Inaccessible("/srv/secret".into())));
            // Nothing hides these.
            for path in ["/homes/x", "/srv/x", "/data/x", "/dev/sda"] {
                assert_eq!(find(path, errno), None, "{path}");
            }
        }
        assert_eq!(find("/srv/x", Errno::ROFS), Some(Hiding::ReadOnly("/".into())));
        assert_eq!(find("/data/x", Errno::ROFS), Some(Hiding::ReadOnly("/data".into())));
        assert_eq!(find("/dev/sda", Errno::PERM), Some(Hiding::DevicePolicy));
        // Its file system is read-only for everybody.
        assert_eq!(find("/srv/with blank/x", Errno::ROFS), None);
        assert_eq!(find("/var/lib/raio/x", Errno::ROFS), None);
        assert_eq!(find("/srv/x", Errno::PERM), None);
    }

    #[test]
    fn a_tmpfs_may_be_systemds_or_the_machines_own() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:9 / /home ro - tmpfs tmpfs ro\n\
                      3 1 0:8 / /dev rw - tmpfs tmpfs rw\n";
        let find = |path: &str, errno| Hiding::find(mounts, Path::new(path), errno);
        let hiding = find("/home/x", Errno::NOENT);
        assert_eq!(hiding, Some(Hiding::Home("/home".into(), false)));
        let text = hiding.unwrap().remedy("a.service", Path::new("/home/x"), false);
        assert!(text.starts_with("Perhaps systemd hides /home from this service"), "{text}");
        assert_eq!(find("/dev/sda", Errno::NOENT), Some(Hiding::Devices));
        assert_eq!(find("/dev/sda", Errno::ACCESS), None);
    }

    #[test]
    fn the_drop_in_is_whole() {
        let hiding = find("/home/x", Errno::ACCESS).unwrap();
        assert_eq!(
            hiding.remedy("raio-server.service", Path::new("/home/x"), true),
            "systemd hides /home from this service (ProtectHome=). Write \
             /etc/systemd/system/raio-server.service.d/exports.conf with the lines `[Unit]`, \
             `RequiresMountsFor=/home/x`, `[Service]`, `ProtectHome=tmpfs`, `BindPaths=/home/x`. Then: \
             systemctl daemon-reload && systemctl restart raio-server.service"
        );
        let text = Hiding::DevicePolicy.remedy("a.service", Path::new("/dev/sda"), false);
        assert!(text.contains("with the lines `[Service]`, `DeviceAllow=/dev/sda r`. Then"), "{text}");
    }

    #[test]
    fn paths_are_written_as_units_take_them() {
        assert_eq!(quoted(Path::new("/srv/a-b_c")), "/srv/a-b_c");
        assert_eq!(quoted(Path::new("/srv/50%")), "/srv/50%%");
        assert_eq!(quoted(Path::new("/srv/a b:c")), "\"/srv/a b:c\"");
    }

    #[test]
    fn the_unit_is_that_of_the_system_whose_service_this_is() {
        let of = |groups: &str| unit_of(groups);
        assert_eq!(of("0::/system.slice/raio-server.service\n").as_deref(), Some("raio-server.service"));
        assert_eq!(of("4:cpu:/x\n1:name=systemd:/system.slice/a.service\n").as_deref(), Some("a.service"));
        assert_eq!(of("0::/user.slice/user-0.slice/session-3.scope\n"), None);
        assert_eq!(of("0::/user.slice/user-0.slice/user@0.service/app.slice/a.service\n"), None);
        assert_eq!(of("0::/\n"), None);
    }
}
