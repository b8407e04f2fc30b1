//! A guest of a hundred instructions on real PVM: kernel mode with remedied instructions, user mode with system calls
//! and faults. Where PVM is not active there is nothing to test, and the tests pass.

use std::arch::global_asm;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
    kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::testing::Tables;
use super::{Outcome, PvmError, RESERVED_GPA, Shared, VcpuAssist, active, entry};

const IDT: u64 = 0x1_1000;
const GDT: u64 = 0x1_2000;
const TSS: u64 = 0x1_3000;
const STACK: u64 = 0x1_5000;
/// The state that the kernel loads between two of the user's.
const OTHER_STATE: u64 = 0x1_7000;
const COUNTERS: u64 = 0x1_0000;

// Addresses of data are written out: 0x80010000 as a sign-extended displacement is KERNEL + 0x10000.
global_asm!(
    ".pushsection .rodata",
    "pvm_guest_kernel:",
    // Instructions that the emulator lacks.
    "mov rax, -1",
    "popcnt rcx, rax",
    "mov [-0x7ffeffd0], rcx",
    "int3",
    // On a page that is not there: the handler goes on at r15.
    "lea r15, [rip + 1f]",
    "mov edi, 0x403000",
    "xrstor64 [rdi]",
    "1: xor eax, eax",
    "xor edx, edx",
    "mov ebx, 0x1111",
    "mov ecx, 0x2222",
    "lock cmpxchg16b [-0x7ffeffc0]",
    "push 0x2b",
    "push 0x401000",
    "push 0x202",
    "push 0x33",
    "push 0x401000",
    "iretq",
    "pvm_guest_lstar:",
    "mov [-0x7ffeffe0], rsp",
    "mov rsp, -0x7ffeb000",
    "inc qword ptr [-0x7ffefff0]",
    "test eax, eax",
    "jz 2f",
    // Another process's state, and back.
    "mov eax, -1",
    "mov edx, -1",
    "xsave64 [-0x7ffea000]",
    "xrstor64 [-0x7ffe9000]",
    "xrstor64 [-0x7ffea000]",
    "mov rsp, [-0x7ffeffe0]",
    "sysretq",
    "2: out 0x80, al",
    "hlt",
    "pvm_guest_fault:",
    "cld",
    "inc qword ptr [-0x7ffefff8]",
    "mov [rsp + 8], r15",
    "add rsp, 8",
    "iretq",
    "pvm_guest_breakpoint:",
    "inc qword ptr [-0x7fff0000]",
    "iretq",
    "pvm_guest_other:",
    "out 0x81, al",
    "hlt",
    "pvm_guest_kernel_end:",
    // User code, for AVX-512 and for AVX2. Registers are loaded from the first page and stored to the third.
    "pvm_guest_avx512:",
    "mov edi, 0x400000",
    "vmovdqu64 zmm0, [rdi]",
    "vmovdqu64 zmm7, [rdi + 64]",
    "vmovdqu64 zmm15, [rdi + 128]",
    "vmovdqu64 zmm16, [rdi + 192]",
    "vmovdqu64 zmm31, [rdi + 256]",
    "kmovw k3, [rdi + 320]",
    "ldmxcsr [rdi + 384]",
    "mov ebx, 200",
    "3: mov eax, 1",
    "syscall",
    "dec ebx",
    "jnz 3b",
    "mov edi, 0x402000",
    "vmovdqu64 [rdi], zmm0",
    "vmovdqu64 [rdi + 64], zmm7",
    "vmovdqu64 [rdi + 128], zmm15",
    "vmovdqu64 [rdi + 192], zmm16",
    "vmovdqu64 [rdi + 256], zmm31",
    "kmovw [rdi + 320], k3",
    "stmxcsr [rdi + 384]",
    "jmp 5f",
    "pvm_guest_avx2:",
    "mov edi, 0x400000",
    "vmovdqu ymm0, [rdi]",
    "vmovdqu ymm7, [rdi + 64]",
    "vmovdqu ymm15, [rdi + 128]",
    "ldmxcsr [rdi + 384]",
    "mov ebx, 200",
    "4: mov eax, 1",
    "syscall",
    "dec ebx",
    "jnz 4b",
    "mov edi, 0x402000",
    "vmovdqu [rdi], ymm0",
    "vmovdqu [rdi + 64], ymm7",
    "vmovdqu [rdi + 128], ymm15",
    "stmxcsr [rdi + 384]",
    // A fault, and a jump to where system calls go.
    "5: lea r15, [rip + 6f]",
    "mov al, [0x403000]",
    "6: lea r15, [rip + 7f]",
    "mov rax, [rip + pvm_guest_lstar_at]",
    "jmp rax",
    "7: xor eax, eax",
    "syscall",
    "pvm_guest_lstar_at: .quad 0xffffffff80000000 + (pvm_guest_lstar - pvm_guest_kernel)",
    "pvm_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static pvm_guest_kernel: u8;
    static pvm_guest_lstar: u8;
    static pvm_guest_fault: u8;
    static pvm_guest_breakpoint: u8;
    static pvm_guest_other: u8;
    static pvm_guest_kernel_end: u8;
    static pvm_guest_avx512: u8;
    static pvm_guest_avx2: u8;
    static pvm_guest_end: u8;
}

