//! Copying memory files into a memfd: only what is not zero, in parallel if it is much.
//!
//! pread(2) into a buffer and pwrite(2) from it is the quickest way that works on all file systems:
//! 512 MiB from the page cache took 190 ms so, 370 ms by pread into the mapping (each first touch of
//! a page faults and zeroes it), and 180 to 1,400 ms by sendfile(2), on the two-core development
//! host. Huge pages take no write(2), so they are written through their mapping.

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use forkd_sys::PathError;
use forkd_sys::memfd::next_data;
use forkd_sys::mmap::Mapping;

use super::MemfdError;
use crate::backend::FileExtent;
use crate::backend::extents::Extents;

/// Bytes that are read and written at once: what a second-level cache holds.
const CHUNK: u64 = 1 << 20;
/// Least data for which threads are started.
const PARALLEL_FROM: u64 = 64 << 20;
/// Most threads: memory's bandwidth is used up long before.
const MAX_THREADS: usize = 8;
/// Granularity at which zeroes are left out: a page.
const PAGE: usize = 4096;
const ZEROES: [u8; PAGE] = [0; PAGE];

/// A memory file as it was when it was opened.
#[derive(Debug)]
struct MemoryFile {
    file: File,
    path: PathBuf,
    len: u64,
}

/// Memory files, and what of them is where.
#[derive(Debug)]
pub(super) struct Source {
    files: Vec<MemoryFile>,
    extents: Vec<FileExtent>,
    /// Bytes in all, with those that no extent is for.
    pub(super) len: u64,
}

/// Data that is copied at once.
#[derive(Debug)]
struct Chunk {
    file: usize,
    at: Range<u64>,
    /// Where it goes.
    to: u64,
}

impl Source {
    /// The whole of one file.
    pub(super) fn open(path: &Path, expected: Option<u64>) -> Result<Self, MemfdError> {
        let file = File::open(path).map_err(|e| PathError::new("open memory file", path, e))?;
        let file = MemoryFile::new(file, path.to_owned())?;
        let len = file.len;
        if let Some(expected) = expected
            && expected != len
        {
            return Err(MemfdError::Length { path: file.path, expected, found: len });
        }
        if len == 0 {
            return Err(MemfdError::Empty { what: file.path.display().to_string() });
        }
        let all = FileExtent { ram_offset: 0, len, file: 0, file_offset: 0 };
        Ok(Self { files: vec![file], extents: vec![all], len })
    }

    /// Parts of several files.
    pub(super) fn of_extents(
        len: u64,
        files: Vec<(PathBuf, File)>,
        extents: &[FileExtent],
    ) -> Result<Self, MemfdError> {
        let (paths, files): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        let checked = Extents::check(len, &files, extents)
            .map_err(|error| MemfdError::Extents(Box::new(error)))?;
        let files = files.into_iter().zip(paths).map(|(file, path)| MemoryFile::new(file, path));
        let extents = checked.sorted.into_iter().map(|(_, extent)| extent).collect();
        Ok(Self { files: files.collect::<Result<_, _>>()?, extents, len })
    }

    /// Its data in pieces of at most [`CHUNK`] bytes, ascending.
    fn chunks(&self) -> Result<Vec<Chunk>, MemfdError> {
        let mut chunks = Vec::new();
        for extent in &self.extents {
            let MemoryFile { file, path, .. } = &self.files[extent.file];
            let (mut at, end) = (extent.file_offset, extent.file_offset + extent.len);
            while let Some(data) = next_data(file, at, end)
                .map_err(|error| PathError::new("find the data of memory file", path, error))?
            {
                at = data.start;
                while at < data.end {
                    let stop = data.end.min(at + CHUNK);
                    let to = extent.ram_offset + (at - extent.file_offset);
                    chunks.push(Chunk { file: extent.file, at: at..stop, to });
                    at = stop;
                }
            }
        }
        Ok(chunks)
    }
}

impl MemoryFile {
    fn new(file: File, path: PathBuf) -> Result<Self, MemfdError> {
        let metadata =
            file.metadata().map_err(|e| PathError::new("look at memory file", &path, e))?;
        if !metadata.is_file() {
            return Err(MemfdError::NotAFile { path });
        }
        Ok(Self { file, path, len: metadata.len() })
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), MemfdError> {
        match self.file.read_exact_at(buffer, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.changed()),
            Err(error) => Err(PathError::new("read memory file", &self.path, error).into()),
            Ok(()) => Ok(()),
        }
    }

    fn changed(&self) -> MemfdError {
        let after = self.file.metadata().map_or(0, |metadata| metadata.len());
        MemfdError::Changed { path: self.path.clone(), before: self.len, after }
    }

    /// A hole that was cut off has been read by nobody.
    fn check_length(&self) -> Result<(), MemfdError> {
        match self.file.metadata() {
            Ok(metadata) if metadata.len() == self.len => Ok(()),
            _ => Err(self.changed()),
        }
    }
}

