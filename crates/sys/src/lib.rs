//! Safe wrappers over the Linux system calls that forkd needs.
//!
//! This is the lowest layer: it knows Linux and nothing of microVMs. Each module wraps one facility;
//! `unsafe` is denied here as everywhere and opted into by the modules that cannot do without. All
//! descriptors made here are close-on-exec. Both the VM process and the guest's PID 1 use this
//! crate, so it builds for glibc and musl, starts no thread and keeps no global state but signal
//! dispositions.

pub mod clock;
pub mod error;
pub mod fds;
pub mod fork;
pub mod hugepages;
pub mod limits;
pub mod lock;
pub mod memfd;
pub mod mmap;
pub mod pagemap;
pub mod random;
pub mod reactor;
pub mod sched;
pub mod scm;
pub mod signal;
pub mod spawn;
pub mod timer;
pub mod unix_path;
pub mod userfaultfd;
pub mod wake;

#[cfg(test)]
mod testing;

pub use error::PathError;
