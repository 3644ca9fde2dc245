//! Layers that become more than their beginning promises, from a registry that says what it likes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::thread;

use ::tar::{Builder, EntryType, Header};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use runx_image::manifest::media_type;

use super::*;

/// An archive of eight megabytes of zeros, and of what can hardly be compressed behind them.
fn archive(behind: usize) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    let mut add = |name: &str, content: &mut dyn Read, length: u64| {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(rustix::process::geteuid().as_raw().into());
        header.set_gid(rustix::process::getegid().as_raw().into());
        header.set_mtime(0);
        header.set_size(length);
        builder.append_data(&mut header, name, content).unwrap();
    };
    add("zeros", &mut io::repeat(0).take(8 << 20), 8 << 20);
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(behind)
    .collect();
    add("noise", &mut noise.as_slice(), behind as u64);
    builder.into_inner().unwrap()
}

/// A layer, its blob, and what it is for.
fn layer(plain: &[u8]) -> (Vec<u8>, Descriptor, Ids) {
    let compressed = zstd::encode_all(plain, 3).unwrap();
    let blob = Descriptor {
        media_type: format!("{}+zstd", media_type::OCI_LAYER),
        digest: Digest::of(&compressed),
        size: compressed.len() as u64,
        platform: None,
        annotations: [].into(),
    };
    let diff_id = Digest::of(plain);
    (compressed, blob, Ids { chain_id: diff_id.clone(), diff_id })
}

/// A registry that answers the first request with these bytes, and has nothing after that.
fn registry(content: Vec<u8>) -> Registry {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut answers = [("200 OK", content)].into_iter();
        // It ends with the process.
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut head = BufReader::new(client.try_clone().unwrap()).lines();
            while head.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let (status, body) = answers.next().unwrap_or(("404 Not Found", Vec::new()));
            let length = body.len();
            write!(client, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n").unwrap();
            // Who wants no more may be gone.
            let _ = client.write_all(&body);
        }
    });
    // Another test may have done it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
    let wanted = Wanted::parse(&format!("{address}/tool:v1"), None).unwrap();
    Registry::new(registry::client(config).unwrap(), RegistryAuth::Anonymous, wanted)
}

fn download(dir: &Path, content: Vec<u8>, blob: &Descriptor, ids: &Ids, least: u64) -> Result<Option<Landed>> {
    let ingest = Arc::new(Store::open(dir).unwrap().ingest().unwrap());
    let layer = Layer {
        registry: registry(content),
        part: Progress::new(true).part("layer", blob.size),
        blob: blob.clone(),
        ids: Some(ids.clone()),
        limit: Limit::Growing { least },
        ingest: ingest.clone(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let held = ingest.take(&blob.digest, || ()).unwrap();
    runtime.block_on(layer.download(held, Some(ids.clone())))
}

#[test]
fn a_layer_that_begins_with_zeros_is_unpacked_when_the_rest_of_it_allows_that() {
    let (content, blob, ids) = layer(&archive(100_000));
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let landed = download(dir.path(), content, &blob, &ids, 1 << 20).unwrap();
    assert!(matches!(landed, Some(Landed::Stored(Stored { key: Some(key), .. })) if key == ids.diff_id));
}

#[test]
fn a_layer_that_was_made_to_fill_the_disk_is_refused_whatever_its_manifest_claims() {
    let (content, blob, ids) = layer(&archive(10));
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let e = download(dir.path(), content.clone(), &blob, &ids, 1 << 20).err().expect("it is refused");
    let refused = matches!(e.downcast_ref(), Some(unpack::Error::TooLarge { limit }) if *limit == 1 << 20);
    assert!(refused && e.to_string().contains("--max-layer-size"), "{e:#}");
    // With a claim that would allow a hundred gigabytes it is no further than that, and what it is called is not there.
    let huge = Descriptor { size: 1 << 30, ..blob };
    let e = download(dir.path(), content, &huge, &ids, 1 << 20).err().expect("it is refused");
    assert!(!format!("{e:#}").contains("larger"), "{e:#}");
    let left: Vec<_> = std::fs::read_dir(dir.path().join("storage/ingest")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_is_unpacked_while_it_comes_follows_the_bytes_that_came() {
    let (content, _, ids) = layer(&archive(10));
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let ingest = Arc::new(Store::open(dir.path()).unwrap().ingest().unwrap());
    let limit = Limit::Growing { least: 1 << 20 };
    let mut unpacker = Unpacker { ingest, ids: Some(ids), limit, running: None, failed: None };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let e = runtime.block_on(async {
        unpacker.restart().unwrap();
        assert!(unpacker.put(content.into()).await.is_ok());
        // Nothing says that this was all of it, and yet it is at its end.
        let (to, _) = unpacker.running.as_ref().unwrap();
        to.closed().await;
        assert!(unpacker.put(Bytes::from_static(b"more")).await.is_ok(), "the download goes on");
        unpacker.end().await.err().expect("it is refused")
    });
    assert!(matches!(e.downcast_ref(), Some(unpack::Error::TooSoon { .. })), "{e:#}");
}
