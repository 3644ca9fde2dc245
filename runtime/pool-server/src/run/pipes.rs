//! Pipes: between the commands of a request, and from a command to the server.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use super::Bounds;
use crate::model::{Outcome, Request};

/// How much is copied at once, in bytes.
const CHUNK: usize = 64 << 10;

/// The ends of a request's pipes, by command and descriptor, and those that stand between.
#[derive(Default)]
pub(super) struct Pipes {
    pub(super) ends: HashMap<usize, BTreeMap<usize, OwnedFd>>,
    pub(super) proxies: Vec<Proxy>,
}

/// One who copies from one pipe to the next.
pub(super) struct Proxy {
    /// To whose result it belongs.
    index: usize,
    name: String,
    copied: Collected,
}

/// What is read from a pipe by a thread of its own.
#[derive(Debug)]
pub(super) struct Collected(JoinHandle<(Vec<u8>, bool)>);

impl Collected {
    /// Waits for its end. Returns what was read, and whether there was more.
    pub(super) fn finish(self) -> (Vec<u8>, bool) {
        self.0.join().unwrap_or_default()
    }
}

/// A pipe of which the server reads so much. More is read and thrown away, so that nobody waits for ever.
pub(super) fn collect(max: u64) -> io::Result<(OwnedFd, Collected)> {
    let (reader, writer) = io::pipe()?;
    Ok((writer.into(), copy(OwnedFd::from(reader).into(), None, max)?))
}

fn copy(mut from: File, mut to: Option<File>, max: u64) -> io::Result<Collected> {
    let thread = std::thread::Builder::new().name("pool-pipe".into()).spawn(move || {
        let (mut kept, mut more) = (Vec::new(), false);
        let mut chunk = vec![0; CHUNK];
        loop {
            let length = match from.read(&mut chunk) {
                Ok(0) => break,
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let room = max.saturating_sub(kept.len() as u64).min(length as u64) as usize;
            kept.extend_from_slice(&chunk[..room]);
            more |= room < length;
            // Who does not read any more is not written to any more; who writes is read to his end.
            if to.as_mut().is_some_and(|to| to.write_all(&chunk[..length]).is_err()) {
                to = None;
            }
        }
        (kept, more)
    })?;
    Ok(Collected(thread))
}

/// Makes those of a request that was checked.
pub(super) fn make(request: &Request, bounds: &Bounds) -> io::Result<Pipes> {
    let mut pipes = Pipes::default();
    for map in &request.pipe_mapping {
        let (reader, writer) = io::pipe()?;
        let (mut to, from): (OwnedFd, OwnedFd) = (reader.into(), writer.into());
        if map.proxy {
            let (reader, writer) = io::pipe()?;
            let between = std::mem::replace(&mut to, reader.into());
            let copied = copy(between.into(), Some(OwnedFd::from(writer).into()), bounds.collected(map.max))?;
            pipes.proxies.push(Proxy { index: map.from.index, name: map.name.clone(), copied });
        }
        pipes.ends.entry(map.from.index).or_default().insert(map.from.fd, from);
        pipes.ends.entry(map.to.index).or_default().insert(map.to.fd, to);
    }
    Ok(pipes)
}

/// Adds what went through those between, to the results of those who wrote it.
pub(super) fn tell(proxies: Vec<Proxy>, mut outcomes: Vec<Outcome>) -> Vec<Outcome> {
    for proxy in proxies {
        let (bytes, _) = proxy.copied.finish();
        if let (Some(outcome), false) = (outcomes.get_mut(proxy.index), proxy.name.is_empty()) {
            outcome.files.insert(proxy.name, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
    outcomes
}
