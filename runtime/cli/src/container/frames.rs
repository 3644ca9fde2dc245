//! What a container's monitor and those who are attached say to each other: frames on a unix socket, each a byte for
//! its kind, four for the length in the machine's order, and that many of data.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

/// Bytes before the data.
pub(crate) const HEADER: usize = 5;
/// No frame has more data.
pub(crate) const LIMIT: usize = 64 * 1024;

/// Kinds of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// To the monitor: data for standard input.
    Input = 0,
    /// To the client: data of standard output, or the terminal's.
    Output = 1,
    /// To the client: data of standard error.
    Error = 2,
    /// To the monitor: rows and columns, two bytes each.
    Resize = 3,
    /// To the monitor: a signal's number, a byte.
    Signal = 4,
    /// To the monitor: standard input has ended.
    InputEnd = 5,
    /// To the client: the exit code, four bytes, of a container that will not be started again.
    Exit = 6,
    /// To the client: it has started.
    Started = 7,
    /// To the client: it could not be started: an exit code, one byte, and why.
    Failed = 8,
    /// To the monitor: this client wants the output, too, and not only the end; 1 if nothing of it may be left out.
    Watch = 9,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        const ALL: [Kind; 10] = [
            Kind::Input,
            Kind::Output,
            Kind::Error,
            Kind::Resize,
            Kind::Signal,
            Kind::InputEnd,
            Kind::Exit,
            Kind::Started,
            Kind::Failed,
            Kind::Watch,
        ];
        ALL.get(usize::from(byte)).copied()
    }
}

/// A frame's first bytes.
pub(crate) fn header(kind: Kind, length: usize) -> [u8; HEADER] {
    let [a, b, c, d] = (length.min(LIMIT) as u32).to_ne_bytes();
    [kind as u8, a, b, c, d]
}

/// Appends a frame.
pub(crate) fn push(out: &mut Vec<u8>, kind: Kind, data: &[u8]) {
    out.extend(header(kind, data.len()));
    out.extend(data);
}

/// Sends a frame, waiting if must be.
pub(crate) fn send(socket: &mut UnixStream, kind: Kind, data: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(HEADER + data.len());
    push(&mut frame, kind, data);
    socket.write_all(&frame)
}

/// Receives a frame, waiting for it. `None` at the end.
pub(crate) fn receive(socket: &mut UnixStream) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut header = [0; HEADER];
    match socket.read_exact(&mut header) {
        Err(e) if matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => return Ok(None),
        other => other?,
    }
    let (kind, length) = parse(header)?;
    let mut data = vec![0; length];
    match socket.read_exact(&mut data) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        other => other.map(|()| Some((kind, data))),
    }
}

/// The kind and the length in a frame's first bytes.
pub(crate) fn parse(header: [u8; HEADER]) -> io::Result<(Kind, usize)> {
    let [kind, length @ ..] = header;
    let length = u32::from_ne_bytes(length) as usize;
    match Kind::of(kind) {
        Some(kind) if length <= LIMIT => Ok((kind, length)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("no frame: kind {kind}, length {length}"))),
    }
}

/// Takes the first whole frame off `bytes`, if there is one.
pub(crate) fn take(bytes: &mut Vec<u8>) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let (kind, length) = parse(*header)?;
    if bytes.len() < HEADER + length {
        return Ok(None);
    }
    let data = bytes[HEADER..HEADER + length].to_vec();
    bytes.drain(..HEADER + length);
    Ok(Some((kind, data)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_whole_and_in_order_however_they_arrive() {
        let mut sent = Vec::new();
        push(&mut sent, Kind::Output, b"hello");
        push(&mut sent, Kind::InputEnd, b"");
        let (mut bytes, mut found) = (Vec::new(), Vec::new());
        for byte in sent {
            bytes.push(byte);
            while let Some(frame) = take(&mut bytes).unwrap() {
                found.push(frame);
            }
        }
        assert_eq!(found, [(Kind::Output, b"hello".to_vec()), (Kind::InputEnd, Vec::new())]);
        assert!(bytes.is_empty());
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        assert!(take(&mut vec![99, 0, 0, 0, 0]).is_err());
        assert!(take(&mut vec![0, 255, 255, 255, 255]).is_err());
    }
}
