//! Whether memory is what it is said to be: a shared mapping of one file, from `/proc/self/maps`.
//!
//! A private mapping can be write-protected as well. Its pages are not in the file once they are
//! written, and the writer, who reads the file, would capture others.

use std::ops::Range;

use super::CaptureError;

/// A mapped range (proc_pid_maps(5)).
#[derive(Debug, PartialEq, Eq)]
struct Map {
    range: Range<u64>,
    shared: bool,
    offset: u64,
    inode: u64,
}

fn parse(line: &str) -> Option<Map> {
    // 7f1cb627c000-7f1cb6538000 rw-s 00000000 00:01 11466    /memfd:ram (deleted)
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let range = hex(start)?..hex(end)?;
    let shared = fields.next()?.ends_with('s');
    let offset = hex(fields.next()?)?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(Map { range, shared, offset, inode })
}

/// Checks that `range` is mapped without a gap, shared, from the file with this inode number, the
/// first byte from `offset` of the file.
///
/// # Errors
/// [`CaptureError::Config`] says what it is instead.
pub fn check(maps: &str, range: &Range<u64>, inode: u64, offset: u64) -> Result<(), CaptureError> {
    let mut next = range.start;
    let overlapping = maps
        .lines()
        .filter_map(parse)
        .filter(|map| map.range.start < range.end && map.range.end > range.start);
    for map in overlapping {
        let wrong = |what: &str| {
            let text = format!(
                "RAM at {next:#x} is {what}; start the sandbox with memory that is a shared memfd"
            );
            Err(CaptureError::Config(text))
        };
        if map.range.start > next {
            return wrong("not mapped");
        }
        if !map.shared {
            return wrong("private memory");
        }
        let expected = offset + (next - range.start);
        if map.inode != inode || map.offset + (next - map.range.start) != expected {
            return wrong("not the given place of the given memfd");
        }
        next = map.range.end;
    }
    if next >= range.end {
        return Ok(());
    }
    Err(CaptureError::Config(format!("RAM at {next:#x} is not mapped")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
1000-3000 rw-s 00000000 00:01 11466                      /memfd:ram (deleted)
3000-4000 rw-s 00002000 00:01 11466                      /memfd:ram (deleted)
4000-5000 rw-p 00003000 00:01 11466                      /memfd:ram (deleted)
5000-6000 rw-p 00000000 00:00 0
6000-7000 rw-s 00000000 00:01 11467                      /memfd:other (deleted)
9000-a000 rw-s 00003000 00:01 11466                      /memfd:ram (deleted)
";

    #[test]
    fn a_shared_mapping_may_be_in_pieces() {
        check(MAPS, &(0x1000..0x4000), 11466, 0).expect("all of it");
        check(MAPS, &(0x2000..0x4000), 11466, 0x1000).expect("a part of it");
    }

    #[test]
    fn all_else_is_refused() {
        let refused = |range, inode, offset| {
            check(MAPS, &range, inode, offset).expect_err("refused").to_string()
        };
        assert!(refused(0x1000..0x5000, 11466, 0).contains("0x4000 is private"));
        assert!(refused(0x5000..0x6000, 0, 0).contains("private"));
        assert!(refused(0x1000..0x3000, 11467, 0).contains("not the given place"));
        assert!(refused(0x1000..0x3000, 11466, 0x1000).contains("not the given place"));
        assert!(refused(0x6000..0x8000, 11467, 0).contains("0x7000 is not mapped"));
        assert!(refused(0x8000..0xa000, 11466, 0x2000).contains("0x8000 is not mapped"));
        assert!(refused(0xb000..0xc000, 11466, 0).contains("not mapped"));
    }
}
