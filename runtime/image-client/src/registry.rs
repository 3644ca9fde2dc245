//! Asking a registry, patiently: what fails for a moment is tried again.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use bytes::Bytes;
use futures_util::StreamExt as _;
use oci_client::Reference;
use oci_client::client::{BlobResponse, Client};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use runx_image::manifest::{DOCUMENT_LIMIT, Descriptor, media_type};
use runx_image::{BlobWriter, Digest};
use tokio::time::sleep;

use crate::identity::Identity;
use crate::reference::Wanted;

/// How often a request is tried, and how long after the first failure; then twice as long each time.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(250);

/// A registry, for one repository of it.
#[derive(Clone)]
pub(crate) struct Registry {
    access: Access,
    auth: RegistryAuth,
    wanted: Wanted,
}

/// Who asks it.
#[derive(Clone)]
enum Access {
    /// The same client for all of it.
    Client(Client),
    /// A client for a while, and then another one.
    Identity(Arc<Identity>),
}

/// What a blob's consumer gets: its bytes in order, perhaps from the beginning once more.
pub(crate) trait Sink {
    /// More bytes. If it fails, the download ends, and the consumer tells why itself.
    fn put(&mut self, bytes: Bytes) -> impl Future<Output = Result<(), Closed>> + Send;
    /// All bytes will come again from the first one.
    fn restart(&mut self) -> Result<()>;
}

/// The consumer wants no more.
pub(crate) struct Closed;

/// How a download ended without an error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fetched {
    /// All bytes are there.
    Whole,
    /// The consumer wanted no more.
    Unwanted,
}

impl Registry {
    pub(crate) fn new(client: Client, auth: RegistryAuth, wanted: Wanted) -> Self {
        Self { access: Access::Client(client), auth, wanted }
    }

    /// With an identity token.
    pub(crate) fn with_identity(identity: Identity, wanted: Wanted) -> Self {
        // What the identity's clients have is kept by them.
        Self { access: Access::Identity(Arc::new(identity)), auth: RegistryAuth::Anonymous, wanted }
    }

    async fn client(&self) -> Result<Client> {
        match &self.access {
            Access::Client(client) => Ok(client.clone()),
            Access::Identity(identity) => identity.client(&self.wanted).await,
        }
    }

    /// A manifest or an index, with its digest. The digest is checked if one is asked for.
    pub(crate) async fn manifest(&self, digest: Option<&Digest>) -> Result<Bytes> {
        let reference = match digest {
            Some(digest) => self.wanted.at(digest),
            None => self.wanted.reference.clone(),
        };
        let accept =
            [media_type::OCI_INDEX, media_type::DOCKER_INDEX, media_type::OCI_MANIFEST, media_type::DOCKER_MANIFEST];
        let mut tries = Tries::default();
        loop {
            match self.client().await?.pull_manifest_raw(&reference, &self.auth, &accept).await {
                Ok((content, _)) if content.len() as u64 > DOCUMENT_LIMIT => {
                    return Err(anyhow!("the manifest of {reference} is longer than {DOCUMENT_LIMIT} bytes"));
                }
                Ok((content, _)) => return Ok(content),
                Err(e) => tries.again(&e).await.map_err(|()| self.explain(e, &reference))?,
            }
        }
    }

    /// A configuration or another small blob.
    pub(crate) async fn document(&self, blob: &Descriptor) -> Result<Vec<u8>> {
        if blob.size > DOCUMENT_LIMIT {
            return Err(anyhow!("the configuration {} is longer than {DOCUMENT_LIMIT} bytes", blob.digest));
        }
        let mut tries = Tries::default();
        loop {
            let mut content = Vec::new();
            let client = self.client().await?;
            let got = async {
                let mut stream = client.pull_blob_stream(&self.wanted.reference, &described(blob)).await?.stream;
                while let Some(chunk) = stream.next().await {
                    content.extend_from_slice(&chunk?);
                    if content.len() as u64 > blob.size {
                        break;
                    }
                }
                Ok(())
            };
            match got.await {
                Ok(()) => return Ok(content),
                Err(e) => tries.again(&e).await.map_err(|()| self.explain(e, &self.wanted.reference))?,
            }
        }
    }

    /// Downloads a blob, from where the writer is. A connection that breaks is made again, and the rest asked for.
    pub(crate) async fn blob(
        &self,
        blob: &Descriptor,
        writer: &mut BlobWriter,
        sink: &mut impl Sink,
        progress: impl Fn(u64) + Send,
    ) -> Result<Fetched> {
        let mut tries = Tries::default();
        while writer.written() < blob.size {
            let before = writer.written();
            match self.piece(blob, writer, sink, &progress).await {
                Ok(Ok(())) => {}
                Ok(Err(Closed)) => return Ok(Fetched::Unwanted),
                Err(Failure::Here(e)) => return Err(e),
                Err(Failure::Registry(e)) => {
                    if writer.written() > before {
                        tries = Tries::default();
                    }
                    tries.again(&e).await.map_err(|()| self.explain(e, &self.wanted.reference))?;
                    continue;
                }
            }
            if writer.written() < blob.size {
                // Ended as if it were complete.
                let e = OciDistributionError::IoError(std::io::ErrorKind::UnexpectedEof.into());
                let (there, size) = (writer.written(), blob.size);
                tries.again(&e).await.map_err(|()| {
                    anyhow!("{} sent {there} of the {size} bytes of {}", self.wanted.registry(), blob.digest)
                })?;
            }
        }
        Ok(Fetched::Whole)
    }

