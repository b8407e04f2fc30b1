//! Does this host's PVM run kernel mode natively, and as our kernel relies on? Asked of its behaviour.
//!
//! [`verify`] looks at the interface's MSRs and then runs a bare guest of some forty instructions through it
//! ([`super::guest`]). A host whose interface is another may do anything with such a guest, spin in KVM_RUN included: it runs on
//! a thread of its own and is kicked when its time is over. Whatever comes of it, the answer is yes, or no with
//! the reason; never an error.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, kvm_dtable, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::errno;

use super::guest::{self, Results};
use super::{FEATURES, IDENTITY, MSR_CONTROL, MSR_FEATURES, MSR_IDENTITY};
use crate::host::Host;
use crate::kick::Target;
use crate::msr::{self, MsrError};
use crate::pvm::probe::flat_segments;

/// How long the guest may run. It takes less than a millisecond.
const LIMIT: Duration = Duration::from_millis(500);
/// How long the probe's thread may take to end once it is kicked, before it is left alone.
const GRACE: Duration = Duration::from_millis(500);
/// Distance between kicks.
const KICK_EVERY: Duration = Duration::from_millis(20);

/// MSRs of SYSCALL and GS (Intel SDM volume 4, table 2-2).
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Why the answer is no.
#[derive(Debug, thiserror::Error)]
enum No {
    #[error("MSR {MSR_IDENTITY:#x} is not there")]
    Absent,
    #[error("MSR {MSR_IDENTITY:#x} reads {0:#x}, not {IDENTITY:#x}")]
    Identity(u64),
    #[error("it has the features {0:#x}, and {FEATURES:#x} are needed")]
    Features(u64),
    #[error("{0}")]
    Msr(#[from] MsrError),
    #[error("{0} failed: {1}")]
    Ioctl(&'static str, errno::Error),
    #[error("no memory for a test guest")]
    Memory,
    #[error("no thread for a test guest: {0}")]
    Thread(std::io::Error),
    #[error("a test guest got {0} at RIP {1:#x}, CR3 {2:#x}")]
    Exit(String, u64, u64),
    #[error("a test guest spins and does not end")]
    Livelock,
    #[error("a test guest did not end within {} ms: the host is busy", LIMIT.as_millis())]
    TimeLimit,
    #[error("a test guest hangs in KVM_RUN and cannot be stopped")]
    Hangs,
    #[error("in a test guest, {0}")]
    Wrong(#[from] guest::Wrong),
}

/// Why the interface must not be used.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For people.
    pub reason: String,
    /// It would be the same the next time: not for want of memory or time.
    pub lasting: bool,
}

/// Verifies the interface. Takes some milliseconds, two seconds at most.
pub fn verify(host: &Host) -> Result<(), Refusal> {
    ask(host, |_| ()).map_err(|no| Refusal { reason: no.to_string(), lasting: no.is_lasting() })
}

impl No {
    fn is_lasting(&self) -> bool {
        match self {
            Self::Absent
            | Self::Identity(_)
            | Self::Features(_)
            | Self::Msr(_)
            | Self::Exit(..)
            | Self::Livelock
            | Self::Wrong(_) => true,
            Self::Ioctl(..) | Self::Memory | Self::Thread(_) | Self::TimeLimit | Self::Hangs => {
                false
            }
        }
    }
}

/// `adjust` may change the guest before it runs.
fn ask(host: &Host, adjust: fn(&GuestMemoryMmap)) -> Result<(), No> {
    let (send, receive) = sync_channel::<Message>(2);
    let host = host.clone();
    // All that the guest needs belongs to its thread: should that never end, nothing is pulled from under it.
    let spawned = thread::Builder::new().name("pvm-probe".into()).spawn(move || {
        let answer = attempt(&host, adjust, &send);
        // Whoever asked may have lost patience.
        let _ = send.send(Message::Answer(answer));
    });
    let thread = spawned.map_err(No::Thread)?;
    let mut end = Instant::now() + LIMIT + GRACE;
    let mut target = None;
    let mut wait = LIMIT;
    loop {
        match receive.recv_timeout(wait) {
            Ok(Message::Started(started)) => {
                target = Some(started);
                wait = LIMIT;
                end = Instant::now() + LIMIT + GRACE;
            }
            Ok(Message::Answer(answer)) => {
                // It has nothing left to do.
                let _ = thread.join();
                return answer;
            }
            Err(RecvTimeoutError::Disconnected) => return Err(No::Hangs),
            Err(RecvTimeoutError::Timeout) => {
                if let Some(target) = &target {
                    target.kick();
                }
                if Instant::now() > end {
                    return Err(No::Hangs);
                }
                wait = KICK_EVERY;
            }
        }
    }
}

/// What the probe's thread tells.
enum Message {
    /// The guest is about to run.
    Started(crate::kick::KickHandle),
    Answer(Result<(), No>),
}

fn attempt(
    host: &Host,
    adjust: fn(&GuestMemoryMmap),
    tell: &SyncSender<Message>,
) -> Result<(), No> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), guest::LEN as usize)])
        .map_err(|_| No::Memory)?;
    guest::load(&memory).map_err(|_| No::Memory)?;
    adjust(&memory);
    let address = memory.get_host_address(GuestAddress(0)).map_err(|_| No::Memory)?;
    let vm = host.kvm().create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
    let region = kvm_userspace_memory_region {
        memory_size: guest::LEN,
        userspace_addr: address as u64,
        ..Default::default()
    };
    // SAFETY: the memory is mapped until after the VM is gone: `memory` is dropped after `vm` and `vcpu`, which were
    // declared later.
    unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(ioctl("KVM_CREATE_VCPU"))?;
    identify(&vcpu)?;
    set_cpuid(host, &vcpu)?;
    let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
    special(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(ioctl("KVM_GET_REGS"))?;
    (regs.rip, regs.rsp, regs.rflags) = (guest::ENTRY, guest::FRAME, 2);
    vcpu.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))?;
    msr::write(
        &vcpu,
        &[
            (STAR, guest::STAR),
            (LSTAR, guest::HANDLER),
            (SYSCALL_MASK, guest::SYSCALL_MASK),
            (KERNEL_GS_BASE, guest::USER_GS),
            (MSR_CONTROL, guest::VIF | FEATURES),
        ],
    )?;
    run(&mut vcpu, tell)?;
    Ok(Results(&memory).check()?)
}

