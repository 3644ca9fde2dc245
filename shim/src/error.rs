//! The runtime's errors as containerd expects them: gRPC status codes.

use containerd_shim_protos::ttrpc::{self, Code};
use runx_core::Error;

/// A ttrpc error of the given code.
pub(crate) fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}

/// There is nothing of that name.
pub(crate) fn not_found(message: impl Into<String>) -> ttrpc::Error {
    status(Code::NOT_FOUND, message)
}

/// The state does not allow it.
pub(crate) fn precondition(message: impl Into<String>) -> ttrpc::Error {
    status(Code::FAILED_PRECONDITION, message)
}

/// Any other failure, as Go's shim answers a plain error.
pub(crate) fn unknown(message: impl Into<String>) -> ttrpc::Error {
    status(Code::UNKNOWN, message)
}

/// The code that fits a runtime error.
pub(crate) fn from_runtime(error: Error) -> ttrpc::Error {
    let code = match &error {
        Error::NotFound(_) | Error::Finished => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::InvalidId { .. } | Error::InvalidSpec { .. } => Code::INVALID_ARGUMENT,
        Error::Unsupported { .. } => Code::UNIMPLEMENTED,
        _ => Code::UNKNOWN,
    };
    status(code, error.to_string())
}

/// As [`from_runtime`], with the runtime's error text after what was attempted.
pub(crate) fn runtime_failure(what: &str, error: Error) -> ttrpc::Error {
    match from_runtime(error) {
        ttrpc::Error::RpcStatus(mut status) => {
            status.message = format!("{what}: {}", status.message);
            ttrpc::Error::RpcStatus(status)
        }
        other => other,
    }
}
