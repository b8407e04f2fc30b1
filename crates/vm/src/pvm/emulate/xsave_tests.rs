//! XSAVE and XRSTOR, compared with the CPU's own.
//!
//! Areas are compared by what they mean, not byte by byte: an init optimisation may or may not have been taken, and
//! CPUs differ in which components they track. [`Meaning`] is what a restore of the area would load.

use proptest::prelude::*;

use super::testing::{Code, Mock, Native};
use crate::pvm::xstate::{AVX, EXTENDED, LEGACY, Layout, MXCSR_DEFAULT, SSE, X87, Xstate, legacy};

/// Components that the tests fill: x87 to AVX-512.
const TESTED: u64 = 0xe7;
const COMPACTED: u64 = 1 << 63;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Save {
    Standard,
    InUse,
    Compacted,
}

const SAVES: [(&str, &[u8], Save, bool); 6] = [
    ("xsave64 [rdi]", &[0x48, 0x0f, 0xae, 0x27], Save::Standard, true),
    ("xsave [rdi]", &[0x0f, 0xae, 0x27], Save::Standard, false),
    ("xsaveopt64 [rdi]", &[0x48, 0x0f, 0xae, 0x37], Save::InUse, true),
    ("xsaveopt [rdi]", &[0x0f, 0xae, 0x37], Save::InUse, false),
    ("xsavec64 [rdi]", &[0x48, 0x0f, 0xc7, 0x27], Save::Compacted, true),
    ("xsavec [rdi]", &[0x0f, 0xc7, 0x27], Save::Compacted, false),
];
const XRSTOR64: [u8; 4] = [0x48, 0x0f, 0xae, 0x2f];
const XRSTOR: [u8; 3] = [0x0f, 0xae, 0x2f];

/// Saves the CPU's state to [r8], loads the one at [rsi], executes `instruction` with EDX:EAX from EBX:ECX, saves what
/// came of it to [r9], and puts the first back.
fn around(instruction: &[u8]) -> Code {
    let full: [u8; 7] = [0xb8, TESTED as u8, 0, 0, 0, 0x31, 0xd2];
    let mut code = full.to_vec();
    code.extend([0x49, 0x0f, 0xae, 0x20]); // xsave64 [r8]
    code.extend([0x48, 0x0f, 0xae, 0x2e]); // xrstor64 [rsi]
    code.extend([0x89, 0xc8, 0x89, 0xda]); // mov eax, ecx; mov edx, ebx
    code.extend(instruction);
    code.extend(full);
    code.extend([0x49, 0x0f, 0xae, 0x21]); // xsave64 [r9]
    code.extend([0x49, 0x0f, 0xae, 0x28]); // xrstor64 [r8]
    Code::new(&code)
}

#[derive(Clone)]
#[repr(C, align(64))]
struct Area([u8; 4096]);

impl Area {
    fn zero() -> Box<Self> {
        Box::new(Self([0; 4096]))
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn set_word(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn address(&mut self) -> u64 {
        self.0.as_mut_ptr() as u64
    }
}

/// What a restore of an area loads: each component's bytes, empty for the initial state, and MXCSR.
#[derive(PartialEq, Eq)]
struct Meaning {
    components: Vec<Vec<u8>>,
    mxcsr: u32,
}

/// A checksum for each component: the bytes would fill pages.
impl std::fmt::Debug for Meaning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "x87 {:02x?}, MXCSR {:#x}", self.components[0], self.mxcsr)?;
        for (index, bytes) in self.components.iter().enumerate().skip(1) {
            let sum = bytes.iter().fold(0u64, |s, b| s.rotate_left(5) ^ u64::from(*b));
            write!(f, ", {index}: {} bytes, sum {sum:x}", bytes.len())?;
        }
        Ok(())
    }
}

