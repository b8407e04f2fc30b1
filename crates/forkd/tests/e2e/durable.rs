//! Durable snapshots on the command line, without a guest: stores are written by the tests, with bytes of their own.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};
use forkd_api::types::VmRecord;
use forkd_snapshot::{
    CpuModel, Facts, ImageRef, KvmFlavour, Mode, Platform, SnapshotError, Staged, Store,
    Verification,
};
use forkd_vmm::run_dir::RunDir;
use serde_json::Value;

use crate::command::{Output, Run};
use crate::fixture::{Suite, names};
use crate::runner::{Test, tests};

pub const TESTS: &[Test] = tests!["durable":
    missing_ones_are_named 30,
    tags_that_are_none 30,
    they_are_listed_by_their_status 30,
    info_tells_of_the_chain 30,
    damage_is_named_by_file_and_block 60,
    manifests_of_later_versions_and_torn_ones 30,
    children_are_not_orphaned 30,
    a_compacted_one_needs_no_parents 30,
    one_being_written_is_cancelled 30,
    a_live_one_is_removed_with_its_files 30,
    a_refused_one_stays_alive 30,
    an_image_in_use_stays 60,
];

/// The RAM of the snapshots here.
const MEM_MIB: u64 = 4;
/// Where their data is: in block 1.
const DATA_AT: u64 = 2 << 20;
/// The verbs that want one tag.
const VERBS: [&str; 4] = ["verify", "info", "compact", "rm"];

/// A home of one test.
struct Home<'a> {
    suite: &'a Suite,
    dir: PathBuf,
}

impl<'a> Home<'a> {
    fn new(suite: &'a Suite, name: &str) -> Result<Self> {
        Ok(Self { suite, dir: suite.scratch(&format!("durable-{name}"))? })
    }

    fn store(&self) -> Result<Store> {
        Ok(Store::open(&self.dir.join("snapshots"))?)
    }

    fn snapshot(&self, verb: &str, args: &[&str]) -> Run {
        self.suite.forkd_in(&self.dir, ["snapshot", verb]).args(args)
    }

    fn run(&self, verb: &str, args: &[&str]) -> Result<Output> {
        self.snapshot(verb, args).output()
    }

    fn json(&self, verb: &str, args: &[&str]) -> Result<Value> {
        self.snapshot(verb, args).arg("--json").ok()?.json()
    }

    /// Tags and statuses that `snapshot ls` has.
    fn ls(&self) -> Result<Vec<(String, String)>> {
        let rows: Vec<Value> = self.snapshot("ls", &["--json"]).ok()?.json()?;
        let text = |row: &Value, name: &str| row[name].as_str().unwrap_or("?").to_string();
        Ok(rows.iter().map(|row| (text(row, "tag"), text(row, "status"))).collect())
    }

    fn tags(&self) -> Result<Vec<String>> {
        Ok(self.ls()?.into_iter().map(|(tag, _)| tag).collect())
    }

    /// `base`, `mid` over it, `top` over that.
    fn chain(&self) -> Result<()> {
        let store = self.store()?;
        put(&store, "base", None, 1)?;
        put(&store, "mid", Some("base"), 2)?;
        put(&store, "top", Some("mid"), 3)
    }
}

fn facts(mode: Mode) -> Facts {
    let cpu = CpuModel {
        vendor: "AuthenticAMD".into(),
        name: "AMD EPYC".into(),
        family: 25,
        model: 17,
        stepping: 1,
    };
    let arch = "x86_64".to_string();
    Facts {
        created_unix_ms: Facts::now(),
        forkd: "0.1.0".into(),
        platform: Platform { arch, cpu, kvm: KvmFlavour::Pvm, page_size: 4096 },
        kernel: "c".repeat(64),
        image: ImageRef { digest: "e".repeat(64), tag: Some("python".into()) },
        vcpus: 1,
        mem_mib: MEM_MIB,
        mode,
        instant: None,
    }
}

/// A page of RAM for each layer, beside the others'.
fn fill(staged: &mut Staged, number: u8) -> Result<()> {
    let memory = staged.memory(MEM_MIB << 20)?;
    memory.write(DATA_AT + 4096 * u64::from(number), &[number; 4096])?;
    staged.disk(1 << 20, true)?.write(0, &[number; 4096])?;
    Ok(staged.state(format!("state {number}").as_bytes())?)
}