/// Is it the interface at all? Only on PVM: elsewhere the host logs a line for each unknown MSR.
fn identify(vcpu: &VcpuFd) -> Result<(), No> {
    match msr::read(vcpu, &[MSR_IDENTITY]).as_deref() {
        Ok([(_, IDENTITY)]) => {}
        Ok([(_, other)]) => return Err(No::Identity(*other)),
        Ok(_) | Err(_) => return Err(No::Absent),
    }
    match msr::read(vcpu, &[MSR_FEATURES])?.as_slice() {
        [(_, features)] if features & FEATURES == FEATURES => Ok(()),
        other => Err(No::Features(other.first().map_or(0, |(_, features)| *features))),
    }
}

fn set_cpuid(host: &Host, vcpu: &VcpuFd) -> Result<(), No> {
    let mut cpuid: CpuId = host.cpuid().clone();
    super::cpuid::filter(&mut cpuid);
    for entry in cpuid.as_mut_slice().iter_mut().filter(|e| e.function == guest::CPUID_LEAF) {
        [entry.eax, entry.ebx, entry.ecx, entry.edx] = guest::CPUID_VALUE;
    }
    vcpu.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))
}

fn special(sregs: &mut kvm_sregs) {
    let (code, data) = flat_segments(guest::KERNEL_CS, guest::KERNEL_DS);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.ss) = (data, data, data, data);
    sregs.gs = kvm_segment { base: guest::KERNEL_GS, ..data };
    sregs.tr = kvm_segment {
        base: guest::TSS,
        limit: 0x67,
        selector: guest::TSS_SELECTOR,
        s: 0,
        l: 0,
        g: 0,
        ..code
    };
    sregs.gdt = kvm_dtable { base: guest::GDT, limit: 0x4f, ..Default::default() };
    // Paging and protection; PAE; long mode, enabled and active, with SYSCALL.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, guest::PML4, 0x20, 0x501);
}

