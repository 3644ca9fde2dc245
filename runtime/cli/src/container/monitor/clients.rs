//! Those who are attached to a container. One who does not read is left out of what comes, and told so once he reads
//! again; only the command that runs the container in the foreground into a pipe or a file holds it up, as a pipe does.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::container::frames::{self, HEADER, Kind};

/// As much is kept for one who does not read.
const LIMIT: usize = 64 * 1024;
/// As much more is kept once the container has ended: more than its two pipes hold, even if it made them larger.
const REST: usize = 4 * 1024 * 1024;
/// How long one who does not read is waited for at the end.
const PATIENCE: Duration = Duration::from_secs(5);

/// One of them.
#[derive(Debug)]
struct Client {
    socket: UnixStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// How much of `outgoing` is sent.
    sent: usize,
    /// It wants the output.
    watches: bool,
    /// It must get all of it.
    lossless: bool,
    /// How many bytes it did not get.
    left_out: u64,
    gone: bool,
}

impl Client {
    fn new(socket: UnixStream) -> Self {
        let gone = socket.set_nonblocking(true).is_err();
        Self {
            socket,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            sent: 0,
            watches: false,
            lossless: false,
            left_out: 0,
            gone,
        }
    }

    fn pending(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    fn push(&mut self, kind: Kind, data: &[u8]) {
        if matches!(kind, Kind::Output | Kind::Error) {
            if !self.watches {
                return;
            }
            if !self.lossless && (self.left_out > 0 || self.pending() + data.len() > LIMIT) {
                self.left_out += data.len() as u64;
                return;
            }
        }
        if self.left_out > 0 {
            // Before it is told of the end.
            self.admit();
        }
        for part in data.chunks(frames::LIMIT - HEADER).chain(data.is_empty().then_some(data)) {
            frames::push(&mut self.outgoing, kind, part);
        }
        self.flush();
    }

    fn flush(&mut self) {
        while self.pending() > 0 && !self.gone {
            match self.socket.write(&self.outgoing[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.gone = true,
            }
        }
        if self.sent > 0 {
            self.outgoing.clear();
            self.outgoing.shrink_to(4096);
            self.sent = 0;
        }
        if self.left_out > 0 {
            self.admit();
            self.flush();
        }
    }

    /// Tells it how much it did not get.
    fn admit(&mut self) {
        let bytes = std::mem::take(&mut self.left_out);
        let note = format!("\r\n[runx: {bytes} bytes are left out here, for they were not read in time]\r\n");
        frames::push(&mut self.outgoing, Kind::Error, note.as_bytes());
    }

    /// Reads what is there.
    fn read(&mut self) {
        let mut buffer = [0u8; 16 * 1024];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => self.gone = true,
                Ok(n) => {
                    self.incoming.extend(&buffer[..n]);
                    if n == buffer.len() && self.incoming.len() < 2 * LIMIT {
                        continue;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.gone = true,
            }
            return;
        }
    }

    /// The next frame that it sent.
    fn take(&mut self) -> Option<(Kind, Vec<u8>)> {
        match frames::take(&mut self.incoming) {
            Ok(frame) => frame,
            Err(_) => {
                self.gone = true;
                None
            }
        }
    }
}

/// What those who are attached ask for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Input(Vec<u8>),
    InputEnd,
    Resize(u16, u16),
    Signal(i32),
}

/// All of them.
#[derive(Debug)]
pub(super) struct Clients {
    all: Vec<Client>,
    window: Option<(u16, u16)>,
    /// Wishes that came before anybody could fulfil them.
    early: Vec<Wish>,
}

impl Clients {
    /// The first one.
    pub(super) fn new(first: UnixStream) -> Self {
        Self { all: vec![Client::new(first)], window: None, early: Vec::new() }
    }

    /// Another one.
    pub(super) fn add(&mut self, socket: UnixStream) {
        self.all.push(Client::new(socket));
    }

    /// Reads what they said so far.
    pub(super) fn read_now(&mut self) {
        for index in 0..self.all.len() {
            self.all[index].read();
            let wishes = self.wishes_of(index);
            self.early.extend(wishes);
        }
    }

