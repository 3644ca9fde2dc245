//! Port forwards: what listens on an address of the sandbox for somebody else, until it is taken away.
//!
//! HTTP, HTTPS and WebSocket ask for a token of their own; TCP and UDP have nowhere to put one, and go by the addresses of
//! their clients. Who may not is turned away before anything is connected.

mod allow;
pub mod http;
mod plan;
mod tcp;
mod tls;
mod udp;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::ids;
pub use plan::{Plan, Protocol, Wish};

/// How many there may be.
const MOST: usize = 256;

/// What went through a forward.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections, clients of UDP, or requests that were let in.
    pub accepted: AtomicU64,
    /// Those that were turned away.
    pub refused: AtomicU64,
    /// Those that the target did not take.
    pub failed: AtomicU64,
    /// Bytes to the target, of TCP and UDP.
    pub sent: AtomicU64,
    /// Bytes from the target, of TCP and UDP.
    pub received: AtomicU64,
    /// Those that are open.
    pub open: AtomicU64,
}

/// One forward.
#[derive(Debug)]
pub struct Forward {
    /// A UUID.
    pub id: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// What it does.
    pub plan: Plan,
    /// When it was made.
    pub created: SystemTime,
    /// What went through it.
    pub counters: Counters,
    /// How many more connections there may be.
    free: Arc<Semaphore>,
    /// Upgraded connections are nobody's task, and end with this.
    end: watch::Sender<bool>,
    task: Mutex<Option<JoinHandle<()>>>,
}

/// Counts one that is open, until it is dropped.
struct Open<'a>(&'a Forward);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.counters.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Forward {
    fn open(&self) -> Open<'_> {
        self.counters.accepted.fetch_add(1, Ordering::Relaxed);
        self.counters.open.fetch_add(1, Ordering::Relaxed);
        Open(self)
    }

    /// Connects to the target, as often as the plan says.
    async fn connect(&self) -> io::Result<TcpStream> {
        let plan = &self.plan;
        let mut tries = plan.retries;
        loop {
            match tokio::time::timeout(plan.connect_timeout, self.connect_once()).await {
                Ok(Ok(stream)) => {
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Ok(Err(e)) if tries == 0 => return Err(e),
                Err(_) if tries == 0 => return Err(io::ErrorKind::TimedOut.into()),
                _ => tries -= 1,
            }
            tokio::time::sleep(plan.retry_delay).await;
        }
    }

    async fn connect_once(&self) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in crate::resolve::addresses(&self.plan.host).await? {
            match TcpStream::connect(SocketAddr::new(address, self.plan.port)).await {
                Ok(stream) => return Ok(stream),
                Err(e) => last = e,
            }
        }
        Err(last)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Forwards(Mutex<HashMap<String, Arc<Forward>>>);

impl Forwards {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Arc<Forward>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one, which listens when this returns.
    ///
    /// # Errors
    /// When it cannot listen, or there are too many.
    pub async fn create(&self, plan: Plan) -> io::Result<Arc<Forward>> {
        if self.all().len() >= MOST {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, format!("there are {MOST} forwards already")));
        }
        let make = |address| {
            Arc::new(Forward {
                id: ids::uuid(),
                address,
                created: SystemTime::now(),
                counters: Counters::default(),
                free: Arc::new(Semaphore::new(plan.connections)),
                end: watch::Sender::new(false),
                task: Mutex::default(),
                plan: plan.clone(),
            })
        };
        let forward = if plan.protocol == Protocol::Udp {
            let socket = tokio::net::UdpSocket::bind(plan.listen).await?;
            let forward = make(socket.local_addr()?);
            forward.begin(tokio::spawn(udp::serve(forward.clone(), Arc::new(socket))));
            forward
        } else {
            let listener = tokio::net::TcpListener::bind(plan.listen).await?;
            let forward = make(listener.local_addr()?);
            forward.begin(tokio::spawn(tcp::serve(forward.clone(), listener)));
            forward
        };
        self.all().insert(forward.id.clone(), forward.clone());
        Ok(forward)
    }

    /// All, the oldest first.
    pub fn list(&self) -> Vec<Arc<Forward>> {
        let mut all: Vec<_> = self.all().values().cloned().collect();
        all.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        all
    }

    /// By its id.
    pub fn get(&self, id: &str) -> Option<Arc<Forward>> {
        self.all().get(id).cloned()
    }

    /// Takes one away, with all that is open. Whether there was one.
    pub async fn remove(&self, id: &str) -> bool {
        let Some(forward) = self.all().remove(id) else { return false };
        forward.end().await;
        true
    }

    /// Takes all away.
    pub fn end_all(&self) {
        for (_, forward) in self.all().drain() {
            forward.end.send_replace(true);
            if let Some(task) = forward.take() {
                task.abort();
            }
        }
    }
}

impl Forward {
    fn begin(&self, task: JoinHandle<()>) {
        *self.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
    }

    fn take(&self) -> Option<JoinHandle<()>> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Its port is free, and nothing of it open, when this returns.
    async fn end(&self) {
        self.end.send_replace(true);
        if let Some(task) = self.take() {
            task.abort();
            let _ = task.await;
        }
    }
}

/// Ends with whatever it is given when nothing has been heard for so long.
async fn idle<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
