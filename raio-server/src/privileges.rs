//! What the server is, to the kernel: its user and groups, its capabilities, and the limits that it raises
//! while it may.
//!
//! Capabilities and user belong to threads, and new threads inherit them: all of this is for a process that
//! has one thread yet.

use anyhow::{Context, anyhow};
use nix::unistd::{self, Gid, Uid};
use rustix::process::{DumpableBehavior, Resource, Rlimit, geteuid, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use rustix::{process, thread};

const ALLOW_CAPSET: &str = "Run the server as an ordinary user, or allow capget(2) and capset(2) in the \
                            seccomp profile of the container or unit";

/// Whom the server is to run as.
#[derive(Debug)]
pub struct User {
    name: String,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl User {
    /// The user of this name or, if there is none, with this number.
    pub fn find(text: &str) -> anyhow::Result<Self> {
        let cannot = || format!("Cannot look up the user that --user names, {text}");
        let mut user = unistd::User::from_name(text).with_context(cannot)?;
        if user.is_none()
            && let Ok(uid) = text.parse()
        {
            user = unistd::User::from_uid(Uid::from_raw(uid)).with_context(cannot)?;
        }
        let user = user.ok_or_else(|| {
            anyhow!(
                "There is no user {text:?} on this machine. Add it (`useradd --system`), or give the name or \
                 number of another one with --user."
            )
        })?;
        let name = std::ffi::CString::new(user.name.as_str())?;
        let groups = unistd::getgrouplist(&name, user.gid).with_context(cannot)?;
        Ok(Self { name: user.name, uid: user.uid, gid: user.gid, groups })
    }

    /// Its number, and that of its group.
    pub fn ids(&self) -> (u32, u32) {
        (self.uid.as_raw(), self.gid.as_raw())
    }

    /// Whether this process is that user already, with no more groups.
    fn is_current(&self) -> bool {
        let same = unistd::getresuid().is_ok_and(|ids| [ids.real, ids.effective, ids.saved] == [self.uid; 3])
            && unistd::getresgid().is_ok_and(|ids| [ids.real, ids.effective, ids.saved] == [self.gid; 3]);
        same && unistd::getgroups().is_ok_and(|now| now.iter().all(|group| self.groups.contains(group)))
    }

    /// Becomes this user, and keeps the permitted capabilities.
    fn assume(&self) -> anyhow::Result<()> {
        if self.is_current() {
            return Ok(());
        }
        let Self { name, uid, gid, groups } = self;
        let assume = || {
            thread::set_keep_capabilities(true)?;
            unistd::setgroups(groups)?;
            unistd::setresgid(*gid, *gid, *gid)?;
            unistd::setresuid(*uid, *uid, *uid)?;
            anyhow::Ok(thread::set_keep_capabilities(false)?)
        };
        assume().with_context(|| {
            format!(
                "Cannot become user {name} ({uid}), as --user asks. Start the server as root (with \
                 CAP_SETUID and CAP_SETGID), or start it as that user and without --user"
            )
        })
    }
}

/// The capabilities of this process. None: it is an ordinary user's, and a sandbox forbids to ask.
fn current() -> anyhow::Result<Option<CapabilitySets>> {
    match capabilities(None) {
        Err(_) if !geteuid().is_root() => Ok(None),
        sets => sets.map(Some).with_context(|| format!("Cannot ask for capabilities. {ALLOW_CAPSET}")),
    }
}

/// Drops CAP_FSETID. A write by a client must clear the set-user-ID and set-group-ID bits of a file, as a
/// write by an ordinary user does; the kernel does not clear them for a thread with this capability.
pub fn drop_fsetid() -> anyhow::Result<()> {
    match current()? {
        Some(sets) if (sets.effective | sets.permitted).contains(CapabilitySet::FSETID) => {
            retain(sets, !CapabilitySet::FSETID)
        }
        _ => Ok(()),
    }
}

/// Becomes the user, if one is given, and gives up all capabilities but that to listen on ports below 1024,
/// and that to give files to others: whether clients need it is not known yet.
pub fn reduce(user: Option<&User>) -> anyhow::Result<()> {
    let Some(sets) = current()? else { return user.map_or(Ok(()), User::assume) };
    // Kernels before 4.3 have no ambient set.
    let _ = thread::clear_ambient_capability_set();
    // Without this capability the set stays; but once there are no new privileges it is of no use.
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        for capability in (0..64).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
            if thread::capability_is_in_bounding_set(capability) != Ok(true) {
                continue;
            }
            thread::remove_capability_from_bounding_set(capability)
                .context("Cannot take a capability out of the bounding set")?;
        }
    }
    user.map_or(Ok(()), User::assume)?;
    let kept = CapabilitySet::NET_BIND_SERVICE | CapabilitySet::CHOWN;
    current()?.map_or(Ok(()), |sets| retain(sets, kept))
}

/// Gives up all capabilities, but that to give files to others if it is kept.
pub fn drop_all(chown: Chown) -> anyhow::Result<()> {
    let kept = if chown == Chown::Kept { CapabilitySet::CHOWN } else { CapabilitySet::empty() };
    current()?.map_or(Ok(()), |sets| retain(sets, kept))
}

/// What becomes of CAP_CHOWN, the capability to give files to other users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chown {
    /// The server has it as long as it runs.
    Kept,
    /// The server had it, and no client needed it.
    GivenUp,
    /// The server was started without it.
    Missing,
}

/// To whom a server can give the files that it creates: to its own user and groups, and with CAP_CHOWN to
/// anybody.
#[derive(Clone, Debug)]
pub struct Giving {
    uid: u32,
    gids: Vec<u32>,
    chown: Chown,
}

