//! A vCPU's extended state as KVM_GET_XSAVE2 gives it: an XSAVE area in standard format.
//!
//! Where a component lies is the CPU's choice, told by CPUID leaf 0xd; under PVM the guest's CPUID is the host's
//! own, so one [`Layout`], read once per process, serves for both KVM's areas and the guest's.
//!
//! KVM takes MXCSR from an area only together with a component that has it (x87, SSE or AVX), and on hosts with
//! XSAVES loads the default whenever SSE is in its initial state. [`Xstate::prepare_for_kvm`] therefore marks SSE
//! as in use where needed: to the guest that is the same state.

use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Component 0: x87.
pub(super) const X87: u64 = 1 << 0;
/// Component 1: XMM registers.
pub(super) const SSE: u64 = 1 << 1;
/// Component 2: upper halves of YMM registers.
pub(super) const AVX: u64 = 1 << 2;

/// Length of the legacy region, in bytes: the FXSAVE area.
pub(super) const LEGACY: usize = 512;
/// Length of the header behind it.
pub(super) const HEADER: usize = 64;
/// Where components other than x87 and SSE begin, at the earliest.
pub(super) const EXTENDED: usize = LEGACY + HEADER;
/// MXCSR after reset.
pub(super) const MXCSR_DEFAULT: u32 = 0x1f80;
/// x87 control word in the initial state.
const FCW_INITIAL: u16 = 0x37f;
/// Most that is believed of CPUID: AMX needs 11 KiB.
const AREA_MAX: usize = 64 << 10;
/// Least size of KVM's area (`struct kvm_xsave`).
const KVM_AREA_MIN: usize = 4096;

/// Offsets within the legacy region (Intel SDM volume 1, table 10-2).
pub(super) mod legacy {
    use std::ops::Range;

    pub(in super::super) const FCW: usize = 0;
    pub(in super::super) const FSW: usize = 2;
    pub(in super::super) const FTW: usize = 4;
    pub(in super::super) const CONTROL: Range<usize> = 0..24;
    pub(in super::super) const MXCSR: usize = 24;
    pub(in super::super) const MXCSR_AND_MASK: Range<usize> = 24..32;
    pub(in super::super) const ST: Range<usize> = 32..160;
    pub(in super::super) const XMM: Range<usize> = 160..416;
    /// Behind the last byte that the CPU writes.
    pub(in super::super) const END: usize = 416;
}

/// One component of index 2 or above.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Component {
    /// Offset in the standard format.
    pub offset: usize,
    /// Length in bytes; 0 if the CPU lacks it or it is a supervisor component.
    pub len: usize,
    /// In the compacted format it begins at a multiple of 64.
    pub aligned: bool,
}

/// Where components lie.
#[derive(Debug)]
pub(super) struct Layout {
    components: [Component; 64],
    area: usize,
    mxcsr_mask: u32,
    compaction: bool,
}

impl Layout {
    /// This CPU's layout.
    pub(super) fn host() -> &'static Self {
        static HOST: OnceLock<Layout> = OnceLock::new();
        HOST.get_or_init(Self::read)
    }

    fn read() -> Self {
        let main = __cpuid_count(0xd, 0);
        let supported = u64::from(main.eax) | (u64::from(main.edx) << 32);
        let compaction = __cpuid_count(0xd, 1).eax & (1 << 1) != 0;
        let mut components = [Component::default(); 64];
        let mut area = KVM_AREA_MIN;
        for (index, component) in (0u32..).zip(components.iter_mut()).skip(2).take(61) {
            let leaf = __cpuid_count(0xd, index);
            let (len, offset) = (leaf.eax as usize, leaf.ebx as usize);
            if supported & (1 << index) == 0 || leaf.ecx & 1 != 0 || offset + len > AREA_MAX {
                continue;
            }
            *component = Component { offset, len, aligned: leaf.ecx & 2 != 0 };
            area = area.max(offset + len);
        }
        Self { components, area: area.next_multiple_of(64), mxcsr_mask: mxcsr_mask(), compaction }
    }

    /// Component `index`, 2 to 62.
    pub(super) fn component(&self, index: u32) -> Component {
        self.components.get(index as usize).copied().unwrap_or_default()
    }

    /// Length of an area that holds every component, in bytes; at least KVM's 4,096.
    pub(super) fn area(&self) -> usize {
        self.area
    }

    /// Whether the CPU knows the compacted format.
    pub(super) fn has_compaction(&self) -> bool {
        self.compaction
    }

    /// Indices, from 2 up, of the components in `set` with their place in the compacted format of `present`.
    pub(super) fn compacted(&self, present: u64, set: u64) -> impl Iterator<Item = (u32, usize)> {
        let mut next = EXTENDED;
        (2..63u32).filter(move |i| present & (1 << i) != 0).filter_map(move |index| {
            let component = self.component(index);
            if component.aligned {
                next = next.next_multiple_of(64);
            }
            let at = next;
            next += component.len;
            (set & (1 << index) != 0).then_some((index, at))
        })
    }
}

/// Writable bits of MXCSR, as FXSAVE tells them; 0 means the mask of the first SSE CPUs.
fn mxcsr_mask() -> u32 {
    #[repr(C, align(16))]
    struct Area([u8; LEGACY]);
    let mut area = Area([0; LEGACY]);
    // SAFETY: the area has the instruction's length and alignment, and every x86-64 CPU has FXSAVE.
    unsafe { std::arch::x86_64::_fxsave64(area.0.as_mut_ptr()) };
    let a = &area.0;
    match u32::from_le_bytes([a[28], a[29], a[30], a[31]]) {
        0 => 0xffbf,
        mask => mask,
    }
}

/// An area in standard format, of [`Layout::area`] bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Xstate {
    bytes: Vec<u8>,
}

