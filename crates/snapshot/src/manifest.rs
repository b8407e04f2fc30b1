//! `manifest.json`: what a snapshot is, without its content; and whether this host can run it.
//!
//! The manifest is read by its `format` first, so that a later forkd's is refused by name and not by
//! whatever happens to be missing. Its `root` is a hash over everything else in it; as it names the
//! digests of `state` and of `extents`, and `extents` has the hash of each block, the root stands for
//! the whole layer, and through `parent` for the whole chain.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::SnapshotError;
use crate::digest::Digest;

/// Version of the format that this forkd writes, and the latest it reads.
pub const FORMAT: u32 = 1;
/// Most bytes of a manifest that are read: hundreds of times what one has.
const MAX_MANIFEST: u64 = 1 << 20;
/// What the root is a hash of; see [`Manifest::root_of`].
const ROOT_CONTEXT: &str = "forkd 2026 snapshot manifest root v1";

pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const STATE: &str = "state";
pub(crate) const EXTENTS: &str = "extents";
pub(crate) const MEMORY: &str = "memory";

pub(crate) fn disk_name(index: usize) -> String {
    format!("disk-{index}")
}

/// Which implementation stands behind `/dev/kvm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmFlavour {
    /// No hardware support; of a snapshot: the guest's kernel mode was emulated.
    Pvm,
    /// The same, and PVM runs guest kernel mode natively; of a snapshot: the guest's kernel needs that.
    PvmNative,
    /// Intel's VT-x.
    Vmx,
    /// AMD's SVM.
    Svm,
}

impl KvmFlavour {
    /// Whether a snapshot that was taken on `self` runs on a host that has `host`: the same, or more of it.
    pub fn runs_on(self, host: Self) -> bool {
        self == host || (self, host) == (Self::Pvm, Self::PvmNative)
    }
}

impl std::fmt::Display for KvmFlavour {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pvm => "pvm",
            Self::PvmNative => "pvm-native",
            Self::Vmx => "vmx",
            Self::Svm => "svm",
        })
    }
}

/// A model of processor, as `/proc/cpuinfo` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuModel {
    /// `vendor_id`: `AuthenticAMD`.
    pub vendor: String,
    /// `model name`, for people.
    pub name: String,
    /// `cpu family`.
    pub family: u32,
    /// `model`.
    pub model: u32,
    /// `stepping`.
    pub stepping: u32,
}

impl CpuModel {
    /// The first processor of this host.
    ///
    /// # Errors
    /// `/proc/cpuinfo` cannot be read.
    pub fn of_host() -> Result<Self, SnapshotError> {
        let path = Path::new("/proc/cpuinfo");
        let text = fs::read_to_string(path).map_err(|e| SnapshotError::io("read", path, e))?;
        Ok(Self::parse(&text))
    }

    fn parse(cpuinfo: &str) -> Self {
        let of = |key: &str| {
            let lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
            let mut fits = lines.filter(|(name, _)| name.trim() == key);
            fits.next().map_or("", |(_, value)| value.trim())
        };
        Self {
            vendor: of("vendor_id").to_string(),
            name: of("model name").to_string(),
            family: of("cpu family").parse().unwrap_or(0),
            model: of("model").parse().unwrap_or(0),
            stepping: of("stepping").parse().unwrap_or(0),
        }
    }
}

impl std::fmt::Display for CpuModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vendor, name, family, model, stepping } = self;
        write!(f, "{name} ({vendor} family {family} model {model} stepping {stepping})")
    }
}

/// What must be the same where a snapshot is taken and where it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Platform {
    /// `x86_64`.
    pub arch: String,
    /// The processor.
    pub cpu: CpuModel,
    /// The kind of KVM.
    pub kvm: KvmFlavour,
    /// The host's page size in bytes.
    pub page_size: u32,
}

impl Platform {
    /// That of this host, of which the caller knows the kind of KVM.
    ///
    /// # Errors
    /// `/proc/cpuinfo` cannot be read.
    pub fn of_host(kvm: KvmFlavour) -> Result<Self, SnapshotError> {
        // A page size is 64 KiB at most on anything that Linux runs on.
        let page_size = rustix::param::page_size() as u32;
        let arch = std::env::consts::ARCH.to_string();
        Ok(Self { arch, cpu: CpuModel::of_host()?, kvm, page_size })
    }
}

