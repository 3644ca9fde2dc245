//! Watching directories.
//!
//! The kernel's events become the protocol's. A directory that is made while its parent is watched with all below is watched as
//! well, and what is in it by then is told as if it had just been made: nothing is lost between. When the kernel had to drop events,
//! that is an error and no silence.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use serde_json::{Value, json};
use tokio::io::unix::AsyncFd;

use super::App;
use super::connect::{Call, Failure, Messages, Result, fail};
use super::filesystem::{entry, of_kernel};
use super::schema::{CHANGES_RESPONSE, EMPTY, WATCH_REQUEST, WATCH_RESPONSE, WATCHER};
use super::user::User;
use crate::process::users::Accounts;

/// How many events wait for a client that does not ask for them.
const WAITING: usize = 65_536;

/// How many watchers there may be.
const WATCHERS: usize = 256;

/// How many directories one watches.
const DIRECTORIES: usize = 100_000;

/// What a request wants.
#[derive(Clone, Copy, Debug)]
struct Wish {
    recursive: bool,
    entries: bool,
}

/// A watched directory.
#[derive(Debug)]
pub(super) struct Watch {
    inotify: Inotify,
    top: PathBuf,
    wish: Wish,
    /// The watched directories, relative to the top.
    directories: HashMap<WatchDescriptor, PathBuf>,
    events: VecDeque<Value>,
    broken: Option<Failure>,
}

