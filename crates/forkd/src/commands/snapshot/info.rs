//! `forkd snapshot info`.

use std::process::ExitCode;

use anyhow::Result;
use forkd_snapshot::{Entry, Info, Mode, Parent, Status, Store};
use serde::Serialize;

use super::ls::{status, word};
use crate::cli::OutputArgs;
use crate::commands::info::Report;
use crate::paths::Paths;
use crate::{durable, output, registry};

/// Show all about a snapshot
///
/// Of a live one what `forkd info` shows of a VM, of a durable one what its manifest says and what it takes on the
/// disk. Its blocks are not read: `forkd snapshot verify` does that.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot info py
  forkd snapshot info py --json | jq .durable.manifest.root")]
pub struct Args {
    /// Tag
    tag: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// What the store has under a tag.
#[derive(Debug, Serialize)]
struct Stored {
    /// All of it, if it is complete.
    #[serde(flatten)]
    info: Option<Info>,
    /// What it will be a diff over.
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<Parent>,
    /// Why it has failed or can't be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// The answer. The fields of the living one are at the top.
#[derive(Debug, Serialize)]
struct Answer {
    tag: String,
    status: String,
    #[serde(flatten)]
    live: Option<Report>,
    durable: Option<Stored>,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// No such snapshot, it does not answer, or what it has on the disk is damaged.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        let answer = Answer::of(paths, &self.tag)?;
        if self.output.json {
            output::json(&answer)?;
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(live) = &answer.live {
            live.print(OutputArgs { json: false })?;
        } else {
            line("tag", &answer.tag)?;
        }
        line("status", &answer.status)?;
        for (name, value) in answer.durable.iter().flat_map(Stored::rows) {
            line(name, &value)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// As [`Report::print`] has them.
fn line(name: &str, value: &str) -> Result<()> {
    output::line(&format!("{name:<22} {value}"))
}

impl Answer {
    fn of(paths: &Paths, tag: &str) -> Result<Self> {
        forkd_image::check_tag(tag).map_err(anyhow::Error::msg)?;
        let mut live = registry::snapshots(paths)?;
        live.retain(|live| live.record.id == tag);
        let store = durable::existing(paths)?;
        let entry = match &store {
            Some(store) => durable::entry(store, tag)?,
            None => None,
        };
        if live.is_empty() && entry.is_none() {
            return Err(registry::no_snapshot(tag));
        }
        let status = status(!live.is_empty(), entry.as_ref().map(|entry| word(&entry.status)));
        let durable = match (store, entry) {
            (Some(store), Some(entry)) => Some(Stored::of(paths, &store, entry, !live.is_empty())?),
            _ => None,
        };
        let live = live.first().map(Report::of).transpose()?;
        Ok(Self { tag: tag.to_string(), status, live, durable })
    }
}

impl Stored {
    /// What is wrong with it is an error, unless there is a living one to tell of.
    fn of(paths: &Paths, store: &Store, entry: Entry, live: bool) -> Result<Self> {
        let (parent, reason) = match entry.status {
            Status::Ready(_) | Status::Unreadable(_) => match store.info(&entry.tag) {
                Ok(info) => return Ok(Self { info: Some(info), parent: None, reason: None }),
                Err(error) => {
                    let error = durable::explain(paths, error);
                    if !live {
                        return Err(error);
                    }
                    (None, Some(output::error_line(&error)))
                }
            },
            Status::Writing { parent } => (parent, None),
            Status::Failed(reason) => (None, Some(reason)),
        };
        Ok(Self { info: None, parent, reason })
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = Vec::new();
        if let Some(info) = &self.info {
            rows = info_rows(info);
        }
        if let Some(parent) = &self.parent {
            rows.push(("will be a diff over", parent.tag.clone()));
        }
        if let Some(reason) = &self.reason {
            let words: Vec<&str> = reason.split_whitespace().collect();
            rows.push(("reason", words.join(" ")));
        }
        rows
    }
}

fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Fork => "fork",
        Mode::Live => "live",
        Mode::Diff => "diff",
        Mode::Full => "full",
    }
}

fn info_rows(info: &Info) -> Vec<(&'static str, String)> {
    let manifest = &info.manifest;
    let platform = &manifest.platform;
    let image = match &manifest.image.tag {
        Some(tag) => format!("{tag} ({})", manifest.image.digest),
        None => manifest.image.digest.clone(),
    };
    let parents = match info.parents.len() {
        0 => "none: it is flat".to_string(),
        _ => info.parents.join(" <- "),
    };
    let paged = |file: &forkd_snapshot::PagedFile| {
        let (all, data) = (output::bytes(file.bytes), output::bytes(file.data_bytes));
        let shown = if file.whole { "all of it" } else { "over its parent's" };
        format!("{all}, {data} of data here, {shown}")
    };
    let mut rows = vec![
        ("taken in mode", mode_name(manifest.mode).to_string()),
        (
            "taken",
            format!("{} ago, by forkd {}", output::age(manifest.created_unix_ms), manifest.forkd),
        ),
        ("parents", parents),
        ("root hash", manifest.root.to_string()),
        ("vCPUs", manifest.vcpus.to_string()),
        ("RAM", paged(&manifest.memory)),
    ];
    let disks = manifest.disks.iter().enumerate();
    rows.extend(disks.map(|(index, disk)| ("disk layer", format!("{index}: {}", paged(disk)))));
    let on_disk = output::bytes(info.disk_bytes);
    rows.extend([
        (
            "size on disk",
            match info.parents.len() {
                0 => on_disk,
                _ => {
                    format!("{on_disk}; {} with its parents", output::bytes(info.chain_disk_bytes))
                }
            },
        ),
        ("mappings of RAM", info.memory_extents.to_string()),
        ("kernel", manifest.kernel.clone()),
        ("root image", image),
        ("CPU", format!("{} ({})", platform.cpu, platform.arch)),
        ("KVM flavour", platform.kvm.to_string()),
        ("page size", output::bytes(platform.page_size.into())),
        ("format", manifest.format.to_string()),
        ("files", info.dir.display().to_string()),
    ]);
    rows
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use forkd_snapshot::{CpuModel, Facts, ImageRef, KvmFlavour, Platform};

    /// Writes a snapshot of 4 MiB with one page of data of its own, flat or over a parent.
    pub fn put(store: &Store, tag: &str, parent: Option<&str>) {
        let page = tag.as_bytes().repeat(4096)[..4096].to_vec();
        let mut staged = store.stage(tag, parent).unwrap();
        staged.memory(4 << 20).unwrap().write(2 << 20, &page).unwrap();
        staged.disk(1 << 20, true).unwrap().write(0, &[8; 4096]).unwrap();
        staged.state(b"state").unwrap();
        let cpu = CpuModel {
            vendor: "AuthenticAMD".into(),
            name: "EPYC".into(),
            family: 25,
            model: 17,
            stepping: 1,
        };
        let kvm = KvmFlavour::Pvm;
        let facts = Facts {
            created_unix_ms: Facts::now(),
            forkd: "0.1.0".into(),
            platform: Platform { arch: "x86_64".into(), cpu, kvm, page_size: 4096 },
            kernel: "k".repeat(64),
            image: ImageRef { digest: "i".repeat(64), tag: Some("py".into()) },
            vcpus: 1,
            mem_mib: 4,
            mode: if parent.is_some() { Mode::Diff } else { Mode::Fork },
            instant: None,
        };
        staged.commit(facts).unwrap();
    }

    fn home() -> (tempfile::TempDir, Paths, Store) {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().to_owned();
        let paths = Paths { data: dir.clone(), run: dir.join("run"), cache: dir.join("cache") };
        let store = Store::open(&paths.snapshot_store()).unwrap();
        (home, paths, store)
    }

    #[test]
    fn a_chain_is_shown() {
        let (_home, paths, store) = home();
        put(&store, "base", None);
        put(&store, "mid", Some("base"));
        put(&store, "top", Some("mid"));
        let answer = Answer::of(&paths, "top").unwrap();
        let rows = answer.durable.as_ref().unwrap().rows();
        let value = |name: &str| rows.iter().find(|(n, _)| *n == name).unwrap().1.clone();
        assert_eq!(value("parents"), "mid <- base");
        assert_eq!(value("RAM"), "4.0 MiB, 4 KiB of data here, over its parent's");
        assert_eq!(value("root image"), format!("py ({})", "i".repeat(64)));
        assert!(value("size on disk").contains("with its parents"));
        let json = serde_json::to_value(&answer).unwrap();
        assert_eq!(json["status"], "durable");
        assert_eq!(json["durable"]["manifest"]["root"], value("root hash"));
        assert_eq!(json["durable"]["parents"], serde_json::json!(["mid", "base"]));
        let flat = Answer::of(&paths, "base").unwrap().durable.unwrap().rows();
        assert!(flat.contains(&("parents", "none: it is flat".to_string())), "{flat:?}");
    }

    #[test]
    fn what_is_not_complete_is_shown_as_that() {
        let (_home, paths, store) = home();
        put(&store, "base", None);
        let writing = store.stage("next", Some("base")).unwrap();
        let answer = Answer::of(&paths, "next").unwrap();
        assert_eq!(answer.status, "writing");
        assert_eq!(answer.durable.unwrap().rows(), [("will be a diff over", "base".to_string())]);
        writing.fail("no\nspace").unwrap();
        let answer = Answer::of(&paths, "next").unwrap();
        assert_eq!(answer.status, "failed");
        assert_eq!(answer.durable.unwrap().rows(), [("reason", "no space".to_string())]);
    }

    #[test]
    fn an_orphan_is_an_error_that_names_its_parent() {
        let (_home, paths, store) = home();
        put(&store, "base", None);
        put(&store, "top", Some("base"));
        store.remove("base", forkd_snapshot::Removal::Force).unwrap();
        let line = Answer::of(&paths, "top").unwrap_err().to_string();
        assert!(line.contains("\"base\"") && line.contains("forkd snapshot rm top"), "{line}");
    }
}
