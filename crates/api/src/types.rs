//! Types of the per-VM API, shared by the VM process (server) and the CLI (client).
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /` | | [`InstanceInfo`] |
//! | `GET /vm` | | [`VmInfo`] |
//! | `GET /metrics` | | [`Metrics`] |
//! | `PATCH /vm` | [`VmStateChange`] | 204 |
//! | `POST /fork` | [`ForkRequest`] | [`ForkResponse`] |
//! | `POST /zygote` | [`ZygoteRequest`] | [`ZygoteResponse`] |
//! | `POST /persist` | [`PersistRequest`] | [`ChildResult`] |
//! | `POST /snapshot` | [`SnapshotRequest`] | [`SnapshotReceipt`] |
//! | `PUT /actions` | [`Action`] | 204 |
//! | `GET /written` | | [`PageRanges`] |
//! | `PUT /hot` | [`HotPages`] | 204 |
//!
//! Errors are `{"fault_message": "..."}` with a 4xx or 5xx status, as Firecracker's are.

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use crate::pages::{HotPages, PageRanges};
use serde::{Deserialize, Serialize};

/// Answer to `GET /`: the part that Firecracker's clients know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// Name of the application: `forkd`.
    pub app_name: String,
    /// The VM's id.
    pub id: String,
    /// State, in Firecracker's words: `Not started`, `Running` or `Paused`.
    pub state: String,
    /// Version of forkd.
    pub vmm_version: String,
}

/// Life of a VM process, as told to users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmPhase {
    /// vCPUs run, the agent has not acknowledged its identity yet.
    Starting,
    /// The agent has acknowledged: exec and eval are served.
    Ready,
    /// vCPUs are parked by request.
    Paused,
    /// Never runs; spawns children.
    Zygote,
    /// The agent did not acknowledge in time or refused: nothing is served.
    Failed,
}

/// Answer to `GET /vm`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// What is also kept in `vm.json`.
    #[serde(flatten)]
    pub record: VmRecord,
    /// Phase now.
    pub phase: VmPhase,
    /// Why the phase is `failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Time marks of this VM.
    pub timing: Timing,
    /// How the guest runs kernel mode; none if a VM process of an older forkd answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_mode: Option<KernelMode>,
}

/// How a guest runs kernel mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelMode {
    /// By VT-x or SVM.
    Hardware,
    /// Emulated, on PVM.
    PvmEmulated,
    /// Natively, on PVM.
    PvmNative,
}

/// What a run directory says of its VM or zygote (`vm.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Id: `vm-` and ten characters of Crockford's base 32 in lower case; a zygote's is its tag.
    pub id: String,
    /// Name given by the user, unique among the living; defaults to the id.
    pub name: String,
    /// True for a zygote.
    pub zygote: bool,
    /// Host process id.
    pub pid: u32,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub mem_mib: u32,
    /// Tag or digest of the root image.
    pub image: String,
    /// Digest of the root image.
    pub image_digest: String,
    /// Id of the VM or zygote that this one was forked from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Forks between the cold boot and this VM.
    pub generation: u32,
    /// Unix time of creation, in milliseconds.
    pub created_unix_ms: u64,
}

/// Time marks, in nanoseconds of the host's CLOCK_MONOTONIC; comparable between processes of a host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// The request for this VM was received (fork), or the process started (boot).
    pub requested_ns: u64,
    /// fork(2) began; 0 for a boot.
    pub fork_begin_ns: u64,
    /// fork(2) returned in the child; 0 for a boot.
    pub fork_end_ns: u64,
    /// KVM VM was created and memslots, irqchip and vCPUs exist.
    pub vm_created_ns: u64,
    /// All state was restored (fork) or loaded (boot).
    pub restored_ns: u64,
    /// All vCPUs entered KVM_RUN.
    pub running_ns: u64,
    /// The agent said hello (boot only).
    pub agent_hello_ns: u64,
    /// The agent acknowledged its identity.
    pub ready_ns: u64,
}

/// `POST /fork`: n children of this VM (then it is a branch) or zygote.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// The children, 1 to [`MAX_CHILDREN`].
    pub children: Vec<ChildSpec>,
    /// The longest that a running source may stand still for it, in microseconds: refused (409) if it would be longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pause_us: Option<u64>,
}

/// Most children of one request.
pub const MAX_CHILDREN: usize = 1024;

/// One child to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChildSpec {
    /// Id, chosen by the caller.
    pub id: String,
    /// Name; also the guest's hostname.
    pub name: String,
    /// Run directory: must not exist; the child makes it.
    pub dir: PathBuf,
}

/// Answer to `POST /fork`. One failed child does not fail the rest: look at each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForkResponse {
    /// One for each spec, in order.
    pub children: Vec<ChildResult>,
    /// What the source felt; none for a zygote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourcePause>,
}

