//! What people see meanwhile: bars on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};

/// All that is under way.
#[derive(Clone)]
pub(crate) struct Progress {
    mode: Mode,
}

#[derive(Clone)]
enum Mode {
    Quiet,
    Lines,
    Bars(MultiProgress),
}

/// One layer that is under way.
pub(crate) struct Part {
    name: String,
    mode: Mode,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// On standard error: what is printed on standard output may be somebody's input.
    pub(crate) fn new(quiet: bool) -> Self {
        let mode = match () {
            () if quiet => Mode::Quiet,
            () if std::io::stderr().is_terminal() => Mode::Bars(MultiProgress::new()),
            () => Mode::Lines,
        };
        Self { mode }
    }

    /// Says something.
    pub(crate) fn say(&self, text: &str) {
        match &self.mode {
            Mode::Quiet => {}
            Mode::Lines => eprintln!("{text}"),
            Mode::Bars(bars) => {
                // A terminal that went away is none of the image's business.
                let _ = bars.println(text);
            }
        }
    }

    /// A part of so many bytes.
    pub(crate) fn part(&self, name: &str, length: u64) -> Part {
        let bar = match &self.mode {
            Mode::Bars(bars) => {
                let bar = bars.add(ProgressBar::new(length));
                let style = "{prefix:12} {msg:12} [{bar:30}] {bytes:>10}/{total_bytes:10} {bytes_per_sec}";
                // The template is a constant; with another one the default would be seen.
                bar.set_style(
                    ProgressStyle::with_template(style)
                        .unwrap_or_else(|_| ProgressStyle::default_bar())
                        .progress_chars("=> "),
                );
                bar.set_prefix(name.to_owned());
                bar.set_message("waiting");
                bar.enable_steady_tick(Duration::from_millis(200));
                Some(bar)
            }
            _ => None,
        };
        Part { name: name.to_owned(), mode: self.mode.clone(), bar }
    }
}

impl Part {
    /// What is being done with it.
    pub(crate) fn state(&self, state: &'static str) {
        if let Some(bar) = &self.bar {
            bar.set_message(state);
        }
    }

    /// How many bytes are there.
    pub(crate) fn at(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    /// It is there.
    pub(crate) fn done(&self, how: &'static str, bytes: u64) {
        match (&self.mode, &self.bar) {
            (_, Some(bar)) => {
                bar.set_position(bar.length().unwrap_or_default());
                bar.finish_with_message(how);
            }
            (Mode::Lines, None) => eprintln!("{}: {how} ({})", self.name, HumanBytes(bytes)),
            _ => {}
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take().filter(|bar| !bar.is_finished()) {
            bar.abandon_with_message("given up");
        }
    }
}
