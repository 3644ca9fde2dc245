//! `runx check`: what this machine offers, what is missing, and how to get it.

use serde_json::json;

use super::probe;
use crate::arguments::ListFormat;
use crate::{Context, Failure, print};

/// How it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Ok,
    /// Something that some containers want cannot be had.
    Limited,
    /// It is not there, and without it nothing works.
    Missing,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug)]
pub(super) struct Finding {
    group: &'static str,
    name: String,
    state: State,
    /// Nothing works without it.
    essential: bool,
    found: String,
    advice: Option<String>,
}

impl Finding {
    pub(super) fn new(group: &'static str, name: &str, state: State, found: impl Into<String>) -> Self {
        Self { group, name: name.to_owned(), state, essential: false, found: found.into(), advice: None }
    }

    pub(super) fn ok(group: &'static str, name: &str, found: impl Into<String>) -> Self {
        Self::new(group, name, State::Ok, found)
    }

    /// Something that nothing works without.
    pub(super) fn essential(
        group: &'static str,
        name: &str,
        there: bool,
        ok: &str,
        missing: &str,
        advice: &str,
    ) -> Self {
        let (state, found) = if there { (State::Ok, ok) } else { (State::Missing, missing) };
        Self::new(group, name, state, found).advise(advice).needed_if(true)
    }

    /// How to get it, where it is not there.
    pub(super) fn advise(mut self, how: &str) -> Self {
        self.advice = (self.state != State::Ok).then(|| how.to_owned());
        self
    }

    pub(super) fn needed_if(mut self, essential: bool) -> Self {
        self.essential = essential;
        self
    }
}

/// `runx check`. Fails if something is missing that nothing works without.
pub(crate) fn check(context: &Context, format: ListFormat) -> Result<u8, Failure> {
    let mut found = Vec::new();
    probe::kernel(&mut found);
    probe::namespaces(&mut found);
    probe::ordinary_users(&mut found);
    probe::cgroups(&mut found);
    probe::confinement(&mut found);
    probe::storage(&mut found, &context.runtime(), &context.global.storage_root());
    probe::network(&mut found, &context.config.network);
    let beside = context.executable.parent().unwrap_or(std::path::Path::new("/"));
    probe::programs(&mut found, beside);
    let lacking = found.iter().filter(|finding| finding.essential && finding.state == State::Missing).count();
    match format {
        ListFormat::Json => print(&format!("{:#}\n", describe(&found, lacking == 0)))?,
        ListFormat::Table => print(&table(&found, lacking))?,
    };
    Ok(u8::from(lacking > 0))
}

fn describe(found: &[Finding], usable: bool) -> serde_json::Value {
    let one = |finding: &Finding| {
        json!({
            "group": finding.group,
            "name": finding.name,
            "state": finding.state.name(),
            "essential": finding.essential,
            "found": finding.found,
            "advice": finding.advice,
        })
    };
    json!({"usable": usable, "findings": found.iter().map(one).collect::<Vec<_>>()})
}

fn table(found: &[Finding], lacking: usize) -> String {
    let mut rows = vec![["", "", "STATE", "FOUND"].map(str::to_owned)];
    let mut group = "";
    for finding in found {
        let title = if finding.group == group { "" } else { finding.group };
        group = finding.group;
        rows.push([title.to_owned(), finding.name.clone(), finding.state.name().to_owned(), finding.found.clone()]);
    }
    let mut out = crate::table::render(&rows);
    let advised: Vec<_> = found.iter().filter_map(|finding| Some((finding, finding.advice.as_ref()?))).collect();
    if !advised.is_empty() {
        out.push_str("\nHow to get what is missing:\n");
        for (finding, advice) in advised {
            out.push_str(&format!("  {}, {}: {advice}\n", finding.group, finding.name));
        }
    }
    out.push_str(match lacking {
        0 => "\nContainers can run here.\n",
        _ => "\nContainers cannot run here: something is missing that all of them need.\n",
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_for_what_is_missing_only() {
        let there = Finding::essential("g", "a", true, "yes", "no", "get it");
        let missing = Finding::essential("g", "b", false, "yes", "no", "get it");
        assert!(there.advice.is_none() && missing.advice.as_deref() == Some("get it"));
        let text = table(&[there, missing], 1);
        assert!(text.contains("g, b: get it") && text.contains("cannot run") && !text.contains("g, a:"), "{text}");
    }
}
