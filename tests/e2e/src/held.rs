//! Threads that are held up.

use std::path::Path;

use rustix::process::Pid;

/// A thread of a process that does not run until this is dropped.
pub struct HeldThread(Pid);

impl HeldThread {
    /// Holds the thread of this name. The calling thread must be the one that drops this.
    pub fn new(process: u32, name: &str) -> Self {
        let tasks = Path::new("/proc").join(process.to_string()).join("task");
        let id: libc::pid_t = tasks
            .read_dir()
            .expect("it runs")
            .filter_map(|task| Some(task.ok()?.path()))
            .find(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name))
            .and_then(|task| task.file_name()?.to_str()?.parse().ok())
            .unwrap_or_else(|| panic!("no thread is called {name}"));
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: both requests take no memory of this process.
        unsafe {
            assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, id, nothing, nothing), 0, "may be traced");
            assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, id, nothing, nothing), 0, "may be stopped");
        }
        let mut status = 0;
        // SAFETY: `status` may be written.
        assert_eq!(unsafe { libc::waitpid(id, &mut status, libc::__WALL) }, id, "it stops");
        Self(Pid::from_raw(id).expect("a thread has an id"))
    }
}

impl Drop for HeldThread {
    fn drop(&mut self) {
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: the request takes no memory of this process.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0.as_raw_nonzero().get(), nothing, nothing) };
    }
}
