//! Durable snapshots of a VM: what is saved, writing it, loading it.
//!
//! ```text
//!   zygote --POST /persist--> forks a writer, which writes RAM, disks and state, and ends
//!   running VM --POST /snapshot--> the same by itself, while its vCPUs are parked (mode `full`)
//!                              --> forks a writer and write-protects RAM; the writer does it while the VM runs (`live`)
//!   forkd vm {restore_from} --> a zygote over the snapshot's files, or a VM
//! ```
//!
//! The files are the business of `forkd_snapshot`; here is what goes into them. Known holes: snapshots taken here are
//! flat; those of a chain can be loaded.

pub mod live;
mod load;
mod save;
mod state;

pub use load::restore;
pub use save::{Errand, SaveError, fill, finish, run_writer, stage};
pub use state::{MachineState, SavedVm};
