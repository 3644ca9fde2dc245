//! `top`: the processes of a container, as ps(1) lists them.

use std::ffi::OsString;

use anyhow::anyhow;

use super::record::Containers;
use super::status::Seen;
use crate::arguments::ListFormat;
use crate::{Context, Failure, oci};

/// `runx container top`.
pub(super) fn top(context: &Context, word: &str, options: &[OsString]) -> Result<u8, Failure> {
    let seen = Seen::look(context, Containers::of(context).find(word)?)?;
    if !seen.status.is_up() {
        return Err(anyhow!("container {:?} has no processes: it is {}", seen.record.id, seen.status).into());
    }
    oci::ps::ps(context, &seen.record.id, ListFormat::Table, options)
}
