//! Guest RAM: layout, regions and backends.
//!
//! A guest's RAM is one range of this process's memory, [`GuestRam`]. Guest-physical addresses are
//! laid over it in at most two regions ([`layout()`]), around the hole that x86 keeps below 4 GiB for
//! devices. Devices see it as `vm_memory::GuestMemoryMmap`, KVM as one memory slot per region.
//!
//! Forking a VM is fork(2) of its process: the child has the same RAM at the same addresses, and
//! everything here that the parent had stays valid in it. How that comes about is the backend's
//! affair ([`backend::Backend`]).
//!
//! RAM comes from one of five places ([`MemoryBackend`]): nowhere, for a VM that boots; a snapshot's
//! files; a memfd, shared or private ([`memfd`]); or a page source, as it is touched. Each says in which
//! ways a VM with it can be branched ([`BranchMode`]).
//!
//! Known holes: RAM cannot be added to a running guest.

pub mod backend;
pub mod capture;
pub mod collapse;
pub mod error;
pub mod layout;
pub mod memfd;
pub mod ram;

#[cfg(test)]
mod testing;

pub use backend::{
    BranchMode, FileExtent, LoadStatus, MemoryBackend, PageSource, Sharing, SourceFailure,
    WorkingSet,
};
pub use error::MemoryError;
pub use layout::{MMIO_HOLE_END, MMIO_HOLE_START, layout};
pub use memfd::{MemfdError, MemfdOptions, MemfdRegion};
pub use ram::{AnonOptions, GuestRam, Region};
