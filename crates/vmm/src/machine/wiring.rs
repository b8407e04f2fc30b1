//! What connects devices to the rest of the process: interrupt lines and the event loop's waker.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forkd_devices::{Doorbell, Interrupt};
use forkd_sys::wake::Waker;
use forkd_vm::{IrqLine, VmError};

/// Makes interrupts and doorbells for devices.
#[derive(Debug)]
pub struct Wiring {
    line: IrqLine,
    waker: Waker,
}

/// One line of the guest's IOAPIC, edge-triggered.
#[derive(Debug)]
struct Gsi {
    line: IrqLine,
    gsi: u32,
    complained: AtomicBool,
}

impl Interrupt for Gsi {
    fn trigger(&self) {
        match self.line.pulse(self.gsi) {
            // There is no VM yet: the transport repeats what the guest has not taken (`resume`).
            Ok(()) | Err(VmError::Unconnected { .. }) => {}
            Err(_) if self.complained.swap(true, Ordering::Relaxed) => {}
            Err(error) => crate::log::line(&format!("interrupt {} is lost: {error}", self.gsi)),
        }
    }
}

#[derive(Debug)]
struct LoopBell(Waker);

impl Doorbell for LoopBell {
    fn ring(&self) {
        if let Err(error) = self.0.wake() {
            crate::log::line(&format!("a device cannot wake the event loop: {error}"));
        }
    }
}

impl Wiring {
    /// Interrupts that go nowhere until an engine takes the line over.
    ///
    /// # Errors
    /// No eventfd to be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self { line: IrqLine::unconnected(), waker: Waker::new()? })
    }

    /// The interrupt lines, for the engine to take over.
    pub fn line(&self) -> &IrqLine {
        &self.line
    }

    /// The event loop's waker.
    pub fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Replaces the waker; what was made with the old one has to be made anew.
    ///
    /// # Errors
    /// No eventfd to be had.
    pub fn renew_waker(&mut self) -> io::Result<()> {
        self.waker = Waker::new()?;
        Ok(())
    }

    /// An interrupt line.
    pub fn interrupt(&self, gsi: u32) -> Arc<dyn Interrupt> {
        Arc::new(Gsi { line: self.line.clone(), gsi, complained: AtomicBool::new(false) })
    }

    /// A doorbell of the event loop.
    pub fn doorbell(&self) -> Arc<dyn Doorbell> {
        Arc::new(LoopBell(self.waker.clone()))
    }
}
