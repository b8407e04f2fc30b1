//! The kernel's command line: what every guest of forkd is given.

use crate::mode::GuestMode;
use crate::pvm;

/// For every host: serial console with warnings and errors alone, a panic ends the VM (reset by the i8042), the i8042
/// is not probed beyond that, no PCI, one clock source whose value the host controls across a fork (see
/// [`crate::clock`]), no patching of lock prefixes (each vCPU that comes up would undo it).
const BASE: &str = "console=ttyS0 quiet noreplace-smp panic=-1 reboot=k pci=off i8042.noaux i8042.nomux i8042.dumbkbd \
                    clocksource=kvm-clock tsc=reliable no_timer_check";

/// The command line for guests of a mode, with `extra` words after forkd's own, so that they win.
pub fn build(mode: GuestMode, extra: &str) -> String {
    let mut line = BASE.to_owned();
    let words = match mode {
        GuestMode::Hardware => "",
        GuestMode::PvmEmulated => pvm::cmdline(),
        GuestMode::PvmNative => pvm::native::CMDLINE,
    };
    for part in [words, extra] {
        let part = part.trim();
        if !part.is_empty() {
            line.push(' ');
            line.push_str(part);
        }
    }
    line
}
