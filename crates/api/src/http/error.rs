//! What can be wrong with a message.

/// A message that cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// Start line and headers are too long.
    #[error("the head of the message is longer than {limit} bytes")]
    HeadTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// Too many headers.
    #[error("the message has more than {limit} headers")]
    TooManyHeaders {
        /// The limit.
        limit: usize,
    },
    /// The body is too long.
    #[error("the body is longer than {limit} bytes")]
    BodyTooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// Not HTTP, or HTTP that is not safe to interpret.
    #[error("malformed HTTP: {0}")]
    Malformed(&'static str),
    /// A version other than HTTP/1.0 and HTTP/1.1.
    #[error("only HTTP/1.1 and HTTP/1.0 are spoken here")]
    Version,
    /// A transfer coding other than chunked.
    #[error("transfer encoding {0:?} is not supported: only \"chunked\" is")]
    TransferEncoding(String),
    /// The stream ended within a message.
    #[error("the connection was closed in the middle of a message")]
    Truncated,
}

impl HttpError {
    /// The status to answer a request that has this error with.
    pub fn status(&self) -> u16 {
        match self {
            Self::HeadTooLarge { .. } | Self::TooManyHeaders { .. } => 431,
            Self::BodyTooLarge { .. } => 413,
            Self::Malformed(_) | Self::Truncated => 400,
            Self::TransferEncoding(_) => 501,
            Self::Version => 505,
        }
    }
}

impl From<httparse::Error> for HttpError {
    fn from(error: httparse::Error) -> Self {
        match error {
            httparse::Error::HeaderName => Self::Malformed("a header's name is not a token"),
            httparse::Error::HeaderValue => Self::Malformed("a header's value has control bytes"),
            httparse::Error::NewLine => Self::Malformed("a line does not end as lines do"),
            httparse::Error::Status => Self::Malformed("the status line is wrong"),
            httparse::Error::Token => Self::Malformed("the request line is wrong"),
            httparse::Error::TooManyHeaders => Self::TooManyHeaders { limit: super::MAX_HEADERS },
            httparse::Error::Version => Self::Version,
        }
    }
}
