//! KVM's counters of one vCPU: exits by kind, page faults, what was emulated.
//!
//! KVM_GET_STATS_FD gives a descriptor to read them from while the vCPU runs. They describe themselves (Linux,
//! Documentation/virt/kvm/api.rst, 4.133): a header, descriptors with names, then values. So what there is depends on the
//! host's kernel, and nothing here knows a name.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

/// An ioctl that kvm-ioctls does not offer.
#[allow(missing_docs, reason = "the macro makes functions without documentation")]
mod ioctls {
    use super::{KVMIO, ioctl_io_nr};

    ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
}

/// Lengths of `struct kvm_stats_header` and `struct kvm_stats_desc`, the latter without its name.
const HEADER_LEN: usize = 24;
const DESCRIPTOR_LEN: usize = 16;
/// Most that is believed: Linux 6.18 has some 60 counters with names of at most 48 bytes.
const COUNTERS_MAX: usize = 1024;
const NAME_MAX: usize = 256;
const DATA_MAX: usize = 1 << 20;
/// Bits of a descriptor's flags that are the counter's type; 0 is one that only grows.
const TYPE_MASK: u32 = 0xf;
const TYPE_CUMULATIVE: u32 = 0;

/// Counters by name.
pub type Counters = Vec<(String, u64)>;

/// Opens the counters of the vCPU `fd`. None if the host's kernel has none. Waits while the vCPU is in KVM_RUN.
pub(crate) fn open(fd: RawFd) -> Option<File> {
    // SAFETY: the ioctl has no argument and makes a new descriptor; on a descriptor that is no vCPU's it fails.
    let stats = unsafe { ioctl(&fd, ioctls::KVM_GET_STATS_FD()) };
    // SAFETY: the descriptor was just made, and is nobody else's.
    (stats >= 0).then(|| unsafe { File::from_raw_fd(stats) })
}

/// Reads all counters that only grow and have one value: no states, peaks and histograms.
///
/// # Errors
///
/// The file cannot be read, or does not describe itself as it should.
pub fn read(stats: &File) -> io::Result<Counters> {
    let wrong = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut header = [0; HEADER_LEN];
    stats.read_exact_at(&mut header, 0)?;
    let word = |at: usize| u32_at(&header, at).unwrap_or_default() as usize;
    let (name_len, count) = (word(4), word(8));
    let (descriptors_at, data_at) = (word(16), word(20));
    if count > COUNTERS_MAX || name_len > NAME_MAX {
        return Err(wrong("more counters, or longer names, than are believed"));
    }
    let each = DESCRIPTOR_LEN + name_len;
    let mut descriptors = vec![0; count * each];
    stats.read_exact_at(&mut descriptors, descriptors_at as u64)?;
    let wanted: Vec<_> =
        descriptors.chunks_exact(each).filter_map(Descriptor::of_counter).collect();
    let len = wanted.iter().map(|d| d.offset.saturating_add(8)).max().unwrap_or(0);
    if len > DATA_MAX {
        return Err(wrong("a counter lies further off than is believed"));
    }
    let mut data = vec![0; len];
    stats.read_exact_at(&mut data, data_at as u64)?;
    let value = |d: &Descriptor<'_>| {
        let bytes = data.get(d.offset..)?.first_chunk()?;
        Some((d.name.to_owned(), u64::from_le_bytes(*bytes)))
    };
    Ok(wanted.iter().filter_map(value).collect())
}

struct Descriptor<'a> {
    name: &'a str,
    offset: usize,
}

impl<'a> Descriptor<'a> {
    /// None if this is no counter that only grows, or has no name.
    fn of_counter(bytes: &'a [u8]) -> Option<Self> {
        let flags = u32_at(bytes, 0)?;
        let size = u16::from_le_bytes(*bytes.get(6..)?.first_chunk()?);
        let name = bytes.get(DESCRIPTOR_LEN..)?.split(|b| *b == 0).next()?;
        let name = std::str::from_utf8(name).ok()?;
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        let is_counter = flags & TYPE_MASK == TYPE_CUMULATIVE && size == 1;
        let offset = u32_at(bytes, 8)? as usize;
        (is_counter && plain && !name.is_empty()).then_some(Self { name, offset })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// Flags, size, name and value of each.
    fn stats(counters: &[(u32, u16, &str, u64)]) -> Vec<u8> {
        const NAME: usize = 16;
        let data_at = HEADER_LEN + counters.len() * (DESCRIPTOR_LEN + NAME);
        let mut bytes = Vec::new();
        for word in [0, NAME, counters.len(), HEADER_LEN, HEADER_LEN, data_at] {
            bytes.extend((word as u32).to_le_bytes());
        }
        for (i, (flags, size, name, _)) in counters.iter().enumerate() {
            bytes.extend(flags.to_le_bytes());
            bytes.extend([0; 2]);
            bytes.extend(size.to_le_bytes());
            bytes.extend((i as u32 * 8).to_le_bytes());
            bytes.extend([0; 4]);
            let mut padded = name.as_bytes().to_vec();
            padded.resize(NAME, 0);
            bytes.extend(padded);
        }
        for (.., value) in counters {
            bytes.extend(value.to_le_bytes());
        }
        bytes
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn counters_are_read_by_name_and_nothing_else_is() {
        let bytes = stats(&[
            (0, 1, "exits", 7),
            (1, 1, "blocking", 1),
            (2, 1, "peak", 9),
            (4, 1, "histogram", 3),
            (0x10, 1, "io_exits", u64::MAX),
            (0, 2, "two", 5),
            (0, 1, "", 5),
            (0, 1, "odd name", 5),
        ]);
        let got = read(&file(&bytes)).unwrap();
        assert_eq!(got, [("exits".to_owned(), 7), ("io_exits".to_owned(), u64::MAX)]);
        assert_eq!(read(&file(&stats(&[]))).unwrap(), []);
    }

    proptest! {
        #[test]
        fn hostile_files_do_no_harm(
            damage in prop::collection::vec((any::<usize>(), any::<u8>()), 0..16),
            cut in prop::option::of(any::<usize>()),
        ) {
            let mut bytes = stats(&[(0, 1, "exits", 7), (0, 1, "io_exits", 8)]);
            for (at, byte) in damage {
                let len = bytes.len();
                bytes[at % len] = byte;
            }
            bytes.truncate(cut.map_or(bytes.len(), |c| c % bytes.len()));
            if let Ok(counters) = read(&file(&bytes)) {
                prop_assert!(counters.len() <= COUNTERS_MAX);
            }
        }
    }
}
