//! What the commands of `runx storage` are told.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use runx_core::container::validate_id;

use super::scan::{Flag, Order, Words, option, switch};
use super::tables::{ANY, FORMAT, NONE, QUIET, Syntax, command};
use super::{ListFormat, bytes, list_format, text};

/// `runx storage …`.
#[derive(Debug)]
pub(crate) enum Storage {
    Pull { image: String, container: Option<String>, quiet: bool, flags: Vec<OsString> },
    Import { flags: Vec<OsString> },
    Export { flags: Vec<OsString> },
    Ls(Images),
    Inspect { images: Vec<String> },
    Tag { image: String, names: Vec<String> },
    Rm { images: Vec<String>, force: bool },
    Prune { all: bool, force: bool, filters: Vec<ImageFilter> },
    Df { format: ListFormat },
    Mount(ImageMount),
    Umount { target: PathBuf },
    Cleanup { container: String },
}

/// `runx storage ls`.
#[derive(Debug)]
pub(crate) struct Images {
    pub(crate) format: ListFormat,
    pub(crate) quiet: bool,
    pub(crate) digests: bool,
    pub(crate) whole_ids: bool,
    pub(crate) filters: Vec<ImageFilter>,
}

/// `runx storage mount`.
#[derive(Debug)]
pub(crate) struct ImageMount {
    pub(crate) source: String,
    pub(crate) target: Option<PathBuf>,
    pub(crate) kind: Option<String>,
    pub(crate) options: Vec<String>,
}

/// Which images are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ImageFilter {
    /// With or without a name.
    Dangling(bool),
    /// With a name like this, in which `*` stands for anything.
    Reference(String),
    /// With this label, and this value if there is one.
    Label(String, Option<String>),
    /// For this platform.
    Platform(String),
}

const PULL: &[Flag] = &[
    option("image", Some('i'), "NAME", "the same as the first word"),
    option("container-id", None, "ID", "make and mount a root filesystem for this container, and print its path"),
    option("platform", None, "OS/ARCH", "what it is for, if that is not this machine"),
    option("authfile", None, "FILE", "file with credentials, instead of those that docker and podman write"),
    option("ca-file", None, "FILE", "certificates of authorities beyond the machine's; may be given more than once"),
    option("cert-dir", None, "DIR", "directory with certificates of registries (default: docker's and podman's)"),
    option("tls-verify", None, "BOOL", "whether certificates are checked (default true); if not, HTTP will do, too"),
    switch("plain-http", None, "speak without TLS"),
    option("parallel", None, "N", "layers that are downloaded at the same time (default 4)"),
    option(
        "max-layer-size",
        None,
        "BYTES",
        "what a layer may be when it is decompressed (default: 200 times its length)",
    ),
    switch("quiet", Some('q'), "say nothing meanwhile"),
];

const IMPORT: &[Flag] = &[
    option("name", None, "NAME", "the image's name, instead of what the source says"),
    option("format", None, "FORMAT", "oci, docker or rootfs, if the source is not what it looks like"),
    option("platform", None, "OS/ARCH", "what it is for, if that is not this machine"),
    option("change", Some('c'), "INSTRUCTION", "for a root filesystem: CMD, ENTRYPOINT, ENV …, as in a Dockerfile"),
    option(
        "max-layer-size",
        None,
        "BYTES",
        "what a layer may be when it is decompressed (default: 200 times its length)",
    ),
    switch("quiet", Some('q'), "say nothing meanwhile"),
];

const EXPORT: &[Flag] = &[
    option("output", Some('o'), "FILE", "where to (default: the last word, or standard output if there is one word)"),
    option("format", None, "FORMAT", "oci-archive (default) or oci-dir"),
];

const FILTER: &[Flag] = &[option(
    "filter",
    None,
    "KEY=VALUE",
    "only some: dangling=BOOL, reference=PATTERN, label=NAME[=VALUE], platform=OS/ARCH; all that are given must hold",
)];

const LS: &[Flag] = &[switch("digests", None, "show digests"), switch("no-trunc", None, "show ids as a whole")];

const RM: &[Flag] = &[switch("force", Some('f'), "although it has several names, or containers were made of it")];

const PRUNE: &[Flag] = &[
    switch("all", Some('a'), "all that no container was made of, and not only those without a name"),
    switch("force", Some('f'), "do not ask"),
];

const MOUNT: &[Flag] = &[
    option("source", None, "SOURCE", "an image, a directory, or what a filesystem of --type is mounted from"),
    option("target", None, "DIR", "where to; an image without one is mounted below the storage root"),
    option("type", Some('t'), "TYPE", "type of the filesystem: overlay, tmpfs, …"),
    option(
        "options",
        Some('o'),
        "OPTIONS",
        "as for mount(8), with commas; an image is read-only unless rw is among them",
    ),
];

const TARGET: &[Flag] = &[option("target", None, "DIR", "the same as the first word")];

const CONTAINER: &[Flag] = &[option("container-id", None, "ID", "the same as the first word")];

