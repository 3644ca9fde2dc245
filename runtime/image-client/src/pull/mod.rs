//! Pulling an image: its documents, then its layers at the same time, each unpacked while it comes.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use futures_util::future::try_join_all;
use runx_image::manifest::{Descriptor, Document, Platform};
use runx_image::{Digest, Error, Image, Ingest, Store};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, spawn_blocking};

use crate::auth::{self, Login};
use crate::identity::Identity;
use crate::land::{self, Landed};
use crate::plan::{self, Ids, Plan, Stored};
use crate::progress::{Part, Progress};
use crate::reference::Wanted;
use crate::registry::{self, Closed, Fetched, Registry, Sink};
use crate::tls;
use crate::unpack::{self, Limit};

#[cfg(test)]
mod tests;

/// How many pieces of a layer may wait to be unpacked.
const WAITING: usize = 64;

/// What to pull, and how.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) name: String,
    pub(crate) default_registry: Option<String>,
    pub(crate) platform: Option<Platform>,
    pub(crate) auth_file: Option<PathBuf>,
    pub(crate) tls: tls::Options,
    /// How many layers at the same time.
    pub(crate) parallel: usize,
    /// What a layer may become when it is decompressed.
    pub(crate) limit: Limit,
}

/// Pulls an image into the store.
pub(crate) async fn pull(store: &Store, options: &Options, progress: &Progress) -> Result<Image> {
    let wanted = Wanted::parse(&options.name, options.default_registry.as_deref())?;
    let host = wanted.host().to_owned();
    let settings = tls::configure(&host, &options.tls, |text| progress.say(text)).await?;
    let login = auth::find(wanted.registry(), wanted.reference.repository(), options.auth_file.as_deref())?;
    let registry = match login {
        Login::Plain(auth) => Registry::new(registry::client(settings.client_config())?, auth, wanted),
        Login::Identity(token) => Registry::with_identity(Identity::new(token, settings)?, wanted),
    };
    progress.say(&format!("pulling {}", registry.wanted().reference));

    let (top, content, chosen) = documents(&registry, options.platform.as_ref()).await?;
    let manifest = plan::manifest(&content)?;
    let ingest = Arc::new(store.ingest()?);
    let interrupted = watch_signals(ingest.clone()).context("listen to signals")?;
    let pulled = tokio::select! {
        pulled = bring(&registry, &ingest, &content, &manifest.config, options, progress) => {
            // Threads that wait for another process would keep this one from its end, and from any signal.
            pulled.inspect_err(|_| ingest.give_up())
        }
        interrupted = interrupted => return Err(interrupted.into()),
    };
    let (plan, stored) = pulled?;
    let mut digests = vec![&chosen];
    if top != chosen {
        digests.insert(0, &top);
    }
    let image = plan.image(&stored, registry.wanted().names(&digests));
    let committing = ingest.clone();
    let image = spawn_blocking(move || committing.commit(image)).await.context("store the image")??;
    Ok(image)
}

/// The digest of what has the name, the manifest for the platform, and its digest.
async fn documents(registry: &Registry, platform: Option<&Platform>) -> Result<(Digest, Bytes, Digest)> {
    let content = registry.manifest(None).await?;
    let top = Digest::of(&content);
    check(&content, registry.wanted().reference.digest(), registry)?;
    match Document::parse(&content)? {
        Document::Manifest(_) => Ok((top.clone(), content, top)),
        Document::Index(index) => {
            let chosen = index
                .choose(platform)
                .with_context(|| format!("image {}", registry.wanted().reference))?
                .digest
                .clone();
            let content = registry.manifest(Some(&chosen)).await?;
            check(&content, Some(chosen.as_str()), registry)?;
            Ok((top, content, chosen))
        }
    }
}

fn check(content: &[u8], expected: Option<&str>, registry: &Registry) -> Result<()> {
    let found = Digest::of(content);
    match expected {
        Some(expected) if expected != found.as_str() => Err(Error::Corrupt {
            what: format!("the manifest that {} sent", registry.name()),
            expected: expected.to_owned(),
            found: found.to_string(),
        }
        .into()),
        _ => Ok(()),
    }
}

/// The user wants no more.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; what came until now is kept for the next time")]
pub(crate) struct Interrupted {
    /// The signal that said so.
    pub(crate) signal: i32,
}

/// Ends when the user wants no more. What is there is then kept. From now on signals do nothing else.
fn watch_signals(ingest: Arc<Ingest>) -> io::Result<impl Future<Output = Interrupted>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        let signal = tokio::select! {
            _ = interrupt.recv() => libc::SIGINT,
            _ = terminate.recv() => libc::SIGTERM,
        };
        // Threads that wait or read find it out by this.
        ingest.interrupt();
        Interrupted { signal }
    })
}

