//! Which Kubernetes a node belongs to, and so where its containerd keeps what.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::root::Root;

/// What was found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Distribution {
    /// Its name: `kubeadm` stands for all that have containerd as a service of its own.
    pub(crate) name: &'static str,
    /// containerd's main file.
    pub(crate) main: PathBuf,
    /// Whether somebody else writes the main file anew, so that it is not to be changed.
    pub(crate) generated: bool,
    /// Directories of drop-ins that the distribution's own start imports, by the main file's version. Others are found in
    /// the main file's `imports`.
    pub(crate) drop_ins: Option<PathBuf>,
    /// Where containerd's program may be, the likeliest first.
    pub(crate) programs: Vec<PathBuf>,
    /// containerd's socket.
    pub(crate) socket: PathBuf,
    /// The units that may run containerd, the likeliest first; none if it reads its files anew by itself.
    pub(crate) units: Vec<&'static str>,
    /// Where programs are kept, if they may be anywhere by default.
    pub(crate) install: Option<PathBuf>,
}

/// Why a node is not touched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// A distribution where nothing can be installed this way.
    #[error("this node runs {name}, which runx-node does not install on: {why}")]
    Known {
        /// The distribution.
        name: &'static str,
        /// The reason, and what to do.
        why: &'static str,
    },
    /// Nothing is recognized.
    #[error(
        "this node is not recognized: there is no /etc/containerd, no containerd in /usr/bin or /usr/local/bin, and nothing \
         of k3s, rke2 or k0s (os-release says {os:?}). Say what it is with --distribution"
    )]
    Unknown {
        /// What the node's os-release has as ID.
        os: String,
    },
    /// More than one is there.
    #[error("this node has both {0} and {1}: say which of them Kubernetes uses with --distribution")]
    Two(&'static str, &'static str),
    /// What was said is not there.
    #[error("--distribution {said} needs {missing}, which this node does not have{instead}")]
    Absent {
        /// What was said.
        said: &'static str,
        /// What is not there.
        missing: PathBuf,
        /// What was recognized instead.
        instead: String,
    },
    /// Something else than containerd runs the containers of pods.
    #[error("the kubelet of this node has its containers run by {0}, and runx-node installs on containerd")]
    Runtime(String),
    /// It was recognized, or said, that containerd is another one than the kubelet uses.
    #[error(
        "the containerd that the kubelet of this node uses is {runtime}, that of k3s or rke2, and not the one of {chosen}: say \
         which of the two it is with --distribution (the chart's installer.distribution)"
    )]
    Embedded {
        /// What the kubelet says.
        runtime: String,
        /// What was recognized or said.
        chosen: &'static str,
    },
    /// A name that is none.
    #[error("--distribution {0:?} is none of {names}", names = NAMES.join(", "))]
    Name(String),
}

const CRI_O: Refusal = Refusal::Known {
    name: "CRI-O",
    why: "put `runx` as a runtime into /etc/crio/crio.conf.d by hand, with runtime_type = \"oci\"",
};

const MICROK8S: Refusal = Refusal::Known {
    name: "MicroK8s",
    why: "it makes containerd's configuration of one template, which is not ours to change",
};

/// The names that `--distribution` takes.
pub(crate) const NAMES: [&str; 5] = ["kubeadm", "kind", "k3s", "rke2", "k0s"];

fn known(name: &str) -> Option<Distribution> {
    let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect();
    let kubeadm = Distribution {
        name: "kubeadm",
        main: "/etc/containerd/config.toml".into(),
        generated: false,
        drop_ins: None,
        programs: paths(&[
            "/usr/bin/containerd",
            "/usr/local/bin/containerd",
            "/bin/containerd",
            "/opt/bin/containerd",
        ]),
        socket: "/run/containerd/containerd.sock".into(),
        units: vec!["containerd.service"],
        install: Some("/opt/runx".into()),
    };
    let rancher = |name: &'static str, units: Vec<&'static str>| {
        let base = Path::new("/var/lib/rancher").join(name);
        Distribution {
            name,
            main: base.join("agent/etc/containerd/config.toml"),
            generated: true,
            // k3s has a link to the directory that it unpacks itself to, rke2 one to the directory `bin` in it.
            programs: vec![base.join("data/current/bin/containerd"), base.join("bin/containerd")],
            socket: "/run/k3s/containerd/containerd.sock".into(),
            units,
            ..kubeadm.clone()
        }
    };
    Some(match name {
        "kubeadm" => kubeadm,
        "kind" => Distribution { name: "kind", ..kubeadm },
        "k3s" => rancher("k3s", vec!["k3s.service", "k3s-agent.service"]),
        "rke2" => rancher("rke2", vec!["rke2-server.service", "rke2-agent.service"]),
        "k0s" => Distribution {
            name: "k0s",
            main: "/etc/k0s/containerd.toml".into(),
            generated: true,
            drop_ins: Some("/etc/k0s/containerd.d".into()),
            programs: paths(&["/var/lib/k0s/bin/containerd"]),
            socket: "/run/k0s/containerd.sock".into(),
            units: Vec::new(),
            ..kubeadm
        },
        _ => return None,
    })
}

