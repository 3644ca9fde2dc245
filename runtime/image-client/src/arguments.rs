//! What the program is told: mostly by `runx storage`.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{ArgAction, Args, Parser, Subcommand};
use runx_image::manifest::Platform;

use crate::unpack::Limit;
use crate::{export, import, pull, tls};

/// Brings images into the store, and takes them out of it.
#[derive(Debug, Parser)]
#[command(name = "runx-image-client", version)]
pub(crate) struct Arguments {
    /// The directory that the store is below.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/runx")]
    pub(crate) storage_root: PathBuf,
    /// Say more; twice for even more.
    #[arg(short, long, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Pulls an image from a registry, and prints its id.
    Pull(Pull),
    /// Imports images from an OCI layout, an archive, or a root filesystem, and prints their ids.
    Import(Import),
    /// Writes images as they came.
    Export(Export),
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// A directory or an archive; - for standard input.
    source: PathBuf,
    /// [HOST[:PORT]/]NAME[:TAG], instead of what the source says.
    #[arg(long)]
    name: Option<String>,
    /// What the source is, where it is not what it looks like.
    #[arg(long)]
    format: Option<import::Format>,
    /// OS/ARCHITECTURE[/VARIANT], where it is not this machine's.
    #[arg(long)]
    platform: Option<String>,
    /// For a root filesystem, an instruction of a Dockerfile: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER,
    /// VOLUME or WORKDIR. May be repeated.
    #[arg(short, long, value_name = "INSTRUCTION")]
    change: Vec<String>,
    /// Bytes that a layer may have when it is decompressed. Otherwise 200 times its length, and 1 GiB in any case.
    #[arg(long, value_name = "BYTES")]
    max_layer_size: Option<u64>,
    /// Say nothing meanwhile.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Names or ids.
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
    /// Where to; - is standard output.
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub(crate) output: PathBuf,
    /// How.
    #[arg(long, default_value = "oci-archive")]
    pub(crate) format: export::Format,
}

impl Import {
    pub(crate) fn into_options(self) -> Result<import::Options> {
        Ok(import::Options {
            platform: self.platform.as_deref().map(Platform::parse).transpose()?,
            source: self.source,
            name: self.name,
            format: self.format,
            changes: self.change,
            limit: Limit::new(self.max_layer_size),
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// [HOST[:PORT]/]NAME[:TAG][@DIGEST]
    name: String,
    /// Where names without a host are looked for.
    #[arg(long, value_name = "HOST")]
    default_registry: Option<String>,
    /// OS/ARCHITECTURE[/VARIANT], where it is not this machine's.
    #[arg(long)]
    platform: Option<String>,
    /// The file with credentials, instead of those that docker and podman write.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// A file with certificates of authorities, beyond the machine's. May be repeated.
    #[arg(long, value_name = "FILE")]
    ca_file: Vec<PathBuf>,
    /// The directory with certificates of registries, instead of /etc/containers/certs.d and /etc/docker/certs.d.
    #[arg(long, value_name = "DIR")]
    cert_dir: Option<PathBuf>,
    /// Whether certificates are checked. If not, registries without TLS are taken, too.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    tls_verify: bool,
    /// Speak without TLS.
    #[arg(long)]
    plain_http: bool,
    /// A registry whose certificate is not checked, or that needs no TLS. May be repeated.
    #[arg(long, value_name = "HOST[:PORT]")]
    insecure_registry: Vec<String>,
    /// Certificates of authorities for one registry. May be repeated.
    #[arg(long, value_name = "HOST[:PORT]=FILE")]
    registry_ca: Vec<String>,
    /// How many layers are downloaded at the same time.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    parallel: u8,
    /// Bytes that a layer may have when it is decompressed. Otherwise 200 times its length, and 1 GiB in any case.
    #[arg(long, value_name = "BYTES")]
    max_layer_size: Option<u64>,
    /// Say nothing meanwhile.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

impl Pull {
    pub(crate) fn into_options(self) -> Result<pull::Options> {
        Ok(pull::Options {
            platform: self.platform.as_deref().map(Platform::parse).transpose()?,
            name: self.name,
            default_registry: self.default_registry,
            auth_file: self.authfile,
            tls: tls::Options {
                ca_files: self.ca_file,
                cert_dir: self.cert_dir,
                insecure: !self.tls_verify,
                plain_http: self.plain_http,
                insecure_registries: self.insecure_registry,
                registry_cas: self.registry_ca.iter().map(|pair| registry_ca(pair)).collect::<Result<_>>()?,
            },
            parallel: self.parallel.into(),
            limit: Limit::new(self.max_layer_size),
        })
    }
}

fn registry_ca(pair: &str) -> Result<(String, PathBuf)> {
    let (host, file) = pair.split_once('=').with_context(|| format!("--registry-ca {pair:?} is not HOST=FILE"))?;
    Ok((host.to_owned(), file.into()))
}

/// Warnings in any case, and more if asked.
pub(crate) fn log_to_stderr(verbose: u8) {
    struct Stderr;
    impl log::Log for Stderr {
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            // Libraries may log headers, and with them secrets.
            metadata.target().starts_with("runx_image")
        }
        fn log(&self, record: &log::Record<'_>) {
            if self.enabled(record.metadata()) {
                eprintln!("{}: {}", record.level().as_str().to_lowercase(), record.args());
            }
        }
        fn flush(&self) {}
    }
    static LOGGER: Stderr = Stderr;
    let level = match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}
