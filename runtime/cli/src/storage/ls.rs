//! `runx storage ls`, `inspect` and `df`.

use anyhow::{Context as _, Result};
use runx_image::name::split;
use runx_image::{Digest, Image, Store};
use serde_json::{Value, json};

use super::{filter, human};
use crate::arguments::{Images, ListFormat};
use crate::container::ago;
use crate::{Failure, print, table};

/// `runx storage ls`.
pub(super) fn ls(store: &Store, wanted: &Images) -> Result<u8, Failure> {
    let mut images = Vec::new();
    // The newest first, as people expect.
    for image in store.images()?.into_iter().rev() {
        if filter::holds(store, &image, &wanted.filters)? {
            images.push(image);
        }
    }
    let id = |image: &Image| {
        if wanted.whole_ids { image.id.to_string() } else { short(&image.id).to_owned() }
    };
    if wanted.quiet {
        return print(&images.iter().map(|image| format!("{}\n", id(image))).collect::<String>());
    }
    if wanted.format == ListFormat::Json {
        let all = images.iter().map(|image| describe(store, image)).collect::<Result<Vec<_>>>()?;
        return print(&format!("{}\n", serde_json::to_string(&all).context("print the list")?));
    }
    if wanted.digests {
        let titles = ["REPOSITORY", "TAG", "DIGEST", "IMAGE ID", "CREATED", "SIZE"].map(str::to_owned);
        let rows = images.iter().flat_map(|image| {
            names(image).into_iter().map(|(repository, tag)| {
                [repository, tag, image.digest.to_string(), id(image), age(image), human(image.size)]
            })
        });
        return print(&table::render(&std::iter::once(titles).chain(rows).collect::<Vec<_>>()));
    }
    let titles = ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"].map(str::to_owned);
    let rows = images.iter().flat_map(|image| {
        let line = |(repository, tag)| [repository, tag, id(image), age(image), human(image.size)];
        names(image).into_iter().map(line)
    });
    print(&table::render(&std::iter::once(titles).chain(rows).collect::<Vec<_>>()))
}

/// A line for each name, and one for an image without any.
fn names(image: &Image) -> Vec<(String, String)> {
    let pair = |(repository, tag): (&str, &str)| (repository.to_owned(), tag.to_owned());
    if !image.names.is_empty() {
        return image.names.iter().map(|name| pair(split(name))).collect();
    }
    let repository = image.repo_digests.first().map_or("<none>", |name| split(name).0);
    vec![pair((repository, "<none>"))]
}

/// The beginning of an id, as other programs show it.
pub(super) fn short(id: &Digest) -> &str {
    &id.hex()[..12]
}

fn age(image: &Image) -> String {
    image.created.as_deref().map_or_else(|| "-".to_owned(), ago)
}

fn describe(store: &Store, image: &Image) -> Result<Value> {
    Ok(json!({
        "id": image.id,
        "digest": image.digest,
        "mediaType": image.media_type,
        "names": image.names,
        "repoDigests": image.repo_digests,
        "created": image.created,
        "stored": image.stored,
        "size": image.size,
        "platform": image.platform,
        "module": image.is_module(),
        "layers": image.layers.iter().map(|layer| json!({
            "mediaType": layer.descriptor.media_type,
            "digest": layer.descriptor.digest,
            "size": layer.descriptor.size,
        })).collect::<Vec<_>>(),
        "users": store.users(image)?,
    }))
}

/// `runx storage inspect`.
pub(super) fn inspect(store: &Store, names: &[String]) -> Result<u8, Failure> {
    let mut all = Vec::new();
    for name in names {
        let image = store.get(name)?;
        let mut description = describe(store, &image)?;
        let document = store.document(&image, &image.config.digest)?;
        description["configuration"] = serde_json::from_slice(&document).context("read the configuration")?;
        all.push(description);
    }
    print(&format!("{}\n", serde_json::to_string_pretty(&all).context("print the images")?))
}

/// `runx storage df`.
pub(super) fn df(store: &Store, format: ListFormat) -> Result<u8, Failure> {
    let usage = store.usage()?;
    if format == ListFormat::Json {
        return print(&format!(
            "{}\n",
            json!({"blobs": usage.blobs, "layers": usage.layers, "ingest": usage.ingest, "reclaimable": usage.reclaimable})
        ));
    }
    let rows = [
        ["WHAT", "SIZE"],
        ["compressed", &human(usage.blobs)],
        ["unpacked", &human(usage.layers)],
        ["under way", &human(usage.ingest)],
        ["needed by nobody", &human(usage.reclaimable)],
    ];
    print(&table::render(&rows.map(|row| row.map(str::to_owned))))
}
