//! A connection to systemd: calls and the signals that a job is done, one thing after the other, in the caller's
//! thread. A connection lives as long as one operation.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::message::{Call, HEAD, Incoming, Kind, Value, length};

/// How long systemd may take for an operation, as runc has it.
const PATIENCE: Duration = Duration::from_secs(30);

/// systemd's own socket, for root; it saves the way over the bus, and is there when that is not.
const PRIVATE: &str = "/run/systemd/private";

/// The system bus.
const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const OBJECT: &str = "/org/freedesktop/systemd1";

/// Why a call failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The connection.
    Io(io::Error),
    /// systemd's refusal.
    Refused {
        /// The error's name.
        name: String,
        /// Its text.
        text: String,
    },
}

impl Failure {
    /// Whether systemd refused with the error of this name, of systemd's own.
    pub(super) fn is(&self, error: &str) -> bool {
        matches!(self, Self::Refused { name, .. } if name.rsplit('.').next() == Some(error))
    }

    pub(super) fn into_io(self) -> io::Error {
        match self {
            Self::Io(e) => e,
            Self::Refused { name, text } => io::Error::other(format!("systemd answers: {text} ({name})")),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

/// See the module.
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
    deadline: Instant,
    /// Jobs that ended while something else was waited for, with their results.
    ended: Vec<(String, String)>,
}

impl Bus {
    /// Connects to systemd.
    pub(super) fn connect() -> io::Result<Self> {
        match Self::open(PRIVATE) {
            Ok(bus) => Ok(bus),
            Err(private) => {
                let mut bus = Self::open(SYSTEM_BUS)
                    .map_err(|e| io::Error::new(e.kind(), format!("{PRIVATE}: {private}; {SYSTEM_BUS}: {e}")))?;
                bus.greet().map_err(Failure::into_io)?;
                Ok(bus)
            }
        }
    }

    fn open(socket: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        let mut bus = Self { stream, serial: 0, deadline: Instant::now() + PATIENCE, ended: Vec::new() };
        bus.authenticate()?;
        Ok(bus)
    }

    /// The kernel tells the other end who we are; it wants the uid again, as hexadecimal digits of its decimal ones.
    ///
    /// BEGIN goes with it, and nothing more before the answer: what systemd reads together with BEGIN it forgets to
    /// look at until more comes.
    fn authenticate(&mut self) -> io::Result<()> {
        let uid: String = nix::unistd::geteuid().to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
        self.arm()?;
        self.stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\nBEGIN\r\n").as_bytes())?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            answer.push(byte[0]);
            if answer.len() > 4096 {
                break;
            }
        }
        if answer.starts_with(b"OK ") {
            return Ok(());
        }
        let answer = String::from_utf8_lossy(&answer);
        Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("it refuses us: {}", answer.trim())))
    }

    /// What the bus, other than systemd's own socket, wants to hear before it passes anything on.
    fn greet(&mut self) -> Result<(), Failure> {
        const BUS: &str = "org.freedesktop.DBus";
        let rule = format!("type='signal',sender='{SYSTEMD}',interface='{MANAGER}',member='JobRemoved'");
        for (member, arguments) in [("Hello", vec![]), ("AddMatch", vec![Value::Text(rule)])] {
            self.call(&Call {
                destination: BUS,
                path: "/org/freedesktop/DBus",
                interface: BUS,
                member,
                arguments: &arguments,
            })?;
        }
        self.manager("Subscribe", &[]).map(drop)
    }

    /// Calls a method of systemd's manager.
    pub(super) fn manager(&mut self, member: &str, arguments: &[Value]) -> Result<Incoming, Failure> {
        self.call(&Call { destination: SYSTEMD, path: OBJECT, interface: MANAGER, member, arguments })
    }

    /// Reads a property of systemd's that is a text.
    pub(super) fn property(&mut self, path: Option<&str>, interface: &str, name: &str) -> Result<String, Failure> {
        let answer = self.call(&Call {
            destination: SYSTEMD,
            path: path.unwrap_or(OBJECT),
            interface: "org.freedesktop.DBus.Properties",
            member: "Get",
            arguments: &[format!("{SYSTEMD}.{interface}").as_str().into(), name.into()],
        })?;
        let mut body = answer.body();
        match body.signature()?.as_str() {
            "s" => Ok(body.text()?),
            other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name} is of type {other}")).into()),
        }
    }

    fn call(&mut self, call: &Call<'_>) -> Result<Incoming, Failure> {
        self.serial += 1;
        let serial = self.serial;
        self.arm()?;
        self.stream.write_all(&call.encode(serial))?;
        loop {
            let message = self.receive()?;
            if message.reply_to != serial {
                continue;
            }
            match &message.kind {
                Kind::Return => return Ok(message),
                Kind::Error(name) => {
                    let text = message.body().text().unwrap_or_default();
                    return Err(Failure::Refused { name: name.clone(), text });
                }
                _ => {}
            }
        }
    }

    /// Waits for a job's end and tells its result: `done` is success.
    pub(super) fn wait(&mut self, job: &str) -> io::Result<String> {
        loop {
            if let Some(at) = self.ended.iter().position(|(path, _)| path == job) {
                return Ok(self.ended.swap_remove(at).1);
            }
            self.receive()?;
        }
    }

    /// Receives one message and notes it if it tells of a job's end.
    fn receive(&mut self) -> io::Result<Incoming> {
        let mut data = vec![0; HEAD];
        self.read(&mut data)?;
        let total = length(&data)?;
        data.resize(total, 0);
        self.read(&mut data[HEAD..])?;
        let message = Incoming::decode(data)?;
        if message.kind == Kind::Signal("JobRemoved".to_owned()) {
            let mut body = message.body();
            body.u32()?;
            let job = body.text()?;
            // The unit's name comes between.
            body.text()?;
            self.ended.push((job, body.text()?));
        }
        Ok(message)
    }

    fn read(&mut self, mut data: &mut [u8]) -> io::Result<()> {
        while !data.is_empty() {
            self.arm()?;
            match self.stream.read(data) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::ConnectionReset, "systemd closed the connection")),
                Ok(n) => data = &mut data[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(late()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Lets the next reads and writes take no longer than what is left of the time.
    fn arm(&self) -> io::Result<()> {
        let left = self.deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        let left = left.ok_or_else(late)?;
        self.stream.set_read_timeout(Some(left))?;
        self.stream.set_write_timeout(Some(left))
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("systemd did not answer within {} seconds", PATIENCE.as_secs()))
}
