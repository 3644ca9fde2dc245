//! x
pub fn v() -> String { format!("{:?}", libseccomp::ScmpVersion::current()) }
