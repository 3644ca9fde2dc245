//! Connections: accepted, let in or turned away, and served as the plan says.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::plan::Shared;
use super::{http, idle};

/// Until its task is aborted. What is open is dropped with it.
pub(super) async fn serve(forward: Shared, listener: TcpListener) {
    let mut open = JoinSet::new();
    loop {
        // Who cannot be served waits in the kernel's line.
        let Ok(permit) = forward.free.clone().acquire_owned().await else { return };
        let accepted = loop {
            tokio::select! {
                accepted = listener.accept() => break accepted,
                Some(_) = open.join_next() => {}
            }
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                log::warn!("forward {}: accept a connection: {e}", forward.id);
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if !forward.plan.lets_in(peer.ip()) {
            forward.counters.refused.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let _ = stream.set_nodelay(true);
        let forward = forward.clone();
        open.spawn(async move {
            if let Err(e) = one(&forward, stream, peer, Arc::new(permit)).await {
                log::debug!("forward {}: a connection from {peer}: {e}", forward.id);
            }
        });
    }
}

async fn one(forward: &Shared, stream: TcpStream, peer: SocketAddr, permit: http::Permit) -> io::Result<()> {
    let plan = &forward.plan;
    if let Some(acceptor) = &plan.acceptor {
        let stream = idle(plan.connect_timeout, acceptor.accept(stream)).await?;
        return http::serve(forward, stream, peer, permit).await;
    }
    if plan.is_http() {
        return http::serve(forward, stream, peer, permit).await;
    }
    let _open = forward.open();
    let target = forward.connect().await.inspect_err(|_| {
        forward.counters.failed.fetch_add(1, Ordering::Relaxed);
    })?;
    both_ways(forward, stream, target).await
}

/// Copies both ways until both have ended, or neither has said anything for long enough.
async fn both_ways(forward: &Shared, client: TcpStream, target: TcpStream) -> io::Result<()> {
    let (client_reader, client_writer) = client.into_split();
    let (target_reader, target_writer) = target.into_split();
    let (heard, mut hears) = watch::channel(());
    let (counters, buffer) = (&forward.counters, forward.plan.buffer);
    let copies = async {
        tokio::try_join!(
            copy(client_reader, target_writer, buffer, &heard, |length| {
                counters.sent.fetch_add(length, Ordering::Relaxed);
            }),
            copy(target_reader, client_writer, buffer, &heard, |length| {
                counters.received.fetch_add(length, Ordering::Relaxed);
            }),
        )
    };
    tokio::pin!(copies);
    loop {
        tokio::select! {
            done = &mut copies => return done.map(drop),
            silent = tokio::time::timeout(forward.plan.idle_timeout, hears.changed()) => {
                if silent.is_err() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
        }
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    buffer: usize,
    heard: &watch::Sender<()>,
    count: impl Fn(u64),
) -> io::Result<()> {
    let mut buffer = vec![0; buffer];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
        count(length as u64);
        heard.send_replace(());
    }
}
