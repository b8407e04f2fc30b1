//! `forkd snapshot create`: boot, warm, fork into a zygote, end the source.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use forkd_api::types::{DriveConfig, Timing, VmConfig};
use forkd_image::ImageStore;
use forkd_vm::Host;
use serde::Serialize;

use super::trial;
use crate::boot;
use crate::cleanup::Guard;
use crate::cli::OutputArgs;
use crate::commands::image::PYTHON;
use crate::commands::info::{TOTAL, steps};
use crate::guest::{self, Guest};
use crate::paths::Paths;
use crate::progress::Step;
use crate::vm_client::VmClient;
use crate::{assets, cleanup, host, id, output, persist, registry};

/// Most bytes of warm-up code.
const MAX_WARM: u64 = 16 << 20;
/// Bounds of VmConfig.
const VCPUS: std::ops::RangeInclusive<u64> = 1..=16;
const MEM_MIB: std::ops::RangeInclusive<u64> = 64..=65_536;
/// Seconds that a boot may take by default. It takes under one, or 20 where kernel mode is emulated; a busy host
/// stretches both.
const BOOT_TIMEOUT_S: u32 = 60;
const BOOT_TIMEOUT_EMULATED_S: u32 = 300;
/// Most block devices: vda to vdh.
const MAX_DISKS: usize = 8;

/// Boot a VM, warm it, and keep it as a snapshot
///
/// The VM boots from the image, Python runs the warm-up code in it, and its state at that moment becomes the
/// snapshot. `forkd fork` makes VMs from it in milliseconds, each of which finds the warm-up's modules and
/// objects in its interpreter. A snapshot lives in memory, until it is removed or the host restarts.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd snapshot create py --warm-code 'import numpy as np; a = np.arange(10)'
  forkd snapshot create model --image python --vcpus 2 --mem 2048 --warm load_model.py
  echo 'x = 41' | forkd snapshot create tiny --mem 128 --warm -
  forkd snapshot create db --disk 1024 --disk seed.img --warm-code 'import sqlite3'")]
pub struct Args {
    /// Tag of the new snapshot: a-z, 0-9, '.', '_', '-'
    tag: String,
    /// Root image: tag or digest
    #[arg(short, long, default_value = PYTHON)]
    image: String,
    /// vCPUs, 1 to 16
    #[arg(long, default_value_t = 1, value_name = "N")]
    vcpus: u64,
    /// RAM in MiB, 64 to 65536
    #[arg(short, long, default_value_t = 512, value_name = "MIB")]
    mem: u64,
    /// File of Python code to run before the snapshot; - is standard input
    #[arg(short, long, value_name = "FILE", conflicts_with = "warm_code")]
    warm: Option<PathBuf>,
    /// Python code to run before the snapshot
    #[arg(long, value_name = "CODE")]
    warm_code: Option<String>,
    /// Block device with a copy-on-write layer: a size in MiB for an empty one, or an image file (FILE:ro is
    /// read-only); may be given more than once
    #[arg(long, value_name = "MIB|FILE")]
    disk: Vec<String>,
    /// Guest kernel: ELF vmlinux or bzImage
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// More words for the kernel's command line
    #[arg(long, default_value = "", value_name = "WORDS", allow_hyphen_values = true)]
    cmdline: String,
    /// Seconds the guest has to boot; by default 60, or 300 where its kernel mode is emulated (PVM)
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=3600))]
    boot_timeout: Option<u32>,
    /// Write it to disk as well, so that it outlives a restart of the host
    #[arg(long)]
    durable: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// What a snapshot is to be made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its tag.
    pub tag: String,
    /// Tag or digest of the root image.
    pub image: String,
    /// vCPUs.
    pub vcpus: u64,
    /// RAM.
    pub mem_mib: u64,
    /// Warm-up code.
    pub warm: Option<Warm>,
    /// Block devices.
    pub disks: Vec<DriveConfig>,
    /// Guest kernel; by default the one that was built.
    pub kernel: Option<PathBuf>,
    /// More words for the kernel's command line.
    pub cmdline: String,
    /// Seconds the guest has to boot; none: what such a host takes at worst.
    pub boot_timeout_s: Option<u32>,
    /// Say nothing of progress.
    pub quiet: bool,
}

