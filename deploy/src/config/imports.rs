//! Which other files a configuration has containerd read.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use toml_edit::{Array, DocumentMut, value};

use crate::root::Root;

/// The `imports` of a main file, made absolute.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Imports(Vec<PathBuf>);

/// Whether the last part of a path is a pattern that containerd (Go's filepath.Glob) looks up.
fn is_pattern(path: &Path) -> bool {
    path.as_os_str().as_bytes().iter().any(|b| matches!(b, b'*' | b'?' | b'[' | b'\\'))
}

/// Whether a name fits a pattern of `*` and `?`.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.first(), name.first()) {
        (None, None) => true,
        (Some(b'*'), _) => fits(&pattern[1..], name) || (!name.is_empty() && fits(pattern, &name[1..])),
        (Some(b'?'), Some(_)) => fits(&pattern[1..], &name[1..]),
        (Some(expected), Some(found)) => expected == found && fits(&pattern[1..], &name[1..]),
        _ => false,
    }
}

/// A pattern's directory and last part, if only that is one, of the simple kind.
fn simple(path: &Path) -> Option<(&Path, &OsStr)> {
    let (directory, pattern) = (path.parent()?, path.file_name()?);
    let plain = !pattern.as_bytes().iter().any(|b| matches!(b, b'[' | b'\\'));
    (plain && !is_pattern(directory)).then_some((directory, pattern))
}

impl Imports {
    /// Those of a document that is at `main`.
    pub(crate) fn of(document: &DocumentMut, main: &Path) -> Self {
        let list = document.get("imports").and_then(|item| item.as_array());
        let directory = main.parent().unwrap_or(Path::new("/"));
        Self(list.into_iter().flatten().filter_map(|entry| entry.as_str()).map(|path| directory.join(path)).collect())
    }

    /// A directory where a file named `name` is read, if there is one. It has to be there, or be made.
    pub(crate) fn drop_in(&self, name: &str) -> Option<PathBuf> {
        self.0.iter().find_map(|import| {
            let (directory, pattern) = simple(import)?;
            (is_pattern(import) && fits(pattern.as_bytes(), name.as_bytes())).then(|| directory.join(name))
        })
    }

    /// All of them, as they are.
    pub(crate) fn all(&self) -> &[PathBuf] {
        &self.0
    }

    /// Whether a file is among them.
    pub(crate) fn has(&self, path: &Path) -> bool {
        self.0.iter().any(|import| match simple(import).filter(|_| is_pattern(import)) {
            Some((directory, pattern)) => {
                let name = path.file_name().unwrap_or_default();
                path.parent() == Some(directory) && fits(pattern.as_bytes(), name.as_bytes())
            }
            None => import == path,
        })
    }

    /// Directories that files are imported from and that are not there, as far as can be seen.
    pub(crate) fn unseen(&self, root: &Root) -> Vec<&Path> {
        let fixed = |import: &'_ PathBuf| {
            // Of one with a pattern in the middle, what is above that.
            import.ancestors().skip(1).find(|path| !is_pattern(path)).is_some_and(|path| !root.is_directory(path))
        };
        self.0.iter().filter(|import| fixed(import)).filter_map(|import| import.parent()).collect()
    }

    /// The files themselves, without some of them. Patterns that are not understood stay what they are.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub(crate) fn expand(&self, root: &Root, without: &[&Path]) -> io::Result<Vec<PathBuf>> {
        let mut out = Vec::new();
        for import in &self.0 {
            match simple(import).filter(|_| is_pattern(import)) {
                Some((directory, pattern)) => {
                    let names = root.names(directory)?;
                    let names = names.iter().filter(|name| fits(pattern.as_bytes(), name.as_bytes()));
                    out.extend(names.map(|name| directory.join(name)));
                }
                None => out.push(import.clone()),
            }
        }
        out.retain(|path| !without.contains(&path.as_path()));
        Ok(out)
    }

    /// A file that is imported by its name and is not there: containerd does not start then, and not all of its versions say
    /// so before.
    pub(crate) fn missing(&self, root: &Root) -> Option<&Path> {
        self.0.iter().find(|import| !is_pattern(import) && !root.exists(import)).map(PathBuf::as_path)
    }
}

/// Lets a document import exactly these files.
pub(super) fn set(document: &mut DocumentMut, files: &[PathBuf]) {
    if files.is_empty() {
        document.remove("imports");
        return;
    }
    let list: Array = files.iter().map(|path| path.to_string_lossy().into_owned()).collect();
    document["imports"] = value(list);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drop_ins_go_where_a_pattern_of_the_main_file_finds_them() {
        let of = |text: &str| {
            let document = format!("imports = {text}").parse().unwrap();
            Imports::of(&document, Path::new("/etc/containerd/config.toml")).drop_in("runx.toml")
        };
        assert_eq!(of("['/etc/containerd/conf.d/*.toml']"), Some("/etc/containerd/conf.d/runx.toml".into()));
        assert_eq!(of("['x.toml', 'conf.d/r?nx.*']"), Some("/etc/containerd/conf.d/runx.toml".into()));
        assert_eq!(of("['/a/*.conf', '/etc/containerd/runx.toml', '/a/*/*.toml', '/b/[r]*.toml']"), None);
        assert_eq!(of("[]"), None);
    }

    #[test]
    fn patterns_become_files_without_ours() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("d")).unwrap();
        for name in ["b.toml", "a.toml", "runx.toml", "x.conf"] {
            std::fs::write(directory.path().join("d").join(name), "").unwrap();
        }
        let root = Root::open(directory.path()).unwrap();
        let document = "imports = ['d/*.toml', '/one.toml', '/none/*']".parse().unwrap();
        let imports = Imports::of(&document, Path::new("/config.toml"));
        let found = imports.expand(&root, &[Path::new("/d/runx.toml")]).unwrap();
        assert_eq!(found, ["/d/a.toml", "/d/b.toml", "/one.toml"].map(PathBuf::from));
        assert_eq!(imports.missing(&root), Some(Path::new("/one.toml")));
        assert_eq!(imports.unseen(&root), [Path::new("/none")]);
        assert!(imports.has(Path::new("/d/runx.toml")) && imports.has(Path::new("/one.toml")));
        assert!(!imports.has(Path::new("/d/x.conf")) && !imports.has(Path::new("/e/runx.toml")));
    }
}
