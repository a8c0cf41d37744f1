//! A new configuration, applied while the server runs: whole, or not at all.
//!
//! ```text
//!   read and check the file --> open what is new, claim it, read who may connect --> apply --> wait
//!             `---------------- an error: nothing was changed ---------'
//! ```
//!
//! All that can fail, or hang on a file system, comes before anything is changed. It runs in a thread of its
//! own, one at a time. What clients have open of an export that has gone, or where they may do less than
//! before, is closed ([`crate::tenure`]); the thread waits for that, so that the file system may be unmounted
//! when the server says that the export was removed.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use raio_transport::sync::lock;

use crate::claim::{Attempt, Claim, try_claim};
use crate::config::Config;
use crate::engine::Job;
use crate::export::{Export, Exports};
use crate::export_spec::{ExportSpec, Source};
use crate::keys::{Keys, NewClients};
use crate::limits::{Caps, Limits, session_bytes, session_limits};
use crate::pool::Pool;
use crate::root::Root;
use crate::state_directory::StateDirectory;
use crate::stats::Counters;
use crate::stored::Place;
use crate::tuning::reload::{CLOSE_CHECK, CLOSE_TIMEOUT};
use crate::verifier::Verifier;
use crate::worker::{Mail, Settings, Shared};
use crate::{file_identity, log};

/// A directory or file that the sandbox has allowed to open, with everything beneath it.
#[derive(Debug)]
pub struct Granted {
    /// Its path, without symbolic links.
    pub path: PathBuf,
    /// For writing, too.
    pub is_writable: bool,
    /// With the block devices that it has.
    pub has_devices: bool,
}

impl Granted {
    /// What was granted for an export of the start.
    pub fn of_export(export: &Export) -> Option<Self> {
        let (root, spec) = (export.root()?, export.spec());
        Some(Self {
            path: root.as_path().to_owned(),
            is_writable: spec.is_writable,
            has_devices: spec.has_devices || root.is_device(),
        })
    }

    /// A directory that `exports-beneath` names.
    pub fn beneath(path: PathBuf) -> Self {
        Self { path, is_writable: true, has_devices: true }
    }
}

/// Exports that are written to, by their names, and what each claims.
pub type Claims = HashMap<String, Claim>;

/// What a reload needs of a server that has started.
#[derive(Debug)]
pub struct Reloader {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// What all clients have.
    pub limits: Arc<Limits>,
    /// Each worker's.
    pub counters: Vec<Arc<Counters>>,
    /// The threads for file operations.
    pub pool: &'static Pool<Job>,
    /// The limit on open files.
    pub descriptors: usize,
    /// Where exports are claimed.
    pub state: Option<Arc<StateDirectory>>,
    /// What the sandbox allows to open. None: there is none, or it does not restrict that.
    pub granted: Option<Vec<Granted>>,
    /// Workers count requests: that is decided at the start.
    pub counts_requests: bool,
    /// What the server runs with.
    pub running: Mutex<Running>,
}

/// The configuration that a server runs with.
#[derive(Debug)]
pub struct Running {
    /// What was read last.
    pub config: Arc<Config>,
    /// What is claimed.
    pub claims: Claims,
}

/// What becomes of the exports.
struct ExportPlan {
    exports: Vec<Arc<Export>>,
    /// Those that are not as before.
    changed: Vec<Arc<Export>>,
    /// Those whose files are closed.
    over: Vec<Arc<Export>>,
    /// What is claimed from then on, and the lock of that if it is not what was.
    claims: Claims,
    lock: Option<Arc<OwnedFd>>,
    texts: Vec<String>,
}

