//! Installing. Every step may be the last one of a process that is killed; the next run goes on by what it finds.

use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use crate::journal::{Change, Journal, State};
use crate::kube::{READY, VERSION, label_value};
use crate::node::Node;
use crate::plan::{self, Plan};
use crate::stage::{Programs, sha256};

/// A change that failed so often is not tried again unasked.
const ATTEMPTS: u32 = 2;

/// What an installation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    /// Whether new pods get other programs than before.
    pub(crate) programs: bool,
    /// Whether containerd was restarted.
    pub(crate) restarted: bool,
    /// Whether it has to be restarted, and was not because of [`Restart::Later`].
    pub(crate) postponed: bool,
}

/// What is done when containerd has to be restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Restart {
    /// It is.
    Now,
    /// Nothing yet: who asks waits first.
    Later,
}

/// Notes how long phases take.
struct Clock(Instant);

impl Clock {
    fn lap(&mut self, journal: &mut Journal, phase: &str) {
        let now = Instant::now();
        journal.durations.insert(phase.to_owned(), (now - self.0).as_secs_f64());
        self.0 = now;
    }
}

/// Installs. `why` is what the restart is for, in metrics; with `force` also what failed before.
///
/// # Errors
/// When the node cannot be installed on; containerd is as it was then.
pub(crate) fn install(node: &Node, programs: &Programs, why: &str, restart: Restart, force: bool) -> Result<Done> {
    let store = node.store();
    let lock = store.lock()?;
    let done = install_locked(node, programs, why, restart, force);
    if done.is_err() && store.load().is_ok_and(|journal| journal.is_blank()) {
        // Nothing came of it, so nothing stays.
        store.clear(&lock)?;
    }
    done
}

/// Removes sets of programs that no shim uses any more and new pods do not get.
///
/// # Errors
/// When one cannot be removed, or somebody else is at work.
pub(crate) fn collect(node: &Node) -> Result<()> {
    let store = node.store();
    let _lock = store.lock()?;
    node.stage().collect().map(drop)
}

fn install_locked(node: &Node, programs: &Programs, why: &str, restart: Restart, force: bool) -> Result<Done> {
    let store = node.store();
    let mut journal = store.load()?;
    if journal.state == State::RollingBack {
        log::warn!("an installation was cut off while it was taken back");
        roll_back(node, &mut journal)?;
    }
    let installed = journal.change.is_some();
    for (flag, was, is) in [
        ("install-dir", journal.install_dir.display().to_string(), node.install_dir.display().to_string()),
        ("handler", journal.handler.clone(), node.handler.clone()),
    ] {
        if installed && was != is {
            bail!(
                "runx is installed on this node with --{flag} {was}: uninstall that first, then install with --{flag} {is}"
            );
        }
    }
    let mut clock = Clock(Instant::now());
    let version = plan::version(node)?;
    journal.handler.clone_from(&node.handler);
    journal.distribution = node.distribution.name.to_owned();
    journal.containerd.clone_from(&version.text);
    journal.install_dir.clone_from(&node.install_dir);
    clock.lap(&mut journal, "detect");

    // Noted before, so that an uninstallation finds the programs whatever happens.
    let before = journal.clone();
    if journal.state == State::Absent {
        store.save(&mut journal)?;
    }
    let stage = node.stage();
    stage.bring(programs)?;
    let mut done = Done { programs: stage.flip(&programs.digest)?, ..Done::default() };
    journal.programs.clone_from(&programs.digest);
    clock.lap(&mut journal, "stage");

    let plan = plan::make(node, &version, &journal);
    store.clean()?;
    let plan = match plan {
        Ok(plan) => plan,
        Err(e) => {
            journal.reason = Some(format!("{e:#}"));
            store.save(&mut journal)?;
            return Err(e);
        }
    };
    journal.config_version = plan.config_version;
    clock.lap(&mut journal, "plan");

    let same = plan.current.as_deref() == Some(&plan.planned);
    // Where nothing is to be changed, one that is just starting is waited for, and not restarted.
    let status = if same && !journal.restart_pending { Some(node.answer()?) } else { node.status().ok() };
    let served = status.filter(|status| status.unready.is_none());
    let serves = served.as_ref().is_some_and(|status| status.handlers.contains(&node.handler));
    if !same || journal.restart_pending || !serves {
        if !force {
            refuse_a_third_time(&journal, &sha256(&plan.planned))?;
        }
        if restart == Restart::Later {
            // It is found again, whoever comes next.
            return Ok(Done { postponed: true, ..done });
        }
        apply(node, &mut journal, &plan, served.map(|it| it.handlers).unwrap_or_default(), why, &mut clock)?;
        done.restarted = true;
    }
    let changed = done.restarted || done.programs || before.state != State::Installed;
    journal.state = State::Installed;
    journal.failures = 0;
    journal.failed = None;
    journal.reason = None;
    if changed || before.programs != journal.programs || before.containerd != journal.containerd {
        store.save(&mut journal)?;
    }
    stage.collect()?;
    node.label(&[(READY, Some("true")), (VERSION, Some(&label_value(env!("CARGO_PKG_VERSION"))))])?;
    Ok(done)
}

