//! The fd registry: what becomes of each file descriptor in a forked child.
//!
//! Every fd of a VM process is *inherited* (same file, safe to share: /dev/kvm, read-only disk bases),
//! *reopened* (kept until its owner replaces it by one of the child's own: the console's log) or *closed*
//! (sockets, epoll, lock, KVM VM and vCPU fds). The child drops the Rust owners of what it does not keep,
//! and [`Registry::sweep`] then closes whatever is not to be kept, so that an fd nobody registered can't
//! leak into a child: forgetting to register closes, it never shares.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

/// What a forked child does with an fd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Keeps it.
    Inherit,
    /// Keeps it until its owner replaces it.
    Reopen,
    /// Closes it.
    Close,
}

/// Names and dispositions of the fds of this process.
#[derive(Debug, Default)]
pub struct Registry {
    entries: BTreeMap<RawFd, (Disposition, &'static str)>,
}

impl Registry {
    /// An empty registry: standard input, output and error alone, inherited.
    pub fn new() -> Self {
        let mut entries = BTreeMap::new();
        for (fd, name) in [(0, "stdin"), (1, "stdout"), (2, "stderr")] {
            entries.insert(fd, (Disposition::Inherit, name));
        }
        Self { entries }
    }

    /// Says what becomes of `fd`. The last word counts.
    pub fn register(&mut self, fd: &impl AsFd, disposition: Disposition, name: &'static str) {
        self.entries.insert(fd.as_fd().as_raw_fd(), (disposition, name));
    }

    /// The same for a bare fd number, whose owner lends no fd.
    pub fn register_raw(&mut self, fd: RawFd, disposition: Disposition, name: &'static str) {
        self.entries.insert(fd, (disposition, name));
    }

    /// The fds that are open after the sweep: what a child shares, and what its owners will replace,
    /// ascending.
    pub fn kept(&self) -> Vec<RawFd> {
        self.entries
            .iter()
            .filter(|(_, (disposition, _))| *disposition != Disposition::Close)
            .map(|(fd, _)| *fd)
            .collect()
    }

    /// In a forked child: closes everything but what is inherited.
    ///
    /// # Safety
    /// The Rust owners of what is closed must have been dropped, or never be used or dropped: their fd
    /// numbers will be given out anew.
    ///
    /// # Errors
    /// What close_range(2) said.
    pub unsafe fn sweep(&self) -> io::Result<()> {
        // SAFETY: the caller has dropped the owners of all fds that are not inherited, or will never use
        // or drop them, as the contract of this method demands.
        unsafe { forkd_sys::fds::close_range_except(&self.kept()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::File;

    proptest! {
        /// Whatever is registered in whatever order, the child keeps the inherited, and only those.
        #[test]
        fn the_last_word_on_an_fd_counts(words in prop::collection::vec((0usize..8, 0u8..3), 0..40)) {
            let files: Vec<File> = (0..8).map(|_| File::open("/dev/null").unwrap()).collect();
            let mut registry = Registry::new();
            let mut last = [None; 8];
            for (which, word) in words {
                let disposition = [Disposition::Inherit, Disposition::Reopen, Disposition::Close][word as usize];
                registry.register(&files[which], disposition, "file");
                last[which] = Some(disposition);
            }
            let kept = registry.kept();
            prop_assert!(kept.is_sorted());
            for (file, word) in files.iter().zip(last) {
                prop_assert_eq!(kept.contains(&file.as_raw_fd()), matches!(word, Some(Disposition::Inherit | Disposition::Reopen)));
            }
            for fd in 0..3 {
                prop_assert!(kept.contains(&fd));
            }
        }
    }
}
