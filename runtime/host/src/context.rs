//! What a module or component gets to see of this process.

use anyhow::{Context as _, Result};
use http_body_util::BodyExt;
use runx_wasm::engine::Kind;
use runx_wasm::stdio::{Stderr, Stdin, Stdout};
use wasmtime::component::ResourceTable;
use wasmtime::{Engine, Store, StoreLimits, StoreLimitsBuilder};
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::sockets::SocketAddrUse;
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_http::p3::bindings::http::types::ErrorCode;
use wasmtime_wasi_http::{
    Error as HttpError, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView,
};

use crate::arguments::{Arguments, Verb};

/// What a component's functions of the host work on.
pub(crate) struct Host {
    wasi: WasiCtx,
    http: WasiHttpCtx,
    table: ResourceTable,
    limits: StoreLimits,
    requests: Requests,
}

/// What becomes of HTTP requests that a component makes: without a network there are none.
struct Requests {
    allowed: bool,
}

type Answer = Result<(http::Response<WasiBody>, Sent), HttpError>;
type Sent = Box<dyn Future<Output = Result<(), HttpError>> + Send>;

impl WasiHttpHooks for Requests {
    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _: Sent,
    ) -> Box<dyn Future<Output = Answer> + Send> {
        let allowed = self.allowed;
        Box::new(async move {
            if !allowed {
                return Err(ErrorCode::HttpRequestDenied.into());
            }
            let (response, sent) = wasmtime_wasi_http::default_send_request(request, options).await?;
            Ok((response.map(BodyExt::boxed_unsync), Box::new(sent) as Sent))
        })
    }
}

/// The same for a module.
pub(crate) struct ModuleHost {
    pub(crate) wasi: WasiP1Ctx,
    limits: StoreLimits,
}

impl WasiView for Host {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for Host {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { ctx: &mut self.http, table: &mut self.table, hooks: &mut self.requests }
    }
}

/// The directories of a container that are no module's business: they show the kernel's insides.
const KERNELS: [&str; 3] = ["proc", "sys", "dev"];

fn builder(arguments: &Arguments) -> Result<WasiCtxBuilder> {
    let mut builder = WasiCtxBuilder::new();
    // A command has the only thread; a server's must not be held up.
    builder.allow_blocking_current_thread(arguments.verb != Verb::Serve);
    builder.args(&arguments.args).envs(&arguments.env);
    for directory in &arguments.directories {
        let permissions = if directory.read_only { FsPerms::ReadOnly } else { FsPerms::ReadWrite };
        builder
            .preopened_dir(&directory.host, &directory.guest, permissions)
            .map_err(|e| anyhow::anyhow!("{e:#}"))
            .with_context(|| format!("open the directory {}", directory.host))?;
    }
    if arguments.in_container {
        add_container(&mut builder)?;
    }
    // Sockets without an address are harmless, and which addresses there are is decided below: none, if nothing is.
    builder.allow_tcp(true).allow_udp(true);
    if arguments.network {
        builder.inherit_network().allow_ip_name_lookup(true);
    } else if !arguments.ports.is_empty() {
        let ports = arguments.ports.clone();
        builder.socket_addr_check(move |address, usage| {
            let bind = matches!(usage, SocketAddrUse::TcpBind | SocketAddrUse::UdpBind);
            let allowed = bind && ports.contains(&address.port());
            Box::pin(async move { allowed })
        });
    }
    Ok(builder)
}

/// The container's root, and its working directory.
fn add_container(builder: &mut WasiCtxBuilder) -> Result<()> {
    let open = |builder: &mut WasiCtxBuilder, path: &str| {
        builder
            .preopened_dir(path, path, FsPerms::ReadWrite)
            .map(drop)
            .map_err(|e| anyhow::anyhow!("{e:#}"))
            .with_context(|| format!("open the directory {path}"))
    };
    open(builder, "/")?;
    let cwd = std::env::current_dir().unwrap_or_else(|_| "/".into());
    let cwd = cwd.to_string_lossy();
    let first = cwd.trim_start_matches('/').split('/').next().unwrap_or_default();
    if cwd != "/" && !KERNELS.contains(&first) {
        open(builder, &cwd)?;
        builder.initial_cwd(cwd);
    }
    Ok(())
}

fn limits(arguments: &Arguments) -> StoreLimits {
    let mut limits = StoreLimitsBuilder::new();
    if let Some(memory) = arguments.memory {
        // A module that checks what memory.grow returns gets its answer, and one that does not, traps by itself.
        limits = limits.memory_size(memory);
    }
    limits.build()
}

fn fill<T>(store: &mut Store<T>, arguments: &Arguments) -> Result<()> {
    // It bounds what one call may make the host allocate, for hosts that share a process.
    store.set_hostcall_fuel(usize::MAX);
    if arguments.kind == Kind::Component {
        // A server's instances take turns; a command has its process for itself.
        store.epoch_deadline_async_yield_and_update(1);
        store.set_epoch_deadline(if arguments.verb == Verb::Serve { 1 } else { u64::MAX / 2 });
    }
    if let Some(fuel) = arguments.fuel {
        store.set_fuel(fuel).map_err(|e| anyhow::anyhow!("{e:#}"))?;
    }
    Ok(())
}

/// A store for a component, with this process's streams unless they are a server's.
pub(crate) fn component_store(engine: &Engine, arguments: &Arguments) -> Result<Store<Host>> {
    let mut builder = builder(arguments)?;
    if arguments.verb == Verb::Serve {
        // Its threads do not wait for whoever reads the log, and requests have bodies and no stdin.
        builder.inherit_stdout().inherit_stderr();
    } else {
        builder.stdin(Stdin).stdout(Stdout).stderr(Stderr);
    }
    let host = Host {
        wasi: builder.build(),
        http: WasiHttpCtx::new(),
        table: ResourceTable::new(),
        limits: limits(arguments),
        requests: Requests { allowed: arguments.network },
    };
    let mut store = Store::new(engine, host);
    store.limiter(|host| &mut host.limits);
    fill(&mut store, arguments)?;
    Ok(store)
}

/// A store for a module.
pub(crate) fn module_store(engine: &Engine, arguments: &Arguments) -> Result<Store<ModuleHost>> {
    let mut builder = builder(arguments)?;
    builder.stdin(Stdin).stdout(Stdout).stderr(Stderr);
    let host = ModuleHost { wasi: builder.build_p1(), limits: limits(arguments) };
    let mut store = Store::new(engine, host);
    store.limiter(|host| &mut host.limits);
    fill(&mut store, arguments)?;
    Ok(store)
}
