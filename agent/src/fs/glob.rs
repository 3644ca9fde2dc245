//! Patterns for names: `*`, `?`, `[a-z]`, `[!x]`, `{a,b}`, `!(pattern)`, `\` before a character that means itself. `**/`
//! before anything means any directory, and so nothing where a name alone is looked at.

/// The longest pattern in bytes, and how many braces and negations it may have: they may be nested.
const LENGTH: usize = 4096;
const BRACES: usize = 64;
const NEGATIONS: usize = 3;

/// How many alternatives braces may make together.
const ALTERNATIVES: usize = 1024;

#[derive(Clone, Debug)]
enum Token {
    One(char),
    Any,
    Many,
    /// Whether it is negated, and its ranges.
    Class(bool, Vec<(char, char)>),
    /// What does not match this.
    Not(Vec<Vec<Token>>),
}

/// A pattern.
#[derive(Clone, Debug)]
pub struct Glob(Vec<Vec<Token>>);

impl Glob {
    /// Reads a pattern.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(pattern: &str) -> Result<Self, String> {
        if pattern.len() > LENGTH || pattern.matches('{').count() > BRACES || pattern.matches("!(").count() > NEGATIONS
        {
            return Err("the pattern is too long, or has too many braces or negations".into());
        }
        let mut alternatives = Vec::new();
        expand(pattern, &mut alternatives)?;
        alternatives.iter().map(|alternative| tokens(alternative)).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a name, all of it, matches.
    pub fn matches(&self, name: &str) -> bool {
        let name: Vec<char> = name.chars().collect();
        any(&self.0, &name)
    }
}

/// Braces become alternatives.
fn expand(pattern: &str, out: &mut Vec<String>) -> Result<(), String> {
    let characters: Vec<char> = pattern.chars().collect();
    let (mut at, mut open) = (0, None);
    let mut depth = 0;
    let mut cuts = Vec::new();
    let mut in_class = false;
    while at < characters.len() {
        match characters[at] {
            '\\' => at += 1,
            '[' if !in_class => in_class = true,
            ']' if in_class => in_class = false,
            _ if in_class => {}
            '{' => {
                depth += 1;
                if depth == 1 {
                    open = Some(at);
                    cuts = vec![at];
                }
            }
            ',' if depth == 1 => cuts.push(at),
            '}' if depth == 0 => return Err("syntax error in pattern: } without {".into()),
            '}' => {
                depth -= 1;
                if depth == 0 {
                    cuts.push(at);
                    let (before, after) = (text(&characters[..open.unwrap_or(0)]), text(&characters[at + 1..]));
                    for pair in cuts.windows(2) {
                        let middle = text(&characters[pair[0] + 1..pair[1]]);
                        expand(&format!("{before}{middle}{after}"), out)?;
                    }
                    return Ok(());
                }
            }
            _ => {}
        }
        at += 1;
    }
    if depth > 0 {
        return Err("syntax error in pattern: { without }".into());
    }
    out.push(pattern.to_owned());
    if out.len() > ALTERNATIVES { Err("the pattern has too many alternatives".into()) } else { Ok(()) }
}

fn text(characters: &[char]) -> String {
    characters.iter().collect()
}

fn tokens(pattern: &str) -> Result<Vec<Token>, String> {
    let characters: Vec<char> = pattern.chars().collect();
    let mut out = Vec::new();
    let mut at = 0;
    while at < characters.len() {
        let rest = &characters[at..];
        match rest[0] {
            '*' if rest.starts_with(&['*', '*', '/']) => at += 2,
            '*' => {
                if !matches!(out.last(), Some(Token::Many)) {
                    out.push(Token::Many);
                }
            }
            '?' => out.push(Token::Any),
            '\\' => {
                let next = rest.get(1).ok_or("syntax error in pattern: nothing after \\")?;
                out.push(Token::One(*next));
                at += 1;
            }
            '[' => {
                let (token, length) = class(rest)?;
                out.push(token);
                at += length - 1;
            }
            '!' if rest.get(1) == Some(&'(') => {
                let end = closing(rest).ok_or("syntax error in pattern: !( without )")?;
                let inner = text(&rest[2..end]);
                let alternatives = inner.split('|').map(tokens).collect::<Result<_, _>>()?;
                out.push(Token::Not(alternatives));
                at += end;
            }
            other => out.push(Token::One(other)),
        }
        at += 1;
    }
    Ok(out)
}

