//! Exceptions that an emulated instruction can raise.

/// Vectors (Intel SDM volume 3, table 6-1).
pub(super) mod vector {
    pub(in super::super) const BP: u8 = 3;
    pub(in super::super) const UD: u8 = 6;
    pub(in super::super) const NM: u8 = 7;
    pub(in super::super) const GP: u8 = 13;
    pub(in super::super) const PF: u8 = 14;
}

/// Page-fault error code bits (Intel SDM volume 3, figure 4-12).
pub(super) mod pf {
    /// The page was present, the access not allowed.
    pub(in super::super) const PROTECTION: u32 = 1 << 0;
    /// It was a write.
    pub(in super::super) const WRITE: u32 = 1 << 1;
    /// In user mode.
    pub(in super::super) const USER: u32 = 1 << 2;
    /// A reserved bit was set in a paging structure.
    pub(in super::super) const RESERVED: u32 = 1 << 3;
    /// It was an instruction fetch.
    pub(in super::super) const FETCH: u32 = 1 << 4;
}

/// An exception to be injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exception {
    pub vector: u8,
    pub error_code: Option<u32>,
    /// Faulting address, for #PF.
    pub cr2: Option<u64>,
    /// A trap is reported after its instruction, a fault before it.
    pub trap: bool,
}

impl Exception {
    const fn fault(vector: u8, error_code: Option<u32>) -> Self {
        Self { vector, error_code, cr2: None, trap: false }
    }

    /// #UD: not an instruction in this state of the CPU.
    pub(super) const UD: Self = Self::fault(vector::UD, None);
    /// #NM: the FPU is switched off by CR0.
    pub(super) const NM: Self = Self::fault(vector::NM, None);
    /// #GP(0).
    pub(super) const GP: Self = Self::fault(vector::GP, Some(0));
    /// #BP, of `int3`.
    pub(super) const BP: Self =
        Self { vector: vector::BP, error_code: None, cr2: None, trap: true };

    /// #PF at `address`.
    pub(super) const fn page_fault(address: u64, error_code: u32) -> Self {
        Self { vector: vector::PF, error_code: Some(error_code), cr2: Some(address), trap: false }
    }
}
