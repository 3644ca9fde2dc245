//! As much of TOML as a flat table of options takes: `key = value`, a line each.

/// A value.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    Bool(bool),
    Number(i64),
    Text(String),
}

/// The keys and values, in their order.
///
/// # Errors
/// With the line that is something else.
pub(super) fn parse(text: &str) -> Result<Vec<(String, Value)>, String> {
    let line = |line: &str| key_and_value(line).ok_or_else(|| format!("{line:?} is not of the form key = value"));
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(line).collect()
}

fn key_and_value(line: &str) -> Option<(String, Value)> {
    let (key, rest) = match line.chars().next()? {
        quote @ ('"' | '\'') => quoted(line, quote)?,
        _ => {
            let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || "_-".contains(c)))?;
            (line[..end].to_owned(), &line[end..])
        }
    };
    let value = rest.trim_start().strip_prefix('=')?.trim_start();
    let (value, rest) = match value.chars().next()? {
        quote @ ('"' | '\'') => {
            let (text, rest) = quoted(value, quote)?;
            (Value::Text(text), rest)
        }
        _ => {
            let end = value.find(|c: char| c.is_whitespace() || c == '#').unwrap_or(value.len());
            let (word, rest) = value.split_at(end);
            let value = match word {
                "true" => Value::Bool(true),
                "false" => Value::Bool(false),
                _ => Value::Number(word.replace('_', "").parse().ok()?),
            };
            (value, rest)
        }
    };
    let rest = rest.trim_start();
    (!key.is_empty() && (rest.is_empty() || rest.starts_with('#'))).then_some((key, value))
}

/// A text in quotes, and what follows it. Only double quotes know escapes.
fn quoted(text: &str, quote: char) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut rest = text[1..].char_indices();
    while let Some((at, c)) = rest.next() {
        match c {
            _ if c == quote => return Some((out, &text[1 + at + 1..])),
            '\\' if quote == '"' => out.push(match rest.next()?.1 {
                'b' => '\x08',
                't' => '\t',
                'n' => '\n',
                'f' => '\x0c',
                'r' => '\r',
                kept @ ('"' | '\\') => kept,
                kind @ ('u' | 'U') => {
                    let digits: String = rest.by_ref().take(if kind == 'u' { 4 } else { 8 }).map(|(_, c)| c).collect();
                    char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?
                }
                _ => return None,
            }),
            c => out.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_table_is_read() {
        let text =
            "# options\n\nA = true # yes\nb_1=\"x # \\\"y\\\" \\u00e9\"\n\"C\" = 'z\\n'\nD = 1_000\nE=-3\nF = \"\"#\n";
        let expected = [
            ("A", Value::Bool(true)),
            ("b_1", Value::Text("x # \"y\" é".into())),
            ("C", Value::Text("z\\n".into())),
            ("D", Value::Number(1000)),
            ("E", Value::Number(-3)),
            ("F", Value::Text(String::new())),
        ];
        assert_eq!(parse(text).unwrap(), expected.map(|(key, value)| (key.to_owned(), value)));
    }

    #[test]
    fn what_is_no_flat_table_is_refused() {
        for bad in ["[table]", "a", "a =", "= 1", "a = [1]", "a = b", "a = \"x", "a = 1 2", "a.b = 1", "a = 'x' y"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
