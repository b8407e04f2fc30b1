//! One microVM process: machine, event loop, fork.
//!
//! [`process::run_vm`] boots a VM and serves it until it ends. The process plays one of two roles, and
//! fork(2) gives birth to either:
//!
//! ```text
//!              POST /fork            POST /zygote
//!   Running ---------------> Running            (a branch of a running VM)
//!   Running ------------------------> Zygote    (a warm snapshot: no KVM, one thread, never runs)
//!   Zygote  ---------------> Running            (a child of a snapshot)
//! ```
//!
//! What a child inherits as process memory is the [`machine::Machine`]: RAM, buses, devices. What KVM
//! holds is saved before the fork and restored into a new VM after it ([`fork`]).

pub mod agent_link;
mod collapsing;
pub mod control;
pub mod fork;
mod forking;
mod lazy;
mod log;
pub mod machine;
pub mod pause;
pub mod process;
pub mod requests;
pub mod run_dir;
pub mod running;
mod saving;
pub mod snapshot;
pub mod vcpus;
pub mod zygote;

pub use process::{VmmError, run_restored, run_vm};