fn code(from: *const u8, to: *const u8) -> &'static [u8] {
    // SAFETY: both labels are in one section, `from` before `to`.
    unsafe { std::slice::from_raw_parts(from, to.offset_from_unsigned(from)) }
}

/// Linear address of a label of the kernel's.
fn kernel_address(label: *const u8) -> u64 {
    Tables::KERNEL + code(&raw const pvm_guest_kernel, label).len() as u64
}

struct Guest {
    tables: Tables,
    _vm: VmFd,
    fd: VcpuFd,
    assist: VcpuAssist,
    shared: std::sync::Arc<Shared>,
    avx512: bool,
}

impl Guest {
    /// None where PVM is not active.
    fn new() -> Option<Self> {
        let kvm = Kvm::new().ok().filter(active)?;
        let avx512 = is_x86_feature_detected!("avx512f");
        let tables = Tables::new();
        load(&tables, avx512);
        let vm = kvm.create_vm().unwrap();
        let host = tables.ram().get_host_address(GuestAddress(0)).unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: 8 << 20,
            userspace_addr: host as u64,
            ..Default::default()
        };
        // SAFETY: `Guest` keeps the RAM for as long as the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let mut fd = vm.create_vcpu(0).unwrap();
        let shared = Shared::new();
        let mut assist = VcpuAssist::new(tables.ram().clone(), shared.clone());
        assist.attach(&mut fd).unwrap();
        configure(&kvm, &fd);
        Some(Self { tables, _vm: vm, fd, assist, shared, avx512 })
    }

    /// Runs until the guest writes to a port, which it gives, or something fails.
    fn run(&mut self) -> Result<u16, PvmError> {
        loop {
            if self.assist.needs_arming() {
                self.assist.arm(&mut self.fd)?;
            }
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, _)) => return Ok(port),
                Ok(VcpuExit::InternalError) => {
                    let _: Outcome = self.assist.on_internal_error(&mut self.fd)?;
                }
                Ok(VcpuExit::Debug(_)) => {
                    let _: Outcome = self.assist.on_debug(&mut self.fd)?;
                }
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn counter(&self, index: u64) -> u64 {
        let at = Tables::KERNEL_GPA + COUNTERS + 8 * index;
        self.tables.ram().read_obj(GuestAddress(at)).unwrap()
    }

    fn metric(&self, name: &str) -> u64 {
        let all = self.shared.metrics().snapshot();
        all.iter().find(|(n, _)| *n == name).map(|(_, v)| *v).unwrap()
    }

    /// What holds however system calls are finished.
    fn check(&self) {
        assert_eq!(self.counter(0), 1, "int3 reaches its handler");
        assert_eq!(
            self.counter(1),
            3,
            "faults: kernel's operand, user's load, user's jump to LSTAR"
        );
        assert_eq!(self.counter(2), 201, "system calls");
        assert_eq!(self.counter(6), 64, "popcnt of all ones");
        assert_eq!((self.counter(8), self.counter(9)), (0x1111, 0x2222), "cmpxchg16b");
        let [first, _, third] = Tables::USER_GPAS;
        let (mut loaded, mut stored) = ([0u8; 388], [0u8; 388]);
        self.tables.ram().read_slice(&mut loaded, GuestAddress(first)).unwrap();
        self.tables.ram().read_slice(&mut stored, GuestAddress(third)).unwrap();
        let pieces: &[(usize, usize)] = if self.avx512 {
            &[(0, 64), (64, 64), (128, 64), (192, 64), (256, 64), (320, 2), (384, 4)]
        } else {
            &[(0, 32), (64, 32), (128, 32), (384, 4)]
        };
        for (at, len) in pieces {
            assert_eq!(loaded[*at..at + len], stored[*at..at + len], "state at {at}");
        }
        for (name, times) in [
            ("popcnt", 1),
            ("int3", 1),
            ("cmpxchg16b", 1),
            ("xsave", 200),
            ("xrstor", 400),
            ("injected_fault", 1),
        ] {
            assert_eq!(self.metric(name), times, "{name}");
        }
    }
}

