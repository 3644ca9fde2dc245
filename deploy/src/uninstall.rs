//! Taking it away, in the reverse order: nobody sends pods any more, none run, the handler goes, and the programs last.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::change::ATTEMPTS;
use crate::journal::{Journal, State};
use crate::kube::{READY, VERSION};
use crate::node::Node;
use crate::removal::{self, Removal};
use crate::stage::Version;

/// How many pods are named in an error.
const NAMED: usize = 5;

/// How often it is planned anew because somebody else changes a file meanwhile.
const PLANS: usize = 4;

/// How long a pod may take from the scheduler's word to its sandbox.
const ARRIVAL: Duration = Duration::from_secs(5);

/// What an uninstallation did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Done {
    /// Whether there was anything.
    pub(crate) was_there: bool,
    /// Programs that stay because shims run from them.
    pub(crate) left: Vec<Version>,
}

/// Takes runx away from a node. With `force` also from under running pods.
///
/// # Errors
/// When pods use it, or containerd would not read what is left.
pub(crate) fn uninstall(node: &Node, force: bool) -> Result<Done> {
    let store = node.store();
    let lock = store.lock()?;
    let mut journal = store.load()?;
    // Also where only the programs came.
    let was_there = !journal.is_blank();
    if !was_there {
        node.label(&[(READY, None), (VERSION, None)])?;
        let unnoted = unnoted(node)?;
        store.clear(&lock)?;
        if let Some(what) = unnoted {
            bail!("there is no journal of runx-node on this node (--state-dir), and {what}");
        }
        return Ok(Done { was_there, left: Vec::new() });
    }
    if journal.handler != node.handler || journal.install_dir != node.install_dir {
        bail!(
            "runx is installed on this node with --handler {} --install-dir {}: say so to uninstall it",
            journal.handler,
            journal.install_dir.display()
        );
    }
    node.label(&[(READY, None), (VERSION, None)])?;
    if journal.change.is_some() && !force {
        unused(node)?;
        // One that was sent here before the label went, and is not there yet.
        if node.cluster.is_some() && !journal.restart_pending {
            std::thread::sleep(ARRIVAL);
            unused(node)?;
        }
    }
    if journal.change.is_some() || !journal.leaving.is_empty() {
        take_out(node, &mut journal, force)?;
        let changes = journal.change.take().into_iter().chain(std::mem::take(&mut journal.leaving));
        for directory in changes.flat_map(|change| change.directories.into_iter().rev()) {
            node.root.remove_empty(&directory).with_context(|| format!("remove {}", directory.display()))?;
        }
    }
    journal.state = State::Uninstalling;
    journal.restart_pending = false;
    journal.vain_restarts = 0;
    store.save(&mut journal)?;
    let left = node.stage().remove_all()?;
    if left.is_empty() {
        store.clear(&lock)?;
    } else {
        store.clean()?;
    }
    Ok(Done { was_there, left })
}

/// Fails while pods use runx.
fn unused(node: &Node) -> Result<()> {
    let pods = node.pods().context("find out whether pods use runx (--force does without)")?;
    let (list, what) = match (pods.running.is_empty(), pods.ended.is_empty()) {
        (true, true) => return Ok(()),
        (false, _) => (pods.running, "running pods of this node use runx"),
        (true, false) => (pods.ended, "pods of this node that do not run now use runx, and may be started again"),
    };
    let named = list.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    let more = if list.len() > NAMED { format!(" and {} more", list.len() - NAMED) } else { String::new() };
    bail!(
        "{} {what}: {named}{more}. Nothing was changed but the node's labels, so no more come: delete them and try again, or \
         --force",
        list.len()
    );
}

/// What is on a node without a journal that an installation has left there.
fn unnoted(node: &Node) -> Result<Option<String>> {
    if let Some(path) = removal::found(node)?.first() {
        return Ok(Some(format!(
            "{} has what runx-node has put there: install again, which takes over what is there, and then uninstall",
            path.display()
        )));
    }
    if node.status().is_ok_and(|status| status.handlers.contains(&node.handler)) {
        return Ok(Some(format!(
            "containerd serves the handler {}, which is in none of its files that are known here: take it out by hand",
            node.handler
        )));
    }
    let programs = !node.stage().versions()?.is_empty();
    Ok(programs
        .then(|| format!("programs of runx are in {}: install again, and then uninstall", node.install_dir.display())))
}

/// Takes the handler out of containerd's files, and restarts containerd if it was in one.
fn take_out(node: &Node, journal: &mut Journal, force: bool) -> Result<()> {
    let store = node.store();
    for attempt in 1.. {
        let removals = removal::removals(node, journal, force)?;
        let there = removals.iter().any(|removal| !removal.is_done());
        if !there && !journal.restart_pending {
            return Ok(());
        }
        node.check_restart()?;
        if let Err(e) = removal::check_removal(node, journal, &removals) {
            if !force {
                return Err(e);
            }
            log::warn!("{e:#}");
        }
        store.clean()?;
        let others = node.status().map(|status| status.handlers).unwrap_or_default();
        journal.state = State::Uninstalling;
        journal.restart_pending = true;
        if there {
            journal.vain_restarts = 0;
        }
        store.save(journal)?;
        let mut overtaken = None;
        for removal in removals.iter().filter(|removal| !removal.is_done()) {
            let path = &removal.change.path;
            if !node.put(path, removal.planned.as_deref(), removal.current.as_deref())? {
                overtaken = Some(path);
                break;
            }
            log::info!("restored {}", path.display());
        }
        match overtaken {
            Some(path) if attempt == PLANS => {
                bail!("somebody else has changed {} {PLANS} times while it was looked at: try again", path.display())
            }
            Some(path) => {
                log::warn!("{} was changed by somebody else: looking again", path.display());
                continue;
            }
            None => return restart(node, journal, &others, &removals, force),
        }
    }
    Ok(())
}

fn restart(node: &Node, journal: &mut Journal, others: &[String], removals: &[Removal], force: bool) -> Result<()> {
    if journal.vain_restarts > 0 && node.is_served(false) {
        // Somebody has repaired it.
        return Ok(());
    }
    let restored = if journal.vain_restarts >= ATTEMPTS && !force {
        Err(anyhow!("it was restarted {} times in vain, and is not any more (--force does)", journal.vain_restarts))
    } else {
        node.restart(journal, "uninstall").and_then(|()| node.verify(false, others)).inspect_err(|_| {
            journal.vain_restarts += 1;
        })
    };
    restored.or_else(|e| {
        node.store().save(journal)?;
        let list: Vec<String> = removals.iter().map(|removal| removal.change.path.display().to_string()).collect();
        Err(e.context(format!(
            "containerd does not come up as it was before runx ({} is what it was): repair it, and run this again",
            list.join(", ")
        )))
    })
}
