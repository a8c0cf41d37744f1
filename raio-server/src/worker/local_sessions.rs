//! The sessions that have connections at a worker, and this worker's view of their files.

use std::collections::HashMap;
use std::ops::Index;
use std::rc::Rc;
use std::sync::Arc;

use raio_transport::message::SessionId;
use raio_transport::protocol::FileHandle;
use slab::Slab;

use crate::activity::SessionCounters;
use crate::handles::index_of;
use crate::limits::{AddressAccount, Excess};
use crate::request::WorkerFile;
use crate::session::Session;

/// A session that has connections here.
#[derive(Debug)]
pub struct LocalSession {
    /// What all workers share.
    pub session: Arc<Session>,
    /// What this worker counts for it.
    pub counters: Arc<SessionCounters>,
    connections: usize,
    /// This worker's view of the files, by the index in their handles.
    files: Vec<Option<Rc<WorkerFile>>>,
    /// The same of files whose client has chosen an index far beyond the number of its files.
    far: HashMap<usize, Rc<WorkerFile>>,
}

/// See the module documentation. A session's key is its index here.
#[derive(Debug, Default)]
pub struct LocalSessions {
    all: Slab<LocalSession>,
    by_id: HashMap<SessionId, usize>,
    /// The worker's place among all.
    worker: usize,
}

impl LocalSessions {
    /// Those of the worker that has this place among all: none yet.
    pub fn of_worker(worker: usize) -> Self {
        Self { worker, ..Self::default() }
    }

    /// How many there are.
    #[cfg(any(test, feature = "test-worker"))]
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Another connection of a session opens here, from an address. Returns the session's key; the error
    /// says why it may not.
    pub fn attach(&mut self, session: &Arc<Session>, address: &AddressAccount) -> Result<usize, Excess> {
        session.attach(address)?;
        let known = self.by_id.get(&session.id).copied();
        let key = known.filter(|&key| Arc::ptr_eq(&self.all[key].session, session)).unwrap_or_else(|| {
            let (session, counters) = (Arc::clone(session), session.activity.counters(self.worker));
            let (files, far) = (Vec::new(), HashMap::new());
            self.all.insert(LocalSession { session, counters, connections: 0, files, far })
        });
        self.by_id.insert(session.id, key);
        self.all[key].connections += 1;
        Ok(key)
    }

    /// One that was attached has ended. With the last one here, this worker's view of the session ends.
    pub fn detach(&mut self, key: usize) {
        let local = &mut self.all[key];
        local.session.detach();
        local.connections -= 1;
        if local.connections == 0 {
            let LocalSession { session, .. } = self.all.remove(key);
            if self.by_id.get(&session.id) == Some(&key) {
                self.by_id.remove(&session.id);
            }
        }
    }

    /// The file with this handle. The first use here of one asks all workers' table, which is locked.
    pub fn file(&mut self, key: usize, handle: FileHandle) -> Option<Rc<WorkerFile>> {
        let local = &self.all[key];
        if let Some(Some(file)) = local.files.get(index_of(handle))
            && file.handle == handle
            && !file.open.is_closed()
        {
            return Some(Rc::clone(file));
        }
        if let Some(file) = local.far.get(&index_of(handle))
            && file.handle == handle
            && !file.open.is_closed()
        {
            return Some(Rc::clone(file));
        }
        let open = local.session.get(handle)?;
        Some(self.remember(key, WorkerFile::new(handle, open)))
    }

    /// Keeps this worker's view of a file.
    pub fn remember(&mut self, key: usize, file: WorkerFile) -> Rc<WorkerFile> {
        let LocalSession { session, files, far, .. } = &mut self.all[key];
        let index = index_of(file.handle);
        let file = Rc::new(file);
        if files.len() <= index {
            if !session.is_near(index) {
                far.insert(index, Rc::clone(&file));
                return file;
            }
            files.resize(index + 1, None);
        }
        files[index] = Some(Rc::clone(&file));
        file
    }

    /// Drops this worker's views of files that were closed.
    pub fn forget_closed(&mut self) {
        for (_, LocalSession { files, far, .. }) in &mut self.all {
            for file in files {
                file.take_if(|file| file.open.is_closed());
            }
            far.retain(|_, file| !file.open.is_closed());
        }
    }

    /// Drops this worker's view of a file that was closed.
    pub fn forget(&mut self, session: SessionId, handle: FileHandle) {
        let Some(&key) = self.by_id.get(&session) else { return };
        let LocalSession { files, far, .. } = &mut self.all[key];
        let index = index_of(handle);
        if let Some(file) = files.get_mut(index)
            && file.as_ref().is_some_and(|file| file.handle == handle)
        {
            *file = None;
        }
        if far.get(&index).is_some_and(|file| file.handle == handle) {
            far.remove(&index);
        }
    }
}

