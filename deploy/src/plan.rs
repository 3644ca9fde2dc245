//! What is to be written where, checked by the node's own containerd before anything is touched.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::config::{self, Dump, Handler, Imports, Options, warnings};
use crate::distribution::Distribution;
use crate::host::Output;
use crate::journal::Journal;
use crate::node::Node;
use crate::version::Version;

/// The name of the drop-in.
const DROP_IN: &str = "runx.toml";

/// The first line of files that are ours alone.
const HEAD: &str = "# Made by runx-node install, taken away by runx-node uninstall.";

/// What a file of containerd's is to be.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Where.
    pub(crate) path: PathBuf,
    /// What it is now.
    pub(crate) current: Option<Vec<u8>>,
    /// What it is without us.
    pub(crate) base: Option<Vec<u8>>,
    /// What it is to be.
    pub(crate) planned: Vec<u8>,
    /// The version of containerd's configuration.
    pub(crate) config_version: i64,
}

/// containerd's main file, as it is and as it is without us.
struct Main {
    path: PathBuf,
    current: Option<String>,
    base: Option<String>,
}

fn text(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| anyhow::anyhow!("{} is not UTF-8, as TOML has to be", path.display()))
}

/// A file that was changed, as it is without us; `None` if it was ours alone.
fn without_us(node: &Node, journal: &Journal, path: &Path, current: &str, handler: &str) -> Result<Option<String>> {
    let created = journal.change.as_ref().is_some_and(|change| change.path == path && change.created);
    let original = if journal.change.as_ref().is_some_and(|change| change.path == path) {
        node.store().original()?.map(|bytes| text(path, bytes)).transpose()?
    } else {
        None
    };
    // As long as nobody else has changed it, it is what it was, byte for byte.
    if journal.wrote(path, current.as_bytes()) {
        match original {
            Some(original) => return Ok(Some(original)),
            None if created => return Ok(None),
            None => {}
        }
    }
    let ours = [(1, handler), (2, handler), (3, handler), (4, handler)];
    let only_ours = current.starts_with(HEAD);
    // A handler that nobody has noted is somebody else's.
    let ours: &[(i64, &str)] =
        if journal.change.as_ref().is_some_and(|change| change.path == path) { &ours } else { &[] };
    let rest = config::remove(&path.to_string_lossy(), current, original.as_deref(), ours)?;
    let nothing = rest.lines().all(|line| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line.starts_with("version")
    });
    Ok((!(only_ours && nothing)).then_some(rest))
}

impl Main {
    fn read(node: &Node, journal: &Journal) -> Result<Self> {
        let said = &node.main;
        // A link stays one: what it leads to is written.
        let path = if node.root.exists(said) {
            node.root.real(said).with_context(|| format!("follow {}", said.display()))?
        } else {
            said.clone()
        };
        let current = node.root.read(&path).with_context(|| format!("read {}", path.display()))?;
        let current = current.map(|bytes| text(&path, bytes)).transpose()?;
        let base = match &current {
            Some(current) => without_us(node, journal, &path, current, &node.handler)?,
            None => None,
        };
        Ok(Self { path, current, base })
    }
}

/// What containerd makes of a configuration.
struct Checked {
    dump: Dump,
    warnings: std::collections::BTreeSet<String>,
}

/// A main file, and the files that it imports.
struct Candidate<'a> {
    /// Where relative paths in it begin.
    place: &'a Path,
    text: &'a str,
    imports: Vec<PathBuf>,
}

fn containerd(node: &Node, words: &[&str]) -> Result<Output> {
    let program = node.containerd.to_string_lossy().into_owned();
    let command: Vec<String> = std::iter::once(program).chain(words.iter().map(|word| (*word).to_owned())).collect();
    node.host.run(&node.root, &node.store().scratch(), &command)
}

/// The version of the node's containerd.
///
/// # Errors
/// When it does not tell.
pub(crate) fn version(node: &Node) -> Result<Version> {
    let output = containerd(node, &["--version"])?;
    let program = node.containerd.display();
    if !output.success {
        bail!("{program} --version fails on the node: {}", output.stderr.trim());
    }
    Version::parse(&output.stdout).with_context(|| format!("{program} --version prints {:?}", output.stdout.trim()))
}

fn check(node: &Node, candidate: Option<&Candidate<'_>>) -> Result<std::result::Result<Checked, String>> {
    let output = match candidate {
        // Without a main file no other is read, either.
        None => containerd(node, &["config", "default"])?,
        Some(candidate) => {
            let path = node.store().scratch().join("config.toml");
            let text = config::with_imports(&candidate.place.to_string_lossy(), candidate.text, &candidate.imports)?;
            node.root.make_directories(&node.store().scratch()).context("make a directory to check in")?;
            node.root
                .write(&path, text.as_bytes(), 0o600, None)
                .with_context(|| format!("write {}", path.display()))?;
            containerd(node, &["--config", &path.to_string_lossy(), "config", "dump"])?
        }
    };
    if !output.success {
        return Ok(Err(output.stderr.trim().to_owned()));
    }
    Ok(Ok(Checked { dump: Dump::parse(&output.stdout)?, warnings: warnings(&output.stderr) }))
}

