//! The user's terminal: raw mode, and its size.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use forkd_sys::reactor::wait_readable;
use forkd_sys::signal::{SignalFd, SignalSet};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::cleanup::Guard;
use crate::guest::Control;

/// SIGWINCH: signal(7).
const SIGWINCH: i32 = 28;

/// Raw mode, until dropped or a signal ends forkd.
pub struct RawTerminal(#[expect(dead_code, reason = "its drop restores the terminal")] Guard);

impl RawTerminal {
    /// Puts standard input's terminal into raw mode.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn enter() -> Result<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(stdin.as_fd()).context("cannot read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)
            .context("cannot set the terminal's mode")?;
        Ok(Self(Guard::new(move || restore(&before))))
    }
}

fn restore(before: &Termios) {
    // A terminal that has gone needs no mode.
    let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, before);
}

/// Columns and rows of standard output's terminal.
///
/// # Errors
/// It is no terminal.
pub fn size() -> Result<(u16, u16)> {
    let size =
        tcgetwinsize(std::io::stdout().as_fd()).context("cannot read the terminal's size")?;
    // A terminal that does not know its size says 0.
    let or = |size: u16, default| if size == 0 { default } else { size };
    Ok((or(size.ws_col, 80), or(size.ws_row, 24)))
}

/// Takes the signal that tells of a new size. Call it before threads are made: they inherit the mask.
///
/// # Errors
/// No descriptor is to be had.
pub fn watch_size() -> Result<SignalFd> {
    let set = SignalSet::of(&[SIGWINCH]).context("cannot watch the terminal's size")?;
    set.block().context("cannot watch the terminal's size")?;
    SignalFd::new(&set).context("cannot watch the terminal's size")
}

/// Tells the command of each new size, until it has ended.
pub fn follow_size(windows: &SignalFd, control: &Control) {
    loop {
        if wait_readable(windows, None).and_then(|_| windows.read()).is_err() {
            return;
        }
        let Ok((cols, rows)) = size() else { return };
        if control.resize(cols, rows).is_err() {
            return;
        }
    }
}
