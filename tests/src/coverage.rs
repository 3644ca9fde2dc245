//! Which test covers which field of the runtime-spec, read out of the tests themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// A test function and where it runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Test {
    /// The file below tests/tests, without its extension.
    pub suite: String,
    /// The function.
    pub name: String,
    /// It runs where there is cgroup v1.
    pub v1: bool,
    /// It runs where there is cgroup v2.
    pub v2: bool,
}

/// What the sources say.
#[derive(Debug, Default)]
pub struct Coverage {
    /// All fields, in the order of their list.
    pub fields: Vec<String>,
    /// The tests of each field.
    pub tests: BTreeMap<String, BTreeSet<Test>>,
}

/// The repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

impl Coverage {
    /// Reads the list of fields and the tests.
    ///
    /// # Panics
    /// When a file cannot be read.
    pub fn read() -> Self {
        let read = |path: &str| {
            let path = repository().join(path);
            fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
        };
        let list = read("tests/fields.txt");
        let fields = list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned);
        let mut coverage = Self { fields: fields.collect(), tests: BTreeMap::new() };
        let mut suites: Vec<PathBuf> = fs::read_dir(repository().join("tests/tests"))
            .expect("list the tests")
            .map(|entry| entry.expect("list the tests").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
            .collect();
        suites.sort();
        for path in suites {
            let suite = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).expect("read a test");
            coverage.add(&suite, &text);
        }
        coverage
    }

    fn add(&mut self, suite: &str, text: &str) {
        let mut covered: Vec<&str> = Vec::new();
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            if let Some(words) = line.trim().strip_prefix("// covers:") {
                covered.extend(words.split_whitespace());
            }
            let Some(name) = line.strip_prefix("fn ").and_then(|rest| rest.split_once('(')).map(|(name, _)| name)
            else {
                continue;
            };
            let is_test = lines[..at].iter().rev().take(3).any(|line| line.trim() == "#[test]");
            if is_test {
                let body: Vec<&&str> = lines[at..].iter().take_while(|line| **line != "}").collect();
                let asks = |macro_name: &str| body.iter().any(|line| line.contains(macro_name));
                let (only_v1, only_v2) = (
                    asks("needs_cgroup_v1!"),
                    asks("needs_cgroup_v2!") || asks("needs_systemd!") || asks("needs_apparmor!"),
                );
                let test = Test { suite: suite.to_owned(), name: name.to_owned(), v1: !only_v2, v2: !only_v1 };
                for field in covered.drain(..) {
                    self.tests.entry(field.to_owned()).or_default().insert(test.clone());
                }
            }
            covered.clear();
        }
    }

    /// The table, as Markdown.
    pub fn table(&self) -> String {
        let mut out = String::from(
            "# Coverage of the runtime-spec\n\n\
             Made from the comments of the tests by `RUNX_UPDATE_DOCS=1 cargo test -p runx-tests --test coverage`, which \
             without\nthe variable checks that this file is up to date and that no field is missing. v1 is the machine \
             that runs\n`make test`, if it has cgroup v1; v2 is the virtual machine of `make test-vm`, with systemd and \
             AppArmor.\n\n| field | test | v1 | v2 |\n|---|---|---|---|\n",
        );
        for field in &self.fields {
            let Some(tests) = self.tests.get(field) else { continue };
            for (number, test) in tests.iter().enumerate() {
                let field = if number == 0 { format!("`{field}`") } else { String::new() };
                let mark = |on: bool| if on { "yes" } else { "" };
                let _ = writeln!(
                    out,
                    "| {field} | {}: {} | {} | {} |",
                    test.suite,
                    test.name.replace('_', " "),
                    mark(test.v1),
                    mark(test.v2)
                );
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_belong_to_the_test_below_them() {
        let mut coverage = Coverage::default();
        let text = "// covers: a b\n#[test]\nfn one() {\n    needs_root!();\n}\n\n// covers: b\nfn helper() {\n}\n\n\
                    // covers: c\n#[test]\nfn two() {\n    needs_cgroup_v1!();\n}\n";
        coverage.add("suite", text);
        assert_eq!(coverage.tests.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        let of = |field: &str| coverage.tests[field].iter().next().unwrap().clone();
        assert_eq!((of("b").name.as_str(), of("b").v1, of("b").v2), ("one", true, true));
        assert_eq!((of("c").v1, of("c").v2), (true, false));
    }
}