fn put(store: &Store, tag: &str, parent: Option<&str>, number: u8) -> Result<()> {
    let mut staged = store.stage(tag, parent)?;
    fill(&mut staged, number)?;
    staged.commit(facts(if parent.is_some() { Mode::Diff } else { Mode::Fork }))?;
    Ok(())
}

/// Flips a bit and gives the path as it is shown.
fn flip(dir: &Path, file: &str, at: u64) -> Result<String> {
    let path = dir.join(file);
    let open = fs::File::options().read(true).write(true).open(&path)?;
    let mut byte = [0];
    open.read_exact_at(&mut byte, at)?;
    open.write_all_at(&[byte[0] ^ 0x10], at)?;
    Ok(path.to_string_lossy().into_owned())
}

fn missing_ones_are_named(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "missing")?;
    for verb in VERBS {
        home.run(verb, &["gone"])?.status_is(1)?.one_line(&["\"gone\"", "forkd snapshot ls"])?;
    }
    ensure!(!home.dir.join("snapshots").exists(), "looking makes no store");
    put(&home.store()?, "base", None, 1)?;
    for verb in VERBS {
        home.run(verb, &["gone"])?.status_is(1)?.one_line(&["\"gone\"", "forkd snapshot ls"])?;
    }
    home.run("rm", &["base", "gone"])?.one_line(&["\"gone\""])?;
    ensure!(home.tags()? == ["base"], "none is removed if one is not there");
    home.run("rm", &["base", "--cascade", "--force"])?.status_is(2)?.one_line(&["--force"])?;
    Ok(())
}

fn tags_that_are_none(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "tags")?;
    put(&home.store()?, "base", None, 1)?;
    let before = names(&home.dir.join("snapshots"))?;
    for bad in ["a/b", "../snapshots/base", "/base", "", ".lock", "UPPER", "sp ace", "base/"] {
        for verb in VERBS {
            let line = home.run(verb, &["--", bad])?.status_is(1)?.one_line(&["tag"])?;
            ensure!(line.contains(&format!("{bad:?}")), "{line}");
        }
    }
    ensure!(names(&home.dir.join("snapshots"))? == before);
    Ok(())
}

fn they_are_listed_by_their_status(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "list")?;
    let store = home.store()?;
    put(&store, "base", None, 1)?;
    put(&store, "spoilt", None, 1)?;
    flip(&store.dir().join("spoilt"), "manifest.json", 40)?;
    store.stage("full", None)?.fail("no space left to write it")?;
    let mut dead = store.stage("dead", None)?;
    fill(&mut dead, 1)?;
    drop(dead);
    let writing = store.stage("next", Some("base"))?;
    let status = |tag: &str, status: &str| (tag.to_string(), status.to_string());
    ensure!(
        home.ls()?
            == [
                status("base", "durable"),
                status("dead", "failed"),
                status("full", "failed"),
                status("next", "writing"),
                status("spoilt", "unreadable"),
            ],
        "{:?}",
        home.ls()?
    );
    // That has swept: the dead writer's pages are gone.
    for name in names(store.dir())?.iter().filter(|name| name.starts_with(".staging-dead")) {
        ensure!(!store.dir().join(name).join("snapshot").exists(), "{name} still has its data");
    }
    let text = home.run("ls", &[])?.success()?.text();
    let lines: Vec<&str> = text.lines().collect();
    for word in ["TAG", "IMAGE", "VCPUS", "MEM", "AGE", "STATUS", "SIZE", "PID", "PSS"] {
        ensure!(lines[0].contains(word), "{text}");
    }
    ensure!(lines[1].starts_with("base") && lines[1].contains("4 MiB"), "{text}");
    ensure!(lines[6..].iter().any(|l| l.starts_with("full failed: no space left")), "{text}");
    ensure!(lines[6..].iter().any(|l| l.starts_with("dead failed: ")), "{text}");
    let rows: Vec<Value> = home.snapshot("ls", &["--json"]).ok()?.json()?;
    ensure!(rows[0]["durable"]["disk_bytes"].as_u64().is_some_and(|n| n > 4096), "{}", rows[0]);
    ensure!(rows[0]["image"] == "python" && rows[0]["vcpus"] == 1, "{}", rows[0]);
    ensure!(rows[2]["durable"]["reason"] == "no space left to write it", "{}", rows[2]);
    ensure!(rows[3]["durable"]["parent"]["tag"] == "base", "{}", rows[3]);
    drop(writing);
    Ok(())
}

