//! Changing containerd's files: written, restarted with, and taken back if it does not serve. A file is only ever replaced
//! while it is what was looked at before, and taken back while it is what was written.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use crate::install::Clock;
use crate::journal::{Change, Journal, State};
use crate::kube::READY;
use crate::node::Node;
use crate::plan::{self, Plan};
use crate::stage::sha256;

/// A change that failed so often is not tried again unasked, and with files as they were before containerd is restarted no
/// more often in vain.
pub(crate) const ATTEMPTS: u32 = 2;

/// How an attempt ended that did not fail.
#[derive(Debug)]
pub(crate) enum Applied {
    /// containerd serves the handler.
    Done,
    /// Nothing was changed, since this file is not what it was planned from any more.
    Overtaken(PathBuf),
}

/// How it is noted that there is no file.
fn digest(bytes: Option<&[u8]>) -> String {
    bytes.map(sha256).unwrap_or_default()
}

/// What a change is taken back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Former {
    /// The files as they are: containerd serves with them.
    Current,
    /// The files without us. As they are nobody has tried them: what is ours in them was written by a run that was killed, or
    /// is not served for another reason, and containerd runs without it.
    Without,
    /// As [`Former::Without`], but what was kept by a run that was killed is right, if nobody has changed the files since.
    Kept,
}

impl Former {
    fn of(journal: &Journal, served: bool) -> Self {
        match (journal.restart_pending, journal.state) {
            (true, State::Installing) => Self::Kept,
            (false, _) if served => Self::Current,
            _ => Self::Without,
        }
    }

    /// What a file is taken back to, of what it is and what it is without us. `noted` is what is noted of it.
    fn choose<'a>(
        self,
        node: &Node,
        noted: Option<&Change>,
        current: &'a Option<Vec<u8>>,
        without: &'a Option<Vec<u8>>,
    ) -> &'a Option<Vec<u8>> {
        let is_kept = || noted.is_some_and(|change| node.store().previous(change).is_ok_and(|kept| kept == *current));
        match self {
            Self::Current => current,
            Self::Kept if is_kept() => current,
            Self::Kept | Self::Without => without,
        }
    }
}

/// Notes what is to be in which file, and keeps what it is taken back to. Tells whether that was not noted already.
fn note(node: &Node, journal: &mut Journal, plan: &Plan, former: Former) -> Result<bool> {
    let store = node.store();
    let old = journal.change_of(&plan.path).cloned();
    let mut noted = false;
    let mut leaving = Vec::new();
    for removal in &plan.leaving {
        let written = digest(removal.planned.as_deref());
        let mut change = removal.change.clone();
        if former == Former::Without || !(removal.is_done() && journal.leaving.contains(&change)) {
            let previous = former.choose(node, journal.change_of(&change.path), &removal.current, &removal.planned);
            store.keep(&change, removal.planned.as_deref(), previous.as_deref())?;
            change.had_previous = previous.is_some();
            change.written = written;
            noted = true;
        }
        leaving.push(change);
    }
    let current = plan.current.as_deref() == Some(&plan.planned) && journal.wrote(&plan.path, &plan.planned);
    if !current || former == Former::Without {
        let previous = former.choose(node, old.as_ref(), &plan.current, &plan.base);
        let mut change = old.unwrap_or_else(|| Change::new(plan.path.clone(), &leaving));
        store.keep(&change, plan.base.as_deref(), previous.as_deref())?;
        change.created = plan.base.is_none();
        change.written = sha256(&plan.planned);
        change.had_previous = previous.is_some();
        // They are made below, and noted first.
        change.directories.extend(plan.path.parent().map(|parent| missing(node, parent)).unwrap_or_default());
        change.copies.clone_from(&plan.copies);
        journal.change = Some(change);
        noted = true;
    }
    noted |= journal.main != plan.main;
    journal.main.clone_from(&plan.main);
    journal.leaving = leaving;
    Ok(noted)
}

fn missing(node: &Node, directory: &Path) -> Vec<PathBuf> {
    let mut list: Vec<_> = directory.ancestors().filter(|path| !node.root.is_directory(path)).map(Into::into).collect();
    list.reverse();
    list
}

