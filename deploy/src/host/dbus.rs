//! As much of D-Bus as it takes to ask systemd for something, over the socket that it has for its own programs
//! (/run/systemd/private): one call after the other, and the one signal that tells that a job has ended.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const CALL: u8 = 1;
const REPLY: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// How long a first message may be without an answer until another one is sent, and how many there are.
const WAKE: Duration = Duration::from_millis(250);
const WAKES: u32 = 80;

/// The largest message that is accepted, in bytes.
const LIMIT: usize = 1 << 20;

/// A body that is being written. Offsets count from its beginning, which is aligned in the message.
#[derive(Debug, Default)]
pub(super) struct Body(Vec<u8>);

impl Body {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn byte(&mut self, value: u8) {
        self.0.push(value);
    }

    /// `u`.
    pub(super) fn number(&mut self, value: u32) {
        self.align(4);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// `t`.
    pub(super) fn long(&mut self, value: u64) {
        self.align(8);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// `s` and `o`.
    pub(super) fn string(&mut self, value: &str) {
        self.number(value.len() as u32);
        self.0.extend_from_slice(value.as_bytes());
        self.byte(0);
    }

    /// `g`.
    pub(super) fn signature(&mut self, value: &str) {
        self.byte(value.len() as u8);
        self.0.extend_from_slice(value.as_bytes());
        self.byte(0);
    }

    /// `a`, with the alignment of what is in it.
    pub(super) fn array(&mut self, alignment: usize, fill: impl FnOnce(&mut Self)) {
        self.number(0);
        let length_at = self.0.len() - 4;
        self.align(alignment);
        let begin = self.0.len();
        fill(self);
        let length = (self.0.len() - begin) as u32;
        self.0[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// The beginning of `(…)`.
    pub(super) fn structure(&mut self) {
        self.align(8);
    }
}

/// A message from systemd.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Message {
    kind: u8,
    member: String,
    error: String,
    reply_to: u32,
    body: Vec<u8>,
    read: usize,
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "systemd sends a message that cannot be read")
}

impl Message {
    fn take(&mut self, count: usize) -> io::Result<&[u8]> {
        let end = self.read.checked_add(count).filter(|end| *end <= self.body.len()).ok_or_else(malformed)?;
        let begin = std::mem::replace(&mut self.read, end);
        Ok(&self.body[begin..end])
    }

    fn align(&mut self, to: usize) {
        self.read = self.read.next_multiple_of(to);
    }

    /// `u`.
    pub(super) fn number(&mut self) -> io::Result<u32> {
        self.align(4);
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes(bytes.try_into().map_err(|_| malformed())?))
    }

    /// `s` and `o`.
    pub(super) fn string(&mut self) -> io::Result<String> {
        let length = self.number()? as usize;
        let text = String::from_utf8(self.take(length)?.to_vec()).map_err(|_| malformed())?;
        self.take(1)?;
        Ok(text)
    }

    /// `g`.
    pub(super) fn signature(&mut self) -> io::Result<String> {
        let length = usize::from(self.take(1)?[0]);
        let text = String::from_utf8(self.take(length)?.to_vec()).map_err(|_| malformed())?;
        self.take(1)?;
        Ok(text)
    }

    /// Reads the fields of a head, which is this body for now.
    fn fields(&mut self) -> io::Result<(String, String, u32)> {
        let (mut member, mut error, mut reply_to) = (String::new(), String::new(), 0);
        while self.read < self.body.len() {
            self.align(8);
            if self.read >= self.body.len() {
                break;
            }
            let code = self.take(1)?[0];
            match (code, self.signature()?.as_str()) {
                (3, "s") => member = self.string()?,
                (4, "s") => error = self.string()?,
                (5, "u") => reply_to = self.number()?,
                (_, "s" | "o") => drop(self.string()?),
                (_, "g") => drop(self.signature()?),
                (_, "u") => drop(self.number()?),
                _ => return Err(malformed()),
            }
        }
        Ok((member, error, reply_to))
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Bus {
    stream: BufReader<UnixStream>,
    serial: u32,
    /// Signals that came while something else was waited for.
    signals: Vec<Message>,
}

impl Bus {
    /// Connects, as the user that this is.
    pub(super) fn connect(socket: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let user: String = nix::unistd::geteuid().to_string().bytes().map(|b| format!("{b:02x}")).collect();
        stream.write_all(format!("\0AUTH EXTERNAL {user}\r\n").as_bytes())?;
        let mut stream = BufReader::new(stream);
        let mut answer = Vec::new();
        Read::by_ref(&mut stream).take(512).read_until(b'\n', &mut answer)?;
        if !answer.starts_with(b"OK ") {
            let text = String::from_utf8_lossy(&answer).trim().to_owned();
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("systemd does not let us in: {text:?}"),
            ));
        }
        stream.get_mut().write_all(b"BEGIN\r\n")?;
        let mut this = Self { stream, serial: 0, signals: Vec::new() };
        this.wake()?;
        Ok(this)
    }

    /// systemd may read the first message together with the line that ends the greeting, and then waits for more before it
    /// looks at either. So the first messages are ones that do not matter, until one is answered.
    fn wake(&mut self) -> io::Result<()> {
        for _ in 0..WAKES {
            self.serial += 1;
            let ping = encode(self.serial, "/", "org.freedesktop.DBus.Peer", "Ping", "", &Body::default());
            self.stream.get_mut().write_all(&ping)?;
            if self.is_readable(WAKE)? {
                return Ok(());
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "systemd does not answer"))
    }

    fn is_readable(&self, patience: Duration) -> io::Result<bool> {
        if !self.stream.buffer().is_empty() {
            return Ok(true);
        }
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.stream.get_ref().as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(count) => Ok(count > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Calls a method and waits for what it answers.
    pub(super) fn call(
        &mut self,
        path: &str,
        (interface, member): (&str, &str),
        signature: &str,
        body: &Body,
    ) -> io::Result<Message> {
        self.serial += 1;
        let message = encode(self.serial, path, interface, member, signature, body);
        self.stream.get_mut().write_all(&message)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let mut message = self.next(deadline)?;
            match message.kind {
                SIGNAL => self.signals.push(message),
                REPLY if message.reply_to == self.serial => return Ok(message),
                ERROR if message.reply_to == self.serial => {
                    let text = message.string().unwrap_or_default();
                    return Err(io::Error::other(format!("{member}: {text} ({})", message.error)));
                }
                _ => {}
            }
        }
    }

    /// The next signal with a name.
    pub(super) fn signal(&mut self, member: &str, deadline: Instant) -> io::Result<Message> {
        loop {
            let message = if self.signals.is_empty() { self.next(deadline)? } else { self.signals.remove(0) };
            if message.kind == SIGNAL && message.member == member {
                return Ok(message);
            }
        }
    }

    fn next(&mut self, deadline: Instant) -> io::Result<Message> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "systemd does not answer in time"));
        }
        self.stream.get_ref().set_read_timeout(Some(left))?;
        match read(&mut self.stream) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "systemd does not answer in time"))
            }
            done => done,
        }
    }
}

