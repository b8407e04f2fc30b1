//! ACPI tables: hardware-reduced, as small as a virtual machine can do with.
//!
//! | table | tells |
//! |---|---|
//! | RSDP, XSDT | where the others are |
//! | FADT | hardware-reduced ACPI, no VGA, no CMOS clock, reset by the i8042 |
//! | MADT | local APICs, the IOAPIC |
//! | DSDT | the serial console, virtio-mmio slots, the generation id and the event device that announces it |
//!
//! (ACPI Specification 6.5; Microsoft, "Virtual Machine Generation ID")

use acpi_tables::Aml;
use acpi_tables::aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::layout;

const OEM: [u8; 6] = *b"FORKD ";
const OEM_TABLE: [u8; 8] = *b"FORKDVM ";
const OEM_REVISION: u32 = 1;
/// Length of a table's header.
const SDT_HEADER: u32 = 36;
/// Revision 2: integers of 64 bits.
const DSDT_REVISION: u8 = 2;
/// FADT, IA-PC boot architecture flags: no VGA (bit 2), no CMOS clock (bit 5). (ACPI 6.5, table 5.10)
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;
/// Command port of the i8042, and the command that resets.
const RESET_PORT: u64 = 0x64;
const RESET_VALUE: u8 = 0xfe;
/// Notification "the generation id has changed".
const VMGENID_CHANGED: u8 = 0x80;

/// Why ACPI tables cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// There is no such slot.
    #[error("virtio-mmio slot {slot}: there are {} slots", layout::VIRTIO_MMIO_SLOTS)]
    Slot {
        /// The slot.
        slot: u8,
    },
    /// They are too long.
    #[error("ACPI tables of {len} bytes do not fit in {} bytes", layout::ACPI_MAX)]
    TooLong {
        /// Their length.
        len: usize,
    },
}

/// All tables, to lie at [`layout::ACPI_RSDP`].
pub fn build(vcpus: u8, virtio_slots: &[u8], vmgenid: bool) -> Result<Vec<u8>, AcpiError> {
    let mut tables = vec![0; Rsdp::len()];
    let mut place = |bytes: &[u8]| {
        tables.resize(tables.len().next_multiple_of(16), 0);
        let addr = layout::ACPI_RSDP + tables.len() as u64;
        tables.extend_from_slice(bytes);
        addr
    };
    let dsdt = place(&dsdt(virtio_slots, vmgenid)?);
    let fadt = place(&bytes(&fadt(dsdt)));
    let madt = place(&bytes(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    tables[..rsdp.len()].copy_from_slice(&rsdp);
    if tables.len() as u64 > layout::ACPI_MAX {
        return Err(AcpiError::TooLong { len: tables.len() });
    }
    Ok(tables)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let lapic = LocalInterruptController::Address(layout::LAPIC as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, lapic);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, layout::IOAPIC as u32, 0));
    madt
}

fn dsdt(virtio_slots: &[u8], vmgenid: bool) -> Result<Vec<u8>, AcpiError> {
    let mut body = serial();
    for &slot in virtio_slots {
        body.extend(virtio_mmio(slot)?);
    }
    if vmgenid {
        body.extend(generation_id());
    }
    let scope = aml::Scope::raw("_SB_".into(), body);
    let mut table = Sdt::new(*b"DSDT", SDT_HEADER, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&scope);
    Ok(table.as_slice().to_vec())
}

/// The 16550 at COM1.
fn serial() -> Vec<u8> {
    let last = layout::SERIAL_PORTS as u8;
    bytes(&aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, last),
                    &interrupt(layout::SERIAL_GSI),
                ]),
            ),
        ],
    ))
}

fn virtio_mmio(slot: u8) -> Result<Vec<u8>, AcpiError> {
    let (Some(addr), Some(gsi)) = (layout::virtio_mmio_addr(slot), layout::virtio_mmio_gsi(slot))
    else {
        return Err(AcpiError::Slot { slot });
    };
    let name = format!("VR{slot:02}");
    Ok(bytes(&aml::Device::new(
        name.as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &slot),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    // The MMIO hole ends at 4 GiB, so both fit in 32 bits.
                    &aml::Memory32Fixed::new(true, addr as u32, layout::VIRTIO_MMIO_STRIDE as u32),
                    &interrupt(gsi),
                ]),
            ),
        ],
    )))
}

/// The generation id, and the generic event device whose interrupt says that it has changed.
fn generation_id() -> Vec<u8> {
    let low = layout::VMGENID_PAGE as u32;
    let high = (layout::VMGENID_PAGE >> 32) as u32;
    let mut out = bytes(&aml::Device::new(
        "VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"VMGENCTR"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    ));
    out.extend(bytes(&aml::Device::new(
        "GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&interrupt(layout::GED_GSI)]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                // The device has one interrupt: no need to look at which it was.
                vec![&aml::Notify::new(&aml::Path::new("\\_SB_.VGEN"), &VMGENID_CHANGED)],
            ),
        ],
    )));
    out
}

/// An interrupt of the IOAPIC that this device uses alone: edge, active high.
fn interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}