/// Where the bytes go; all zeroes before.
#[derive(Debug)]
pub(super) enum Sink<'a> {
    /// By pwrite.
    File(&'a File),
    /// By a shared mapping.
    Mapping(&'a Mapping),
}

impl Sink<'_> {
    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.write_all_at(data, offset),
            Self::Mapping(mapping) => {
                let offset = usize::try_from(offset).map_err(io::Error::other)?;
                Ok(mapping.write_at(offset, data)?)
            }
        }
    }
}

/// Threads for that much data.
pub(super) fn threads_for(data: u64) -> usize {
    if data < PARALLEL_FROM {
        return 1;
    }
    std::thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS)
}

/// Copies all data of `source` to the same offsets of `sink`, by as many threads as `threads` says
/// for the amount of data. `name` is the sink's, for errors.
pub(super) fn copy(
    source: &Source,
    sink: &Sink<'_>,
    name: &str,
    threads: impl FnOnce(u64) -> usize,
) -> Result<(), MemfdError> {
    let chunks = source.chunks()?;
    let threads = threads(chunks.iter().map(|chunk| chunk.at.end - chunk.at.start).sum());
    let job =
        Job { source, sink, name, chunks, next: AtomicUsize::new(0), error: Mutex::default() };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // A thread that cannot be started leaves its share to the others.
            let _started = std::thread::Builder::new()
                .name("memfd-copy".to_owned())
                .spawn_scoped(scope, || job.work());
        }
        job.work();
    });
    if let Some(error) = job.error.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(error);
    }
    source.files.iter().try_for_each(MemoryFile::check_length)
}

struct Job<'a> {
    source: &'a Source,
    sink: &'a Sink<'a>,
    name: &'a str,
    chunks: Vec<Chunk>,
    /// Index of the next chunk that nobody has taken.
    next: AtomicUsize,
    /// The first error.
    error: Mutex<Option<MemfdError>>,
}

impl Job<'_> {
    fn work(&self) {
        let mut buffer = Vec::new();
        // Each index is taken by one thread; nothing else is communicated by it.
        while let Some(chunk) = self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = self.copy_chunk(chunk, &mut buffer) {
                self.next.store(self.chunks.len(), Ordering::Relaxed);
                let mut first =
                    self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                first.get_or_insert(error);
                return;
            }
        }
    }

    fn copy_chunk(&self, chunk: &Chunk, buffer: &mut Vec<u8>) -> Result<(), MemfdError> {
        // At most CHUNK.
        buffer.resize((chunk.at.end - chunk.at.start) as usize, 0);
        self.source.files[chunk.file].read(buffer, chunk.at.start)?;
        for run in runs_of_data(buffer) {
            let offset = chunk.to + run.start as u64;
            let data = &buffer[run];
            self.sink.write(data, offset).map_err(|source| MemfdError::Write {
                name: self.name.to_owned(),
                offset,
                len: data.len(),
                source,
            })?;
        }
        Ok(())
    }
}

/// The ranges of whole pages (the last may be short) that are not all zero, neighbours as one.
fn runs_of_data(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        if page == &ZEROES[..page.len()] {
            continue;
        }
        let start = index * PAGE;
        let end = start + page.len();
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_all_that_is_not_zero(pages in proptest::collection::vec(0u8..3, 0..40), tail in 0usize..PAGE) {
            let mut bytes = vec![0u8; pages.len() * PAGE + tail];
            for (index, &value) in pages.iter().enumerate() {
                bytes[index * PAGE + usize::from(value) * 1000] = value;
            }
            let runs = runs_of_data(&bytes);
            let mut copy = vec![0u8; bytes.len()];
            for run in &runs {
                prop_assert!(run.start % PAGE == 0 && !run.is_empty());
                copy[run.clone()].copy_from_slice(&bytes[run.clone()]);
            }
            prop_assert_eq!(&copy, &bytes);
            prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start));
            let with_data = pages.iter().filter(|&&v| v > 0).count();
            let taken = runs.iter().map(|r| r.len().div_ceil(PAGE)).sum::<usize>();
            prop_assert_eq!(taken, with_data);
        }
    }

    #[test]
    fn little_data_starts_no_threads() {
        assert_eq!(threads_for(0), 1);
        assert_eq!(threads_for(PARALLEL_FROM - 1), 1);
        let cpus = std::thread::available_parallelism().expect("CPUs").get();
        assert_eq!(threads_for(u64::MAX), cpus.min(MAX_THREADS));
    }
}
