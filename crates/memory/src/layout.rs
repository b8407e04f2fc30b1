//! Where RAM lies in a guest's physical address space.
//!
//! RAM begins at 0 and goes up to the MMIO hole; what does not fit below goes on at 4 GiB. The hole
//! has the virtio-mmio slots, the IOAPIC, the local APICs and KVM's TSS (docs/ARCHITECTURE.md).

/// First guest-physical address of the hole.
pub const MMIO_HOLE_START: u64 = 3 << 30;
/// First guest-physical address above the hole.
pub const MMIO_HOLE_END: u64 = 4 << 30;

/// The regions of `size` bytes of RAM, as (guest-physical address, length), ascending. None for a
/// size of 0; lengths add up to `size`.
pub fn layout(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(MMIO_HOLE_START);
    let high = size - low;
    [(0, low), (MMIO_HOLE_END, high)].into_iter().filter(|&(_, len)| len > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    proptest! {
        #[test]
        fn ram_is_all_there_and_nothing_in_the_hole(mib in 64u64..=65_536) {
            let regions = layout(mib * MIB);
            prop_assert_eq!(regions.iter().map(|r| r.1).sum::<u64>(), mib * MIB);
            prop_assert_eq!(regions[0].0, 0);
            for &(gpa, len) in &regions {
                prop_assert!(gpa + len <= MMIO_HOLE_START || gpa >= MMIO_HOLE_END);
                prop_assert_eq!(gpa % (2 * MIB), 0, "huge pages line up");
            }
            prop_assert!(regions.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        }
    }

    #[test]
    fn edges_of_the_hole() {
        assert_eq!(layout(0), []);
        assert_eq!(layout(MMIO_HOLE_START), [(0, MMIO_HOLE_START)]);
        assert_eq!(layout(MMIO_HOLE_START + MIB), [(0, MMIO_HOLE_START), (MMIO_HOLE_END, MIB)]);
    }
}