fn run(vcpu: &mut VcpuFd, tell: &SyncSender<Message>) -> Result<(), No> {
    if let Err(error) = forkd_sys::signal::block_all_but_kick() {
        return Err(No::Thread(error));
    }
    let fd = vcpu.as_raw_fd();
    let flag = NonNull::from(&mut vcpu.get_kvm_run().immediate_exit);
    // SAFETY: the mapping of kvm_run lives as long as `vcpu`, and the target is retired below, before this returns.
    let target: Arc<Target> = unsafe { Target::new(flag, fd) };
    target.enter();
    // Nobody listens only if the asker is gone, and then the answer is not wanted either.
    let _ = tell.send(Message::Started(crate::kick::KickHandle(target.clone())));
    let before = cpu_time();
    let outcome = match vcpu.run() {
        Ok(VcpuExit::IoOut(guest::PORT, data)) if *data == guest::DONE.to_le_bytes() => Ok(()),
        Ok(other) => Err(format!("{other:?}")),
        Err(e) if e.errno() == libc::EINTR => Err(String::new()),
        Err(e) => Err(format!("an error of KVM_RUN, {e},")),
    };
    let used = cpu_time().saturating_sub(before);
    target.leave();
    target.retire();
    outcome.map_err(|exit| match exit.as_str() {
        "" if used > LIMIT / 4 => No::Livelock,
        "" => No::TimeLimit,
        _ => {
            let rip = vcpu.get_regs().map_or(0, |r| r.rip);
            let cr3 = vcpu.get_sregs().map_or(0, |s| s.cr3);
            No::Exit(exit, rip, cr3)
        }
    })
}

/// CPU time of the calling thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to `time`, which lives until after it.
    let rc = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    debug_assert_eq!(rc, 0, "every Linux has this clock");
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn ioctl(call: &'static str) -> impl Fn(errno::Error) -> No {
    move |source| No::Ioctl(call, source)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    /// A guest that a host does not run as ours is what a host that does not run ours as it should would be.
    #[test]
    fn whatever_comes_of_the_guest_is_told_in_good_time() {
        let Ok(host) = Host::open() else { return };
        if ask(&host, |_| ()).is_err() {
            return;
        }
        let wrong = |adjust| ask(&host, adjust).expect_err("the guest was spoiled");
        // A write to the user's page, where GS leads in user mode.
        let no = wrong(|m| m.write_obj(0u64, GuestAddress(guest::USER_DATA)).unwrap());
        assert!(matches!(no, No::Wrong(_)) && no.to_string().contains("GS in user mode"), "{no}");
        // int 0x50
        let no = wrong(|m| m.write_obj(0x50cdu16, GuestAddress(guest::ENTRY)).unwrap());
        assert!(matches!(no, No::Exit(..)) && no.to_string().contains("RIP 0xb000"), "{no}");
        // jmp to itself
        let begin = Instant::now();
        let no = wrong(|m| m.write_obj(0xfeebu16, GuestAddress(guest::ENTRY)).unwrap());
        assert!(matches!(no, No::Livelock | No::TimeLimit), "{no}");
        // Kernel pages that are not the user's to the CPU: the host faults for ever, or says so.
        let no = wrong(|m| {
            let entry = m.read_obj::<u64>(GuestAddress(guest::PML4)).unwrap();
            m.write_obj(entry & !4, GuestAddress(guest::PML4)).unwrap();
        });
        assert!(matches!(no, No::Livelock | No::TimeLimit | No::Exit(..)), "{no}");
        assert!(begin.elapsed() < 2 * (LIMIT + GRACE), "{:?}", begin.elapsed());
    }

    #[test]
    fn only_what_would_be_the_same_again_is_remembered() {
        assert!(No::Livelock.is_lasting() && No::Identity(7).is_lasting());
        assert!(!No::TimeLimit.is_lasting() && !No::Memory.is_lasting() && !No::Hangs.is_lasting());
    }
}
