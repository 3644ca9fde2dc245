//! The messages of the two services, as tables: from them both encodings, protobuf's own and its JSON, are read and written.
//!
//! Inside, a message is a JSON value in protobuf's JSON form: names in lowerCamelCase, bytes in base64, 64-bit numbers as
//! texts, enumerations by their names, defaults left out.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::general_purpose::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Map, Value, json};

/// A message's fields.
#[derive(Debug)]
pub(super) struct Message(pub(super) &'static [Field]);

/// A field: its number, its name in JSON, what it is, whether there may be many.
#[derive(Debug)]
pub(super) struct Field(pub(super) u32, pub(super) &'static str, pub(super) Kind, pub(super) bool);

/// What a field is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Text,
    Bytes,
    Bool,
    Uint32,
    Sint32,
    Int64,
    /// Names by their numbers.
    Enum(&'static [(i32, &'static str)]),
    Message(&'static Message),
    /// Texts by texts.
    Map,
    /// `google.protobuf.Timestamp`.
    Time,
}

use Kind::{Bool, Bytes, Int64, Map as TextMap, Message as Sub, Sint32, Text, Time, Uint32};

const fn one(number: u32, name: &'static str, kind: Kind) -> Field {
    Field(number, name, kind, false)
}

const fn many(number: u32, name: &'static str, kind: Kind) -> Field {
    Field(number, name, kind, true)
}

macro_rules! messages {
    ($($name:ident = [$($field:expr),* $(,)?];)*) => {
        $(pub(super) static $name: Message = Message(&[$($field),*]);)*
    };
}

messages! {
    EMPTY = [];
    SIZE = [one(1, "cols", Uint32), one(2, "rows", Uint32)];
    PTY = [one(1, "size", Sub(&SIZE))];
    CONFIG = [one(1, "cmd", Text), many(2, "args", Text), one(3, "envs", TextMap), one(4, "cwd", Text)];
    SELECTOR = [one(1, "pid", Uint32), one(2, "tag", Text)];
    INFO = [one(1, "config", Sub(&CONFIG)), one(2, "pid", Uint32), one(3, "tag", Text)];
    LIST_RESPONSE = [many(1, "processes", Sub(&INFO))];
    START_REQUEST = [one(1, "process", Sub(&CONFIG)), one(2, "pty", Sub(&PTY)), one(3, "tag", Text), one(4, "stdin", Bool)];
    STARTED = [one(1, "pid", Uint32)];
    DATA = [one(1, "stdout", Bytes), one(2, "stderr", Bytes), one(3, "pty", Bytes)];
    END = [one(1, "exitCode", Sint32), one(2, "exited", Bool), one(3, "status", Text), one(4, "error", Text)];
    EVENT = [one(1, "start", Sub(&STARTED)), one(2, "data", Sub(&DATA)), one(3, "end", Sub(&END)), one(4, "keepalive", Sub(&EMPTY))];
    EVENT_RESPONSE = [one(1, "event", Sub(&EVENT))];
    SELECT = [one(1, "process", Sub(&SELECTOR))];
    UPDATE_REQUEST = [one(1, "process", Sub(&SELECTOR)), one(2, "pty", Sub(&PTY))];
    INPUT = [one(1, "stdin", Bytes), one(2, "pty", Bytes)];
    INPUT_REQUEST = [one(1, "process", Sub(&SELECTOR)), one(2, "input", Sub(&INPUT))];
    STREAM_DATA = [one(2, "input", Sub(&INPUT))];
    STREAM_REQUEST = [one(1, "start", Sub(&SELECT)), one(2, "data", Sub(&STREAM_DATA)), one(3, "keepalive", Sub(&EMPTY))];
    SIGNAL_REQUEST = [one(1, "process", Sub(&SELECTOR)), one(2, "signal", Kind::Enum(SIGNALS))];
    ENTRY = [
        one(1, "name", Text), one(2, "type", Kind::Enum(FILE_TYPES)), one(3, "path", Text), one(4, "size", Int64),
        one(5, "mode", Uint32), one(6, "permissions", Text), one(7, "owner", Text), one(8, "group", Text),
        one(9, "modifiedTime", Time), one(10, "symlinkTarget", Text), one(11, "metadata", TextMap),
    ];
    PATH = [one(1, "path", Text)];
    ENTRY_RESPONSE = [one(1, "entry", Sub(&ENTRY))];
    MOVE_REQUEST = [one(1, "source", Text), one(2, "destination", Text)];
    LIST_DIR_REQUEST = [one(1, "path", Text), one(2, "depth", Uint32)];
    LIST_DIR_RESPONSE = [many(1, "entries", Sub(&ENTRY))];
    WATCH_REQUEST = [
        one(1, "path", Text), one(2, "recursive", Bool), one(3, "includeEntry", Bool), one(4, "allowNetworkMounts", Bool),
    ];
    CHANGE = [one(1, "name", Text), one(2, "type", Kind::Enum(CHANGES)), one(3, "entry", Sub(&ENTRY))];
    WATCH_RESPONSE = [one(1, "start", Sub(&EMPTY)), one(2, "filesystem", Sub(&CHANGE)), one(3, "keepalive", Sub(&EMPTY))];
    WATCHER = [one(1, "watcherId", Text)];
    CHANGES_RESPONSE = [many(1, "events", Sub(&CHANGE))];
}

