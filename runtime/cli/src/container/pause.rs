//! `pause` and `unpause`.

use anyhow::{Context as _, Result};

use super::each;
use super::record::Containers;
use super::status::{Seen, Status};
use crate::{Context, Failure};

/// `runx container pause`.
pub(super) fn pause(context: &Context, ids: &[String]) -> Result<u8, Failure> {
    change(context, ids, Status::Running, |core| core.pause())
}

/// `runx container unpause`.
pub(super) fn unpause(context: &Context, ids: &[String]) -> Result<u8, Failure> {
    change(context, ids, Status::Paused, |core| core.resume())
}

fn change(
    context: &Context,
    ids: &[String],
    wanted: Status,
    act: impl Fn(&runx_core::container::Container) -> runx_core::Result<()>,
) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    each(ids, |word| {
        let seen = Seen::look(context, containers.find(word)?)?;
        let core = seen.core.as_ref().filter(|_| seen.status == wanted);
        let core =
            core.with_context(|| format!("container {:?} is not {wanted}: it is {}", seen.record.id, seen.status))?;
        act(core)?;
        Ok(word.to_owned())
    })
}
