//! What the writer says at its end: one block of fixed size on a pipe.
//!
//! ```text
//!   offset  size  field (numbers are in the byte order of the host: both ends are one program)
//!        0     8  magic, which tells a report from noise
//!        8     8  what ended: 0 all is captured, 1 a call failed, 2 the sink is too slow, 3 aborted
//!       16    72  the counters of `Report`, in the order of its fields
//!       88     4  error number of the failed call; 0 if it had none
//!       92     4  length of the text in bytes
//!       96   416  text: what failed, in UTF-8
//! ```
//!
//! 512 bytes are less than `PIPE_BUF`, so the block comes whole or not at all.

use std::io;
use std::time::Duration;

use super::CaptureError;

/// Length of a report in bytes.
pub const LEN: usize = 512;

const MAGIC: u64 = u64::from_ne_bytes(*b"forkdcap");
const TEXT: usize = 96;
const COUNTERS: usize = 9;

/// What a capture came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Pages that the bulk copier took.
    pub pages_by_bulk: u64,
    /// Pages that the fault handler took, when the guest was about to write them.
    pub pages_by_handler: u64,
    /// Pages that were holes: zero, and not given to the sink.
    pub pages_of_holes: u64,
    /// Bytes given to the sink.
    pub bytes: u64,
    /// The longest time from reading a fault's message until its page was unprotected. What the
    /// message itself took, and the vCPU to be woken, comes on top for the guest.
    pub longest_fault: Duration,
    /// The longest time for which the bulk copier had a page claimed: what a fault on it waits.
    pub longest_claim: Duration,
    /// Number of fault messages, those for pages that another had already included.
    pub faults: u64,
    /// Time from `go` until the guest was free of protection.
    pub copying: Duration,
    /// Time after that until the sink had all and was finished.
    pub finishing: Duration,
}

/// How a capture ended, as it is put on the pipe.
#[derive(Debug)]
pub enum Outcome {
    /// All is captured.
    Done(Report),
    /// A call failed.
    Failed {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The sink is too slow; how slow.
    TooSlow(String),
    /// The source wanted no more.
    Aborted,
}

impl Outcome {
    /// The block.
    pub fn encode(&self) -> [u8; LEN] {
        let none = Report::default();
        let (kind, report, errno, text) = match self {
            Self::Done(report) => (0u64, report, 0, String::new()),
            Self::Failed { action, source } => {
                // An error of ours has no number; then its text must do.
                let errno = source.raw_os_error().unwrap_or(0);
                let text = if errno == 0 { format!("{action}\n{source}") } else { action.clone() };
                (1, &none, errno, text)
            }
            Self::TooSlow(text) => (2, &none, 0, text.clone()),
            Self::Aborted => (3, &none, 0, String::new()),
        };
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let counters: [u64; COUNTERS] = [
            report.pages_by_bulk,
            report.pages_by_handler,
            report.pages_of_holes,
            report.bytes,
            ns(report.longest_fault),
            ns(report.longest_claim),
            report.faults,
            ns(report.copying),
            ns(report.finishing),
        ];
        let mut cut = text.len().min(LEN - TEXT);
        while !text.is_char_boundary(cut) {
            cut -= 1;
        }
        let text = text.get(..cut).unwrap_or("");
        let mut block = Vec::with_capacity(LEN);
        block.extend(MAGIC.to_ne_bytes());
        block.extend(kind.to_ne_bytes());
        block.extend(counters.iter().flat_map(|counter| counter.to_ne_bytes()));
        block.extend(errno.to_ne_bytes());
        block.extend((cut as u32).to_ne_bytes());
        block.extend(text.as_bytes());
        let mut fixed = [0; LEN];
        for (to, from) in fixed.iter_mut().zip(block) {
            *to = from;
        }
        fixed
    }