fn info_tells_of_the_chain(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "info")?;
    home.chain()?;
    let info = home.json("info", &["top"])?;
    ensure!(info["status"] == "durable" && info["durable"]["parents"][1] == "base", "{info}");
    let root = info["durable"]["manifest"]["root"].as_str().context("a root")?.to_string();
    let text = home.run("info", &["top"])?.success()?.text();
    for fact in [
        root.as_str(),
        "diff",
        "mid <- base",
        "4.0 MiB, 4 KiB of data",
        &"c".repeat(64),
        &"e".repeat(64),
        "AMD EPYC",
        "pvm",
    ] {
        ensure!(text.contains(fact), "{fact} is not in\n{text}");
    }
    home.store()?.stage("full", None)?.fail("no space left")?;
    let text = home.run("info", &["full"])?.success()?.text();
    ensure!(text.contains("failed") && text.contains("no space left"), "{text}");
    for verb in ["verify", "compact"] {
        home.run(verb, &["full"])?.one_line(&[
            "full",
            "no space left",
            "forkd snapshot rm full",
        ])?;
    }
    Ok(())
}

fn damage_is_named_by_file_and_block(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "damage")?;
    home.chain()?;
    let said = home.json("verify", &["top"])?;
    ensure!(said["layers"] == 3 && said["blocks"] == 6, "{said}");
    ensure!(said["bytes"] == 6 * 4096 && said["took_us"].is_u64(), "{said}");
    let text = home.run("verify", &["top"])?.success()?.text();
    ensure!(text.contains("intact") && text.contains("6 blocks"), "{text}");

    let store = home.store()?;
    let (base, mid) = (store.dir().join("base"), store.dir().join("mid"));
    // Each bit is flipped back before the next: the chain is whole again at the end.
    for (dir, file, at, block) in [
        (&base, "memory", DATA_AT + 4096 + 77, "block 1"),
        (&mid, "memory", DATA_AT + 2 * 4096, "block 1"),
        (&mid, "disk-0", 9, "block 0"),
    ] {
        let path = flip(dir, file, at)?;
        home.run("verify", &["top"])?.status_is(1)?.one_line(&[&path, block])?;
        home.run("compact", &["top", "--json"])?.status_is(1)?.one_line(&[&path, block])?;
        ensure!(home.json("info", &["top"])?["durable"]["parents"][0] == "mid", "it is another");
        flip(dir, file, at)?;
    }
    for file in ["extents", "state", "manifest.json"] {
        let path = flip(&mid, file, 5)?;
        home.run("verify", &["mid"])?.status_is(1)?.one_line(&[&path])?;
        flip(&mid, file, 5)?;
    }
    let memory = mid.join("memory");
    fs::rename(&memory, mid.join("elsewhere"))?;
    let shown = memory.to_string_lossy().into_owned();
    for verb in ["verify", "info", "compact"] {
        home.run(verb, &["top"])?.status_is(1)?.one_line(&[&shown])?;
    }
    fs::rename(mid.join("elsewhere"), &memory)?;
    fs::File::options().write(true).open(&memory)?.set_len(DATA_AT)?;
    home.run("verify", &["mid"])?.status_is(1)?.one_line(&[&shown])?;
    ensure!(home.json("info", &["base"])?["status"] == "durable");
    // A damaged one can be removed as any other.
    home.run("rm", &["mid", "--cascade"])?.success()?;
    ensure!(home.tags()? == ["base"]);
    Ok(())
}

