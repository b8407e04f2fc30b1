//! What an epoll token stands for.

use forkd_sys::reactor::Token;

use crate::slab::Key;

/// A descriptor that the event loop waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The n-th listening socket.
    Listener(u8),
    /// Signals: a child ended, or the machine shall stop.
    Signals,
    /// A client's connection.
    Conn(Key),
    /// Standard input of a process.
    Stdin(Key),
    /// Standard output of a process, or its terminal.
    Stdout(Key),
    /// Standard error of a process.
    Stderr(Key),
    /// Requests to an interpreter: writable again.
    ContextRequests(Key),
    /// Answers of an interpreter.
    ContextAnswers(Key),
    /// Standard output of an interpreter.
    ContextStdout(Key),
    /// Standard error of an interpreter.
    ContextStderr(Key),
}

const KIND_SHIFT: u32 = 48;

impl Source {
    /// As a token.
    pub const fn token(self) -> Token {
        let (kind, bits) = match self {
            Self::Listener(n) => (0, n as u64),
            Self::Signals => (1, 0),
            Self::Conn(key) => (2, key.to_bits()),
            Self::Stdin(key) => (3, key.to_bits()),
            Self::Stdout(key) => (4, key.to_bits()),
            Self::Stderr(key) => (5, key.to_bits()),
            Self::ContextRequests(key) => (6, key.to_bits()),
            Self::ContextAnswers(key) => (7, key.to_bits()),
            Self::ContextStdout(key) => (8, key.to_bits()),
            Self::ContextStderr(key) => (9, key.to_bits()),
        };
        Token((kind << KIND_SHIFT) | bits)
    }

    /// Of a token made by [`Source::token`].
    pub const fn of(token: Token) -> Option<Self> {
        let key = Key::from_bits(token.0);
        Some(match token.0 >> KIND_SHIFT {
            0 => Self::Listener(token.0 as u8),
            1 => Self::Signals,
            2 => Self::Conn(key),
            3 => Self::Stdin(key),
            4 => Self::Stdout(key),
            5 => Self::Stderr(key),
            6 => Self::ContextRequests(key),
            7 => Self::ContextAnswers(key),
            8 => Self::ContextStdout(key),
            9 => Self::ContextStderr(key),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_back() {
        let key = Key::from_bits(0xffff_1234_5678);
        for source in [
            Source::Listener(1),
            Source::Signals,
            Source::Conn(key),
            Source::Stdin(key),
            Source::Stdout(key),
            Source::Stderr(key),
            Source::ContextRequests(key),
            Source::ContextAnswers(key),
            Source::ContextStdout(key),
            Source::ContextStderr(key),
        ] {
            assert_eq!(Source::of(source.token()), Some(source));
        }
        assert_eq!(Source::of(Token(u64::MAX)), None);
    }
}
