//! Pages that every child writes: copied for it ahead of its own writes.
//!
//! The first write of a child to a page that it shares is a fault in the guest's page tables, an exit, and a copy; in a
//! VM whose kernel mode is native on PVM that is 30 us and more, a hundred times what the copy alone costs. Which
//! pages those are is the same for all children of a snapshot but for a few. So whoever makes a snapshot has one child
//! run for a trial, asks it for what it has written ([`Machine::written`]), and gives that to the zygote
//! ([`Machine::set_hot`]); it is memory of the VM process, and so goes to all that is forked from it.
//!
//! Two sets: what is written until the agent has acknowledged the fork, which is copied while the vCPUs start; and what
//! the first evaluation writes besides, which is copied once somebody asks for the interpreter.

use std::cell::Cell;
use std::io;

use forkd_agent::protocol::INTERPRETER_PORT;
use forkd_api::types::{HotPages, PageRanges};
use forkd_memory::{GuestRam, MemoryBackend};
use forkd_sys::pagemap::Pagemap;

use super::Machine;

/// Most that is copied ahead, of each set: what a child writes until its first answer is a tenth of this.
const MOST: u64 = 16 << 20;

/// RAM beyond this is not looked through page by page: it would take longer than it saves.
const LOOK_MOST: u64 = 16 << 30;

/// Why pages are not copied ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HotError {
    /// More than is worth it.
    #[error("more than {} MiB of pages", MOST >> 20)]
    TooMany,
    /// Not in RAM.
    #[error("{len:#x} bytes at {gpa:#x} are not RAM")]
    NotRam {
        /// Guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// The sets of a machine.
#[derive(Debug, Default)]
pub struct Hot {
    pages: HotPages,
    /// The second set has been copied, or it is too late for it.
    evaluated: Cell<bool>,
}

impl Machine {
    /// The pages of RAM that are this process's alone: in a forked child those that it has written.
    ///
    /// # Errors
    /// `/proc/self/pagemap` cannot be read; RAM is shared or so large that looking would take long (`Unsupported`).
    pub fn written(&self) -> io::Result<PageRanges> {
        let ram = self.ram();
        if !copies(ram) || u64::from(ram.mem_mib()) << 20 > LOOK_MOST {
            let why = "written pages are not told of this RAM: it is shared, or too large";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let pagemap = Pagemap::own().map_err(io::Error::other)?;
        let page = forkd_sys::mmap::page_size() as u64;
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for region in ram.regions() {
            pagemap.each_exclusive(region.host_addr..region.host_addr + region.len, |address| {
                let gpa = region.gpa + (address - region.host_addr);
                match ranges.last_mut() {
                    Some((start, len)) if *start + *len == gpa => *len += page,
                    _ => ranges.push((gpa, page)),
                }
            })?;
        }
        Ok(PageRanges { ranges })
    }

    /// Has children that are forked from now on start with copies of these pages.
    ///
    /// # Errors
    /// A range that is not RAM, or more than is worth it; nothing is changed then.
    pub fn set_hot(&mut self, pages: HotPages) -> Result<(), HotError> {
        for set in [&pages.answer, &pages.eval] {
            let bytes = set.ranges.iter().try_fold(0u64, |sum, (_, len)| sum.checked_add(*len));
            if bytes.is_none_or(|bytes| bytes > MOST) {
                return Err(HotError::TooMany);
            }
            for &(gpa, len) in &set.ranges {
                if !self.ram().contains(gpa, len) {
                    return Err(HotError::NotRam { gpa, len });
                }
            }
        }
        self.hot = Hot { pages, evaluated: Cell::new(false) };
        Ok(())
    }

    /// In a child that begins to run: copies what it will write until it has answered.
    pub fn copy_for_answer(&self) {
        self.hot.evaluated.set(false);
        copy(self.ram(), &self.hot.pages.answer);
    }

    /// After clients were heard: copies what an evaluation will write, once.
    pub(super) fn copy_for_eval(&self) {
        // Asked for each event of the sockets: the device is only looked at if there is something to copy.
        let done = self.hot.evaluated.get() || self.hot.pages.eval.ranges.is_empty();
        if done || !self.vsock.has_reached(INTERPRETER_PORT) {
            return;
        }
        self.hot.evaluated.set(true);
        copy(self.ram(), &self.hot.pages.eval);
    }
}

/// Whether a write to this RAM after a fork makes a copy, which can be made ahead.
fn copies(ram: &GuestRam) -> bool {
    matches!(
        ram.kind(),
        MemoryBackend::Anonymous | MemoryBackend::File | MemoryBackend::MemfdPrivate
    )
}

/// A page that cannot be copied now is copied when the guest writes it, or the VM fails then with the reason.
fn copy(ram: &GuestRam, pages: &PageRanges) {
    if copies(ram) {
        for (gpa, len) in &pages.ranges {
            if ram.populate_write(*gpa, *len).is_err() {
                return;
            }
        }
    }
}
