//! Who a request is for: the name before the colon of Basic authorization, which proves nothing, or the default user.

use axum::http::HeaderMap;

use super::App;
use super::connect::{Failure, fail};
use super::schema;
use crate::process::users::{self, Accounts, Identity};

/// An account.
#[derive(Clone, Debug)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) home: String,
    pub(super) identity: Identity,
}

impl User {
    /// Who it is to be for the kernel; `None` for who the daemon is.
    pub(super) fn identity(&self) -> Option<Identity> {
        let own = users::own();
        ((self.identity.uid, self.identity.gid) != own).then(|| self.identity.clone())
    }

    /// An absolute path of a request: `~` is the home, and what is relative is so to it.
    ///
    /// # Errors
    /// `~` of another user.
    pub(super) fn path(&self, app: &App, text: &str) -> Result<std::path::PathBuf, Failure> {
        if text.contains('\0') {
            return Err(fail("invalid_argument", "the path holds a NUL byte"));
        }
        let home = std::path::Path::new(&self.home);
        let path = match text.strip_prefix('~') {
            Some("") => home.to_owned(),
            Some(rest) if rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
            Some(_) => return Err(fail("invalid_argument", format!("the home of another user is not known: {text}"))),
            None if text.is_empty() => match app.state().workdir.clone() {
                Some(directory) => self.path(app, &directory)?,
                None => home.to_owned(),
            },
            None => home.join(text),
        };
        Ok(path.components().collect())
    }
}

/// The user of an account's name. The daemon's own may be a number.
pub(super) fn named(name: &str) -> Option<User> {
    let accounts = Accounts::load();
    if let Some(user) = accounts.user_named(name) {
        let identity = accounts.identity(user.uid, None);
        return Some(User { name: user.name.clone(), home: user.home.clone(), identity });
    }
    let (uid, gid) = users::own();
    let own = name == uid.to_string() || (name == "root" && uid == 0);
    own.then(|| User {
        name: name.to_owned(),
        home: std::env::var("HOME").ok().filter(|home| home.starts_with('/')).unwrap_or_else(|| "/".into()),
        identity: Identity { uid, gid, groups: Vec::new() },
    })
}

/// Who a request is for.
///
/// # Errors
/// A name that nobody has.
pub(super) fn of(app: &App, headers: &HeaderMap) -> Result<User, Failure> {
    let given = headers.get("authorization").and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Basic ")).and_then(|text| schema::bytes(text.trim()));
    match given.and_then(|bytes| String::from_utf8(bytes).ok()) {
        Some(pair) => {
            let name = pair.split(':').next().unwrap_or_default();
            named(name).ok_or_else(|| fail("unauthenticated", format!("invalid username: '{name}'")))
        }
        None => default(app),
    }
}

/// The default user.
///
/// # Errors
/// A name that nobody has.
pub(super) fn default(app: &App) -> Result<User, Failure> {
    let set = app.state().user.clone();
    match set {
        Some(name) => named(&name).ok_or_else(|| fail("unauthenticated", format!("invalid default user: '{name}'"))),
        None => {
            let (uid, _) = users::own();
            let name = Accounts::load().name_of(uid);
            named(&name).ok_or_else(|| fail("unauthenticated", "no user specified"))
        }
    }
}
