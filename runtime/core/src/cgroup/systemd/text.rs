//! Values of D-Bus as text, in GVariant's format: what annotations of the form `org.systemd.property.NAME` hold.

use std::iter::Peekable;
use std::str::CharIndices;

use super::message::Value;

type Result<T> = std::result::Result<T, String>;

/// No value that makes sense is nested deeper.
const DEPTH: usize = 32;

/// Reads a value: `'text'`, `true`, `5`, `uint64 5`, `[1, 2]`, `@a(ss) [('a', 'b')]`, `<5>`, `{'key': <1>}`.
pub(super) fn parse(text: &str) -> Result<Value> {
    let mut parser = Parser { text, rest: text.char_indices().peekable(), depth: 0 };
    let value = parser.value(None)?;
    parser.space();
    match parser.rest.next() {
        None => Ok(value),
        Some((at, _)) => Err(format!("{:?} follows the value", &text[at..])),
    }
}

struct Parser<'a> {
    text: &'a str,
    rest: Peekable<CharIndices<'a>>,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn space(&mut self) {
        while self.rest.next_if(|(_, c)| c.is_whitespace()).is_some() {}
    }

    fn next_is(&mut self, wanted: char) -> bool {
        self.space();
        self.rest.next_if(|(_, c)| *c == wanted).is_some()
    }

    fn expect(&mut self, wanted: char) -> Result<()> {
        if self.next_is(wanted) { Ok(()) } else { Err(format!("{wanted:?} is missing")) }
    }

    fn while_in(&mut self, mut test: impl FnMut(char) -> bool) -> &'a str {
        let start = self.rest.peek().map_or(self.text.len(), |(at, _)| *at);
        while self.rest.next_if(|(_, c)| test(*c)).is_some() {}
        let end = self.rest.peek().map_or(self.text.len(), |(at, _)| *at);
        &self.text[start..end]
    }

    /// Reads a value of the type that is expected, or of the one that it shows.
    fn value(&mut self, expected: Option<&str>) -> Result<Value> {
        self.depth += 1;
        if self.depth > DEPTH {
            return Err("it is nested too deeply".into());
        }
        self.space();
        let value = match self.rest.peek().map(|(_, c)| *c) {
            None => Err("the value is missing".into()),
            Some('\'' | '"') => self.quoted().and_then(|text| textual(text, expected)),
            Some('[') => self.array(expected),
            Some('(') => self.tuple(expected),
            Some('{') => self.dictionary(expected),
            Some('<') => self.variant(),
            Some('@') => {
                self.rest.next();
                let signature = self.while_in(|c| c.is_ascii_alphabetic() || "(){}".contains(c)).to_owned();
                // The longest that D-Bus allows.
                if signature.len() > 255 || one(&signature).is_none_or(|(_, rest)| !rest.is_empty()) {
                    return Err(format!("{signature:?} is not one type"));
                }
                self.value(Some(&signature))
            }
            Some(c) if c.is_ascii_digit() || "+-.".contains(c) => {
                let digits = self.while_in(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
                number(digits, expected)
            }
            Some(_) => self.word(expected),
        }?;
        self.depth -= 1;
        match expected {
            Some(expected) if value.signature() != expected => {
                Err(format!("it is of type {:?} and not {expected:?}", value.signature()))
            }
            _ => Ok(value),
        }
    }

    /// `true`, `false`, or the name of a type before a value.
    fn word(&mut self, expected: Option<&str>) -> Result<Value> {
        let word = self.while_in(|c| c.is_ascii_alphanumeric() || c == '_');
        let signature = match word {
            "true" => return Ok(Value::Bool(true)),
            "false" => return Ok(Value::Bool(false)),
            // A text of bytes, which ends with a zero.
            "b" if matches!(self.rest.peek(), Some((_, '\'' | '"'))) => {
                let bytes = self.quoted()?.into_bytes().into_iter().chain([0]).map(Value::Byte).collect();
                return Ok(Value::Array("y".into(), bytes));
            }
            "boolean" => "b",
            "byte" => "y",
            "int16" => "n",
            "uint16" => "q",
            "int32" => "i",
            "uint32" => "u",
            "int64" => "x",
            "uint64" => "t",
            "double" => "d",
            "string" => "s",
            "objectpath" => "o",
            "signature" => "g",
            _ if expected == Some("d") => return number(word, expected),
            _ => return Err(format!("{word:?} is neither a value nor a type")),
        };
        self.value(Some(signature))
    }

    fn quoted(&mut self) -> Result<String> {
        let Some((_, quote)) = self.rest.next() else { return Err("a quote is missing".into()) };
        let mut out = String::new();
        loop {
            match self.rest.next().map(|(_, c)| c) {
                None => return Err("a text does not end".into()),
                Some(c) if c == quote => return Ok(out),
                Some('\\') => match self.rest.next().map(|(_, c)| c) {
                    Some('a') => out.push('\x07'),
                    Some('b') => out.push('\x08'),
                    Some('f') => out.push('\x0c'),
                    Some('n') => out.push('\n'),
                    Some('r') => out.push('\r'),
                    Some('t') => out.push('\t'),
                    Some('v') => out.push('\x0b'),
                    Some('u') => out.push(self.unicode(4)?),
                    Some('U') => out.push(self.unicode(8)?),
                    Some(c) => out.push(c),
                    None => return Err("a text does not end".into()),
                },
                Some(c) => out.push(c),
            }
        }
    }

    fn unicode(&mut self, digits: usize) -> Result<char> {
        let text: String = std::iter::from_fn(|| self.rest.next().map(|(_, c)| c)).take(digits).collect();
        u32::from_str_radix(&text, 16)
            .ok()
            .and_then(char::from_u32)
            .filter(|c| *c != '\0')
            .ok_or_else(|| format!("{text:?} is no character's number"))
    }

    fn array(&mut self, expected: Option<&str>) -> Result<Value> {
        self.expect('[')?;
        let mut element = expected.and_then(|signature| signature.strip_prefix('a')).map(str::to_owned);
        let mut elements = Vec::new();
        while !self.next_is(']') {
            if !elements.is_empty() {
                self.expect(',')?;
            }
            let value = self.value(element.as_deref())?;
            element.get_or_insert_with(|| value.signature());
            elements.push(value);
        }
        let element = element.ok_or("an empty list needs a type: @as []")?;
        Ok(Value::Array(element, elements))
    }

    fn tuple(&mut self, expected: Option<&str>) -> Result<Value> {
        self.expect('(')?;
        let mut expected = expected.and_then(|signature| signature.strip_prefix('(')?.strip_suffix(')'));
        let mut fields = Vec::new();
        while !self.next_is(')') {
            if !fields.is_empty() {
                self.expect(',')?;
                // A tuple of one is written with a comma.
                if self.next_is(')') {
                    break;
                }
            }
            let (first, rest) = expected.and_then(one).unzip();
            fields.push(self.value(first)?);
            expected = rest;
        }
        if fields.is_empty() { Err("D-Bus has no empty tuple".into()) } else { Ok(Value::Struct(fields)) }
    }

    fn dictionary(&mut self, expected: Option<&str>) -> Result<Value> {
        self.expect('{')?;
        let mut entry = expected.and_then(|signature| signature.strip_prefix('a')).map(str::to_owned);
        let mut entries = Vec::new();
        while !self.next_is('}') {
            if !entries.is_empty() {
                self.expect(',')?;
            }
            let inner = entry.as_deref().and_then(|entry| entry.strip_prefix('{')?.strip_suffix('}'));
            let (key, value) = inner.and_then(one).unzip();
            let key = self.value(key)?;
            self.expect(':')?;
            let value = Value::Entry(Box::new((key, self.value(value)?)));
            entry.get_or_insert_with(|| value.signature());
            entries.push(value);
        }
        let entry = entry.ok_or("an empty dictionary needs a type: @a{sv} {}")?;
        Ok(Value::Array(entry, entries))
    }

    fn variant(&mut self) -> Result<Value> {
        self.expect('<')?;
        let value = self.value(None)?;
        self.expect('>')?;
        Ok(Value::Variant(Box::new(value)))
    }
}