fn encode(serial: u32, path: &str, interface: &str, member: &str, signature: &str, body: &Body) -> Vec<u8> {
    let mut head = Body::default();
    for value in [b'l', CALL, 0, 1] {
        head.byte(value);
    }
    head.number(body.0.len() as u32);
    head.number(serial);
    head.array(8, |fields| {
        let texts = [(1, "o", path), (2, "s", interface), (3, "s", member), (6, "s", "org.freedesktop.systemd1")];
        for (code, kind, value) in texts {
            fields.structure();
            fields.byte(code);
            fields.signature(kind);
            fields.string(value);
        }
        if !signature.is_empty() {
            fields.structure();
            fields.byte(8);
            fields.signature("g");
            fields.signature(signature);
        }
    });
    head.align(8);
    head.0.extend_from_slice(&body.0);
    head.0
}

fn read(stream: &mut impl Read) -> io::Result<Message> {
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    // systemd writes in the machine's order, and all that it builds runx for are little endian.
    if head[0] != b'l' || head[3] != 1 {
        return Err(malformed());
    }
    let (length, fields) = (number(4), number(12));
    if length > LIMIT || fields > LIMIT {
        return Err(malformed());
    }
    // The head's beginning is 16 bytes, so what follows is aligned as if it were a beginning.
    let mut bytes = vec![0; fields.next_multiple_of(8)];
    stream.read_exact(&mut bytes)?;
    bytes.truncate(fields);
    let mut message = Message { body: bytes, ..Message::default() };
    let (member, error, reply_to) = message.fields()?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(Message { kind: head[1], member, error, reply_to, body, read: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut body = Body::default();
        body.string("unit");
        body.array(8, |list| {
            list.structure();
            list.string("Name");
            list.signature("t");
            list.long(7);
        });
        let bytes = encode(9, "/p", "i.f", "Member", "sa(sv)", &body);
        let mut message = read(&mut &bytes[..]).unwrap();
        assert_eq!((message.kind, message.member.as_str()), (CALL, "Member"));
        assert_eq!(message.string().unwrap(), "unit");
        // The array's length is of what is in it, without the padding before.
        let length = message.number().unwrap() as usize;
        message.align(8);
        assert_eq!(message.body.len() - message.read, length);
        assert_eq!(message.string().unwrap(), "Name");
        assert_eq!(message.signature().unwrap(), "t");
    }

    #[test]
    fn messages_that_are_cut_or_wrong_are_refused() {
        let mut body = Body::default();
        body.string("unit");
        let bytes = encode(1, "/p", "i", "M", "s", &body);
        for end in 0..bytes.len() {
            assert!(read(&mut &bytes[..end]).is_err(), "{end}");
        }
        for at in 0..bytes.len() {
            for change in [1, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= change;
                // It may be another message, or none; it must not panic.
                if let Ok(mut message) = read(&mut &changed[..]) {
                    let _ = message.string();
                }
            }
        }
    }
}
