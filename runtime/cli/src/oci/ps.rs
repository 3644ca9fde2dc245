//! `ps`: the processes of a container.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::arguments::ListFormat;
use crate::{Context, Failure, print};

/// `runx ps`. The table is that of ps(1), reduced to the container's processes.
pub(crate) fn ps(context: &Context, id: &str, format: ListFormat, options: &[OsString]) -> Result<u8, Failure> {
    let pids = context.runtime().load(id)?.pids()?;
    if format == ListFormat::Json {
        return print(&format!("{}\n", serde_json::to_string(&pids).context("print the processes")?));
    }
    let default = [OsString::from("-ef")];
    let options = if options.is_empty() { &default } else { options };
    let done = Command::new("ps").args(options).output().context("run ps")?;
    let text = String::from_utf8_lossy(&done.stdout);
    if !done.status.success() {
        let complaint = String::from_utf8_lossy(&done.stderr);
        return Err(anyhow::anyhow!("run ps {options:?}: {}: {}", done.status, complaint.trim()).into());
    }
    print(&only(&text, &pids)?)
}

/// The title, and the lines of these processes.
fn only(table: &str, pids: &[i32]) -> Result<String> {
    let mut lines = table.lines();
    let title = lines.next().unwrap_or_default();
    let Some(column) = title.split_ascii_whitespace().position(|name| name == "PID") else {
        bail!("the output of ps has no PID column: {title:?}");
    };
    let mut out = format!("{title}\n");
    for line in lines {
        let Some(field) = line.split_ascii_whitespace().nth(column) else { continue };
        let pid: i32 = field.parse().with_context(|| format!("find the pid in the output of ps {line:?}"))?;
        if pids.contains(&pid) {
            out.push_str(line);
            out.push('\n');
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_containers_lines_are_left() {
        let table = "USER   PID COMMAND\nroot     1 init\nroot    17 sh -c x\n\nroot   170 sleep\n";
        assert_eq!(only(table, &[17]).unwrap(), "USER   PID COMMAND\nroot    17 sh -c x\n");
        assert!(only("USER COMMAND\n", &[1]).is_err());
    }
}