    /// Reads a block.
    ///
    /// # Errors
    /// What is wrong with it. A writer whose memory was hit says anything.
    pub fn decode(block: &[u8; LEN]) -> Result<Self, &'static str> {
        let word = |at: usize| -> u64 {
            let bytes = block.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            u64::from_ne_bytes(bytes.unwrap_or_default())
        };
        let half = |at: usize| -> u32 {
            let bytes = block.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            u32::from_ne_bytes(bytes.unwrap_or_default())
        };
        if word(0) != MAGIC {
            return Err("it does not begin as a report");
        }
        let len = usize::try_from(half(92)).map_err(|_| "its text is too long")?;
        let text = block.get(TEXT..TEXT.saturating_add(len)).ok_or("its text is too long")?;
        let text = std::str::from_utf8(text).map_err(|_| "its text is no UTF-8")?;
        match word(8) {
            0 => Ok(Self::Done(Report {
                pages_by_bulk: word(16),
                pages_by_handler: word(24),
                pages_of_holes: word(32),
                bytes: word(40),
                longest_fault: Duration::from_nanos(word(48)),
                longest_claim: Duration::from_nanos(word(56)),
                faults: word(64),
                copying: Duration::from_nanos(word(72)),
                finishing: Duration::from_nanos(word(80)),
            })),
            1 => Ok(match (half(88).cast_signed(), text.split_once('\n')) {
                (0, Some((action, why))) => {
                    let source = io::Error::other(why.to_owned());
                    Self::Failed { action: action.to_owned(), source }
                }
                (0, None) => {
                    let source = io::Error::other("it does not say why");
                    Self::Failed { action: text.to_owned(), source }
                }
                (errno, _) => {
                    let source = io::Error::from_raw_os_error(errno);
                    Self::Failed { action: text.to_owned(), source }
                }
            }),
            2 => Ok(Self::TooSlow(text.to_owned())),
            3 => Ok(Self::Aborted),
            _ => Err("it says an unknown end"),
        }
    }

    /// As the source tells it.
    ///
    /// # Errors
    /// All but [`Outcome::Done`].
    pub fn into_result(self) -> Result<Report, CaptureError> {
        match self {
            Self::Done(report) => Ok(report),
            Self::Failed { action, source } => Err(CaptureError::Writer { action, source }),
            Self::TooSlow(text) => Err(CaptureError::TooSlow(text)),
            Self::Aborted => Err(CaptureError::Aborted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counters_come_back() {
        let report = Report {
            pages_by_bulk: 1,
            pages_by_handler: 2,
            pages_of_holes: 3,
            bytes: 4,
            longest_fault: Duration::from_nanos(5),
            longest_claim: Duration::from_nanos(6),
            faults: 7,
            copying: Duration::from_nanos(8),
            finishing: Duration::from_secs(9),
        };
        let back = Outcome::decode(&Outcome::Done(report).encode()).expect("decode");
        assert_eq!(back.into_result().expect("done"), report);
    }

    #[test]
    fn errors_come_back() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let failed = Outcome::Failed { action: "write".to_owned(), source: full };
        let error = Outcome::decode(&failed.encode()).expect("decode").into_result();
        let CaptureError::Writer { action, source } = error.expect_err("failed") else { panic!() };
        assert_eq!((action.as_str(), source.raw_os_error()), ("write", Some(libc::ENOSPC)));

        let failed = Outcome::Failed { action: "ä".repeat(600), source: io::Error::other("why") };
        let error = Outcome::decode(&failed.encode()).expect("decode").into_result();
        assert!(error.expect_err("failed").to_string().contains("ää"), "a long text is cut");

        let failed = Outcome::Failed { action: "do".to_owned(), source: io::Error::other("why") };
        let error = Outcome::decode(&failed.encode()).expect("decode").into_result();
        let text = error.expect_err("failed").to_string();
        assert_eq!(text, "the writer of a live capture cannot do: why");

        let slow = Outcome::decode(&Outcome::TooSlow("x".to_owned()).encode()).expect("decode");
        assert!(matches!(slow, Outcome::TooSlow(text) if text == "x"));
        let aborted = Outcome::decode(&Outcome::Aborted.encode()).expect("decode");
        assert!(matches!(aborted, Outcome::Aborted));
    }

    proptest! {
        #[test]
        fn noise_is_no_report(noise in proptest::collection::vec(any::<u8>(), LEN), magic: bool) {
            let mut block: [u8; LEN] = noise.try_into().expect("length");
            if magic {
                block[..8].copy_from_slice(&MAGIC.to_ne_bytes());
                block[8..16].copy_from_slice(&9u64.to_ne_bytes());
            }
            prop_assert!(Outcome::decode(&block).is_err());
        }
    }
}
