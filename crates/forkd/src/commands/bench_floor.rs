//! `forkd bench-floor`: what a fork of a VM can't be quicker than, on this host.
//!
//! A process with the same RAM resident as the VM or zygote does the least that has to be done ([`Kind`]). Nothing is
//! saved, restored or run: the VM's own page tables for its guest are empty, and what KVM has to do to those in a
//! fork or an arm is not in the floor. It is a process of its own, single-threaded, so that nothing else of
//! `forkd bench` is resident in it.

// fork(2): see `one_round`.
#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use forkd_memory::memfd::{MemfdOptions, create_empty};
use forkd_memory::{AnonOptions, GuestRam, Sharing};
use forkd_sys::clock::monotonic_ns;
use forkd_sys::fork::{Fork, exit_now, fork};
use forkd_sys::userfaultfd::{Features, Mode, Userfaultfd};
use forkd_vm::{GuestMode, Host, MemSlot, Vm};
use serde::{Deserialize, Serialize};

use crate::output;

/// Size of a huge page of x86.
const HUGE: u64 = 2 << 20;
/// Where RAM is free of holes from: 1 MiB up, on a huge page's boundary.
const START: u64 = HUGE;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Fork, and make a KVM VM in the child: what a child waits for.
    Child,
    /// Fork, with RAM mapped in a KVM VM: what a running source waits for.
    Fork,
    /// Write-protect RAM in a shared memfd, mapped in a KVM VM, by a userfaultfd.
    Arm,
}

/// Measure the floor for `forkd bench`
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub struct Args {
    /// What to measure
    #[arg(long, default_value = "child")]
    kind: Kind,
    /// RAM in MiB
    #[arg(long)]
    mem: u32,
    /// Bytes of it resident in huge pages
    #[arg(long)]
    huge: u64,
    /// Bytes of it resident in small pages
    #[arg(long)]
    small: u64,
    /// vCPUs
    #[arg(long)]
    vcpus: u8,
    /// How often
    #[arg(long, default_value_t = 50)]
    rounds: u32,
}