/// The watchers that clients ask for their events.
#[derive(Debug, Default)]
pub(super) struct Watchers(Mutex<HashMap<String, Arc<Mutex<Watch>>>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Filesystems that are elsewhere: their changes are not told by this kernel.
const NETWORK: [i64; 5] = [0x6969, 0xff53_4d42, 0x517b, 0xfe53_4d42, 0x6573_5546];

impl Watch {
    fn new(path: &Path, wish: Wish, network: bool) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| of_kernel("watch", path, &e))?;
        if !meta.is_dir() {
            return Err(fail("invalid_argument", format!("path is not a directory: {}", path.display())));
        }
        let kind = nix::sys::statfs::statfs(path).map(|stat| stat.filesystem_type().0 & 0xffff_ffff).unwrap_or(0);
        if !network && NETWORK.contains(&kind) {
            let text = format!("{} is on a network mount, where changes are not told", path.display());
            return Err(fail("invalid_argument", text));
        }
        let failed = |e: nix::Error| match e {
            nix::Error::EMFILE | nix::Error::ENOSPC | nix::Error::ENOMEM => {
                fail("resource_exhausted", format!("watch {}: {e}", path.display()))
            }
            e => fail("internal", format!("watch {}: {e}", path.display())),
        };
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(failed)?;
        let mut watch = Self {
            inotify,
            top: path.to_owned(),
            wish,
            directories: HashMap::new(),
            events: VecDeque::new(),
            broken: None,
        };
        watch.add(PathBuf::new(), false).map_err(failed)?;
        Ok(watch)
    }

    /// Watches a directory, and with all below what is in it. Of what is `new` it is told.
    fn add(&mut self, relative: PathBuf, new: bool) -> nix::Result<()> {
        let mut waiting = vec![relative];
        while let Some(relative) = waiting.pop() {
            let path = self.top.join(&relative);
            let flags = AddWatchFlags::IN_CREATE
                | AddWatchFlags::IN_MODIFY
                | AddWatchFlags::IN_DELETE
                | AddWatchFlags::IN_MOVED_FROM
                | AddWatchFlags::IN_MOVED_TO
                | AddWatchFlags::IN_ATTRIB
                | AddWatchFlags::IN_DELETE_SELF
                | AddWatchFlags::IN_MOVE_SELF
                | AddWatchFlags::IN_ONLYDIR;
            let top = relative.as_os_str().is_empty();
            let flags = if top { flags } else { flags | AddWatchFlags::IN_DONT_FOLLOW };
            if self.directories.len() >= DIRECTORIES {
                return Err(nix::Error::ENOSPC);
            }
            match self.inotify.add_watch(&path, flags) {
                Ok(descriptor) => {
                    // The same directory once more: what is in it was told.
                    if self.directories.insert(descriptor, relative.clone()).is_some() {
                        continue;
                    }
                }
                // It is gone by now, or may not be looked into.
                Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::EACCES) if !top => continue,
                Err(e) => return Err(e),
            }
            if !self.wish.recursive {
                continue;
            }
            // After the watch was set: what comes from now on is told by the kernel.
            for found in std::fs::read_dir(&path).into_iter().flatten().flatten() {
                let is_directory = found.file_type().is_ok_and(|kind| kind.is_dir());
                let inside = relative.join(found.file_name());
                if new {
                    self.tell(&inside, "EVENT_TYPE_CREATE", true);
                    if !is_directory && found.metadata().is_ok_and(|meta| meta.is_file() && meta.len() > 0) {
                        self.tell(&inside, "EVENT_TYPE_WRITE", true);
                    }
                }
                if is_directory {
                    waiting.push(inside);
                }
            }
        }
        Ok(())
    }

    fn tell(&mut self, relative: &Path, kind: &str, with_entry: bool) {
        if self.broken.is_some() {
            return;
        }
        if self.events.len() >= WAITING {
            self.broken = Some(fail("resource_exhausted", "events were lost: they were not asked for soon enough"));
            return;
        }
        let name = if relative.as_os_str().is_empty() { ".".into() } else { relative.to_string_lossy() };
        let mut event = json!({"name": name, "type": kind});
        // Looked at when it is told, since by then it may be complete.
        event["entry"] = (self.wish.entries && with_entry).into();
        self.events.push_back(event);
    }

    /// Takes what the kernel has to tell.
    fn drain(&mut self) {
        loop {
            match self.inotify.read_events() {
                Ok(events) if events.is_empty() => return,
                Ok(events) => events.into_iter().for_each(|event| self.take(event)),
                Err(nix::Error::EAGAIN) => return,
                Err(nix::Error::EINTR) => {}
                Err(e) => {
                    self.broken = Some(fail("internal", format!("read events: {e}")));
                    return;
                }
            }
        }
    }

    fn take(&mut self, event: InotifyEvent) {
        let InotifyEvent { wd, mask, name, .. } = event;
        if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            self.broken = Some(fail("data_loss", "events were lost: there were more than the kernel keeps"));
            return;
        }
        if mask.contains(AddWatchFlags::IN_IGNORED) {
            self.directories.remove(&wd);
            return;
        }
        let Some(directory) = self.directories.get(&wd).cloned() else { return };
        let own = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
        // A directory below the top is told of by its parent.
        if mask.intersects(own) && !directory.as_os_str().is_empty() {
            return;
        }
        let inside = name.as_ref().is_some_and(|name: &OsString| !name.is_empty());
        let relative = match &name {
            Some(name) if inside => directory.join(name),
            // Its attributes are told by its parent as well.
            _ if !directory.as_os_str().is_empty() => return,
            _ => directory,
        };
        let kinds = [
            (AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO, "EVENT_TYPE_CREATE", true),
            (AddWatchFlags::IN_MOVED_FROM | AddWatchFlags::IN_MOVE_SELF, "EVENT_TYPE_RENAME", false),
            (AddWatchFlags::IN_ATTRIB, "EVENT_TYPE_CHMOD", true),
            (AddWatchFlags::IN_MODIFY, "EVENT_TYPE_WRITE", true),
            (AddWatchFlags::IN_DELETE | AddWatchFlags::IN_DELETE_SELF, "EVENT_TYPE_REMOVE", false),
        ];
        for (flags, kind, with_entry) in kinds {
            if mask.intersects(flags) {
                self.tell(&relative, kind, with_entry);
            }
        }
        let came = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
        if self.wish.recursive && mask.contains(AddWatchFlags::IN_ISDIR) && mask.intersects(came) {
            // What was moved here is told with its own name alone.
            let new = mask.contains(AddWatchFlags::IN_CREATE);
            if let Err(e) = self.add(relative, new) {
                self.broken = Some(fail("resource_exhausted", format!("watch a new directory: {e}")));
            }
        }
    }

    /// Events with their entries, and what has gone wrong.
    fn events(&mut self, app: &App) -> (Vec<Value>, Option<Failure>) {
        self.drain();
        let accounts = Accounts::load();
        let mut out: Vec<Value> = self.events.drain(..).collect();
        for event in &mut out {
            let wanted = event["entry"].as_bool().unwrap_or(false);
            let name = event["name"].as_str().unwrap_or_default();
            let path = if name == "." { self.top.clone() } else { self.top.join(name) };
            let found = wanted.then(|| entry(app, &path, &accounts).ok()).flatten();
            match (found, event.as_object_mut()) {
                (Some(found), Some(event)) => drop(event.insert("entry".into(), found)),
                (None, Some(event)) => drop(event.remove("entry")),
                (_, None) => {}
            }
        }
        (out, self.broken.clone())
    }
}

