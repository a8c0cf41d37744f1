//! The handles of a session's files.
//!
//! A handle is an index that is used again and, above it, a generation that is not (until it wraps). The
//! server chooses the handle of a file that is opened, and the client that of a file that it reopens: the one
//! that an earlier server gave it. Whatever clients choose, the memory for handles is in proportion to the
//! files that were open at a time.

use std::collections::HashMap;

use raio_transport::protocol::FileHandle;

const INDEX_BITS: u32 = 20;
const INDEX_MASK: u32 = (1 << INDEX_BITS) - 1;
/// The generations are from 1 to this one, so that no handle is all zeros.
pub const GENERATION_MAX: u32 = u32::MAX >> INDEX_BITS;

/// How far the first generations of two sessions are apart that begin one after the other: the golden section
/// of all, so that each is far from the latest ones. It has no divisor in common with their number, so each
/// comes once before one comes again.
const SESSION_STRIDE: u32 = 2531;

/// The generation that the next session begins with, if one has begun with this. A client whose session has
/// expired still has the handles of its files, and the same client has the next session: no other file may
/// get one of them.
pub fn generation_of_next_session(generation: u32) -> u32 {
    (generation + SESSION_STRIDE - 1) % GENERATION_MAX + 1
}

/// The index in a handle.
pub fn index_of(handle: FileHandle) -> usize {
    (handle.0 & INDEX_MASK) as usize
}

/// Whether a server could have given this handle.
pub fn is_handle(handle: FileHandle) -> bool {
    generation_of(handle) != 0
}

fn generation_of(handle: FileHandle) -> u32 {
    handle.0 >> INDEX_BITS
}

fn handle(index: usize, generation: u32) -> FileHandle {
    FileHandle(generation << INDEX_BITS | index as u32)
}

fn after(generation: u32) -> u32 {
    generation % GENERATION_MAX + 1
}

/// See the module documentation.
#[derive(Debug)]
pub struct Handles<F> {
    /// By the index. Those without a file are free.
    near: Vec<Entry<F>>,
    /// How many of these have a file.
    near_open: usize,
    /// Indices that may be free. Those that are among them once.
    free: Vec<u32>,
    /// Files that were reopened under an index behind all of these.
    far: HashMap<usize, Entry<F>>,
    /// The generation that an index begins with.
    first_generation: u32,
}

#[derive(Debug)]
struct Entry<F> {
    file: Option<F>,
    /// That of the file.
    generation: u32,
    /// That of the next file that the server opens here.
    next: u32,
    /// It is in the list of free ones.
    is_listed: bool,
}

impl<F> Entry<F> {
    fn new(file: F, generation: u32) -> Self {
        Self { file: Some(file), generation, next: after(generation), is_listed: false }
    }
}

impl<F> Handles<F> {
    /// None yet. An index begins with this generation: if it is another one for each server and session, a
    /// handle of an earlier one is not likely to be given to another file before its own file is reopened.
    pub fn new(first_generation: u32) -> Self {
        let first_generation = first_generation.clamp(1, GENERATION_MAX);
        Self { near: Vec::new(), near_open: 0, free: Vec::new(), far: HashMap::new(), first_generation }
    }

    /// How many files there are.
    pub fn len(&self) -> usize {
        self.near_open + self.far.len()
    }

    /// Whether there can be no more.
    pub fn is_full(&self) -> bool {
        self.len() > INDEX_MASK as usize
    }

    /// Whether the index is one of about as many as there are files.
    pub fn is_near(&self, index: usize) -> bool {
        index < self.near.len()
    }

    fn entry(&self, index: usize) -> Option<&Entry<F>> {
        self.near.get(index).or_else(|| self.far.get(&index))
    }

    /// The file with this handle.
    pub fn get(&self, handle: FileHandle) -> Option<&F> {
        let entry = self.entry(index_of(handle))?;
        entry.file.as_ref().filter(|_| entry.generation == generation_of(handle))
    }

