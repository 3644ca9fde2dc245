//! What is typed into a process: over a pipe, or into the terminal that it is on.

use std::io;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::Mutex;

use super::pty::Master;
use super::reaper::Ended;

/// Where it goes.
#[derive(Debug)]
pub enum Kind {
    /// Nowhere: there is no input, or it was closed.
    None,
    /// Into a pipe.
    Pipe(pipe::Sender),
    /// Into a terminal.
    Terminal(Arc<Master>),
}

/// Why something cannot be typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It has no input, or that is closed.
    Closed,
    /// It is on a terminal, or is not.
    OtherKind,
    /// It could not be written.
    Failed(String),
}

/// The input of one process.
#[derive(Debug)]
pub struct Input(Mutex<Kind>);

impl Input {
    /// Of a kind.
    pub fn new(kind: Kind) -> Self {
        Self(Mutex::new(kind))
    }

    /// From now on it is another one.
    pub async fn set(&self, kind: Kind) {
        *self.0.lock().await = kind;
    }

    /// Types something into a process that has not ended.
    ///
    /// # Errors
    /// See [`Refused`]. Also when the process ends meanwhile: others may have the other end open and never read.
    pub async fn write(&self, bytes: &[u8], mut ended: Ended) -> Result<(), Refused> {
        let failed = |e: io::Error| Refused::Failed(e.to_string());
        let written = async {
            let mut kind = self.0.lock().await;
            match &mut *kind {
                Kind::None => Err(Refused::Closed),
                Kind::Pipe(pipe) => pipe.write_all(bytes).await.map_err(failed),
                Kind::Terminal(master) => {
                    let master = master.clone();
                    drop(kind);
                    master.write_all(bytes).await.map_err(failed)
                }
            }
        };
        tokio::select! {
            written = written => written,
            _ = ended.wait_for(Option::is_some) => Err(Refused::Closed),
        }
    }

    /// Closes it. Whether that can be: a terminal has no end of its own.
    pub async fn close(&self) -> bool {
        let mut kind = self.0.lock().await;
        let closes = !matches!(&*kind, Kind::Terminal(_));
        if closes {
            *kind = Kind::None;
        }
        closes
    }

    /// Tells the process of another size of its terminal.
    ///
    /// # Errors
    /// When it is on none.
    pub async fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        match &*self.0.lock().await {
            Kind::Terminal(master) => master.resize(columns, rows),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the process is not on a terminal")),
        }
    }
}
