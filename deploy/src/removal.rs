//! What is to be taken out of containerd's files, or has been put there: also where nobody has noted it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use crate::config::{self, Imports};
use crate::journal::{Change, DROP_IN, Journal};
use crate::node::Node;
use crate::plan::{Candidate, HEAD, check, staged, text, without_us};

/// What a changed file is to be when we are gone.
#[derive(Debug)]
pub(crate) struct Removal {
    /// What was changed.
    pub(crate) change: Change,
    /// What it is now.
    pub(crate) current: Option<Vec<u8>>,
    /// What it is to be; `None` for no file.
    pub(crate) planned: Option<Vec<u8>>,
}

impl Removal {
    /// Whether it is as it is to be.
    pub(crate) fn is_done(&self) -> bool {
        self.current.is_none() || self.current == self.planned
    }

    pub(crate) fn of(node: &Node, journal: &Journal, change: &Change) -> Result<Self> {
        let path = &change.path;
        let current = node.root.read(path).with_context(|| format!("read {}", path.display()))?;
        let mut planned = None;
        if let Some(bytes) = &current {
            let rest = without_us(node, journal, path, &text(path, bytes.clone())?)?;
            // It is somebody else's now.
            planned = rest.map(|rest| match rest.strip_prefix(HEAD) {
                Some(rest) => rest.trim_start_matches('\n').as_bytes().to_vec(),
                None => rest.into_bytes(),
            });
        }
        Ok(Self { change: change.clone(), current, planned })
    }
}

/// What is to be taken from files other than `path`, whether or not it is noted: a journal can be lost, and somebody can put back a
/// file of before.
///
/// # Errors
/// When one cannot be read.
pub(crate) fn leaving(node: &Node, journal: &Journal, path: &Path) -> Result<Vec<Removal>> {
    let mut all: Vec<Change> = journal.change.iter().chain(&journal.leaving).cloned().collect();
    for place in found(node)? {
        if all.iter().all(|change| change.path != place) {
            all.push(Change::new(place, &all));
        }
    }
    all.iter().filter(|change| change.path != path).map(|change| Removal::of(node, journal, change)).collect()
}

/// Finds out what is to be taken away.
///
/// # Errors
/// When a file cannot be read, or is gone that has to be there.
pub(crate) fn removals(node: &Node, journal: &Journal, force: bool) -> Result<Vec<Removal>> {
    let all = journal.change.iter().chain(&journal.leaving);
    let all: Vec<Removal> = all.map(|change| Removal::of(node, journal, change)).collect::<Result<_>>()?;
    for removal in all.iter().filter(|it| it.current.is_none() && !it.change.created) {
        let (path, kept) = (removal.change.path.display(), node.store().original_path(&removal.change));
        if !force && node.root.exists(&kept) {
            bail!(
                "{path} is not there, and it was before runx: put it back (as it was it is kept in {}), or --force, which forgets \
                 it. Nothing was changed",
                kept.display()
            );
        }
    }
    Ok(all)
}

/// Whether containerd reads its configuration as it is when removals are done.
///
/// # Errors
/// With what it says, if it does not.
pub(crate) fn check_removal(node: &Node, journal: &Journal, removals: &[Removal]) -> Result<()> {
    let main = main_path(node, journal);
    let of_main = removals.iter().find(|removal| removal.change.path == main);
    let left = match of_main {
        Some(removal) => removal.planned.clone(),
        None => node.root.read(&main).with_context(|| format!("read {}", main.display()))?,
    };
    let Some(left) = left else { return Ok(()) };
    let left = text(&main, left)?;
    let (document, _) = config::parse(&main.to_string_lossy(), &left)?;
    let without: Vec<&Path> = removals.iter().map(|removal| removal.change.path.as_path()).collect();
    let imports = Imports::of(&document, &main);
    let mut files = imports.expand(&node.root, &without)?;
    for (at, removal) in removals.iter().enumerate() {
        if let (Some(rest), true) = (&removal.planned, imports.has(&removal.change.path)) {
            files.push(staged(node, &format!("left-{at}.toml"), rest)?);
        }
    }
    match check(node, Some(&Candidate { place: &main, text: &left, imports: files }))? {
        Ok(_) => Ok(()),
        Err(why) => Err(anyhow!("containerd says: {why}").context(format!(
            "containerd does not read its configuration as it would be without runx, so nothing was changed: repair {} first",
            main.display()
        ))),
    }
}

/// The main file that runx was installed into, whatever is said now.
fn main_path(node: &Node, journal: &Journal) -> PathBuf {
    if !journal.main.as_os_str().is_empty() {
        return journal.main.clone();
    }
    node.root.real(&node.main).unwrap_or_else(|_| node.main.clone())
}

/// Files of containerd's that have something of ours in them, whether or not it is noted.
///
/// # Errors
/// When one cannot be read.
pub(crate) fn found(node: &Node) -> Result<Vec<PathBuf>> {
    let main = node.root.real(&node.main).unwrap_or_else(|_| node.main.clone());
    let mut all = vec![main.clone()];
    all.extend(node.distribution.drop_ins.iter().map(|it| it.join(DROP_IN)));
    if let Some(bytes) = node.root.read(&main).with_context(|| format!("read {}", main.display()))?
        && let Ok((document, _)) = config::parse(&main.to_string_lossy(), &String::from_utf8_lossy(&bytes))
    {
        all.extend(Imports::of(&document, &main).drop_in(DROP_IN));
    }
    let mut out = Vec::new();
    for path in all {
        let bytes = node.root.read(&path).with_context(|| format!("read {}", path.display()))?.unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        if text.starts_with(HEAD) || config::has_block(&text) {
            out.push(path);
        }
    }
    out.dedup();
    Ok(out)
}
