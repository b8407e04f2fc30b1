use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::layout::MIN_RAM;

const KERNEL_AT: u64 = 0x100_0000;

/// An ELF file with one segment of `body` at [`KERNEL_AT`], and a PVH note if `pvh` is given.
fn elf(body: &[u8], memsz: u64, pvh: Option<u32>) -> Vec<u8> {
    let note = pvh.map(|entry| {
        let mut n = Vec::new();
        for word in [4u32, 4, 18] {
            n.extend(word.to_le_bytes());
        }
        n.extend(b"Xen\0");
        n.extend(entry.to_le_bytes());
        n
    });
    let headers = 1 + u16::from(note.is_some());
    let body_at = 64 + 56 * u64::from(headers);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [KERNEL_AT, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, headers, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, at: u64, paddr: u64, filesz: u64, memsz: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(0u32.to_le_bytes());
        for word in [at, paddr, paddr, filesz, memsz, 0] {
            file.extend(word.to_le_bytes());
        }
    };
    segment(1, body_at, KERNEL_AT, body.len() as u64, memsz);
    if let Some(note) = &note {
        segment(4, body_at + body.len() as u64, 0, note.len() as u64, note.len() as u64);
    }
    file.extend(body);
    file.extend(note.unwrap_or_default());
    file
}

/// What our note on PVM has as description.
fn native_note(version: u32, control: u64) -> Vec<u8> {
    let mut bytes = version.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(control.to_le_bytes());
    bytes
}

/// [`elf`] with a PVH note, whose note segment has one more note.
fn elf_with_note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let mut file = elf(&[0x90; 4096], 8192, Some(KERNEL_AT as u32));
    let before = file.len();
    for word in [name.len(), description.len(), kind as usize] {
        file.extend((word as u32).to_le_bytes());
    }
    for part in [name, description] {
        file.extend(part);
        file.resize(file.len().next_multiple_of(4), 0);
    }
    // The second program header's length in file and memory.
    let added = (file.len() - before) as u64;
    for at in [64 + 56 + 32, 64 + 56 + 40] {
        let len = u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        file[at..at + 8].copy_from_slice(&(len + added).to_le_bytes());
    }
    file
}

/// A kernel that runs natively on PVM; its VIF page is its second page.
fn native() -> Vec<u8> {
    elf_with_note(b"forkd\0", 0x4d_5650, &native_note(1, KERNEL_AT + 0x107f))
}

#[test]
fn our_kernel_for_pvm_is_known_by_its_note_and_gets_user_pages() {
    let files = files(&native());
    let found = native_kernel(&files.kernel).unwrap().unwrap();
    assert_eq!(found.vif_page(), KERNEL_AT + 0x1000);
    // PVH cannot be: it enters without paging.
    for entry in [ElfEntry::Linux64, ElfEntry::Pvh] {
        let ram = ram(MIN_RAM);
        let args = LoadArgs { mode: GuestMode::PvmNative, entry, ..args(&files) };
        let entry = load(&ram, &args).unwrap();
        assert_eq!((entry.protocol, entry.control), (Protocol::Linux64, Some(found.control)));
        for table in 0..3 {
            let first = read(&ram, layout::BOOT_PML4 + table * 4096, 1)[0];
            assert_eq!(first & 7, 7, "level {table}");
        }
    }
    // Elsewhere pages are the kernel's alone.
    let stock = self::files(&elf(&[0x90; 4096], 4096, None));
    assert_eq!(native_kernel(&stock.kernel).unwrap(), None);
    let ram = ram(MIN_RAM);
    load(&ram, &self::args(&stock)).unwrap();
    for table in 0..3 {
        assert_eq!(read(&ram, layout::BOOT_PML4 + table * 4096, 1)[0] & 7, 3);
    }
    for (files, mode) in [(&files, GuestMode::PvmEmulated), (&stock, GuestMode::PvmNative)] {
        let text = message(load(&ram, &LoadArgs { mode, ..self::args(files) }));
        assert!(text.contains("has changed"), "{text}");
    }
}