/// Puts code, descriptor tables and patterns into the guest's RAM.
fn load(tables: &Tables, avx512: bool) {
    let put = |gpa: u64, bytes: &[u8]| {
        tables.ram().write_slice(bytes, GuestAddress(gpa)).unwrap();
    };
    let kernel = Tables::KERNEL_GPA;
    put(kernel, code(&raw const pvm_guest_kernel, &raw const pvm_guest_kernel_end));
    let user = if avx512 { &raw const pvm_guest_avx512 } else { &raw const pvm_guest_avx2 };
    put(Tables::USER_GPAS[1], code(user, &raw const pvm_guest_end));
    let pattern: Vec<u8> = (0..388u32).map(|i| (i * 37 + 11) as u8).collect();
    put(Tables::USER_GPAS[0], &pattern);
    // Round towards zero, all exceptions masked.
    put(Tables::USER_GPAS[0] + 384, &0x7f80u32.to_le_bytes());
    // All components of the other state in use, with the pattern backwards.
    let other: Vec<u8> = (0..2688u32).map(|i| (i * 101 + 7) as u8).collect();
    put(kernel + OTHER_STATE, &other);
    put(kernel + OTHER_STATE + 24, &0x1f80u32.to_le_bytes());
    put(kernel + OTHER_STATE + 512, &[0; 64]);
    put(kernel + OTHER_STATE + 512, &enabled().to_le_bytes());
    for vector in 0..32u64 {
        let handler = kernel_address(match vector {
            3 => &raw const pvm_guest_breakpoint,
            14 => &raw const pvm_guest_fault,
            _ => &raw const pvm_guest_other,
        });
        let low = (handler & 0xffff) | (0x8e00_0010 << 16) | (((handler >> 16) & 0xffff) << 48);
        put(kernel + IDT + 16 * vector, &low.to_le_bytes());
        put(kernel + IDT + 16 * vector + 8, &(handler >> 32).to_le_bytes());
    }
    let tss = Tables::KERNEL + TSS;
    let tss_low = 0x0000_8900_0000_0067 | ((tss & 0xff_ffff) << 16) | (((tss >> 24) & 0xff) << 56);
    let gdt = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0,
        tss_low,
        tss >> 32,
    ];
    for (at, entry) in (kernel + GDT..).step_by(8).zip(gdt) {
        put(at, &u64::to_le_bytes(entry));
    }
    put(kernel + TSS + 4, &(Tables::KERNEL + STACK).to_le_bytes());
}

/// Components that the guest enables.
fn enabled() -> u64 {
    // SAFETY: CPUs that run the tests have XSAVE enabled.
    0xe7 & unsafe { std::arch::x86_64::_xgetbv(0) }
}

fn configure(kvm: &Kvm, fd: &VcpuFd) {
    fd.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    let (code, data) = super::probe::flat_segments(0x10, 0x18);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    let tss = Tables::KERNEL + TSS;
    sregs.tr = kvm_segment {
        base: tss,
        limit: 0x67,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (Tables::KERNEL + GDT, 10 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (Tables::KERNEL + IDT, 32 * 16 - 1);
    // PE, MP, NE, WP, PG; PAE, OSFXSR, OSXMMEXCPT, OSXSAVE; SCE, LME, LMA, NXE.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8001_0023, 0x1000, 0x4_0620, 0xd01);
    fd.set_sregs(&sregs).unwrap();
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: enabled(), ..Default::default() };
    fd.set_xcrs(&xcrs).unwrap();
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let msrs = [
        msr(entry::MSR_STAR, 0x0023_0010_0000_0000),
        msr(entry::MSR_LSTAR, kernel_address(&raw const pvm_guest_lstar)),
        msr(entry::MSR_SFMASK, 0x4_7700),
    ];
    assert_eq!(fd.set_msrs(&Msrs::from_entries(&msrs).unwrap()).unwrap(), 3);
    let regs = kvm_regs {
        rip: Tables::KERNEL,
        rsp: Tables::KERNEL + STACK,
        rflags: 2,
        ..Default::default()
    };
    fd.set_regs(&regs).unwrap();
}

#[test]
fn system_calls_faults_and_states_with_the_trampoline() {
    let Some(mut guest) = Guest::new() else { return };
    assert_eq!(guest.run().unwrap(), 0x80);
    guest.check();
    assert_eq!(guest.metric("trampoline"), 1);
    // Only the first came by the breakpoint; the fault before it was the kernel's.
    assert_eq!((guest.metric("syscall"), guest.metric("real_pf")), (1, 1));
    assert_eq!(guest.assist.save().breakpoint, 0);
    assert!(!guest.assist.needs_arming());
}

#[test]
fn the_same_with_the_breakpoint_where_the_trampoline_does_not_fit() {
    let Some(mut guest) = Guest::new() else { return };
    guest.tables.ram().write_obj(1u8, GuestAddress(RESERVED_GPA + 0x800)).unwrap();
    assert_eq!(guest.run().unwrap(), 0x80);
    guest.check();
    assert_eq!(guest.metric("trampoline"), 0);
    assert_eq!((guest.metric("syscall"), guest.metric("real_pf")), (201, 3));
    assert_eq!(guest.assist.save().breakpoint, kernel_address(&raw const pvm_guest_fault));
}

#[test]
fn an_instruction_without_a_remedy_is_named() {
    let Some(mut guest) = Guest::new() else { return };
    // vpaddd ymm0, ymm0, ymm0 in kernel mode.
    let code = [0xc5, 0xfd, 0xfe, 0xc0];
    guest.tables.ram().write_slice(&code, GuestAddress(Tables::KERNEL_GPA)).unwrap();
    match guest.run() {
        Err(e @ PvmError::Unsupported { .. }) => {
            let text = e.to_string();
            for part in ["vpaddd", "c5 fd fe c0", "0xffffffff80000000"] {
                assert!(text.contains(part), "{text}");
            }
        }
        other => panic!("{other:?}"),
    }
}
