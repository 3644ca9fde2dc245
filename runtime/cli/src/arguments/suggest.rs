//! What somebody may have meant.

use super::help::of_group;
use super::scan::Flag;
use super::tables::{COMMANDS, GROUP_NAMES};

/// Words of docker's command that are other words here.
const OTHERS: &[(&str, &str)] = &[
    ("images", "storage ls"),
    ("image", "storage"),
    ("rmi", "storage rm"),
    ("load", "storage import"),
    ("save", "storage export"),
    ("push", "storage export"),
    ("containers", "container ls"),
    ("networks", "network ls"),
];

/// How many letters are to be changed, added, left out or exchanged with the next one to make one word the other.
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let mut rows = vec![(0..=other.len()).collect::<Vec<_>>()];
    for i in 1..=one.len() {
        let mut row = vec![i];
        for j in 1..=other.len() {
            let same = usize::from(one[i - 1] != other[j - 1]);
            let mut least = (rows[i - 1][j] + 1).min(row[j - 1] + 1).min(rows[i - 1][j - 1] + same);
            if i > 1 && j > 1 && one[i - 1] == other[j - 2] && one[i - 2] == other[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[one.len()][other.len()]
}

/// The nearest word, if one is near enough to have been meant.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Of short words nearly all are near each other.
    let most = match word.chars().count() {
        0..=2 => 0,
        3..=5 => 1,
        _ => 2,
    };
    let distances = known.map(|known| (distance(word, known), known));
    distances.filter(|(distance, _)| *distance <= most).min_by_key(|(distance, _)| *distance).map(|(_, known)| known)
}

/// A command in the place of one that there is not.
pub(super) fn command(word: &str) -> Option<String> {
    if let Some((_, meant)) = OTHERS.iter().find(|(other, _)| *other == word) {
        return Some((*meant).to_owned());
    }
    // The words of docker that are a group's here.
    let of_groups = || GROUP_NAMES.iter().flat_map(|group| of_group(group));
    if let Some((_, syntax)) = of_groups().find(|(verb, _)| *verb == word) {
        return Some(syntax.name.to_owned());
    }
    let own = COMMANDS.iter().map(|syntax| syntax.name).chain(GROUP_NAMES.iter().copied());
    if let Some(near) = nearest(word, own) {
        return Some(near.to_owned());
    }
    let near = nearest(word, of_groups().map(|(verb, _)| verb))?;
    of_groups().find(|(verb, _)| *verb == near).map(|(_, syntax)| syntax.name.to_owned())
}

/// A command of a group.
pub(super) fn verb(group: &str, word: &str) -> Option<&'static str> {
    nearest(word, of_group(group).map(|(verb, _)| verb))
}

/// A flag.
pub(super) fn flag(word: &str, tables: &[&'static [Flag]]) -> Option<&'static str> {
    let shown = tables.iter().flat_map(|table| table.iter()).filter(|flag| !flag.help.is_empty());
    nearest(word, shown.map(|flag| flag.long))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_counted() {
        for (one, other, count) in
            [("", "", 0), ("a", "", 1), ("container", "conatiner", 1), ("ls", "list", 2), ("run", "rnu", 1)]
        {
            assert_eq!(distance(one, other), count, "{one} {other}");
            assert_eq!(distance(other, one), count, "{other} {one}");
        }
    }

    #[test]
    fn what_is_near_or_dockers_is_meant() {
        for (word, meant) in [
            ("conatiner", "container"),
            ("containr", "container"),
            ("satrt", "start"),
            ("images", "storage ls"),
            ("logs", "container logs"),
            ("inspcet", "container inspect"),
            ("netwrok", "network"),
        ] {
            assert_eq!(command(word).as_deref(), Some(meant), "{word}");
        }
        assert_eq!(verb("container", "insepct"), Some("inspect"));
        for nothing in ["x", "frobnicate", ""] {
            assert_eq!(command(nothing), None, "{nothing}");
        }
    }
}
