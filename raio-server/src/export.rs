//! Exports: what clients may open, under which name, and how a client's path is resolved.
//!
//! A path is `/EXPORT/relative/path`. Everything beneath a directory export is resolved by openat2(2)
//! relative to it, and the kernel rejects what leads out of it. A file or device export is opened by its
//! path, afresh for each client, so that each open has flags of its own. [`crate::root`] says what is served,
//! [`crate::open`] opens it.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use anyhow::{Context, anyhow, bail, ensure};
use raio_transport::protocol::{
    OPEN_CREATE, OPEN_DIRECT, OPEN_DSYNC, OPEN_EXCLUSIVE, OPEN_NOFOLLOW, OPEN_READ, OPEN_SYNC, OPEN_TRUNCATE,
    OPEN_WRITE,
};
use raio_transport::sync::lock;
use raio_transport::{Status, random};
use rustix::fs::{Access as Permission, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};

use crate::claim::Claim;
use crate::engine::{Job, Lanes};
use crate::export_spec::{ExportSpec, Source};
use crate::file_identity::{self, Basis, FileIdentity};
use crate::hidden;
use crate::keys::Rights;
use crate::pool::Pool;
use crate::rejection::{EscapedPath, Rejection};
use crate::root::Root;
use crate::sandbox::Grant;
use crate::session::{Access, OpenFile};
use crate::subtree::{Owner, Subtree};
use crate::syscalls::{FileInfo, openat2};
use crate::tenure::Tenure;
use crate::tuning::reload::PLACES_FREE;
use crate::unfinished::ends_with_unfinished_put;
use crate::verifier::{FileVerifier, Verifier};
use crate::volume::{Memory, Null, Volume};

/// An export, open. Shared by all workers.
#[derive(Debug)]
pub struct Export {
    /// What the configuration says of it.
    spec: ExportSpec,
    /// Its place among all: see [`ExportTable`].
    place: usize,
    name: String,
    source: Origin,
    is_writable: bool,
    is_direct: bool,
    /// Random.
    number: u64,
    lanes: Lanes,
    /// Of what is no file: no other export, of this server or the next one, has it.
    instance: FileIdentity,
    verifier: Arc<Verifier>,
    /// By what its files were told apart ([`Basis`]), as far as the log says so.
    told: AtomicU8,
}

/// What an export has.
#[derive(Debug)]
enum Origin {
    /// Everything beneath a directory, or one file or device.
    Files(Box<Root>),
    /// One volume, which all who open it share, and the status that an open answers with.
    Volume(Arc<dyn Volume>, FileInfo),
}

impl Origin {
    fn of_volume(volume: impl Volume + 'static, size: u64) -> Self {
        Self::Volume(Arc::new(volume), FileInfo::synthetic(size))
    }
}

impl Export {
    /// Opens what the configuration names. It is to have this place among all.
    pub fn open(spec: &ExportSpec, place: usize, lanes: Lanes) -> anyhow::Result<Self> {
        let source = match &spec.source {
            Source::Null(size) => Origin::of_volume(Null::new(*size), *size),
            Source::Memory(size) => {
                let memory = Memory::new(*size, lanes.clone()).with_context(|| {
                    format!("Cannot make {size} bytes of memory for export {:?}", spec.name)
                })?;
                Origin::of_volume(memory, *size)
            }
            Source::Path(path) => Self::open_path(path, spec)
                .map(|root| Origin::Files(Box::new(root)))
                .map_err(|error| hidden::explain(error, path, spec.is_writable))
                .with_context(|| format!("Cannot export {} as {:?}", path.display(), spec.name))?,
        };
        Ok(Self {
            spec: spec.clone(),
            place,
            name: spec.name.clone(),
            source,
            // What nobody keeps anybody may write.
            is_writable: spec.is_writable || matches!(spec.source, Source::Null(_)),
            is_direct: spec.is_direct,
            number: random::number(),
            lanes,
            instance: file_identity::random(),
            verifier: Arc::default(),
            told: AtomicU8::new(0),
        })
    }

    /// An export of a volume that has this size.
    #[cfg(test)]
    pub fn of_volume(name: &str, volume: impl Volume + 'static, size: u64, lanes: Lanes) -> Self {
        Self {
            spec: format!("{name}=mem:{size},rw").parse().unwrap(),
            place: 0,
            name: name.to_owned(),
            source: Origin::of_volume(volume, size),
            is_writable: true,
            is_direct: false,
            number: 1,
            lanes,
            instance: file_identity::random(),
            verifier: Arc::default(),
            told: AtomicU8::new(0),
        }
    }

