//! The node that something is done to.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::arguments::{Arguments, Command};
use crate::cri;
use crate::distribution::{self, Distribution, detect};
use crate::host::Host;
use crate::journal::{Journal, Store};
use crate::kube::Cluster;
use crate::root::Root;
use crate::stage::Stage;

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    /// Its files.
    pub(crate) root: Root,
    /// What it is.
    pub(crate) distribution: Distribution,
    /// Who runs its programs.
    pub(crate) host: Host,
    /// containerd's program.
    pub(crate) containerd: PathBuf,
    /// containerd's main file.
    pub(crate) main: PathBuf,
    /// The handler's name.
    pub(crate) handler: String,
    /// Where programs go.
    pub(crate) install_dir: PathBuf,
    /// The cluster, if labels are to be set.
    pub(crate) cluster: Option<Cluster>,
    socket: PathBuf,
    state_dir: PathBuf,
    units: Vec<String>,
    timeout: Duration,
    /// Whether the cluster was asked what the node is, and nothing was against it.
    known: Cell<bool>,
}

/// An absolute path of the node without `..`.
fn absolute(flag: &str, text: &str) -> Result<PathBuf> {
    let path = PathBuf::from(text);
    let plain = |part: std::path::Component<'_>| !matches!(part, std::path::Component::ParentDir);
    // It ends up in quotes in TOML and in the names of units.
    if !path.is_absolute() || !path.components().all(plain) || path.file_name().is_none() || text.contains(['\n', '\0'])
    {
        bail!("--{flag} {text:?} is no absolute path of the node");
    }
    Ok(path)
}

fn handler_name(text: &str) -> Result<String> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let name = !text.is_empty() && text.len() <= 63 && text.bytes().all(inner);
    if !name || text.starts_with('-') || text.ends_with('-') {
        bail!("--handler {text:?} is no name of a handler: small letters, digits and '-' in between");
    }
    if text == "runc" {
        bail!("--handler runc: that is containerd's own");
    }
    Ok(text.to_owned())
}

/// The cluster that the flags name, if they do.
///
/// # Errors
/// When it is not in a pod, or the account is not there.
pub(crate) fn cluster(arguments: &Arguments) -> Result<Option<Cluster>> {
    let Some(name) = arguments.get("node-name") else { return Ok(None) };
    Cluster::of_node(name, arguments.get("api"), arguments.get("account").map(Path::new)).map(Some)
}

impl Node {
    /// Finds out what the node is.
    ///
    /// # Errors
    /// When it is none that can be installed on, or a flag is wrong.
    pub(crate) fn open(arguments: &Arguments) -> Result<Self> {
        let cluster = match arguments.command {
            Command::Status => None,
            _ => cluster(arguments)?,
        };
        Self::find(arguments, cluster.clone()).map_err(|e| {
            // Of a node without a containerd the cluster may know more than that.
            let told = cluster.filter(|_| arguments.installs()).and_then(|cluster| cluster.node().ok());
            match told.map(|told| distribution::check(&told, None)) {
                Some(Err(refusal)) => refusal.into(),
                _ => e,
            }
        })
    }

    fn find(arguments: &Arguments, cluster: Option<Cluster>) -> Result<Self> {
        let path = Path::new(arguments.or("root", "/"));
        let root = Root::open(path).with_context(|| format!("open --root {}", path.display()))?;
        let distribution = detect(&root, arguments.get("distribution"))?;
        let given = |flag: &str| arguments.get(flag).map(|text| absolute(flag, text)).transpose();
        let containerd = match given("containerd")? {
            Some(path) if root.exists(&path) => path,
            Some(path) => bail!("--containerd {}: the node has no such program", path.display()),
            None => {
                let found = distribution.programs.iter().find(|path| root.exists(path));
                found.cloned().ok_or_else(|| {
                    let list: Vec<String> =
                        distribution.programs.iter().map(|path| path.display().to_string()).collect();
                    anyhow!("there is no containerd in {}: say where it is with --containerd", list.join(", "))
                })?
            }
        };
        let install_dir = match given("install-dir")?.or_else(|| distribution.install.clone()) {
            Some(path) => path,
            None => bail!(
                "this is Container-Optimized OS, where programs may not be just anywhere: choose a directory that is writable and \
                 executable with --install-dir, such as /home/kubernetes/bin/runx"
            ),
        };
        let host = match (arguments.get("restart-command"), arguments.get("enter")) {
            (Some(command), enter) => Host::Commands {
                enter: enter.unwrap_or_default().split_ascii_whitespace().map(str::to_owned).collect(),
                restart: command.to_owned(),
            },
            (None, Some(_)) => bail!("--enter goes with --restart-command"),
            // Where it reads its files anew by itself, its version has to be found out all the same.
            (None, None) => Host::systemd(&root)?,
        };
        let is_status = arguments.command == Command::Status;
        let units = match arguments.get("unit").filter(|_| !is_status) {
            Some(unit) => vec![unit.to_owned()],
            None => distribution.units.iter().map(|unit| (*unit).to_owned()).collect(),
        };
        Ok(Self {
            main: given("containerd-config")?.unwrap_or_else(|| distribution.main.clone()),
            handler: handler_name(arguments.or("handler", "runx"))?,
            socket: given("socket")?.unwrap_or_else(|| distribution.socket.clone()),
            state_dir: absolute("state-dir", arguments.or("state-dir", "/var/lib/runx/node"))?,
            timeout: if is_status {
                Duration::from_secs(1)
            } else {
                arguments.seconds("timeout", 60).map_err(|e| anyhow!(e))?
            },
            root,
            distribution,
            host,
            containerd,
            install_dir,
            cluster,
            units,
            known: Cell::new(false),
        })
    }