/// The ID of os-release(5).
fn os(root: &Root) -> String {
    let text = ["/etc/os-release", "/usr/lib/os-release"]
        .iter()
        .find_map(|path| root.read(Path::new(path)).ok().flatten())
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let id = text.lines().find_map(|line| line.strip_prefix("ID="));
    id.unwrap_or_default().trim().trim_matches(['"', '\'']).to_owned()
}

fn recognized(root: &Root, os: &str) -> Result<Distribution, Refusal> {
    let there = |path: &str| root.exists(Path::new(path));
    let of = |name| known(name).expect("it is one of the names");
    let mut found: Vec<&'static str> = Vec::new();
    for name in ["k3s", "rke2", "k0s"] {
        if root.exists(&of(name).main) {
            found.push(of(name).name);
        }
    }
    match found[..] {
        [] => {}
        [name] => return Ok(of(name)),
        [first, second, ..] => return Err(Refusal::Two(first, second)),
    }
    if there("/kind/version") {
        return Ok(of("kind"));
    }
    let programs = of("kubeadm").programs;
    if there("/etc/containerd") || programs.iter().any(|path| root.exists(path)) {
        return Ok(of("kubeadm"));
    }
    if there("/etc/crio") || there("/usr/bin/crio") {
        return Err(CRI_O);
    }
    Err(Refusal::Unknown { os: os.to_owned() })
}

/// Finds out what a node is. What is `said` must be true of it.
///
/// # Errors
/// When it is not known, cannot be installed on, or is not what was said.
pub(crate) fn detect(root: &Root, said: Option<&str>) -> Result<Distribution, Refusal> {
    let os = os(root);
    match os.as_str() {
        "bottlerocket" => {
            return Err(Refusal::Known {
                name: "Bottlerocket",
                why: "its file systems are read-only and containerd's configuration comes from its settings API",
            });
        }
        "talos" => {
            return Err(Refusal::Known {
                name: "Talos",
                why: "its file systems are read-only; a system extension and /etc/cri/conf.d/20-customization.part in the \
                      machine configuration are what it has for that",
            });
        }
        _ => {}
    }
    if root.exists(Path::new("/var/snap/microk8s")) && said.is_none() {
        return Err(MICROK8S);
    }
    let mut chosen = match said {
        None => recognized(root, &os)?,
        Some(name) => {
            let chosen = known(name).ok_or_else(|| Refusal::Name(name.to_owned()))?;
            let sign = match name {
                "kind" => Path::new("/kind/version"),
                _ if chosen.generated => &chosen.main,
                _ => Path::new("/"),
            };
            if !root.exists(sign) {
                let instead = recognized(root, &os).map_or(String::new(), |it| format!(": it looks like {}", it.name));
                return Err(Refusal::Absent { said: chosen.name, missing: sign.to_owned(), instead });
            }
            chosen
        }
    };
    if os == "cos" {
        // Nothing below / or /opt is both writable and executable there.
        chosen.install = None;
    }
    Ok(chosen)
}