/// Where the tables go.
enum Place {
    DropIn(PathBuf),
    Main,
}

fn place(distribution: &Distribution, version: &Version, main: &Main, imports: &Imports) -> Result<Place> {
    let directory = distribution.drop_ins.as_ref().map(|it| it.join(DROP_IN));
    if let Some(path) = directory.or_else(|| imports.drop_in(DROP_IN)).filter(|_| version.merges_imports()) {
        return Ok(Place::DropIn(path));
    }
    if !distribution.generated {
        return Ok(Place::Main);
    }
    let (name, path) = (distribution.name, main.path.display());
    if version.merges_imports() {
        bail!(
            "{name} writes {path} itself, and this version of it imports no directory of drop-ins there: upgrade {name}, or put \
             the handler into its template by hand (deploy/README.md)"
        );
    }
    bail!(
        "{name} writes {path} itself, and its containerd {version} takes a drop-in for a replacement of all of CRI's settings: \
         upgrade {name} to one with containerd 2.0 or later"
    );
}

fn check_version(path: &Path, config: i64, containerd: &Version) -> Result<()> {
    let path = path.display();
    let at_least = |major, minor| (containerd.major, containerd.minor) >= (major, minor);
    match config {
        1 if at_least(2, 0) => bail!(
            "{path} is of version 1, whose settings of CRI containerd {containerd} does not read: convert it with \
             `containerd config migrate` first"
        ),
        3 if !at_least(2, 0) => bail!("{path} is of version 3, and containerd {containerd} reads up to 2"),
        4 if !at_least(2, 3) => {
            bail!("{path} is of version 4, and containerd {containerd} does not read that before 2.3")
        }
        _ => Ok(()),
    }
}

/// Makes the plan. `journal` says what is ours.
///
/// # Errors
/// When the handler cannot be registered without changing something else, or containerd does not read its files as they
/// are.
pub(crate) fn make(node: &Node, version: &Version, journal: &Journal) -> Result<Plan> {
    let main = Main::read(node, journal)?;
    let shown = main.path.to_string_lossy().into_owned();
    let base_text = main.base.clone().unwrap_or_default();
    let (document, of_file) = config::parse(&shown, &base_text)?;
    let config_version = if main.base.is_some() { of_file } else { version.new_configuration() };
    check_version(&main.path, config_version, version)?;
    let imports = Imports::of(&document, &main.path);
    if let Some(missing) = imports.missing(&node.root) {
        bail!(
            "{shown} imports {}, which is not there: containerd does not start with that, so nothing was changed. Repair it first",
            missing.display()
        );
    }
    let place = place(&node.distribution, version, &main, &imports)?;
    let ours = match &place {
        Place::DropIn(path) => Some(path.as_path()),
        Place::Main => None,
    };
    if let Some(path) = ours {
        foreign_drop_in(node, path, journal)?;
    }
    let others = imports.expand(&node.root, ours).with_context(|| format!("look for what {shown} imports"))?;
    let base = Candidate { place: &main.path, text: &base_text, imports: others.clone() };
    let before = match check(node, main.base.as_ref().map(|_| &base))? {
        Ok(before) => before,
        Err(why) => bail!(
            "the node's containerd does not read its own configuration {shown} as it is, so nothing was changed: repair it \
             first. It says: {why}"
        ),
    };
    if !before.dump.has_cri() {
        bail!(
            "containerd's CRI plugin is switched off in {shown} (disabled_plugins): Kubernetes does not use this containerd"
        );
    }
    if before.dump.handler(&node.handler).is_some() {
        return Err(config::Error::Foreign { handler: node.handler.clone() }.into());
    }
    let shim = node.stage().shim().to_string_lossy().into_owned();
    let options = match (before.dump.systemd_cgroup(), version.passes_options()) {
        (false, _) => Options::None,
        (true, true) => Options::SystemdCgroup,
        (true, false) => Options::File(node.stage().options().to_string_lossy().into_owned()),
    };
    let handler = Handler { name: node.handler.clone(), runtime_type: version.runtime_type(&shim), shim, options };
    let mut block = config::tables(&handler, config_version);
    // Before 2.0, handlers that are nowhere written down are gone when the first one is.
    for _ in 0..2 {
        let (path, planned, candidate_imports, candidate_text) = match &place {
            Place::DropIn(path) => {
                let text = format!("{HEAD}\nversion = {config_version}\n\n{block}");
                let staged = node.store().scratch().join(DROP_IN);
                node.root.make_directories(&node.store().scratch()).context("make a directory to check in")?;
                node.root
                    .write(&staged, text.as_bytes(), 0o600, None)
                    .with_context(|| format!("write {}", staged.display()))?;
                let mut all = others.clone();
                all.push(staged);
                (path.clone(), text, all, base_text.clone())
            }
            Place::Main => {
                let base = match &main.base {
                    Some(base) => base.clone(),
                    None => format!(
                        "{HEAD}\n# All that is not in here is as containerd has it by default.\nversion = {config_version}\n\n"
                    ),
                };
                let text = config::with_block(&shown, &base, &block)?;
                (main.path.clone(), text.clone(), others.clone(), text)
            }
        };
        let candidate = Candidate { place: &main.path, text: &candidate_text, imports: candidate_imports };
        let after = match check(node, Some(&candidate))? {
            Ok(after) => after,
            Err(why) => bail!("containerd refuses the configuration with the handler, so nothing was changed: {why}"),
        };
        let now = after.dump.handlers();
        let missing: Vec<&str> = before.dump.handlers().into_iter().filter(|name| !now.contains(name)).collect();
        if !missing.is_empty() && matches!(place, Place::Main) {
            block = config::tables(&handler, config_version);
            for name in missing {
                block.push('\n');
                block.push_str(&before.dump.tables(name, config_version).context("copy a default handler")?);
            }
            continue;
        }
        accept(&before, &after, &handler, node)?;
        let current = match &place {
            Place::DropIn(path) => node.root.read(path).with_context(|| format!("read {}", path.display()))?,
            Place::Main => main.current.map(String::into_bytes),
        };
        let base = if matches!(place, Place::Main) { main.base.map(String::into_bytes) } else { None };
        return Ok(Plan { path, current, base, planned: planned.into_bytes(), config_version });
    }
    bail!("containerd drops other handlers when {} is added to {shown}, so nothing was changed", node.handler);
}