    /// Whether a file has the index of this handle: then no other one can have the handle.
    pub fn is_taken(&self, handle: FileHandle) -> bool {
        self.entry(index_of(handle)).is_some_and(|entry| entry.file.is_some())
    }

    /// Enters a file under a new handle. It must not be full.
    pub fn insert(&mut self, file: F) -> FileHandle {
        self.near_open += 1;
        while let Some(index) = self.free.pop() {
            let index = index as usize;
            let entry = &mut self.near[index];
            entry.is_listed = false;
            // One that was reopened has its place meanwhile.
            if entry.file.is_none() {
                entry.generation = entry.next;
                entry.next = after(entry.generation);
                entry.file = Some(file);
                return handle(index, entry.generation);
            }
        }
        self.move_far();
        let index = self.near.len();
        self.near.push(Entry::new(file, self.first_generation));
        handle(index, self.first_generation)
    }

    /// Enters a file under this handle, whose index must not be taken.
    pub fn put(&mut self, handle: FileHandle, file: F) {
        let (index, generation) = (index_of(handle), generation_of(handle));
        if let Some(entry) = self.near.get_mut(index) {
            entry.file = Some(file);
            entry.generation = generation;
            if generation >= entry.next {
                entry.next = after(generation);
            }
            self.near_open += 1;
            return;
        }
        self.far.insert(index, Entry::new(file, generation));
        if self.near_open == self.near.len() {
            self.move_far();
        }
    }

    /// The files that follow the near ones are near from now on.
    fn move_far(&mut self) {
        while let Some(entry) = self.far.remove(&self.near.len()) {
            self.near.push(entry);
            self.near_open += 1;
        }
    }

    /// Takes the handle from a file.
    pub fn remove(&mut self, handle: FileHandle) -> Option<F> {
        self.get(handle)?;
        let index = index_of(handle);
        if let Some(entry) = self.near.get_mut(index) {
            if !std::mem::replace(&mut entry.is_listed, true) {
                self.free.push(index as u32);
            }
            self.near_open -= 1;
            return entry.file.take();
        }
        let entry = self.far.remove(&index)?;
        // Nobody remembers which generations this index has had, so none begins with them.
        self.first_generation = self.first_generation.max(entry.next);
        entry.file
    }

    /// All files.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut F> {
        self.near.iter_mut().chain(self.far.values_mut()).filter_map(|entry| entry.file.as_mut())
    }

    /// The same, to look at.
    pub fn files(&self) -> impl Iterator<Item = &F> {
        self.near.iter().chain(self.far.values()).filter_map(|entry| entry.file.as_ref())
    }

    /// The same, as they are.
    pub fn into_files(self) -> impl Iterator<Item = F> {
        self.near.into_iter().chain(self.far.into_values()).filter_map(|entry| entry.file)
    }
}