    /// The same, with this verifier, as the export that another server had.
    #[cfg(test)]
    pub fn known_as(self, instance: FileIdentity, verifier: Arc<Verifier>) -> Self {
        Self { instance, verifier, ..self }
    }

    /// The same, in this place.
    #[cfg(test)]
    pub fn at_place(self, place: usize) -> Self {
        Self { place, ..self }
    }

    fn open_path(path: &Path, spec: &ExportSpec) -> anyhow::Result<Root> {
        let real = path.canonicalize()?;
        let kind = real.metadata()?.file_type();
        if !kind.is_dir() && !kind.is_file() && !kind.is_block_device() {
            bail!("it is neither a directory nor a regular file nor a block device. Export one of those.");
        }
        for (option, is_given, is_right, of) in [
            ("grow", spec.may_grow, kind.is_file(), "a regular file"),
            ("mountpoint", spec.must_be_mountpoint, kind.is_dir(), "a directory"),
            ("devices", spec.has_devices, kind.is_dir(), "a directory"),
            ("max-file-size", spec.file_bytes_max.is_some(), kind.is_dir(), "a directory"),
            ("cross-mounts", spec.crosses_mounts, kind.is_dir(), "a directory"),
        ] {
            ensure!(!is_given || is_right, "the option `{option}` is for an export of {of}. Leave it out");
        }
        let may = |access| rustix::fs::accessat(CWD, &real, access, AtFlags::EACCESS);
        let remedy = |what| {
            let root = if rustix::process::geteuid().is_root() {
                ". In its sandbox root may do no more than permissions say"
            } else {
                ""
            };
            format!(
                "It cannot be {what}: run raio_server as a user who may do that (--user), or change the \
                 permissions{root}"
            )
        };
        if kind.is_dir() {
            // Nothing here lists it, so that one that can only be searched will do. What will be mounted
            // there is not known yet.
            if !spec.must_be_mountpoint {
                may(Permission::EXEC_OK).with_context(|| remedy("searched"))?;
                if spec.is_writable
                    && let Err(errno) = may(Permission::WRITE_OK)
                {
                    let (name, path) = (&spec.name, real.display());
                    let remedy = hidden::remedy(errno, &real, true).unwrap_or_else(|| {
                        "Run raio_server as a user who may do that, or change the permissions.".to_owned()
                    });
                    tracing::warn!(
                        name: "export-not-writable",
                        export = name,
                        "Files cannot be created in {path} itself. {remedy}"
                    );
                }
            }
            return Root::new(&real, FileType::Directory, spec);
        }
        let (access, what) =
            if spec.is_writable { (OFlags::RDWR, "read and written") } else { (OFlags::RDONLY, "read") };
        rustix::fs::open(&real, access | OFlags::CLOEXEC, Mode::empty()).with_context(|| remedy(what))?;
        if kind.is_file() {
            Root::new(&real, FileType::RegularFile, spec)
        } else {
            Root::new(&std::path::absolute(path)?, FileType::BlockDevice, spec)
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether files of it are always opened with O_DIRECT.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// Its place among all.
    pub fn place(&self) -> usize {
        self.place
    }

    /// What the configuration says of it.
    pub fn spec(&self) -> &ExportSpec {
        &self.spec
    }

    /// As long as what is open of it may stay open.
    pub fn tenure(&self) -> &Arc<Tenure> {
        &self.lanes.tenure
    }

    /// The export that takes its place. What is open of it stays open unless it `ends`: it is the same, and
    /// differs in what later opens may do.
    pub fn succeeded_by(&self, spec: &ExportSpec, ends: bool) -> anyhow::Result<Self> {
        let lanes = if ends { self.lanes.with_new_tenure() } else { self.lanes.clone() };
        if ends || matches!(self.source, Origin::Files(_)) {
            let new = Self::open(spec, self.place, lanes)?;
            let told = AtomicU8::new(self.told.load(Ordering::Relaxed));
            return Ok(match ends {
                true => new,
                false => Self { verifier: Arc::clone(&self.verifier), number: self.number, told, ..new },
            });
        }
        // What memory holds stays there.
        let Origin::Volume(volume, info) = &self.source else { unreachable!("it is of no files") };
        Ok(Self {
            spec: spec.clone(),
            place: self.place,
            name: self.name.clone(),
            source: Origin::Volume(Arc::clone(volume), *info),
            is_writable: spec.is_writable || matches!(spec.source, Source::Null(_)),
            is_direct: spec.is_direct,
            number: self.number,
            lanes,
            instance: self.instance,
            verifier: Arc::clone(&self.verifier),
            told: AtomicU8::new(0),
        })
    }

    /// Why something that was begun is not done: the export has become another meanwhile.
    pub fn is_over(&self) -> Rejection {
        let text = format!(
            "The server's operator has changed or removed export {}. Try again if it is still to be done.",
            self.name
        );
        Rejection { status: Status::storage(libc::ESTALE), text }
    }

    /// The sandbox confines the server, and allows this export.
    pub fn confine(&self) {
        if let Origin::Files(root) = &self.source {
            root.confine();
        }
    }

    /// Its shares of the pool.
    pub fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    /// Changes when acknowledged writes to it may have been lost.
    pub fn verifier(&self) -> &Arc<Verifier> {
        &self.verifier
    }

    /// What no other server may write to while this one does. None if nothing is written, or nothing stays.
    pub fn claim(&self) -> anyhow::Result<Option<Claim>> {
        match self.root() {
            Some(root) if self.is_writable => root.claim(&self.name).map(Some),
            _ => Ok(None),
        }
    }

    /// A file of it is known by this. The log says by what, once of each kind.
    pub fn note_basis(&self, basis: Basis) {
        if self.told.fetch_or(basis as u8, Ordering::Relaxed) & basis as u8 != 0 {
            return;
        }
        let name = &self.name;
        match basis {
            Basis::Handle => tracing::debug!(export = name, "Files are known by their handles."),
            Basis::Disk => tracing::debug!(export = name, "The disk is known by its identifiers."),
            Basis::Inode => tracing::info!(
                name: "export-without-handles",
                export = name,
                "The file system of an export, or this kernel, gives files no handles. They are told apart \
                 by device, inode and time of creation, so after a remount clients may have to open their \
                 files anew."
            ),
            Basis::DeviceNumber => tracing::info!(
                name: "export-without-identifier",
                export = name,
                "The disk of an export has no identifier, so after a reboot clients have to open it anew."
            ),
        }
    }

    /// What it is: a directory, a block device or a file.
    pub fn kind(&self) -> FileType {
        self.root().map_or(FileType::RegularFile, Root::kind)
    }

    /// The size of a volume that is no file.
    pub fn volume_size(&self) -> Option<u64> {
        match &self.source {
            Origin::Volume(_, info) => Some(info.status.size.get()),
            Origin::Files(_) => None,
        }
    }

    /// A number of this server's own for the unfinished files of puts, if clients may write to the export.
    pub fn number(&self) -> Option<u64> {
        self.is_writable.then_some(self.number)
    }

    /// Where its files lie, if it is of a file system.
    pub fn root(&self) -> Option<&Root> {
        match &self.source {
            Origin::Files(root) => Some(root),
            Origin::Volume(..) => None,
        }
    }
}

/// The directory of an export that a client does not leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// Relative to the export's directory.
    pub directory: String,
    /// Where the rest of the path that is opened begins, which is beneath this directory.
    pub rest: usize,
}

/// A path in an export, as far as that is known without touching the file system. [`crate::lookup`] looks it
/// up.
#[derive(Clone, Debug)]
pub struct Location {
    /// The export.
    pub export: Arc<Export>,
    /// Relative to the export's directory; empty for that itself. Of an export that is no directory, its
    /// path.
    pub path: CString,
    /// The directory that it has to lie in, if not all of the export will do.
    pub confinement: Option<Confinement>,
    /// What openat2(2) is to mind.
    pub resolve: ResolveFlags,
}

/// What a client may do at a location.
#[derive(Debug)]
pub struct Located {
    /// Where.
    pub at: Location,
    /// To whom what it creates belongs.
    pub owner: Owner,
    /// How many bytes the files may have together that it may change, if that is limited.
    pub bytes_max: Option<u64>,
}

/// What a client's path comes to.
#[derive(Debug)]
pub enum Found<'a> {
    /// It is in a file system.
    Location(Located),
    /// An export that is a volume, the volume, and its status.
    Volume(&'a Arc<Export>, &'a Arc<dyn Volume>, FileInfo),
}