/// All of them.
#[rustfmt::skip]
pub(super) const COMMANDS: &[Syntax] = &[
    command("storage pull", "IMAGE", "fetch an image from a registry, and print its id",
        &[PULL], Order::Anywhere, (0, 1)),
    command("storage import", "SOURCE [NAME]", "import from an OCI layout, an archive of OCI or docker, a root filesystem, or a module",
        &[IMPORT], Order::Anywhere, (1, 2)),
    command("storage export", "IMAGE… [FILE]", "write images as they came, as an OCI archive or layout",
        &[EXPORT], Order::Anywhere, (1, ANY)),
    command("storage ls", "[NAME]", "list images",
        &[LS, FILTER, FORMAT, QUIET], Order::Anywhere, (0, 1)),
    command("storage inspect", "IMAGE…", "print all that is known of images", NONE, Order::Anywhere, (1, ANY)),
    command("storage tag", "IMAGE NAME…", "give an image more names", NONE, Order::Anywhere, (2, ANY)),
    command("storage rm", "IMAGE…", "remove names, and images with their last one", &[RM], Order::Anywhere, (1, ANY)),
    command("storage prune", "", "remove images that nobody needs", &[PRUNE, FILTER], Order::Anywhere, (0, 0)),
    command("storage df", "", "show what images take on the disk", &[FORMAT], Order::Anywhere, (0, 0)),
    command("storage mount", "[SOURCE [TARGET]]", "mount an image, a directory or a filesystem",
        &[MOUNT], Order::Anywhere, (0, 2)),
    command("storage umount", "[TARGET]", "take a mount away", &[TARGET], Order::Anywhere, (0, 1)),
    command("storage cleanup", "[CONTAINER]", "remove the root filesystem that storage pull --container-id made",
        &[CONTAINER], Order::Anywhere, (0, 1)),
];

/// The command `name`, of which `first` is the first word and `rest` what follows.
pub(super) fn build(
    name: &str,
    first: String,
    rest: impl Iterator<Item = OsString>,
    words: &mut Words,
) -> Result<Storage> {
    let mut rest = rest.map(text);
    let given = Some(first.clone()).filter(|word| !word.is_empty());
    let one = |flag: &str, words: &Words| -> Result<Option<String>> {
        match (given.clone(), words.text(flag)?) {
            (Some(_), Some(_)) => bail!("--{flag} and a word say the same: one of them is enough"),
            (word, value) => Ok(word.or(value.map(str::to_owned))),
        }
    };
    let filters = |words: &Words| words.texts("filter")?.iter().map(|text| filter(text)).collect::<Result<Vec<_>>>();
    Ok(match name {
        "storage pull" => {
            let container = words.text("container-id")?.map(str::to_owned);
            container.as_deref().map(validate_id).transpose()?;
            Storage::Pull {
                image: one("image", words)?.context("it needs the name of an image")?,
                container,
                quiet: words.on("quiet"),
                flags: handed_on(words, PULL, &["image", "container-id"])?,
            }
        }
        "storage import" => {
            let mut flags = handed_on(words, IMPORT, &[])?;
            if let Some(name) = rest.next().transpose()? {
                if words.given("name") {
                    bail!("--name and a word say the same: one of them is enough");
                }
                flags.push(format!("--name={name}").into());
            }
            flags.extend(["--".into(), first.into()]);
            Storage::Import { flags }
        }
        "storage export" => {
            let mut flags = handed_on(words, EXPORT, &[])?;
            let mut names = all(first, rest)?;
            // As for cp, the last word is where to, unless a flag or nothing says so.
            if !words.given("output")
                && names.len() > 1
                && let Some(to) = names.pop()
            {
                flags.push(format!("--output={to}").into());
            }
            flags.push("--".into());
            flags.extend(names.into_iter().map(OsString::from));
            Storage::Export { flags }
        }
        "storage ls" => {
            let mut filters = filters(words)?;
            filters.extend(given.map(ImageFilter::Reference));
            Storage::Ls(Images {
                format: list_format(words)?,
                quiet: words.on("quiet"),
                digests: words.on("digests"),
                whole_ids: words.on("no-trunc"),
                filters,
            })
        }
        "storage inspect" => Storage::Inspect { images: all(first, rest)? },
        "storage tag" => Storage::Tag { image: first, names: rest.collect::<Result<_>>()? },
        "storage rm" => Storage::Rm { images: all(first, rest)?, force: words.on("force") },
        "storage prune" => Storage::Prune { all: words.on("all"), force: words.on("force"), filters: filters(words)? },
        "storage df" => Storage::Df { format: list_format(words)? },
        "storage mount" => {
            let second = rest.next().transpose()?;
            let target = match (second, words.path("target")) {
                (Some(_), Some(_)) => bail!("--target and a word say the same: one of them is enough"),
                (word, flag) => word.map(PathBuf::from).or(flag),
            };
            let kind = words.text("type")?.map(str::to_owned);
            let source = one("source", words)?.or(kind.clone());
            let options = words.texts("options")?;
            Storage::Mount(ImageMount {
                source: source.context("it needs a source: an image, a directory, or --type")?,
                target,
                kind,
                options: options.iter().flat_map(|list| list.split(',')).map(str::to_owned).collect(),
            })
        }
        "storage umount" => {
            Storage::Umount { target: one("target", words)?.context("it needs the place of a mount")?.into() }
        }
        "storage cleanup" => {
            let container = one("container-id", words)?.context("it needs the id of a container")?;
            validate_id(&container)?;
            Storage::Cleanup { container }
        }
        other => bail!("command {other:?} has no meaning"),
    })
}