async fn bring(
    registry: &Registry,
    ingest: &Arc<Ingest>,
    content: &Bytes,
    config: &Descriptor,
    options: &Options,
    progress: &Progress,
) -> Result<(Plan, Vec<Stored>)> {
    let document = if ingest.has_blob(&config.digest, Some(config.size))? {
        let path = ingest.store().blob_path(&config.digest);
        std::fs::read(&path).with_context(|| format!("read {}", path.display()))?
    } else {
        let document = registry.document(config).await?;
        ingest.put(&document, Some(&config.digest), &format!("the configuration that {} sent", registry.name()))?;
        document
    };
    let plan = Plan::new(content, &document)?;
    ingest.put(content, Some(&plan.digest), "the manifest")?;

    let turn = Arc::new(Semaphore::new(options.parallel.max(1)));
    let layers = plan.manifest.layers.iter().enumerate().map(|(number, blob)| {
        let ids = plan.files.as_ref().and_then(|files| files.get(number)).cloned();
        let layer = Layer {
            registry: registry.clone(),
            ingest: ingest.clone(),
            part: progress.part(&blob.digest.hex()[..12], blob.size),
            blob: blob.clone(),
            ids,
            limit: options.limit,
        };
        let turn = turn.clone();
        async move {
            // In order, so that whoever waits for lower layers never keeps them from their turn.
            let _turn = turn.acquire_owned().await?;
            let digest = layer.blob.digest.clone();
            layer.bring().await.with_context(|| format!("layer {digest}"))
        }
    });
    let landed = try_join_all(layers).await?;
    let stored = match plan.files.clone() {
        Some(ids) => {
            let ingest = ingest.clone();
            spawn_blocking(move || land::settle(&ingest, landed, &ids)).await.context("finish the layers")??
        }
        None => landed.into_iter().map(|_| Stored { key: None, size: plan.manifest.layers[0].size }).collect(),
    };
    Ok((plan, stored))
}

/// A layer that is to be brought.
struct Layer {
    registry: Registry,
    ingest: Arc<Ingest>,
    part: Part,
    blob: Descriptor,
    /// None for a module.
    ids: Option<Ids>,
    limit: Limit,
}

impl Layer {
    async fn bring(self) -> Result<Landed> {
        let (ingest, blob, ids) = (self.ingest.clone(), self.blob.clone(), self.ids.clone());
        // Others may be about it: then it is there when they are done.
        let (sent, mut waits) = mpsc::channel(1);
        let held = spawn_blocking(move || -> Result<_> {
            let held = ingest.take(&blob.digest, || sent.blocking_send(()).unwrap_or_default())?;
            let has_blob = ingest.has_blob(&blob.digest, Some(blob.size))?;
            let landed = ids.as_ref().map(|ids| land::present(&ingest, ids)).transpose()?.flatten();
            Ok((held, has_blob, landed))
        });
        let say = async {
            if waits.recv().await.is_some() {
                self.part.state("elsewhere");
            }
            std::future::pending::<()>().await
        };
        let (held, has_blob, landed) = tokio::select! {
            held = held => held.context("wait for the layer")??,
            () = say => bail!("the layer's lock was lost"),
        };
        let landed = match (landed, has_blob, &self.ids) {
            (Some(landed), true, _) => {
                self.part.done("exists", self.blob.size);
                return Ok(landed);
            }
            (None, true, None) => {
                self.part.done("exists", self.blob.size);
                return Ok(module(self.blob.size));
            }
            (None, true, Some(ids)) => {
                self.part.state("unpacking");
                self.unpack_stored(ids.clone()).await?
            }
            (landed, false, ids) => {
                // The tree may be there from a layer that was compressed otherwise.
                let unpacks = if landed.is_some() { None } else { ids.clone() };
                let fetched = self.download(held, unpacks).await?;
                fetched.or(landed).unwrap_or_else(|| module(self.blob.size))
            }
        };
        self.part.done("done", self.blob.size);
        Ok(landed)
    }