#[test]
fn a_note_on_pvm_that_is_of_no_use_is_named() {
    let says = |file: &[u8], word: &str| {
        let files = files(file);
        let text = native_kernel(&files.kernel).unwrap_err().to_string();
        assert!(text.starts_with("kernel /") && text.contains(word), "{text}");
        assert_eq!(message(load(&ram(MIN_RAM), &args(&files))), text);
    };
    let note = |description: &[u8]| elf_with_note(b"forkd\0", 0x4d_5650, description);
    says(&note(&native_note(2, KERNEL_AT | 0x7f)), "version 2");
    says(&note(&native_note(1, KERNEL_AT | 0xff)), "features 0xff");
    says(&note(&native_note(1, KERNEL_AT | 0x7f)[..12]), "12 bytes");
    // In no segment, beyond the end of one, and at the end of the address space.
    for page in [0, KERNEL_AT - 0x1000, KERNEL_AT + 0x2000, !0xfff] {
        says(&note(&native_note(1, page | 0x7f)), "where nothing of the kernel is");
    }
    // Others' notes are none of our business.
    let description = native_note(2, 0);
    for file in [
        elf_with_note(b"forkd", 0x4d_5650, &description),
        elf_with_note(b"Forkd\0", 0x4d_5650, &description),
        elf_with_note(b"forkd\0", 0x4d_5651, &description),
        elf_with_note(b"", 0x4d_5650, &description),
    ] {
        assert_eq!(native_kernel(&files(&file).kernel).unwrap(), None);
    }
    // One that is longer than its segment ends the list.
    let mut cut = native();
    let at = cut.len() - 16 - 8 - 12;
    cut[at + 4..at + 8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(native_kernel(&files(&cut).kernel).unwrap(), None);
    assert_eq!(native_kernel(&files(b"#!/bin/sh").kernel).unwrap(), None);
    assert!(native_kernel(&PathBuf::from("/nonexistent")).is_err());
}

/// A bzImage that wants `init_size` bytes at [`KERNEL_AT`].
fn bzimage(body: &[u8], init_size: u32) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1f1] = 1;
    file[0x201] = 0x66;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x211] = 1;
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x236] = 1;
    file[0x238..0x23c].copy_from_slice(&100u32.to_le_bytes());
    file[0x258..0x260].copy_from_slice(&KERNEL_AT.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    file.extend(body);
    file
}

struct Files {
    dir: tempfile::TempDir,
    kernel: PathBuf,
}

fn files(kernel: &[u8]) -> Files {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    fs::write(&path, kernel).unwrap();
    Files { dir, kernel: path }
}

fn args<'a>(files: &'a Files) -> LoadArgs<'a> {
    LoadArgs {
        kernel: &files.kernel,
        initrd: None,
        cmdline: "console=ttyS0",
        vcpus: 2,
        virtio_slots: &[0, 1],
        vmgenid: true,
        entry: ElfEntry::Linux64,
        mode: GuestMode::Hardware,
    }
}

fn ram(len: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len as usize)]).unwrap()
}

fn read(ram: &GuestMemoryMmap, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes
}

#[test]
fn an_elf_kernel_lands_where_it_wants_and_finds_its_parameters() {
    let files = files(&elf(&[0x90; 5000], 8000, None));
    let ram = ram(MIN_RAM);
    let initrd = files.dir.path().join("initrd");
    fs::write(&initrd, vec![7u8; 10_000]).unwrap();
    let args = LoadArgs { initrd: Some(&initrd), ..args(&files) };
    let entry = load(&ram, &args).unwrap();
    assert_eq!(entry, BootEntry { protocol: Protocol::Linux64, rip: KERNEL_AT, control: None });
    assert_eq!(read(&ram, KERNEL_AT, 5000), [0x90; 5000]);
    assert_eq!(read(&ram, layout::CMDLINE, 14), b"console=ttyS0\0");
    let zero_page = read(&ram, layout::BOOT_PARAMS, 4096);
    let at32 = |at: usize| u32::from_le_bytes(zero_page[at..at + 4].try_into().unwrap());
    assert_eq!(at32(0x228), layout::CMDLINE as u32);
    assert_eq!(at32(0x21c), 10_000);
    assert_eq!(read(&ram, at32(0x218).into(), 10_000), vec![7; 10_000]);
    assert_eq!(at32(0x218) & 0xfff, 0);
    assert_eq!(zero_page[0x1e8], 3);
    assert_eq!(at32(0x070), layout::ACPI_RSDP as u32);
    assert_eq!(read(&ram, layout::ACPI_RSDP, 8), b"RSD PTR ");
    assert_eq!(read(&ram, layout::MP_TABLE, 4), b"_MP_");
}

