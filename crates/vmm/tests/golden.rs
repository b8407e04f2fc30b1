//! State files of each version, of real guests, as they were written then, load for ever; and what is written of them
//! today is the same, byte for byte, as long as the version is. If that fails a saved type has changed its shape: give
//! its section a new version (docs/snapshots.md, Versions), and keep the old type and files.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use forkd_state::{Reader, StateError, Tag};
use forkd_vm::GuestMode;
use forkd_vm::pvm::native::MSR_CONTROL;
use forkd_vmm::snapshot::SavedVm;

/// The one of a guest whose kernel mode ran natively on PVM. The others' ran emulated.
const NATIVE: &str = "v1/1-vcpu-native";

/// Name, content and number of vCPUs of each golden file of version 1 of all sections.
const V1: [(&str, &[u8], u8); 3] = [
    ("v1/1-vcpu", include_bytes!("golden/v1/1-vcpu.state"), 1),
    ("v1/2-vcpus", include_bytes!("golden/v1/2-vcpus.state"), 2),
    (NATIVE, include_bytes!("golden/v1/1-vcpu-native.state"), 1),
];

/// Where each section lies: its header's place, its tag, the range of its payload (forkd-state's format).
fn sections(bytes: &[u8]) -> Vec<(usize, Tag, std::ops::Range<usize>)> {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut at = 12;
    let mut found = Vec::new();
    while at < bytes.len() - 4 {
        let payload = at + 12..at + 12 + word(at + 8) as usize;
        found.push((at, Tag(word(at)), payload.clone()));
        at = payload.end;
    }
    found
}

/// Makes the checksum that of the content.
fn seal(bytes: &mut [u8]) {
    let end = bytes.len() - 4;
    let checksum = crc32fast::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(&checksum.to_le_bytes());
}

#[test]
fn they_load_and_are_written_the_same() {
    for (name, golden, vcpus) in V1 {
        let saved = SavedVm::decode(golden).expect(name);
        assert_eq!((saved.machine.vcpus, saved.kvm.vcpus.len()), (vcpus, vcpus.into()), "{name}");
        let indices: Vec<u8> = saved.kvm.vcpus.iter().map(|vcpu| vcpu.index).collect();
        assert_eq!(indices, (0..vcpus).collect::<Vec<_>>(), "{name}");
        assert_eq!(saved.machine.drives.len(), 1, "{name}: its disk");
        let names: Vec<&str> = saved.devices.virtio.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["pmem0", "rng", "vsock", "drive0"], "{name}");
        assert!(saved.kvm.vm.clock_ns > 0, "{name}: the guest had run");
        let native = name == NATIVE;
        let mode = if native { GuestMode::PvmNative } else { GuestMode::PvmEmulated };
        assert_eq!(saved.kvm.mode, mode, "{name}");
        let control = |msrs: &[(u32, u64)]| msrs.iter().any(|(i, _)| *i == MSR_CONTROL);
        assert!(saved.kvm.vcpus.iter().all(|vcpu| control(&vcpu.msrs) == native), "{name}");
        let written = saved.encode().expect(name);
        for ((_, tag, then), (_, same, now)) in sections(golden).into_iter().zip(sections(&written))
        {
            assert_eq!(tag, same, "{name}: the order of sections");
            assert_eq!(golden[then], written[now], "{name}: section {tag}");
        }
        assert_eq!(golden, written, "{name}");
    }
}

#[test]
fn each_section_is_of_the_version_that_the_directory_tells() {
    for (name, golden, vcpus) in V1 {
        let reader = Reader::parse(golden).expect(name);
        let tags: Vec<Tag> = reader.tags().collect();
        let cpus = (0..vcpus).map(|index| Tag::indexed(b"CPU", index));
        let expected = [b"MACH", b"DEVS", b"KVM "].map(Tag::new).into_iter().chain(cpus);
        let mode = (name == NATIVE).then_some(Tag::new(b"MODE"));
        let expected = expected.chain(mode);
        assert_eq!(tags, expected.collect::<Vec<_>>(), "{name}");
        assert!(tags.iter().all(|tag| reader.version(*tag) == Some(1)), "{name}");
    }
}

#[test]
fn a_later_version_of_any_section_is_refused_by_name() {
    for (name, golden, _) in V1 {
        for (header, tag, _) in sections(golden) {
            let mut later = golden.to_vec();
            later[header + 4] = 2;
            seal(&mut later);
            let error = SavedVm::decode(&later).expect_err(name);
            let is = matches!(error, StateError::SectionTooNew { tag: t, found: 2, supported: 1 } if t == tag);
            assert!(is && error.to_string().contains(&tag.to_string()), "{name}: {error}");
        }
        let mut later = golden.to_vec();
        later[8] = 2;
        seal(&mut later);
        let error = SavedVm::decode(&later).expect_err(name);
        assert!(matches!(error, StateError::FormatVersion { found: 2, .. }), "{name}: {error}");
    }
}

#[test]
fn one_that_was_cut_off_is_an_error() {
    for (name, golden, _) in V1 {
        for len in (0..golden.len()).step_by(64).chain([golden.len() - 1]) {
            assert!(SavedVm::decode(&golden[..len]).is_err(), "{name}: {len} bytes of it load");
            // With a checksum that fits, it is still not whole.
            let mut cut = golden[..len].to_vec();
            if len > 16 {
                seal(&mut cut);
                assert!(SavedVm::decode(&cut).is_err(), "{name}: {len} bytes of it load");
            }
        }
    }
}

#[test]
fn a_flipped_bit_is_an_error() {
    let (name, golden, _) = V1[0];
    let mut flipped = golden.to_vec();
    for byte in 0..flipped.len() {
        // The checksum does not tell bits of a byte apart: one of each will do.
        let bit = 1 << (byte % 8);
        flipped[byte] ^= bit;
        assert!(SavedVm::decode(&flipped).is_err(), "{name}: {bit:#x} of byte {byte}");
        flipped[byte] ^= bit;
    }
    assert_eq!(flipped, golden);
}

/// Whoever flips bits and mends the checksum gets an error or another state, which can be written again.
#[test]
fn what_a_forger_makes_of_one_is_no_panic() {
    for (name, golden, _) in V1 {
        let (mut loaded, mut refused) = (0, 0);
        let mut forged = golden.to_vec();
        for byte in (8..golden.len() - 4).step_by(7) {
            let bit = 1 << (byte % 8);
            forged[byte] ^= bit;
            seal(&mut forged);
            match SavedVm::decode(&forged) {
                Ok(other) => {
                    loaded += 1;
                    other.encode().expect(name);
                }
                Err(_) => refused += 1,
            }
            forged[byte] ^= bit;
        }
        assert!(loaded > 0 && refused > 0, "{name}: {loaded} load, {refused} are refused");
    }
}
