//! Reading requests as the protocol's own daemon does: the first JSON value of a body counts, names of fields match
//! whatever their case, `null` is as good as nothing, and what is unknown is left alone.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::error::{Refusal, Result};
use crate::api::query::Query;

/// The fields of an object.
#[derive(Debug, Default)]
pub(super) struct Fields(Map<String, Value>);

/// The first JSON value of a body.
///
/// # Errors
/// When there is none.
pub(super) fn value(body: &[u8]) -> Result<Value> {
    match serde_json::Deserializer::from_slice(body).into_iter::<Value>().next() {
        Some(Ok(value)) => Ok(value),
        Some(Err(e)) => Err(Refusal::body(format!("error parsing request body: {e}"))),
        None => Err(Refusal::body("error parsing request body: EOF")),
    }
}

/// The object in a body.
///
/// # Errors
/// When there is none.
pub(super) fn fields(body: &[u8]) -> Result<Fields> {
    Fields::of(value(body)?)
}

/// The object in a body; an empty body is an empty object.
///
/// # Errors
/// When there is something else.
pub(super) fn fields_or_none(body: &[u8]) -> Result<Fields> {
    if body.trim_ascii().is_empty() { Ok(Fields::default()) } else { fields(body) }
}

impl Fields {
    /// Of a value.
    ///
    /// # Errors
    /// When it is no object.
    pub(super) fn of(value: Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self(map)),
            Value::Null => Ok(Self::default()),
            other => {
                Err(Refusal::body(format!("error parsing request body: expected an object, found {}", kind(&other))))
            }
        }
    }

    fn find(&self, name: &str) -> Option<&Value> {
        let exact = self.0.get(name);
        let found =
            exact.or_else(|| self.0.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value));
        found.filter(|value| !value.is_null())
    }

    /// A text.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn text(&self, name: &str) -> Result<Option<String>> {
        match self.find(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(wrong(name, "a string", other)),
        }
    }

    /// A whole number.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn number(&self, name: &str) -> Result<Option<i64>> {
        match self.find(name) {
            None => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| wrong(name, "an integer", value)),
        }
    }

    /// A user's or group's number.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn id(&self, name: &str) -> Result<Option<u32>> {
        match self.find(name) {
            None => Ok(None),
            Some(value) => {
                let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| *id != u32::MAX);
                id.map(Some).ok_or_else(|| wrong(name, "an integer from 0 to 4294967294", value))
            }
        }
    }

    /// Yes or no; no if it is missing.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn flag(&self, name: &str) -> Result<bool> {
        match self.find(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| wrong(name, "a boolean", value)),
        }
    }

    /// Whether it is there at all.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.keys().any(|key| key.eq_ignore_ascii_case(name))
    }

    /// A list of texts.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn texts(&self, name: &str) -> Result<Option<Vec<String>>> {
        match self.find(name) {
            None => Ok(None),
            Some(Value::Array(list)) => list
                .iter()
                .map(|item| item.as_str().map(str::to_owned).ok_or_else(|| wrong(name, "an array of strings", item)))
                .collect::<Result<_>>()
                .map(Some),
            Some(other) => Err(wrong(name, "an array of strings", other)),
        }
    }

    /// Names and texts.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn map(&self, name: &str) -> Result<BTreeMap<String, String>> {
        match self.find(name) {
            None => Ok(BTreeMap::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(key, value)| match value {
                    Value::String(text) => Ok((key.clone(), text.clone())),
                    Value::Null => Ok((key.clone(), String::new())),
                    other => Err(wrong(&format!("{name}.{key}"), "a string", other)),
                })
                .collect(),
            Some(other) => Err(wrong(name, "an object", other)),
        }
    }

    /// An object within.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn object(&self, name: &str) -> Result<Option<Self>> {
        self.find(name).cloned().map(Self::of).transpose()
    }

    /// All of it, in the order of its names.
    pub(super) fn entries(self) -> impl Iterator<Item = (String, Value)> {
        self.0.into_iter()
    }
}

fn wrong(name: &str, wanted: &str, found: &Value) -> Refusal {
    Refusal::body(format!("error parsing request body: {name} is {}, not {wanted}", kind(found)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The first value of a name that is there and not empty.
///
/// # Errors
/// When it is not.
pub(super) fn require<'a>(query: &'a Query, name: &str) -> Result<&'a str> {
    query.get(name).filter(|value| !value.is_empty()).ok_or_else(|| Refusal::query(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_counts_and_case_does_not() {
        let fields = fields(br#"{"Command": "x", "timeout": null, "uid": 7, "unknown": [1]} rubbish"#).unwrap();
        assert_eq!(fields.text("command").unwrap().as_deref(), Some("x"));
        assert_eq!(fields.number("timeout").unwrap(), None);
        assert_eq!(fields.id("uid").unwrap(), Some(7));
        assert!(fields.text("uid").is_err());
        for body in [&b""[..], b"[1]", b"{", b"\"x\""] {
            assert!(super::fields(body).is_err(), "{body:?}");
        }
    }
}
