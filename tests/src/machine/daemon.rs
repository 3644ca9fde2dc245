//! The installer as a DaemonSet runs it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};

use super::Machine;

/// `runx-node run`, ended when this goes.
#[derive(Debug)]
pub struct Running {
    child: Child,
    address: String,
}

impl Running {
    /// Starts it with more flags.
    ///
    /// # Panics
    /// When that is not possible.
    pub fn start(machine: &Machine, words: &[&str]) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("find a port");
        let address = listener.local_addr().expect("it has an address").to_string();
        drop(listener);
        let mut command =
            machine.command(&[&["run", "--listen", &address, "--interval", "1", "--timeout", "5"], words].concat());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("start runx-node");
        Self { child, address }
    }

    /// What it answers, by HTTP's code and the body; 0 if it does not.
    pub fn get(&self, path: &str) -> (u16, String) {
        let Ok(mut stream) = TcpStream::connect(&self.address) else { return (0, String::new()) };
        let _ = stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: node\r\n\r\n").as_bytes());
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        let code = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        (code, text.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
    }

    /// Ends it as a kubelet does. Tells its exit code.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn end(&mut self) -> Option<i32> {
        // SAFETY: only a signal, to a child that is not reaped.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        self.child.wait().expect("wait for it").code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
