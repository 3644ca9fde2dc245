//! Datagrams: each client has a socket of its own to the target, until it is silent for long enough.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::plan::Shared;

/// The largest datagram, in bytes.
const LARGEST: usize = 65_535;

struct Client {
    socket: UdpSocket,
    /// When it was last heard of.
    heard: Mutex<Instant>,
}

/// Until its task is aborted.
pub(super) async fn serve(forward: Shared, socket: Arc<UdpSocket>) {
    let mut clients: HashMap<SocketAddr, Arc<Client>> = HashMap::new();
    let mut answers = JoinSet::new();
    let mut buffer = vec![0; LARGEST];
    loop {
        let (length, peer) = tokio::select! {
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                // An answer could not be delivered, say.
                Err(e) => {
                    log::debug!("forward {}: receive: {e}", forward.id);
                    continue;
                }
            },
            Some(over) = answers.join_next() => {
                if let Ok(peer) = over {
                    clients.remove(&peer);
                }
                continue;
            }
        };
        if !forward.plan.lets_in(peer.ip()) {
            forward.counters.refused.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let client = match clients.get(&peer) {
            Some(client) => client.clone(),
            None => {
                if clients.len() >= forward.plan.connections {
                    forward.counters.refused.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                let connected = tokio::time::timeout(forward.plan.connect_timeout, connect(&forward)).await;
                let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                let client = match connected {
                    Ok(target) => Arc::new(Client { socket: target, heard: Mutex::new(Instant::now()) }),
                    Err(e) => {
                        forward.counters.failed.fetch_add(1, Ordering::Relaxed);
                        log::debug!("forward {}: {e}", forward.id);
                        continue;
                    }
                };
                clients.insert(peer, client.clone());
                answers.spawn(answer(forward.clone(), client.clone(), socket.clone(), peer));
                client
            }
        };
        *client.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        match client.socket.send(&buffer[..length]).await {
            Ok(_) => forward.counters.sent.fetch_add(length as u64, Ordering::Relaxed),
            Err(_) => forward.counters.failed.fetch_add(1, Ordering::Relaxed),
        };
    }
}

async fn connect(forward: &Shared) -> io::Result<UdpSocket> {
    let addresses = crate::resolve::addresses(&forward.plan.host).await?;
    let address = addresses.first().ok_or(io::ErrorKind::NotFound)?;
    let own: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((own, 0)).await?;
    socket.connect(SocketAddr::new(*address, forward.plan.port)).await?;
    Ok(socket)
}

/// Sends what the target answers back to one client. Returns whose client it was, when it has been silent.
async fn answer(forward: Shared, client: Arc<Client>, socket: Arc<UdpSocket>, peer: SocketAddr) -> SocketAddr {
    let _open = forward.open();
    let mut buffer = vec![0; LARGEST];
    let heard = || *client.heard.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let until = heard() + forward.plan.idle_timeout;
        tokio::select! {
            received = client.socket.recv(&mut buffer) => {
                // An error says that the target does not listen; it may begin to.
                if let Ok(length) = received {
                    *client.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                    forward.counters.received.fetch_add(length as u64, Ordering::Relaxed);
                    let _ = socket.send_to(&buffer[..length], peer).await;
                }
            }
            () = tokio::time::sleep_until(until) => {
                if heard().elapsed() >= forward.plan.idle_timeout {
                    return peer;
                }
            }
        }
    }
}