/// What a client's open comes to.
#[derive(Debug)]
pub enum Target {
    /// To be opened.
    Path {
        /// Where.
        at: Located,
        /// The flags of openat2(2).
        flags: OFlags,
        /// The permissions of a file that is created.
        mode: Mode,
    },
    /// Open already, with its export and its status.
    Ready(Arc<Export>, Box<OpenFile>, FileInfo),
}

/// All exports that are served at a time.
#[derive(Debug)]
pub struct Exports(Vec<Arc<Export>>);

impl Exports {
    /// Opens all of them, each with lanes of its own.
    pub fn open(specs: &[ExportSpec], pool: &'static Pool<Job>) -> anyhow::Result<Self> {
        let open = |(place, spec)| Export::open(spec, place, Lanes::new(pool)).map(Arc::new);
        specs.iter().enumerate().map(open).collect::<anyhow::Result<_>>().map(Self)
    }

    /// These.
    pub fn of(exports: Vec<Arc<Export>>) -> Self {
        Self(exports)
    }

    /// The one with this name.
    pub fn named(&self, name: &str) -> Option<&Arc<Export>> {
        self.0.iter().find(|export| export.name == name)
    }

    /// The files that the sandbox must allow to open.
    pub fn grants(&self) -> anyhow::Result<Vec<Grant>> {
        let mut grants = Vec::new();
        for export in &self.0 {
            let Export { name, source, is_writable, .. } = &**export;
            let Origin::Files(root) = source else { continue };
            let granted = root.grants(name, *is_writable);
            grants.extend(granted.with_context(|| format!("Cannot open export {name} for the sandbox"))?);
        }
        Ok(grants)
    }

