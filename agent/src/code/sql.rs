//! SQL, on the MySQL server of the sandbox: root without a password on the loopback, in a database of its own.
//!
//! MySQL's client/server protocol, version 10, with the text protocol for results: all that a statement needs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Where the server is, as the protocol has it.
pub const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 3306);

/// The database that statements are in.
const DATABASE: &str = "sandbox";

/// How long the server may take to let somebody in.
const PATIENCE: Duration = Duration::from_secs(10);

/// The largest result, in bytes.
const LIMIT: usize = 64 << 20;

/// Capabilities: LONG_PASSWORD, PROTOCOL_41, TRANSACTIONS, SECURE_CONNECTION, PLUGIN_AUTH.
const CAPABILITIES: u32 = 0x1 | 0x200 | 0x2000 | 0x8000 | 0x8_0000;

/// utf8mb4.
const CHARACTERS: u8 = 45;

/// Why a statement was not executed: the protocol's name for it, and the server's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// `DBInitError`, `DBPingError`, `DBQueryError` or `DBExecError`.
    pub name: &'static str,
    /// What was attempted and why it failed.
    pub text: String,
}

#[derive(Debug)]
enum Answer {
    /// How many rows were changed.
    Changed(u64),
    /// Names of columns, and rows.
    Rows(Vec<String>, Vec<Vec<Option<String>>>),
}

/// Executes a statement on a server and returns its result as the protocol tells it.
///
/// # Errors
/// See [`Failure`].
pub async fn execute(server: SocketAddr, statement: &str) -> Result<Value, Failure> {
    let fail = |name| move |text: String| Failure { name, text };
    let connected = tokio::time::timeout(PATIENCE, Client::connect(server)).await;
    let mut client = connected
        .map_err(|_| fail("DBPingError")("the server does not answer".into()))?
        .map_err(fail("DBPingError"))?;
    for preparation in [format!("CREATE DATABASE IF NOT EXISTS {DATABASE}"), format!("USE {DATABASE}")] {
        client.query(&preparation).await.map_err(fail("DBInitError"))?;
    }
    let select = statement.trim_start().get(..6).is_some_and(|word| word.eq_ignore_ascii_case("select"));
    let failed = fail(if select { "DBQueryError" } else { "DBExecError" });
    Ok(match client.query(statement).await.map_err(failed)? {
        Answer::Rows(columns, rows) => json!({"columns": columns, "rows": rows}),
        Answer::Changed(count) => json!({"columns": ["affected_rows"], "rows": [[count]]}),
    })
}

struct Client {
    stream: TcpStream,
    sequence: u8,
}

impl Client {
    async fn connect(address: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect(address).await.map_err(|e| format!("connect to {address}: {e}"))?;
        let _ = stream.set_nodelay(true);
        let mut client = Self { stream, sequence: 0 };
        let greeting = client.read().await?;
        if greeting.first() != Some(&10) {
            return Err(refusal(&greeting).unwrap_or_else(|| "the server speaks another protocol".into()));
        }
        let mut login = Vec::new();
        login.extend_from_slice(&CAPABILITIES.to_le_bytes());
        login.extend_from_slice(&(LIMIT as u32).to_le_bytes());
        login.push(CHARACTERS);
        login.extend_from_slice(&[0; 23]);
        login.extend_from_slice(b"root\0");
        // No password: the answer to any challenge is empty.
        login.push(0);
        login.extend_from_slice(b"mysql_native_password\0");
        client.write(&login).await?;
        loop {
            let packet = client.read().await?;
            match packet.first() {
                Some(0x00) => return Ok(client),
                // Another way to prove who one is; or that there is more to say.
                Some(0xfe) => client.write(&[]).await?,
                Some(0x01) => {}
                _ => return Err(refusal(&packet).unwrap_or_else(|| "the server did not let us in".into())),
            }
        }
    }

    async fn read(&mut self) -> Result<Vec<u8>, String> {
        let lost = |e: std::io::Error| format!("the connection to the server was lost: {e}");
        let mut out = Vec::new();
        loop {
            let mut head = [0; 4];
            self.stream.read_exact(&mut head).await.map_err(lost)?;
            let length = u32::from_le_bytes([head[0], head[1], head[2], 0]) as usize;
            self.sequence = head[3].wrapping_add(1);
            if out.len() + length > LIMIT {
                return Err(format!("the result has more than {LIMIT} bytes"));
            }
            let begin = out.len();
            out.resize(begin + length, 0);
            self.stream.read_exact(&mut out[begin..]).await.map_err(lost)?;
            if length < 0xff_ffff {
                return Ok(out);
            }
        }
    }

