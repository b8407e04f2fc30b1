//! The bare guest that the probe runs: page tables, descriptors and a few instructions.
//!
//! ```text
//! kernel: cs ── int 0x1b, unknown ── int 0x1a ── int 0x17 ─┐        ┌─> handler ── int 0x19 ─┐       ┌─> handler ── out
//! user:                                                    └─> syscall                       └─> syscall
//! ```
//!
//! The user's page tables hold one page, at an address that the kernel's do not have; so each step proves that CR3 was
//! exchanged. What the guest sees goes to [`RESULTS`], for [`Results`] to judge.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::CR3_USER;

/// Length of the guest's memory in bytes; what is not touched costs nothing.
pub const LEN: u64 = 1 << 20;
/// The VIF page.
pub const VIF: u64 = 0x1000;
/// The kernel's page tables: PML4, its user twin, then the kernel's PDPT, directory and table.
pub const PML4: u64 = 0x2000;
const PDPT: u64 = 0x4000;
const DIRECTORY: u64 = 0x5000;
const TABLE: u64 = 0x6000;
const USER_PDPT: u64 = 0x7000;
const USER_DIRECTORY: u64 = 0x8000;
const USER_TABLE: u64 = 0x9000;
/// The GDT, and the TSS behind it.
pub const GDT: u64 = 0xa000;
/// See [`GDT`].
pub const TSS: u64 = GDT + 0x100;
/// Kernel code: entry, and the SYSCALL handler.
pub const ENTRY: u64 = 0xb000;
/// See [`ENTRY`].
pub const HANDLER: u64 = ENTRY + 0x400;
/// What the kernel finds by GS, and the frame for `int 0x17`, where its stack begins.
pub const KERNEL_GS: u64 = 0xc000;
/// See [`KERNEL_GS`].
pub const FRAME: u64 = KERNEL_GS + 0x800;
/// Where the guest writes down what it sees.
pub const RESULTS: u64 = 0xd000;
/// The user's page, and where the user has it. GS leads to its second half.
const USER_PAGE: u64 = 0xe000;
const USER_CODE: u64 = 0x4000_0000;
/// See [`USER_PAGE`].
pub const USER_GS: u64 = USER_CODE + 0x800;
/// The same in physical memory.
pub const USER_DATA: u64 = USER_PAGE + (USER_GS - USER_CODE);

/// Port and value that end the guest.
pub const PORT: u16 = 0xf4;
/// See [`PORT`].
pub const DONE: u32 = 0x6b72_6f66;

/// Linux's selectors, which the interface takes for granted.
pub const KERNEL_CS: u16 = 0x10;
/// See [`KERNEL_CS`].
pub const KERNEL_DS: u16 = 0x18;
const USER_CS: u16 = 0x33;
const USER_DS: u16 = 0x2b;
/// Selector of the TSS.
pub const TSS_SELECTOR: u16 = 0x40;
/// STAR: base of the selectors for `sysret`, and for `syscall`.
pub const STAR: u64 = (0x23 << 48) | ((KERNEL_CS as u64) << 32);
/// What `syscall` clears of RFLAGS: IF, TF, DF, AC.
pub const SYSCALL_MASK: u64 = 1 << 9 | 1 << 8 | 1 << 10 | 1 << 18;
/// RFLAGS of the user: IF.
const USER_FLAGS: u64 = 0x202;

/// The CPUID leaf that is given a value no CPU has: part of the brand string.
pub const CPUID_LEAF: u32 = 0x8000_0002;
/// Its EAX, EBX, ECX and EDX.
pub const CPUID_VALUE: [u32; 4] = [0x6b72_6f66, 0x7076_6d21, 0x0bad_cafe, 0x600d_f00d];

/// A hypercall number that means nothing.
const NO_HYPERCALL: u32 = 0x4b56_0bad;
/// `-ENOSYS`.
const ENOSYS: u64 = -38i64 as u64;
const KERNEL_MAGIC: u64 = 0x6c65_6e72_656b_5347;
const USER_MAGIC: u64 = 0x0072_6573_755f_5347;

const PRESENT_WRITABLE_USER: u64 = 7;