fn foreign_drop_in(node: &Node, path: &Path, journal: &Journal) -> Result<()> {
    let found = node.root.read(path).with_context(|| format!("read {}", path.display()))?;
    let noted = journal.change.as_ref().is_some_and(|change| change.path == path);
    if found.is_some_and(|bytes| !bytes.starts_with(HEAD.as_bytes())) && !noted {
        bail!("{} is there already, and not by runx-node: remove it if it is of runx", path.display());
    }
    Ok(())
}

/// Whether the handler is there, and nothing else is otherwise.
fn accept(before: &Checked, after: &Checked, handler: &Handler, node: &Node) -> Result<()> {
    let found = after.dump.handler(&handler.name);
    let path = found.and_then(|table| table.get("runtime_path")).and_then(|path| path.as_str());
    if path != Some(&handler.shim) {
        bail!(
            "containerd does not find the handler {:?} in the new configuration, so nothing was changed",
            handler.name
        );
    }
    let differences = before.dump.differences(&after.dump, &handler.name);
    if !differences.is_empty() {
        bail!(
            "the handler would change other settings of containerd, so nothing was changed: {}",
            differences.join(", ")
        );
    }
    let scratch = node.store().scratch().to_string_lossy().into_owned();
    let new: Vec<&String> =
        after.warnings.difference(&before.warnings).filter(|line| !line.contains(&scratch)).collect();
    if !new.is_empty() {
        bail!("containerd warns of the new configuration, so nothing was changed: {new:?}");
    }
    Ok(())
}

/// What the changed file is to be when we are gone.
#[derive(Debug)]
pub(crate) struct Removal {
    /// Where.
    pub(crate) path: PathBuf,
    /// What it is now.
    pub(crate) current: Option<Vec<u8>>,
    /// What it is to be; `None` for no file.
    pub(crate) planned: Option<Vec<u8>>,
}

/// Finds out what is to be taken away, and whether containerd reads what is left.
///
/// # Errors
/// When it does not, or the file cannot be read.
pub(crate) fn removal(node: &Node, journal: &Journal) -> Result<Option<Removal>> {
    let Some(change) = &journal.change else { return Ok(None) };
    let path = change.path.clone();
    let Some(bytes) = node.root.read(&path).with_context(|| format!("read {}", path.display()))? else {
        return Ok(Some(Removal { path, current: None, planned: None }));
    };
    let is_main = node.root.real(&node.main).is_ok_and(|main| main == path);
    let planned = if is_main {
        let current = text(&path, bytes.clone())?;
        without_us(node, journal, &path, &current, &node.handler)?.map(String::into_bytes)
    } else {
        None
    };
    Ok(Some(Removal { path, current: Some(bytes), planned }))
}

/// Whether containerd reads its configuration as it is when a removal is done.
///
/// # Errors
/// With what it says, if it does not.
pub(crate) fn check_removal(node: &Node, removal: &Removal) -> Result<()> {
    let main = node.root.read(&node.main).with_context(|| format!("read {}", node.main.display()))?;
    let Some(main) = main else { return Ok(()) };
    let is_main = node.root.real(&node.main).is_ok_and(|main| main == removal.path);
    let left = if is_main { removal.planned.clone() } else { Some(main) };
    let Some(left) = left else { return Ok(()) };
    let left = text(&node.main, left)?;
    let (document, _) = config::parse(&node.main.to_string_lossy(), &left)?;
    let without = (!is_main).then_some(removal.path.as_path());
    let imports = Imports::of(&document, &node.main).expand(&node.root, without)?;
    match check(node, Some(&Candidate { place: &node.main, text: &left, imports }))? {
        Ok(_) => Ok(()),
        Err(why) => bail!(
            "containerd does not read its configuration as it would be without runx, so nothing was changed: repair {} first. It \
             says: {why}",
            node.main.display()
        ),
    }
}