impl Reloader {
    /// Reads the configuration file again, and who may connect, and applies it. Returns what has changed, a
    /// line each. After an error nothing has.
    pub fn reload(&self) -> anyhow::Result<Vec<String>> {
        let result = self.try_reload();
        self.shared.last_reload_failed.store(result.is_err(), Ordering::Relaxed);
        if result.is_ok() {
            self.shared.config_generation.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    fn try_reload(&self) -> anyhow::Result<Vec<String>> {
        let mut running = lock(&self.running);
        let old = Arc::clone(&running.config);
        let new = match old.path() {
            Some(_) => Arc::new(old.read_again()?),
            None => Arc::clone(&old),
        };
        // All that can fail.
        let limits = self.check_limits(&old, &new)?;
        let mut plan = self.plan_exports(&running, &new)?;
        let clients = self.shared.keys.as_ref().map(|keys| keys.read_again(kinds(&plan.exports)));
        let clients = clients.transpose()?;
        self.claim(&running, &new, &mut plan)?;
        let mut texts = std::mem::take(&mut plan.texts);
        texts.extend(self.hand_out_claim(&plan)?);

        texts.extend(describe_settings(&old, &new));
        self.apply_settings(&old, &new, limits);
        let over = std::mem::take(&mut plan.over);
        self.apply_exports(&plan);
        texts.extend(clients.map(|clients| self.apply_clients(clients)));
        self.close_files(&over);
        let are_closed = await_closed(&over, &mut texts);
        self.release_claims(&plan, are_closed);
        texts.extend(old.changed_in_vain(&new).map(|key| {
            format!("{key} has changed in the file, to no effect: the command line says otherwise.")
        }));
        (running.config, running.claims) = (new, plan.claims);
        Ok(texts)
    }

    // Checks, and what is opened
    // ----------------------------------------------------------------------------------------------------

    /// How many sessions there may be, and how many descriptors their files may take.
    fn check_limits(&self, old: &Config, new: &Config) -> anyhow::Result<(usize, usize)> {
        if let Some(sessions) = new.sessions_max.filter(|_| new.sessions_max != old.sessions_max) {
            let bytes = sessions.saturating_mul(session_bytes(new.workers));
            ensure!(
                bytes <= old.places_bytes,
                "{} is {sessions}: they may take {bytes} bytes, and the server has set aside {} when it \
                 started. Give a smaller number, or start the server anew",
                new.name("max-sessions"),
                old.places_bytes
            );
        }
        for (key, caps) in
            [("limits-per-session", new.session_caps), ("limits-per-address", new.address_caps)]
        {
            ensure!(
                caps.requests.is_none() || self.counts_requests,
                "{}: the server does not count requests, because nobody had a limit on them when it started. \
                 Start the server anew, or leave `requests` out",
                new.name(key)
            );
        }
        session_limits(self.descriptors, new.sessions_max)
    }

    /// Opens what is new. Nothing is served by it yet.
    fn plan_exports(&self, running: &Running, new: &Config) -> anyhow::Result<ExportPlan> {
        let current = self.shared.exports.current();
        let (mut exports, mut changed, mut over, mut texts) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut claims = Claims::new();
        let name = new.name("export");
        for spec in &new.exports {
            let known = current.named(&spec.name);
            if let Some(export) = known.filter(|export| export.spec() == spec) {
                exports.push(Arc::clone(export));
                claims.extend(running.claims.get_key_value(&spec.name).map(|(k, v)| (k.clone(), v.clone())));
                continue;
            }
            self.check_granted(spec).with_context(|| name.clone())?;
            let export = match known {
                None => {
                    let (place, lanes) = self.shared.exports.place(&spec.name, self.pool)?;
                    texts.push(format!("Export {} was added: {}.", spec.name, describe_export(spec)));
                    Export::open(spec, place, lanes)
                }
                Some(old) => {
                    let ends = may_do_less(old.spec(), spec);
                    if ends {
                        over.push(Arc::clone(old));
                    }
                    let files = if ends { " What clients had open of it was closed." } else { "" };
                    texts.push(format!(
                        "Export {} was changed: {}.{files}",
                        spec.name,
                        describe_export(spec)
                    ));
                    old.succeeded_by(spec, ends)
                }
            };
            let export = Arc::new(export.with_context(|| name.clone())?);
            if let Some(claim) = export.claim().with_context(|| name.clone())? {
                claims.insert(spec.name.clone(), claim);
            }
            changed.push(Arc::clone(&export));
            exports.push(export);
        }
        for export in current.all() {
            if !new.exports.iter().any(|spec| spec.name == export.name()) {
                texts.push(format!("Export {} was removed.", export.name()));
                over.push(Arc::clone(export));
            }
        }
        Ok(ExportPlan { exports, changed, over, claims, lock: None, texts })
    }

    /// Whether the sandbox lets this export be served.
    fn check_granted(&self, spec: &ExportSpec) -> anyhow::Result<()> {
        let (Some(granted), Source::Path(path)) = (&self.granted, &spec.source) else { return Ok(()) };
        let real = path.canonicalize();
        let real = real.with_context(|| format!("Cannot export {} as {:?}", path.display(), spec.name))?;
        let is_enough = |granted: &Granted| {
            real.starts_with(&granted.path)
                && (granted.is_writable || !spec.is_writable)
                && (granted.has_devices || !spec.has_devices)
        };
        ensure!(
            granted.iter().any(is_enough),
            "export {}: the sandbox of the server, which cannot be widened, does not allow {}{}. Name a \
             directory above it in exports-beneath, and start the server anew once; sessions go on",
            spec.name,
            real.display(),
            if spec.is_writable { " for writing" } else { "" }
        );
        Ok(())
    }

    /// Makes sure that nobody else writes to what is written to from now on, and finds the verifiers.
    fn claim(&self, running: &Running, new: &Config, plan: &mut ExportPlan) -> anyhow::Result<()> {
        let is_new = |(name, claim): &(&String, &Claim)| running.claims.get(*name) != Some(claim);
        let has_new = plan.claims.iter().any(|one| is_new(&one));
        let Some(directory) = &self.state else {
            ensure!(
                !has_new || !new.is_strict,
                "With --strict nothing is exported for writing without a state directory. Name one with \
                 --state, and start the server anew"
            );
            if has_new && running.claims.is_empty() {
                tracing::warn!(
                    name: "state-directory-missing-now",
                    "There is no state directory, so nothing keeps another server from writing to the same \
                     files. Name one with --state, and start the server anew."
                );
            }
            return Ok(());
        };
        if plan.claims == running.claims {
            return Ok(());
        }
        let boot = file_identity::boot();
        let claims: Vec<_> = plan.claims.values().cloned().collect();
        let locks = lock(&self.shared.claims);
        match try_claim(directory, &claims, &locks)? {
            Attempt::Locked(lock) => plan.lock = Some(lock),
            Attempt::Busy(why) => bail!("{}: {why}", new.name("export")),
        }
        drop(locks);
        for export in &plan.changed {
            if let Some(claim) = plan.claims.get(export.name()) {
                keep_verifier(directory, export, claim, boot)?;
            }
        }
        Ok(())
    }

    // What is applied, and does not fail
    // ----------------------------------------------------------------------------------------------------

    fn tell(&self, mail: impl Fn() -> Mail) {
        for worker in self.shared.workers.get().into_iter().flatten() {
            worker.mailbox.send(mail());
        }
    }

    fn apply_settings(&self, old: &Config, new: &Config, (sessions_max, files_max): (usize, usize)) {
        self.limits.set(new.session_caps, new.address_caps, files_max);
        self.shared.sessions.set_max(sessions_max);
        let settings = Settings::of(new);
        if Settings::of(old) != settings {
            self.tell(|| Mail::Set(settings));
        }
        log::set_level(new.log);
    }

    /// Registers a new claim with each worker's ring, before the new exports are served. Returns a warning
    /// for the administrator if a ring has no room for it.
    fn hand_out_claim(&self, plan: &ExportPlan) -> anyhow::Result<Option<String>> {
        let Some(new) = &plan.lock else { return Ok(None) };
        let mut claims = lock(&self.shared.claims);
        claims.push(Arc::clone(new));
        let taken = self.tell_claims(&claims);
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        let mut has_room = true;
        for _ in self.shared.workers.get().into_iter().flatten() {
            let Ok(of_one) = taken.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                claims.pop();
                self.tell_claims(&claims);
                bail!(
                    "A worker does not react within {CLOSE_TIMEOUT:?}. `raio admin workers` says which, and \
                     why."
                );
            };
            has_room &= of_one;
        }
        let text = "The limit on open files leaves no room for a ring's table of files, so if this server is \
                    killed, the next one does not wait for its requests in flight. Raise it with \
                    `ulimit -n`, or LimitNOFILE= in the unit.";
        Ok((!has_room).then(|| text.to_owned()))
    }

    /// Replaces the claims that are registered with the workers' rings. Each worker sends over the returned
    /// channel whether there was room for all of them.
    fn tell_claims(&self, claims: &[Arc<OwnedFd>]) -> mpsc::Receiver<bool> {
        let (sender, taken) = mpsc::channel();
        self.tell(|| Mail::Claim(claims.to_vec(), sender.clone()));
        taken
    }

    fn apply_exports(&self, plan: &ExportPlan) {
        let now = Instant::now();
        for export in &plan.changed {
            self.counters.iter().for_each(|counters| counters.exports.prepare(export.place()));
            self.shared.throttles.set_export(export.place(), export.spec().rates, now);
        }
        self.shared.exports.replace(Exports::of(plan.exports.clone()));
    }

    fn apply_clients(&self, clients: NewClients) -> String {
        let Some(keys) = &self.shared.keys else { return String::new() };
        let revocation = keys.replace(clients);
        say_unknown_exports(keys);
        let exports = self.shared.exports.current();
        self.shared.stored.set(counted_places(keys, &exports));
        let named = |place| exports.all().iter().find(|export| export.place() == place);
        self.shared.throttles.update(|client, place| keys.rates(client, named(place)?.name()));
        // The table of sessions is that of all workers.
        if let Some(worker) = self.shared.workers.get().and_then(|workers| workers.first()) {
            worker.mailbox.send(Mail::Revoke(Arc::new(revocation)));
        }
        format!(
            "Read clients.toml again: {} clients may connect. Sessions of those that may do less than before \
             end.",
            keys.count()
        )
    }

    /// Closes what clients have open of exports that are over.
    fn close_files(&self, over: &[Arc<Export>]) {
        if over.is_empty() {
            return;
        }
        over.iter().for_each(|export| export.tenure().end());
        let files = self.shared.sessions.revoke_files();
        if let Some(audit) = &self.shared.audit {
            files.iter().filter_map(|file| file.audited.as_deref()).for_each(|file| audit.closed(file));
        }
        drop(files);
        self.tell(|| Mail::Leave);
    }

    /// Others may have what is not exported for writing any more, unless something of it is still open.
    fn release_claims(&self, plan: &ExportPlan, are_closed: bool) {
        if let Some(new) = plan.lock.as_ref().filter(|_| are_closed) {
            let mut claims = lock(&self.shared.claims);
            *claims = vec![Arc::clone(new)];
            self.tell_claims(&claims);
        }
    }
}

/// Waits until nothing is open of these. Whether that is so.
fn await_closed(over: &[Arc<Export>], texts: &mut Vec<String>) -> bool {
    let deadline = Instant::now() + CLOSE_TIMEOUT;
    let is_open = |export: &&Arc<Export>| export.tenure().uses() > 0;
    while over.iter().any(|export| is_open(&export)) && Instant::now() < deadline {
        std::thread::sleep(CLOSE_CHECK);
    }
    let open: Vec<_> = over.iter().filter(is_open).collect();
    for export in &open {
        texts.push(format!(
            "Something of export {} is still open after {CLOSE_TIMEOUT:?}: its file system does not answer, \
             or somebody holds a lease. Nothing new is begun there.",
            export.name()
        ));
    }
    open.is_empty()
}

/// Has an export keep its verifier in the state directory.
pub fn keep_verifier(
    directory: &Arc<StateDirectory>,
    export: &Export,
    claim: &Claim,
    boot: &str,
) -> anyhow::Result<()> {
    let name = format!("{}{}", crate::verifier::PREFIX, claim.key());
    let about = format!("{} {}", claim.name, claim.path);
    Verifier::keep(export.verifier(), directory, &name, &about, boot)
}

/// Which exports there are, and whether each is a directory.
pub fn kinds(exports: &[Arc<Export>]) -> HashMap<String, bool> {
    let is_directory = |export: &Export| export.root().is_some_and(Root::is_directory);
    exports.iter().map(|export| (export.name().to_owned(), is_directory(export))).collect()
}

/// Logs which exports clients are to have that there are not.
pub fn say_unknown_exports(keys: &Keys) {
    for name in keys.unknown_exports() {
        tracing::warn!(
            name: "client-export-unknown",
            export = name,
            "clients.toml names an export that there is not. Correct the name, or add the export."
        );
    }
}

/// The directories where what clients store is limited.
pub fn counted_places(keys: &Keys, exports: &Exports) -> Vec<Place> {
    let place = |(name, directory): (String, String)| Some((exports.named(&name)?.place(), directory));
    keys.counted_directories().into_iter().filter_map(place).collect()
}

/// Whether what clients have open of an export may be too much when it becomes another.
fn may_do_less(old: &ExportSpec, new: &ExportSpec) -> bool {
    let is_shorter =
        |old: Option<u64>, new: Option<u64>| new.is_some_and(|new| old.is_none_or(|old| new < old));
    old.source != new.source
        || old.is_writable && !new.is_writable
        || old.has_devices && !new.has_devices
        || old.may_grow && !new.may_grow
        || old.crosses_mounts && !new.crosses_mounts
        || !old.must_be_mountpoint && new.must_be_mountpoint
        || is_shorter(old.file_bytes_max, new.file_bytes_max)
}

/// What an export is, for people.
fn describe_export(spec: &ExportSpec) -> String {
    let source = match &spec.source {
        Source::Path(path) => path.display().to_string(),
        Source::Null(size) => format!("{size} bytes of nothing"),
        Source::Memory(size) => format!("{size} bytes of memory"),
    };
    let options = [
        (spec.is_writable, "rw"),
        (!spec.is_writable, "ro"),
        (spec.is_direct, "direct"),
        (spec.must_be_mountpoint, "mountpoint"),
        (spec.has_devices, "devices"),
        (spec.may_grow, "grow"),
        (spec.file_bytes_max.is_some(), "max-file-size"),
        (spec.crosses_mounts, "cross-mounts"),
        (spec.rates.limit(), "with rates"),
    ];
    let options = options.into_iter().filter(|(is_given, _)| *is_given);
    options.fold(source, |text, (_, option)| text + ", " + option)
}

/// What else has changed, a line each.
fn describe_settings(old: &Config, new: &Config) -> Vec<String> {
    let mut texts = Vec::new();
    let mut note = |is_same: bool, key: &str, value: String| {
        if !is_same {
            texts.push(format!("{key} is {value} now."));
        }
    };
    let number = |number: Option<usize>| number.map_or("the default".to_owned(), |n| n.to_string());
    let seconds = |time: std::time::Duration| time.as_secs().to_string();
    note(old.sessions_max == new.sessions_max, "max-sessions", number(new.sessions_max));
    note(old.session_caps == new.session_caps, "limits-per-session", describe_caps(&new.session_caps));
    note(old.address_caps == new.address_caps, "limits-per-address", describe_caps(&new.address_caps));
    note(old.stall_timeout == new.stall_timeout, "stall-timeout", seconds(new.stall_timeout));
    note(old.linger == new.linger, "linger", seconds(new.linger));
    note(old.spin == new.spin, "spin-us", new.spin.as_micros().to_string());
    note(old.slow == new.slow, "slow", new.slow.as_millis().to_string());
    note(old.log == new.log, "log", format!("{:?}", new.log).to_lowercase());
    texts
}

fn describe_caps(caps: &Caps) -> String {
    let number = |key: &str, number: Option<usize>| number.map(|number| format!("{key}={number}"));
    let memory = caps.memory.map(|memory| format!("memory={}", memory.0));
    let all = [
        number("connections", caps.connections),
        number("files", caps.files),
        number("requests", caps.requests),
        memory,
    ];
    let all: Vec<_> = all.into_iter().flatten().collect();
    if all.is_empty() { "none".to_owned() } else { all.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> ExportSpec {
        text.parse().unwrap()
    }

    #[test]
    fn files_are_closed_if_clients_may_do_less_or_the_export_lies_elsewhere() {
        for (old, new, expected) in [
            ("a=/x", "a=/x,rw", false),
            ("a=/x,rw", "a=/x", true),
            ("a=/x", "a=/y", true),
            ("a=/x,direct", "a=/x", false),
            ("a=/x", "a=/x,direct", false),
            ("a=mem:1M", "a=mem:2M", true),
            ("a=mem:1M,rw", "a=null:1M", true),
        ] {
            assert_eq!(may_do_less(&spec(old), &spec(new)), expected, "{old} {new}");
        }
        let base = spec("a=/x,rw");
        let limited = |bytes| ExportSpec { file_bytes_max: bytes, ..base.clone() };
        for (old, new, expected) in [(None, Some(1), true), (Some(1), None, false), (Some(1), Some(2), false)]
        {
            assert_eq!(may_do_less(&limited(old), &limited(new)), expected, "{old:?} {new:?}");
        }
        let with = ExportSpec { has_devices: true, crosses_mounts: true, may_grow: true, ..base.clone() };
        assert!(may_do_less(&with, &base) && !may_do_less(&base, &with));
        let mounted = ExportSpec { must_be_mountpoint: true, ..base.clone() };
        assert!(may_do_less(&base, &mounted) && !may_do_less(&mounted, &base));
    }

    #[test]
    fn an_export_is_described_as_it_is_configured() {
        assert_eq!(describe_export(&spec("a=/x,rw,direct")), "/x, rw, direct");
        assert_eq!(describe_export(&spec("a=mem:1M")), "1048576 bytes of memory, ro");
    }
}