impl Meaning {
    fn of(area: &[u8; 4096], asked: u64) -> Self {
        let area = Area(*area);
        let (present, format) = (area.word(LEGACY), area.word(LEGACY + 8));
        let compacted = format & COMPACTED != 0;
        let layout = Layout::host();
        let places: Vec<(u32, usize)> =
            layout.compacted(format & !COMPACTED, format & !COMPACTED).collect();
        let components = (0..8u32).map(|index| {
            if present & asked & (1 << index) == 0 {
                return Vec::new();
            }
            let bytes = match index {
                0 => [&area.0[legacy::CONTROL], &area.0[legacy::ST]].concat(),
                1 => area.0[legacy::XMM].to_vec(),
                _ => {
                    let c = layout.component(index);
                    let at = if compacted {
                        places.iter().find(|p| p.0 == index).unwrap().1
                    } else {
                        c.offset
                    };
                    area.0[at..at + c.len].to_vec()
                }
            };
            let initial = match index {
                0 => {
                    let mut x87 = vec![0; bytes.len()];
                    (x87[0], x87[1]) = (0x7f, 3);
                    x87
                }
                _ => vec![0; bytes.len()],
            };
            if bytes == initial { Vec::new() } else { bytes }
        });
        let has_mxcsr =
            if compacted { present & asked & SSE != 0 } else { asked & (SSE | AVX) != 0 };
        let mxcsr = u32::from_le_bytes(area.0[24..28].try_into().unwrap());
        Self {
            components: components.collect(),
            mxcsr: if has_mxcsr { mxcsr } else { MXCSR_DEFAULT },
        }
    }
}

fn tested() -> u64 {
    // SAFETY: CPUs that run the tests have XSAVE enabled.
    TESTED & unsafe { std::arch::x86_64::_xgetbv(0) }
}

