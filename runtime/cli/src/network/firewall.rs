//! The host's rules for a bridge: packets of its containers pass, leave the host with the host's address, and do not reach its
//! loopback address.
//!
//! They hold for the bridge and not for a container, as docker's do: nothing that a container does to its own address
//! makes them wrong or leaves one behind, and the second container costs nothing. The CNI plugins for the same (`ipMasq` and
//! `firewall`) make some for each container, by its address; `firewall` also keeps out what comes to published ports where the
//! host forwards nothing else, as with docker beside it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

use super::subnet::Subnet;

/// The rules of one bridge.
pub(super) struct Rules<'a> {
    program: PathBuf,
    bridge: &'a str,
    /// Whether packets are let pass, beside being given the host's address.
    forward: bool,
}

/// Where iptables is.
pub(super) fn iptables() -> Option<PathBuf> {
    let path = super::cni::with_system_programs();
    std::env::split_paths(&path).map(|directory| directory.join("iptables")).find(|file| file.is_file())
}

impl<'a> Rules<'a> {
    /// `None` without iptables, with which there cannot be any either.
    pub(super) fn of(bridge: &'a str, forward: bool) -> Option<Self> {
        Some(Self { program: iptables()?, bridge, forward })
    }

    /// The name of the chain, and of the others' reason to be.
    fn chain(&self) -> String {
        format!("RUNX-{}", self.bridge)
    }

    fn jump(&self) -> Vec<String> {
        words(&["-m", "comment", "--comment", &self.chain(), "-j", &self.chain()])
    }

    fn masquerade(&self, subnet: Subnet) -> Vec<String> {
        let (chain, subnet) = (self.chain(), subnet.to_string());
        let to_others = ["-s", &subnet, "!", "-d", "224.0.0.0/4", "!", "-o", self.bridge];
        words(&[&to_others[..], &["-m", "comment", "--comment", &chain, "-j", "MASQUERADE"]].concat())
    }

    /// Published ports on the host's loopback address make the host take packets for it from the bridge (`route_localnet`,
    /// which the plugin for ports sets). Others than those of such a connection would reach services that listen there because
    /// only the host is to reach them.
    fn guard(&self) -> Vec<String> {
        let chain = self.chain();
        let own =
            ["-i", self.bridge, "-d", "127.0.0.0/8", "-m", "conntrack", "!", "--ctstate", "RELATED,ESTABLISHED,DNAT"];
        words(&[&own[..], &["-m", "comment", "--comment", &chain, "-j", "DROP"]].concat())
    }

    /// Whether all of them are there.
    pub(super) fn are_there(&self, subnet: Subnet) -> Result<bool> {
        let jump = if self.forward { format!("-C FORWARD {}\n", self.jump().join(" ")) } else { String::new() };
        self.have(subnet, &jump)
    }

    /// Whether one in each table is there, and what else is asked about in the table `filter`. By one program for all of them,
    /// since every start of a container asks.
    fn have(&self, subnet: Subnet, others: &str) -> Result<bool> {
        let (masquerade, guard) = (self.masquerade(subnet).join(" "), self.guard().join(" "));
        let text = format!("*nat\n-C POSTROUTING {masquerade}\nCOMMIT\n*filter\n-C INPUT {guard}\n{others}COMMIT\n");
        Ok(self.tell(&text)?.status.success())
    }

    /// Makes sure that they are. Whoever flushes a table takes all of ours in it, so one of each is looked for.
    pub(super) fn ensure(&self, subnet: Subnet) -> Result<()> {
        if self.have(subnet, "")? {
            return Ok(());
        }
        self.remove()?;
        let (chain, bridge) = (self.chain(), self.bridge);
        let masquerade = self.masquerade(subnet).join(" ");
        let guard = self.guard().join(" ");
        let mut text = format!("*nat\n-A POSTROUTING {masquerade}\nCOMMIT\n*filter\n-I INPUT {guard}\n");
        if self.forward {
            text.push_str(&format!(
                ":{chain} - [0:0]\n\
                 -A {chain} -i {bridge} -j ACCEPT\n\
                 -A {chain} -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT\n\
                 -I FORWARD {}\n",
                self.jump().join(" ")
            ));
        }
        text.push_str("COMMIT\n");
        self.restore(&text)
    }