/// `process.Signal`.
const SIGNALS: &[(i32, &str)] = &[(0, "SIGNAL_UNSPECIFIED"), (9, "SIGNAL_SIGKILL"), (15, "SIGNAL_SIGTERM")];

/// `filesystem.FileType`.
const FILE_TYPES: &[(i32, &str)] =
    &[(0, "FILE_TYPE_UNSPECIFIED"), (1, "FILE_TYPE_FILE"), (2, "FILE_TYPE_DIRECTORY"), (3, "FILE_TYPE_SYMLINK")];

/// `filesystem.EventType`.
const CHANGES: &[(i32, &str)] = &[
    (0, "EVENT_TYPE_UNSPECIFIED"),
    (1, "EVENT_TYPE_CREATE"),
    (2, "EVENT_TYPE_WRITE"),
    (3, "EVENT_TYPE_REMOVE"),
    (4, "EVENT_TYPE_RENAME"),
    (5, "EVENT_TYPE_CHMOD"),
];

/// Reads base64 of both alphabets, with padding or without.
pub(super) fn bytes(text: &str) -> Option<Vec<u8>> {
    const LENIENT: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    const STANDARD_LENIENT: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
    const URL_LENIENT: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);
    STANDARD_LENIENT.decode(text).or_else(|_| URL_LENIENT.decode(text)).ok()
}

/// Writes base64.
pub(super) fn text(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn camel(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                out.extend(c.to_uppercase());
                upper = false;
            }
            c => out.push(c),
        }
    }
    out
}

/// Reads a message in JSON.
///
/// # Errors
/// What does not fit.
pub(super) fn from_json(message: &Message, value: &Value) -> Result<Value, String> {
    let Value::Object(given) = value else { return Err("a message is a JSON object".into()) };
    let mut out = Map::new();
    for (name, value) in given {
        if value.is_null() {
            continue;
        }
        let name = camel(name);
        // What is unknown is left alone.
        let Some(Field(_, known, kind, repeated)) = message.0.iter().find(|field| field.1 == name) else { continue };
        let read = |value: &Value| read(*kind, value).map_err(|e| format!("{known}: {e}"));
        let value = match (repeated, value) {
            (false, value) => read(value)?,
            (true, Value::Array(list)) => Value::Array(list.iter().map(read).collect::<Result<_, _>>()?),
            (true, _) => return Err(format!("{known}: it is a list")),
        };
        out.insert((*known).to_owned(), value);
    }
    Ok(Value::Object(out))
}

