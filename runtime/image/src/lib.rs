//! Images on this machine: a content-addressed store, and root filesystems for containers from it.
//!
//! [`Store`] holds blobs by their digests, unpacked layers, and the images that consist of them. [`rootfs`] makes a
//! container's root filesystem of an image and mounts it. The crate is light, because the command that starts containers
//! carries it: what speaks to registries, reads archives and decompresses is the program `runx-image-client`, which fills
//! the store through [`Ingest`].
//!
//! Several processes may use a store at the same time, and each may be killed at any moment: what is half-made lies
//! aside until it is complete, and is then renamed.

#![cfg(target_os = "linux")]

mod collect;
pub mod config;
mod digest;
mod error;
mod files;
mod index;
mod ingest;
pub mod layer;
pub mod manifest;
mod module;
pub mod name;
pub mod rootfs;
mod store;

pub use collect::{Prune, Removed, Usage};
pub use config::ImageConfiguration;
pub use digest::Digest;
pub use error::{Error, Result};
pub use index::{Image, LayerRecord};
pub use ingest::{BlobWriter, FreshBlob, Held, Ingest, LayerPlace};
pub use store::Store;