/// Notes a plan that is carried out: also one that somebody else has edited around. Tells whether the journal is to be saved.
pub(crate) fn settle(node: &Node, journal: &mut Journal, plan: &Plan) -> Result<bool> {
    let done = plan.current.as_deref() == Some(&plan.planned);
    let noted = done && note(node, journal, plan, Former::Current)?;
    if journal.leaving.is_empty() {
        return Ok(noted);
    }
    for directory in journal.leaving.iter().flat_map(|change| change.directories.iter().rev()) {
        node.root.remove_empty(directory).with_context(|| format!("remove {}", directory.display()))?;
    }
    let left = std::mem::take(&mut journal.leaving);
    node.store().save(journal)?;
    left.iter().try_for_each(|change| node.store().forget(change)).map(|()| true)
}

/// Fails if a change failed too often already.
///
/// # Errors
/// With what it failed for.
pub(crate) fn refuse_a_third_time(journal: &Journal, plan: &Plan) -> Result<()> {
    if journal.failed.as_deref() == Some(&sha256(&plan.planned)) && journal.failures >= ATTEMPTS {
        bail!(
            "containerd did not come up with this configuration {} times, so it is not tried again: {}. When that is repaired: \
             runx-node install --force",
            journal.failures,
            journal.reason.as_deref().unwrap_or("no reason noted")
        );
    }
    Ok(())
}

/// Writes the files, restarts containerd and waits for the handler; or takes it back.
pub(crate) fn apply(
    node: &Node,
    journal: &mut Journal,
    plan: &Plan,
    others: Vec<String>,
    why: &str,
    force: bool,
    clock: &mut Clock,
) -> Result<Applied> {
    let store = node.store();
    let digest = sha256(&plan.planned);
    node.check_restart()?;
    // Before anything is changed: nobody shall send pods while containerd restarts.
    node.label(&[(READY, Some("installing"))])?;
    let before = journal.clone();
    note(node, journal, plan, Former::of(journal, others.contains(&node.handler)))?;
    journal.state = State::Installing;
    journal.restart_pending = true;
    journal.vain_restarts = 0;
    store.save(journal)?;
    let mut written = Vec::new();
    match write(node, plan, &mut written) {
        Ok(None) => {}
        unwritten => {
            undo(node, journal, &written, before)?;
            let served = others.contains(&node.handler);
            let unwritten = unwritten.map(|path| Applied::Overtaken(path.unwrap_or_default()));
            if unwritten.is_err() {
                node.label(&[(READY, Some(if served { "true" } else { "failed" }))])?;
            }
            return unwritten.context("containerd's files are as they were, and it was not restarted");
        }
    }
    clock.lap(journal, "write");
    let applied = restart(node, journal, &others, why, clock);
    match applied {
        Ok(()) => {
            journal.restart_pending = false;
            Ok(Applied::Done)
        }
        Err(e) => {
            journal.failures = if journal.failed.as_deref() == Some(&digest) { journal.failures + 1 } else { 1 };
            journal.failed = Some(digest);
            journal.reason = Some(format!("{e:#}"));
            roll_back(node, journal, force)?;
            Err(e.context("containerd did not serve runx, so its configuration was restored, and it serves as before"))
        }
    }
}

/// A file that was written.
struct Written<'a> {
    path: &'a Path,
    before: Option<&'a [u8]>,
    now: Option<&'a [u8]>,
}

