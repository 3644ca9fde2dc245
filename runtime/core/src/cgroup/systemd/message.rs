//! D-Bus messages: just what a conversation with systemd takes.

use std::io;

/// A value of D-Bus.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::cgroup) enum Value {
    Bool(bool),
    Byte(u8),
    I16(i16),
    U16(u16),
    I32(i32),
    U32(u32),
    I64(i64),
    U64(u64),
    Double(f64),
    Text(String),
    Path(String),
    Signature(String),
    /// The signature of an element, and the elements.
    Array(String, Vec<Value>),
    Struct(Vec<Value>),
    Entry(Box<(Value, Value)>),
    Variant(Box<Value>),
}

impl Value {
    /// The type's code.
    pub(in crate::cgroup) fn signature(&self) -> String {
        let code = match self {
            Self::Bool(_) => "b",
            Self::Byte(_) => "y",
            Self::I16(_) => "n",
            Self::U16(_) => "q",
            Self::I32(_) => "i",
            Self::U32(_) => "u",
            Self::I64(_) => "x",
            Self::U64(_) => "t",
            Self::Double(_) => "d",
            Self::Text(_) => "s",
            Self::Path(_) => "o",
            Self::Signature(_) => "g",
            Self::Variant(_) => "v",
            Self::Array(element, _) => return format!("a{element}"),
            Self::Struct(fields) => {
                return format!("({})", fields.iter().map(Self::signature).collect::<String>());
            }
            Self::Entry(entry) => return format!("{{{}{}}}", entry.0.signature(), entry.1.signature()),
        };
        code.to_owned()
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Bool(value) => put(out, &u32::from(*value).to_ne_bytes()),
            Self::Byte(value) => out.push(*value),
            Self::I16(value) => put(out, &value.to_ne_bytes()),
            Self::U16(value) => put(out, &value.to_ne_bytes()),
            Self::I32(value) => put(out, &value.to_ne_bytes()),
            Self::U32(value) => put(out, &value.to_ne_bytes()),
            Self::I64(value) => put(out, &value.to_ne_bytes()),
            Self::U64(value) => put(out, &value.to_ne_bytes()),
            Self::Double(value) => put(out, &value.to_ne_bytes()),
            Self::Text(text) | Self::Path(text) => {
                put(out, &(text.len() as u32).to_ne_bytes());
                out.extend_from_slice(text.as_bytes());
                out.push(0);
            }
            Self::Signature(text) => put_signature(out, text),
            Self::Array(element, elements) => {
                put(out, &0u32.to_ne_bytes());
                let length_at = out.len() - 4;
                // The padding before the first element does not count, and is there without elements, too.
                align(out, alignment(element));
                let start = out.len();
                for element in elements {
                    element.write(out);
                }
                let length = (out.len() - start) as u32;
                out[length_at..length_at + 4].copy_from_slice(&length.to_ne_bytes());
            }
            Self::Struct(fields) => {
                align(out, 8);
                for field in fields {
                    field.write(out);
                }
            }
            Self::Entry(entry) => {
                align(out, 8);
                entry.0.write(out);
                entry.1.write(out);
            }
            Self::Variant(value) => {
                put_signature(out, &value.signature());
                value.write(out);
            }
        }
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

fn align(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

/// A number, aligned to its own size.
fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    align(out, bytes.len());
    out.extend_from_slice(bytes);
}

fn put_signature(out: &mut Vec<u8>, text: &str) {
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
    out.push(0);
}

fn alignment(signature: &str) -> usize {
    match signature.as_bytes().first() {
        Some(b'x' | b't' | b'd' | b'(' | b'{') => 8,
        Some(b'b' | b'i' | b'u' | b's' | b'o' | b'a') => 4,
        Some(b'n' | b'q') => 2,
        _ => 1,
    }
}

/// The mark of this machine's byte order.
const ORDER: u8 = if cfg!(target_endian = "little") { b'l' } else { b'B' };

/// The fixed part of a message, and the length of its fields.
pub(super) const HEAD: usize = 16;

/// No honest message of systemd's comes near this size.
const LIMIT: usize = 16 << 20;

/// A call of a method.
pub(super) struct Call<'a> {
    pub(super) destination: &'a str,
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) member: &'a str,
    pub(super) arguments: &'a [Value],
}

impl Call<'_> {
    /// The message's bytes.
    pub(super) fn encode(&self, serial: u32) -> Vec<u8> {
        let mut body = Vec::new();
        for argument in self.arguments {
            argument.write(&mut body);
        }
        let field = |code: u8, value: Value| Value::Struct(vec![Value::Byte(code), Value::Variant(Box::new(value))]);
        let mut fields = vec![
            field(1, Value::Path(self.path.to_owned())),
            field(2, self.interface.into()),
            field(3, self.member.into()),
            field(6, self.destination.into()),
        ];
        if !self.arguments.is_empty() {
            fields.push(field(8, Value::Signature(self.arguments.iter().map(Value::signature).collect())));
        }
        const METHOD_CALL: u8 = 1;
        const VERSION: u8 = 1;
        let mut out = vec![ORDER, METHOD_CALL, 0, VERSION];
        put(&mut out, &(body.len() as u32).to_ne_bytes());
        put(&mut out, &serial.to_ne_bytes());
        Value::Array("(yv)".to_owned(), fields).write(&mut out);
        align(&mut out, 8);
        out.extend_from_slice(&body);
        out
    }
}

