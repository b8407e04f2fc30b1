//! Durable snapshots of a VM: what is saved, writing it, loading it.
//!
//! ```text
//!   zygote --POST /persist--> forks a writer, which writes RAM, disks and state, and ends
//!   running VM --POST /persist--> the same for what differs from its last durable snapshot (mode `diff`)
//!   running VM --POST /snapshot--> writes by itself, while its vCPUs are parked (mode `full`)
//!                              --> forks a writer and write-protects RAM; the writer does it while the VM runs (`live`)
//!   forkd vm {restore_from} --> a zygote over the snapshot's files, or a VM
//! ```
//!
//! The files are the business of `forkd_snapshot`; here is what goes into them.

pub mod live;
mod load;
mod save;
mod state;

use forkd_snapshot::KvmFlavour;
use forkd_vm::host::Flavour;
use forkd_vm::{GuestMode, Host};

pub use load::{memory_of, restore};
pub use save::{
    Errand, SaveError, WRITE_TIMEOUT, bytes_to_fill, fill, finish, fork_writer, run_writer, stage,
    stage_diff,
};
pub use state::{MachineState, SavedVm, encode};

/// What a guest of a mode needs of a host, in the words of a manifest; none if it is not known.
fn kvm_of(host: &Host, mode: GuestMode) -> Option<KvmFlavour> {
    match (host.flavour(), mode) {
        (Flavour::Pvm, GuestMode::PvmNative) => Some(KvmFlavour::PvmNative),
        (Flavour::Pvm, _) => Some(KvmFlavour::Pvm),
        (Flavour::Vmx, _) => Some(KvmFlavour::Vmx),
        (Flavour::Svm, _) => Some(KvmFlavour::Svm),
        (Flavour::Unknown, _) => None,
    }
}