    /// A directory of an export, or the export itself, for listing.
    pub fn open_directory(&self, place: usize, directory: &str) -> anyhow::Result<OwnedFd> {
        let export = self.0.iter().find(|export| export.place == place);
        let export = export.context("its export was removed")?;
        let name = &export.name;
        let root = export.root().context("it is no directory")?;
        let root_directory = root.enter(name).map_err(|Rejection { text, .. }| anyhow!(text))?;
        let root_directory = root_directory.context("it is no directory")?;
        let directory = if directory.is_empty() { "." } else { directory };
        let resolve = root.resolve() | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        openat2(root_directory.as_fd(), directory, flags, Mode::empty(), resolve)
            .context("it cannot be opened")
    }

    /// From now on nothing else can be opened.
    pub fn confine(&self) {
        self.0.iter().for_each(|export| export.confine());
    }

    /// All of them, in order.
    pub fn all(&self) -> &[Arc<Export>] {
        &self.0
    }

    /// The export that a client knows by this name, and what it may use of it.
    fn find<'a>(&self, rights: &'a Rights, name: &[u8]) -> Option<(&Arc<Export>, &'a [Subtree])> {
        let export = self.0.iter().find(|export| export.name.as_bytes() == name)?;
        let subtrees = rights.of_export(&export.name);
        (!subtrees.is_empty()).then_some((export, subtrees))
    }

    /// Finds the export of a client's path, and what the client may do there. `what` is a verb for messages;
    /// it `changes` something, and may have something `created`.
    pub fn locate(
        &self,
        rights: &Rights,
        what: &str,
        changes: bool,
        creates: bool,
        path: &[u8],
    ) -> Result<Found<'_>, Rejection> {
        let reject = |status, text: String| Err(Rejection { status, text });
        let shown = EscapedPath(path);
        let Some(rest) = path.strip_prefix(b"/") else {
            let text = format!("{shown} is no path here: paths are /EXPORT/relative/path.");
            return reject(Status::storage(libc::ENOENT), text);
        };
        let start = rest.iter().position(|&b| b != b'/').unwrap_or(rest.len());
        let rest = &rest[start..];
        let (name, rest) = rest.split_at(rest.iter().position(|&b| b == b'/').unwrap_or(rest.len()));
        let Some((export, subtrees)) = self.find(rights, name) else {
            let text =
                format!("There is no export {}. Ask the server's operator for the names.", EscapedPath(name));
            return reject(Status::storage(libc::ENOENT), text);
        };
        let has_more = !rest.is_empty();
        let rest = &rest[rest.iter().position(|&b| b != b'/').unwrap_or(rest.len())..];
        // Whatever is there, nothing is looked up.
        let Some((subtree, beneath)) = Subtree::find(subtrees, rest, changes) else {
            return Err(Rejection::of_path(what, rest, libc::ENOENT, ""));
        };
        if changes && !export.is_writable {
            let text =
                format!("Export {} is read-only. The server's operator can add `,rw` to it.", export.name);
            return reject(Status::policy(libc::EROFS), text);
        }
        if changes && !subtree.is_writable() {
            let text = format!(
                "Export {} is read-only for this client. The server's operator can change that in \
                 clients.toml.",
                export.name
            );
            return reject(Status::policy(libc::EROFS), text);
        }
        if has_more && !export.root().is_some_and(Root::is_directory) {
            let text = format!("Export {} is no directory: open /{} itself.", export.name, export.name);
            return reject(Status::storage(libc::ENOTDIR), text);
        }
        let root = match &export.source {
            Origin::Files(root) => root,
            Origin::Volume(volume, info) => return Ok(Found::Volume(export, volume, *info)),
        };
        let path = if !root.is_directory() {
            root.path().clone()
        } else if ends_with_unfinished_put(rest) {
            let hint = "The server uses such names itself. Choose another one.";
            let (errno, hint) = if creates { (libc::EINVAL, hint) } else { (libc::ENOENT, "") };
            return Err(Rejection::of_path(what, rest, errno, hint));
        } else if let Ok(path) = CString::new(rest) {
            path
        } else {
            return reject(Status::protocol(libc::EINVAL), "A path cannot hold a zero byte.".to_owned());
        };
        let confined = |directory: &str| Confinement { directory: directory.to_owned(), rest: beneath };
        let confinement = subtree.directory().map(confined);
        let at = Location { export: Arc::clone(export), path, confinement, resolve: root.resolve() };
        let (owner, bytes_max) = (subtree.owner(), subtree.bytes_max().filter(|_| changes));
        Ok(Found::Location(Located { at, owner, bytes_max }))
    }

    /// Resolves the path and flags (`OPEN_*`) of a client as far as that goes without touching the file.
    pub fn resolve(&self, rights: &Rights, flags: u32, mode: u32, path: &[u8]) -> Result<Target, Rejection> {
        let reject = |status, text: String| Err(Rejection { status, text });
        let shown = EscapedPath(path);
        let changes = flags & (OPEN_WRITE | OPEN_CREATE | OPEN_TRUNCATE) != 0;
        let creates = flags & OPEN_CREATE != 0;
        match self.locate(rights, "open", changes, creates, path)? {
            _ if creates && mode & !0o777 != 0 => Err(special_bits()),
            Found::Volume(..) if creates && flags & OPEN_EXCLUSIVE != 0 => {
                reject(Status::storage(libc::EEXIST), format!("{shown} exists already."))
            }
            Found::Volume(export, volume, info) => {
                let verifier = FileVerifier::new(Arc::clone(&export.verifier), 0);
                let (volume, access) = (Arc::clone(volume), Access::from_flags(flags));
                let file = OpenFile::new(volume, access, export.place, export.instance, verifier);
                let file = file.in_tenure(export.tenure());
                Ok(Target::Ready(Arc::clone(export), Box::new(file), info))
            }
            Found::Location(Located { at, .. }) if at.path.is_empty() => reject(
                Status::storage(libc::EISDIR),
                format!("{shown} is a directory: open a file beneath it."),
            ),
            Found::Location(at) => Ok(Target::Path {
                flags: kernel_flags(flags, at.at.export.is_direct),
                mode: Mode::from_raw_mode(if creates { mode } else { 0 }),
                at,
            }),
        }
    }

    /// The exports that a client may use, as a directory of them lists them.
    pub fn visible<'a>(&'a self, rights: &'a Rights) -> impl Iterator<Item = &'a Export> {
        self.0.iter().map(|export| &**export).filter(|export| !rights.of_export(&export.name).is_empty())
    }
}

