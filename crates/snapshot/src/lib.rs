//! Durable snapshots: a store of layers, written atomically, hashed, chained.
//!
//! ```text
//! <tag>/manifest.json    what it is: readable alone, versioned; its root hash stands for all below
//! <tag>/state            vCPU and device state, opaque here; hashed as a whole
//! <tag>/extents          which pages the layer holds or makes zero, and a BLAKE3 hash for each 2 MiB
//! <tag>/memory           sparse; a page is at its RAM offset
//! <tag>/disk-<n>         sparse; the writable layer of disk n, a block at its disk offset
//! <tag>/verified.json    when it was last verified: see [`Store::load`]
//! ```
//!
//! A flat snapshot has all of memory, a diff only what differs from its parent. [`Store::stage`]
//! begins one, [`Staged::commit`] publishes it, [`Store::load`] resolves a chain to extents that are
//! mapped over one another. docs/snapshots.md has the rules.
//!
//! Where it can be lied to: a hash is against accidents, not against forgers, who could recompute it.
//! A chain that was compacted takes the compaction's word that the content is the same.
//!
//! **Fork**: the store keeps no thread and no descriptor open between calls. [`Staged`] says what a
//! forked child may do with it.
#![forbid(unsafe_code)]

mod below;
mod chain;
mod compact;
mod digest;
mod error;
pub mod io;
mod manifest;
mod names;
mod pages;
mod remove;
mod staged;
mod store;
mod tree;
mod verify;
mod wait;
mod writer;

pub use chain::{Extent, Info, Loaded, MAX_DEPTH, Resolved, SourceFile, Verification};
pub use digest::{BLOCK_SIZE, Digest, NotADigest, PAGE_SIZE};
pub use error::SnapshotError;
pub use manifest::{
    CpuModel, FORMAT, Facts, HostFacts, ImageRef, KvmFlavour, Manifest, Mismatch, Mode, PagedFile,
    Parent, Platform, SmallFile, check_host,
};
pub use pages::MAX_DISKS;
pub use remove::{Removal, Removed};
pub use staged::Staged;
pub use store::{Entry, Snapshot, Status, Store, Swept};
pub use tree::disk_bytes;
pub use verify::Verified;
pub use writer::PageWriter;
