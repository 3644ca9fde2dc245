//! What is to be written where, checked by the node's own containerd before anything is touched.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use crate::config::{self, Dump, Handler, Imports, Options, warnings};
use crate::distribution::Distribution;
use crate::host::Output;
use crate::journal::{DROP_IN, Journal};
use crate::node::Node;
use crate::removal::{Removal, leaving};
use crate::version::Version;

/// The first line of files that are ours alone.
pub(crate) const HEAD: &str = "# Made by runx-node install, taken away by runx-node uninstall.";

/// What files of containerd's are to be.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Which one has the handler.
    pub(crate) path: PathBuf,
    /// The main file, without links in its path.
    pub(crate) main: PathBuf,
    /// What the file is now.
    pub(crate) current: Option<Vec<u8>>,
    /// What it is without us.
    pub(crate) base: Option<Vec<u8>>,
    /// What it is to be.
    pub(crate) planned: Vec<u8>,
    /// The version of containerd's configuration.
    pub(crate) config_version: i64,
    /// Handlers that were defaults, and are written down beside ours: their tables.
    pub(crate) copies: Vec<String>,
    /// Other files that had it before.
    pub(crate) leaving: Vec<Removal>,
}

impl Plan {
    /// Whether the files are as they are to be.
    pub(crate) fn is_done(&self) -> bool {
        self.current.as_deref() == Some(&self.planned) && self.leaving.iter().all(Removal::is_done)
    }
}

/// containerd's main file, as it is and as it is without us.
struct Main {
    path: PathBuf,
    current: Option<String>,
    base: Option<String>,
}

pub(crate) fn text(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| anyhow::anyhow!("{} is not UTF-8, as TOML has to be", path.display()))
}

/// A file as it is without us; `None` if it was ours alone.
pub(crate) fn without_us(node: &Node, journal: &Journal, path: &Path, current: &str) -> Result<Option<String>> {
    let change = journal.change_of(path);
    let mut original = None;
    if let Some(change) = change {
        original = node.store().original(change)?.map(|bytes| text(path, bytes)).transpose()?;
        let leaves = journal.leaving.iter().any(|it| it.path == path);
        let untouched = if leaves {
            node.store().previous(change)?.as_deref() == Some(current.as_bytes())
        } else {
            journal.wrote(path, current.as_bytes())
        };
        // As long as nobody else has changed it, it is what it was, byte for byte.
        match &original {
            Some(original) if untouched => return Ok(Some(original.clone())),
            None if untouched && change.created => return Ok(None),
            _ => {}
        }
    }
    let copies = change.map(|change| change.copies.as_slice()).unwrap_or_default();
    // Outside of a block, a handler that nobody has noted is somebody else's.
    let ours = config::Ours { handler: &node.handler, copies, noted: change.is_some() || current.starts_with(HEAD) };
    let rest = config::remove(&path.to_string_lossy(), current, original.as_deref(), &ours)?;
    let nothing = rest.lines().all(|line| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line.starts_with("version")
    });
    Ok((!(current.starts_with(HEAD) && nothing)).then_some(rest))
}

/// What a file of containerd's is without us; `None` for no file.
///
/// # Errors
/// When it is no TOML.
pub(crate) fn without(node: &Node, journal: &Journal, path: &Path, current: &[u8]) -> Result<Option<Vec<u8>>> {
    let current = text(path, current.to_vec())?;
    Ok(without_us(node, journal, path, &current)?.map(String::into_bytes))
}