impl Index<usize> for LocalSessions {
    type Output = LocalSession;

    fn index(&self, key: usize) -> &LocalSession {
        &self.all[key]
    }
}

#[cfg(test)]
mod tests {
    use raio_transport::handshake::Identity;

    use super::*;
    use crate::limits::{Caps, Limits, Room};
    use crate::session::{Access, OpenFile};
    use crate::volume::Null;

    const ID: SessionId = SessionId([1; 16]);

    /// A session that may have so many connections.
    fn session(connections_max: usize) -> Arc<Session> {
        let room = Room { descriptors: 64, files: 16, bytes: 1 << 20, workers: 2 };
        let caps = Caps { connections: Some(connections_max), ..Caps::default() };
        let limits = Limits::new(room, caps, Caps::default());
        Arc::new(Session::new(ID, Identity::Anonymous, None, limits))
    }

    #[test]
    fn a_file_whose_handle_its_client_has_chosen_takes_no_more_memory_than_any_other() {
        let session = session(9);
        let (mut sessions, key) = worker(&session);
        let near = insert(&session);
        let open = OpenFile::of_volume(Null::new(0), Access { read: true, write: true });
        let far = FileHandle(u32::MAX);
        session.reopen(far, Arc::new(open), &None).unwrap();
        for handle in [near, far] {
            let file = sessions.file(key, handle).unwrap();
            assert!(Rc::ptr_eq(&file, &sessions.file(key, handle).unwrap()), "it is asked for each time");
        }
        assert!(sessions[key].files.len() <= 1);
        session.close(far).unwrap();
        assert!(sessions.file(key, far).is_none());
        sessions.forget(ID, far);
        assert!(sessions[key].far.is_empty());
    }

    fn insert(session: &Session) -> FileHandle {
        let open = OpenFile::of_volume(Null::new(0), Access { read: true, write: true });
        session.insert(Arc::new(open), &None).unwrap()
    }

    /// A worker with a connection of the session.
    fn worker(session: &Arc<Session>) -> (LocalSessions, usize) {
        let mut sessions = LocalSessions::default();
        let key = sessions.attach(session, &None).unwrap();
        (sessions, key)
    }

    #[test]
    fn a_workers_view_of_a_session_lasts_from_its_first_connection_there_to_its_last() {
        let session = session(9);
        let (mut sessions, key) = worker(&session);
        assert_eq!(sessions.attach(&session, &None).unwrap(), key);
        sessions.detach(key);
        assert_eq!(sessions.len(), 1);
        sessions.detach(key);
        assert_eq!((sessions.len(), Arc::strong_count(&session)), (0, 1));
    }

    #[test]
    fn a_session_that_has_the_id_of_one_that_ended_has_none_of_its_files() {
        let (old, new) = (session(9), session(9));
        let (mut sessions, old_key) = worker(&old);
        let handle = insert(&old);
        assert!(sessions.file(old_key, handle).is_some());
        let new_key = sessions.attach(&new, &None).unwrap();
        assert!(sessions.file(new_key, handle).is_none());
        sessions.detach(old_key);
        assert_eq!(sessions.attach(&new, &None).unwrap(), new_key);
    }

    #[test]
    fn a_connection_too_many_leaves_nothing_behind() {
        let session = session(0);
        let mut sessions = LocalSessions::default();
        assert!(sessions.attach(&session, &None).is_err());
        assert_eq!((sessions.len(), Arc::strong_count(&session)), (0, 1));
    }

    #[test]
    fn a_workers_view_of_a_file_is_kept_until_the_file_is_closed_by_whichever_worker() {
        let session = session(9);
        let ((mut here, key), (there, other)) = (worker(&session), worker(&session));
        let handle = insert(&there[other].session);
        let file = here.file(key, handle).unwrap();
        assert!(Rc::ptr_eq(&file, &here.file(key, handle).unwrap()));
        let closed = there[other].session.close(handle).unwrap();
        assert!(here.file(key, handle).is_none(), "before anybody has told this worker");
        assert!(Rc::strong_count(&file) == 2, "it has its view still");
        here.forget(ID, handle);
        assert_eq!(Rc::strong_count(&file), 1);
        drop(closed);

        // The next file has the same place and another handle.
        let next = insert(&there[other].session);
        assert_eq!(index_of(next), index_of(handle));
        assert!(here.file(key, next).is_some() && here.file(key, handle).is_none());
        here.forget(ID, handle);
        let file = here.file(key, next).unwrap();
        assert_eq!(Rc::strong_count(&file), 2, "it is not the one that was to be forgotten");
        here.forget(SessionId([2; 16]), next);
        assert_eq!(Rc::strong_count(&file), 2);
    }
}
