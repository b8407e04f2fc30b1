//! The MP table (Intel, MultiProcessor Specification 1.4): CPUs and interrupt lines for kernels without ACPI.

use crate::layout;

const FLOATING_LEN: u64 = 16;
const HEADER_LEN: usize = 44;
const SPEC_REV: u8 = 4;
const APIC_VERSION: u8 = 0x14;

/// Entry types.
const CPU: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// CPU flags: usable, boot processor.
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Types of interrupt.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
/// Destination "all local APICs".
const ALL_APICS: u8 = 0xff;

/// Floating pointer structure and configuration table, to lie at [`layout::MP_TABLE`].
pub fn build(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
        let mut cpu = vec![CPU, id, APIC_VERSION, flags];
        // Family 6; features FPU and APIC. Linux asks CPUID instead.
        for word in [0x600u32, 0x201, 0, 0] {
            cpu.extend(word.to_le_bytes());
        }
        add(&cpu);
    }
    add(&[&[BUS, 0], &b"ISA   "[..]].concat());
    // The IOAPIC's id follows the CPUs'.
    let ioapic_id = vcpus;
    let ioapic_addr = (layout::IOAPIC as u32).to_le_bytes();
    add(&[&[IOAPIC, ioapic_id, APIC_VERSION, 1], &ioapic_addr[..]].concat());
    for pin in 0..layout::GSIS as u8 {
        // Polarity and trigger as the bus has them: edge, active high.
        add(&[INTERRUPT, INT, 0, 0, 0, pin, ioapic_id, pin]);
    }
    add(&[LOCAL_INTERRUPT, EXTINT, 0, 0, 0, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_APICS, 1]);

    let mut floating = b"_MP_".to_vec();
    floating.extend(((layout::MP_TABLE + FLOATING_LEN) as u32).to_le_bytes());
    floating.extend([1, SPEC_REV, 0, 0, 0, 0, 0, 0]);
    floating[10] = checksum(&floating);

    let mut table = b"PCMP".to_vec();
    table.extend(((HEADER_LEN + entries.len()) as u16).to_le_bytes());
    table.extend([SPEC_REV, 0]);
    table.extend(b"FORKD   000000000000");
    table.extend(0u32.to_le_bytes());
    table.extend(0u16.to_le_bytes());
    table.extend(count.to_le_bytes());
    table.extend((layout::LAPIC as u32).to_le_bytes());
    table.extend(0u32.to_le_bytes());
    table.extend(entries);
    table[7] = checksum(&table);

    floating.extend(table);
    floating
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_right_and_it_fits_for_any_number_of_vcpus() {
        for vcpus in 1..=layout::MAX_VCPUS {
            let table = build(vcpus);
            assert!(table.len() as u64 <= layout::MP_TABLE_MAX, "{vcpus}: {}", table.len());
            let sum = |b: &[u8]| b.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            assert_eq!(sum(&table[..16]), 0);
            assert_eq!(sum(&table[16..]), 0);
            let len = u16::from_le_bytes([table[20], table[21]]);
            assert_eq!(usize::from(len), table.len() - 16);
            let count = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
            assert_eq!(count, u16::from(vcpus) + 2 + layout::GSIS as u16 + 2);
        }
    }
}