/// Puts the guest into `memory`, which is [`LEN`] long and all zeroes.
pub fn load(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let table = |at: u64, entry: u64| memory.write_obj(entry, GuestAddress(at));
    for (at, to) in [(PML4, PDPT), (PDPT, DIRECTORY), (DIRECTORY, TABLE)] {
        table(at, to | PRESENT_WRITABLE_USER)?;
    }
    // All of memory to itself, in small pages, but for the first: a null pointer is a fault.
    for page in 1..LEN / 4096 {
        table(TABLE + page * 8, (page << 12) | PRESENT_WRITABLE_USER)?;
    }
    table(PML4 | CR3_USER, USER_PDPT | PRESENT_WRITABLE_USER)?;
    table(USER_PDPT + (USER_CODE >> 30) * 8, USER_DIRECTORY | PRESENT_WRITABLE_USER)?;
    table(USER_DIRECTORY, USER_TABLE | PRESENT_WRITABLE_USER)?;
    table(USER_TABLE, USER_PAGE | PRESENT_WRITABLE_USER)?;
    let descriptors: [u64; 10] = [
        0,
        0,
        0x00af_9b00_0000_ffff,               // 0x10: kernel code
        0x00cf_9300_0000_ffff,               // 0x18: kernel data
        0x00cf_fb00_0000_ffff,               // 0x20: user code, 32-bit
        0x00cf_f300_0000_ffff,               // 0x28: user data
        0x00af_fb00_0000_ffff,               // 0x30: user code
        0,                                   //
        0x0000_8b00_0000_0067 | (TSS << 16), // 0x40: TSS
        0,                                   // its address is below 4 GiB
    ];
    for (at, descriptor) in (GDT..).step_by(8).zip(descriptors) {
        memory.write_obj(descriptor, GuestAddress(at))?;
    }
    // RSP0.
    memory.write_obj(FRAME, GuestAddress(TSS + 4))?;
    memory.write_obj(KERNEL_MAGIC, GuestAddress(KERNEL_GS))?;
    memory.write_obj(USER_MAGIC, GuestAddress(USER_DATA))?;
    let frame = [USER_CODE, USER_CS.into(), USER_FLAGS, USER_GS, USER_DS.into()];
    for (at, word) in (FRAME..).step_by(8).zip(frame) {
        memory.write_obj(word, GuestAddress(at))?;
    }
    memory.write_slice(&entry(), GuestAddress(ENTRY))?;
    memory.write_slice(&handler(), GuestAddress(HANDLER))?;
    memory.write_slice(&USER, GuestAddress(USER_PAGE))
}

/// The user: ESI is 0 in the first system call, 1 in the second; RDI is what GS leads to.
const USER: [u8; 26] = [
    0x65, 0x48, 0x8b, 0x3c, 0x25, 0, 0, 0, 0, // mov rdi, gs:[0]
    0x0f, 0x05, // syscall
    0x65, 0x48, 0x8b, 0x3c, 0x25, 0, 0, 0, 0, // mov rdi, gs:[0]
    0xff, 0xc6, // inc esi
    0x0f, 0x05, // syscall
    0xeb, 0xfe, // jmp to itself
];

/// Addresses here are below 2 GiB, so they fit a sign-extended displacement.
fn address(at: u64) -> [u8; 4] {
    (at as u32).to_le_bytes()
}

/// `mov [result], rax`.
fn store_rax(code: &mut Vec<u8>, at: u64) {
    code.extend([0x48, 0x89, 0x04, 0x25]);
    code.extend(address(at));
}

/// `mov byte ptr [VIF], 1`: interrupts on. Nothing can be pending, as there is no interrupt controller.
fn interrupts_on(code: &mut Vec<u8>) {
    code.extend([0xc6, 0x04, 0x25]);
    code.extend(address(VIF));
    code.push(1);
}

fn entry() -> Vec<u8> {
    let mut code = vec![0x8c, 0xc8]; // mov eax, cs
    store_rax(&mut code, Results::CS);
    code.push(0xb8); // mov eax, number
    code.extend(NO_HYPERCALL.to_le_bytes());
    code.extend([0xcd, 0x1b]); // int 0x1b
    store_rax(&mut code, Results::HYPERCALL);
    code.push(0xb8); // mov eax, leaf
    code.extend(CPUID_LEAF.to_le_bytes());
    code.extend([0x31, 0xc9]); // xor ecx, ecx
    code.extend([0xcd, 0x1a]); // int 0x1a
    store_rax(&mut code, Results::CPUID);
    // mov rax, rbx; mov rax, rcx; mov rax, rdx
    for (at, register) in (Results::CPUID + 8..).step_by(8).zip([0xd8, 0xc8, 0xd0]) {
        code.extend([0x48, 0x89, register]);
        store_rax(&mut code, at);
    }
    code.extend([0x31, 0xf6]); // xor esi, esi
    interrupts_on(&mut code);
    code.extend([0xcd, 0x17]); // int 0x17
    code.extend([0xeb, 0xfe]); // not reached
    code
}

