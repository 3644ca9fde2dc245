//! How `start` is asked and answered, which is where the versions of containerd differ.

use std::io::{self, Read, Write};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;

use crate::flags::Flags;
use crate::options::{self, Options};

/// Most bytes that are read from standard input.
const INPUT_LIMIT: u64 = 10 << 20;

/// `LOG_LEVEL_DEBUG` of the bootstrap message; what is more verbose is smaller.
const LOG_LEVEL_DEBUG: i32 = -4;

/// How containerd wants the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// The bare address, which every version up to 2.2 understands as version 2 of the Task API.
    Address,
    /// A line of JSON, for the version 3 that the options ask for. It is understood from 2.0 on.
    Json,
    /// The bootstrap message of 2.3 and later.
    Bootstrap,
}

/// What containerd has to say besides its flags.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) protocol: Protocol,
    pub(super) options: Options,
    /// Where the socket is to be, if not in the usual place.
    pub(super) socket_directory: Option<String>,
    /// Where events go, if the environment does not say.
    pub(super) events: Option<String>,
    /// Log more.
    pub(super) debug: bool,
}

/// Reads standard input.
///
/// # Errors
/// Runtime options that are unknown or have no effect.
pub(super) fn read(flags: &Flags) -> Result<Input> {
    let mut bytes = Vec::new();
    io::stdin().take(INPUT_LIMIT).read_to_end(&mut bytes).context("read standard input")?;
    parse(&bytes, flags)
}

fn parse(bytes: &[u8], flags: &Flags) -> Result<Input> {
    // Older versions send runtime options here, whose bytes may parse as anything; the new message
    // repeats what the flags say.
    if let Ok(params) = BootstrapParams::parse_from_bytes(bytes)
        && params.instance_id == flags.id
        && params.namespace == flags.namespace
    {
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        let extensions = params.extensions.iter().filter_map(|extension| extension.value.as_ref());
        let options = extensions.into_iter().find(|any| options::is_known(any));
        return Ok(Input {
            protocol: Protocol::Bootstrap,
            options: options::parse(options).map_err(refusal)?,
            socket_directory: params.socket_dir.and_then(given),
            events: given(params.containerd_ttrpc_address),
            debug: params.log_level.value() <= LOG_LEVEL_DEBUG,
        });
    }
    let any = Any::parse_from_bytes(bytes).context("read the runtime options on standard input")?;
    let options = options::parse(Some(&any)).map_err(refusal)?;
    let protocol = match options.task_api_version {
        0 | 2 => Protocol::Address,
        3 => Protocol::Json,
        other => bail!("runtime option task_api_version {other} is not supported: there are 2 and 3"),
    };
    Ok(Input { protocol, options, socket_directory: None, events: None, debug: false })
}

fn refusal(error: containerd_shim_protos::ttrpc::Error) -> anyhow::Error {
    match error {
        containerd_shim_protos::ttrpc::Error::RpcStatus(status) => anyhow::Error::msg(status.message),
        other => other.into(),
    }
}

/// Answers with the address of a daemon.
///
/// # Errors
/// When nobody reads the answer.
pub(super) fn answer(protocol: Protocol, address: String) -> Result<()> {
    let reply = match protocol {
        Protocol::Address => address.into_bytes(),
        Protocol::Json => {
            let reply = serde_json::json!({"version": 3, "address": address, "protocol": "ttrpc"});
            reply.to_string().into_bytes()
        }
        Protocol::Bootstrap => {
            let reply = BootstrapResult { version: 3, address, protocol: "ttrpc".into(), ..BootstrapResult::default() };
            reply.write_to_bytes().context("write the answer")?
        }
    };
    let mut stdout = io::stdout().lock();
    stdout.write_all(&reply).and_then(|()| stdout.flush()).context("write the answer")
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::{Extension, LogLevel};
    use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
    use containerd_shim_protos::shim::oci::Options as RuncOptions;

    use super::*;

    fn flags() -> Flags {
        Flags { id: "pod".into(), namespace: "k8s.io".into(), ..Flags::default() }
    }

    fn any(options: &RuncOptions) -> Any {
        Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.write_to_bytes().unwrap(),
            ..Any::default()
        }
    }

    #[test]
    fn the_bootstrap_message_is_told_from_options() {
        let options = any(&RuncOptions { shim_cgroup: "/shims".into(), ..RuncOptions::default() });
        let extension = |any: Any| Extension { value: MessageField::some(any), ..Extension::default() };
        let foreign = Any { type_url: "io.example.Unknown".into(), value: vec![8, 1], ..Any::default() };
        let params = BootstrapParams {
            instance_id: "pod".into(),
            namespace: "k8s.io".into(),
            log_level: EnumOrUnknown::new(LogLevel::LOG_LEVEL_TRACE),
            containerd_ttrpc_address: "/c.ttrpc".into(),
            extensions: vec![extension(foreign), extension(options.clone())],
            socket_dir: Some("/run/s".into()),
            ..BootstrapParams::default()
        };
        let input = parse(&params.write_to_bytes().unwrap(), &flags()).unwrap();
        assert_eq!((input.protocol, input.debug), (Protocol::Bootstrap, true));
        assert_eq!(input.options.shim_cgroup, Some("/shims".into()));
        assert_eq!(input.socket_directory.as_deref(), Some("/run/s"));
        assert_eq!(input.events.as_deref(), Some("/c.ttrpc"));
        let older = parse(&options.write_to_bytes().unwrap(), &flags()).unwrap();
        assert_eq!((older.protocol, older.socket_directory), (Protocol::Address, None));
        assert_eq!(older.options.shim_cgroup, Some("/shims".into()));
        assert_eq!(parse(b"", &flags()).unwrap().protocol, Protocol::Address);
    }

    #[test]
    fn version_3_is_for_those_who_ask_for_it() {
        let of = |version| {
            let options = any(&RuncOptions { task_api_version: version, ..RuncOptions::default() });
            parse(&options.write_to_bytes().unwrap(), &flags()).map(|input| input.protocol)
        };
        assert_eq!(of(2).unwrap(), Protocol::Address);
        assert_eq!(of(3).unwrap(), Protocol::Json);
        assert!(of(4).unwrap_err().to_string().contains("task_api_version 4"));
    }

    #[test]
    fn standard_input_of_any_form_is_read_or_refused() {
        let table = |text: &str| {
            let value = [&[26, text.len() as u8], text.as_bytes()].concat();
            Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() }.write_to_bytes().unwrap()
        };
        let options =
            any(&RuncOptions { systemd_cgroup: true, root: "/r".into(), io_uid: 5, ..RuncOptions::default() });
        let params = BootstrapParams {
            instance_id: flags().id,
            namespace: flags().namespace,
            socket_dir: Some("/run".into()),
            extensions: vec![containerd_shim_protos::bootstrap_api::Extension {
                value: containerd_shim_protos::protobuf::MessageField::some(options.clone()),
                ..Default::default()
            }],
            ..BootstrapParams::default()
        };
        let good = [
            table("SystemdCgroup = true\nRoot = \"/r\"\nIoUid = 5\n"),
            options.write_to_bytes().unwrap(),
            params.write_to_bytes().unwrap(),
        ];
        let good: Vec<&[u8]> = good.iter().map(Vec::as_slice).collect();
        runx_fuzz::feed("standard input of start", &good, 20_000, |bytes| {
            if let Err(e) = parse(bytes, &flags()) {
                assert!(!e.to_string().is_empty());
            }
        });
    }
}