/// Writes what is not there yet: first where the handler comes to, so that it is in one place at least. Tells which file was
/// not what it was planned from, if one was not.
fn write<'a>(node: &Node, plan: &'a Plan, written: &mut Vec<Written<'a>>) -> Result<Option<PathBuf>> {
    if let Some(parent) = plan.path.parent() {
        node.root.make_directories(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    let mut files = Vec::new();
    if plan.current.as_deref() != Some(&plan.planned) {
        files.push(Written { path: &plan.path, before: plan.current.as_deref(), now: Some(&plan.planned) });
    }
    files.extend(plan.leaving.iter().filter(|removal| !removal.is_done()).map(|removal| Written {
        path: &removal.change.path,
        before: removal.current.as_deref(),
        now: removal.planned.as_deref(),
    }));
    for file in files {
        let path = file.path;
        match node.put(path, file.now, file.before) {
            Ok(false) => return Ok(Some(path.into())),
            // Also what failed may have come that far.
            done => {
                written.push(file);
                done?;
            }
        }
        log::info!("{} {}", if *path == plan.path { "wrote" } else { "took runx out of" }, path.display());
    }
    Ok(None)
}

/// Takes back what was written before something could not be. containerd has not read it.
fn undo(node: &Node, journal: &mut Journal, written: &[Written], before: Journal) -> Result<()> {
    let undo = || -> Result<()> {
        for file in written.iter().rev() {
            node.put(file.path, file.before, file.now)?;
        }
        let directories = journal.change.iter().flat_map(|change| change.directories.iter().rev());
        let new = directories.filter(|path| !before.change.iter().any(|change| change.directories.contains(path)));
        for directory in new {
            node.root.remove_empty(directory).with_context(|| format!("remove {}", directory.display()))?;
        }
        Ok(())
    };
    if let Err(e) = undo() {
        journal.state = State::RollingBack;
        journal.reason = Some(format!("{e:#}"));
        let _ = node.store().save(journal);
        return Err(e.context("take back what was written; the next run goes on with that"));
    }
    *journal = before;
    node.store().save(journal)
}

fn restart(node: &Node, journal: &mut Journal, others: &[String], why: &str, clock: &mut Clock) -> Result<()> {
    node.restart(journal, why)?;
    clock.lap(journal, "restart");
    node.verify(true, others)?;
    clock.lap(journal, "verify");
    Ok(())
}

/// Restores a file if it is what was written. If somebody else has written it since, that stays, and only what is ours goes.
/// Tells the digest of what is there, if that has something of ours in it.
fn restore(node: &Node, journal: &Journal, change: &Change) -> Result<Option<String>> {
    let store = node.store();
    let path = &change.path;
    let previous = store.previous(change)?;
    loop {
        let current = node.root.read(path).with_context(|| format!("read {}", path.display()))?;
        if current == previous || digest(current.as_deref()) == change.written {
            if current != previous && !node.put(path, previous.as_deref(), current.as_deref())? {
                continue;
            }
            // An older one of ours may have been there.
            let Some(bytes) = previous else { return Ok(None) };
            let ours = store.original(change)?.map_or(change.created, |original| original != bytes);
            return Ok(ours.then(|| sha256(&bytes)));
        }
        log::warn!("{} was changed by somebody else meanwhile: that stays", path.display());
        let Some(bytes) = current else { return Ok(None) };
        let rest = match plan::without(node, journal, path, &bytes) {
            Ok(rest) => rest,
            Err(e) => {
                log::warn!("it is left as it is: {e:#}");
                return Ok(None);
            }
        };
        if rest.as_deref() == Some(&bytes) || node.put(path, rest.as_deref(), Some(&bytes))? {
            return Ok(None);
        }
    }
}

/// Restores the files that were changed last, and restarts containerd with them.
pub(crate) fn roll_back(node: &Node, journal: &mut Journal, force: bool) -> Result<()> {
    let store = node.store();
    let reason = journal.reason.clone().unwrap_or_else(|| "it was cut off".to_owned());
    log::error!("taking the change back: {reason}");
    let changes: Vec<Change> = journal.change.iter().chain(&journal.leaving).cloned().collect();
    let Some(first) = changes.first() else {
        bail!("the journal says that a change is to be taken back, and not which: look at containerd's configuration");
    };
    journal.state = State::RollingBack;
    store.save(journal)?;
    let mut ours = None;
    for change in &changes {
        if let Some(written) = restore(node, journal, change)? {
            ours = Some(Change { written, ..change.clone() });
        }
        let made = change.directories.iter().rev();
        for directory in made {
            node.root.remove_empty(directory).with_context(|| format!("remove {}", directory.display()))?;
        }
    }
    let served = ours.is_some();
    let restored = if journal.vain_restarts > 0 && node.is_served(served) {
        // Somebody has repaired it.
        Ok(())
    } else if journal.vain_restarts >= ATTEMPTS && !force {
        Err(anyhow!(
            "it was restarted {} times in vain, and is not any more: repair it, and this goes on when it serves again, or by --force",
            journal.vain_restarts
        ))
    } else {
        node.restart(journal, "rollback").and_then(|()| node.verify(served, &[])).inspect_err(|_| {
            journal.vain_restarts += 1;
        })
    };
    if let Err(e) = restored {
        store.save(journal)?;
        // The one thing left to tell others.
        let _ = node.label(&[(READY, Some("failed"))]);
        return Err(anyhow!(
            "containerd does not come up with its former configuration either ({} was restored): {e:#}. The change was taken back \
             because: {reason}",
            first.path.display()
        ));
    }
    journal.rollbacks += 1;
    journal.state = State::Failed;
    journal.restart_pending = false;
    journal.vain_restarts = 0;
    journal.leaving.clear();
    journal.change = ours;
    store.save(journal)?;
    for change in changes.iter().filter(|change| journal.change_of(&change.path).is_none()) {
        store.forget(change)?;
    }
    if let Err(e) = node.label(&[(READY, Some(if served { "true" } else { "failed" }))]) {
        log::warn!("{e:#}");
    }
    Ok(())
}
