use super::copy::Source;
use super::*;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use proptest::prelude::*;
use tempfile::{NamedTempFile, TempDir};

use crate::testing::{MIB, fork_with, pattern};

fn source(bytes: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file");
    file.as_file().write_all_at(bytes, 0).expect("write");
    file
}

fn populate(path: &Path, name: &str) -> Result<MemfdRegion, MemfdError> {
    create_and_populate(path, name, &MemfdOptions::default())
}

fn bytes_of(file: &std::fs::File) -> Vec<u8> {
    let len = file.metadata().expect("stat").len();
    let mut bytes = vec![0; usize::try_from(len).expect("small")];
    file.read_exact_at(&mut bytes, 0).expect("read");
    bytes
}

/// Descriptors and mappings of this process that belong to memfds of that name.
fn traces_of(name: &str) -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").expect("fds");
    let links = fds.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let wanted = format!("memfd:{name} ");
    let open = links.filter(|link| link.to_string_lossy().contains(&wanted)).count();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    open + maps.lines().filter(|line| line.contains(&wanted)).count()
}

#[test]
fn a_page_has_its_size_and_the_owners_path() {
    let file = source(&pattern(4096, 1));
    let region = populate(file.path(), "a page").expect("a region");
    assert_eq!((region.size_bytes(), region.allocated_bytes()), (4096, 4096));
    let path = region.backend_path();
    let expected = format!("/proc/{}/fd/", std::process::id());
    let number = path.to_str().and_then(|path| path.strip_prefix(&expected)).expect("our pid");
    assert_eq!(number.parse(), Ok(region.file().as_raw_fd()));
    assert!(!region.has_huge_pages() && region.fallback().is_none());
}

#[test]
fn a_clone_has_the_same_bytes_and_memory() {
    let bytes = pattern(8192, 2);
    let file = source(&bytes);
    let region = populate(file.path(), "a clone").expect("a region");
    let clone = region.try_clone().expect("clone");
    drop(region);
    assert_eq!(bytes_of(clone.file()), bytes);
    let other = clone.try_clone().expect("clone");
    other.file().write_all_at(b"new", 4095).expect("write");
    assert_eq!(&bytes_of(clone.file())[4095..4098], b"new");
    assert_eq!(bytes_of(file.as_file()), bytes, "the source stays as it is");
}

#[test]
fn another_process_opens_the_path() {
    let region = populate(source(&pattern(8192, 3)).path(), "opened elsewhere").expect("a region");
    let path = region.backend_path();
    let number = region.file().as_raw_fd();
    let mut child = fork_with(|| {
        let Ok(opened) = MemfdRegion::open(&path) else { return 2 };
        let other = opened.file().as_raw_fd() != number;
        let wrote =
            opened.size_bytes() == 8192 && opened.file().write_all_at(b"child", 100).is_ok();
        i32::from(!(other && wrote)) * 3
    });
    assert_eq!(child.wait().expect("wait").code(), Some(0));
    assert_eq!(&bytes_of(region.file())[100..105], b"child");
}

#[test]
fn the_size_is_sealed_for_all_holders() {
    let region = populate(source(&pattern(8192, 4)).path(), "sealed").expect("a region");
    let opened = MemfdRegion::open(&region.backend_path()).expect("open");
    let empty = create_empty(8192, "sealed too", &MemfdOptions::default()).expect("a region");
    for region in [&region, &opened, &empty] {
        for len in [0, 4096, 8191, 16384] {
            let error = region.file().set_len(len).expect_err("sealed");
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        }
        assert!(forkd_sys::memfd::seal_size(region).is_err(), "sealed against seals");
    }
}

#[test]
fn dropping_gives_all_back() {
    let region = populate(source(&pattern(4096, 5)).path(), "dropped").expect("a region");
    let clone = region.try_clone().expect("clone");
    assert_eq!(traces_of("dropped"), 2);
    drop((region, clone));
    assert_eq!(traces_of("dropped"), 0);
}

#[test]
fn a_missing_source_is_named() {
    let dir = TempDir::new().expect("a directory");
    let path = dir.path().join("memory.bin");
    let error = populate(&path, "of a missing one").expect_err("missing");
    assert!(matches!(&error, MemfdError::Source(e) if e.kind() == std::io::ErrorKind::NotFound));
    assert!(error.to_string().contains(path.to_str().expect("UTF-8")), "{error}");
    assert_eq!(traces_of("of a missing one"), 0);
}

#[test]
fn what_is_no_memory_file_is_refused() {
    let dir = TempDir::new().expect("a directory");
    let error = populate(dir.path(), "x").expect_err("a directory");
    assert!(matches!(&error, MemfdError::NotAFile { path } if path == dir.path()), "{error}");
    let empty = NamedTempFile::new().expect("a file");
    let error = populate(empty.path(), "x").expect_err("empty");
    assert!(error.to_string().contains(empty.path().to_str().expect("UTF-8")), "{error}");
    assert!(matches!(error, MemfdError::Empty { .. }));
    assert!(matches!(
        create_empty(0, "x", &MemfdOptions::default()),
        Err(MemfdError::Empty { .. })
    ));
}

