//! KVM: host probe, VM, vCPU, boot protocol, and the remedies for PVM.
//!
//! The hypervisor seam of forkd. A [`host::Host`] says what this machine's KVM can do; a [`vm::Vm`] is made over
//! memory that the caller owns; [`vcpu::Vcpu`]s run in it, each on a thread of its own. The state of all of them can
//! be saved while the guest stands still and put into a new VM, in this process or in a child of fork(2):
//!
//! ```text
//! boot:   Host::open, Vm::new, boot::load, create_vcpu, configure_boot, run
//! fork:   kick all, run returns Kicked, Vcpu::save each, Vm::save, fork(2)
//! child:  Vm::abandon, Vm::new, create_vcpu, Vcpu::restore each, Vm::restore, run
//! ```
//!
//! This crate knows nothing of devices: I/O goes to a [`vcpu::ExitBus`], interrupts come by an [`vm::IrqLine`].
//! It depends on nothing of forkd above `sys` and `memory`.

// Ioctls and mappings shared with the kernel; each block argues its case.
#![allow(unsafe_code)]

pub mod boot;
pub mod clock;
pub mod cmdline;
mod cpuid;
pub mod host;
pub mod ioapic;
pub mod kick;
pub mod layout;
pub mod mode;
pub mod msr;
pub mod pvm;
pub mod stats;
pub mod vcpu;
pub mod vm;

pub use host::{Flavour, Host, HostError, HostOptions, ModeError};
pub use kick::KickHandle;
pub use mode::GuestMode;
pub use vcpu::{Exit, ExitBus, Vcpu, VcpuError, VcpuState};
pub use vm::{IrqLine, MemSlot, Vm, VmError, VmState};