/// All exports, whose configuration may change. An export has a place, which counters, rates and files know
/// it by: it is that of its name, for good. What is open refers to the export itself.
#[derive(Debug)]
pub struct ExportTable {
    current: RwLock<Arc<Exports>>,
    are_several: AtomicBool,
    /// By the place: the names that exports have or had, and their lanes.
    places: Mutex<Vec<(String, Lanes)>>,
    places_max: usize,
}

impl ExportTable {
    /// Of a server that begins with these.
    pub fn new(exports: Exports) -> Self {
        let places: Vec<_> = exports.0.iter().map(|one| (one.name.clone(), one.lanes.clone())).collect();
        Self {
            are_several: AtomicBool::new(exports.0.len() > 1),
            places_max: places.len() + PLACES_FREE,
            places: Mutex::new(places),
            current: RwLock::new(Arc::new(exports)),
        }
    }

    /// The exports that are served now. An export may change while a file of it is opened: callers check
    /// [`Export::tenure`]. The lock is held for a few instructions.
    pub fn current(&self) -> Arc<Exports> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on these are served.
    pub fn replace(&self, exports: Exports) {
        self.are_several.store(exports.0.len() > 1, Ordering::Relaxed);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(exports);
    }

    /// Whether there is more than one.
    pub fn are_several(&self) -> bool {
        self.are_several.load(Ordering::Relaxed)
    }

