//! What the server is told: flags, then variables, then defaults.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use runx_pool::{Bind, Filter, Settings, Template, Tier};

use crate::run::Bounds;

/// The port that go-judge's clients go by.
const ADDRESS: &str = "127.0.0.1:5050";

/// See the module.
#[derive(Debug)]
pub(crate) struct Config {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// What each request must have, but for those that ask for the version.
    pub(crate) token: Option<String>,
    /// Who comes from elsewhere is served although there is no token.
    pub(crate) open: bool,
    /// What sandboxes are like.
    pub(crate) template: Template,
    /// How the pool is run.
    pub(crate) settings: Settings,
    /// What holds where a request says nothing.
    pub(crate) bounds: Bounds,
    /// How many commands run at once.
    pub(crate) parallelism: usize,
    /// How many requests may wait.
    pub(crate) queue: usize,
    /// Where files are kept.
    pub(crate) directories: Vec<PathBuf>,
    /// How large all kept files are together at most, in bytes.
    pub(crate) file_limit: u64,
    /// How long one that nobody asks for is kept.
    pub(crate) file_timeout: Option<Duration>,
    /// The largest request, in bytes.
    pub(crate) body_limit: usize,
    /// Where the metrics are written, too.
    pub(crate) metrics_file: Option<PathBuf>,
}

/// One flag: its name, the variable for it, what it takes, what it is.
type Flag = (&'static str, Option<&'static str>, &'static str, &'static str);

const FLAGS: &[Flag] = &[
    ("address", None, "IP:PORT", "listen there (127.0.0.1:5050; port 0: any)"),
    ("auth-token", Some("RUNX_POOL_TOKEN"), "TOKEN", "what each request must have as Authorization: Bearer"),
    ("auth-token-file", None, "FILE", "a file that holds it"),
    ("insecure", None, "", "listen on other addresses than the loopback although there is no token"),
    ("rootfs", None, "DIRECTORY", "the root of sandboxes, read-only (the host's programs and libraries)"),
    ("bind", None, "SOURCE[:TARGET]", "show this of the host, read-only; may be given more than once"),
    ("tier", None, "TIER", "what is thrown away between requests: complete, wipe or none (complete)"),
    ("filter", None, "FILTER", "what happens to dangerous system calls: deny, kill or off (deny)"),
    ("pool-size", None, "NUMBER", "how many sandboxes are kept ready (4)"),
    ("parallelism", None, "NUMBER", "how many commands run at once (the number of processors)"),
    ("queue", None, "NUMBER", "how many requests may wait (512)"),
    ("default-cpu-limit", None, "DURATION", "processor time where a request says nothing (10s)"),
    ("memory-limit", None, "BYTES", "memory where a request says nothing (536870912)"),
    ("output-limit", None, "BYTES", "the largest file that a command writes (268435456)"),
    ("copy-out-limit", None, "BYTES", "the largest file that is copied out (268435456)"),
    ("answer-limit", None, "BYTES", "the largest answer of a command, as JSON (67108864)"),
    ("open-file-limit", None, "NUMBER", "descriptors of each process (256)"),
    ("src-prefix", None, "DIRECTORY", "let requests read files below it; may be given more than once (none)"),
    ("dir", None, "DIRECTORY", "keep files in a new directory there (/dev/shm, or the directory for temporary files)"),
    ("file-limit", None, "BYTES", "how large all kept files are together at most (1073741824)"),
    ("file-timeout", None, "DURATION", "how long a file is kept that nobody asks for; 0: for ever (1h)"),
    ("max-body-size", None, "BYTES", "the largest request (67108864)"),
    (
        "metrics-file",
        None,
        "FILE",
        "write the metrics there, too: a node's are read from /var/lib/runx/pools/NAME.prom",
    ),
];

/// What was asked for.
#[derive(Debug)]
pub(crate) enum Asked {
    /// To serve.
    Serve(Box<Config>),
    /// A text.
    Print(String),
}