impl Main {
    fn read(node: &Node, journal: &Journal) -> Result<Self> {
        let said = &node.main;
        // A link stays one: what it leads to is written.
        let path = if node.root.exists(said) {
            node.root.real(said).with_context(|| format!("follow {}", said.display()))?
        } else {
            let link = node.root.link_target(said).ok().flatten();
            if let Some(target) = link {
                let target = said.parent().unwrap_or(Path::new("/")).join(target);
                bail!(
                    "{} is a link to {}, which is not there: if the node has it, mount {} into the pod of runx-node as well; if \
                     not, repair the link. Nothing was changed",
                    said.display(),
                    target.display(),
                    target.parent().unwrap_or(&target).display()
                );
            }
            said.clone()
        };
        let current = node.root.read(&path).with_context(|| format!("read {}", path.display()))?;
        let current = current.map(|bytes| text(&path, bytes)).transpose()?;
        let base = match &current {
            Some(current) => without_us(node, journal, &path, current)?,
            None => {
                not_lost(node, journal, &path)?;
                None
            }
        };
        Ok(Self { path, current, base })
    }
}

/// A main file that is not there must not have been there before: its settings would be gone.
fn not_lost(node: &Node, journal: &Journal, path: &Path) -> Result<()> {
    let Some(change) = &journal.change else { return Ok(()) };
    if change.path == path && change.created {
        return Ok(());
    }
    let kept = node.store().original_path(change);
    let kept = if !change.created && node.root.exists(&kept) {
        format!(" (as it was without runx it is kept in {})", kept.display())
    } else {
        String::new()
    };
    bail!(
        "{} is not there, and there was a main file when runx was installed{kept}: put it back. Nothing was changed, since \
         containerd would lose all that is set there",
        path.display()
    );
}

/// What containerd makes of a configuration.
pub(crate) struct Checked {
    dump: Dump,
    warnings: std::collections::BTreeSet<String>,
}

/// A main file, and the files that it imports.
pub(crate) struct Candidate<'a> {
    /// Where relative paths in it begin.
    pub(crate) place: &'a Path,
    pub(crate) text: &'a str,
    pub(crate) imports: Vec<PathBuf>,
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

