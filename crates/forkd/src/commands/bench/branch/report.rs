//! What is told: rows, what they must reach, the table and the JSON.

use std::path::Path;

use anyhow::{Context, Result};
use forkd_sys::clock::realtime_ns;
use forkd_vm::Host;
use serde::Serialize;

use super::super::stats::{Samples, Summary};
use super::Args;
use super::chain::{Loaded, per_link_ms};
use super::load::Rate;
use super::modes::{CellSamples, Mode};
use crate::output;
use crate::process_memory::Anonymous;

/// RAM for which the bars are meant.
const BAR_MEM: u64 = 1536;
/// What a link of a chain may cost.
const PER_LINK: &str = "2 ms";

/// One mode at one rate and one size. Times are in ms.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// RAM of the guest.
    pub mem_mib: u64,
    /// What its writers did.
    pub rate: String,
    /// How it was branched or saved.
    pub mode: Mode,
    /// What its RAM is.
    pub memory: &'static str,
    /// Resident at the end: what the floor was measured with.
    pub resident: Anonymous,
    /// What the writers came to, in MB (10^6 bytes) of pages a second.
    pub written_mb_s: f64,
    /// The pause, as the VMM told it: from the first kick of a vCPU to the last one's resume.
    pub pause_ms: Summary,
    /// Of it: until all vCPUs were parked.
    pub quiesce_ms: Option<Summary>,
    /// Of it: saving the state; of `full`, copying RAM too.
    pub save_ms: Option<Summary>,
    /// Of it: fork(2).
    pub fork_ms: Option<Summary>,
    /// Of it: write protection.
    pub arm_ms: Option<Summary>,
    /// The gap that the writers saw. See [`super::load::Taken::seen`].
    pub gap_ms: Option<Summary>,
    /// The longest gap that they saw after it, until they were asked, 0.3 s after the request.
    pub gap_after_ms: Option<Summary>,
    /// The longest gap in the 0.3 s before the request: what the guest and the host do by themselves.
    pub noise_ms: Option<Summary>,
    /// The longest that a write waited for its page after the resume: told by the VMM in mode `live`; otherwise the
    /// longest gap after the pause's, noise and all.
    pub stall_ms: Option<Summary>,
    /// Where `stall_ms` is from.
    pub stall_from: &'static str,
    /// The least that the pause could be.
    pub floor_ms: Option<Summary>,
    /// p50 of the pause over p50 of the floor.
    pub p50_to_floor: Option<f64>,
    /// p99 of the pause over p50 of the floor.
    pub p99_to_floor: Option<f64>,
    /// From the request to a branch's vCPUs running, or to a snapshot that is durable.
    pub ready_ms: Option<Summary>,
    /// Of mode `fork` with `--snapshot`: from the request to a snapshot that is durable.
    pub durable_ms: Option<Summary>,
    /// What a snapshot takes on disk, in MiB.
    pub disk_mib: Option<Summary>,
    /// Pauses of which the writers saw no gap.
    pub unseen: usize,
    /// Gaps that were not kept, as there were too many.
    pub lost: u64,
    /// What must be reached on the PVM hosts that forkd is developed on.
    pub must_reach: Option<&'static str>,
}

/// A size that could not be measured, or not to the end.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// RAM of the guest.
    pub mem_mib: u64,
    /// Why.
    pub error: String,
}

/// All that was measured, and where.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Kind of KVM.
    pub kvm: &'static str,
    /// The CPU's name.
    pub cpu: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// RAM of the host.
    pub host_mem_mib: Option<u64>,
    /// Kernel of the host.
    pub kernel: String,
    /// Version of forkd.
    pub version: &'static str,
    /// Day, in UTC.
    pub date: String,
    /// Seconds since 1970.
    pub unix_s: u64,
    /// vCPUs of the guests.
    pub vcpus: u64,
    /// Writers in each.
    pub writers: u32,
    /// Rounds that were asked for.
    pub rounds: u32,
    /// Modes, rates and sizes.
    pub cells: Vec<Cell>,
    /// Loading.
    pub loads: Vec<Loaded>,
    /// What each link of a chain adds to loading.
    pub per_link_ms: Option<f64>,
    /// What failed.
    pub failures: Vec<Failure>,
}