fn refuse_a_third_time(journal: &Journal, digest: &str) -> Result<()> {
    if journal.failed.as_deref() == Some(digest) && journal.failures >= ATTEMPTS {
        bail!(
            "containerd did not come up with this configuration {} times, so it is not tried again: {}. When that is repaired: \
             runx-node install --force",
            journal.failures,
            journal.reason.as_deref().unwrap_or("no reason noted")
        );
    }
    Ok(())
}

/// Writes the file, restarts containerd and waits for the handler; or takes it back.
fn apply(
    node: &Node,
    journal: &mut Journal,
    plan: &Plan,
    others: Vec<String>,
    why: &str,
    clock: &mut Clock,
) -> Result<()> {
    let store = node.store();
    let digest = sha256(&plan.planned);
    // Before anything is changed: nobody shall send pods while containerd restarts.
    node.label(&[(READY, Some("installing"))])?;
    let written = plan.current.as_deref() == Some(&plan.planned) && journal.wrote(&plan.path, &plan.planned);
    if !written {
        let directories = match plan.path.parent() {
            // They are made below, and noted first.
            Some(parent) => missing(node, parent),
            None => Vec::new(),
        };
        store.keep(plan.base.as_deref(), plan.current.as_deref())?;
        let old = journal.change.take().filter(|change| change.path == plan.path);
        journal.change = Some(Change {
            path: plan.path.clone(),
            created: plan.base.is_none(),
            written: digest.clone(),
            had_previous: plan.current.is_some(),
            directories: old.map(|old| old.directories).unwrap_or_default().into_iter().chain(directories).collect(),
        });
    }
    journal.state = State::Installing;
    journal.restart_pending = true;
    store.save(journal)?;
    let applied = write_and_restart(node, journal, plan, &others, why, clock);
    match applied {
        Ok(()) => {
            journal.restart_pending = false;
            Ok(())
        }
        Err(e) => {
            journal.failures = if journal.failed.as_deref() == Some(&digest) { journal.failures + 1 } else { 1 };
            journal.failed = Some(digest);
            journal.reason = Some(format!("{e:#}"));
            roll_back(node, journal)?;
            Err(e.context("containerd did not serve runx, so its configuration was restored, and it serves as before"))
        }
    }
}

fn missing(node: &Node, directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut list: Vec<_> = directory.ancestors().filter(|path| !node.root.is_directory(path)).map(Into::into).collect();
    list.reverse();
    list
}

fn write_and_restart(
    node: &Node,
    journal: &mut Journal,
    plan: &Plan,
    others: &[String],
    why: &str,
    clock: &mut Clock,
) -> Result<()> {
    if let Some(parent) = plan.path.parent() {
        node.root.make_directories(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    if plan.current.as_deref() != Some(&plan.planned) {
        node.put(&plan.path, Some(&plan.planned))?;
        log::info!("wrote {}", plan.path.display());
    }
    clock.lap(journal, "write");
    node.restart(journal, why)?;
    clock.lap(journal, "restart");
    node.verify(true, others)?;
    clock.lap(journal, "verify");
    Ok(())
}

/// Restores the file that was changed last, and restarts containerd with it.
fn roll_back(node: &Node, journal: &mut Journal) -> Result<()> {
    let store = node.store();
    let reason = journal.reason.clone().unwrap_or_else(|| "it was cut off".to_owned());
    log::error!("taking the change back: {reason}");
    let Some(change) = journal.change.clone() else {
        bail!("the journal says that a change is to be taken back, and not which: look at containerd's configuration");
    };
    journal.state = State::RollingBack;
    store.save(journal)?;
    let previous = store.previous(&change)?;
    node.put(&change.path, previous.as_deref())?;
    for directory in change.directories.iter().rev() {
        node.root.remove_empty(directory).with_context(|| format!("remove {}", directory.display()))?;
    }
    // An older one of ours may have been there.
    let was_ours = match &previous {
        Some(bytes) => change.created || store.original()?.is_some_and(|original| original != *bytes),
        None => false,
    };
    let restored = node.restart(journal, "rollback").and_then(|()| node.verify(was_ours, &[]));
    if let Err(e) = restored {
        // The one thing left to tell others.
        let _ = node.label(&[(READY, Some("failed"))]);
        return Err(anyhow!(
            "containerd does not come up with its former configuration either ({}, restored byte for byte): {e:#}. The change was \
             taken back because: {reason}",
            change.path.display()
        ));
    }
    journal.rollbacks += 1;
    journal.state = State::Failed;
    journal.restart_pending = false;
    journal.change = previous.filter(|_| was_ours).map(|bytes| Change { written: sha256(&bytes), ..change });
    store.save(journal)?;
    if let Err(e) = node.label(&[(READY, Some("failed"))]) {
        log::warn!("{e:#}");
    }
    Ok(())
}
