//! `forkd snapshot ls`: the live and the durable ones in one list.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use forkd_api::types::VmRecord;
use forkd_snapshot::{Entry, Manifest, Parent, Status};
use serde::Serialize;

use crate::cli::OutputArgs;
use crate::paths::Paths;
use crate::process_memory::ProcessMemory;
use crate::{durable, output, parallel, registry};

/// List snapshots
///
/// live: a process holds it. durable: it is on the disk. writing: it is on its way there. failed: it did not get
/// there. unreadable: it is damaged, or a later forkd wrote it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot ls
  forkd snapshot ls --json | jq -r '.[] | select(.durable) | .tag'")]
pub struct Args {
    #[command(flatten)]
    output: OutputArgs,
}

const HEADER: [&str; 9] = ["tag", "image", "vcpus", "mem", "age", "status", "size", "pid", "pss"];

/// A living snapshot.
#[derive(Debug, Serialize)]
struct Zygote {
    #[serde(flatten)]
    record: VmRecord,
    /// None if it has just ended.
    memory: Option<ProcessMemory>,
}

/// What the store has under a tag.
#[derive(Debug, Serialize)]
struct Stored {
    /// As [`word`] has it.
    status: &'static str,
    /// Bytes its files take on the disk; none while it is written.
    disk_bytes: Option<u64>,
    /// None unless it is complete.
    manifest: Option<Box<Manifest>>,
    /// What it is a diff over, or will be.
    parent: Option<Parent>,
    /// Why it has failed or can't be read.
    reason: Option<String>,
}

/// A line of the list. What is not known yet, as it is being written, is none.
#[derive(Debug, Serialize)]
struct Row {
    tag: String,
    /// `live`, one of [`word`]'s, or both: `live+durable`.
    status: String,
    image: Option<String>,
    image_digest: Option<String>,
    vcpus: Option<u32>,
    mem_mib: Option<u64>,
    created_unix_ms: Option<u64>,
    live: Option<Zygote>,
    durable: Option<Stored>,
}

/// A status of the store in one word.
pub fn word(status: &Status) -> &'static str {
    match status {
        Status::Ready(_) => "durable",
        Status::Unreadable(_) => "unreadable",
        Status::Writing { .. } => "writing",
        Status::Failed(_) => "failed",
    }
}