fn read(kind: Kind, value: &Value) -> Result<Value, String> {
    let number = || match value {
        Value::Number(number) => number.as_i64().or_else(|| {
            number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < 9e15).map(|float| float as i64)
        }),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    let wrong = |what: &str| format!("{value} is not {what}");
    Ok(match kind {
        Text => value.as_str().ok_or_else(|| wrong("a text"))?.into(),
        Bool => value.as_bool().ok_or_else(|| wrong("true or false"))?.into(),
        Bytes => {
            let decoded = value.as_str().and_then(bytes).ok_or_else(|| wrong("base64"))?;
            text(&decoded).into()
        }
        Uint32 => number().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| wrong("a number that fits"))?.into(),
        Sint32 => number().and_then(|n| i32::try_from(n).ok()).ok_or_else(|| wrong("a number that fits"))?.into(),
        Int64 => number().ok_or_else(|| wrong("a number"))?.to_string().into(),
        Kind::Enum(names) => match value {
            Value::String(name) => {
                names.iter().find(|(_, known)| known == name).ok_or_else(|| wrong("a name that is known"))?.1.into()
            }
            _ => named(names, number().and_then(|n| i32::try_from(n).ok()).ok_or_else(|| wrong("a name"))?),
        },
        Sub(message) => from_json(message, value)?,
        TextMap => {
            let map = value.as_object().ok_or_else(|| wrong("an object"))?;
            if !map.values().all(Value::is_string) {
                return Err(wrong("an object of texts"));
            }
            value.clone()
        }
        Time => value.as_str().ok_or_else(|| wrong("a time"))?.into(),
    })
}

fn named(names: &[(i32, &'static str)], number: i32) -> Value {
    match names.iter().find(|(known, _)| *known == number) {
        Some((_, name)) => (*name).into(),
        None => number.into(),
    }
}

/// Reads a message in protobuf's own encoding.
///
/// # Errors
/// What does not fit.
pub(super) fn from_protobuf(message: &Message, bytes: &[u8]) -> Result<Value, String> {
    let cut = || "the message is cut off".to_owned();
    let mut out = Map::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let key = varint(&mut rest).ok_or_else(cut)?;
        let number = u32::try_from(key >> 3).map_err(|_| cut())?;
        let (mut scalar, mut payload) = (0, &[][..]);
        match key & 7 {
            0 => scalar = varint(&mut rest).ok_or_else(cut)?,
            1 => take(&mut rest, 8).map(drop).ok_or_else(cut)?,
            2 => {
                let length = varint(&mut rest).and_then(|length| usize::try_from(length).ok()).ok_or_else(cut)?;
                payload = take(&mut rest, length).ok_or_else(cut)?;
            }
            5 => take(&mut rest, 4).map(drop).ok_or_else(cut)?,
            _ => return Err("an unknown wire type".into()),
        }
        let Some(Field(_, name, kind, repeated)) = message.0.iter().find(|field| field.0 == number) else { continue };
        let is_bytes = matches!(kind, Text | Bytes | Sub(_) | TextMap | Time);
        if is_bytes != (key & 7 == 2) {
            return Err(format!("{name}: another wire type"));
        }
        let value = match kind {
            Text => std::str::from_utf8(payload).map_err(|_| format!("{name}: it is not UTF-8"))?.into(),
            Bytes => text(payload).into(),
            Bool => (scalar != 0).into(),
            Uint32 => (scalar as u32).into(),
            Sint32 => ((scalar as u32 >> 1) as i32 ^ -((scalar & 1) as i32)).into(),
            Int64 => (scalar as i64).to_string().into(),
            Kind::Enum(names) => named(names, scalar as i32),
            Sub(message) => from_protobuf(message, payload)?,
            Time => continue,
            TextMap => {
                let pair = from_protobuf(&PAIR, payload)?;
                let part = |name: &str| pair[name].as_str().unwrap_or_default().to_owned();
                let entry = out.entry((*name).to_owned()).or_insert_with(|| json!({}));
                entry[part("key")] = part("value").into();
                continue;
            }
        };
        if *repeated {
            if let Some(list) = out.entry((*name).to_owned()).or_insert_with(|| json!([])).as_array_mut() {
                list.push(value);
            }
        } else {
            out.insert((*name).to_owned(), value);
        }
    }
    Ok(Value::Object(out))
}

/// An entry of a map.
static PAIR: Message = Message(&[one(1, "key", Text), one(2, "value", Text)]);

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(taken)
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut out = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(rest, 1)?[0];
        out |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(out);
        }
    }
    None
}