impl<F> Default for Handles<F> {
    fn default() -> Self {
        Self::new(1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The most entries there can be, whether the server or a client chose the handles.
    fn entries<F>(handles: &Handles<F>) -> usize {
        handles.near.len().max(handles.free.len()) + handles.far.len()
    }

    #[test]
    fn handles_differ_until_their_generation_wraps() {
        for first in [1, 7, GENERATION_MAX] {
            let mut handles = Handles::new(first);
            let mut seen = HashSet::new();
            for n in 0..GENERATION_MAX {
                let handle = handles.insert(n);
                assert!(is_handle(handle) && seen.insert(handle), "{handle:?} was given twice");
                assert_eq!(handles.remove(handle), Some(n));
            }
        }
    }

    #[test]
    fn sessions_begin_with_all_generations_before_one_comes_again() {
        let mut seen = HashSet::new();
        let mut generation = GENERATION_MAX;
        for _ in 0..GENERATION_MAX {
            assert!((1..=GENERATION_MAX).contains(&generation) && seen.insert(generation));
            generation = generation_of_next_session(generation);
        }
        assert_eq!(generation, GENERATION_MAX);
    }

    #[test]
    fn files_are_reopened_in_any_order_and_keep_their_handles() {
        let mut before = Handles::new(5);
        let all: Vec<_> = (0..100).map(|n| before.insert(n)).collect();
        for step in [1, 7, 99] {
            let mut handles = Handles::new(9);
            for n in (0..100).map(|n| n * step % 100) {
                assert!(!handles.is_taken(all[n]));
                handles.put(all[n], n);
            }
            assert!((0..100).all(|n| handles.get(all[n]) == Some(&n)), "step {step}");
            assert_eq!(handles.len(), 100);
            let new = handles.insert(1000);
            assert!(!all.contains(&new));
            assert_eq!(handles.get(new), Some(&1000));
            assert!(all.iter().all(|&handle| handles.remove(handle).is_some()));
            assert_eq!(handles.len(), 1);
        }
    }

    #[test]
    fn an_index_has_one_file() {
        let mut handles = Handles::new(1);
        let first = handles.insert("a");
        let other = FileHandle(first.0 + (1 << INDEX_BITS));
        assert!(handles.is_taken(other));
        assert_eq!(handles.get(other), None);
        assert_eq!(handles.remove(other), None);
        handles.remove(first).unwrap();
        // Its place is free, and listed as free; so is it when the file has gone again.
        handles.put(other, "b");
        let third = handles.insert("c");
        assert_ne!(index_of(third), index_of(other));
        handles.remove(other).unwrap();
        let fourth = handles.insert("d");
        assert_eq!(index_of(fourth), index_of(other));
        assert!(![first, other].contains(&fourth), "a handle outlives its close");
        let next = FileHandle(fourth.0 + (1 << INDEX_BITS));
        handles.remove(fourth).unwrap();
        handles.put(first, "e");
        handles.remove(first).unwrap();
        assert_eq!(handles.insert("f"), next);
    }

    #[test]
    fn a_handle_that_is_far_away_is_not_given_to_another_file_after_its_close() {
        let mut handles = Handles::new(1);
        let far = handle(2, 9);
        handles.put(far, 0);
        handles.remove(far).unwrap();
        assert!((0..10).all(|n| handles.insert(n) != far));
    }

    #[test]
    fn it_is_full_when_each_index_has_a_file() {
        let mut handles = Handles::new(1);
        handles.put(handle(INDEX_MASK as usize, 1), 0);
        handles.put(handle(5, 1), 0);
        let count = std::iter::from_fn(|| (!handles.is_full()).then(|| handles.insert(1))).count();
        assert_eq!((count, handles.len()), (INDEX_MASK as usize - 1, 1 << INDEX_BITS));
        for file in [handle(INDEX_MASK as usize, 1), handle(5, 1)] {
            handles.remove(file).unwrap();
            let next = handles.insert(2);
            assert!(handles.is_full() && index_of(next) == index_of(file) && next != file);
        }
    }

    #[test]
    fn whatever_handles_a_client_chooses_they_take_memory_for_the_files_that_are_open() {
        let patterns: [fn(u32) -> u32; 5] =
            [|n| n, |n| n * 3, |n| INDEX_MASK - n, |n| n / 2 * 5, |n| n.wrapping_mul(2_654_435_761)];
        for pattern in patterns {
            let mut handles = Handles::new(1);
            let mut open = Vec::new();
            let mut most = 0;
            for n in 0..20_000 {
                let handle = handle((pattern(n) & INDEX_MASK) as usize, n % GENERATION_MAX + 1);
                if !handles.is_taken(handle) {
                    handles.put(handle, n);
                    open.push(handle);
                }
                if n % 7 == 0 {
                    open.push(handles.insert(n + 1_000_000));
                }
                most = most.max(handles.len());
                assert!(entries(&handles) <= 2 * most, "{} for {most} files", entries(&handles));
                while open.len() > (n as usize / 500) {
                    let gone = open.remove(n as usize % open.len());
                    assert!(handles.remove(gone).is_some());
                }
            }
            let left: HashSet<_> = open.iter().filter_map(|&handle| handles.get(handle)).collect();
            assert_eq!((left.len(), handles.len()), (open.len(), open.len()));
        }
    }
}
