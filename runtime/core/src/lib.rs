//! Containers in process: OCI bundles, namespaces, mounts, cgroups, and the processes in them.
//!
//! The entry is [`container::Runtime`]. The command and the shim are thin fronts of it; neither runs a
//! program to get a container. ARCHITECTURE.md tells how the parts fit together.

#![cfg(target_os = "linux")]

pub mod agent;
pub mod bundle;
mod capability;
pub mod cgroup;
pub mod container;
pub mod counters;
pub mod error;
pub mod features;
pub mod hooks;
pub mod init;
pub mod lsm;
pub mod mount_options;
pub mod plan;
pub mod rdt;
pub mod rootless;
pub mod seccomp;
pub mod spawn;
pub mod sys;
mod tolerance;
pub mod workload;

pub use error::{Error, Result};
pub use oci_spec::runtime as spec;