/// Where the parenthesis after `!` is closed.
fn closing(rest: &[char]) -> Option<usize> {
    let mut depth = 0;
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            '\\' => at += 1,
            '(' => depth += 1,
            ')' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
        at += 1;
    }
    None
}

fn class(rest: &[char]) -> Result<(Token, usize), String> {
    let unclosed = || "syntax error in pattern: [ without ]".to_owned();
    let mut at = 1;
    let negated = matches!(rest.get(at), Some('!' | '^'));
    at += usize::from(negated);
    let mut ranges = Vec::new();
    loop {
        let next = |at: &mut usize| -> Result<char, String> {
            if rest.get(*at) == Some(&'\\') {
                *at += 1;
            }
            let found = rest.get(*at).copied().ok_or_else(unclosed)?;
            *at += 1;
            Ok(found)
        };
        if rest.get(at) == Some(&']') && !ranges.is_empty() {
            return Ok((Token::Class(negated, ranges), at + 1));
        }
        let low = next(&mut at)?;
        let high = if rest.get(at) == Some(&'-') && rest.get(at + 1).is_some_and(|c| *c != ']') {
            at += 1;
            next(&mut at)?
        } else {
            low
        };
        ranges.push((low, high));
    }
}

fn any(alternatives: &[Vec<Token>], name: &[char]) -> bool {
    alternatives.iter().any(|tokens| matches(tokens, name))
}

/// Follows all positions that the tokens so far may have come to: never longer than the name times the pattern, whatever
/// they are.
fn matches(tokens: &[Token], name: &[char]) -> bool {
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    for token in tokens {
        let mut next = vec![false; name.len() + 1];
        for at in (0..=name.len()).filter(|at| reached[*at]) {
            match token {
                Token::Many => {
                    next[at..].fill(true);
                    break;
                }
                Token::Not(inner) => {
                    for end in at..=name.len() {
                        next[end] |= !any(inner, &name[at..end]);
                    }
                }
                _ if at == name.len() => {}
                Token::Any => next[at + 1] = true,
                Token::One(one) => next[at + 1] |= name[at] == *one,
                Token::Class(negated, ranges) => {
                    let inside = ranges.iter().any(|(low, high)| (*low..=*high).contains(&name[at]));
                    next[at + 1] |= inside != *negated;
                }
            }
        }
        reached = next;
    }
    reached[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_as_shells_have_it() {
        for (pattern, yes, no) in [
            ("*.py", &["a.py", ".py", "ä.py"][..], &["a.pyc", "py"][..]),
            ("**/*.py", &["a.py"], &["a.c"]),
            ("**", &["anything", ".hidden", ""], &[]),
            ("a?c", &["abc", "aäc"], &["ac", "abbc"]),
            ("[a-c]x[!0-9]", &["axy", "cx-"], &["dxy", "ax1"]),
            ("[^a]", &["b"], &["a"]),
            ("{a,b{1,2}}.txt", &["a.txt", "b1.txt", "b2.txt"], &["b.txt", "b3.txt"]),
            ("!(*.py)", &["a.c"], &["a.py"]),
            ("x!(y|z)", &["x", "xa"], &["xy", "xz"]),
            ("\\*", &["*"], &["a"]),
            ("src/*.py", &[], &["a.py"]),
            ("A*", &["Abc"], &["abc"]),
        ] {
            let glob = Glob::new(pattern).unwrap();
            yes.iter().for_each(|name| assert!(glob.matches(name), "{pattern} {name}"));
            no.iter().for_each(|name| assert!(!glob.matches(name), "{pattern} {name}"));
        }
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        for pattern in ["[a", "{a", "a}", "\\", "!(a", "[", "{a,{b}"] {
            assert!(Glob::new(pattern).is_err(), "{pattern}");
        }
        assert!(Glob::new(&"{a,b}".repeat(20)).is_err());
        assert!(Glob::new(&format!("{}a{}", "{".repeat(4000), "}".repeat(4000))).is_err());
        assert!(Glob::new("!(!(!(!(!(a)))))").is_err());
    }

    #[test]
    fn no_pattern_takes_long() {
        let name = "a".repeat(255);
        assert!(!Glob::new(&("*a".repeat(200) + "b")).unwrap().matches(&name));
    }
}