/// The status of a tag that may be live, in the store, or both.
pub fn status(live: bool, stored: Option<&'static str>) -> String {
    let words = live.then_some("live").into_iter().chain(stored);
    words.collect::<Vec<_>>().join("+")
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// The run directory or the store can't be read.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let mut entries = Vec::new();
        if let Some(store) = durable::existing(paths)? {
            // What a dead writer left takes space until somebody looks. That it can't be freed hides nothing.
            if let Err(error) = store.sweep() {
                output::note(&format!("forkd: cannot clear away what dead writers left: {error}"));
            }
            entries = store.list()?;
        }
        let live = parallel::map(&registry::snapshots(paths)?, |live| Zygote {
            record: live.record.clone(),
            memory: ProcessMemory::of(live.record.pid).ok(),
        });
        let rows = merge(live, entries, &paths.snapshot_store());
        if self.output.json {
            output::json(&rows.iter().map(Row::to_json).collect::<Result<Vec<_>>>()?)?;
        } else if rows.is_empty() {
            output::line("no snapshots; `forkd snapshot create TAG` makes one")?;
        } else {
            output::line(&output::table(&HEADER, rows.iter().map(Row::cells)))?;
            for note in rows.iter().filter_map(Row::note) {
                output::line(&note)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// One row for each tag, sorted by tag. An attempt that failed beside a complete snapshot of the same tag has a row of
/// its own.
fn merge(live: Vec<Zygote>, mut entries: Vec<Entry>, store: &Path) -> Vec<Row> {
    let mut live: BTreeMap<String, Zygote> =
        live.into_iter().map(|zygote| (zygote.record.id.clone(), zygote)).collect();
    entries.sort_by(|a, b| {
        (&a.tag, durable::rank(&a.status)).cmp(&(&b.tag, durable::rank(&b.status)))
    });
    let mut rows: Vec<Row> = entries
        .into_iter()
        .map(|entry| {
            let zygote = live.remove(&entry.tag);
            Row::new(entry.tag, zygote, Some(Stored::of(entry.status, store)))
        })
        .collect();
    rows.extend(live.into_iter().map(|(tag, zygote)| Row::new(tag, Some(zygote), None)));
    // Stable: a tag's own rows stay in the order of their rank.
    rows.sort_by(|a, b| a.tag.cmp(&b.tag));
    rows
}

impl Stored {
    fn of(status: Status, store: &Path) -> Self {
        let word = word(&status);
        let (manifest, parent, reason) = match status {
            Status::Ready(manifest) => {
                let parent = manifest.parent.clone();
                (Some(manifest), parent, None)
            }
            Status::Writing { parent } => (None, parent, None),
            Status::Unreadable(reason) | Status::Failed(reason) => (None, None, Some(reason)),
        };
        let dir = manifest.as_ref().map(|manifest| store.join(&manifest.tag));
        // It may be removed while it is listed.
        let disk_bytes = dir.and_then(|dir| forkd_snapshot::disk_bytes(&dir).ok());
        Self { status: word, disk_bytes, manifest, parent, reason }
    }
}

impl Row {
    fn new(tag: String, live: Option<Zygote>, durable: Option<Stored>) -> Self {
        let record = live.as_ref().map(|zygote| &zygote.record);
        let manifest = durable.as_ref().and_then(|stored| stored.manifest.as_deref());
        let image = manifest.map(|m| &m.image);
        Self {
            status: status(live.is_some(), durable.as_ref().map(|stored| stored.status)),
            image: record.map(|r| r.image.clone()).or_else(|| {
                image.map(|image| image.tag.clone().unwrap_or_else(|| image.digest.clone()))
            }),
            image_digest: record
                .map(|r| r.image_digest.clone())
                .or_else(|| image.map(|image| image.digest.clone())),
            vcpus: record.map(|r| r.vcpus.into()).or(manifest.map(|m| m.vcpus)),
            mem_mib: record.map(|r| r.mem_mib.into()).or(manifest.map(|m| m.mem_mib)),
            created_unix_ms: record
                .map(|r| r.created_unix_ms)
                .or(manifest.map(|m| m.created_unix_ms)),
            tag,
            live,
            durable,
        }
    }

    /// The fields of the living one are at the top, as those of `forkd ls` are.
    fn to_json(&self) -> Result<serde_json::Value> {
        let mut value = serde_json::to_value(self)?;
        if let Some(row) = value.as_object_mut() {
            row.insert("id".into(), self.tag.clone().into());
            if let Some(serde_json::Value::Object(live)) = row.remove("live") {
                row.extend(live);
            }
        }
        Ok(value)
    }

    fn cells(&self) -> Vec<String> {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_string());
        let live = self.live.as_ref();
        vec![
            self.tag.clone(),
            or_dash(self.image.as_deref().map(|image| short_image(image, &self.image_digest))),
            or_dash(self.vcpus.map(|n| n.to_string())),
            or_dash(self.mem_mib.map(|mib| format!("{mib} MiB"))),
            or_dash(self.created_unix_ms.map(output::age)),
            self.status.clone(),
            or_dash(self.durable.as_ref().and_then(|d| d.disk_bytes).map(output::bytes)),
            or_dash(live.map(|zygote| zygote.record.pid.to_string())),
            or_dash(live.and_then(|zygote| zygote.memory).map(|memory| output::bytes(memory.pss))),
        ]
    }

    /// What a table has no room for: why it failed.
    fn note(&self) -> Option<String> {
        let stored = self.durable.as_ref()?;
        let words: Vec<&str> = stored.reason.as_ref()?.split_whitespace().collect();
        Some(format!("{} {}: {}", self.tag, stored.status, words.join(" ")))
    }
}

/// The image as it was named; a whole digest is too long for a table.
fn short_image(image: &str, digest: &Option<String>) -> String {
    match digest {
        Some(digest) if digest == image => crate::commands::info::short_digest(digest).to_string(),
        _ => image.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zygote(tag: &str) -> Zygote {
        let record = VmRecord {
            id: tag.into(),
            name: tag.into(),
            zygote: true,
            pid: 42,
            vcpus: 2,
            mem_mib: 512,
            image: "python".into(),
            image_digest: "d".repeat(64),
            parent: Some("vm-1".into()),
            generation: 1,
            created_unix_ms: 7,
        };
        let memory = Some(ProcessMemory { rss: 3 << 20, pss: 2 << 20, uss: 1 << 20 });
        Zygote { record, memory }
    }

    /// A complete snapshot of 4 MiB in a store, and its entry.
    fn ready(store: &forkd_snapshot::Store, tag: &str) -> Entry {
        super::super::info::tests::put(store, tag, None);
        store.list().unwrap().into_iter().find(|entry| entry.tag == tag).unwrap()
    }

    fn entry(tag: &str, status: Status) -> Entry {
        Entry { tag: tag.into(), status }
    }

    #[test]
    fn live_and_durable_are_one_row() {
        let home = tempfile::tempdir().unwrap();
        let store = forkd_snapshot::Store::open(home.path()).unwrap();
        let entries = vec![
            entry("w", Status::Writing { parent: None }),
            entry("both", Status::Failed("disk\n full".into())),
            ready(&store, "both"),
            ready(&store, "cold"),
            entry("lost", Status::Failed("it died".into())),
            entry("going", Status::Writing { parent: None }),
        ];
        let live = vec![zygote("warm"), zygote("both"), zygote("going")];
        let rows = merge(live, entries, home.path());
        let shown: Vec<(&str, &str)> =
            rows.iter().map(|row| (row.tag.as_str(), row.status.as_str())).collect();
        let expected = [
            ("both", "live+durable"),
            ("both", "failed"),
            ("cold", "durable"),
            ("going", "live+writing"),
            ("lost", "failed"),
            ("w", "writing"),
            ("warm", "live"),
        ];
        assert_eq!(shown, expected);
        let notes: Vec<String> = rows.iter().filter_map(Row::note).collect();
        assert_eq!(notes, ["both failed: disk full", "lost failed: it died"]);
    }

    #[test]
    fn cells_are_those_of_the_header() {
        let home = tempfile::tempdir().unwrap();
        let store = forkd_snapshot::Store::open(home.path()).unwrap();
        let entries = vec![ready(&store, "cold"), entry("w", Status::Writing { parent: None })];
        let rows = merge(vec![zygote("warm")], entries, home.path());
        let cells: Vec<Vec<String>> = rows.iter().map(Row::cells).collect();
        assert!(cells.iter().all(|row| row.len() == HEADER.len()));
        assert_eq!(cells[0][..4], ["cold", "py", "1", "4 MiB"]);
        assert!(cells[0][6].ends_with("iB") && cells[0][7..] == ["-", "-"], "{cells:?}");
        assert_eq!(cells[1], ["w", "-", "-", "-", "-", "writing", "-", "-", "-"]);
        assert_eq!(cells[2][..4], ["warm", "python", "2", "512 MiB"]);
        assert_eq!(cells[2][5..], ["live", "-", "42", "2.0 MiB"]);
    }

    #[test]
    fn json_has_all_of_both() {
        let home = tempfile::tempdir().unwrap();
        let store = forkd_snapshot::Store::open(home.path()).unwrap();
        let entries = vec![ready(&store, "py"), entry("bad", Status::Unreadable("torn".into()))];
        let rows = merge(vec![zygote("py")], entries, home.path());
        let bad = rows[0].to_json().unwrap();
        assert_eq!((&bad["id"], &bad["status"]), (&"bad".into(), &"unreadable".into()));
        assert_eq!(bad["durable"]["reason"], "torn");
        assert!(bad["pid"].is_null() && bad["mem_mib"].is_null());
        let both = rows[1].to_json().unwrap();
        assert!(serde_json::from_value::<VmRecord>(both.clone()).is_ok_and(|r| r.pid == 42));
        assert_eq!(both["memory"]["pss"], 2 << 20);
        assert_eq!(both["durable"]["manifest"]["tag"], "py");
        assert!(both["durable"]["disk_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn an_image_without_a_name_is_shown_short() {
        let digest = "0123456789abcdef".repeat(4);
        assert_eq!(short_image(&digest, &Some(digest.clone())), "0123456789ab");
        assert_eq!(short_image("py", &Some(digest)), "py");
    }
}
