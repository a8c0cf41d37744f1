//! How a file is opened, in the manner of `std::fs::OpenOptions`.

use std::path::Path;

use crate::error::Error;
use crate::file::File;
use crate::session::Session;

/// Options for opening a file of a server, as those of [`std::fs::OpenOptions`]. There is no `append`: each
/// write names its offset.
///
/// ```no_run
/// # fn main() -> Result<(), raio::Error> {
/// use raio::{OpenOptions, Options, Session};
///
/// let session = Session::connect("raio://127.0.0.1", &Options::default())?;
/// let file = OpenOptions::new().read(true).write(true).create(true).open(&session, "/scratch/notes")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    read: bool,
    write: bool,
    truncate: bool,
    create: bool,
    create_new: bool,
    mode: u32,
    custom_flags: i32,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl OpenOptions {
    /// Nothing is set. At least [`OpenOptions::read`] or [`OpenOptions::write`] must be.
    pub fn new() -> Self {
        Self {
            read: false,
            write: false,
            truncate: false,
            create: false,
            create_new: false,
            mode: 0o666,
            custom_flags: 0,
        }
    }

    /// The file can be read.
    pub fn read(&mut self, read: bool) -> &mut Self {
        self.read = read;
        self
    }

    /// The file can be written.
    pub fn write(&mut self, write: bool) -> &mut Self {
        self.write = write;
        self
    }

    /// A file that there is becomes empty. Needs [`OpenOptions::write`].
    pub fn truncate(&mut self, truncate: bool) -> &mut Self {
        self.truncate = truncate;
        self
    }

    /// A file that there is not is created. Needs [`OpenOptions::write`].
    pub fn create(&mut self, create: bool) -> &mut Self {
        self.create = create;
        self
    }

    /// A new file is created; it fails with EEXIST if there is one. `create` and `truncate` do not count
    /// then. Needs [`OpenOptions::write`].
    pub fn create_new(&mut self, create_new: bool) -> &mut Self {
        self.create_new = create_new;
        self
    }

    /// The permissions of a file that is created: 0o666 unless set. The server's umask applies.
    pub fn mode(&mut self, mode: u32) -> &mut Self {
        self.mode = mode;
        self
    }

    /// Further flags of open(2), such as O_DIRECT or O_DSYNC: those that [`Session::open`] takes. An access
    /// mode among them is ignored.
    pub fn custom_flags(&mut self, flags: i32) -> &mut Self {
        self.custom_flags = flags;
        self
    }

    /// Opens the file at `path`, which reads /EXPORT/path/beneath/it. Fails with EINVAL for options that make
    /// no sense together, and as [`Session::open`]. Blocks for a round trip.
    pub fn open(&self, session: &Session, path: impl AsRef<Path>) -> Result<File, Error> {
        session.open(path, self.flags()?, self.mode)
    }

    /// The flags of open(2).
    fn flags(&self) -> Result<i32, Error> {
        let access = match (self.read, self.write) {
            (true, false) => libc::O_RDONLY,
            (false, true) => libc::O_WRONLY,
            (true, true) => libc::O_RDWR,
            (false, false) => {
                let text = "Neither reading nor writing was asked for. Set `read`, `write` or both.";
                return Err(Error::call(libc::EINVAL, text));
            }
        };
        if !self.write && (self.truncate || self.create || self.create_new) {
            let text = "Only a file that can be written is created or truncated. Set `write`, too.";
            return Err(Error::call(libc::EINVAL, text));
        }
        let creation = match (self.create_new, self.create, self.truncate) {
            (true, ..) => libc::O_CREAT | libc::O_EXCL,
            (false, create, truncate) => {
                (if create { libc::O_CREAT } else { 0 }) | (if truncate { libc::O_TRUNC } else { 0 })
            }
        };
        Ok(access | creation | (self.custom_flags & !libc::O_ACCMODE))
    }
}

#[cfg(test)]
mod tests {
    use raio_transport::address::Scheme;
    use raio_transport::handshake::Policy;

    use super::*;
    use crate::fake_server::FakeServer;
    use crate::session::Options;

    #[test]
    fn options_become_the_flags_that_std_makes_of_them() {
        let mut options = OpenOptions::new();
        assert_eq!(options.flags().unwrap_err().errno(), libc::EINVAL);
        assert_eq!(options.read(true).flags(), Ok(libc::O_RDONLY));
        assert_eq!(options.create(true).flags().unwrap_err().errno(), libc::EINVAL);
        assert_eq!(options.write(true).flags(), Ok(libc::O_RDWR | libc::O_CREAT));
        assert_eq!(options.truncate(true).flags(), Ok(libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC));
        assert_eq!(options.create_new(true).flags(), Ok(libc::O_RDWR | libc::O_CREAT | libc::O_EXCL));
        options.read(false).custom_flags(libc::O_DSYNC | libc::O_RDWR);
        let expected = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_DSYNC;
        assert_eq!(options.flags(), Ok(expected));
    }

    #[test]
    fn a_file_is_opened_and_created_by_options() {
        let server = FakeServer::start(Policy::default());
        let session = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
        let error = OpenOptions::new().write(true).open(&session, "/e/new").unwrap_err();
        assert_eq!(error.errno(), libc::ENOENT);
        let file = OpenOptions::new().write(true).create(true).open(&session, "/e/new").unwrap();
        assert_eq!(file.status().unwrap().size.get(), 0);
    }
}