/// A root image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRef {
    /// Its digest, which is what counts.
    pub digest: String,
    /// The tag it had when the VM was started, for people.
    pub tag: Option<String>,
}

/// How a snapshot was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// By a forked zygote.
    Fork,
    /// By write protection, while the source ran.
    Live,
    /// What was dirty since the parent.
    Diff,
    /// All of it, in the pause.
    Full,
}

/// The parent of a diff.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Its tag.
    pub tag: String,
    /// Its root hash: another snapshot under the same tag is not the parent.
    pub root: Digest,
}

/// A file that is hashed as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmallFile {
    /// Its length in bytes.
    pub bytes: u64,
    /// BLAKE3 of its bytes.
    pub digest: Digest,
}

/// A file that is hashed by blocks. Its hashes are in `extents`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PagedFile {
    /// Its length in bytes.
    pub bytes: u64,
    /// Bytes of it that this layer holds.
    pub data_bytes: u64,
    /// Nothing of older layers shows through.
    pub whole: bool,
}

/// What the one who takes a snapshot says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// When the instant was that it captures, in milliseconds of Unix time; [`Facts::now`].
    pub created_unix_ms: u64,
    /// Version of forkd.
    pub forkd: String,
    /// Where it was taken.
    pub platform: Platform,
    /// Digest of the guest's kernel.
    pub kernel: String,
    /// The root image.
    pub image: ImageRef,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM in MiB. The memory file has this size.
    pub mem_mib: u64,
    /// How it was taken.
    pub mode: Mode,
    /// Names the instant, if a zygote was forked off then: random, drawn by the VM that it was forked off.
    pub instant: Option<Digest>,
}

impl Facts {
    /// Milliseconds of Unix time.
    pub fn now() -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

/// What a snapshot is. The order of the fields is part of the format: the root is computed over it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format, 1.
    pub format: u32,
    /// Hash over all the rest, and so over the layer; see the module.
    pub root: Digest,
    /// Its tag.
    pub tag: String,
    /// Milliseconds of Unix time.
    pub created_unix_ms: u64,
    /// Version of the forkd that wrote it.
    pub forkd: String,
    /// Where it was taken.
    pub platform: Platform,
    /// Digest of the guest's kernel.
    pub kernel: String,
    /// The root image.
    pub image: ImageRef,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM in MiB.
    pub mem_mib: u64,
    /// How it was taken. Whether it is a diff now is told by `parent`.
    pub mode: Mode,
    /// What it is a diff over.
    pub parent: Option<Parent>,
    /// The root of the diff that this one is the compacted form of: children that name that are its.
    pub replaces: Option<Digest>,
    /// Names the instant, if a zygote was forked off then and became this: by it the VM knows its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instant: Option<Digest>,
    /// vCPU and device state.
    pub state: SmallFile,
    /// Which pages the layer holds.
    pub extents: SmallFile,
    /// RAM.
    pub memory: PagedFile,
    /// The writable layers of the disks.
    pub disks: Vec<PagedFile>,
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Manifest {
    /// Computes the root: BLAKE3 in key derivation mode of the manifest as compact JSON in the order
    /// of its fields, with 64 zeroes for the root.
    pub fn root_of(&self) -> Digest {
        let blank = Self { root: Digest::ZERO, ..self.clone() };
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        // It has no map with other keys than strings and no fallible field, and a hasher takes
        // everything: if this could fail, the root would be wrong and the manifest be refused.
        let written = serde_json::to_writer(&mut hasher, &blank);
        debug_assert!(written.is_ok());
        Digest(*hasher.finalize().as_bytes())
    }

    /// As it is in the file, with its root computed.
    pub(crate) fn seal(&mut self) -> Vec<u8> {
        self.root = self.root_of();
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Reads the manifest in a directory and checks it, but for what it says of other files.
    ///
    /// # Errors
    /// It cannot be read, is of a later format, or damaged.
    pub fn read(dir: &Path) -> Result<Self, SnapshotError> {
        let path = dir.join(MANIFEST);
        Self::parse(&read_whole(&path, MAX_MANIFEST)?, &path)
    }

    /// `path` is for errors.
    fn parse(bytes: &[u8], path: &Path) -> Result<Self, SnapshotError> {
        let damaged = |what: &dyn std::fmt::Display| SnapshotError::damaged(path, what);
        let FormatOnly { format } = serde_json::from_slice(bytes).map_err(|e| damaged(&e))?;
        if format > FORMAT {
            let path = path.to_owned();
            return Err(SnapshotError::Format { path, found: format, supported: FORMAT });
        }
        if format != FORMAT {
            return Err(damaged(&format_args!("there never was a format {format}")));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| damaged(&e))?;
        let root = manifest.root_of();
        if root != manifest.root {
            let said = manifest.root;
            return Err(damaged(&format_args!("its root is {root}, and it says {said}")));
        }
        if manifest.memory.whole == manifest.parent.is_some() {
            return Err(damaged(&"it must either have a parent or all of memory"));
        }
        Ok(manifest)
    }

    /// Whether a child that names this root is a child of this snapshot.
    pub(crate) fn answers_to(&self, root: Digest) -> bool {
        self.root == root || self.replaces == Some(root)
    }
}

/// The tag of the parent that a manifest names which cannot be read: damaged, or of a later format.
pub(crate) fn guess_parent(dir: &Path) -> Option<String> {
    let bytes = read_whole(&dir.join(MANIFEST), MAX_MANIFEST).ok()?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
    Some(value.get("parent")?.get("tag")?.as_str()?.to_string())
}

/// A file's bytes, at most `limit`.
pub(crate) fn read_whole(path: &Path, limit: u64) -> Result<Vec<u8>, SnapshotError> {
    use std::io::Read;
    let file = fs::File::open(path).map_err(|e| SnapshotError::io("open", path, e))?;
    let mut bytes = Vec::new();
    let read = file.take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|e| SnapshotError::io("read", path, e))?;
    if bytes.len() as u64 > limit {
        return Err(SnapshotError::damaged(path, format_args!("it is longer than {limit} bytes")));
    }
    Ok(bytes)
}

/// What a host offers to a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// What it is.
    pub platform: Platform,
    /// Digests of the guest kernels it has; of those asked for is enough.
    pub kernels: Vec<String>,
    /// Digests of the root images it has; of those asked for is enough.
    pub images: Vec<String>,
}

