//! `runx-image-client`: brings images into the store, and takes them out of it.
//!
//! `runx storage pull`, `import` and `export` execute it. It is a program of its own, so that the one which starts
//! containers carries neither TLS nor HTTP nor decompression.

mod arguments;
mod auth;
mod export;
mod identity;
mod import;
mod land;
mod pack;
mod plan;
mod progress;
mod pull;
mod reference;
mod registry;
mod source;
mod tls;
mod unpack;

use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow};
use clap::Parser as _;
use runx_image::Store;

use arguments::{Arguments, Command};
use progress::Progress;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("runx storage: {e:#}");
            match e.downcast_ref::<pull::Interrupted>() {
                // As a shell reports a program that a signal ended.
                Some(interrupted) => ExitCode::from(128 + interrupted.signal as u8),
                None => ExitCode::FAILURE,
            }
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    arguments::log_to_stderr(arguments.verbose);
    if !matches!(arguments.command, Command::Export(_)) {
        // Whatever the user's mask is: it is the store's directory that keeps others out, and modes in it are images'.
        rustix::process::umask(rustix::fs::Mode::empty());
    }
    rustls::crypto::ring::default_provider().install_default().map_err(|_| anyhow!("set up cryptography"))?;
    let store = Store::open(&arguments.storage_root)?;
    match arguments.command {
        Command::Pull(pull) => {
            let progress = Progress::new(pull.quiet);
            let options = pull.into_options()?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .context("start the runtime")?;
            let pulled = runtime.block_on(pull::pull(&store, &options, &progress));
            // Threads that unpack or wait find out by the ingest that it is at its end; what they made goes first.
            drop(runtime);
            let image = pulled?;
            println!("{}", image.id);
            Ok(())
        }
        Command::Import(import) => {
            let progress = Progress::new(import.quiet);
            for image in import::import(&store, &import.into_options()?, &progress)? {
                println!("{}", image.id);
            }
            Ok(())
        }
        Command::Export(wanted) => export::export(&store, &wanted.images, &wanted.output, wanted.format),
    }
}
