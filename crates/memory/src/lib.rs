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
//! Known holes: only the anonymous backend exists; RAM cannot be added to a running guest.

pub mod backend;
pub mod capture;
pub mod dirty;
pub mod error;
pub mod layout;
pub mod ram;

pub use error::MemoryError;
pub use layout::{MMIO_HOLE_END, MMIO_HOLE_START, layout};
pub use ram::{AnonOptions, GuestRam, Region};
