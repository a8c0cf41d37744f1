//! What the server can still do once it serves: open what it exports and what it needs, and nothing else.
//!
//! The parts are put on one after another, in the process's first and only thread, before any client is
//! served. Each is one that the kernel may lack: then the log says so, and the others go on.
//!
//! | part | what it does |
//! |---|---|
//! | [`files`] | Landlock: which files can be opened, and for what |
//! | [`calls`] | seccomp: which system calls there are |
//! | `is_restricted` of a reactor's configuration | what can be asked of a ring, which seccomp does not see |

#[allow(unsafe_code)]
mod calls;
mod files;

pub use files::Grant;

/// A sandbox that is being put on.
#[derive(Debug, Default)]
pub struct Sandbox {
    /// What it has.
    parts: Vec<String>,
    /// What it lacks.
    gaps: Vec<String>,
}

impl Sandbox {
    /// The rings of this process take only what a reactor asks of them, or could not be restricted.
    pub fn note_rings(&mut self, unrestricted: Option<&std::io::Error>) {
        match unrestricted {
            None => self.parts.push("restricted rings".to_owned()),
            Some(error) => self.gaps.push(format!(
                "io_uring cannot be restricted ({error}), so that its operations are not filtered"
            )),
        }
    }

    /// Something could not be had. `gap` is a clause, for the log.
    pub fn note_gap(&mut self, gap: String) {
        self.gaps.push(gap);
    }

    /// From now on only these files can be opened. Returns whether that is so.
    pub fn confine_files(&mut self, grants: &[Grant]) -> bool {
        match files::confine(grants) {
            Ok(abi) => {
                self.parts.push(format!("Landlock (ABI {abi})"));
                let missing = files::missing(abi);
                if !missing.is_empty() {
                    let missing = missing.join(", ");
                    self.gaps.push(format!("Landlock has no rules for {missing}, which came later"));
                }
                true
            }
            Err(why) => {
                self.gaps.push(format!(
                    "there is no Landlock ({why}), so that what can be opened depends on permissions alone"
                ));
                false
            }
        }
    }

    /// From now on this process, and each of its threads, has only the system calls of a server.
    pub fn filter_calls(&mut self) {
        match calls::filter() {
            Ok(count) => self.parts.push(format!("{count} system calls")),
            Err(error) => self.gaps.push(format!("system calls are not filtered ({error:#})")),
        }
    }

    /// Says what it has, and what it lacks.
    pub fn report(self) {
        let Self { parts, gaps } = self;
        tracing::info!(name: "sandbox-on", "The sandbox is on: {parts}.", parts = parts.join(", "));
        if !gaps.is_empty() {
            tracing::warn!(
                name: "sandbox-incomplete",
                "The sandbox lacks what this system does not allow: {gaps}. The rest of it is on.",
                gaps = gaps.join("; ")
            );
        }
    }
}
