//! Loop devices, and file systems on them. They need root; a machine that lacks it skips, aloud.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether this is root. If not, says that `what` is skipped.
pub fn needs_root(what: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    eprintln!("SKIPPED: {what} needs root for loop devices and mounts. Run the tests as root.");
    false
}

/// Runs a program that must succeed. Returns its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A loop device over a file. Detached when dropped.
pub struct LoopDevice {
    path: PathBuf,
    _directory: Option<tempfile::TempDir>,
}

impl LoopDevice {
    /// One of this size, over a sparse file in a directory of its own.
    pub fn new(bytes: u64) -> Self {
        let directory = tempfile::tempdir().expect("a directory for the image");
        let image = directory.path().join("image");
        File::create(&image).and_then(|file| file.set_len(bytes)).expect("a sparse image");
        let mut device = Self::over(&image);
        device._directory = Some(directory);
        device
    }

    /// One over this file.
    pub fn over(image: &Path) -> Self {
        // Where udev does not run, asking for the control device does not load what stands behind it.
        if !Path::new("/dev/loop-control").exists() {
            run("modprobe", &["loop"]);
        }
        let path = run("losetup", &["--find", "--show", &image.to_string_lossy()]);
        Self { path: path.into(), _directory: None }
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a file system on it (`ext4` or `xfs`) and mounts it.
    pub fn mount(self, file_system: &str) -> Mounted {
        let device = self.path.to_string_lossy().into_owned();
        let force = if file_system == "xfs" { "-f" } else { "-F" };
        run(&format!("mkfs.{file_system}"), &["-q", force, &device]);
        self.mount_again(file_system)
    }

    /// Mounts the file system that is on it already, also if it is a copy of one that is mounted.
    pub fn mount_again(self, file_system: &str) -> Mounted {
        let device = self.path.to_string_lossy().into_owned();
        let directory = tempfile::tempdir().expect("a mount point");
        let options = if file_system == "xfs" { "nouuid" } else { "defaults" };
        run("mount", &["-t", file_system, "-o", options, &device, &directory.path().to_string_lossy()]);
        Mounted { directory, device: self }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// A mounted file system of its own. Unmounted when dropped.
pub struct Mounted {
    directory: tempfile::TempDir,
    device: LoopDevice,
}

impl Mounted {
    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Unmounts it and mounts it again, so that nothing of it is in memory.
    pub fn remount(self) -> Self {
        let (device, directory) =
            (self.device.path.to_string_lossy().into_owned(), self.path().to_string_lossy().into_owned());
        run("umount", &[&directory]);
        run("mount", &[&device, &directory]);
        self
    }

    /// Puts the file system on another device, such as a copy of this one, in its place.
    pub fn replace(mut self, device: LoopDevice) -> Self {
        let directory = self.path().to_string_lossy().into_owned();
        run("umount", &[&directory]);
        run("mount", &[&device.path.to_string_lossy(), &directory]);
        self.device = device;
        self
    }

    /// Freezes it: whatever would write to it waits, until what this returns is dropped.
    pub fn freeze(&self) -> Frozen {
        run("fsfreeze", &["--freeze", &self.path().to_string_lossy()]);
        Frozen(self.path().to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a server under test may still hold files.
        let _ = Command::new("umount").arg("--lazy").arg(self.directory.path()).status();
    }
}

/// A file system that is frozen (FIFREEZE). Thawed when dropped.
pub struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0).status();
    }
}
