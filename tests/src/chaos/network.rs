//! A network of this run's own: each process in a namespace, all of them on one bridge, and ways to cut them off.
//!
//! The run itself is in a namespace that holds the bridge, and in a mount namespace, so that nothing of it outlives the
//! process, however that ends. Only plain bridges and neighbour tables are used, which every kernel has: a cut link is a port
//! taken from its bridge, packets are lost one way by sending them to an address, or a port, where nobody is.

use std::{
    ffi::OsString,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

/// The folder where `ip netns` keeps its namespaces.
const NAMESPACES: &str = "/run";
const BRIDGE: &str = "cresset0";
/// The run's own number on the bridge.
const HOST: usize = 254;
/// Packets to this hardware address reach nobody.
const NOBODY: &str = "02:00:00:00:ff:ff";

/// What a program begins with that is to run in namespaces of its own, with the right to do everything there; `None` where
/// that isn't allowed.
pub fn apart() -> Option<Vec<OsString>> {
    let as_root = ["unshare", "--mount", "--net"];
    // Without root some kernels allow it to who is root in a user namespace.
    let as_user = ["unshare", "--user", "--map-root-user", "--mount", "--net"];
    let probe = format!(
        "mount -t tmpfs tmpfs {NAMESPACES} && ip link add {BRIDGE} type bridge && ip netns add a && ip netns exec a true && ss -H > /dev/null"
    );
    let works = |prefix: &[&str]| {
        let mut command = Command::new(prefix[0]);
        command.args(&prefix[1..]).args(["sh", "-c", &probe]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let prefix = [&as_root[..], &as_user[..]].into_iter().find(|prefix| works(prefix))?;
    Some(prefix.iter().map(OsString::from).collect())
}

/// The bridge with a link to each member.
#[derive(Debug)]
pub struct Network {
    members: Vec<String>,
}

impl Network {
    /// Makes it. The calling process has to be [`apart`].
    ///
    /// # Errors
    /// What the system's commands said.
    pub fn new(members: Vec<String>) -> anyhow::Result<Self> {
        run(&["mount", "-t", "tmpfs", "tmpfs", NAMESPACES])?;
        run(&["ip", "link", "add", BRIDGE, "type", "bridge"])?;
        run(&["ip", "link", "set", BRIDGE, "address", &hardware(HOST), "up"])?;
        run(&["ip", "link", "set", "lo", "up"])?;
        run(&["ip", "address", "add", &format!("{}/24", address(HOST)), "dev", BRIDGE])?;
        let network = Self { members };
        for (number, id) in network.members.iter().enumerate() {
            run(&["ip", "netns", "add", id])?;
            run(&["ip", "link", "add", &port(id), "type", "veth", "peer", "name", "eth0", "netns", id])?;
            run(&["ip", "link", "set", &port(id), "master", BRIDGE, "up"])?;
            run(&["ip", "-n", id, "link", "set", "eth0", "address", &hardware(number + 1), "up"])?;
            run(&["ip", "-n", id, "link", "set", "lo", "up"])?;
            run(&["ip", "-n", id, "address", "add", &format!("{}/24", address(number + 1)), "dev", "eth0"])?;
        }
        // Nobody's frames go out of a port of their own, where nobody is.
        run(&["ip", "link", "add", "nobody", "type", "veth", "peer", "name", "nobody-too"])?;
        run(&["ip", "link", "set", "nobody", "master", BRIDGE, "up"])?;
        run(&["ip", "link", "set", "nobody-too", "up"])?;
        Ok(network)
    }

    /// The address of a member.
    pub fn address(&self, id: &str) -> String {
        address(self.number(id))
    }

    /// What a program begins with that is to run where this member is.
    pub fn inside(id: &str) -> Vec<OsString> {
        ["ip", "netns", "exec", id].map(OsString::from).to_vec()
    }

    /// Takes a member off the bridge. Its own side sees nothing of it.
    ///
    /// # Errors
    /// What the system's commands said.
    pub fn cut(&self, id: &str) -> anyhow::Result<()> {
        run(&["ip", "link", "set", &port(id), "nomaster"])
    }

    /// Loses everything that a member sends.
    ///
    /// # Errors
    /// What the system's commands said.
    pub fn mute(&self, id: &str) -> anyhow::Result<()> {
        self.others(id).try_for_each(|other| {
            let neighbour = ["neighbour", "replace", &address(other), "lladdr", NOBODY, "nud", "permanent", "dev", "eth0"];
            run(&[&["ip", "-n", id], &neighbour[..]].concat())
        })
    }

    /// Loses everything that is sent to a member.
    ///
    /// # Errors
    /// What the system's commands said.
    pub fn deafen(&self, id: &str) -> anyhow::Result<()> {
        run(&["bridge", "fdb", "replace", &hardware(self.number(id)), "dev", "nobody", "master", "static"])
    }

    /// Resets every TCP connection of a member, as its peers see it and as it sees itself.
    ///
    /// # Errors
    /// What the system's commands said.
    pub fn reset(&self, id: &str) -> anyhow::Result<()> {
        run(&["ip", "netns", "exec", id, "ss", "--tcp", "--kill", "state", "connected"])
    }

    /// Undoes whatever was done to a member.
    ///
    /// # Errors
    /// What the system's commands said.
    pub fn heal(&self, id: &str) -> anyhow::Result<()> {
        // Both may be absent, which is no error.
        let _ = run(&["bridge", "fdb", "del", &hardware(self.number(id)), "dev", "nobody", "master"]);
        run(&["ip", "-n", id, "neighbour", "flush", "nud", "permanent", "dev", "eth0"])?;
        run(&["ip", "link", "set", &port(id), "master", BRIDGE, "up"])
    }

    fn number(&self, id: &str) -> usize {
        self.members.iter().position(|member| member == id).map_or(HOST, |at| at + 1)
    }

    fn others(&self, id: &str) -> impl Iterator<Item = usize> {
        let own = self.number(id);
        (1..=self.members.len()).chain([HOST]).filter(move |number| *number != own)
    }
}

/// The bridge's end of a member's link.
fn port(id: &str) -> String {
    format!("to-{id}")
}

fn address(number: usize) -> String {
    format!("10.77.0.{number}")
}

fn hardware(number: usize) -> String {
    format!("02:00:00:00:00:{number:02x}")
}

/// Runs one of the system's commands to its end.
pub(super) fn run(command_line: &[&str]) -> anyhow::Result<()> {
    let words = command_line.join(" ");
    let mut command = Command::new(command_line[0]);
    let output = command.args(&command_line[1..]).stdin(Stdio::null()).output().with_context(|| words.clone())?;
    ensure!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
