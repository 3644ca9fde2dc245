//! Taking it away, in the reverse order: nobody sends pods any more, none run, the handler goes, and the programs last.

use anyhow::{Context, Result, bail};

use crate::journal::State;
use crate::kube::{READY, VERSION};
use crate::node::Node;
use crate::plan;
use crate::stage::Version;

/// How many pods are named in an error.
const NAMED: usize = 5;

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
        store.clear(&lock)?;
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
        let pods = node.pods().context("find out whether pods use runx (--force does without)")?;
        if !pods.is_empty() {
            let named = pods.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
            let more = if pods.len() > NAMED { format!(" and {} more", pods.len() - NAMED) } else { String::new() };
            bail!(
                "{} running pods of this node use runx: {named}{more}. Nothing was changed but the node's labels, so no more come: \
                 delete them and try again, or --force",
                pods.len()
            );
        }
    }
    if let Some(removal) = plan::removal(node, &journal)? {
        let there = removal.current.is_some() && removal.current != removal.planned;
        if there || journal.restart_pending {
            if let Err(e) = plan::check_removal(node, &removal) {
                if !force {
                    return Err(e);
                }
                log::warn!("{e:#}");
            }
            store.clean()?;
            let others = node.status().map(|status| status.handlers).unwrap_or_default();
            journal.state = State::Uninstalling;
            journal.restart_pending = true;
            store.save(&mut journal)?;
            if there {
                node.put(&removal.path, removal.planned.as_deref())?;
                log::info!("restored {}", removal.path.display());
            }
            if let Err(e) = node.restart(&mut journal, "uninstall").and_then(|()| node.verify(false, &others)) {
                return Err(e.context(format!(
                    "containerd does not come up as it was before runx ({} is what it was): repair it, and run this again",
                    removal.path.display()
                )));
            }
        }
        let directories = journal.change.take().map(|change| change.directories).unwrap_or_default();
        for directory in directories.iter().rev() {
            node.root.remove_empty(directory).with_context(|| format!("remove {}", directory.display()))?;
        }
    }
    journal.state = State::Uninstalling;
    journal.restart_pending = false;
    store.save(&mut journal)?;
    let left = node.stage().remove_all()?;
    if left.is_empty() {
        store.clear(&lock)?;
    } else {
        store.clean()?;
    }
    Ok(Done { was_there, left })
}