/// Times of each round, in nanoseconds.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Floor {
    /// fork(2), until it returned in the child.
    pub fork_ns: Vec<u64>,
    /// Making the VM.
    pub kvm_ns: Vec<u64>,
    /// Both; of [`Kind::Fork`] and [`Kind::Arm`] how long the source waited, alone.
    pub total_ns: Vec<u64>,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// KVM or memory can't be had, or a child failed.
    pub fn run(self) -> Result<ExitCode> {
        let host = Host::open()?;
        let floor = match self.kind {
            Kind::Child => self.child(&host)?,
            Kind::Fork => self.source(&host)?,
            Kind::Arm => self.arm(&host)?,
        };
        output::json(&floor)?;
        Ok(ExitCode::SUCCESS)
    }

    fn child(&self, host: &Host) -> Result<Floor> {
        let ram = GuestRam::anonymous(self.mem, AnonOptions::default())?;
        self.touch(&ram)?;
        let mut floor = Floor::default();
        for _ in 0..self.rounds {
            let [begun, forked, done] = self.one_round(host, &ram)?;
            floor.fork_ns.push(forked.saturating_sub(begun));
            floor.kvm_ns.push(done.saturating_sub(forked));
            floor.total_ns.push(done.saturating_sub(begun));
        }
        Ok(floor)
    }

    fn source(&self, host: &Host) -> Result<Floor> {
        let ram = GuestRam::anonymous(self.mem, AnonOptions::default())?;
        let _vm = self.make_vm(host, &ram)?;
        let mut floor = Floor::default();
        for _ in 0..self.rounds {
            // As a guest that writes does: each page is writable again.
            self.touch(&ram)?;
            let begun = monotonic_ns();
            // SAFETY: this process has one thread, so no lock is held by another.
            let side = unsafe { fork() }.context("cannot fork")?;
            let Fork::Parent(mut child) = side else { exit_now(0) };
            floor.total_ns.push(monotonic_ns().saturating_sub(begun));
            child.wait().context("cannot wait for the child")?;
        }
        Ok(floor)
    }

    fn arm(&self, host: &Host) -> Result<Floor> {
        let len = u64::from(self.mem) << 20;
        let memfd = create_empty(len, "forkd-bench-floor", &MemfdOptions::default())?;
        let ram = GuestRam::memfd(self.mem, memfd, Sharing::Shared)?;
        let _vm = self.make_vm(host, &ram)?;
        let uffd = Userfaultfd::new(Features::WP_HUGETLBFS_SHMEM, Features::NONE)
            .context("cannot make a userfaultfd")?;
        // Regions lie one after the other.
        let from = ram.regions().next().map_or(0, |region| region.host_addr);
        let range = from..from + len;
        self.touch(&ram)?;
        uffd.register(range.clone(), Mode::WRITE_PROTECT).context("cannot register RAM")?;
        let mut floor = Floor::default();
        for _ in 0..self.rounds {
            let begun = monotonic_ns();
            uffd.write_protect(range.clone()).context("cannot write-protect RAM")?;
            floor.total_ns.push(monotonic_ns().saturating_sub(begun));
            uffd.write_unprotect(range.clone(), false).context("cannot unprotect RAM")?;
        }
        Ok(floor)
    }

    /// Makes as much of the RAM resident as is said, in pages of both sizes.
    fn touch(&self, ram: &GuestRam) -> Result<()> {
        let regions: Vec<_> = ram.regions().collect();
        let Some(low) = regions.first() else { bail!("RAM has no region") };
        let room = low.len.saturating_sub(START);
        let huge = (self.huge - self.huge % HUGE).min(room - room % HUGE);
        let small = self.small.min(room - huge);
        ram.prefer_huge_pages()?;
        if huge > 0 {
            ram.populate_write(START, huge)?;
        }
        ram.prefer_small_pages()?;
        if small > 0 {
            ram.populate_write(START + huge, small)?;
        }
        Ok(())
    }

    /// Times of: before the fork, after it in the child, VM made.
    fn one_round(&self, host: &Host, ram: &GuestRam) -> Result<[u64; 3]> {
        let (mut reader, mut writer) = std::io::pipe().context("cannot make a pipe")?;
        let begun = monotonic_ns();
        // SAFETY: this process has one thread, so no lock is held by another.
        let side = unsafe { fork() }.context("cannot fork")?;
        let Fork::Parent(mut child) = side else {
            let forked = monotonic_ns();
            // The parent reads nothing if any of this fails, and says so.
            let code = match self.make_vm(host, ram) {
                Ok(_vm) => {
                    let mut marks = [0u8; 16];
                    marks[..8].copy_from_slice(&forked.to_le_bytes());
                    marks[8..].copy_from_slice(&monotonic_ns().to_le_bytes());
                    i32::from(writer.write_all(&marks).is_err())
                }
                Err(_) => 1,
            };
            exit_now(code)
        };
        drop(writer);
        let mut marks = [0u8; 16];
        let read = reader.read_exact(&mut marks);
        child.wait().context("cannot wait for the child")?;
        read.context("the child could not make a VM")?;
        let mark =
            |at: usize| marks[at..at + 8].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        Ok([begun, mark(0), mark(8)])
    }

    fn make_vm(&self, host: &Host, ram: &GuestRam) -> Result<(Vm, Vec<forkd_vm::Vcpu>)> {
        let slots: Vec<MemSlot> = ram
            .regions()
            .map(|r| MemSlot {
                slot: r.slot,
                gpa: r.gpa,
                len: r.len,
                host_addr: r.host_addr,
                read_only: false,
            })
            .collect();
        let mode = if host.is_pvm() { GuestMode::PvmEmulated } else { GuestMode::Hardware };
        let vm = Vm::new(host, mode, &slots, self.vcpus)?;
        let vcpus = (0..self.vcpus)
            .map(|n| vm.create_vcpu(n, ram.guest()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok((vm, vcpus))
    }
}
