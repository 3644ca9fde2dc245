//! Layers on their way into the store: unpacked, checked, published.

use std::fs::File;
use std::io::{self, Read};

use anyhow::{Context as _, Result};
use runx_image::layer::{Form, Layer};
use runx_image::manifest::Descriptor;
use runx_image::{Error, Ingest, LayerPlace};

use crate::plan::{Ids, Stored};
use crate::unpack::{self, Limit, Unpacked};

/// A layer that was unpacked.
pub(crate) enum Landed {
    /// It is in the store.
    Stored(Stored),
    /// It implies directories, so it waits for what is below it.
    Waiting(LayerPlace, Unpacked),
}

/// The layer, if it is there already: for any chain, or for this one.
pub(crate) fn present(ingest: &Ingest, ids: &Ids) -> Result<Option<Landed>> {
    for key in [&ids.diff_id, &ids.chain_id] {
        if let Some(layer) = ingest.layer(key)? {
            return Ok(Some(Landed::Stored(Stored { key: Some(key.clone()), size: layer.size })));
        }
    }
    Ok(None)
}

/// Unpacks a layer from a stream, and publishes it if it stands by itself. `limit` is of the decompressed archive.
pub(crate) fn unpack(ingest: &Ingest, from: impl Read, ids: &Ids, limit: Limit) -> Result<Landed> {
    let place = ingest.place()?;
    let unpacked = unpack::unpack(Watched { from, ingest }, &place.diff(), limit)?;
    if unpacked.diff_id != ids.diff_id {
        let (expected, found) = (ids.diff_id.to_string(), unpacked.diff_id.to_string());
        return Err(Error::Corrupt { what: "the decompressed layer".into(), expected, found }.into());
    }
    let is_lowest = ids.chain_id == ids.diff_id;
    if unpacked.implied.is_empty() || is_lowest {
        return publish(ingest, place, &unpacked, ids, false).map(Landed::Stored);
    }
    Ok(Landed::Waiting(place, unpacked))
}

/// A stream that ends with an error when the user wants no more, or another layer has failed.
struct Watched<'a, R> {
    from: R,
    ingest: &'a Ingest,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ingest.is_given_up() {
            return Err(io::Error::other("interrupted"));
        }
        self.from.read(buffer)
    }
}

/// Unpacks a layer whose blob is in the store.
pub(crate) fn unpack_stored(ingest: &Ingest, blob: &Descriptor, ids: &Ids, limit: Limit) -> Result<Landed> {
    let path = ingest.store().blob_path(&blob.digest);
    let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let length = file.metadata().with_context(|| format!("look at {}", path.display()))?.len();
    unpack(ingest, file, ids, Limit::Bytes(limit.of_whole(length)))
}

/// Finishes those that wait, when all are there.
pub(crate) fn settle(ingest: &Ingest, landed: Vec<Landed>, ids: &[Ids]) -> Result<Vec<Stored>> {
    let mut stored: Vec<Stored> = Vec::with_capacity(landed.len());
    let mut trees = Vec::with_capacity(landed.len());
    for (layer, ids) in landed.into_iter().zip(ids) {
        let layer = match layer {
            Landed::Stored(layer) => layer,
            Landed::Waiting(place, unpacked) => {
                unpack::inherit(&place.diff(), &unpacked.implied, &trees)
                    .with_context(|| format!("set the attributes of directories of the layer {}", ids.diff_id))?;
                publish(ingest, place, &unpacked, ids, true)?
            }
        };
        if let Some(key) = &layer.key {
            trees.push(ingest.store().root().join("layers").join(key.hex()).join("diff"));
        }
        stored.push(layer);
    }
    Ok(stored)
}

fn publish(ingest: &Ingest, place: LayerPlace, unpacked: &Unpacked, ids: &Ids, chained: bool) -> Result<Stored> {
    let layer = Layer {
        diff_id: ids.diff_id.clone(),
        chain_id: chained.then(|| ids.chain_id.clone()),
        size: unpacked.size,
        entries: unpacked.entries,
        form: Form::current(),
        boot: String::new(),
    };
    let key = ingest.publish(place, layer)?;
    Ok(Stored { key: Some(key), size: unpacked.size })
}