fn manifests_of_later_versions_and_torn_ones(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "versions")?;
    let store = home.store()?;
    put(&store, "base", None, 1)?;
    let path = store.dir().join("base/manifest.json");
    let shown = path.to_string_lossy().into_owned();
    let good = fs::read_to_string(&path)?;
    fs::write(&path, good.replacen("\"format\": 1", "\"format\": 99", 1))?;
    for verb in ["verify", "info", "compact"] {
        home.run(verb, &["base"])?.status_is(1)?.one_line(&[&shown, "99", "newer"])?;
    }
    for torn in [&good[..good.len() / 2], ""] {
        fs::write(&path, torn)?;
        for verb in ["verify", "info", "compact"] {
            home.run(verb, &["base"])?.status_is(1)?.one_line(&[&shown])?;
        }
        let text = home.run("ls", &[])?.success()?.text();
        ensure!(text.contains("base unreadable: ") && text.contains(&shown), "{text}");
    }
    fs::write(&path, good)?;
    home.run("verify", &["base"])?.success()?;
    Ok(())
}

fn children_are_not_orphaned(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "children")?;
    home.chain()?;
    home.run("rm", &["base"])?.status_is(1)?.one_line(&[
        "\"base\"",
        "children: mid",
        "--cascade",
        "--force",
    ])?;
    home.run("rm", &["base", "mid"])?.one_line(&["2 of 2", "children: top"])?;
    ensure!(home.tags()? == ["base", "mid", "top"]);

    let forced = home.run("rm", &["base", "--force"])?.success()?;
    ensure!(forced.text() == "base" && forced.stderr_text().contains("mid"), "{forced:?}");
    for verb in ["verify", "info", "compact"] {
        home.run(verb, &["top"])?.one_line(&["\"mid\"", "\"base\"", "forkd snapshot rm mid"])?;
    }
    // Another snapshot under the parent's tag is not the parent.
    put(&home.store()?, "base", None, 9)?;
    home.run("verify", &["top"])?.one_line(&["\"mid\"", "\"base\"", "root"])?;
    home.run("rm", &["base"])?.success()?;

    let gone: Vec<Value> = home.snapshot("rm", &["mid", "--cascade", "--json"]).ok()?.json()?;
    let gone: Vec<&str> = gone.iter().filter_map(|row| row["tag"].as_str()).collect();
    ensure!(gone == ["mid", "top"] && home.tags()?.is_empty(), "{gone:?}");

    // In whatever order they are given.
    home.chain()?;
    home.run("rm", &["base", "top", "mid"])?.success()?;
    home.chain()?;
    home.run("rm", &["--all"])?.success()?;
    ensure!(names(home.store()?.dir())? == [".lock"], "nothing is left");
    Ok(())
}

fn a_compacted_one_needs_no_parents(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "compact")?;
    home.chain()?;
    let store = home.store()?;
    let memory = |tag: &str| -> Result<Vec<u8>> {
        let memory = store.load(tag, Verification::Always)?.memory;
        let mut bytes = vec![0xee; usize::try_from(memory.len)?];
        memory.read_at(0, &mut bytes)?;
        Ok(bytes)
    };
    let (mid, top) = (memory("mid")?, memory("top")?);
    let said = home.json("compact", &["mid"])?;
    ensure!(said["compacted"] == true && said["freed_of"][0] == "base", "{said}");
    let said = home.run("compact", &["mid"])?.success()?.text();
    ensure!(said.contains("flat already"), "{said}");
    home.run("rm", &["base"])?.success()?;
    // Its child goes on with it.
    ensure!(home.json("info", &["top"])?["durable"]["parents"] == serde_json::json!(["mid"]));
    ensure!(home.json("verify", &["top"])?["layers"] == 2);
    ensure!(memory("mid")? == mid && memory("top")? == top, "the content is another");
    Ok(())
}

fn one_being_written_is_cancelled(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "writing")?;
    let store = home.store()?;
    put(&store, "base", None, 1)?;
    let mut staged = store.stage("next", Some("base"))?;
    fill(&mut staged, 2)?;
    ensure!(home.json("info", &["next"])?["status"] == "writing");
    for verb in ["verify", "compact"] {
        home.run(verb, &["next"])?.one_line(&["\"next\"", "written", "forkd snapshot rm next"])?;
    }
    // It will be a child.
    home.run("rm", &["base"])?.one_line(&["children: next"])?;
    ensure!(home.run("rm", &["next"])?.success()?.text() == "next");
    ensure!(home.tags()? == ["base"]);
    let late = staged.commit(facts(Mode::Diff));
    ensure!(matches!(late, Err(SnapshotError::Cancelled(_))), "{late:?}");
    ensure!(home.tags()? == ["base"], "it is back");
    home.run("rm", &["base"])?.success()?;
    ensure!(names(store.dir())? == [".lock"]);
    Ok(())
}