/// Warm-up code.
#[derive(Debug, Clone)]
pub struct Warm {
    /// Its name in tracebacks.
    pub name: String,
    /// The code.
    pub code: String,
}

/// A snapshot that was made.
#[derive(Debug, Serialize)]
pub struct Created {
    /// Its tag.
    pub tag: String,
    /// Process id of the zygote.
    pub pid: Option<u32>,
    /// Digest of its image.
    pub image_digest: String,
    /// Time marks of the source's boot.
    pub boot: Timing,
    /// Command to agent's answer, in milliseconds.
    pub boot_ms: u64,
    /// Running the warm-up code, in milliseconds.
    pub warm_ms: u64,
    /// Request to zygote, in microseconds.
    pub snapshot_us: u64,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// Nothing is left behind.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        cleanup::watch_signals().context("cannot watch signals")?;
        let (json, durable) = (self.output.json, self.durable);
        let created = create(paths, &self.plan()?)?;
        if durable {
            let live = registry::snapshot(paths, &created.tag)?;
            let step = Step::begin(&format!("write snapshot {}", created.tag), json);
            persist::save(paths, &live, true)?;
            step.done("");
        }
        if json {
            output::json(&created)?;
        } else {
            output::line(&format!(
                "snapshot {} is ready: forkd fork {} -n 10",
                created.tag, created.tag
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn plan(self) -> Result<Plan> {
        // Before the file is read: a typing error in the tag should not wait for standard input.
        forkd_image::check_tag(&self.tag).map_err(anyhow::Error::msg)?;
        let warm = match (self.warm, self.warm_code) {
            (Some(file), _) => Some(Warm::read(&file)?),
            (None, Some(code)) => Some(Warm { name: "<warm-code>".to_string(), code }),
            (None, None) => None,
        };
        Ok(Plan {
            tag: self.tag,
            image: self.image,
            vcpus: self.vcpus,
            mem_mib: self.mem,
            warm,
            disks: self.disk.iter().map(|text| parse_disk(text)).collect::<Result<_>>()?,
            kernel: self.kernel,
            cmdline: self.cmdline,
            boot_timeout_s: self.boot_timeout,
            quiet: self.output.json,
        })
    }
}

impl Warm {
    /// Reads warm-up code from a file, or from standard input for `-`.
    ///
    /// # Errors
    /// It can't be read, is too long, or is no UTF-8.
    pub fn read(file: &Path) -> Result<Self> {
        let stdin = file == Path::new("-");
        let name = if stdin { "<stdin>".to_string() } else { file.display().to_string() };
        let failed = || format!("cannot read warm-up code from {name}");
        let source: Box<dyn Read> = if stdin {
            Box::new(std::io::stdin())
        } else {
            Box::new(File::open(file).with_context(failed)?)
        };
        let mut code = Vec::new();
        source.take(MAX_WARM + 1).read_to_end(&mut code).with_context(failed)?;
        if code.len() as u64 > MAX_WARM {
            bail!("warm-up code in {name} is longer than {} MiB", MAX_WARM >> 20);
        }
        let code = String::from_utf8(code).with_context(failed)?;
        Ok(Self { name, code })
    }
}

/// `1024`, `disk.img` or `disk.img:ro`.
fn parse_disk(text: &str) -> Result<DriveConfig> {
    if text.bytes().all(|b| b.is_ascii_digit()) && !text.is_empty() {
        let size_mib = text.parse().ok().filter(|size| (1..=1 << 24).contains(size));
        let size_mib =
            size_mib.with_context(|| format!("--disk {text}: a size is 1 to {} MiB", 1 << 24))?;
        return Ok(DriveConfig { path: None, size_mib: Some(size_mib), read_only: false });
    }
    let (path, read_only) = match text.strip_suffix(":ro") {
        Some(path) => (Path::new(path), true),
        None => (Path::new(text), false),
    };
    let file = File::open(path).with_context(|| {
        format!("--disk {text}: neither a size in MiB nor a file that can be read")
    })?;
    let meta = file.metadata().with_context(|| format!("--disk {text}"))?;
    if !meta.is_file() || meta.len() == 0 {
        bail!("--disk {text}: {} is not a file with something in it", path.display());
    }
    let path = std::path::absolute(path).with_context(|| format!("--disk {text}"))?;
    Ok(DriveConfig { path: Some(path), size_mib: None, read_only })
}

impl Plan {
    /// Checks what can be checked before anything is started.
    fn check(&self, paths: &Paths) -> Result<()> {
        forkd_image::check_tag(&self.tag).map_err(anyhow::Error::msg)?;
        if !VCPUS.contains(&self.vcpus) {
            bail!("--vcpus {}: a VM has {} to {}", self.vcpus, VCPUS.start(), VCPUS.end());
        }
        if !MEM_MIB.contains(&self.mem_mib) {
            bail!("--mem {}: a VM has {} to {} MiB", self.mem_mib, MEM_MIB.start(), MEM_MIB.end());
        }
        if let Some(total) = host::memory_mib().filter(|total| self.mem_mib > *total) {
            bail!("--mem {}: this host has {total} MiB in all, ask for less", self.mem_mib);
        }
        if self.disks.len() > MAX_DISKS {
            bail!("{} disks: a VM has {MAX_DISKS} at most", self.disks.len());
        }
        persist::require_free_tag(paths, &self.tag)
    }

    fn config(&self, paths: &Paths, host: &Host) -> Result<VmConfig> {
        let kernel = self.kernel(paths, host)?;
        let store = ImageStore::open(&paths.data)?;
        let image = store.resolve(&self.image)?;
        store.verify(&image).with_context(|| format!("image {}", self.image))?;
        let id = id::new()?;
        let out_of_range = || "a number is out of its range";
        Ok(VmConfig {
            name: id.clone(),
            dir: paths.vm(&id),
            id,
            kernel: kernel.path,
            initrd: assets::initrd(paths)?,
            root: image.path,
            image: self.image.clone(),
            image_digest: image.record.digest,
            vcpus: u8::try_from(self.vcpus).with_context(out_of_range)?,
            mem_mib: u32::try_from(self.mem_mib).with_context(out_of_range)?,
            cmdline: self.cmdline.clone(),
            drives: self.disks.clone(),
            boot_timeout_s: self.boot_timeout_s.unwrap_or(match kernel.mode.is_emulated() {
                true => BOOT_TIMEOUT_EMULATED_S,
                false => BOOT_TIMEOUT_S,
            }),
            pvm: host::pvm(paths)?,
        })
    }

    fn kernel(&self, paths: &Paths, host: &Host) -> Result<assets::Kernel> {
        let kernel = assets::kernel(self.kernel.as_deref(), paths, host)?;
        if let Some(advice) = kernel.advice.filter(|_| !self.quiet) {
            output::note(&format!("forkd: {advice}"));
        }
        Ok(kernel)
    }
}

/// Makes a snapshot. The caller watches signals, so that an interruption leaves nothing either.
///
/// # Errors
/// What went wrong, in one line; a traceback of the warm-up code has been printed before. Nothing is left.
pub fn create(paths: &Paths, plan: &Plan) -> Result<Created> {
    plan.check(paths)?;
    paths.prepare_run()?;
    // /dev/kvm first: without it nothing else matters, and its message says what to do.
    let config = plan.config(paths, &host::open(paths)?)?;

    let begun = Instant::now();
    let what = format!("boot {} vCPU, {} MiB, image {}", plan.vcpus, plan.mem_mib, plan.image);
    let step = Step::begin(&what, plan.quiet);
    let booted = boot::start(&config)?;
    let info = booted.wait_ready(Duration::from_secs(config.boot_timeout_s.into()))?;
    let boot_ms = millis(begun.elapsed());
    step.done(&where_it_went(&info.timing));

    let mut warm_ms = 0;
    if let Some(warm) = &plan.warm {
        let step = Step::begin(&format!("warm by {}", warm.name), plan.quiet);
        let begun = Instant::now();
        run_warm(&booted.client, warm, plan.quiet).map_err(|e| booted.explain(e))?;
        warm_ms = millis(begun.elapsed());
        step.done("");
    }

    let step = Step::begin(&format!("fork into snapshot {}", plan.tag), plan.quiet);
    let begun = Instant::now();
    let dir = paths.snapshot(&plan.tag);
    let half_made = guard_snapshot(&dir, &config.id);
    let zygote = booted.client.zygote(&plan.tag, &dir, true).map_err(|e| booted.explain(e))?.child;
    let snapshot_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    step.done("");
    booted.stop();
    let step = Step::begin("try a child", plan.quiet);
    let tried = trial::run(paths, &plan.tag, plan.warm.is_some());
    step.done("");
    if let Err(e) = tried {
        let why = output::error_line(&e);
        output::note(&format!("forkd: children are slower than they could be: no trial: {why}"));
    }
    half_made.disarm();
    Ok(Created {
        tag: plan.tag.clone(),
        pid: zygote.pid,
        image_digest: config.image_digest,
        boot: info.timing,
        boot_ms,
        warm_ms,
        snapshot_us,
    })
}

/// Removes a snapshot that came of a request which this command did not see through. One that another
/// command made of the same tag has another parent.
fn guard_snapshot(dir: &Path, source: &str) -> Guard {
    let (dir, source) = (dir.to_path_buf(), source.to_string());
    Guard::new(move || {
        let Ok(record) = forkd_vmm::run_dir::read_record(&dir) else { return };
        if record.parent.as_deref() != Some(&source) {
            return;
        }
        if let Err(e) = VmClient::new(&dir, &record.id).stop(record.pid) {
            output::note(&format!("forkd: {}", output::error_line(&e)));
        }
    })
}

fn run_warm(vm: &VmClient, warm: &Warm, quiet: bool) -> Result<()> {
    let outcome = Guest::of(vm).warm(&warm.code, &warm.name, &mut |stream, text| {
        // With --json standard output is for the answer alone.
        match stream {
            guest::Stream::Stdout if !quiet => output::print(text),
            _ => {
                output::write_stderr(text.as_bytes());
                Ok(())
            }
        }
    })?;
    if let Some(error) = outcome.error {
        output::note(error.traceback.trim_end());
        bail!("warm-up code {} raised {}: no snapshot was made", warm.name, error.summary())
    }
    // What an evaluation touches for the first time is then in place in each child, and not faulted in by each.
    for _ in 0..2 {
        Guest::of(vm).eval("None", None, &mut |_, _| Ok(()))?;
    }
    Ok(())
}

/// The steps of a boot in one line.
pub fn where_it_went(timing: &Timing) -> String {
    let steps = steps(timing).into_iter().filter(|(name, _)| *name != TOTAL);
    let steps: Vec<String> = steps.map(|(name, took)| format!("{name} {took}")).collect();
    steps.join(", ")
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_sizes_or_files() {
        let disk = parse_disk("64").unwrap();
        assert_eq!((disk.size_mib, disk.path, disk.read_only), (Some(64), None, false));
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display().to_string();
        assert!(parse_disk(&path).unwrap_err().to_string().contains("something in it"));
        std::fs::write(file.path(), "data").unwrap();
        assert!(!parse_disk(&path).unwrap().read_only);
        assert!(parse_disk(&format!("{path}:ro")).unwrap().read_only);
        for bad in ["", "0", "99999999999", "/nonexistent", "/tmp"] {
            let error = parse_disk(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("--disk {bad}")), "{error}");
        }
    }

    #[test]
    fn warm_up_files_that_cannot_be_read_are_named() {
        let error = Warm::read(Path::new("/nonexistent.py")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent.py"));
        assert!(Warm::read(Path::new("/tmp")).is_err());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0xff, 0xfe]).unwrap();
        assert!(Warm::read(file.path()).is_err());
    }
}
