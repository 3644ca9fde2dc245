//! Code in kernels: contexts on a Jupyter server, each with one kernel.
//!
//! The connection to a kernel stays open between executions, and a message counts for an execution only if it answers that
//! one's request.

mod channel;
pub mod client;
pub mod sql;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::ids;
use channel::Channel;
use client::{Error, Server};

/// How long a server that is only starting is waited for.
const STARTING: Duration = Duration::from_secs(20);

/// What an execution tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// It printed something.
    Stdout(String),
    /// It complained.
    Stderr(String),
    /// How many executions the kernel has counted.
    Count(u64),
    /// A result, or something to display, by media types; whether it is the execution's own result.
    Result(Value, bool),
    /// It failed: name, value, traceback.
    Error(String, String, Vec<String>),
    /// There is no more.
    Done,
}

/// A context: a kernel and its language.
#[derive(Debug)]
pub struct Context {
    /// The id of its session at the server.
    pub id: String,
    /// As it was asked for.
    pub language: String,
    /// Where it began, if that was asked for.
    pub cwd: Option<String>,
    kernel: String,
    server: Server,
    /// Who executes has it. Who has waited longest gets it next.
    turn: Arc<tokio::sync::Mutex<()>>,
    channel: tokio::sync::Mutex<Option<Channel>>,
}