/// What a cell must reach: the table of the issue on branch modes.
pub fn must_reach(mode: Mode, mem_mib: u64, rate: Rate) -> Option<&'static str> {
    let busy = matches!(rate, Rate::Max | Rate::MbPerSecond(_));
    match (mode, rate) {
        _ if mem_mib != BAR_MEM => None,
        (Mode::Fork, _) if busy => Some("8 ms, p99 25 ms, 2 x floor; stall 1 ms"),
        (Mode::Live, _) if busy => Some("1.5 x floor, p99 3 x; stall 5 ms"),
        (Mode::Diff, Rate::Set(_)) => Some("15 ms"),
        _ => None,
    }
}

impl Cell {
    /// A cell of these samples and those of its floor; none without samples.
    pub(super) fn of(at: Place, samples: &CellSamples, floor: Option<&Samples>) -> Option<Self> {
        let pause_ms = samples.pause.summary()?;
        let floor_ms = floor.and_then(Samples::summary);
        let to_floor = |ms: f64| floor_ms.filter(|floor| floor.p50 > 0.0).map(|f| ms / f.p50);
        let live = at.mode == Mode::Live;
        Some(Self {
            mem_mib: at.mem_mib,
            rate: at.rate.to_string(),
            mode: at.mode,
            memory: at.mode.memory(),
            resident: at.resident,
            written_mb_s: samples.written_mb_s(),
            pause_ms,
            quiesce_ms: samples.quiesce.summary(),
            save_ms: samples.save.summary(),
            fork_ms: samples.fork.summary(),
            arm_ms: samples.arm.summary(),
            gap_ms: samples.gap.summary(),
            gap_after_ms: samples.after.summary(),
            noise_ms: samples.noise.summary(),
            stall_ms: if live { samples.stall.summary() } else { samples.after.summary() },
            stall_from: if live { "receipt" } else { "guest" },
            floor_ms,
            p50_to_floor: to_floor(pause_ms.p50),
            p99_to_floor: to_floor(pause_ms.p99),
            ready_ms: samples.ready.summary(),
            durable_ms: samples.durable.summary(),
            disk_mib: samples.disk.summary(),
            unseen: samples.unseen,
            lost: samples.lost,
            must_reach: must_reach(at.mode, at.mem_mib, at.rate),
        })
    }

    fn cells(&self) -> Vec<String> {
        let ratio = |ratio: Option<f64>| ratio.map_or("-".to_string(), |r| format!("{r:.2}"));
        vec![
            self.mem_mib.to_string(),
            self.rate.clone(),
            self.mode.to_string(),
            self.memory.to_string(),
            format!("{}+{}", self.resident.huge >> 20, self.resident.small >> 20),
            self.pause_ms.count.to_string(),
            three(Some(self.pause_ms)),
            three(self.gap_ms),
            three(self.noise_ms),
            three(self.stall_ms),
            median(self.floor_ms),
            format!("{}/{}", ratio(self.p50_to_floor), ratio(self.p99_to_floor)),
            median(self.ready_ms),
            median(self.disk_mib),
            self.must_reach.unwrap_or("-").to_string(),
        ]
    }
}

/// Where a cell was measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub mem_mib: u64,
    pub mode: Mode,
    pub rate: Rate,
    pub resident: Anonymous,
}

fn three(summary: Option<Summary>) -> String {
    summary.map_or("-".to_string(), |s| format!("{:.2}/{:.2}/{:.2}", s.p50, s.p99, s.max))
}

fn median(summary: Option<Summary>) -> String {
    summary.map_or("-".to_string(), |s| format!("{:.2}", s.p50))
}