/// The first complete type of a signature, and what follows it.
fn one(signature: &str) -> Option<(&str, &str)> {
    let end = match signature.as_bytes().first()? {
        b'a' => 1 + one(&signature[1..])?.0.len(),
        open @ (b'(' | b'{') => {
            let close = if *open == b'(' { ')' } else { '}' };
            let mut rest = &signature[1..];
            while !rest.starts_with(close) {
                rest = one(rest)?.1;
            }
            signature.len() - rest.len() + 1
        }
        code if b"bynqiuxtdsogv".contains(code) => 1,
        _ => return None,
    };
    Some(signature.split_at(end))
}

fn textual(text: String, expected: Option<&str>) -> Result<Value> {
    if text.contains('\0') {
        return Err("a text holds a zero byte".into());
    }
    match expected {
        None | Some("s") => Ok(Value::Text(text)),
        Some("o") => Ok(Value::Path(text)),
        Some("g") => Ok(Value::Signature(text)),
        Some(other) => Err(format!("{text:?} is not of type {other:?}")),
    }
}

/// Decimal, octal after a 0, or hexadecimal after 0x; with a point or an exponent a fraction.
fn number(digits: &str, expected: Option<&str>) -> Result<Value> {
    let bad = || format!("{digits:?} is no number of this type");
    let hexadecimal = digits.trim_start_matches(['+', '-']).starts_with("0x");
    if expected == Some("d") || expected.is_none() && !hexadecimal && digits.contains(['.', 'e', 'E']) {
        return digits.parse().map(Value::Double).map_err(|_| bad());
    }
    let (negative, magnitude) = match digits.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, digits.strip_prefix('+').unwrap_or(digits)),
    };
    let magnitude = match magnitude.strip_prefix("0x").or_else(|| magnitude.strip_prefix("0X")) {
        Some(hexadecimal) => i128::from_str_radix(hexadecimal, 16),
        None if magnitude.len() > 1 && magnitude.starts_with('0') => i128::from_str_radix(&magnitude[1..], 8),
        None => magnitude.parse(),
    };
    let n = magnitude.map_err(|_| bad())?;
    let n = if negative { -n } else { n };
    let value = match expected.unwrap_or("i") {
        "y" => n.try_into().ok().map(Value::Byte),
        "n" => n.try_into().ok().map(Value::I16),
        "q" => n.try_into().ok().map(Value::U16),
        "i" => n.try_into().ok().map(Value::I32),
        "u" => n.try_into().ok().map(Value::U32),
        "x" => n.try_into().ok().map(Value::I64),
        "t" => n.try_into().ok().map(Value::U64),
        _ => None,
    };
    value.ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(text: &str) -> String {
        parse(text).unwrap_or_else(|e| panic!("{text}: {e}")).signature()
    }

    #[test]
    fn values_are_of_the_type_that_they_show_or_name() {
        assert_eq!(parse("uint64 123456789").unwrap(), Value::U64(123_456_789));
        assert_eq!(parse(" 'inactive-or-failed' ").unwrap(), Value::Text("inactive-or-failed".into()));
        assert_eq!(parse("15").unwrap(), Value::I32(15));
        assert_eq!(parse("byte 0x1f").unwrap(), Value::Byte(31));
        assert_eq!(parse("int16 -7").unwrap(), Value::I16(-7));
        assert_eq!(parse("1.5e3").unwrap(), Value::Double(1500.0));
        assert_eq!(parse("true").unwrap(), Value::Bool(true));
        assert_eq!(parse(r#""a\"b\u00e9\n""#).unwrap(), Value::Text("a\"bé\n".into()));
        for (text, is) in [
            ("['a', 'b']", "as"),
            ("@as []", "as"),
            ("@a(st) [('/dev/x', 5)]", "a(st)"),
            ("(1, 'a', [true])", "(isab)"),
            ("{'a': <1>, 'b': <'x'>}", "a{sv}"),
            ("[uint32 1, 2]", "au"),
            ("b'ab'", "ay"),
            ("objectpath '/a'", "o"),
            ("@(t) (1,)", "(t)"),
        ] {
            assert_eq!(signature(text), is, "{text}");
        }
    }

    #[test]
    fn what_is_no_value_is_refused() {
        for bad in [
            "",
            "'open",
            "uint64 -1",
            "byte 256",
            "[]",
            "()",
            "[1, 'a']",
            "5 6",
            "nothing",
            "@z 5",
            "@ss 5",
            "99999999999",
            "uint64 'a'",
            "[1",
            "(1",
            "{1",
            "<1",
            "'\\u0000'",
            "@s 5",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse(&format!("@{}s", "a".repeat(100))).is_err());
    }

    #[test]
    fn a_signature_is_divided_into_its_types() {
        assert_eq!(one("a(st)u"), Some(("a(st)", "u")));
        assert_eq!(one("a{sv}"), Some(("a{sv}", "")));
        assert_eq!(one("(s"), None);
        assert_eq!(one(""), None);
    }
}