/// What a message that came in is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The answer to a call.
    Return,
    /// The refusal of a call, by the name of the error.
    Error(String),
    /// A signal, by its member.
    Signal(String),
    /// Anything else.
    Other,
}

/// A message that came in.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) kind: Kind,
    /// The call that it answers.
    pub(super) reply_to: u32,
    body: Vec<u8>,
    body_at: usize,
}

/// The length of a message, from its first [`HEAD`] bytes.
pub(super) fn length(head: &[u8]) -> io::Result<usize> {
    if head[0] != ORDER {
        return Err(malformed("another byte order"));
    }
    let mut reader = Reader { data: head, at: 4 };
    let body = reader.u32()? as usize;
    reader.u32()?;
    let fields = reader.u32()? as usize;
    let total = HEAD + fields.next_multiple_of(8) + body;
    if fields > LIMIT || body > LIMIT { Err(malformed("too long")) } else { Ok(total) }
}

impl Incoming {
    /// Reads a whole message.
    pub(super) fn decode(data: Vec<u8>) -> io::Result<Self> {
        let mut reader = Reader { data: &data, at: 12 };
        let fields_end = HEAD + reader.u32()? as usize;
        let (mut member, mut error, mut reply_to) = (String::new(), String::new(), 0);
        while reader.at < fields_end {
            reader.align(8);
            let code = reader.byte()?;
            let signature = reader.signature()?;
            match (code, signature.as_str()) {
                (3, "s") => member = reader.text()?,
                (4, "s") => error = reader.text()?,
                (5, "u") => reply_to = reader.u32()?,
                (_, "s" | "o") => drop(reader.text()?),
                (_, "g") => drop(reader.signature()?),
                (_, "u") => drop(reader.u32()?),
                _ => return Err(malformed("an unknown header field")),
            }
        }
        let kind = match data[1] {
            2 => Kind::Return,
            3 => Kind::Error(error),
            4 => Kind::Signal(member),
            _ => Kind::Other,
        };
        Ok(Self { kind, reply_to, body_at: fields_end.next_multiple_of(8), body: data })
    }

    /// Reads the body from its beginning.
    pub(super) fn body(&self) -> Reader<'_> {
        // Alignment counts from the beginning of the body, which is itself aligned.
        Reader { data: self.body.get(self.body_at..).unwrap_or_default(), at: 0 }
    }
}

fn malformed(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed D-Bus message: {why}"))
}

/// Reads values one after the other.
pub(super) struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> io::Result<&[u8]> {
        let end = self.at.checked_add(length).ok_or_else(|| malformed("too long"))?;
        let taken = self.data.get(self.at..end).ok_or_else(|| malformed("it ends early"))?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?[0])
    }

    /// A number.
    pub(super) fn u32(&mut self) -> io::Result<u32> {
        self.align(4);
        let mut bytes = [0; 4];
        bytes.copy_from_slice(self.take(4)?);
        Ok(u32::from_ne_bytes(bytes))
    }

    /// A text, or an object's path.
    pub(super) fn text(&mut self) -> io::Result<String> {
        let length = self.u32()? as usize;
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.take(1)?;
        Ok(text)
    }

    /// A signature.
    pub(super) fn signature(&mut self) -> io::Result<String> {
        let length = usize::from(self.byte()?);
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.take(1)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_padded_to_their_alignment() {
        let mut out = Vec::new();
        Value::Byte(7).write(&mut out);
        Value::Struct(vec!["ab".into(), Value::U64(1)]).write(&mut out);
        assert_eq!(out.len(), 8 + 4 + 3 + 1 + 8);
        assert_eq!(Value::Struct(vec!["ab".into(), Value::U64(1)]).signature(), "(st)");
        // The length of an array counts neither the padding nor itself.
        let mut out = Vec::new();
        Value::Array("t".into(), vec![Value::U64(5)]).write(&mut out);
        assert_eq!(out[..4], 8u32.to_ne_bytes());
        assert_eq!(out.len(), 16);
    }

    #[test]
    fn a_call_is_read_back_with_its_fields() {
        let call = Call {
            destination: "org.freedesktop.systemd1",
            path: "/org/freedesktop/systemd1",
            interface: "org.freedesktop.systemd1.Manager",
            member: "StopUnit",
            arguments: &["a.scope".into(), "replace".into()],
        };
        let mut bytes = call.encode(9);
        assert_eq!(length(&bytes[..HEAD]).unwrap(), bytes.len());
        // As if it were a signal, whose member is what a reader looks at.
        bytes[1] = 4;
        let read = Incoming::decode(bytes).unwrap();
        assert_eq!(read.kind, Kind::Signal("StopUnit".into()));
        let mut body = read.body();
        assert_eq!((body.text().unwrap().as_str(), body.text().unwrap().as_str()), ("a.scope", "replace"));
    }

    #[test]
    fn a_message_that_is_cut_or_foreign_is_an_error() {
        let call = Call { destination: "d", path: "/", interface: "i", member: "m", arguments: &[] };
        let bytes = call.encode(1);
        for end in HEAD..bytes.len() - 8 {
            assert!(Incoming::decode(bytes[..end].to_vec()).is_err(), "{end}");
        }
        assert!(length(&[0xff; HEAD]).is_err());
    }
}
