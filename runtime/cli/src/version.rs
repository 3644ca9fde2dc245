//! What `--version` prints, in runc's layout: engines read it.

/// The commit that this program was built from, if the build said so in `RUNX_COMMIT`.
const COMMIT: Option<&str> = option_env!("RUNX_COMMIT");

/// The same for programs.
pub(crate) fn value() -> serde_json::Value {
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": COMMIT.filter(|commit| !commit.is_empty()),
        "spec": runx_core::features::features()["ociVersionMax"],
        "libseccomp": runx_core::seccomp::library_version(),
    })
}

/// Name and version, commit, version of the runtime-spec, version of libseccomp.
pub(crate) fn text() -> String {
    let mut out = format!("runx version {}\n", env!("CARGO_PKG_VERSION"));
    if let Some(commit) = COMMIT.filter(|commit| !commit.is_empty()) {
        out.push_str(&format!("commit: {commit}\n"));
    }
    if let Some(version) = runx_core::features::features()["ociVersionMax"].as_str() {
        out.push_str(&format!("spec: {version}\n"));
    }
    if let Some(version) = runx_core::seccomp::library_version() {
        out.push_str(&format!("libseccomp: {version}\n"));
    }
    out
}
