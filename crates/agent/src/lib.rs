//! The guest agent: envd protocol, client and server; the binary is PID 1.

#![forbid(unsafe_code)]

pub mod protocol;
