//! What lives on this host: VMs and snapshots, read from their run directories. What is on the disk beside:
//! [`crate::durable`].
//!
//! There is no other register. A directory whose lock is free belongs to a dead process; it is swept
//! whenever a verb looks here.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use forkd_api::types::VmRecord;
use forkd_vmm::run_dir;

use crate::durable;
use crate::paths::Paths;
use crate::vm_client::VmClient;

/// A living VM or snapshot.
#[derive(Debug, Clone)]
pub struct Live {
    /// Its record.
    pub record: VmRecord,
    /// The way to talk to it.
    pub client: VmClient,
}

/// Sweeps what died and lists the living VMs, the oldest first.
///
/// # Errors
/// The run directory can't be read or swept.
pub fn vms(paths: &Paths) -> Result<Vec<Live>> {
    living(&paths.vms())
}

/// The same for snapshots.
///
/// # Errors
/// The run directory can't be read or swept.
pub fn snapshots(paths: &Paths) -> Result<Vec<Live>> {
    living(&paths.snapshots())
}

/// What lives in a directory of run directories, once what died there is swept.
///
/// # Errors
/// It can't be read or swept.
pub fn living(dir: &Path) -> Result<Vec<Live>> {
    run_dir::sweep(dir)?;
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read {}", dir.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", dir.display()))?.path();
        // One that is being made has no record yet; one that ends has none any more.
        if let Ok(record) = run_dir::read_record(&path) {
            let client = VmClient::new(&path, &record.id);
            found.push(Live { record, client });
        }
    }
    found.sort_by(|a, b| {
        (a.record.created_unix_ms, &a.record.id).cmp(&(b.record.created_unix_ms, &b.record.id))
    });
    Ok(found)
}

/// Finds a VM by id, name, or the unique start of an id.
///
/// # Errors
/// None fits, or more than one.
pub fn vm(paths: &Paths, reference: &str) -> Result<Live> {
    pick(vms(paths)?, reference)
}

fn pick(vms: Vec<Live>, reference: &str) -> Result<Live> {
    let exact = |live: &&Live| live.record.id == reference || live.record.name == reference;
    if let Some(live) = vms.iter().find(exact) {
        return Ok(live.clone());
    }
    let short = reference.strip_prefix("vm-").unwrap_or(reference);
    let fits = |live: &&Live| {
        live.record
            .id
            .strip_prefix("vm-")
            .is_some_and(|id| !short.is_empty() && id.starts_with(short))
    };
    let mut found = vms.iter().filter(fits);
    match (found.next(), found.next()) {
        (Some(live), None) => Ok(live.clone()),
        (Some(a), Some(b)) => bail!(
            "{reference:?} fits more than one VM ({}, {} ...): give more of the id",
            a.record.id,
            b.record.id
        ),
        _ => bail!("no VM {reference:?}: `forkd ls` lists those that run"),
    }
}

/// Finds a snapshot by its tag.
///
/// # Errors
/// There is none, or the tag can't be one.
pub fn snapshot(paths: &Paths, tag: &str) -> Result<Live> {
    forkd_image::check_tag(tag).map_err(anyhow::Error::msg)?;
    let found = snapshots(paths)?.into_iter().find(|live| live.record.id == tag);
    found.ok_or_else(|| no_snapshot(tag))
}

/// That there is no such snapshot, and what to do.
pub fn no_snapshot(tag: &str) -> anyhow::Error {
    anyhow!(
        "no snapshot {tag:?}: `forkd snapshot ls` lists them, `forkd snapshot create {tag}` makes it"
    )
}

/// Who uses an image: ids of VMs and tags of snapshots, live and durable.
///
/// # Errors
/// The run directory or the store of durable snapshots can't be read.
pub fn users_of_image(paths: &Paths, digest: &str) -> Result<Vec<String>> {
    let snapshots = snapshots(paths)?
        .into_iter()
        .map(|l| (l.record.image_digest, format!("snapshot {}", l.record.id)));
    let vms = vms(paths)?.into_iter().map(|l| (l.record.image_digest, l.record.id));
    let mut users: Vec<String> =
        snapshots.chain(vms).filter(|(d, _)| d == digest).map(|(_, who)| who).collect();
    for who in durable::users_of_image(paths, digest)? {
        // One that is live as well is named once.
        if !users.contains(&who) {
            users.push(who);
        }
    }
    Ok(users)
}

/// Checks that no living VM has one of these names.
///
/// # Errors
/// One has: names it.
pub fn require_free_names(paths: &Paths, names: &[String]) -> Result<()> {
    let taken = vms(paths)?;
    match first_taken(&taken, names) {
        Some(live) => bail!("{}", name_taken(&live.record)),
        None => Ok(()),
    }
}

/// Who has the first of the names that is taken, as name or id.
pub fn first_taken<'a>(living: &'a [Live], names: &[String]) -> Option<&'a Live> {
    let by_name: HashMap<&str, &Live> = (living.iter())
        .flat_map(|live| [(&*live.record.name, live), (&*live.record.id, live)])
        .collect();
    names.iter().find_map(|name| by_name.get(name.as_str()).copied())
}

/// That there is a VM of that name.
pub fn name_taken(VmRecord { name, id, .. }: &VmRecord) -> String {
    format!(
        "a VM named {name} runs already ({id}): pick another --name, or end it with `forkd kill {id}`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(id: &str, name: &str) -> Live {
        let record = VmRecord {
            id: id.into(),
            name: name.into(),
            zygote: false,
            pid: 1,
            vcpus: 1,
            mem_mib: 64,
            image: "i".into(),
            image_digest: "d".into(),
            parent: None,
            generation: 0,
            created_unix_ms: 0,
        };
        Live { record, client: VmClient::new(Path::new("/nonexistent"), id) }
    }

    #[test]
    fn references_are_ids_names_and_unique_starts() {
        let vms = || vec![live("vm-abc", "web"), live("vm-abd", "vm-abd"), live("vm-x", "ab")];
        let id = |reference| pick(vms(), reference).map(|l| l.record.id);
        assert_eq!(id("vm-abc").unwrap(), "vm-abc");
        assert_eq!(id("web").unwrap(), "vm-abc");
        assert_eq!(id("vm-abd").unwrap(), "vm-abd");
        assert_eq!(id("ab").unwrap(), "vm-x", "a whole name goes before the start of an id");
        assert_eq!(id("x").unwrap(), "vm-x");
        assert!(id("vm-ab").unwrap_err().to_string().contains("more than one"));
        assert!(id("vm-").unwrap_err().to_string().contains("no VM"));
        assert!(id("nope").unwrap_err().to_string().contains("forkd ls"));
    }
}