#[derive(Default)]
struct Given(HashMap<&'static str, Vec<String>>);

impl Given {
    fn metrics_file(&self) -> Result<Option<PathBuf>, String> {
        let Some(text) = self.0.get("metrics-file").and_then(|values| values.last()) else { return Ok(None) };
        let path = PathBuf::from(text);
        match (path.is_absolute(), path.extension().is_some_and(|extension| extension == "prom")) {
            (true, true) => Ok(Some(path)),
            _ => Err(format!("--metrics-file {text}: it is an absolute path that ends with .prom")),
        }
    }

    fn all(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.all(name).last().map(String::as_str).filter(|value| !value.is_empty())
    }

    fn number<T: std::str::FromStr>(&self, name: &str, usual: T) -> Result<T, String> {
        self.get(name)
            .map_or(Ok(usual), |text| text.parse().map_err(|_| format!("--{name}: {text:?} is not a number that fits")))
    }

    fn duration(&self, name: &str, usual: Duration) -> Result<Duration, String> {
        match self.get(name) {
            None => Ok(usual),
            Some("0") => Ok(Duration::ZERO),
            Some(text) => humantime::parse_duration(text)
                .map_err(|_| format!("--{name}: {text:?} is not a duration such as 500ms, 2s or 1h")),
        }
    }
}

impl Config {
    /// Reads arguments and variables.
    ///
    /// # Errors
    /// What is wrong with them. A token is in none of the texts.
    pub(crate) fn parse(
        arguments: impl Iterator<Item = String>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Asked, String> {
        let mut given = Given::default();
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "-h" | "--help" => return Ok(Asked::Print(usage())),
                "-V" | "--version" => {
                    return Ok(Asked::Print(format!("runx-pool-server version {}\n", env!("CARGO_PKG_VERSION"))));
                }
                _ => {}
            }
            let Some(word) = argument.strip_prefix("--").filter(|word| !word.is_empty()) else {
                return Err("arguments are flags only: see --help".into());
            };
            let (name, value) =
                word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value.to_owned())));
            let Some((name, _, takes, _)) = FLAGS.iter().find(|flag| flag.0 == name) else {
                return Err(format!("unknown flag --{name}: see --help"));
            };
            let value = match (takes.is_empty(), value) {
                (true, None) => "true".to_owned(),
                (_, Some(value)) => value,
                (false, None) => arguments.next().ok_or_else(|| format!("--{name} needs a value"))?,
            };
            given.0.entry(name).or_default().push(value);
        }
        for (name, from, _, _) in FLAGS {
            if let Some(value) = from.and_then(&variable).filter(|value| !value.is_empty()) {
                given.0.entry(name).or_insert_with(|| vec![value]);
            }
        }
        Self::of(&given).map(|config| Asked::Serve(Box::new(config)))
    }

    fn of(given: &Given) -> Result<Self, String> {
        let token = match (given.get("auth-token"), given.get("auth-token-file")) {
            (Some(token), _) => Some(token.to_owned()),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path).map_err(|e| format!("--auth-token-file: read {path}: {e}"))?;
                // An empty file is a mistake, and must not open the server to everybody.
                Some(text.trim().to_owned())
                    .filter(|token| !token.is_empty())
                    .map(Some)
                    .ok_or_else(|| format!("--auth-token-file: {path} is empty"))?
            }
            (None, None) => None,
        };
        let text = given.get("address").unwrap_or(ADDRESS);
        let address: SocketAddr = text.parse().map_err(|_| format!("--address: {text:?} is not IP:PORT"))?;
        let insecure = matches!(given.get("insecure"), Some("true" | "1"));
        if token.is_none() && !insecure && !address.ip().is_loopback() {
            return Err(format!(
                "--address {address}: without a token whoever reaches it runs programs; give --auth-token-file, or --insecure if \
                 that is meant"
            ));
        }
        let parallelism: usize =
            given.number("parallelism", std::thread::available_parallelism().map_or(1, usize::from))?;
        let size: usize = given.number("pool-size", 4)?;
        if parallelism == 0 {
            return Err("--parallelism: nothing would ever run".into());
        }
        let queue: usize = given.number("queue", 512)?;
        let settings = Settings { size, burst: parallelism.max(1), queue: queue + parallelism, ..Settings::default() };
        let file_timeout = given.duration("file-timeout", Duration::from_secs(3600))?;
        Ok(Self {
            address,
            open: insecure,
            token,
            template: template(given)?,
            settings,
            bounds: Bounds {
                cpu: given.duration("default-cpu-limit", Duration::from_secs(10))?,
                copy_out: given.number("copy-out-limit", 256 << 20)?,
                answer: given.number("answer-limit", 64 << 20)?,
                output: given.number("output-limit", 256 << 20)?,
                open_files: given.number("open-file-limit", 256)?,
                sources: sources(given)?,
            },
            parallelism,
            queue,
            directories: match given.get("dir") {
                Some(directory) => vec![directory.into()],
                None => vec!["/dev/shm".into(), std::env::temp_dir()],
            },
            file_limit: given.number("file-limit", 1 << 30)?,
            file_timeout: (!file_timeout.is_zero()).then_some(file_timeout),
            body_limit: given.number("max-body-size", 64 << 20)?,
            metrics_file: given.metrics_file()?,
        })
    }
}

