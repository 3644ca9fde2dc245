//! Asks a daemon whether it is there: a socket may have outlived whoever served it, or be served by one that hangs.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::ConnectRequest;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::Request;

/// How long a daemon may take. Its thread never waits for anything but the next event.
const PATIENCE: Duration = Duration::from_secs(10);

/// The length of a message's header, and the types of a request and a response, of the ttrpc protocol.
const HEADER: usize = 10;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// The answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Daemon {
    /// It answers.
    Alive,
    /// Nobody serves the socket, or there is none.
    Gone,
}

/// Asks the daemon behind a socket.
///
/// # Errors
/// When somebody serves the socket and does not answer as a shim does.
pub(super) fn ask(socket: &Path, id: &str) -> io::Result<Daemon> {
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(Daemon::Gone);
        }
        Err(e) => return Err(e),
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let connect = ConnectRequest { id: id.into(), ..ConnectRequest::default() };
    let request = Request {
        service: "containerd.task.v2.Task".into(),
        method: "Connect".into(),
        payload: connect.write_to_bytes()?,
        ..Request::default()
    };
    let payload = request.write_to_bytes()?;
    let mut message = Vec::with_capacity(HEADER + payload.len());
    message.extend((payload.len() as u32).to_be_bytes());
    message.extend(1u32.to_be_bytes());
    message.extend([REQUEST, 0]);
    message.extend(payload);
    let mut header = [0u8; HEADER];
    match stream.write_all(&message).and_then(|()| stream.read_exact(&mut header)) {
        Ok(()) if header[8] == RESPONSE => Ok(Daemon::Alive),
        Ok(()) => Err(io::Error::new(io::ErrorKind::InvalidData, "what answers is no shim")),
        // It was about to end.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ) =>
        {
            Ok(Daemon::Gone)
        }
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer"))
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn who_is_gone_is_told_from_who_is_no_shim() {
        let directory = std::env::temp_dir().join(format!("runx-ping-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let socket = directory.join("s");
        assert_eq!(ask(&socket, "x").unwrap(), Daemon::Gone);
        let listener = UnixListener::bind(&socket).unwrap();
        let other = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0u8; HEADER];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(b"HTTP/1.1 400").unwrap();
        });
        assert_eq!(ask(&socket, "x").unwrap_err().kind(), io::ErrorKind::InvalidData);
        other.join().unwrap();
        assert_eq!(ask(&socket, "x").unwrap(), Daemon::Gone);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