/// What became of one child. Sent when its vCPUs run (or it failed before).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChildResult {
    /// Id, as asked.
    pub id: String,
    /// Host process id; absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Of the writer of a durable snapshot: the root hash of what it has written, 64 hex digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// Time marks up to `running_ns`.
    pub timing: Timing,
}

/// Answer to `POST /zygote`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ZygoteResponse {
    /// The zygote.
    #[serde(flatten)]
    pub child: ChildResult,
    /// What the source felt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourcePause>,
}

/// How long a running source stood still for a fork, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourcePause {
    /// From the first kick to the last vCPU's resume.
    pub pause_us: u64,
    /// Kick to all vCPUs parked, with their state saved.
    pub quiesce_us: u64,
    /// Saving irqchip, clock and devices.
    pub save_us: u64,
    /// All fork(2) calls.
    pub fork_us: u64,
    /// Write-protecting RAM, for a snapshot in mode `live`: all of it, or what was left by the protection ahead.
    #[serde(default)]
    pub arm_us: u64,
    /// Time before the pause, while the VM ran, in which RAM was made huge pages so that fork(2) has less to copy.
    #[serde(default)]
    pub collapse_us: u64,
    /// Huge pages (2 MiB) that were made.
    #[serde(default)]
    pub pages_collapsed: u64,
    /// The longest that `pause_us` was to be, if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pause_us: Option<u64>,
    /// Whether it was longer all the same.
    #[serde(default)]
    pub exceeded: bool,
}

/// `POST /zygote`: fork this VM once into a zygote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZygoteRequest {
    /// The snapshot's tag: the zygote's id and name.
    pub tag: String,
    /// Run directory: must not exist.
    pub dir: PathBuf,
    /// Have the guest rehearse its fork notice before, which makes children quicker and gives this VM new random
    /// numbers. Not wanted where the VM goes on with what it does.
    #[serde(default = "yes")]
    pub rehearse: bool,
    /// As of [`ForkRequest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pause_us: Option<u64>,
}

/// `POST /persist`: a forked writer puts a zygote into a store of durable snapshots, under its own tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PersistRequest {
    /// Directory of the store.
    pub store: PathBuf,
    /// Answer once it is durable; otherwise at once, and the store tells what came of it.
    #[serde(default = "yes")]
    pub wait: bool,
}

/// `POST /snapshot`: a running VM writes a durable snapshot of itself, and goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Directory of the store.
    pub store: PathBuf,
    /// Tag of the snapshot.
    pub tag: String,
    /// How it is taken.
    #[serde(default)]
    pub mode: SnapshotMode,
    /// Answer once it is durable; otherwise once the VM runs again, and the store tells what came of it. In mode
    /// `full` there is no difference.
    #[serde(default = "yes")]
    pub wait: bool,
    /// The longest that the VM may stand still for it, in microseconds: refused (409) if it would be longer. In mode
    /// `live` more is done ahead of the pause until it fits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pause_us: Option<u64>,
}

/// How a running VM writes a snapshot of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotMode {
    /// All of RAM is copied while the VM is paused.
    #[default]
    Full,
    /// RAM is write-protected while the VM is paused, and copied while it runs. For RAM in a shared memfd only.
    Live,
    /// What differs from the last durable snapshot of the VM is kept: by a forked writer, or as `live` does it.
    Diff,
}

/// What a snapshot cost the VM that it was taken of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReceipt {
    /// What the source felt.
    pub source: SourcePause,
    /// Bytes of RAM that were written; of mode `live`, as all that follow but the last.
    #[serde(default)]
    pub bytes: u64,
    /// Pages that were copied one after the other.
    #[serde(default)]
    pub pages_by_bulk: u64,
    /// Pages that were copied ahead of their turn, as the guest was about to write them.
    #[serde(default)]
    pub pages_by_handler: u64,
    /// Time for which RAM was being protected ahead of the pause, in microseconds; 0 if all of it was protected in it.
    #[serde(default)]
    pub prearm_us: u64,
    /// Pages that were written meanwhile, and protected again in the pause.
    #[serde(default)]
    pub pages_rearmed: u64,
    /// The longest that a write to a page waited, in microseconds: for its copy, or while RAM was protected ahead.
    #[serde(default)]
    pub longest_stall_us: u64,
    /// Request to durable, in microseconds; 0 if it was not waited for.
    pub ready_us: u64,
}

fn yes() -> bool {
    true
}

/// `PATCH /vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStateChange {
    /// State to go to.
    pub state: DesiredState,
}

/// States one can ask for, in Firecracker's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DesiredState {
    /// Park the vCPUs.
    Paused,
    /// Let them go on.
    Resumed,
}

