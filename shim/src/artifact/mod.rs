//! Modules from OCI WASM artifacts (CNCF "Wasm OCI Artifact layout"): an image with a layer of the type `application/wasm`.
//! containerd fetches it and gives its container an empty root filesystem; the module stays in containerd's content store,
//! and is asked for there.

mod grpc;

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use runx_core::workload::MAGIC;
use runx_core::workload::provided::{ModuleSource, Provided};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;

use grpc::Client;

/// The types of layers that are modules: that of the CNCF layout, and the one from before it.
const LAYERS: [&str; 2] = ["application/wasm", "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm"];

/// Lists of manifests, which platforms choose from.
const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];

/// The largest manifest that is read, in bytes.
const MANIFEST_LIMIT: i64 = 4 << 20;

/// The largest module that is read, in bytes.
const MODULE_LIMIT: i64 = 512 << 20;

/// How long it may take to find out what an image is.
const PATIENCE: Duration = Duration::from_secs(10);

/// How much of a module tells its kind, in bytes. The layout knows no text form.
const BEGINNING: i64 = 64;

/// The image of one container, looked at when its program is not in its root filesystem.
#[derive(Clone, Debug)]
pub(crate) struct Artifacts {
    address: String,
    namespace: String,
    container: String,
    runtime: Handle,
}

impl Artifacts {
    /// For a container of the containerd at `address`. It has to be called within the runtime, which goes on running
    /// while others wait for the answers.
    pub(crate) fn new(address: &str, namespace: &str, container: &str) -> Self {
        Self {
            address: address.to_owned(),
            namespace: namespace.to_owned(),
            container: container.to_owned(),
            runtime: Handle::current(),
        }
    }

