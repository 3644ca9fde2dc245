//! `-info` and `-v`: what this runtime is and can do.

use std::io::{self, Read, Write};

use anyhow::{Context, Result};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

/// The name that users write into containerd's configuration.
pub(crate) const NAME: &str = "io.containerd.runx.v1";

const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// `-v`.
pub(crate) fn print_version() -> Result<()> {
    let text = format!("containerd-shim-runx-v1:\n  Version:  {}\n", env!("CARGO_PKG_VERSION"));
    io::stdout().write_all(text.as_bytes()).context("print the version")
}

/// `-info`: a `RuntimeInfo` message.
pub(crate) fn print() -> Result<()> {
    let mut input = Vec::new();
    io::stdin().take(1 << 20).read_to_end(&mut input).context("read standard input")?;
    let features = serde_json::to_vec(&runx_core::features::features()).context("describe the runtime")?;
    let info = RuntimeInfo {
        name: NAME.into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..RuntimeVersion::default()
        }),
        options: Any::parse_from_bytes(&input).ok().filter(|any| !any.type_url.is_empty()).into(),
        features: MessageField::some(Any { type_url: FEATURES_TYPE.into(), value: features, ..Any::default() }),
        ..RuntimeInfo::default()
    };
    let bytes = info.write_to_bytes().context("write the answer")?;
    io::stdout().write_all(&bytes).context("write the answer")
}
