//! Where RAM comes from, and how it forks.
//!
//! A backend owns one mapping of the whole of RAM. The trait is the seam at which backends differ:
//! what fork(2) by itself does to the mapping, and what the child has to do before it touches it.

mod anonymous;

use forkd_sys::mmap::Mapping;

pub use anonymous::Anonymous;

use crate::MemoryError;

/// What fork(2) does to the RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForkBehaviour {
    /// Parent and child share all pages, and whoever writes one gets a copy: the fork is complete
    /// when fork(2) returns, and either side may run.
    CopyOnWrite,
    /// Parent and child would write the same pages. The child must not run before
    /// [`Backend::detach_child`] has given it pages of its own.
    Shared,
}

/// A source of guest RAM.
pub trait Backend: std::fmt::Debug + Send + Sync {
    /// Its name, for logs and metrics.
    fn name(&self) -> &'static str;

    /// The whole of RAM. Its address must stay the same for the life of the backend, in forked
    /// children too.
    fn mapping(&self) -> &Mapping;

    /// What fork(2) does to it.
    fn fork_behaviour(&self) -> ForkBehaviour;

    /// Called in a forked child before anything touches RAM: makes it the child's own, at the same
    /// addresses.
    ///
    /// # Errors
    /// The child cannot have RAM of its own; it must end.
    fn detach_child(&mut self) -> Result<(), MemoryError>;
}