/// Why a snapshot does not run on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The host is another.
    #[error("it was taken on {what} {snapshot}, this host has {host}")]
    Platform {
        /// What differs: `architecture`, `CPU`, `KVM flavour`, `page size`.
        what: &'static str,
        /// Where it was taken.
        snapshot: String,
        /// Here.
        host: String,
    },
    /// The guest's kernel is not here.
    #[error("its kernel {0} is not on this host")]
    Kernel(String),
    /// The root image is not here.
    #[error("its root image {digest}{} is not on this host", tagged(tag))]
    Image {
        /// Its digest.
        digest: String,
        /// The tag it had.
        tag: Option<String>,
    },
}

fn tagged(tag: &Option<String>) -> String {
    tag.as_ref().map(|tag| format!(" ({tag})")).unwrap_or_default()
}

/// Whether a snapshot can run on a host.
///
/// # Errors
/// All that stands against it.
pub fn check_host(manifest: &Manifest, host: &HostFacts) -> Result<(), Vec<Mismatch>> {
    let mut found = Vec::new();
    let (then, now) = (&manifest.platform, &host.platform);
    let mut compare = |what, snapshot: String, host: String| {
        if snapshot != host {
            found.push(Mismatch::Platform { what, snapshot, host });
        }
    };
    compare("architecture", then.arch.clone(), now.arch.clone());
    compare("CPU", then.cpu.to_string(), now.cpu.to_string());
    if !then.kvm.runs_on(now.kvm) {
        compare("KVM flavour", then.kvm.to_string(), now.kvm.to_string());
    }
    compare("page size", then.page_size.to_string(), now.page_size.to_string());
    if !host.kernels.contains(&manifest.kernel) {
        found.push(Mismatch::Kernel(manifest.kernel.clone()));
    }
    if !host.images.contains(&manifest.image.digest) {
        let ImageRef { digest, tag } = manifest.image.clone();
        found.push(Mismatch::Image { digest, tag });
    }
    if found.is_empty() { Ok(()) } else { Err(found) }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