/// A process that stands for a zygote: its run directory is owned, and nobody answers.
struct Stand {
    process: Child,
    _dir: RunDir,
}

impl Stand {
    fn new(home: &Home<'_>, tag: &str) -> Result<Self> {
        let process = Command::new("/bin/sleep").arg("600").spawn()?;
        fs::create_dir_all(home.dir.join("run/snapshots"))?;
        let dir = RunDir::create(&home.dir.join("run/snapshots").join(tag))?;
        dir.write_record(&VmRecord {
            id: tag.into(),
            name: tag.into(),
            zygote: true,
            pid: process.id(),
            vcpus: 1,
            mem_mib: 4,
            image: "python".into(),
            image_digest: "e".repeat(64),
            parent: None,
            generation: 1,
            created_unix_ms: Facts::now(),
        })?;
        Ok(Self { process, _dir: dir })
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        // Both fail only if it has been reaped already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn a_live_one_is_removed_with_its_files(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "live")?;
    let store = home.store()?;
    put(&store, "both", None, 1)?;
    let mut stands = vec![Stand::new(&home, "both")?, Stand::new(&home, "warm")?];
    let status = |tag: &str, status: &str| (tag.to_string(), status.to_string());
    ensure!(home.ls()? == [status("both", "live+durable"), status("warm", "live")]);
    let rows: Vec<Value> = home.snapshot("ls", &["--json"]).ok()?.json()?;
    ensure!(rows[0]["pid"] == stands[0].process.id() && rows[0]["zygote"] == true, "{}", rows[0]);
    ensure!(rows[0]["durable"]["manifest"]["tag"] == "both", "{}", rows[0]);
    for verb in ["verify", "compact"] {
        home.run(verb, &["warm"])?.one_line(&["\"warm\"", "live only"])?;
        home.run(verb, &["both"])?.success()?;
    }
    ensure!(home.run("rm", &["both", "warm"])?.success()?.text() == "both\nwarm");
    for stand in &mut stands {
        ensure!(stand.process.try_wait()?.is_some(), "its process is still there");
    }
    ensure!(names(&home.dir.join("run/snapshots"))?.is_empty());
    ensure!(names(store.dir())? == [".lock"]);
    Ok(())
}

fn a_refused_one_stays_alive(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "refused")?;
    home.chain()?;
    let mut base = Stand::new(&home, "base")?;
    let mut top = Stand::new(&home, "top")?;
    home.run("rm", &["base"])?.one_line(&["children: mid"])?;
    ensure!(base.process.try_wait()?.is_none(), "it was ended, and its files are kept");
    // A cascade takes a child as a whole.
    home.run("rm", &["base", "--cascade"])?.success()?;
    ensure!(base.process.try_wait()?.is_some() && top.process.try_wait()?.is_some());
    ensure!(home.tags()?.is_empty());
    Ok(())
}

fn an_image_in_use_stays(suite: &Suite) -> Result<()> {
    let home = Home::new(suite, "image")?;
    let source = suite.scratch("durable-image-source")?;
    fs::write(source.join("hello"), "hello")?;
    let source = source.to_string_lossy().into_owned();
    let build = ["image", "build", "--tag", "mine", "--dir", &source, "--json"];
    let image: Value = suite.forkd_in(&home.dir, build).ok()?.json()?;
    let digest = image["digest"].as_str().context("a digest")?.to_string();
    let mut staged = home.store()?.stage("base", None)?;
    fill(&mut staged, 1)?;
    let image = ImageRef { digest, tag: Some("mine".into()) };
    staged.commit(Facts { image, ..facts(Mode::Fork) })?;
    let rm = || suite.forkd_in(&home.dir, ["image", "rm", "mine"]).output();
    rm()?.one_line(&["snapshot base", "forkd snapshot rm"])?;
    home.run("rm", &["base"])?.success()?;
    rm()?.success()?;
    Ok(())
}
