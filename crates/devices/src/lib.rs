//! Device models: what the guest sees on its buses.
//!
//! A device is plain state plus a way to be called: by a vCPU thread through a [`bus::Bus`] (register
//! accesses), and by the event loop (queues, sockets). No device owns a thread. A register write that
//! asks for work marks it pending and rings a [`Doorbell`]; the event loop alone does the work. So when
//! the vCPUs are parked and the event loop stands still, no I/O is in flight and every lock is free:
//! fork(2) then copies a consistent device.
//!
//! After fork(2) a child keeps all device objects as they are in its memory, and swaps only what was
//! bound to the old process: interrupts and doorbells (`rewire`), host sockets (vsock's `begin_child`),
//! files that belong to the run directory (the console log's `reopen`). For a snapshot on disk every
//! device saves and restores itself through serde types of its own, which are not its runtime types.

pub mod bus;
pub mod i8042;
pub mod interrupt;
pub mod serial;
pub mod virtio;
pub mod vmgenid;

pub use interrupt::{Doorbell, DoorbellFn, Interrupt, InterruptSlot, NoInterrupt};