#[test]
fn names_that_cannot_be_are_refused() {
    let file = source(&[1; 4096]);
    for bad in ["nul \0 inside", &"n".repeat(250)] {
        let error = populate(file.path(), bad).expect_err("refused");
        assert!(matches!(&error, MemfdError::Name { name, .. } if name == bad), "{error}");
        assert!(create_empty(4096, bad, &MemfdOptions::default()).is_err());
    }
}

#[test]
fn the_recorded_size_must_be_the_sources() {
    let file = source(&[1; 8192]);
    let with = |expected_len| {
        let options = MemfdOptions { expected_len: Some(expected_len), ..MemfdOptions::default() };
        create_and_populate(file.path(), "recorded", &options)
    };
    for wrong in [8193, 16384, 4096, 0] {
        let error = with(wrong).expect_err("refused");
        assert!(
            matches!(error, MemfdError::Length { expected, found: 8192, .. } if expected == wrong),
            "{error}"
        );
        assert!(error.to_string().contains(file.path().to_str().expect("UTF-8")), "{error}");
    }
    assert_eq!(traces_of("recorded"), 0);
    assert_eq!(with(8192).expect("as recorded").size_bytes(), 8192);
}

/// The source is opened, then cut, then copied: the same as a cut while it is copied, but at a
/// moment that is the same in each run.
#[test]
fn a_source_that_changes_while_copied_is_refused() {
    // Data is cut off, and a hole is, which nobody reads; and one that grows.
    for (len, data, cut) in
        [(4 * MIB, 4 * MIB, 3 * MIB), (4 * MIB, MIB, 3 * MIB), (MIB, MIB, 2 * MIB)]
    {
        let file = source(&vec![7; usize::try_from(data).expect("small")]);
        file.as_file().set_len(len).expect("size");
        let opened = Source::open(file.path(), Some(len)).expect("open");
        file.as_file().set_len(cut).expect("cut");
        for threads in [1, 3] {
            let error = make::populated(&opened, "cut", &MemfdOptions::default(), |_| threads)
                .expect_err("cut");
            assert!(
                matches!(&error, MemfdError::Changed { path, before, after }
                    if path == file.path() && *before == len && *after == cut),
                "{error}"
            );
        }
        assert_eq!(traces_of("cut"), 0);
    }
}

#[test]
fn extents_of_several_files_are_laid_out() {
    let (first, second) = (source(&pattern(16384, 8)), source(&pattern(8192, 9)));
    let open = |file: &NamedTempFile| (file.path().to_owned(), file.reopen().expect("open"));
    let extent =
        |ram_offset, len, file, file_offset| FileExtent { ram_offset, len, file, file_offset };
    let make = |extents: &[FileExtent]| {
        let options = MemfdOptions { immutable: true, ..MemfdOptions::default() };
        let files = vec![open(&first), open(&second)];
        create_from_extents(4 * MIB, files, extents, "laid-out", &options)
    };
    let extents = [extent(2 * MIB, 4096, 1, 4096), extent(4096, 8192, 0, 8192)];
    let region = make(&extents).expect("a region");
    let mut expected = vec![0; 4 << 20];
    expected[2 << 20..(2 << 20) + 4096].copy_from_slice(&pattern(8192, 9)[4096..]);
    expected[4096..12288].copy_from_slice(&pattern(16384, 8)[8192..]);
    assert!(bytes_of(region.file()) == expected);
    assert_eq!(region.file().metadata().expect("stat").blocks() * 512, 3 * 4096);
    assert!(region.is_immutable() && region.file().write_all_at(&[1], 0).is_err());
    MemfdRegion::immutable_from_fd(region.try_clone().expect("clone").file.into()).expect("fit");
    let error = make(&[extent(0, 8192, 1, 4096)]).expect_err("too short").to_string();
    assert!(error.contains(&second.path().display().to_string()), "{error}");
    assert_eq!(traces_of("laid-out"), 1, "that of the region");
}

#[test]
fn a_snapshots_memory_must_be_sealed() {
    let region = create_empty(8192, "open", &MemfdOptions::default()).expect("a region");
    let error = MemfdRegion::immutable_from_fd(region.file.into()).expect_err("refused");
    assert!(error.to_string().contains("its bytes are not sealed"), "{error}");
    let file = source(&[1; 4096]).into_file();
    let error = MemfdRegion::immutable_from_fd(file.into()).expect_err("refused").to_string();
    assert!(error.contains("not sealed"), "{error}");
}