/// Writes a message in protobuf's own encoding.
pub(super) fn to_protobuf(message: &Message, value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    for Field(number, name, kind, repeated) in message.0 {
        let value = &value[*name];
        match value {
            Value::Null => {}
            Value::Array(list) if *repeated => list.iter().for_each(|value| write(&mut out, *number, *kind, value)),
            value => write(&mut out, *number, *kind, value),
        }
    }
    out
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn write(out: &mut Vec<u8>, number: u32, kind: Kind, value: &Value) {
    let mut scalar = |value: u64| {
        put(out, u64::from(number) << 3);
        put(out, value);
    };
    let payload = match kind {
        Bool => return scalar(value.as_bool().unwrap_or_default().into()),
        Uint32 => return scalar(value.as_u64().unwrap_or_default()),
        Sint32 => {
            let value = value.as_i64().unwrap_or_default() as i32;
            return scalar(u64::from((value << 1 ^ value >> 31) as u32));
        }
        Int64 => return scalar(value.as_str().and_then(|text| text.parse::<i64>().ok()).unwrap_or_default() as u64),
        Kind::Enum(names) => {
            let name = value.as_str().unwrap_or_default();
            return scalar(names.iter().find(|(_, known)| *known == name).map_or(0, |(number, _)| *number) as u64);
        }
        Text => value.as_str().unwrap_or_default().as_bytes().to_vec(),
        Bytes => value.as_str().and_then(bytes).unwrap_or_default(),
        Sub(message) => to_protobuf(message, value),
        Time => timestamp(value.as_str().unwrap_or_default()),
        TextMap => {
            for (key, value) in value.as_object().into_iter().flatten() {
                let pair = to_protobuf(&PAIR, &json!({"key": key, "value": value}));
                put(out, u64::from(number) << 3 | 2);
                put(out, pair.len() as u64);
                out.extend_from_slice(&pair);
            }
            return;
        }
    };
    put(out, u64::from(number) << 3 | 2);
    put(out, payload.len() as u64);
    out.extend_from_slice(&payload);
}

/// Seconds and nanoseconds since 1970.
fn timestamp(text: &str) -> Vec<u8> {
    let since = humantime::parse_rfc3339(text).ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
    let since = since.unwrap_or_default();
    let mut out = Vec::new();
    for (number, value) in [(1u64, since.as_secs()), (2, since.subsec_nanos().into())] {
        if value > 0 {
            put(&mut out, number << 3);
            put(&mut out, value);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_encodings_say_the_same() {
        let value = json!({
            "process": {"cmd": "/bin/sh", "args": ["-c", "ä"], "envs": {"A": "1", "B": ""}, "cwd": "/"},
            "pty": {"size": {"cols": 80, "rows": 24}},
            "tag": "t",
            "stdin": false,
        });
        let bytes = to_protobuf(&START_REQUEST, &value);
        assert_eq!(from_protobuf(&START_REQUEST, &bytes).unwrap(), value);
        assert_eq!(from_json(&START_REQUEST, &value).unwrap(), value);
        let end = json!({"exitCode": -1, "exited": false, "status": "signal: killed"});
        assert_eq!(from_protobuf(&END, &to_protobuf(&END, &end)).unwrap(), end);
        assert_eq!(to_protobuf(&END, &json!({"exitCode": -1})), [8, 1]);
    }

    #[test]
    fn json_is_taken_in_all_forms_that_protobuf_allows() {
        let given = json!({"include_entry": true, "path": "/x", "recursive": null, "unknown": [1]});
        assert_eq!(from_json(&WATCH_REQUEST, &given).unwrap(), json!({"includeEntry": true, "path": "/x"}));
        let signal =
            |signal: Value| from_json(&SIGNAL_REQUEST, &json!({"signal": signal})).map(|out| out["signal"].clone());
        assert_eq!(signal(json!(9)).unwrap(), "SIGNAL_SIGKILL");
        assert_eq!(signal(json!("SIGNAL_SIGTERM")).unwrap(), "SIGNAL_SIGTERM");
        assert!(signal(json!("SIGHUP")).is_err());
        for data in ["aGkK", "_-8", "/+8="] {
            assert!(from_json(&INPUT, &json!({"stdin": data})).is_ok(), "{data}");
        }
        for wrong in [json!({"stdin": 7}), json!({"stdin": "!"})] {
            assert!(from_json(&INPUT, &wrong).is_err(), "{wrong}");
        }
        assert_eq!(from_json(&SELECTOR, &json!({"pid": "42"})).unwrap(), json!({"pid": 42}));
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        let bytes = to_protobuf(&SELECTOR, &json!({"tag": "text"}));
        for length in 1..bytes.len() {
            assert!(from_protobuf(&SELECTOR, &bytes[..length]).is_err(), "{length}");
        }
        assert!(from_protobuf(&SELECTOR, &[0xff; 12]).is_err());
    }
}