fn sources(given: &Given) -> Result<Vec<PathBuf>, String> {
    let all = given.all("src-prefix").iter().map(PathBuf::from);
    all.map(|path| {
        if path.is_absolute() { Ok(path) } else { Err(format!("--src-prefix: {} is not absolute", path.display())) }
    })
    .collect()
}

fn template(given: &Given) -> Result<Template, String> {
    let mut template = match given.get("rootfs") {
        Some(rootfs) => Template::directory(std::path::absolute(rootfs).map_err(|e| format!("--rootfs: {e}"))?),
        None => Template::host(),
    };
    for bind in given.all("bind") {
        let (source, target) = bind.split_once(':').unwrap_or((bind, bind));
        template.binds.push(Bind { source: source.into(), target: target.into(), writable: false });
    }
    template.tier = match given.get("tier") {
        None | Some("complete") => Tier::Complete,
        Some("wipe") => Tier::Wipe,
        Some("none") => Tier::None,
        Some(other) => return Err(format!("--tier: {other:?} is none of complete, wipe and none")),
    };
    template.filter = match given.get("filter") {
        None | Some("deny") => Filter::Deny,
        Some("kill") => Filter::Kill,
        Some("off") => Filter::Off,
        Some(other) => return Err(format!("--filter: {other:?} is none of deny, kill and off")),
    };
    template.memory = Some(given.number("memory-limit", 512 << 20)?);
    template.check().map_err(|e| e.to_string())?;
    Ok(template)
}

fn usage() -> String {
    let mut out = String::from(
        "runx-pool-server: programs in warm sandboxes over HTTP, for go-judge's clients\n\nusage: runx pool serve [--FLAG VALUE]...\n\n\
         flags:\n",
    );
    for (name, from, takes, text) in FLAGS {
        let from = from.map(|from| format!(" [{from}]")).unwrap_or_default();
        out.push_str(&format!("  {:34} {text}{from}\n", format!("--{name} {takes}")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Config, String> {
        match Config::parse(arguments.iter().map(|word| (*word).to_owned()), |_| None)? {
            Asked::Serve(config) => Ok(*config),
            Asked::Print(text) => Err(text),
        }
    }

    #[test]
    fn without_a_token_it_is_closed() {
        assert!(parse(&[]).unwrap().address.ip().is_loopback());
        assert!(parse(&["--address", "0.0.0.0:1"]).unwrap_err().contains("--insecure"));
        assert!(parse(&["--address", "0.0.0.0:1", "--insecure"]).is_ok());
        assert_eq!(parse(&["--address", "0.0.0.0:1", "--auth-token", "t"]).unwrap().token.as_deref(), Some("t"));
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(parse(&["--auth-token-file", &empty.path().to_string_lossy()]).unwrap_err().contains("is empty"));
    }

    #[test]
    fn mistakes_are_named() {
        for (words, part) in [
            (&["--tier", "half"][..], "half"),
            (&["--filter", "some"], "some"),
            (&["--pool-size", "many"], "--pool-size"),
            (&["--nope"], "--nope"),
            (&["serve"], "flags only"),
            (&["--src-prefix", "relative"], "relative"),
            (&["--file-timeout", "soon"], "soon"),
            (&["--parallelism", "0"], "--parallelism"),
            (&["--metrics-file", "pool.prom"], "absolute path"),
            (&["--metrics-file", "/run/pool.txt"], "ends with .prom"),
        ] {
            let error = parse(words).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