impl Giving {
    /// What this process can do, which is the user already that it stays. It keeps CAP_CHOWN if these
    /// users or groups take it, or if it gives up nothing.
    pub fn needed_for(users: &[u32], groups: &[u32], gives_up: bool) -> anyhow::Result<Self> {
        let more = unistd::getgroups().context("Cannot ask for the groups of this process")?;
        let gids = std::iter::once(unistd::getegid()).chain(more).map(Gid::as_raw).collect();
        let mut this = Self { uid: geteuid().as_raw(), gids, chown: Chown::Missing };
        if current()?.is_some_and(|sets| sets.effective.contains(CapabilitySet::CHOWN)) {
            let is_own = users.iter().all(|&uid| this.is_own_user(uid))
                && groups.iter().all(|&gid| this.is_own_group(gid));
            this.chown = if is_own && gives_up { Chown::GivenUp } else { Chown::Kept };
        }
        Ok(this)
    }

    /// Of a server with this user, these groups, and this capability.
    #[cfg(test)]
    pub fn by(uid: u32, gids: &[u32], chown: Chown) -> Self {
        Self { uid, gids: gids.to_vec(), chown }
    }

    /// One without limits.
    #[cfg(test)]
    pub fn to_anybody() -> Self {
        Self::by(0, &[0], Chown::Kept)
    }

    /// What becomes of CAP_CHOWN.
    pub fn chown(&self) -> Chown {
        self.chown
    }

    fn is_own_user(&self, uid: u32) -> bool {
        self.uid == uid
    }

    fn is_own_group(&self, gid: u32) -> bool {
        self.gids.contains(&gid)
    }

    /// Whether files can be given to this user. The error is a clause.
    pub fn can_give_to_user(&self, uid: u32) -> Result<(), &'static str> {
        self.can_give(self.is_own_user(uid))
    }

    /// The same of a group.
    pub fn can_give_to_group(&self, gid: u32) -> Result<(), &'static str> {
        self.can_give(self.is_own_group(gid))
    }

    fn can_give(&self, is_own: bool) -> Result<(), &'static str> {
        match self.chown {
            _ if is_own => Ok(()),
            Chown::Kept => Ok(()),
            Chown::GivenUp => Err(
                "it has given up CAP_CHOWN, which no client needed when it started. To change that, start \
                 the server anew",
            ),
            Chown::Missing => Err(
                "it was started without CAP_CHOWN. Start it as root, with --user if it is not to stay root, \
                 or name its own user and groups",
            ),
        }
    }
}

/// Makes these the effective capabilities, as far as they are permitted, and gives up the others.
fn retain(sets: CapabilitySets, kept: CapabilitySet) -> anyhow::Result<()> {
    if sets.permitted.is_empty() && sets.inheritable.is_empty() {
        return Ok(());
    }
    let permitted = sets.permitted & kept;
    let inheritable = sets.inheritable & kept;
    set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable })
        .with_context(|| format!("Cannot give up capabilities. {ALLOW_CAPSET}"))
}

/// Raises the limit on locked memory as far as it may be: root, who has no limit, may be another user soon.
pub fn raise_memlock() {
    let Rlimit { current, maximum } = getrlimit(Resource::Memlock);
    let unlimited = Rlimit { current: None, maximum: None };
    if current.is_some() && setrlimit(Resource::Memlock, unlimited).is_err() && current != maximum {
        let _ = setrlimit(Resource::Memlock, Rlimit { current: maximum, maximum });
    }
}

/// Keeps the memory of this process, clients' data among it, from debuggers of its user and out of core
/// dumps; and no program that it might start gets more privileges than it has.
pub fn hide() -> rustix::io::Result<()> {
    thread::set_no_new_privs(true)?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let _ = setrlimit(Resource::Core, none);
    process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_name_and_by_number() {
        let root = User::find("root").unwrap();
        assert_eq!((root.ids(), root.name.as_str()), ((0, 0), "root"));
        assert_eq!(User::find("0").unwrap().name, "root");
        assert!(root.groups.contains(&Gid::from_raw(0)));
    }

    #[test]
    fn files_are_given_to_own_users_and_groups_or_with_the_capability_to_anybody() {
        for (chown, others) in
            [(Chown::Kept, None), (Chown::GivenUp, Some("anew")), (Chown::Missing, Some("root"))]
        {
            let giving = Giving::by(5, &[6, 7], chown);
            assert!(giving.can_give_to_user(5).is_ok() && giving.can_give_to_group(7).is_ok());
            for result in [giving.can_give_to_user(6), giving.can_give_to_group(5)] {
                match others {
                    None => assert!(result.is_ok()),
                    Some(needle) => assert!(result.unwrap_err().contains(needle), "{result:?}"),
                }
            }
        }
        let (uid, gid) = (geteuid().as_raw(), unistd::getegid().as_raw());
        let own = Giving::needed_for(&[uid], &[gid], true).unwrap();
        assert!(own.chown() != Chown::Kept, "its own files need no capability");
        let others = Giving::needed_for(&[uid + 1], &[], true).unwrap();
        assert_ne!(others.chown(), Chown::GivenUp);
        assert_eq!(others.can_give_to_user(uid + 1).is_ok(), others.chown() == Chown::Kept);
    }

    #[test]
    fn a_user_that_does_not_exist_is_named() {
        for text in ["no-such-user", "4242424242", "-1", "", "root\0x"] {
            let error = format!("{:#}", User::find(text).unwrap_err());
            assert!(error.contains("--user"), "{text:?}: {error}");
        }
    }
}