    async fn piece(
        &self,
        blob: &Descriptor,
        writer: &mut BlobWriter,
        sink: &mut impl Sink,
        progress: &(impl Fn(u64) + Send),
    ) -> Result<Result<(), Closed>, Failure> {
        let from = writer.written();
        let described = described(blob);
        let client = self.client().await.map_err(Failure::Here)?;
        let asked = client.pull_blob_stream_partial(&self.wanted.reference, &described, from, None);
        let mut stream = match asked.await.map_err(Failure::Registry)? {
            BlobResponse::Partial(stream) => stream.stream,
            BlobResponse::Full(stream) => {
                if from > 0 {
                    // It cannot give a part.
                    writer.restart().map_err(|e| Failure::Here(e.into()))?;
                    sink.restart().map_err(Failure::Here)?;
                }
                stream.stream
            }
        };
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|e| Failure::Registry(OciDistributionError::IoError(e)))?;
            writer.write(&chunk).map_err(|e| Failure::Here(e.into()))?;
            progress(writer.written());
            if sink.put(chunk).await.is_err() {
                return Ok(Err(Closed));
            }
        }
        Ok(Ok(()))
    }

    /// What an error means for who asked, and what to do.
    fn explain(&self, e: OciDistributionError, reference: &Reference) -> anyhow::Error {
        let registry = self.wanted.registry();
        let unauthorized = || match (&self.access, &self.auth) {
            (Access::Client(_), RegistryAuth::Anonymous) => format!(
                "{registry} does not let anybody have {reference} who has not logged in: log in with \"docker login \
                 {registry}\" or \"podman login {registry}\", or name a file with --authfile"
            ),
            _ => format!("{registry} does not accept the stored credentials for {reference}: log in again"),
        };
        let has = |codes: &[OciErrorCode]| match &e {
            OciDistributionError::RegistryError { envelope, .. } => {
                envelope.errors.iter().any(|error| codes.contains(&error.code))
            }
            _ => false,
        };
        let text = match &e {
            OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
                unauthorized()
            }
            OciDistributionError::ServerError { code: 401 | 403, .. } => unauthorized(),
            OciDistributionError::ImageManifestNotFoundError(_)
            | OciDistributionError::ServerError { code: 404, .. } => {
                format!("{registry} has no image {reference}")
            }
            _ if has(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) => unauthorized(),
            _ if has(&[OciErrorCode::ManifestUnknown, OciErrorCode::NameUnknown, OciErrorCode::NotFound]) => {
                format!("{registry} has no image {reference}")
            }
            OciDistributionError::DigestError(_) => {
                format!("what {registry} sent for {reference} has not the promised digest")
            }
            OciDistributionError::IoError(e) if is_digest(e) => {
                format!("what {registry} sent for {reference} has not the promised digest")
            }
            OciDistributionError::RequestError(e) if e.is_connect() => {
                let hint = if chain(e).contains("certificate") || chain(e).contains("UnknownIssuer") {
                    ": name its authority with --ca-file, or put it into certs.d"
                } else {
                    ""
                };
                format!("cannot connect to {registry}{hint}")
            }
            _ => format!("get {reference} from {registry}"),
        };
        anyhow::Error::new(e).context(text)
    }
}

fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        text.push_str(": ");
        text.push_str(&e.to_string());
        next = e.source();
    }
    text
}

fn is_digest(e: &std::io::Error) -> bool {
    e.get_ref().is_some_and(|e| e.is::<oci_client::errors::DigestError>())
}

enum Failure {
    Registry(OciDistributionError),
    Here(anyhow::Error),
}

#[derive(Default)]
pub(crate) struct Tries(u32);

impl Tries {
    /// Waits before the next try, if there is to be one.
    pub(crate) async fn again(&mut self, e: &OciDistributionError) -> Result<(), ()> {
        let may_pass = match e {
            // What is wrong will be wrong again.
            OciDistributionError::IoError(e) => !is_digest(e),
            OciDistributionError::RequestError(e) => {
                // That nobody listens, or is who he should be, does not pass.
                !e.is_connect() && (e.is_timeout() || e.is_body() || e.is_request() || e.is_decode())
            }
            OciDistributionError::ServerError { code, .. } => *code == 429 || *code >= 500,
            OciDistributionError::RegistryError { envelope, .. } => {
                envelope.errors.iter().any(|error| error.code == OciErrorCode::Toomanyrequests)
            }
            _ => false,
        };
        self.0 += 1;
        if !may_pass || self.0 >= TRIES {
            return Err(());
        }
        log::info!("{}; trying again", chain(e));
        sleep(PAUSE * 2_u32.pow(self.0 - 1)).await;
        Ok(())
    }
}

fn described(blob: &Descriptor) -> OciDescriptor {
    OciDescriptor {
        media_type: blob.media_type.clone(),
        digest: blob.digest.to_string(),
        size: i64::try_from(blob.size).unwrap_or(i64::MAX),
        ..OciDescriptor::default()
    }
}

impl Registry {
    /// The registry's name.
    pub(crate) fn name(&self) -> &str {
        self.wanted.registry()
    }

    /// What is asked for.
    pub(crate) fn wanted(&self) -> &Wanted {
        &self.wanted
    }
}

/// The client of a registry.
pub(crate) fn client(config: oci_client::client::ClientConfig) -> Result<Client> {
    // `Client::new` would go on with other settings than those that are wanted.
    Client::try_from(config).context("set up the client for registries")
}