pub(crate) fn check(node: &Node, candidate: Option<&Candidate<'_>>) -> Result<std::result::Result<Checked, String>> {
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
    // k0s imports its directory into the file that it makes itself; a file of somebody else has to do so.
    let text = main.current.as_deref().unwrap_or_default();
    let foreign = distribution.drop_ins.is_some() && !text.contains("k0s_managed=true");
    let directory = distribution.drop_ins.as_ref().filter(|_| !foreign);
    let found = directory.map(|it| it.join(DROP_IN)).or_else(|| imports.drop_in(DROP_IN));
    if let Some(path) = found.filter(|_| version.merges_imports()) {
        return Ok(Place::DropIn(path));
    }
    if let (true, Some(directory)) = (foreign && version.merges_imports(), &distribution.drop_ins) {
        bail!(
            "{} is not made by {} (it has no k0s_managed=true) and imports no directory of drop-ins: add imports = [\"{}/*.toml\"] to it",
            main.path.display(),
            distribution.name,
            directory.display()
        );
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
        let directory = missing.parent().unwrap_or(missing);
        if !node.root.is_directory(directory) {
            bail!(
                "{shown} imports {}, and there is no {}: if the node has it, mount it into the pod of runx-node as well; if not, \
                 containerd does not start with that. Nothing was changed",
                missing.display(),
                directory.display()
            );
        }
        bail!(
            "{shown} imports {}, which is not there: containerd does not start with that, so nothing was changed. Repair it first",
            missing.display()
        );
    }
    let place = place(&node.distribution, version, &main, &imports)?;
    let path = match &place {
        Place::DropIn(path) => path.clone(),
        Place::Main => main.path.clone(),
    };
    writable(node, &path)?;
    let leaving = leaving(node, journal, &path)?;
    let mut without: Vec<&Path> = leaving.iter().map(|removal| removal.change.path.as_path()).collect();
    let mut drop_in = None;
    if matches!(place, Place::DropIn(_)) {
        without.push(&path);
        drop_in = Some(DropIn::read(node, journal, &path)?);
    }
    let mut others = imports.expand(&node.root, &without).with_context(|| format!("look for what {shown} imports"))?;
    // What somebody else has in files that were ours counts, too.
    for (at, removal) in leaving.iter().enumerate().filter(|(_, removal)| removal.change.path != main.path) {
        if let (Some(rest), true) = (&removal.planned, imports.has(&removal.change.path)) {
            others.push(staged(node, &format!("left-{at}.toml"), rest)?);
        }
    }
    let mut before_imports = others.clone();
    if let Some(rest) = drop_in.as_ref().and_then(|it| it.base.as_ref()) {
        before_imports.push(staged(node, DROP_IN, rest.as_bytes())?);
    }
    let base = Candidate { place: &main.path, text: &base_text, imports: before_imports };
    let before = match check(node, main.base.as_ref().map(|_| &base))? {
        Ok(before) => before,
        Err(why) => {
            return Err(anyhow!("containerd says: {why}").context(format!(
                "the node's containerd does not read its own configuration {shown} as it is, so nothing was changed: repair it first"
            )));
        }
    };
    if !before.dump.has_cri() {
        bail!(
            "containerd's CRI plugin is switched off in {shown} (disabled_plugins): Kubernetes does not use this containerd"
        );
    }
    if main.base.is_some() {
        all_visible(node, &main, &imports, &base, &before)?;
    }
    let shim = node.stage().shim().to_string_lossy().into_owned();
    if before.dump.handler(&node.handler).is_some_and(|found| !copied_from(&node.distribution, &drop_in, found, &shim))
    {
        return Err(config::Error::Foreign { handler: node.handler.clone() }.into());
    }
    let options = match (before.dump.systemd_cgroup(), version.passes_options()) {
        (false, _) => Options::None,
        (true, true) => Options::SystemdCgroup,
        (true, false) => Options::File(node.stage().options().to_string_lossy().into_owned()),
    };
    let handler = Handler { name: node.handler.clone(), runtime_type: version.runtime_type(&shim), shim, options };
    let own = config::tables(&handler, config_version);
    let mut copies: Vec<String> = Vec::new();
    // Before 2.0, handlers that are nowhere written down are gone when the first one is.
    for _ in 0..2 {
        let block = std::iter::once(&own).chain(&copies).map(String::as_str).collect::<Vec<_>>().join("\n");
        let (planned, candidate_imports, candidate_text) = match &drop_in {
            Some(it) => {
                let text = it.with(&path, config_version, &block)?;
                let mut all = others.clone();
                all.push(staged(node, DROP_IN, text.as_bytes())?);
                (text, all, base_text.clone())
            }
            None => {
                let base = match &main.base {
                    Some(base) => base.clone(),
                    None => format!(
                        "{HEAD}\n# All that is not in here is as containerd has it by default.\nversion = {config_version}\n\n"
                    ),
                };
                let text = config::with_block(&shown, &base, &block)?;
                (text.clone(), others.clone(), text)
            }
        };
        let candidate = Candidate { place: &main.path, text: &candidate_text, imports: candidate_imports };
        let after = match check(node, Some(&candidate))? {
            Ok(after) => after,
            Err(why) => {
                return Err(anyhow!("containerd says: {why}")
                    .context("containerd refuses the configuration with the handler, so nothing was changed"));
            }
        };
        let now = after.dump.handlers();
        let missing: Vec<&str> = before.dump.handlers().into_iter().filter(|name| !now.contains(name)).collect();
        if !missing.is_empty() && matches!(place, Place::Main) && copies.is_empty() {
            for name in missing {
                copies.push(before.dump.tables(name, config_version).context("copy a default handler")?);
            }
            continue;
        }
        accept(&before, &after, &handler)?;
        let (current, base) = match drop_in {
            Some(it) => (it.current, it.base),
            None => (main.current, main.base),
        };
        // Where only the order or a comment is otherwise, nothing has to be written.
        let planned = current.clone().filter(|current| config::are_equal(current, &planned)).unwrap_or(planned);
        return Ok(Plan {
            path,
            main: main.path,
            current: current.map(String::into_bytes),
            base: base.map(String::into_bytes),
            planned: planned.into_bytes(),
            config_version,
            copies,
            leaving,
        });
    }
    bail!("containerd drops other handlers when {} is added to {shown}, so nothing was changed", node.handler);
}