    async fn look(&self) -> io::Result<Option<Layer>> {
        let client = Client::connect(&self.address, &self.namespace).await?;
        let request = GetContainer { id: self.container.clone() };
        let answer = client.call_once::<ContainerAnswer>("/containerd.services.containers.v1.Containers/Get", &request);
        let image = match answer.await {
            Ok(answer) => answer.container.unwrap_or_default().image,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        if image.is_empty() {
            return Ok(None);
        }
        let request = GetImage { name: image.clone() };
        let answer = client.call_once::<ImageAnswer>("/containerd.services.images.v1.Images/Get", &request).await;
        let target = match answer {
            Ok(answer) => answer.image.and_then(|image| image.target).unwrap_or_default(),
            // It may have been removed: what runs does not need it any more.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut digest = target.digest;
        if INDEXES.contains(&target.media_type.as_str()) {
            let Some(index) = document::<Index>(&client, &digest).await? else { return Ok(None) };
            let mut listed = index.manifests;
            // One that says so comes before those that say nothing.
            listed.sort_by_key(|listed| listed.platform.is_none());
            let Some(first) = listed.into_iter().find(Listed::is_wasm) else { return Ok(None) };
            digest = first.digest;
        }
        let Some(manifest) = document::<Manifest>(&client, &digest).await? else { return Ok(None) };
        let mut layers = manifest.layers.into_iter().filter(|layer| LAYERS.contains(&layer.media_type.as_str()));
        match (layers.next(), layers.next()) {
            (None, _) => Ok(None),
            (Some(layer), None) => {
                let client = Arc::new(client);
                let runtime = self.runtime.clone();
                let Some(digest) = layer.digest.strip_prefix("sha256:").map(str::to_owned) else {
                    return Err(io::Error::other(format!("image {image}: the digest {} is not SHA-256", layer.digest)));
                };
                Ok(Some(Layer { client, runtime, name: layer.digest, digest }))
            }
            (Some(_), Some(_)) => Err(io::Error::other(format!("image {image} has more than one WASM layer"))),
        }
    }
}

impl ModuleSource for Artifacts {
    fn find(&self) -> io::Result<Option<Box<dyn Provided>>> {
        if self.address.is_empty() {
            return Ok(None);
        }
        let looked = self.runtime.block_on(async {
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it does not answer");
            tokio::time::timeout(PATIENCE, self.look()).await.map_err(late).flatten()
        });
        match looked {
            Ok(layer) => Ok(layer.map(|layer| Box::new(layer) as Box<dyn Provided>)),
            Err(e) => Err(io::Error::new(e.kind(), format!("ask containerd for the image: {e}"))),
        }
    }
}

/// The layer that is the module.
struct Layer {
    client: Arc<Client>,
    runtime: Handle,
    /// As the content store has it, with the algorithm.
    name: String,
    /// Without it.
    digest: String,
}

impl Provided for Layer {
    fn digest(&self) -> &str {
        &self.digest
    }

    fn beginning(&self) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        self.runtime.block_on(read(&self.client, &self.name, BEGINNING, |bytes| {
            out.extend_from_slice(bytes);
            Ok(())
        }))?;
        if !out.starts_with(MAGIC) {
            return Err(io::Error::other(format!("the layer {} is no WASM binary", self.name)));
        }
        Ok(out)
    }

    fn read(&self) -> io::Result<File> {
        let name = nix::sys::memfd::memfd_create("runx-module", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        let mut file = File::from(name);
        let mut hash = Sha256::new();
        self.runtime.block_on(read(&self.client, &self.name, 0, |bytes| {
            hash.update(bytes);
            file.write_all(bytes)
        }))?;
        let found = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        if found != self.digest {
            return Err(io::Error::other(format!("the layer {} is {found} in fact", self.name)));
        }
        Ok(file)
    }
}

/// Reads a blob from the content store, up to `size` bytes or all of it.
async fn read(
    client: &Client,
    digest: &str,
    size: i64,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let about = |e: io::Error| io::Error::new(e.kind(), format!("read {digest}: {e}"));
    let request = ReadContent { digest: digest.to_owned(), offset: 0, size };
    let mut answer = client.call("/containerd.services.content.v1.Content/Read", &request).await.map_err(about)?;
    let mut total = 0;
    while let Some(part) = answer.next::<ContentAnswer>().await.map_err(about)? {
        total += part.data.len() as i64;
        if total > MODULE_LIMIT {
            return Err(about(io::Error::other(format!("it has more than {MODULE_LIMIT} bytes"))));
        }
        take(&part.data).map_err(about)?;
    }
    Ok(())
}

/// A JSON document, or `None` when the store does not have it: of another platform, say.
async fn document<T: for<'a> Deserialize<'a>>(client: &Client, digest: &str) -> io::Result<Option<T>> {
    let mut out = Vec::new();
    let read = read(client, digest, 0, |bytes| {
        out.extend_from_slice(bytes);
        if out.len() as i64 > MANIFEST_LIMIT { Err(io::Error::other("it is too large")) } else { Ok(()) }
    });
    match read.await {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    }
    serde_json::from_slice(&out).map(Some).map_err(|e| io::Error::other(format!("read {digest}: {e}")))
}

/// An OCI image index.
#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
}

impl Listed {
    fn is_wasm(&self) -> bool {
        self.platform.as_ref().is_none_or(|platform| platform.architecture == "wasm")
    }
}

/// An OCI image manifest.
#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    layers: Vec<Blob>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Blob {
    media_type: String,
    digest: String,
}

// What is used of containerd's messages (api/services/{containers,images,content}/v1).

#[derive(Clone, PartialEq, Message)]
struct GetContainer {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerAnswer {
    #[prost(message, optional, tag = "1")]
    container: Option<Container>,
}

#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(string, tag = "3")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct GetImage {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct ImageAnswer {
    #[prost(message, optional, tag = "1")]
    image: Option<Image>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(message, optional, tag = "3")]
    target: Option<Descriptor>,
}

#[derive(Clone, PartialEq, Message)]
struct Descriptor {
    #[prost(string, tag = "1")]
    media_type: String,
    #[prost(string, tag = "2")]
    digest: String,
}

#[derive(Clone, PartialEq, Message)]
struct ReadContent {
    #[prost(string, tag = "1")]
    digest: String,
    #[prost(int64, tag = "2")]
    offset: i64,
    #[prost(int64, tag = "3")]
    size: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ContentAnswer {
    #[prost(bytes = "vec", tag = "2")]
    data: Vec<u8>,
}
