//! Which images are meant by `--filter`.

use anyhow::Result;
use runx_image::name::{Name, split};
use runx_image::{Image, Store};

use crate::arguments::ImageFilter;

/// Whether all filters hold for an image.
pub(super) fn holds(store: &Store, image: &Image, filters: &[ImageFilter]) -> Result<bool> {
    for filter in filters {
        let holds = match filter {
            ImageFilter::Dangling(wanted) => image.names.is_empty() == *wanted,
            ImageFilter::Reference(pattern) => image.names.iter().any(|name| is_like(name, pattern)),
            ImageFilter::Platform(platform) => {
                image.platform == *platform || image.platform.starts_with(&format!("{platform}/"))
            }
            ImageFilter::Label(name, value) => {
                let labels = store.configuration(image)?.config.labels;
                labels.get(name).is_some_and(|found| value.as_ref().is_none_or(|value| value == found))
            }
        };
        if !holds {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a stored name is like a pattern: of the whole, of the repository, or of a shorter form of either.
fn is_like(stored: &str, pattern: &str) -> bool {
    let (repository, _) = split(stored);
    let without_host = |text: &str| -> Option<String> {
        let host = Name::parse(stored).ok()?.host?;
        text.strip_prefix(host)?.strip_prefix('/').map(str::to_owned)
    };
    let forms = [stored.to_owned(), repository.to_owned()];
    let shorter = forms.iter().filter_map(|form| without_host(form));
    let all: Vec<String> = forms.iter().cloned().chain(shorter).collect();
    all.iter()
        .any(|form| matches(form, pattern) || form.strip_prefix("library/").is_some_and(|form| matches(form, pattern)))
}

/// `*` stands for anything, `?` for one character.
fn matches(text: &str, pattern: &str) -> bool {
    let (text, pattern): (Vec<char>, Vec<char>) = (text.chars().collect(), pattern.chars().collect());
    let (mut at, mut of) = (0, 0);
    // Where the last star was, and what it had taken by then.
    let mut star: Option<(usize, usize)> = None;
    while at < text.len() {
        match pattern.get(of) {
            Some('*') => {
                star = Some((of, at));
                of += 1;
            }
            Some(c) if *c == '?' || *c == text[at] => {
                at += 1;
                of += 1;
            }
            _ => match &mut star {
                Some((place, taken)) => {
                    *taken += 1;
                    (at, of) = (*taken, *place + 1);
                }
                None => return false,
            },
        }
    }
    pattern[of..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_of_names_and_shorter_forms() {
        let stored = "registry.example:5000/library/busybox:1.36";
        for pattern in ["busybox", "busybox:1*", "library/busy*", "registry.example:5000/*", "*box:?.36", "*", stored] {
            assert!(is_like(stored, pattern), "{pattern}");
        }
        for pattern in ["box", "busybox:2*", "busybox:?", "", "?"] {
            assert!(!is_like(stored, pattern), "{pattern}");
        }
    }
}