    /// Fails if the cluster knows that the node is none to install on, whatever is to be seen of it here. It is asked once.
    ///
    /// # Errors
    /// A [`distribution::Refusal`]; or when the API does not answer.
    pub(crate) fn check_cluster(&self) -> Result<()> {
        if let Some(cluster) = self.cluster.as_ref().filter(|_| !self.known.get()) {
            distribution::check(&cluster.node()?, Some(self.distribution.name))?;
            self.known.set(true);
        }
        Ok(())
    }

    /// The journal's directory.
    pub(crate) fn store(&self) -> Store<'_> {
        Store::new(&self.root, &self.state_dir)
    }

    /// The programs on the node.
    pub(crate) fn stage(&self) -> Stage<'_> {
        Stage::new(&self.root, &self.install_dir)
    }

    /// Containerd's socket, as this process sees it.
    fn socket(&self) -> Result<PathBuf> {
        self.root
            .outside(&self.socket)
            .with_context(|| format!("look for containerd's socket {}", self.socket.display()))
    }

    /// How containerd is.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) fn status(&self) -> Result<cri::Status> {
        let socket = self.socket()?;
        cri::status(&socket).with_context(|| format!("ask containerd at {}", self.socket.display()))
    }

    /// How containerd is, once it answers.
    ///
    /// # Errors
    /// When it does not in time.
    pub(crate) fn answer(&self) -> Result<cri::Status> {
        let end = Instant::now() + self.timeout;
        loop {
            match self.status() {
                Err(e) if Instant::now() > end => {
                    return Err(e.context(format!("containerd does not answer within {} s", self.timeout.as_secs())));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
                done => return done,
            }
        }
    }

    /// The pods of our handler.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub(crate) fn pods(&self) -> Result<cri::Pods> {
        let socket = self.socket()?;
        cri::pods(&socket, &self.handler)
            .with_context(|| format!("ask containerd at {} for its pods", self.socket.display()))
    }

    /// Waits until containerd is ready for pods, and serves our handler or does not, and those that it served before.
    ///
    /// # Errors
    /// With what is missing, when the time is over.
    pub(crate) fn verify(&self, served: bool, others: &[String]) -> Result<()> {
        let end = Instant::now() + self.timeout;
        loop {
            let problem = match self.status() {
                Err(e) => format!("{e:#}"),
                Ok(status) => {
                    let gone = others.iter().find(|name| **name != self.handler && !status.handlers.contains(name));
                    match (&status.unready, gone) {
                        (Some(why), _) => format!("containerd is not ready for pods: {why}"),
                        (None, Some(name)) => format!("containerd does not serve the handler {name:?} any more"),
                        (None, None) if status.handlers.contains(&self.handler) == served => return Ok(()),
                        (None, None) if served => format!("containerd does not serve the handler {:?}", self.handler),
                        (None, None) => format!("containerd serves the handler {:?} still", self.handler),
                    }
                }
            };
            if Instant::now() > end {
                bail!("after {} s: {problem}", self.timeout.as_secs());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Restarts containerd, and notes why.
    ///
    /// # Errors
    /// When it does not come up.
    pub(crate) fn restart(&self, journal: &mut Journal, why: &str) -> Result<()> {
        *journal.restarts.entry(why.to_owned()).or_default() += 1;
        self.store().save(journal)?;
        log::info!("restarting containerd ({why})");
        let unit = self.host.unit(&self.units)?;
        self.host.restart(unit.as_deref())
    }

    /// Sets the labels, if there is a cluster.
    ///
    /// # Errors
    /// When the API does not do it.
    pub(crate) fn label(&self, labels: &[(&str, Option<&str>)]) -> Result<()> {
        self.cluster.as_ref().map_or(Ok(()), |cluster| cluster.label(labels))
    }

    /// Whether containerd is ready for pods and serves our handler or does not, as it is now.
    pub(crate) fn is_served(&self, served: bool) -> bool {
        self.status().is_ok_and(|it| it.unready.is_none() && it.handlers.contains(&self.handler) == served)
    }

    /// Fails if nobody knows how containerd is restarted.
    ///
    /// # Errors
    /// When systemd knows no unit of it, or does not answer.
    pub(crate) fn check_restart(&self) -> Result<()> {
        self.host.unit(&self.units).map(drop).context("nothing was changed")
    }

    /// Puts a file of containerd's into its place, or takes it away, if it is what was expected still: others write there,
    /// too. Tells whether it was.
    ///
    /// # Errors
    /// When that is not possible; it is as it was then.
    pub(crate) fn put(&self, path: &Path, bytes: Option<&[u8]>, expected: Option<&[u8]>) -> Result<bool> {
        let is_expected = || Ok(self.root.read(path)?.as_deref() == expected);
        if !is_expected().with_context(|| format!("read {}", path.display()))? {
            return Ok(false);
        }
        match bytes {
            // Looked at again when all but the renaming is done.
            Some(bytes) => {
                let like = self.root.metadata(path).with_context(|| format!("look at {}", path.display()))?;
                self.root
                    .write_if(path, bytes, 0o644, like.as_ref(), is_expected)
                    .with_context(|| format!("write {}", path.display()))
            }
            None => self.root.remove(path).with_context(|| format!("remove {}", path.display())).map(|()| true),
        }
    }
}