impl Xstate {
    /// The initial state.
    pub(super) fn initial() -> Self {
        let mut state = Self { bytes: vec![0; Layout::host().area()] };
        state.set_u16_at(legacy::FCW, FCW_INITIAL);
        state.store_u32(legacy::MXCSR, MXCSR_DEFAULT);
        state
    }

    /// The whole area.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// As [`Self::bytes`].
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// XSTATE_BV: components that are not in their initial state.
    pub(super) fn in_use(&self) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.bytes[LEGACY..LEGACY + 8]);
        u64::from_le_bytes(word)
    }

    fn store_in_use(&mut self, components: u64) {
        self.bytes[LEGACY..LEGACY + 8].copy_from_slice(&components.to_le_bytes());
    }

    /// Marks components as not in their initial state.
    pub(super) fn set_in_use(&mut self, components: u64) {
        self.store_in_use(self.in_use() | components);
    }

    /// 16 bits of the legacy region, at `offset` below 510.
    pub(super) fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// As [`Self::u16_at`].
    pub(super) fn set_u16_at(&mut self, offset: usize, value: u16) {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn store_u32(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// MXCSR.
    pub(super) fn mxcsr(&self) -> u32 {
        let b = &self.bytes[legacy::MXCSR..];
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }

    /// Bits of MXCSR that may be set.
    pub(super) fn mxcsr_mask(&self) -> u32 {
        Layout::host().mxcsr_mask
    }

    /// Sets MXCSR.
    pub(super) fn set_mxcsr(&mut self, value: u32) {
        self.store_u32(legacy::MXCSR, value);
    }

    /// Makes sure that KVM_SET_XSAVE takes MXCSR over.
    pub(super) fn prepare_for_kvm(&mut self) {
        let in_use = self.in_use();
        if in_use & SSE != 0 {
            return;
        }
        if self.mxcsr() != MXCSR_DEFAULT || in_use & (X87 | AVX) == 0 {
            self.bytes[legacy::XMM].fill(0);
            self.store_in_use(in_use | SSE);
        }
    }

    /// What FNINIT does: control registers reset, all registers empty, their contents kept.
    pub(super) fn reset_x87_control(&mut self) {
        self.bytes[legacy::CONTROL].fill(0);
        self.set_u16_at(legacy::FCW, FCW_INITIAL);
        self.set_in_use(X87);
    }

    /// Copies x87, MXCSR and XMM into a guest's legacy region.
    pub(super) fn read_legacy(&self, area: &mut [u8; LEGACY], wide: bool) {
        self.read_x87(area, wide);
        area[legacy::MXCSR_AND_MASK].copy_from_slice(&self.bytes[legacy::MXCSR_AND_MASK]);
        area[legacy::XMM].copy_from_slice(&self.bytes[legacy::XMM]);
        self.put_mask(area);
    }

    /// Puts the mask of MXCSR where FXSAVE puts it.
    pub(super) fn put_mask(&self, area: &mut [u8; LEGACY]) {
        area[28..32].copy_from_slice(&self.mxcsr_mask().to_le_bytes());
    }

    /// Copies x87 into a guest's legacy region. Without REX.W the pointers are 32 bits and a selector, which
    /// current CPUs give as zero.
    pub(super) fn read_x87(&self, area: &mut [u8; LEGACY], wide: bool) {
        area[legacy::CONTROL].copy_from_slice(&self.bytes[legacy::CONTROL]);
        area[legacy::ST].copy_from_slice(&self.bytes[legacy::ST]);
        if !wide {
            area[12..16].fill(0);
            area[20..24].fill(0);
        }
    }

    /// Takes x87 from a guest's legacy region.
    pub(super) fn write_x87(&mut self, area: &[u8; LEGACY], wide: bool) {
        self.bytes[legacy::CONTROL].copy_from_slice(&area[legacy::CONTROL]);
        self.bytes[legacy::ST].copy_from_slice(&area[legacy::ST]);
        // Byte 5 is reserved.
        self.bytes[5] = 0;
        if !wide {
            self.bytes[12..16].fill(0);
            self.bytes[20..24].fill(0);
        }
        self.set_in_use(X87);
    }

    /// Takes the XMM registers from a guest's legacy region.
    pub(super) fn write_xmm(&mut self, area: &[u8; LEGACY]) {
        self.bytes[legacy::XMM].copy_from_slice(&area[legacy::XMM]);
        self.set_in_use(SSE);
    }

    /// A component's bytes.
    pub(super) fn component(&self, index: u32) -> &[u8] {
        let c = Layout::host().component(index);
        self.bytes.get(c.offset..c.offset + c.len).unwrap_or_default()
    }

    /// A component's bytes, to be overwritten; marks it as in use.
    pub(super) fn component_mut(&mut self, index: u32) -> &mut [u8] {
        let c = Layout::host().component(index);
        self.set_in_use(1 << index);
        self.bytes.get_mut(c.offset..c.offset + c.len).unwrap_or_default()
    }

    /// Puts components into their initial state; of SSE, the XMM registers.
    pub(super) fn reset(&mut self, components: u64) {
        if components & X87 != 0 {
            self.bytes[legacy::CONTROL].fill(0);
            self.bytes[legacy::ST].fill(0);
            self.set_u16_at(legacy::FCW, FCW_INITIAL);
        }
        if components & SSE != 0 {
            self.bytes[legacy::XMM].fill(0);
        }
        for index in (2..63u32).filter(|i| components & (1 << i) != 0) {
            let c = Layout::host().component(index);
            if let Some(bytes) = self.bytes.get_mut(c.offset..c.offset + c.len) {
                bytes.fill(0);
            }
        }
        self.store_in_use(self.in_use() & !components);
    }
}