#[test]
fn sparse_stays_sparse() {
    let file = source(&pattern(8192, 6));
    // 3 GiB and some of hole, pages of zeroes that are no hole, and data at the end.
    let len = 3 * 1024 * MIB + 64 * MIB;
    file.as_file().set_len(len).expect("size");
    file.as_file().write_all_at(&vec![0; 1 << 20], 64 * MIB).expect("zeroes");
    file.as_file().write_all_at(&[9; 4096], len - 4096).expect("data");
    let region = populate(file.path(), "sparse").expect("a region");
    assert_eq!(region.size_bytes(), len);
    let mut page = [0; 4096];
    region.file().read_exact_at(&mut page, len - 4096).expect("read");
    assert_eq!(page, [9; 4096]);
    let mut at = 0;
    let mut data = Vec::new();
    while let Some(range) = forkd_sys::memfd::next_data(region.file(), at, len).expect("seek") {
        at = range.end;
        data.push(range);
    }
    assert_eq!(data, [0..8192, len - 4096..len]);
    assert_eq!(region.file().metadata().expect("stat").blocks() * 512, 3 * 4096);
}

#[test]
fn much_data_is_copied_by_all_threads_alike() {
    let len = 70 * MIB;
    let file = NamedTempFile::new().expect("a file");
    let block = pattern(1 << 20, 7);
    for index in 0..70u64 {
        file.as_file().write_all_at(&block, index * MIB).expect("write");
        file.as_file().write_all_at(&index.to_le_bytes(), index * MIB + 512).expect("write");
    }
    let mut asked = 0;
    let opened = Source::open(file.path(), None).expect("open");
    let region = make::populated(&opened, "much", &MemfdOptions::default(), |data| {
        asked = data;
        4
    })
    .expect("a region");
    assert_eq!(asked, len, "threads are chosen by the amount of data");
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for index in 0..70 {
        region.file().read_exact_at(&mut ours, index * MIB).expect("read");
        file.as_file().read_exact_at(&mut theirs, index * MIB).expect("read");
        assert!(ours == theirs, "MiB {index}");
    }
}

#[test]
fn foreign_descriptors_are_checked() {
    let file = source(&[1; 4096]);
    let error = MemfdRegion::open(file.path()).expect_err("no memfd");
    assert!(error.to_string().contains("not sealed"), "{error}");
    let loose = forkd_sys::memfd::create("loose", false).expect("memfd");
    loose.set_len(4096).expect("size");
    assert!(MemfdRegion::from_fd(loose.try_clone().expect("dup").into()).is_err());
    forkd_sys::memfd::seal_size(&loose).expect("seal");
    assert_eq!(MemfdRegion::from_fd(loose.into()).expect("sealed").size_bytes(), 4096);
    let empty = forkd_sys::memfd::create("loose", false).expect("memfd");
    forkd_sys::memfd::seal_size(&empty).expect("seal");
    assert!(MemfdRegion::from_fd(empty.into()).is_err());
    let error = MemfdRegion::open(Path::new("/proc/self/fd/999999")).expect_err("closed");
    assert!(error.to_string().contains("/proc/self/fd/999999"), "{error}");
}

fn free_huge_pages() -> u64 {
    let number = |text: &str| text.trim().parse::<u64>().expect("a number");
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("meminfo");
    let line = meminfo.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    let more = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";
    line.map_or(0, number) + std::fs::read_to_string(more).map_or(0, |text| number(&text))
}

/// On a host with a pool it is the reserve at mmap that fails, without one it is the same call.
#[test]
fn an_exhausted_pool_falls_back_with_a_warning() {
    let huge = MemfdOptions { huge_pages: true, ..MemfdOptions::default() };
    let pages = free_huge_pages() + 1;
    let region = create_empty(pages * 2 * MIB, "huge", &huge).expect("falls back");
    assert!(!region.has_huge_pages());
    let warning = region.fallback().expect("a warning");
    assert!(
        warning.contains("\"huge\"") && warning.contains(&format!("{pages} pages")),
        "{warning}"
    );
    assert_eq!(traces_of("huge"), 1, "nothing is left of the attempt");

    let bytes = pattern(8192, 8);
    let file = source(&bytes);
    let region = create_and_populate(file.path(), "huge source", &huge).expect("a region");
    assert_eq!(region.size_bytes(), 8192);
    if region.has_huge_pages() {
        assert_eq!((region.allocated_bytes(), region.fallback()), (2 * MIB, None));
    } else {
        assert_eq!(region.allocated_bytes(), 8192);
        assert!(region.fallback().is_some());
    }
    assert_eq!(bytes_of(region.file())[..8192], bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_file_is_copied_byte_for_byte(
        len in 1u64..300_000,
        writes in proptest::collection::vec((0u64..300_000, 1usize..20_000, any::<u64>()), 0..6),
        threads in 1usize..4,
    ) {
        let file = NamedTempFile::new().expect("a file");
        for (at, count, seed) in writes {
            file.as_file().write_all_at(&pattern(count, seed), at).expect("write");
        }
        file.as_file().set_len(len).expect("size");
        let opened = Source::open(file.path(), Some(len)).expect("open");
        let region = make::populated(&opened, "any", &MemfdOptions::default(), |_| threads).expect("a region");
        prop_assert_eq!(region.size_bytes(), len);
        prop_assert!(bytes_of(region.file()) == bytes_of(file.as_file()));
    }
}