    /// How many places there may be.
    pub fn places_max(&self) -> usize {
        self.places_max
    }

    /// The place of a name, and the lanes of the export there. A new name gets one.
    pub fn place(&self, name: &str, pool: &'static Pool<Job>) -> anyhow::Result<(usize, Lanes)> {
        let mut places = lock(&self.places);
        if let Some(place) = places.iter().position(|(known, _)| known == name) {
            return Ok((place, places[place].1.with_new_tenure()));
        }
        ensure!(
            places.len() < self.places_max,
            "export {name:?}: there have been {} exports with other names since the server started, as many \
             as there may be. Start the server anew",
            places.len()
        );
        places.push((name.to_owned(), Lanes::new(pool)));
        Ok((places.len() - 1, places[places.len() - 1].1.clone()))
    }
}

/// Why nothing is created with these permissions.
pub fn special_bits() -> Rejection {
    let text = "Nothing can be created here with set-user-id, set-group-id or sticky bits.".to_owned();
    Rejection { status: Status::policy(libc::EPERM), text }
}

/// The flags of openat2(2).
fn kernel_flags(flags: u32, is_direct: bool) -> OFlags {
    let access = match (flags & OPEN_READ != 0, flags & OPEN_WRITE != 0) {
        (true, true) => libc::O_RDWR,
        (false, true) => libc::O_WRONLY,
        _ => libc::O_RDONLY,
    };
    let mut kernel = access | libc::O_CLOEXEC | libc::O_NOCTTY;
    for (bit, flag) in [
        (OPEN_CREATE, libc::O_CREAT),
        (OPEN_EXCLUSIVE, libc::O_EXCL),
        (OPEN_TRUNCATE, libc::O_TRUNC),
        (OPEN_DIRECT, libc::O_DIRECT),
        (OPEN_SYNC, libc::O_SYNC),
        (OPEN_DSYNC, libc::O_DSYNC),
        (OPEN_NOFOLLOW, libc::O_NOFOLLOW),
    ] {
        if flags & bit != 0 {
            kernel |= flag;
        }
    }
    if is_direct {
        kernel |= libc::O_DIRECT;
    }
    OFlags::from_bits_retain(kernel as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> ExportSpec {
        text.parse().unwrap()
    }

    fn errno(exports: &Exports, flags: u32, path: &str) -> i32 {
        exports.resolve(&Rights::All, flags, 0o644, path.as_bytes()).unwrap_err().status.errno
    }

    #[test]
    fn paths_resolve_beneath_their_export() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let specs = [
            spec(&format!("d={}", directory.path().display())),
            spec(&format!("w={},rw,direct", directory.path().display())),
            spec(&format!("f={}", file.display())),
            spec("n=null:1M"),
            spec("m=mem:1M"),
        ];
        let exports = Exports::open(&specs, Pool::start().unwrap()).unwrap();
        let path_of =
            |flags, path: &str| match exports.resolve(&Rights::All, flags, 0o600, path.as_bytes()).unwrap() {
                Target::Path { at: Located { at, .. }, flags, mode } if at.confinement.is_none() => {
                    (at.export.place, at.path.into_string().unwrap(), (at.resolve.bits(), flags.bits(), mode))
                }
                target => panic!("{target:?}"),
            };
        let (export, path, (resolve, _, mode)) = path_of(OPEN_READ, "//d//a/../b/");
        assert_eq!((export, path.as_str(), mode), (0, "a/../b/", Mode::empty()));
        assert_eq!(resolve, libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_XDEV);
        let (_, _, (_, flags, mode)) = path_of(OPEN_READ | OPEN_WRITE | OPEN_CREATE, "/w/new");
        assert_eq!(mode, Mode::from_raw_mode(0o600));
        let expected = libc::O_RDWR | libc::O_CREAT | libc::O_DIRECT | libc::O_CLOEXEC | libc::O_NOCTTY;
        assert_eq!(flags, expected as u32);
        let (_, path, (resolve, ..)) = path_of(OPEN_READ, "/f");
        assert_eq!(path, file.canonicalize().unwrap().to_str().unwrap());
        assert_eq!(resolve, libc::RESOLVE_NO_SYMLINKS);
        for path in ["", "d/a", "/", "/x/a", "/../etc/passwd", "/."] {
            assert_eq!(errno(&exports, OPEN_READ, path), libc::ENOENT, "{path}");
        }
        assert_eq!(errno(&exports, OPEN_READ, "/d"), libc::EISDIR);
        assert_eq!(errno(&exports, OPEN_READ, "/d/"), libc::EISDIR);
        assert_eq!(errno(&exports, OPEN_READ, "/f/"), libc::ENOTDIR);
        assert_eq!(errno(&exports, OPEN_READ, "/n/x"), libc::ENOTDIR);
        assert_eq!(errno(&exports, OPEN_READ | OPEN_WRITE, "/d/a"), libc::EROFS);
        assert_eq!(errno(&exports, OPEN_READ | OPEN_CREATE, "/d/a"), libc::EROFS);
        assert_eq!(errno(&exports, OPEN_READ | OPEN_TRUNCATE, "/d/a"), libc::EROFS);
        assert_eq!(errno(&exports, OPEN_WRITE, "/m"), libc::EROFS);
        assert_eq!(errno(&exports, OPEN_WRITE | OPEN_CREATE | OPEN_EXCLUSIVE, "/n"), libc::EEXIST);
        assert!(exports.resolve(&Rights::All, OPEN_WRITE, 0, b"/n").is_ok());
        let rejection =
            exports.resolve(&Rights::All, OPEN_WRITE | OPEN_CREATE, 0o4755, b"/w/suid").unwrap_err();
        assert_eq!(rejection.status, Status::policy(libc::EPERM));
    }

    #[test]
    fn a_client_with_a_directory_finds_the_paths_beneath_it_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("a/b")).unwrap();
        std::fs::write(directory.path().join("other"), "x").unwrap();
        let spec = spec(&format!("d={},rw", directory.path().display()));
        let exports = Exports::open(&[spec], Pool::start().unwrap()).unwrap();
        let rights = Rights::of_directory("d", "a/b");
        for (path, rest) in [("/d/a/b/x", 4), ("//d//a//b//../x", 6), ("/d/a/b", 3), ("/d/./a/b/", 6)] {
            match exports.resolve(&rights, OPEN_READ | OPEN_WRITE, 0, path.as_bytes()).unwrap() {
                Target::Path { at: Located { at, .. }, .. } => {
                    assert_eq!(at.confinement, Some(Confinement { directory: "a/b".into(), rest }), "{path}");
                }
                target => panic!("{target:?}"),
            }
        }
        for flags in [OPEN_READ, OPEN_WRITE, OPEN_WRITE | OPEN_CREATE, OPEN_WRITE | OPEN_TRUNCATE] {
            for name in ["other", "nothing", "a", "a/", "a/x", "a/../other", "a/../a/b/x", "../d/a/b/x", "."]
            {
                let rejection = exports.resolve(&rights, flags, 0o4644, format!("/d/{name}").as_bytes());
                let Rejection { status, text } = rejection.unwrap_err();
                assert_eq!(status, Status::storage(libc::ENOENT), "{name}");
                let missing = std::io::Error::from_raw_os_error(libc::ENOENT);
                assert_eq!(text, format!("Cannot open {name:?} on the server: {missing}."));
            }
        }
    }

    #[test]
    fn what_cannot_be_exported_is_refused_with_a_reason() {
        let lanes = Lanes::new(Pool::start().unwrap());
        for (text, needle) in [("a=/no/such", "No such file"), ("a=/dev/null", "neither a directory")] {
            let error = format!("{:#}", Export::open(&spec(text), 0, lanes.clone()).unwrap_err());
            assert!(error.contains(needle), "{error}");
        }
    }
}