    /// The signals that they sent and that nobody could be told of, as there was no program.
    pub(super) fn signals(&mut self) -> impl Iterator<Item = i32> {
        self.read_now();
        let (signals, others) =
            std::mem::take(&mut self.early).into_iter().partition::<Vec<_>, _>(|wish| matches!(wish, Wish::Signal(_)));
        self.early = others;
        signals.into_iter().filter_map(|wish| match wish {
            Wish::Signal(number) => Some(number),
            _ => None,
        })
    }

    /// Keeps a wish for the next program.
    pub(super) fn postpone(&mut self, wish: Wish) {
        self.early.push(wish);
    }

    /// The size of the window, if somebody said it.
    pub(super) fn window(&self) -> Option<(u16, u16)> {
        self.window
    }

    /// What is to be waited for: a descriptor and events for each. While the container does not take its input, only those
    /// who may say something else are listened to.
    pub(super) fn poll(&self, is_full: bool) -> impl Iterator<Item = libc::pollfd> {
        self.all.iter().map(move |client| {
            let listen = !is_full || !client.watches;
            let events = if listen { libc::POLLIN } else { 0 } | if client.pending() > 0 { libc::POLLOUT } else { 0 };
            libc::pollfd { fd: client.socket.as_raw_fd(), events, revents: 0 }
        })
    }

    /// Writes to and reads from those who are ready. Returns what they wish.
    pub(super) fn handle(&mut self, ready: &[libc::pollfd]) -> Vec<Wish> {
        let mut wishes = std::mem::take(&mut self.early);
        for (index, ready) in ready.iter().enumerate().take(self.all.len()) {
            if ready.revents & libc::POLLOUT != 0 {
                self.all[index].flush();
            }
            if ready.revents & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0 {
                self.all[index].read();
            }
            wishes.extend(self.wishes_of(index));
        }
        self.all.retain(|client| !client.gone);
        wishes
    }

    fn wishes_of(&mut self, index: usize) -> Vec<Wish> {
        let mut wishes = Vec::new();
        let client = &mut self.all[index];
        while let Some((kind, data)) = client.take() {
            match (kind, &data[..]) {
                (Kind::Input, _) => wishes.push(Wish::Input(data)),
                (Kind::InputEnd, _) => wishes.push(Wish::InputEnd),
                (Kind::Resize, &[a, b, c, d]) => {
                    let (rows, columns) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
                    self.window = Some((rows, columns));
                    wishes.push(Wish::Resize(rows, columns));
                }
                (Kind::Signal, &[number]) => wishes.push(Wish::Signal(number.into())),
                (Kind::Watch, &[lossless]) => {
                    client.watches = true;
                    client.lossless = lossless != 0;
                }
                _ => client.gone = true,
            }
        }
        wishes
    }

    /// Whether the container's output has to wait.
    pub(super) fn hold(&self) -> bool {
        self.has_pending(LIMIT)
    }

    /// The same once the container has ended, which does not wait for anybody.
    pub(super) fn hold_at_end(&self) -> bool {
        self.has_pending(LIMIT + REST)
    }

    fn has_pending(&self, limit: usize) -> bool {
        self.all.iter().any(|client| client.lossless && !client.gone && client.pending() >= limit)
    }

    /// Passes something on to all.
    pub(super) fn tell(&mut self, kind: Kind, data: &[u8]) {
        self.all.iter_mut().for_each(|client| client.push(kind, data));
    }

    /// Goes on with those who were slow.
    pub(super) fn flush(&mut self) {
        self.all.iter_mut().for_each(Client::flush);
    }

    /// Waits until everybody has got everything, or gone.
    pub(super) fn finish(&mut self) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.flush();
            let late = Instant::now() >= end;
            self.all.retain(|client| !client.gone && client.pending() > 0 && (client.lossless || !late));
            if self.all.is_empty() {
                return;
            }
            let mut fds: Vec<_> = self
                .all
                .iter()
                .map(|client| libc::pollfd { fd: client.socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 })
                .collect();
            // SAFETY: fds is a valid list of that many.
            unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 1000) };
            for (client, fd) in self.all.iter_mut().zip(&fds) {
                client.gone |= fd.revents & (libc::POLLERR | libc::POLLNVAL) != 0;
            }
        }
    }
}