/// A file for containerd to read while it checks.
pub(crate) fn staged(node: &Node, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = node.store().scratch().join(name);
    node.root.make_directories(&node.store().scratch()).context("make a directory to check in")?;
    node.root.write(&path, bytes, 0o600, None).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// Whether a file can be put into its place.
fn writable(node: &Node, path: &Path) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    node.root.writable(directory).with_context(|| {
        format!(
            "write into {}: in a pod it has to be mounted, and not read-only. Nothing was changed",
            directory.display()
        )
    })
}

/// Fails if containerd reads files on the node that cannot be seen from here: they would not be checked.
fn all_visible(node: &Node, main: &Main, imports: &Imports, base: &Candidate<'_>, before: &Checked) -> Result<()> {
    let unseen = imports.unseen(&node.root);
    if unseen.is_empty() {
        return Ok(());
    }
    let all = Candidate { place: base.place, text: base.text, imports: imports.all().to_vec() };
    let real = check(node, Some(&all))?;
    if real.is_ok_and(|real| before.dump.differences(&real.dump, &node.handler).is_empty()) {
        return Ok(());
    }
    let list: Vec<String> = unseen.iter().map(|path| path.display().to_string()).collect();
    bail!(
        "{} imports files from {}, which the node has and which cannot be seen from here: mount that into the pod of runx-node as \
         well. Nothing was changed",
        main.path.display(),
        list.join(", ")
    )
}

/// A drop-in, as it is and as it is without us.
struct DropIn {
    current: Option<String>,
    base: Option<String>,
}

impl DropIn {
    fn read(node: &Node, journal: &Journal, path: &Path) -> Result<Self> {
        let found = node.root.read(path).with_context(|| format!("read {}", path.display()))?;
        let Some(current) = found.map(|bytes| text(path, bytes)).transpose()? else {
            return Ok(Self { current: None, base: None });
        };
        if !current.starts_with(HEAD) && journal.change_of(path).is_none() {
            bail!("{} is there already, and not by runx-node: remove it if it is of runx", path.display());
        }
        let base = without_us(node, journal, path, &current)?;
        Ok(Self { current: Some(current), base })
    }

    /// With the tables.
    fn with(&self, path: &Path, version: i64, block: &str) -> Result<String> {
        let Some(base) = &self.base else { return Ok(format!("{HEAD}\nversion = {version}\n\n{block}")) };
        let shown = path.to_string_lossy();
        let (_, of_base) = config::parse(&shown, base)?;
        if of_base != version {
            bail!(
                "{shown} has lines of somebody else and version = {of_base}, and containerd's main file {version}: move them to a \
                 file of their own, and remove this one"
            );
        }
        Ok(config::with_block(&shown, base, block)?)
    }
}

/// Whether a handler in the main file is a copy of ours: k0s writes what is in its drop-ins into its own file.
fn copied_from(distribution: &Distribution, drop_in: &Option<DropIn>, found: &serde_json::Value, shim: &str) -> bool {
    let ours = found.get("runtime_path").and_then(serde_json::Value::as_str) == Some(shim);
    let there = drop_in.as_ref().is_some_and(|it| it.current.is_some());
    distribution.drop_ins.is_some() && there && ours
}

/// Whether the handler is there, and nothing else is otherwise.
fn accept(before: &Checked, after: &Checked, handler: &Handler) -> Result<()> {
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
    let new: Vec<&String> = after.warnings.difference(&before.warnings).collect();
    if !new.is_empty() {
        return Err(anyhow!("{new:?}").context("containerd warns of the new configuration, so nothing was changed"));
    }
    Ok(())
}