/// `PUT /actions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action_type", deny_unknown_fields)]
pub enum Action {
    /// Press Ctrl+Alt+Del on the guest's keyboard: a clean shutdown.
    SendCtrlAltDel,
    /// End this process now and remove its run directory.
    Stop,
}

/// `GET /metrics`: counters by name, `group.name`.
pub type Metrics = BTreeMap<String, u64>;

/// Body of an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// One line that names the thing and what to do.
    pub fault_message: String,
}

/// Configuration of `forkd vm`, given as JSON on standard input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Id of the VM.
    pub id: String,
    /// Name; also the hostname.
    pub name: String,
    /// Run directory: must not exist; the VM process makes it.
    pub dir: PathBuf,
    /// Kernel: ELF (vmlinux) or bzImage.
    pub kernel: PathBuf,
    /// Initramfs: newc cpio with the agent as /init.
    pub initrd: PathBuf,
    /// Root image, EROFS; becomes pmem 0.
    pub root: PathBuf,
    /// Tag or digest of the root image, for the record.
    pub image: String,
    /// Digest of the root image, for the record.
    pub image_digest: String,
    /// vCPUs, 1 to 16.
    pub vcpus: u8,
    /// RAM in MiB, 64 to 65,536.
    pub mem_mib: u32,
    /// More words for the kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// Block devices, in order: /dev/vda, /dev/vdb, ...
    #[serde(default)]
    pub drives: Vec<DriveConfig>,
    /// Seconds the agent has to say hello after a boot.
    pub boot_timeout_s: u32,
    /// What is wanted of a host with PVM.
    #[serde(default, skip_serializing_if = "PvmConfig::is_default")]
    pub pvm: PvmConfig,
}

/// What is wanted of a host that has PVM, and where it is remembered what that host can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PvmConfig {
    /// Whether guest kernel mode runs natively.
    #[serde(default)]
    pub mode: PvmMode,
    /// File that remembers what the probe of the host found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memo: Option<PathBuf>,
}

impl PvmConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether guest kernel mode runs natively on PVM. The names are those of FORKD_PVM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PvmMode {
    /// Where the host can do it, and the kernel is the one for it.
    #[default]
    Auto,
    /// It must.
    Native,
    /// It must not.
    Emulated,
}

/// Configuration of `forkd vm` for a zygote from a durable snapshot, or for a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// Tag of the durable snapshot.
    pub restore_from: String,
    /// Directory of the store that has it.
    pub store: PathBuf,
    /// Id of the zygote or VM.
    pub id: String,
    /// Run directory: must not exist.
    pub dir: PathBuf,
    /// The root image, found by the digest in the manifest.
    pub root: PathBuf,
    /// What its RAM is.
    #[serde(default)]
    pub memory: RestoredMemory,
    /// Become a VM of this name, which runs; without it, a zygote.
    #[serde(default)]
    pub run_as: Option<String>,
    /// With [`RestoredMemory::MemfdPrivate`]: number of the descriptor of the memfd, which the process is started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memfd: Option<i32>,
    /// What is wanted of a host with PVM.
    #[serde(default, skip_serializing_if = "PvmConfig::is_default")]
    pub pvm: PvmConfig,
}