/// Looks at what the cluster knows of a node that was recognized as, or said to be, `chosen`. A pod sees of its node what it
/// mounts: a containerd may be there that is not the kubelet's.
///
/// # Errors
/// When runx-node does not install there. What is not told is no reason.
pub(crate) fn check(node: &Value, chosen: Option<&'static str>) -> Result<(), Refusal> {
    if node["metadata"]["labels"].get("microk8s.io/cluster").is_some() {
        return Err(MICROK8S);
    }
    // The CRI's name and version of the runtime: containerd://2.1.4.
    let runtime = node["status"]["nodeInfo"]["containerRuntimeVersion"].as_str().unwrap_or_default();
    match (runtime.split_once("://").map_or("", |(name, _)| name), chosen) {
        ("cri-o", _) => Err(CRI_O),
        ("containerd", Some(chosen)) if runtime.contains("-k3s") && !matches!(chosen, "k3s" | "rke2") => {
            Err(Refusal::Embedded { runtime: runtime.to_owned(), chosen })
        }
        ("containerd" | "", _) => Ok(()),
        _ => Err(Refusal::Runtime(runtime.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(files: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let root = Root::open(directory.path()).unwrap();
        (directory, root)
    }

    fn name(files: &[(&str, &str)], said: Option<&str>) -> Result<&'static str, String> {
        let (_directory, root) = node(files);
        detect(&root, said).map(|found| found.name).map_err(|e| e.to_string())
    }

    const K3S: (&str, &str) = ("var/lib/rancher/k3s/agent/etc/containerd/config.toml", "");
    const RKE2: (&str, &str) = ("var/lib/rancher/rke2/agent/etc/containerd/config.toml", "");
    const PLAIN: (&str, &str) = ("etc/containerd/config.toml", "");

    #[test]
    fn nodes_are_recognized() {
        assert_eq!(name(&[PLAIN], None).unwrap(), "kubeadm");
        assert_eq!(name(&[("usr/local/bin/containerd", "")], None).unwrap(), "kubeadm");
        assert_eq!(name(&[PLAIN, ("kind/version", "v1")], None).unwrap(), "kind");
        assert_eq!(name(&[K3S], None).unwrap(), "k3s");
        assert_eq!(name(&[RKE2, PLAIN], None).unwrap(), "rke2");
        assert_eq!(name(&[("etc/k0s/containerd.toml", "")], None).unwrap(), "k0s");
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let refused = |files: &[(&str, &str)], said| name(files, said).unwrap_err();
        assert!(refused(&[PLAIN, ("etc/os-release", "ID=bottlerocket\n")], None).contains("Bottlerocket"));
        assert!(refused(&[PLAIN, ("usr/lib/os-release", "NAME=x\nID=\"talos\"\n")], None).contains("Talos"));
        assert!(refused(&[PLAIN, ("var/snap/microk8s/x", "")], None).contains("MicroK8s"));
        assert!(refused(&[("etc/crio/crio.conf", "")], None).contains("CRI-O"));
        assert!(refused(&[("etc/os-release", "ID=haiku\n")], None).contains("haiku"));
        assert!(refused(&[K3S, RKE2], None).contains("both k3s and rke2"));
        assert!(refused(&[PLAIN], Some("k3s")).contains("it looks like kubeadm"));
        assert!(refused(&[PLAIN], Some("k8s")).contains("kubeadm, kind, k3s, rke2, k0s"));
    }

    #[test]
    fn the_cluster_knows_what_is_not_to_be_seen_of_a_node() {
        let check = |runtime: &str, labels: Value, chosen| {
            let node = json!({
                "metadata": {"labels": labels}, "status": {"nodeInfo": {"containerRuntimeVersion": runtime}},
            });
            check(&node, chosen).map_err(|e| e.to_string())
        };
        let none = || json!({"kubernetes.io/os": "linux"});
        assert!(check("cri-o://1.30.0", none(), Some("kubeadm")).unwrap_err().contains("CRI-O"));
        assert!(check("cri-o://1.30.0", none(), None).unwrap_err().contains("CRI-O"));
        assert!(check("docker://27.0.1", none(), None).unwrap_err().contains("docker://27.0.1"));
        let microk8s = json!({"microk8s.io/cluster": "true"});
        assert!(check("containerd://1.6.28", microk8s, Some("kubeadm")).unwrap_err().contains("MicroK8s"));
        for chosen in ["kubeadm", "kind", "k0s"] {
            let refused = check("containerd://1.7.11-k3s2", none(), Some(chosen)).unwrap_err();
            assert!(refused.contains(chosen) && refused.contains("k3s or rke2"), "{refused}");
        }
        for fine in ["k3s", "rke2"] {
            check("containerd://2.0.5-k3s2", none(), Some(fine)).unwrap();
        }
        check("containerd://2.1.4", none(), Some("kubeadm")).unwrap();
        check("containerd://2.1.4", Value::Null, Some("k3s")).unwrap();
        super::check(&json!({}), Some("kubeadm")).unwrap();
    }

    #[test]
    fn what_is_said_decides_between_two() {
        assert_eq!(name(&[K3S, RKE2], Some("rke2")).unwrap(), "rke2");
    }

    #[test]
    fn on_cos_the_place_of_programs_has_to_be_said() {
        let (_directory, root) = node(&[PLAIN, ("etc/os-release", "ID=cos\n")]);
        assert_eq!(detect(&root, None).unwrap().install, None);
    }
}
