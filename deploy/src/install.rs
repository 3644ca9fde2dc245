//! Installing. Every step may be the last one of a process that is killed; the next run goes on by what it finds.

use std::time::Instant;

use anyhow::{Result, bail};

use crate::change::{self, Applied};
use crate::journal::{Journal, State};
use crate::kube::{READY, VERSION, label_value};
use crate::node::Node;
use crate::plan;
use crate::stage::{Programs, Stage};

/// How often it is planned anew because somebody else changes the file meanwhile.
const PLANS: usize = 4;

/// What an installation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    /// Whether new pods get other programs than before.
    pub(crate) programs: bool,
    /// Whether containerd was restarted.
    pub(crate) restarted: bool,
    /// Whether it has to be restarted, and was not because of [`Restart::Later`].
    pub(crate) postponed: bool,
}

/// What is done when containerd has to be restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Restart {
    /// It is.
    Now,
    /// Nothing yet: who asks waits first.
    Later,
}

/// Notes how long phases take.
pub(crate) struct Clock(Instant);

impl Clock {
    /// The phase that was begun last has ended.
    pub(crate) fn lap(&mut self, journal: &mut Journal, phase: &str) {
        let now = Instant::now();
        journal.durations.insert(phase.to_owned(), (now - self.0).as_secs_f64());
        self.0 = now;
    }
}

/// Installs. `why` is what the restart is for, in metrics; with `force` also what failed before.
///
/// # Errors
/// When the node cannot be installed on; containerd is as it was then.
pub(crate) fn install(node: &Node, programs: &Programs, why: &str, restart: Restart, force: bool) -> Result<Done> {
    let store = node.store();
    let lock = store.lock()?;
    let done = install_locked(node, programs, why, restart, force);
    if done.is_err() && store.load().is_ok_and(|journal| journal.is_blank()) {
        // Nothing came of it, so nothing stays. That is not what is wrong.
        if let Err(e) = store.clear(&lock) {
            log::warn!("{e:#}");
        }
    }
    done
}

/// Removes sets of programs that no shim uses any more and new pods do not get.
///
/// # Errors
/// When one cannot be removed, or somebody else is at work.
pub(crate) fn collect(node: &Node) -> Result<()> {
    let store = node.store();
    let _lock = store.lock()?;
    node.stage().collect().map(drop)
}

fn install_locked(node: &Node, programs: &Programs, why: &str, restart: Restart, force: bool) -> Result<Done> {
    let store = node.store();
    let mut journal = store.load()?;
    if journal.state == State::RollingBack {
        log::warn!("an installation was cut off while it was taken back");
        change::roll_back(node, &mut journal, force)?;
    }
    node.check_cluster()?;
    let installed = journal.change.is_some();
    for (flag, was, is) in [
        ("install-dir", journal.install_dir.display().to_string(), node.install_dir.display().to_string()),
        ("handler", journal.handler.clone(), node.handler.clone()),
    ] {
        if installed && was != is {
            bail!(
                "runx is installed on this node with --{flag} {was}: uninstall that first, then install with --{flag} {is}"
            );
        }
    }
    if !installed && !journal.is_blank() && journal.install_dir != node.install_dir {
        // Of an installation that was refused; nothing was ever started from there.
        let place = journal.install_dir.display();
        if !Stage::new(&node.root, &journal.install_dir).remove_all()?.is_empty() {
            bail!("programs in {place}, where an earlier installation was to be, are in use: end what uses them first");
        }
    }
    let mut clock = Clock(Instant::now());
    let version = plan::version(node)?;
    journal.handler.clone_from(&node.handler);
    journal.distribution = node.distribution.name.to_owned();
    journal.containerd.clone_from(&version.text);
    journal.install_dir.clone_from(&node.install_dir);
    clock.lap(&mut journal, "detect");

    // Noted before, so that an uninstallation finds the programs whatever happens.
    let before = journal.clone();
    if journal.state == State::Absent {
        store.save(&mut journal)?;
    }
    let stage = node.stage();
    stage.bring(programs)?;
    let mut done = Done { programs: stage.flip(&programs.digest)?, ..Done::default() };
    let mut noted = false;
    journal.programs.clone_from(&programs.digest);
    clock.lap(&mut journal, "stage");

    for attempt in 1.. {
        let plan = plan::make(node, &version, &journal);
        store.clean()?;
        let plan = match plan {
            Ok(plan) => plan,
            Err(e) => {
                journal.reason = Some(format!("{e:#}"));
                store.save(&mut journal)?;
                return Err(e);
            }
        };
        journal.config_version = plan.config_version;
        clock.lap(&mut journal, "plan");

        let same = plan.is_done();
        // Where nothing is to be changed, one that is just starting is waited for, and not restarted.
        let status = if same && !journal.restart_pending { Some(node.answer()?) } else { node.status().ok() };
        let served = status.filter(|status| status.unready.is_none());
        let serves = served.as_ref().is_some_and(|status| status.handlers.contains(&node.handler));
        if same && !journal.restart_pending && serves {
            noted = change::settle(node, &mut journal, &plan)?;
            break;
        }
        if !force {
            change::refuse_a_third_time(&journal, &plan)?;
        }
        if restart == Restart::Later {
            // It is found again, whoever comes next.
            return Ok(Done { postponed: true, ..done });
        }
        let others = served.map(|it| it.handlers).unwrap_or_default();
        match change::apply(node, &mut journal, &plan, others, why, force, &mut clock)? {
            Applied::Done => {
                change::settle(node, &mut journal, &plan)?;
                done.restarted = true;
                break;
            }
            Applied::Overtaken(path) if attempt == PLANS => bail!(
                "somebody else has changed {} {PLANS} times while runx-node made sure that containerd reads it, so nothing was changed",
                path.display()
            ),
            Applied::Overtaken(path) => log::warn!("{} was changed by somebody else: planning anew", path.display()),
        }
    }
    let changed = noted || done.restarted || done.programs || before.state != State::Installed;
    journal.state = State::Installed;
    journal.failures = 0;
    journal.failed = None;
    journal.reason = None;
    if changed || before.programs != journal.programs || before.containerd != journal.containerd {
        store.save(&mut journal)?;
    }
    stage.collect()?;
    node.label(&[(READY, Some("true")), (VERSION, Some(&label_value(env!("CARGO_PKG_VERSION"))))])?;
    Ok(done)
}
