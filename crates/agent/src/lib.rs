//! The guest agent: envd protocol, client and server; the binary is PID 1.
//!
//! [`protocol`] says what is spoken, without I/O; [`client`] is the host's side of it. The guest's side
//! is the binary `forkd-agent`, in `src/bin/forkd-agent`.

#![forbid(unsafe_code)]

pub mod client;
pub mod protocol;
