//! Commands that cannot hang the tests.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// No step of a test takes this long unless it hangs.
fn limit() -> Duration {
    Duration::from_secs(if crate::slow() { 240 } else { 60 })
}

/// What a command did.
#[derive(Debug)]
pub struct Done {
    /// Its exit code, or 128 and the signal.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard output, where that is no text.
    pub bytes: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
}

impl Done {
    /// Fails the test unless the command succeeded.
    ///
    /// # Panics
    /// With all output, if the exit code is not 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Fails the test unless the command failed with this code and standard error contains every word.
    ///
    /// # Panics
    /// With all output, otherwise.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        // The text log quotes messages.
        let text = self.stderr.replace("\\\"", "\"");
        for word in words {
            assert!(text.contains(word), "{word:?} is not in: {}", self.stderr);
        }
        self
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code, stdout: text(output.stdout.clone()), bytes: output.stdout, stderr: text(output.stderr) }
    }
}

/// Runs a command to its end with `input` on standard input.
///
/// # Panics
/// When it cannot be started, or does not end in time; it is killed then.
#[track_caller]
pub fn run_with(command: &mut Command, input: &str) -> Done {
    run_bytes(command, input.as_bytes())
}

/// As [`run_with`], with anything on standard input.
///
/// # Panics
/// As [`run_with`].
#[track_caller]
pub fn run_bytes(command: &mut Command, input: &[u8]) -> Done {
    let shown = format!("{command:?}");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap_or_else(|e| panic!("start {shown}: {e}"));
    if let Some(mut stdin) = child.stdin.take() {
        // A program that reads nothing may be gone by now.
        let _ = std::io::Write::write_all(&mut stdin, input);
    }
    let reader = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                let _ = stream.read_to_end(&mut bytes);
            }
            bytes
        })
    };
    let stdout = reader(child.stdout.take().map(|s| Box::new(s) as _));
    let stderr = reader(child.stderr.take().map(|s| Box::new(s) as _));
    let end = Instant::now() + limit();
    loop {
        match child.try_wait().expect("wait for a child") {
            Some(status) => {
                // Who detaches must have closed these, or the join below hangs and shows it.
                let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
                return Output { status, stdout, stderr }.into();
            }
            None if Instant::now() > end => {
                // SAFETY: the group is the child's own, and the child has not been reaped.
                unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
                let _ = child.wait();
                panic!("{shown} did not end within {:?}", limit());
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// As [`run_with`], with nothing on standard input.
#[track_caller]
pub fn run(command: &mut Command) -> Done {
    run_with(command, "")
}

/// Asks again until `true`.
///
/// # Panics
/// When it never becomes true.
#[track_caller]
pub fn eventually(what: &str, mut test: impl FnMut() -> bool) {
    let end = Instant::now() + limit();
    while !test() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a command whose children outlive it and keep its streams: they go to a file.
///
/// # Panics
/// As [`run_with`].
#[track_caller]
pub fn run_detached(command: &mut Command, output: &std::path::Path) -> Done {
    let file = || std::fs::OpenOptions::new().create(true).append(true).open(output).expect("open the output file");
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file())
        .stderr(file())
        .spawn()
        .unwrap_or_else(|e| panic!("start {shown}: {e}"));
    let end = Instant::now() + limit();
    loop {
        if let Some(status) = child.try_wait().expect("wait for a child") {
            let text = std::fs::read(output).unwrap_or_default();
            return Output { status, stdout: Vec::new(), stderr: text }.into();
        }
        if Instant::now() > end {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{shown} did not end within {:?}", limit());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