/// Year, month and day of a time, in UTC (the days of the proleptic Gregorian calendar, counted from March).
fn date(unix_s: u64) -> String {
    let days = unix_s / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

impl Report {
    /// An empty one, of this host.
    ///
    /// # Errors
    /// There is no KVM.
    pub fn of(args: &Args) -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu =
            cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let unix_s = realtime_ns() / 1_000_000_000;
        Ok(Self {
            kvm: Host::open()?.flavour().name(),
            cpu: cpu.map_or("unknown CPU", |(_, name)| name).to_string(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            host_mem_mib: crate::host::memory_mib(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            version: env!("CARGO_PKG_VERSION"),
            date: date(unix_s),
            unix_s,
            vcpus: args.vcpus,
            writers: args.writers,
            rounds: args.rounds,
            cells: Vec::new(),
            loads: Vec::new(),
            per_link_ms: None,
            failures: Vec::new(),
        })
    }

    /// Adds what follows from the rows.
    pub fn complete(&mut self) {
        self.per_link_ms = per_link_ms(&self.loads);
    }

    /// Writes it to a file, which is the old one or the new one at any time.
    ///
    /// # Errors
    /// Names the file.
    pub fn save(&self, file: &Path) -> Result<()> {
        let mut text =
            serde_json::to_vec_pretty(self).context("cannot write the result as JSON")?;
        text.push(b'\n');
        let failed = || format!("cannot write {}", file.display());
        let mut new = file.as_os_str().to_os_string();
        new.push(".new");
        std::fs::write(&new, text).with_context(failed)?;
        std::fs::rename(&new, file).with_context(failed)
    }

    /// Prints it as tables.
    ///
    /// # Errors
    /// Standard output can't be written.
    pub fn print(&self) -> Result<()> {
        output::line(&format!(
            "{}, {}, {} CPUs, Linux {}; forkd {}, {}; guests: {} vCPU, {} writers",
            self.kvm,
            self.cpu,
            self.cpus,
            self.kernel,
            self.version,
            self.date,
            self.vcpus,
            self.writers
        ))?;
        if !self.cells.is_empty() {
            output::line(
                "times in ms, p50/p99/max; resident and disk in MiB; noise: the longest gap in 0.3 s without a branch; \
                 stall: of live as the VMM told it, else the longest gap after the pause's, noise and all",
            )?;
            let header = [
                "mem",
                "rate",
                "mode",
                "ram",
                "huge+small",
                "n",
                "pause",
                "guest saw",
                "noise",
                "stall",
                "floor",
                "x floor",
                "ready",
                "disk",
                "must reach",
            ];
            output::line(&output::table(&header, self.cells.iter().map(Cell::cells)))?;
        }
        if !self.loads.is_empty() {
            let header = ["mem", "depth", "n", "to zygote", "to vCPUs running", "must reach"];
            let rows = self.loads.iter().map(|load| {
                vec![
                    load.mem_mib.to_string(),
                    load.depth.to_string(),
                    load.zygote_ms.count.to_string(),
                    three(Some(load.zygote_ms)),
                    three(Some(load.running_ms)),
                    load.must_reach.unwrap_or("-").to_string(),
                ]
            });
            output::line(&output::table(&header, rows))?;
        }
        if let Some(slope) = self.per_link_ms {
            output::line(&format!("per link of a chain: {slope:.2} ms (must reach {PER_LINK})"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(mode: Mode, rate: Rate) -> Place {
        Place { mem_mib: 1536, mode, rate, resident: Anonymous { huge: 2 << 20, small: 3 << 20 } }
    }

    #[test]
    fn a_cell_is_set_beside_its_floor() {
        let all = |values: &[f64]| values.iter().copied().collect::<Samples>();
        let samples = CellSamples {
            pause: all(&[4.0, 6.0, 5.0]),
            after: all(&[0.7]),
            stall: all(&[0.2]),
            unseen: 1,
            ..CellSamples::default()
        };
        let floor = all(&[2.0, 2.5, 3.0]);
        let cell = Cell::of(place(Mode::Fork, Rate::Max), &samples, Some(&floor)).unwrap();
        assert_eq!((cell.p50_to_floor, cell.p99_to_floor), (Some(2.0), Some(2.4)));
        assert_eq!(cell.stall_ms.unwrap().p50, 0.7);
        let cell = Cell::of(place(Mode::Live, Rate::Max), &samples, None).unwrap();
        assert_eq!((cell.stall_ms.unwrap().p50, cell.stall_from), (0.2, "receipt"));
        assert!(cell.floor_ms.is_none() && cell.p50_to_floor.is_none());
        assert!(cell.cells().contains(&"2+3".to_string()));
        assert!(Cell::of(place(Mode::Fork, Rate::Max), &CellSamples::default(), None).is_none());
    }

    #[test]
    fn bars_are_for_the_size_and_load_that_they_name() {
        assert!(must_reach(Mode::Fork, 1536, Rate::Max).unwrap().contains("8 ms"));
        assert!(must_reach(Mode::Live, 1536, Rate::MbPerSecond(50)).unwrap().contains("1.5 x"));
        assert_eq!(must_reach(Mode::Diff, 1536, Rate::Set(30)), Some("15 ms"));
        for (mode, mem, rate) in [
            (Mode::Fork, 512, Rate::Max),
            (Mode::Fork, 1536, Rate::Idle),
            (Mode::Full, 1536, Rate::Max),
            (Mode::Diff, 1536, Rate::Max),
        ] {
            assert_eq!(must_reach(mode, mem, rate), None);
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (unix_s, text) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_795_638_523, "2026-11-25"),
            (4_107_542_399, "2100-02-28"),
            (4_107_542_400, "2100-03-01"),
        ] {
            assert_eq!(date(unix_s), text);
        }
    }
}