/// A valid area in standard format. `noise` fills the components, `in_use` is XSTATE_BV.
fn standard(noise: &[u8], in_use: u64, mxcsr: u32) -> Box<Area> {
    let mut area = Area::zero();
    for (to, from) in area.0[..2688].iter_mut().zip(noise.iter().cycle()) {
        *to = *from;
    }
    area.0[LEGACY..EXTENDED].fill(0);
    area.0[legacy::END..LEGACY].fill(0);
    let in_use = in_use & tested();
    // What an x87 can have: reserved bits as the CPU reads them, the error summary as the masks make it.
    let fcw = u16::from_le_bytes([area.0[0], area.0[1]]) & 0x0f3f | 0x40;
    let fsw = u16::from_le_bytes([area.0[2], area.0[3]]) & 0x7f7f;
    let pending = if fsw & !fcw & 0x3f != 0 { 0x8080 } else { 0 };
    area.0[..2].copy_from_slice(&fcw.to_le_bytes());
    area.0[2..4].copy_from_slice(&(fsw | pending).to_le_bytes());
    area.0[5] = 0;
    area.0[7] &= 7;
    // AMD's CPUs keep opcode and pointers (of 47 bits) only while an exception is pending.
    if pending == 0 {
        area.0[6..24].fill(0);
    }
    area.0[14..16].fill(0);
    area.0[13] &= 0x7f;
    area.0[22..24].fill(0);
    area.0[21] &= 0x7f;
    for register in 0..8 {
        area.0[32 + 16 * register + 10..32 + 16 * register + 16].fill(0);
    }
    let mxcsr = mxcsr & Xstate::initial().mxcsr_mask();
    area.0[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    area.0[28..32].fill(0);
    area.set_word(LEGACY, in_use);
    area
}

/// The state that the CPU is in after it has loaded `area`, as KVM would give it.
fn state_of(area: &Area) -> Xstate {
    let mut state = Xstate::initial();
    let in_use = area.word(LEGACY);
    let to = state.bytes_mut();
    let mut copy = |range: std::ops::Range<usize>| {
        to[range.clone()].copy_from_slice(&area.0[range]);
    };
    if in_use & X87 != 0 {
        copy(legacy::CONTROL);
        copy(legacy::ST);
    }
    if in_use & SSE != 0 {
        copy(legacy::XMM);
    }
    copy(legacy::MXCSR..legacy::MXCSR + 4);
    for index in 2..8 {
        let c = Layout::host().component(index);
        if in_use & (1 << index) != 0 {
            copy(c.offset..c.offset + c.len);
        }
    }
    copy(LEGACY..LEGACY + 8);
    state
}

fn mask() -> impl Strategy<Value = u64> {
    prop_oneof![Just(TESTED), Just(u64::MAX), any::<u64>().prop_map(|m| m & TESTED), any::<u64>()]
}

fn mxcsr() -> impl Strategy<Value = u32> {
    prop_oneof![Just(MXCSR_DEFAULT), any::<u32>()]
}

/// With AMX enabled in XCR0, a mask of all ones would touch it: leave it out.
fn asked(mask: u64) -> u64 {
    mask & !0x6_0000
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn saving_means_the_same_as_on_this_cpu(
        noise in proptest::collection::vec(any::<u8>(), 997),
        in_use in any::<u64>(),
        mxcsr in mxcsr(),
        old in proptest::collection::vec(any::<u8>(), 491),
        old_in_use in any::<u64>(),
        mask in mask(),
        which in 0..SAVES.len(),
    ) {
        let (name, code, how, wide) = SAVES[which];
        let mask = asked(mask);
        let mut source = standard(&noise, in_use, mxcsr);
        let destination = standard(&old, old_in_use, MXCSR_DEFAULT);
        let mut real = destination.clone();
        let (mut own, mut after) = (Area::zero(), Area::zero());

        let mut mock = Mock::new(real.address(), destination.0.to_vec());
        mock.xstate = state_of(&source);
        (mock.regs.rdi, mock.regs.rax, mock.regs.rdx) = (real.address(), mask, mask >> 32);
        mock.run(code).unwrap();
        prop_assert_eq!(mock.stores, 0);

        let mut native = Native {
            rsi: source.address(), rdi: real.address(), r8: own.address(), r9: after.address(),
            rcx: mask, rbx: mask >> 32, rflags: 0x202, ..Default::default()
        };
        // SAFETY: it writes to `own`, `after` and `real`, and leaves extended state as it found it.
        unsafe { around(code).run(&mut native) };

        let mut emulated = Area::zero();
        emulated.0.copy_from_slice(&mock.memory);
        if !wide {
            // The upper halves of the pointers hold selectors or nothing, as the CPU likes.
            for area in [&mut emulated, &mut real] {
                area.0[12..16].fill(0);
                area.0[20..24].fill(0);
            }
        }
        let asked = mask & tested();
        prop_assert_eq!(
            Meaning::of(&emulated.0, asked), Meaning::of(&real.0, asked), "{}", name);
        prop_assert_eq!(
            emulated.word(LEGACY) & !asked, real.word(LEGACY) & !asked, "{}: bits not asked for", name);
        prop_assert_eq!(emulated.word(LEGACY + 8), real.word(LEGACY + 8), "{}: XCOMP_BV", name);
        if how != Save::Compacted {
            for index in (2..8).filter(|i| asked & (1 << i) == 0) {
                let c = Layout::host().component(index);
                prop_assert_eq!(
                    &emulated.0[c.offset..c.offset + c.len],
                    &destination.0[c.offset..c.offset + c.len]);
            }
            if asked & (SSE | AVX) != 0 {
                prop_assert_eq!(&emulated.0[24..32], &real.0[24..32], "{}: MXCSR", name);
            } else {
                prop_assert_eq!(&emulated.0[24..32], &destination.0[24..32]);
            }
            if how == Save::Standard {
                // Not optimised: initial states are written too.
                prop_assert_eq!(&emulated.0[..416], &real.0[..416], "{}: legacy region", name);
                for index in (2..8).filter(|i| asked & (1 << i) != 0) {
                    let c = Layout::host().component(index);
                    prop_assert_eq!(
                        &emulated.0[c.offset..c.offset + c.len],
                        &real.0[c.offset..c.offset + c.len]);
                }
            }
        }
        prop_assert_eq!(&emulated.0[416..LEGACY], &destination.0[416..LEGACY]);
    }

    #[test]
    fn restoring_leads_to_the_state_that_this_cpu_gets_into(
        noise in proptest::collection::vec(any::<u8>(), 997),
        in_use in any::<u64>(),
        old_mxcsr in mxcsr(),
        new in proptest::collection::vec(any::<u8>(), 491),
        new_in_use in any::<u64>(),
        new_mxcsr in mxcsr(),
        mask in mask(),
        compacted in any::<bool>(),
        wide in any::<bool>(),
    ) {
        let mask = asked(mask);
        let mut before = standard(&noise, in_use, old_mxcsr);
        let mut source = standard(&new, new_in_use, new_mxcsr);
        if compacted {
            // Made by the emulated XSAVEC, which the other test compares with the CPU's.
            let mut mock = Mock::new(0x10_0000, vec![0; 4096]);
            mock.xstate = state_of(&source);
            (mock.regs.rdi, mock.regs.rax) = (0x10_0000, TESTED);
            mock.run(&[0x48, 0x0f, 0xc7, 0x27]).unwrap();
            source.0.copy_from_slice(&mock.memory);
        }
        let code: &[u8] = if wide { &XRSTOR64 } else { &XRSTOR };

        let mut mock = Mock::new(source.address(), source.0.to_vec());
        mock.xstate = state_of(&before);
        (mock.regs.rdi, mock.regs.rax, mock.regs.rdx) = (source.address(), mask, mask >> 32);
        mock.run(code).unwrap();
        prop_assert_eq!(mock.stores, 1);
        prop_assert_eq!(&mock.memory[..], &source.0[..]);

        let (mut own, mut after) = (Area::zero(), Area::zero());
        let mut native = Native {
            rsi: before.address(), rdi: source.address(), r8: own.address(), r9: after.address(),
            rcx: mask, rbx: mask >> 32, rflags: 0x202, ..Default::default()
        };
        // SAFETY: it writes to `own` and `after`, and leaves extended state as it found it.
        unsafe { around(code).run(&mut native) };

        let mut emulated = Area::zero();
        for (to, from) in emulated.0.iter_mut().zip(mock.xstate.bytes()) {
            *to = *from;
        }
        if !wide {
            for area in [&mut emulated, &mut after] {
                area.0[12..16].fill(0);
                area.0[20..24].fill(0);
            }
        }
        prop_assert_eq!(Meaning::of(&emulated.0, tested()), Meaning::of(&after.0, tested()));
        // KVM must get MXCSR even where SSE is in its initial state.
        let mut for_kvm = mock.xstate.clone();
        for_kvm.prepare_for_kvm();
        let told = for_kvm.in_use() & (X87 | SSE | AVX) != 0;
        prop_assert!(told && (for_kvm.mxcsr() == MXCSR_DEFAULT || for_kvm.in_use() & SSE != 0));
        prop_assert_eq!(for_kvm.mxcsr(), mock.xstate.mxcsr());
    }

    #[test]
    fn areas_that_a_cpu_refuses_are_refused(at in 0..HEADER_FAULTS.len(), compacted in any::<bool>()) {
        let (offset, value, only_standard) = HEADER_FAULTS[at];
        let mut mock = Mock::new(0x10_0000, vec![0; 4096]);
        mock.regs.rdi = 0x10_0000;
        mock.regs.rax = TESTED;
        let before = mock.xstate.clone();
        if compacted {
            mock.memory[LEGACY + 15] = 0x80;
        }
        prop_assume!(!(compacted && only_standard));
        mock.memory[LEGACY + offset] |= value;
        let e = mock.exception(&XRSTOR64);
        prop_assert_eq!((e.vector, e.error_code), (13, Some(0)));
        prop_assert_eq!(mock.stores, 0);
        prop_assert_eq!(&mock.xstate, &before);
    }
}

/// Offset in the header, bits, and whether only the standard format forbids it: a component that XCR0 lacks,
/// XCOMP_BV without its top bit, reserved bytes.
const HEADER_FAULTS: [(usize, u8, bool); 4] =
    [(3, 0x80, false), (8, 1, true), (16, 1, false), (23, 0x10, false)];

#[test]
fn faults_come_before_any_change() {
    // Not aligned.
    let mut mock = Mock::new(0x10_0000, vec![0; 4096]);
    mock.regs.rdi = 0x10_0020;
    mock.regs.rax = TESTED;
    assert_eq!(mock.exception(&XRSTOR64).vector, 13);
    assert_eq!(mock.exception(SAVES[0].1).vector, 13);
    // XSAVE is not enabled; the FPU is switched off.
    mock.regs.rdi = 0x10_0000;
    mock.sregs.cr4 = 0;
    assert_eq!(mock.exception(SAVES[0].1).vector, 6);
    mock.sregs.cr4 = 1 << 18;
    mock.sregs.cr0 = 1 << 3;
    assert_eq!(mock.exception(SAVES[0].1).vector, 7);
    // The area ends too early: the state stays, and the fault has the address.
    let mut mock = Mock::new(0x10_0000, vec![0; 700]);
    mock.memory[LEGACY] = TESTED as u8 & tested() as u8;
    mock.regs.rdi = 0x10_0000;
    mock.regs.rax = tested();
    let before = mock.xstate.clone();
    let e = mock.exception(&XRSTOR64);
    assert_eq!(e.vector, 14);
    assert!(e.cr2.is_some_and(|a| (0x10_0240..0x10_1000).contains(&a)), "{e:x?}");
    assert_eq!(mock.xstate, before);
    assert_eq!(mock.stores, 0);
    // Reserved bits of MXCSR.
    let mut mock = Mock::new(0x10_0000, vec![0; 4096]);
    mock.regs.rdi = 0x10_0000;
    mock.regs.rax = TESTED;
    mock.memory[27] = 0x80;
    assert_eq!(mock.exception(&XRSTOR64).vector, 13);
}
