//! The program that fetches, imports and exports images.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::Context;

/// Its name, beside this program.
const CLIENT: &str = "runx-image-client";

/// A command of it on the images below a storage root, with what the config file says of registries.
pub(crate) fn command(context: &Context, root: &Path, verb: &str) -> Result<Command> {
    let program = context.executable.with_file_name(CLIENT);
    if !program.exists() {
        bail!("{} is not there: it belongs beside {}", program.display(), context.executable.display());
    }
    let mut command = Command::new(&program);
    command.arg("--storage-root").arg(root);
    if context.global.debug {
        command.arg("--verbose");
    }
    command.arg(verb);
    if verb == "pull" {
        let images = &context.config.images;
        if let Some(registry) = &images.default_registry {
            command.args(["--default-registry", registry]);
        }
        for (host, registry) in &images.registries {
            if registry.insecure {
                command.args(["--insecure-registry", host]);
            }
            if let Some(ca) = &registry.ca {
                let mut pair = std::ffi::OsString::from(format!("{host}="));
                pair.push(ca);
                command.arg("--registry-ca").arg(pair);
            }
        }
    }
    Ok(command)
}