#[test]
fn the_pvh_entry_is_taken_only_if_asked_for_and_there() {
    let ram = ram(MIN_RAM);
    let with = files(&elf(&[0x90; 4096], 4096, Some(KERNEL_AT as u32 + 16)));
    let pvh = LoadArgs { entry: ElfEntry::Pvh, ..args(&with) };
    let entry = load(&ram, &pvh).unwrap();
    assert_eq!(entry, BootEntry { protocol: Protocol::Pvh, rip: KERNEL_AT + 16, control: None });
    let info = read(&ram, layout::PVH_START_INFO, 4);
    assert_eq!(info, 0x336e_c578u32.to_le_bytes());
    assert_eq!(load(&ram, &args(&with)).unwrap().protocol, Protocol::Linux64);
    let without = files(&elf(&[0x90; 4096], 4096, None));
    let pvh = LoadArgs { entry: ElfEntry::Pvh, ..args(&without) };
    assert_eq!(load(&ram, &pvh).unwrap().protocol, Protocol::Linux64);
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry_with_its_own_header() {
    let files = files(&bzimage(&[0x90; 4096], 1 << 20));
    let ram = ram(MIN_RAM);
    let entry = load(&ram, &args(&files)).unwrap();
    assert_eq!(
        entry,
        BootEntry { protocol: Protocol::Linux64, rip: KERNEL_AT + 0x200, control: None }
    );
    assert_eq!(read(&ram, KERNEL_AT, 4096), [0x90; 4096]);
    let header = read(&ram, layout::BOOT_PARAMS + 0x258, 8);
    assert_eq!(header, KERNEL_AT.to_le_bytes());
}

fn message(result: Result<BootEntry, BootError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn what_cannot_be_booted_is_named_with_its_reason() {
    let good = files(&elf(&[0x90; 4096], 4096, None));
    let ram = ram(MIN_RAM);
    let missing = PathBuf::from("/nonexistent/vmlinux");
    let text = message(load(&ram, &LoadArgs { kernel: &missing, ..args(&good) }));
    assert!(text.contains("kernel /nonexistent/vmlinux: No such file"), "{text}");
    let text = message(load(&ram, &LoadArgs { kernel: good.dir.path(), ..args(&good) }));
    assert!(text.contains("not a regular file"), "{text}");
    let text = message(load(&ram, &args(&files(b"#!/bin/sh\n"))));
    assert!(text.contains("neither ELF nor bzImage") && text.contains("vmlinux"), "{text}");
    let text = message(load(&ram, &args(&files(&elf(&[0; 4096], MIN_RAM, None)))));
    assert!(text.contains("give it more memory"), "{text}");
    let text = message(load(&ram, &args(&files(&bzimage(&[0; 4096], 1 << 30)))));
    assert!(text.contains("give it more memory"), "{text}");
    let mut arm = elf(&[0; 4096], 4096, None);
    arm[18] = 183;
    let text = message(load(&ram, &args(&files(&arm))));
    assert!(text.contains("not for x86-64"), "{text}");
    let mut cut = elf(&[0; 4096], 4096, None);
    cut.truncate(2000);
    let text = message(load(&ram, &args(&files(&cut))));
    assert!(text.contains("cut short"), "{text}");
}

#[test]
fn limits_on_initramfs_command_line_vcpus_and_ram_are_told() {
    let good = files(&elf(&[0x90; 4096], 4096, None));
    let ram64 = ram(MIN_RAM);
    let initrd = good.dir.path().join("initrd");
    fs::File::create(&initrd).unwrap().set_len(MIN_RAM - KERNEL_AT).unwrap();
    let text = message(load(&ram64, &LoadArgs { initrd: Some(&initrd), ..args(&good) }));
    assert!(text.starts_with("initramfs ") && text.contains("do not fit"), "{text}");
    let long = "x".repeat(layout::CMDLINE_MAX);
    let text = message(load(&ram64, &LoadArgs { cmdline: &long, ..args(&good) }));
    assert!(text.contains("2048 bytes, at most 2047"), "{text}");
    let fits = &long[1..];
    assert!(load(&ram64, &LoadArgs { cmdline: fits, ..args(&good) }).is_ok());
    let text = message(load(&ram64, &LoadArgs { cmdline: "a\nb", ..args(&good) }));
    assert!(text.contains("byte 0x0a at position 1"), "{text}");
    let image = files(&bzimage(&[0; 4096], 1 << 20));
    let text = message(load(&ram64, &LoadArgs { cmdline: &"y".repeat(101), ..args(&image) }));
    assert!(text.contains("at most 100"), "{text}");
    for vcpus in [0, 17] {
        let text = message(load(&ram64, &LoadArgs { vcpus, ..args(&good) }));
        assert!(text.contains("must be 1 to 16"), "{text}");
    }
    let text = message(load(&ram(MIN_RAM / 2), &args(&good)));
    assert!(text.contains("are needed"), "{text}");
    let text = message(load(&ram64, &LoadArgs { virtio_slots: &[14], ..args(&good) }));
    assert!(text.contains("virtio-mmio slot 14"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Hostile kernels give an error or load; they never panic or write outside RAM.
    #[test]
    fn a_damaged_kernel_does_no_harm(
        kind in 0..3,
        damage in prop::collection::vec((0usize..1100, any::<u8>()), 1..12),
        cut in prop::option::of(0usize..6000),
    ) {
        let mut file = match kind {
            0 => bzimage(&[0x90; 4096], 1 << 20),
            1 => elf(&[0x90; 4096], 8192, Some(KERNEL_AT as u32)),
            _ => native(),
        };
        for (at, byte) in damage {
            // The headers, or the notes at the end.
            let len = file.len();
            let at = if at < 500 { at } else { len - at % 64 - 1 };
            file[at % len] = byte;
        }
        file.truncate(cut.unwrap_or(file.len()));
        let files = files(&file);
        let entry = if kind == 1 { ElfEntry::Pvh } else { ElfEntry::Linux64 };
        let mode = if kind == 2 { GuestMode::PvmNative } else { GuestMode::Hardware };
        if let Ok(Some(native)) = native_kernel(&files.kernel) {
            prop_assert!(native.vif_page() >= 0x1000);
        }
        let _ = load(&ram(MIN_RAM), &LoadArgs { entry, mode, ..args(&files) });
    }

    #[test]
    fn every_table_of_acpi_has_a_valid_checksum(vcpus in 1u8..=16, slots in 0u8..=14, vmgenid: bool) {
        let slots: Vec<u8> = (0..slots).collect();
        let tables = acpi::build(vcpus, &slots, vmgenid).unwrap();
        let sum = |b: &[u8]| b.iter().fold(0u8, |s, b| s.wrapping_add(*b));
        let at = |addr: u64| &tables[(addr - layout::ACPI_RSDP) as usize..];
        let u32_at = |b: &[u8], i: usize| u32::from_le_bytes(b[i..i + 4].try_into().unwrap());
        let u64_at = |b: &[u8], i: usize| u64::from_le_bytes(b[i..i + 8].try_into().unwrap());
        let table = |addr: u64| { let t = at(addr); &t[..u32_at(t, 4) as usize] };
        prop_assert_eq!(sum(&tables[..20]), 0);
        prop_assert_eq!(sum(&tables[..36]), 0);
        let xsdt = table(u64_at(&tables, 24));
        prop_assert_eq!(sum(xsdt), 0);
        let mut seen = vec![];
        for entry in xsdt[36..].chunks_exact(8) {
            let t = table(u64_at(entry, 0));
            prop_assert_eq!(sum(t), 0);
            seen.push(t[..4].to_vec());
            if &t[..4] == b"FACP" {
                let dsdt = table(u64_at(t, 140));
                prop_assert_eq!(&dsdt[..4], b"DSDT");
                prop_assert_eq!(sum(dsdt), 0);
            }
        }
        prop_assert_eq!(seen, vec![b"FACP".to_vec(), b"APIC".to_vec()]);
    }
}