fn handler() -> Vec<u8> {
    // mov [rsi*8 + result], register
    let store = |code: &mut Vec<u8>, modrm: u8, at: u64| {
        code.extend([0x48, 0x89, modrm, 0xf5]);
        code.extend(address(at));
    };
    const RAX: u8 = 0x04;
    const RDI: u8 = 0x3c;
    let mut code = vec![0x65, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0]; // mov rax, gs:[0]
    store(&mut code, RAX, Results::GS);
    store(&mut code, RDI, Results::USER_GS);
    code.extend([0x0f, 0xb6, 0x04, 0x25]); // movzx eax, byte ptr [VIF]
    code.extend(address(VIF));
    store(&mut code, RAX, Results::IF);
    code.extend([0x0f, 0x20, 0xd8]); // mov rax, cr3
    store(&mut code, RAX, Results::CR3);
    code.extend([0x85, 0xf6]); // test esi, esi
    code.extend([0x75, 0x02]); // jnz over the next
    code.extend([0xcd, 0x19]); // int 0x19
    code.push(0xb8); // mov eax, DONE
    code.extend(DONE.to_le_bytes());
    code.extend([0xe7, PORT as u8]); // out PORT, eax
    code.extend([0xeb, 0xfe]);
    code
}

/// What the guest has seen. Of what happens twice there are two in a row.
#[derive(Debug)]
pub struct Results<'a>(pub &'a GuestMemoryMmap);

impl Results<'_> {
    const CS: u64 = RESULTS;
    const HYPERCALL: u64 = RESULTS + 0x08;
    const CPUID: u64 = RESULTS + 0x10;
    const GS: u64 = RESULTS + 0x30;
    const USER_GS: u64 = RESULTS + 0x40;
    const IF: u64 = RESULTS + 0x50;
    const CR3: u64 = RESULTS + 0x60;

    /// The first thing that is not as it should be.
    pub fn check(&self) -> Result<(), Wrong> {
        /// The host's own selector of user code, at which kernel mode runs.
        const REAL_CS: u64 = 0x33;
        let [eax, ebx, ecx, edx] = CPUID_VALUE.map(u64::from);
        let twice = |what, at: u64, value| [(what, at, value), (what, at + 8, value)];
        let expected = [
            ("CS in kernel mode", Self::CS, REAL_CS),
            ("the answer to an unknown hypercall", Self::HYPERCALL, ENOSYS),
            ("EAX of CPUID by int 0x1a", Self::CPUID, eax),
            ("EBX of CPUID by int 0x1a", Self::CPUID + 8, ebx),
            ("ECX of CPUID by int 0x1a", Self::CPUID + 16, ecx),
            ("EDX of CPUID by int 0x1a", Self::CPUID + 24, edx),
        ];
        let expected = expected.into_iter().chain(
            [
                twice("GS in user mode", Self::USER_GS, USER_MAGIC),
                twice("GS in the handler of SYSCALL", Self::GS, KERNEL_MAGIC),
                twice("the interrupt flag in the handler of SYSCALL", Self::IF, 0),
                twice("CR3 in the handler of SYSCALL", Self::CR3, PML4),
            ]
            .into_iter()
            .flatten(),
        );
        for (what, at, expected) in expected {
            let found = self.0.read_obj(GuestAddress(at)).unwrap_or(!expected);
            if found != expected {
                return Err(Wrong { what, found, expected });
            }
        }
        Ok(())
    }
}

/// Something that was not as it should be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} is {found:#x}, not {expected:#x}")]
pub struct Wrong {
    what: &'static str,
    found: u64,
    expected: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_result_counts() {
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), LEN as usize)]).unwrap();
        load(&memory).unwrap();
        assert!(Results(&memory).check().is_err(), "nothing has run");
        let words = [0x33, ENOSYS].into_iter().chain(CPUID_VALUE.map(u64::from)).chain([
            KERNEL_MAGIC,
            KERNEL_MAGIC,
            USER_MAGIC,
            USER_MAGIC,
            0,
            0,
            PML4,
            PML4,
        ]);
        let words: Vec<u64> = words.collect();
        for (at, word) in (RESULTS..).step_by(8).zip(&words) {
            memory.write_obj(*word, GuestAddress(at)).unwrap();
        }
        assert_eq!(Results(&memory).check(), Ok(()));
        for (at, word) in (RESULTS..).step_by(8).zip(&words) {
            memory.write_obj(word ^ 1, GuestAddress(at)).unwrap();
            let wrong = Results(&memory).check().expect_err("one is wrong");
            assert_eq!((wrong.found, wrong.expected), (word ^ 1, *word));
            memory.write_obj(*word, GuestAddress(at)).unwrap();
        }
    }

    #[test]
    fn the_code_fits_its_places() {
        assert!(ENTRY + entry().len() as u64 <= HANDLER);
        assert!(HANDLER + handler().len() as u64 <= KERNEL_GS);
        assert_eq!(PML4 % (2 * CR3_USER), 0);
        assert!(USER.len() < 0x800);
    }
}