/// What the RAM of a loaded snapshot is. The names are those of `--memory`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoredMemory {
    /// The snapshot's files, mapped privately.
    #[default]
    File,
    /// A memfd of its own, mapped shared, which the files are copied to: what mode `live` needs. It cannot be forked,
    /// so it is not for a zygote.
    MemfdShared,
    /// A memfd that has the snapshot's memory, mapped privately. All children of a load map the same one.
    MemfdPrivate,
    /// Memory that is loaded from the files as it is touched. A zygote cannot have such.
    Userfault,
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveConfig {
    /// Base image; without one the device starts as zeroes.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Size in MiB; needed without a path, otherwise at least the base's size.
    #[serde(default)]
    pub size_mib: Option<u32>,
    /// Read-only, or with a private copy-on-write layer that forks with the VM.
    pub read_only: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::DeserializeOwned;
    use serde_json::json;

    /// The value as JSON must be exactly this, and come back from it.
    fn golden<T>(value: T, expected: serde_json::Value)
    where
        T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        assert_eq!(serde_json::to_value(&value).expect("encodes"), expected);
        assert_eq!(serde_json::from_value::<T>(expected).expect("decodes"), value);
    }

    #[test]
    fn what_firecrackers_clients_send_and_expect() {
        golden(Action::SendCtrlAltDel, json!({"action_type": "SendCtrlAltDel"}));
        golden(VmStateChange { state: DesiredState::Paused }, json!({"state": "Paused"}));
        golden(VmStateChange { state: DesiredState::Resumed }, json!({"state": "Resumed"}));
        golden(Fault { fault_message: "no".into() }, json!({"fault_message": "no"}));
        let info = InstanceInfo {
            app_name: "forkd".into(),
            id: "vm-1".into(),
            state: "Running".into(),
            vmm_version: "0.1.0".into(),
        };
        let expected = json!({
            "app_name": "forkd", "id": "vm-1", "state": "Running", "vmm_version": "0.1.0",
        });
        golden(info, expected);
    }

    #[test]
    fn a_vms_record_is_part_of_its_info() {
        let record = VmRecord {
            id: "vm-1".into(),
            name: "a".into(),
            zygote: false,
            pid: 7,
            vcpus: 1,
            mem_mib: 512,
            image: "base".into(),
            image_digest: "d".into(),
            parent: None,
            generation: 0,
            created_unix_ms: 1,
        };
        let info = VmInfo {
            record,
            phase: VmPhase::Ready,
            error: None,
            timing: Timing::default(),
            kernel_mode: Some(KernelMode::PvmNative),
        };
        let value = serde_json::to_value(&info).expect("encodes");
        assert_eq!((&value["id"], &value["phase"]), (&json!("vm-1"), &json!("ready")));
        assert_eq!(value["kernel_mode"], json!("pvm-native"));
        assert!(value.get("parent").is_none() && value.get("error").is_none());
        assert_eq!(serde_json::from_value::<VmInfo>(value).expect("decodes"), info);
    }

    #[test]
    fn what_is_wanted_of_pvm_is_told_in_the_words_of_forkd_pvm() {
        let config = PvmConfig { mode: PvmMode::Emulated, memo: Some("/run/m".into()) };
        golden(config, json!({"mode": "emulated", "memo": "/run/m"}));
        golden(PvmConfig::default(), json!({"mode": "auto"}));
    }

    #[test]
    fn what_was_asked_before_there_were_modes_means_the_same() {
        let old = json!({"store": "/s", "tag": "a"});
        let request = serde_json::from_value::<SnapshotRequest>(old).expect("decodes");
        assert_eq!((request.mode, request.wait), (SnapshotMode::Full, true));
        let live = json!({"store": "/s", "tag": "a", "mode": "live", "wait": false});
        golden(SnapshotRequest { mode: SnapshotMode::Live, wait: false, ..request }, live);
        let old = json!({"restore_from": "a", "store": "/s", "id": "a", "dir": "/d", "root": "/r"});
        let config = serde_json::from_value::<RestoreConfig>(old).expect("decodes");
        assert_eq!((config.memory, &config.run_as), (RestoredMemory::File, &None));
        let shared = json!({
            "restore_from": "a", "store": "/s", "id": "vm-1", "dir": "/d", "root": "/r",
            "memory": "memfd-shared", "run_as": "web",
        });
        let memory = RestoredMemory::MemfdShared;
        golden(
            RestoreConfig { id: "vm-1".into(), memory, run_as: Some("web".into()), ..config },
            shared,
        );
        let private = json!({
            "restore_from": "a", "store": "/s", "id": "vm-1", "dir": "/d", "root": "/r",
            "memory": "memfd-private", "run_as": "web", "memfd": 7,
        });
        let config = serde_json::from_value::<RestoreConfig>(private).expect("decodes");
        assert_eq!((config.memory, config.memfd), (RestoredMemory::MemfdPrivate, Some(7)));
        let receipt = json!({
            "source": {"pause_us": 9, "quiesce_us": 1, "save_us": 2, "fork_us": 3}, "ready_us": 4,
        });
        let receipt = serde_json::from_value::<SnapshotReceipt>(receipt).expect("decodes");
        assert_eq!((receipt.source.arm_us, receipt.bytes), (0, 0));
    }

    #[test]
    fn misspelt_fields_are_refused_by_name() {
        let refused = [
            serde_json::from_value::<ForkRequest>(json!({"children": [], "n": 1})).map(drop),
            serde_json::from_value::<ZygoteRequest>(json!({"tag": "a", "dir": "/", "x": 1}))
                .map(drop),
            serde_json::from_value::<VmStateChange>(json!({"state": "Paused", "x": 1})).map(drop),
            serde_json::from_value::<VmStateChange>(json!({"state": "paused"})).map(drop),
            serde_json::from_value::<Action>(json!({"action_type": "Explode"})).map(drop),
            serde_json::from_value::<SnapshotMode>(json!("lively")).map(drop),
            serde_json::from_value::<RestoredMemory>(json!("memfd_shared")).map(drop),
        ];
        for result in refused {
            let text = result.expect_err("refused").to_string();
            assert!(text.contains("unknown"), "{text}");
        }
    }
}
