//! Sending signals by number: rustix names only those below the real-time ones.

#![allow(unsafe_code)]

use std::io;

fn kill(target: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two numbers and touches no memory.
    if unsafe { libc::kill(target, signal) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sends a signal to one process.
///
/// # Errors
///
/// There is no such process or signal. `pid` must be positive: others would be groups.
pub fn process(pid: i32, signal: i32) -> io::Result<()> {
    if pid > 0 { kill(pid, signal) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Sends a signal to every process of a group that was started by us, and so has its leader's id.
///
/// # Errors
///
/// There is no such group or signal.
pub fn group(leader: i32, signal: i32) -> io::Result<()> {
    if leader > 1 { kill(-leader, signal) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Sends a signal to every process but this one and PID 1.
///
/// # Errors
///
/// There is no other process.
pub fn all(signal: i32) -> io::Result<()> {
    kill(-1, signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_everybody_are_refused() {
        assert!(process(0, 0).is_err() && process(-1, 0).is_err());
        assert!(group(1, 0).is_err() && group(0, 0).is_err() && group(-5, 0).is_err());
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(process(me, 0).is_ok() && process(me, 1000).is_err());
    }
}