    /// Changes tables as iptables-save(8) writes them, each at once: the kernel takes its time after every change.
    fn restore(&self, text: &str) -> Result<()> {
        succeeded(&self.restorer(), &[], self.tell(text)?).map(drop)
    }

    fn restorer(&self) -> PathBuf {
        self.program.with_file_name("iptables-restore")
    }

    /// Passes commands on to iptables-restore.
    fn tell(&self, text: &str) -> Result<Output> {
        let program = self.restorer();
        let mut command = Command::new(&program);
        command.args(["--noflush", "--wait", "30"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let told = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(text.as_bytes()));
        let output = child.wait_with_output().with_context(|| format!("wait for {}", program.display()))?;
        // One that ends early has said why.
        if output.status.success() {
            told.context("tell iptables-restore the rules")?;
        }
        Ok(output)
    }

    /// Removes them; what is not there is fine.
    pub(super) fn remove(&self) -> Result<()> {
        let mut text = String::new();
        for (table, chains) in [("nat", &["POSTROUTING"][..]), ("filter", &["FORWARD", "INPUT"])] {
            let mut changes = String::new();
            for chain in chains {
                for rule in self.list(table, chain)?.iter().filter(|rule| self.is_ours(rule)) {
                    changes.push_str(&format!("-D {}\n", rule[1..].join(" ")));
                }
            }
            let own = self.chain();
            if table == "filter" && self.iptables(table, &words(&["-S", &own]))?.status.success() {
                changes.push_str(&format!("-F {own}\n-X {own}\n"));
            }
            if !changes.is_empty() {
                text.push_str(&format!("*{table}\n{changes}COMMIT\n"));
            }
        }
        if text.is_empty() { Ok(()) } else { self.restore(&text) }
    }

    fn is_ours(&self, rule: &[String]) -> bool {
        let chain = self.chain();
        rule.first().is_some_and(|word| word == "-A")
            && rule.windows(2).any(|pair| pair[0] == "--comment" && pair[1] == chain)
    }

    /// The rules of a chain, as words.
    fn list(&self, table: &str, chain: &str) -> Result<Vec<Vec<String>>> {
        let rules = self.run(table, &words(&["-S", chain]))?;
        // Words of other people's comments may be torn; ours have no spaces.
        let unquoted = |word: &str| word.trim_matches('"').to_owned();
        Ok(rules.lines().map(|line| line.split_ascii_whitespace().map(unquoted).collect()).collect())
    }

    fn iptables(&self, table: &str, args: &[String]) -> Result<Output> {
        let mut command = Command::new(&self.program);
        command.args(["--wait", "30", "--table", table]).args(args).stdin(Stdio::null());
        command.output().with_context(|| format!("start {}", self.program.display()))
    }

    fn run(&self, table: &str, args: &[String]) -> Result<String> {
        succeeded(&self.program, args, self.iptables(table, args)?)
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn succeeded(program: &Path, args: &[String], output: Output) -> Result<String> {
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} {}: {}", program.display(), args.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The words with which the plugin for ports marks the rules of a container.
pub(super) fn publishes(network: &str, container: &str) -> Result<bool> {
    let rules = Rules { program: iptables().context("iptables is not there")?, bridge: "", forward: false };
    let listed = rules.run("nat", &words(&["-S", "CNI-HOSTPORT-DNAT"]))?;
    Ok(listed.contains(&format!("name: \\\"{network}\\\" id: \\\"{container}\\\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_rules_are_ours() {
        let rules = Rules { program: "/x".into(), bridge: "runx0", forward: true };
        let ours = |line: &str| rules.is_ours(&words(&line.split(' ').collect::<Vec<_>>()));
        assert!(ours("-A FORWARD -m comment --comment RUNX-runx0 -j RUNX-runx0"));
        assert!(!ours("-A FORWARD -m comment --comment RUNX-runx01 -j RUNX-runx01"));
        assert!(!ours("-N RUNX-runx0"));
        // The longest name of an interface still makes a chain's name.
        assert!(Rules { program: "/x".into(), bridge: "fifteen-letters", forward: true }.chain().len() <= 28);
    }
}