    async fn download(&self, held: runx_image::Held, unpacks: Option<Ids>) -> Result<Option<Landed>> {
        self.part.state("downloading");
        let mut sink = Unpacker {
            ingest: self.ingest.clone(),
            limit: self.limit,
            ids: unpacks.clone(),
            running: None,
            failed: None,
        };
        sink.restart()?;
        // What an earlier process left is read first, by a thread that may block.
        let (ingest, blob, to) = (self.ingest.clone(), self.blob.clone(), sink.sender());
        let opened = spawn_blocking(move || -> Result<_> {
            let writer = ingest.blob(&held, &blob, |chunk| {
                if let Some(to) = &to {
                    // If nobody wants it, the next piece tells.
                    let _ = to.blocking_send(Piece::Bytes(Bytes::copy_from_slice(chunk)));
                }
            })?;
            Ok((held, writer))
        });
        let (held, mut writer) = opened.await.context("open the layer's file")??;
        self.part.at(writer.written());
        let fetched = self.registry.blob(&self.blob, &mut writer, &mut sink, |at| self.part.at(at)).await;
        let fetched = match fetched {
            Ok(Fetched::Unwanted) => {
                // The unpacker has found something, and tells what.
                sink.end().await?;
                bail!("the layer was not unpacked");
            }
            Ok(Fetched::Whole) => writer.commit(),
            Err(e) => return Err(e),
        };
        fetched?;
        self.part.state("unpacking");
        let landed = match (sink.finish().await, unpacks) {
            // Now that all of it is there, it is known what it may become.
            (Err(e), Some(ids)) if matches!(e.downcast_ref(), Some(unpack::Error::TooSoon { .. })) => {
                log::info!("{e}: it is unpacked now that it is complete");
                Some(self.unpack_stored(ids).await?)
            }
            (landed, _) => landed?,
        };
        drop(held);
        Ok(landed)
    }

    /// Unpacks it from the store.
    async fn unpack_stored(&self, ids: Ids) -> Result<Landed> {
        let (ingest, blob, limit) = (self.ingest.clone(), self.blob.clone(), self.limit);
        spawn_blocking(move || land::unpack_stored(&ingest, &blob, &ids, limit)).await.context("unpack")?
    }
}

fn module(size: u64) -> Landed {
    Landed::Stored(Stored { key: None, size })
}

enum Piece {
    Bytes(Bytes),
    /// It was complete, and its digest right.
    End,
}

/// Unpacks a layer in a thread of its own while it comes.
struct Unpacker {
    ingest: Arc<Ingest>,
    ids: Option<Ids>,
    limit: Limit,
    running: Option<(mpsc::Sender<Piece>, JoinHandle<Result<Landed>>)>,
    /// Why it could not be unpacked.
    failed: Option<anyhow::Error>,
}

impl Unpacker {
    fn sender(&self) -> Option<mpsc::Sender<Piece>> {
        self.running.as_ref().map(|(to, _)| to.clone())
    }

    /// No more comes.
    async fn end(&mut self) -> Result<Option<Landed>> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        match self.running.take() {
            Some((to, task)) => {
                drop(to);
                task.await.context("unpack")?.map(Some)
            }
            None => Ok(None),
        }
    }

    async fn finish(mut self) -> Result<Option<Landed>> {
        if let Some((to, _)) = &self.running {
            // If it has ended already, it tells why.
            let _ = to.send(Piece::End).await;
        }
        self.end().await
    }
}

impl Sink for Unpacker {
    async fn put(&mut self, bytes: Bytes) -> Result<(), Closed> {
        match &self.running {
            Some((to, _)) if to.send(Piece::Bytes(bytes)).await.is_err() => {}
            _ => return Ok(()),
        }
        let e = match self.end().await {
            Ok(_) => anyhow!("the layer is longer than its archive"),
            Err(e) => e,
        };
        // What cannot be read may have been changed on the way. When all of it is there, its digest tells; and so does its
        // length of what it may become.
        let goes_on = matches!(e.downcast_ref(), Some(unpack::Error::Archive(_) | unpack::Error::TooSoon { .. }));
        self.failed = Some(e);
        if goes_on { Ok(()) } else { Err(Closed) }
    }

    fn restart(&mut self) -> Result<()> {
        // The one before finds that nothing comes any more, and what it made is removed.
        self.running = None;
        self.failed = None;
        if let Some(ids) = self.ids.clone() {
            let (to, from) = mpsc::channel(WAITING);
            let ingest = self.ingest.clone();
            let limit = self.limit;
            let from = Pieces { from, present: Bytes::new(), ended: false };
            self.running = Some((to, spawn_blocking(move || land::unpack(&ingest, from, &ids, limit))));
        }
        Ok(())
    }
}

/// The pieces as a stream.
struct Pieces {
    from: mpsc::Receiver<Piece>,
    present: Bytes,
    ended: bool,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.present.is_empty() && !self.ended {
            match self.from.blocking_recv() {
                Some(Piece::Bytes(bytes)) => self.present = bytes,
                Some(Piece::End) => self.ended = true,
                None => return Err(io::Error::other("the download was given up")),
            }
        }
        let length = buffer.len().min(self.present.len());
        buffer[..length].copy_from_slice(&self.present.split_to(length));
        Ok(length)
    }
}