/// The right to execute in a context, given back when it is dropped.
#[derive(Debug)]
pub struct Turn(Arc<Context>, #[expect(dead_code, reason = "it is held")] tokio::sync::OwnedMutexGuard<()>);

impl Context {
    /// Takes the right to execute. `None` while somebody else has it.
    pub fn turn(self: &Arc<Self>) -> Option<Turn> {
        Some(Turn(self.clone(), self.turn.clone().try_lock_owned().ok()?))
    }

    /// Waits for the right to execute, behind all who have called this before.
    pub fn queue(self: &Arc<Self>) -> Pin<Box<dyn Future<Output = Turn> + Send>> {
        let (context, turn) = (self.clone(), self.turn.clone());
        let mut waits = Box::pin(async move { Turn(context, turn.lock_owned().await) });
        // The first look takes a place.
        match waits.as_mut().now_or_never() {
            Some(turn) => Box::pin(std::future::ready(turn)),
            None => waits,
        }
    }

    /// Starts its kernel anew.
    ///
    /// # Errors
    /// The server's.
    pub async fn restart(&self) -> Result<(), Error> {
        let path = format!("/api/kernels/{}/restart", self.kernel);
        self.server.ask(Method::POST, &path, None, &[StatusCode::OK]).await?;
        // What it said before was another one's.
        *self.channel.lock().await = None;
        Ok(())
    }

    /// Interrupts what it executes.
    ///
    /// # Errors
    /// The server's.
    pub async fn interrupt(&self) -> Result<(), Error> {
        let path = format!("/api/kernels/{}/interrupt", self.kernel);
        self.server.ask(Method::POST, &path, None, &[StatusCode::OK, StatusCode::NO_CONTENT]).await.map(drop)
    }
}

impl Turn {
    /// Executes code and tells what comes of it. After [`Told::Done`] there is nothing more.
    ///
    /// # Errors
    /// When the kernel cannot be reached, or is lost.
    pub async fn execute<F: Future<Output = ()>>(&self, code: &str, tell: impl FnMut(Told) -> F) -> Result<(), Error> {
        self.request(code, false, tell).await
    }

    /// Executes code of ours, which neither counts nor says anything.
    ///
    /// # Errors
    /// As for [`Self::execute`].
    pub async fn prepare(&self, code: &str) -> Result<(), Error> {
        self.request(code, true, |_| std::future::ready(())).await
    }

    async fn request<F: Future<Output = ()>>(
        &self,
        code: &str,
        silent: bool,
        mut tell: impl FnMut(Told) -> F,
    ) -> Result<(), Error> {
        let mut channel = self.0.channel.lock().await;
        let mut open = match channel.take().and_then(|mut open| open.is_usable().then_some(open)) {
            Some(open) => open,
            None => Channel::open(&self.0.server, &self.0.kernel).await?,
        };
        let mut request = open.request(code, silent).await?;
        loop {
            let told = open.next(&mut request).await?;
            let last = told.contains(&Told::Done);
            for one in told {
                tell(one).await;
            }
            if last {
                break;
            }
        }
        // Kept only if it was read to the end.
        *channel = Some(open);
        Ok(())
    }
}

/// All contexts.
#[derive(Debug)]
pub struct Code {
    server: Option<Server>,
    contexts: Mutex<HashMap<String, Arc<Context>>>,
    /// By language, made when it is first needed; one at a time.
    defaults: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<String>>>>>,
}

impl Code {
    /// On a server, if there is one.
    pub fn new(server: Option<Server>) -> Self {
        Self { server, contexts: Mutex::default(), defaults: Mutex::default() }
    }

    /// Whether there is a server.
    pub fn is_configured(&self) -> bool {
        self.server.is_some()
    }

    fn contexts(&self) -> MutexGuard<'_, HashMap<String, Arc<Context>>> {
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The context of an id.
    pub fn get(&self, id: &str) -> Option<Arc<Context>> {
        self.contexts().get(id).cloned()
    }

    /// All contexts of a language, or of any.
    pub fn list(&self, language: Option<&str>) -> Vec<Arc<Context>> {
        let contexts = self.contexts();
        let mut found: Vec<_> =
            contexts.values().filter(|context| language.is_none_or(|of| of == context.language)).cloned().collect();
        found.sort_by(|one, other| one.id.cmp(&other.id));
        found
    }

    /// Makes a context.
    ///
    /// # Errors
    /// When there is no server or no kernel for the language.
    pub async fn create(&self, language: &str, cwd: Option<(String, PathBuf)>) -> Result<Arc<Context>, Error> {
        let server = self.server.as_ref().ok_or_else(|| {
            Error::Refused("language runtime server not configured, please check your image runtime".into())
        })?;
        let kernel = self.kernel_for(server, language).await?;
        let name = ids::hex();
        let file = match &cwd {
            Some((_, path)) => path.join(format!("{name}.ipynb")),
            None => PathBuf::from(format!("{name}.ipynb")),
        };
        let body = json!({
            "path": notebook_path(&file),
            "name": name,
            "type": "notebook",
            "kernel": {"name": kernel},
        });
        let good = [StatusCode::OK, StatusCode::CREATED];
        let session = server.ask(Method::POST, "/api/sessions", Some(body), &good).await?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let (Some(id), Some(kernel)) = (text(&session["id"]), text(&session["kernel"]["id"])) else {
            return Err(Error::Refused(format!("POST /api/sessions: the answer has no ids: {session}")));
        };
        let context = Arc::new(Context {
            id: id.clone(),
            language: language.to_owned(),
            cwd: cwd.map(|(asked, _)| asked),
            kernel,
            server: server.clone(),
            turn: Arc::default(),
            channel: tokio::sync::Mutex::new(None),
        });
        self.contexts().insert(id, context.clone());
        if let Some((path, turn)) = context.cwd.clone().zip(context.turn()) {
            // The server starts kernels where it wants when the path is not below its own directory.
            turn.enter(&path).await;
        }
        Ok(context)
    }

    /// The default context of a language, made if there is none.
    ///
    /// # Errors
    /// As for [`Self::create`].
    pub async fn default_of(&self, language: &str) -> Result<Arc<Context>, Error> {
        let default = {
            let mut defaults = self.defaults.lock().unwrap_or_else(PoisonError::into_inner);
            defaults.entry(language.to_owned()).or_default().clone()
        };
        let mut default = default.lock().await;
        if let Some(context) = default.as_ref().and_then(|id| self.get(id)) {
            return Ok(context);
        }
        let context = self.create(language, None).await?;
        *default = Some(context.id.clone());
        Ok(context)
    }

    /// Ends a context and its kernel. Whether there was one.
    ///
    /// # Errors
    /// The server's; the context is gone all the same.
    pub async fn delete(&self, id: &str) -> Result<bool, Error> {
        let Some(context) = self.contexts().remove(id) else { return Ok(false) };
        let good = [StatusCode::OK, StatusCode::NO_CONTENT, StatusCode::NOT_FOUND];
        context.server.ask(Method::DELETE, &format!("/api/sessions/{id}"), None, &good).await?;
        Ok(true)
    }

    /// The name of a kernel for a language. Official images register theirs by the language's name beside the one that
    /// every installation has.
    async fn kernel_for(&self, server: &Server, language: &str) -> Result<String, Error> {
        let until = tokio::time::Instant::now() + STARTING;
        let specs = loop {
            match server.ask(Method::GET, "/api/kernelspecs", None, &[StatusCode::OK]).await {
                Err(Error::Unreachable(_, _)) if tokio::time::Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(250)).await;
                }
                other => break other?,
            }
        };
        let known = specs["kernelspecs"].as_object().cloned().unwrap_or_default();
        let mut names: Vec<&String> = known
            .iter()
            .filter(|(_, spec)| spec["spec"]["language"].as_str().is_some_and(|of| of.eq_ignore_ascii_case(language)))
            .map(|(name, _)| name)
            .collect();
        names.sort_by_key(|name| (*name != language, *name == "python3", (*name).clone()));
        match names.first() {
            Some(name) => Ok((*name).clone()),
            None if known.contains_key(language) => Ok(language.to_owned()),
            None => Err(Error::Refused(format!("no kernel specs found for language {language}"))),
        }
    }
}

impl Turn {
    /// Changes the directory of a kernel that knows how.
    async fn enter(&self, path: &str) {
        let quoted = serde_json::to_string(path).unwrap_or_default();
        let code = match self.0.language.as_str() {
            "python" => format!("import os as __os; __os.chdir({quoted}); del __os"),
            "bash" => format!("cd -- {}", crate::process::spawn::quote(path)),
            "javascript" | "typescript" => format!("process.chdir({quoted})"),
            _ => return,
        };
        if let Err(e) = self.prepare(&code).await {
            log::warn!("enter {path} in context {}: {e}", self.0.id);
        }
    }
}

/// Servers take paths relative to their own directory.
fn notebook_path(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}
