//! The "newc" cpio format, as far as an initramfs needs it.
//!
//! An archive is a row of entries, each a 110-byte header of ASCII hex numbers, the name with a NUL, and the
//! data; name and data are padded to 4 bytes. An entry named `TRAILER!!!` ends it. The kernel's reading of
//! it is Documentation/driver-api/early-userspace/buffer-format.rst. Owners and times are always 0, so
//! equal input gives equal bytes.

use std::io::{self, Write};

const MAGIC: &[u8; 6] = b"070701";
const HEADER_LEN: usize = 110;
const TRAILER: &str = "TRAILER!!!";
/// The kernel refuses names from PATH_MAX on.
const MAX_NAME: usize = 4095;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// Writes an archive. [`Writer::finish`] completes it.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    inode: u32,
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    links: u32,
    device: (u32, u32),
    data: &'a [u8],
}

impl<W: Write> Writer<W> {
    /// A writer of an empty archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// Adds a directory. `mode` is the permission bits.
    ///
    /// # Errors
    /// A bad name, or what the output said; so for the others below.
    pub fn directory(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.entry(&Entry { name, mode: S_IFDIR | mode, links: 2, device: (0, 0), data: &[] })
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// A bad name, data of 4 GiB or more, or what the output said.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(&Entry { name, mode: S_IFREG | mode, links: 1, device: (0, 0), data })
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// A bad name, or what the output said.
    pub fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        let data = target.as_bytes();
        self.entry(&Entry { name, mode: S_IFLNK | 0o777, links: 1, device: (0, 0), data })
    }

    /// Adds a character device node.
    ///
    /// # Errors
    /// A bad name, or what the output said.
    pub fn char_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        let device = (major, minor);
        self.entry(&Entry { name, mode: S_IFCHR | mode, links: 1, device, data: &[] })
    }

    /// Ends the archive and gives the output back.
    ///
    /// # Errors
    /// What the output said.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.write(&Entry { name: TRAILER, mode: 0, links: 1, device: (0, 0), data: &[] }, 0)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        let name = entry.name;
        let bad =
            name.is_empty() || name.starts_with('/') || name.contains('\0') || name == TRAILER;
        if bad || name.len() > MAX_NAME {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name:?} can't be the name of a cpio entry"),
            ));
        }
        self.inode += 1;
        self.write(entry, self.inode)
    }

    fn write(&mut self, entry: &Entry<'_>, inode: u32) -> io::Result<()> {
        let size = u32::try_from(entry.data.len()).map_err(|_| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is too large for cpio", entry.name),
            )
        })?;
        let name_size = entry.name.len() as u32 + 1;
        let (major, minor) = entry.device;
        self.out.write_all(MAGIC)?;
        for field in
            [inode, entry.mode, 0, 0, entry.links, 0, size, 0, 0, major, minor, name_size, 0]
        {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(entry.name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(HEADER_LEN + entry.name.len() + 1)?;
        self.out.write_all(entry.data)?;
        self.pad(entry.data.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..written.wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, PartialEq)]
    struct Parsed {
        name: String,
        mode: u32,
        device: (u32, u32),
        data: Vec<u8>,
    }

    /// Reads an archive by the format's rules, independently of the writer.
    fn parse(mut bytes: &[u8]) -> Vec<Parsed> {
        let total = bytes.len();
        let mut entries = Vec::new();
        loop {
            assert_eq!((total - bytes.len()) % 4, 0, "an entry must start on 4 bytes");
            assert_eq!(&bytes[..6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let device = (field(9), field(10));
            assert_eq!(bytes[110 + name_size - 1], 0);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let start = (110 + name_size).next_multiple_of(4);
            let data = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push(Parsed { name, mode, device, data });
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            files in proptest::collection::vec(
                ("[a-z][a-z0-9/._-]{0,40}", 0u32..0o10000, proptest::collection::vec(any::<u8>(), 0..300)),
                0..8,
            )
        ) {
            let mut writer = Writer::new(Vec::new());
            for (name, mode, data) in &files {
                writer.file(name, *mode, data).unwrap();
            }
            let read = parse(&writer.finish().unwrap());
            prop_assert_eq!(read.len(), files.len());
            for (entry, (name, mode, data)) in read.iter().zip(&files) {
                prop_assert_eq!(&entry.name, name);
                prop_assert_eq!(entry.mode, 0o100_000 | mode);
                prop_assert_eq!(&entry.data, data);
            }
        }
    }

    #[test]
    fn each_kind_of_entry() {
        let mut writer = Writer::new(Vec::new());
        writer.directory("dev", 0o755).unwrap();
        writer.char_device("dev/console", 0o600, 5, 1).unwrap();
        writer.symlink("sbin", "usr/sbin").unwrap();
        let entries = parse(&writer.finish().unwrap());
        assert_eq!(entries[0].mode, 0o040_755);
        assert_eq!((entries[1].mode, entries[1].device), (0o020_600, (5, 1)));
        assert_eq!((entries[2].mode, entries[2].data.as_slice()), (0o120_777, &b"usr/sbin"[..]));
    }

    #[test]
    fn names_that_would_break_the_archive_are_refused() {
        let mut writer = Writer::new(Vec::new());
        for name in ["", "/init", "a\0b", "TRAILER!!!", &"n".repeat(4096)] {
            assert!(writer.file(name, 0o644, b"").is_err(), "{name:?}");
        }
        assert!(parse(&writer.finish().unwrap()).is_empty());
    }

    #[test]
    fn cpio_itself_reads_it() {
        use std::process::{Command, Stdio};
        let mut writer = Writer::new(Vec::new());
        writer.directory("dev", 0o755).unwrap();
        writer.file("init", 0o755, &[7; 1001]).unwrap();
        let bytes = writer.finish().unwrap();
        let child =
            Command::new("cpio").arg("-t").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        // The tool is an independent witness where it is installed; `parse` is always there.
        let Ok(mut child) = child else { return };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "dev\ninit\n");
    }
}