fn open(app: &App, user: &User, request: &Value) -> Result<Watch> {
    let path = user.path(app, request["path"].as_str().unwrap_or_default())?;
    if app.core.files.root.is_jail() {
        return Err(fail("unimplemented", "nothing is watched inside of a root of its own"));
    }
    let wish = Wish {
        recursive: request["recursive"].as_bool().unwrap_or(false),
        entries: request["includeEntry"].as_bool().unwrap_or(false),
    };
    Watch::new(&path, wish, request["allowNetworkMounts"].as_bool().unwrap_or(false))
}

/// A unary method. `None` when there is none of the name.
pub(super) async fn unary(app: Arc<App>, method: &str, call: Call, user: User, body: Bytes) -> Option<Response> {
    let app = &app;
    Some(match method {
        "CreateWatcher" => {
            call.unary(body, &WATCH_REQUEST, &WATCHER, |request| async move {
                let watch = super::filesystem::run(app, &user.clone(), move |app| open(app, &user, &request)).await?;
                let mut watchers = lock(&app.watchers.0);
                if watchers.len() >= WATCHERS {
                    return Err(fail("resource_exhausted", format!("there are {WATCHERS} watchers already")));
                }
                let id = format!("w{}", &crate::ids::hex()[..20]);
                watchers.insert(id.clone(), Arc::new(Mutex::new(watch)));
                Ok(json!({"watcherId": id}))
            })
            .await
        }
        "GetWatcherEvents" => {
            call.unary(body, &WATCHER, &CHANGES_RESPONSE, |request| async move {
                let watch = find(app, &request)?;
                super::filesystem::run(app, &user, move |app| {
                    let (events, broken) = lock(&watch).events(app);
                    match broken {
                        Some(failure) if events.is_empty() => Err(failure),
                        _ if events.is_empty() => Ok(json!({})),
                        _ => Ok(json!({"events": events})),
                    }
                })
                .await
            })
            .await
        }
        "RemoveWatcher" => {
            call.unary(body, &WATCHER, &EMPTY, |request| async move {
                find(app, &request)?;
                lock(&app.watchers.0).remove(request["watcherId"].as_str().unwrap_or_default());
                Ok(json!({}))
            })
            .await
        }
        _ => return None,
    })
}

fn find(app: &App, request: &Value) -> Result<Arc<Mutex<Watch>>> {
    let id = request["watcherId"].as_str().unwrap_or_default();
    let found = lock(&app.watchers.0).get(id).cloned();
    found.ok_or_else(|| fail("not_found", format!("watcher with id {id} not found")))
}

/// A copy of the descriptor, to wait for.
struct Waiter(OwnedFd);

impl AsRawFd for Waiter {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// `WatchDir`.
pub(super) async fn stream(app: Arc<App>, call: Call, user: User, request: Request) -> Response {
    let messages = Messages::new(request.into_body(), &call, &WATCH_REQUEST);
    let opened = async {
        let request = messages.only().await?;
        let who = user.clone();
        let watch = super::filesystem::run(&app, &user, move |app| open(app, &who, &request)).await?;
        let waiter = watch.inotify.as_fd().try_clone_to_owned().and_then(|fd| {
            // SAFETY: it owns an open descriptor, which nobody else closes or replaces.
            unsafe { AsyncFd::register(Waiter(fd)) }.map_err(io::Error::from)
        });
        let waiter = waiter.map_err(|e| fail("internal", format!("wait for events: {e}")))?;
        Ok((watch, waiter))
    };
    let (mut watch, waiter) = match opened.await {
        Ok(opened) => opened,
        Err(failure) => return call.refuse(&failure),
    };
    let (stream, response) = call.stream(&WATCH_RESPONSE);
    tokio::spawn(async move {
        if stream.send(&json!({"start": {}})).await.is_err() {
            return;
        }
        let done = loop {
            tokio::select! {
                ready = waiter.readable() => match ready {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(e) => break Err(fail("internal", format!("wait for events: {e}"))),
                },
                () = stream.closed() => return,
                () = tokio::time::sleep(call.keepalive) => {
                    if stream.send(&json!({"keepalive": {}})).await.is_err() {
                        return;
                    }
                    continue;
                }
            }
            let read = {
                let app = app.clone();
                tokio::task::spawn_blocking(move || {
                    let events = watch.events(&app);
                    (watch, events)
                })
            };
            let Ok((back, (events, broken))) = read.await else { return };
            watch = back;
            for event in events {
                if stream.send(&json!({"filesystem": event})).await.is_err() {
                    return;
                }
            }
            if let Some(failure) = broken {
                break Err(failure);
            }
        };
        stream.end(done).await;
    });
    response
}
