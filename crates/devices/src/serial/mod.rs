//! The serial console: a 16550A at a port range, whose output goes into a bounded log.

mod console_log;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::serial::{NoEvents, SerialState as Registers};

use crate::bus::BusDevice;
use crate::interrupt::{Interrupt, InterruptSlot};

pub use console_log::{ConsoleLog, DEFAULT_FILE_LIMIT, TAIL_LEN};

/// Length of the port range in bytes.
pub const PORTS: u64 = 8;

/// A saved state that the serial port does not take.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("saved serial port has {0} bytes of input, more than its FIFO")]
pub struct SerialRestoreError(pub usize);

/// Registers and pending input of a serial port, for a durable snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte first.
    pub divisor: [u8; 2],
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input that the guest has not read.
    pub input: Vec<u8>,
}

type Uart = vm_superio::Serial<InterruptSlot, NoEvents, ConsoleLog>;

/// A serial port.
#[derive(Debug)]
pub struct Serial {
    uart: Uart,
}

impl Serial {
    /// A port that interrupts by `interrupt` and prints into `log`.
    pub fn new(interrupt: Arc<dyn Interrupt>, log: ConsoleLog) -> Self {
        Self { uart: Uart::new(InterruptSlot::new(interrupt), log) }
    }

    /// The log that output goes to.
    pub fn log(&self) -> &ConsoleLog {
        self.uart.writer()
    }

    /// Replaces the interrupt: for the child of a fork, before its vCPUs run.
    pub fn rewire(&self, interrupt: Arc<dyn Interrupt>) {
        self.uart.interrupt_evt().replace(interrupt);
    }

    /// Types `input` on the console. Returns how many bytes there was room for; the rest may be tried
    /// again once the guest has read some.
    pub fn type_input(&mut self, input: &[u8]) -> usize {
        let n = input.len().min(self.uart.fifo_capacity());
        // The only errors are a full FIFO, which `n` avoids, and the interrupt's, which cannot fail.
        self.uart.enqueue_raw_bytes(&input[..n]).unwrap_or(0)
    }

    /// Registers and pending input.
    pub fn save(&self) -> SerialState {
        let r = self.uart.state();
        SerialState {
            divisor: [r.baud_divisor_low, r.baud_divisor_high],
            interrupt_enable: r.interrupt_enable,
            interrupt_identification: r.interrupt_identification,
            line_control: r.line_control,
            line_status: r.line_status,
            modem_control: r.modem_control,
            modem_status: r.modem_status,
            scratch: r.scratch,
            input: r.in_buffer,
        }
    }

    /// Puts saved state back; interrupt and log stay.
    ///
    /// # Errors
    /// More pending input than the port has room for.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), SerialRestoreError> {
        let registers = Registers {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let (interrupt, log) = (self.uart.interrupt_evt().clone(), self.uart.writer().clone());
        self.uart = Uart::from_state(&registers, interrupt, NoEvents, log)
            .map_err(|_| SerialRestoreError(state.input.len()))?;
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..PORTS).zip(data) {
            *byte = self.uart.read(register as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, &byte) in (offset..PORTS).zip(data) {
            // A console that cannot print must not stop the guest; the log counts what it loses.
            let _lost_output = self.uart.write(register as u8, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::interrupt::NoInterrupt;

    struct Count(AtomicUsize);
    impl Interrupt for Count {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn prints_into_the_log_and_reads_typed_input() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let mut serial = Serial::new(Arc::new(NoInterrupt), ConsoleLog::in_memory());
        serial.rewire(count.clone());
        serial.write(1, &[1]);
        for byte in b"hello\n" {
            serial.write(0, &[*byte]);
        }
        assert_eq!(serial.log().tail(), b"hello\n");
        assert_eq!(serial.type_input(&[b'x'; 200]), 64);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        let mut byte = [0];
        serial.read(0, &mut byte);
        assert_eq!(byte, *b"x");
    }

    proptest! {
        /// A restored port answers every later access as the original does.
        #[test]
        fn restored_port_behaves_as_the_original(
            before in prop::collection::vec((0u64..8, any::<u8>(), any::<bool>()), 0..60),
            after in prop::collection::vec((0u64..8, any::<u8>(), any::<bool>()), 0..60),
        ) {
            fn step(serial: &mut Serial, &(register, value, write): &(u64, u8, bool)) -> u8 {
                let mut byte = [0];
                if write { serial.write(register, &[value]) } else { serial.read(register, &mut byte) }
                byte[0]
            }
            let mut original = Serial::new(Arc::new(NoInterrupt), ConsoleLog::in_memory());
            original.type_input(b"abc");
            for access in &before { step(&mut original, access); }
            let mut restored = Serial::new(Arc::new(NoInterrupt), ConsoleLog::in_memory());
            restored.restore(&original.save()).unwrap();
            for access in &after {
                prop_assert_eq!(step(&mut original, access), step(&mut restored, access));
            }
            prop_assert_eq!(original.save(), restored.save());
        }
    }

    #[test]
    fn too_much_saved_input_is_refused() {
        let mut serial = Serial::new(Arc::new(NoInterrupt), ConsoleLog::in_memory());
        let state = SerialState { input: vec![0; 65], ..serial.save() };
        assert_eq!(serial.restore(&state), Err(SerialRestoreError(65)));
    }
}