    async fn write(&mut self, payload: &[u8]) -> Result<(), String> {
        let lost = |e: std::io::Error| format!("the connection to the server was lost: {e}");
        let mut rest = payload;
        loop {
            let (now, later) = rest.split_at(rest.len().min(0xff_ffff));
            let mut packet = (now.len() as u32).to_le_bytes().to_vec();
            packet[3] = self.sequence;
            self.sequence = self.sequence.wrapping_add(1);
            packet.extend_from_slice(now);
            self.stream.write_all(&packet).await.map_err(lost)?;
            if now.len() < 0xff_ffff {
                return Ok(());
            }
            rest = later;
        }
    }

    async fn query(&mut self, statement: &str) -> Result<Answer, String> {
        self.sequence = 0;
        self.write(&[&[0x03], statement.as_bytes()].concat()).await?;
        let first = self.read().await?;
        match first.first() {
            Some(0x00) => Ok(Answer::Changed(Reader(&first[1..]).number().unwrap_or(0))),
            Some(0xff) => Err(refusal(&first).unwrap_or_default()),
            Some(0xfb) => Err("files of the client are not sent".into()),
            _ => self.rows(Reader(&first).number().ok_or("the answer makes no sense")?).await,
        }
    }

    async fn rows(&mut self, count: u64) -> Result<Answer, String> {
        let nonsense = || "the answer makes no sense".to_owned();
        let mut columns = Vec::new();
        for _ in 0..count {
            let packet = self.read().await?;
            let mut reader = Reader(&packet);
            // Catalog, schema, table and the table's own name come before.
            let mut name = None;
            for _ in 0..5 {
                name = reader.text().flatten();
            }
            columns.push(name.ok_or_else(nonsense)?);
        }
        // Where the columns end.
        self.read().await?;
        let (mut rows, mut size) = (Vec::new(), 0);
        loop {
            let packet = self.read().await?;
            match packet.first() {
                Some(0xfe) if packet.len() < 9 => return Ok(Answer::Rows(columns, rows)),
                Some(0xff) => return Err(refusal(&packet).unwrap_or_default()),
                _ => {}
            }
            size += packet.len();
            if size > LIMIT {
                return Err(format!("the result has more than {LIMIT} bytes"));
            }
            let mut reader = Reader(&packet);
            let row: Option<Vec<_>> = (0..count).map(|_| reader.text()).collect();
            rows.push(row.ok_or_else(nonsense)?);
        }
    }
}

/// The text of an error packet.
fn refusal(packet: &[u8]) -> Option<String> {
    let rest = packet.strip_prefix(&[0xff])?;
    let code = u16::from_le_bytes([*rest.first()?, *rest.get(1)?]);
    let text = rest.get(2..)?;
    let text = if text.first() == Some(&b'#') { text.get(6..)? } else { text };
    Some(format!("Error {code}: {}", String::from_utf8_lossy(text)))
}

/// Reads numbers and texts of encoded length.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take(&mut self, length: usize) -> Option<&[u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u64> {
        let length = match self.take(1)?[0] {
            0xfc => 2,
            0xfd => 3,
            0xfe => 8,
            0xfb | 0xff => return None,
            small => return Some(small.into()),
        };
        let mut bytes = [0; 8];
        bytes[..length].copy_from_slice(self.take(length)?);
        Some(u64::from_le_bytes(bytes))
    }

    /// A text, or that there is none.
    #[allow(clippy::option_option, reason = "the outer one is whether it could be read")]
    fn text(&mut self) -> Option<Option<String>> {
        if self.0.first() == Some(&0xfb) {
            self.take(1)?;
            return Some(None);
        }
        let length = usize::try_from(self.number()?).ok()?;
        self.take(length).map(|bytes| Some(String::from_utf8_lossy(bytes).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_texts_of_any_length_are_read() {
        let mut reader =
            Reader(&[5, 0xfc, 1, 2, 0xfd, 1, 0, 1, 0xfe, 1, 0, 0, 0, 0, 0, 0, 0, 0xfb, 2, b'h', b'i', 9, b'x']);
        assert_eq!([reader.number(), reader.number(), reader.number(), reader.number()], [5, 513, 65537, 1].map(Some));
        assert_eq!(reader.text(), Some(None));
        assert_eq!(reader.text(), Some(Some("hi".into())));
        assert_eq!(reader.text(), None);
    }

    #[test]
    fn an_error_has_its_number_and_text() {
        assert_eq!(refusal(b"\xff\x28\x04#42000syntax").as_deref(), Some("Error 1064: syntax"));
        assert_eq!(refusal(b"\x00"), None);
        assert_eq!(refusal(b"\xff\x28"), None);
    }
}