fn all(first: String, rest: impl Iterator<Item = Result<String>>) -> Result<Vec<String>> {
    std::iter::once(Ok(first)).chain(rest).collect()
}

/// The flags as the program that does the work takes them: those of this table, but for some.
fn handed_on(words: &Words, table: &'static [Flag], own: &[&str]) -> Result<Vec<OsString>> {
    let mut flags = Vec::new();
    for flag in table.iter().filter(|flag| !own.contains(&flag.long)) {
        match flag.value {
            None if words.on(flag.long) => flags.push(format!("--{}", flag.long).into()),
            None => {}
            Some(_) => {
                for value in words.values(flag.long) {
                    let mut word = OsString::from(format!("--{}=", flag.long));
                    if flag.long == "max-layer-size" {
                        let size = bytes(value.to_str().unwrap_or_default())?;
                        word.push(size.to_string());
                    } else {
                        word.push(value);
                    }
                    flags.push(word);
                }
            }
        }
    }
    Ok(flags)
}

fn filter(text: &str) -> Result<ImageFilter> {
    let (key, value) = text.split_once('=').with_context(|| format!("invalid --filter {text:?}: it is KEY=VALUE"))?;
    Ok(match key {
        "dangling" => ImageFilter::Dangling(match value {
            "true" | "1" => true,
            "false" | "0" => false,
            _ => bail!("invalid --filter {text:?}: it is true or false"),
        }),
        "reference" => ImageFilter::Reference(value.to_owned()),
        "label" => match value.split_once('=') {
            Some((name, value)) => ImageFilter::Label(name.to_owned(), Some(value.to_owned())),
            None => ImageFilter::Label(value.to_owned(), None),
        },
        "platform" => ImageFilter::Platform(value.to_owned()),
        _ => bail!("invalid --filter {text:?}: it is dangling, reference, label or platform"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Storage> {
        let words = line.split_ascii_whitespace().map(OsString::from);
        match super::super::parse(words).1? {
            super::super::Command::Storage(storage) => Ok(*storage),
            other => bail!("{other:?}"),
        }
    }

    #[test]
    fn both_forms_mean_the_same() {
        for line in [
            "storage pull busybox --container-id c1 --ca-file a --ca-file b",
            "storage pull --image busybox --container-id=c1 --ca-file a --ca-file b",
            "storage pull -i busybox --container-id c1 --ca-file=a --ca-file=b",
        ] {
            let Storage::Pull { image, container, flags, .. } = parse(line).unwrap() else { panic!("{line}") };
            assert_eq!((image.as_str(), container.as_deref()), ("busybox", Some("c1")));
            assert_eq!(flags, ["--ca-file=a", "--ca-file=b"]);
        }
        for line in ["storage mount s /t -o ro,nosuid", "storage mount --source s --target /t --options ro,nosuid"] {
            let Storage::Mount(mount) = parse(line).unwrap() else { panic!("{line}") };
            assert_eq!((mount.source.as_str(), mount.target), ("s", Some("/t".into())));
            assert_eq!(mount.options, ["ro", "nosuid"]);
        }
        for line in ["storage export a b /f", "storage export -o /f a b", "storage export a --output=/f b"] {
            let Storage::Export { flags } = parse(line).unwrap() else { panic!("{line}") };
            assert_eq!(flags, ["--output=/f", "--", "a", "b"], "{line}");
        }
        for line in ["storage import dir name", "storage import --name name dir"] {
            let Storage::Import { flags } = parse(line).unwrap() else { panic!("{line}") };
            assert_eq!(flags, ["--name=name", "--", "dir"], "{line}");
        }
        assert!(matches!(parse("storage umount --target /t"), Ok(Storage::Umount { target }) if target == *"/t"));
        assert!(
            matches!(parse("storage cleanup --container-id c"), Ok(Storage::Cleanup { container }) if container == "c")
        );
    }

    #[test]
    fn what_is_missing_or_said_twice_is_refused() {
        for line in [
            "storage pull",
            "storage pull a --image b",
            "storage pull a --container-id ../x",
            "storage cleanup",
            "storage cleanup ../x",
            "storage umount",
            "storage mount",
            "storage mount a /b --target /c",
            "storage import a b --name c",
            "storage prune x",
            "storage ls --filter x",
            "storage ls --filter x=y",
            "storage ls --filter dangling=maybe",
            "storage ls --format yaml",
            "storage nothing",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
