//! How a device reaches out: to the guest by an interrupt, to the event loop by a doorbell.
//!
//! Both ends are bound to a process (a KVM VM, an eventfd), while the device is memory that fork(2)
//! copies. So a device holds a slot, and the child of a fork puts its own end into it.

use std::sync::{Arc, Mutex, PoisonError};

/// An interrupt line or message of the guest's interrupt controller.
pub trait Interrupt: Send + Sync {
    /// Signals one edge. Must not block, and must not call back into the device.
    fn trigger(&self);
}

/// Wakes the event loop, which then looks for pending work.
pub trait Doorbell: Send + Sync {
    /// Rings. Must not block; rings that come before the loop looks may fall together.
    fn ring(&self);
}

impl Doorbell for forkd_sys::wake::Waker {
    fn ring(&self) {
        // Fails only for a descriptor that is no eventfd, which a `Waker` cannot hold.
        let _woken = self.wake();
    }
}

/// A [`Doorbell`] that calls a function.
#[derive(Clone, Copy)]
pub struct DoorbellFn<F>(pub F);

impl<F: Fn() + Send + Sync> Doorbell for DoorbellFn<F> {
    fn ring(&self) {
        (self.0)();
    }
}

impl<F> std::fmt::Debug for DoorbellFn<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DoorbellFn")
    }
}

/// An [`Interrupt`] that goes nowhere: for a device that is not wired yet.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn trigger(&self) {}
}

/// A replaceable interrupt, shared between the parts of one device.
#[derive(Clone)]
pub struct InterruptSlot(Arc<Mutex<Arc<dyn Interrupt>>>);

impl InterruptSlot {
    /// A slot that holds `interrupt`.
    pub fn new(interrupt: Arc<dyn Interrupt>) -> Self {
        Self(Arc::new(Mutex::new(interrupt)))
    }

    /// Puts another interrupt in: the new VM's, after a fork.
    pub fn replace(&self, interrupt: Arc<dyn Interrupt>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    /// Triggers the interrupt that the slot holds now.
    pub fn trigger(&self) {
        let interrupt = Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner));
        interrupt.trigger();
    }
}

impl Default for InterruptSlot {
    fn default() -> Self {
        Self::new(Arc::new(NoInterrupt))
    }
}

impl std::fmt::Debug for InterruptSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InterruptSlot")
    }
}

impl vm_superio::Trigger for InterruptSlot {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        InterruptSlot::trigger(self);
        Ok(())
    }
}
