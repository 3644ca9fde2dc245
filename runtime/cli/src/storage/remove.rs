//! `runx storage rm` and `prune`.

use std::io::{IsTerminal as _, Write as _};

use anyhow::{Context as _, Result};
use runx_image::{Prune, Removed, Store};

use super::{filter, human};
use crate::arguments::ImageFilter;
use crate::{Failure, message, print};

/// `runx storage rm`: all that can be removed, and the first failure.
pub(super) fn rm(store: &Store, names: &[String], force: bool) -> Result<u8, Failure> {
    let mut failed = None;
    for name in names {
        match store.remove(name, force) {
            Ok(removed) => print(&report(&removed)).map(drop)?,
            Err(e) => {
                if let Some(earlier) = failed.replace(e) {
                    log::error!("{}", message(&earlier.into()));
                }
            }
        }
    }
    failed.map_or(Ok(0), |e| Err(e.into()))
}

fn report(removed: &Removed) -> String {
    let untagged = removed.untagged.iter().map(|name| format!("Untagged: {name}\n"));
    untagged.chain(removed.images.iter().map(|image| format!("Deleted: {}\n", image.id))).collect()
}

/// `runx storage prune`.
pub(super) fn prune(store: &Store, all: bool, force: bool, filters: &[ImageFilter]) -> Result<u8, Failure> {
    if !force && std::io::stdin().is_terminal() {
        let which = if all { "that no container was made of" } else { "without a name" };
        eprint!("This removes all images {which}. Continue? [y/N] ");
        std::io::stderr().flush().context("ask")?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).context("read the answer")?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Ok(0);
        }
    }
    // Asked before, since a filter may need what is about to be removed, and fail.
    let mut meant = Vec::new();
    for image in store.images()? {
        if filter::holds(store, &image, filters)? {
            meant.push(image.digest);
        }
    }
    let which = if all { Prune::Unused } else { Prune::Unnamed };
    let removed = store.prune(which, |image| meant.contains(&image.digest))?;
    print(&format!("{}Total reclaimed space: {}\n", report(&removed), human(removed.bytes)))
}
