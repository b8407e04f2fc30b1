//! The keyboard controller: a way to reset the machine, and a keyboard with three keys.
//!
//! Linux resets a machine by writing 0xfe to port 0x64 (`reboot=k`). To ask a guest for a clean shutdown,
//! the VMM presses Ctrl+Alt+Del, which init may act upon. The controller answers what a driver asks on
//! its way there (self-tests, configuration byte, keyboard id); there is no mouse.
//!
//! Ports 0x60 to 0x64. Port 0x61 belongs to the timer and speaker: its bit 5 reads as set, so that
//! loops that wait for timer 2 end.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::interrupt::{Doorbell, Interrupt, InterruptSlot};

/// First port.
pub const BASE: u64 = 0x60;
/// Number of ports.
pub const PORTS: u64 = 5;

// Offsets from the first port.
const DATA: u64 = 0;
const PORT_B: u64 = 1;
const COMMAND: u64 = 4;

// Status register.
const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_LAST_WAS_COMMAND: u8 = 0x08;
const STATUS_NOT_LOCKED: u8 = 0x10;

// Configuration byte.
const CONFIG_KEYBOARD_INTERRUPT: u8 = 0x01;
const CONFIG_SYSTEM: u8 = 0x04;
const CONFIG_KEYBOARD_OFF: u8 = 0x10;
const CONFIG_AUX_OFF: u8 = 0x20;

// Output port: A20 gate open, CPU not in reset.
const OUTPUT_PORT: u8 = 0x03;
const PORT_B_TIMER2: u8 = 0x20;

/// Bytes for the guest that wait at most; a keyboard has a small buffer, too.
const MAX_OUTPUT: usize = 16;

/// Ctrl, Alt and Del going down and up, scan code set 2.
const CTRL_ALT_DEL: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];

/// State of a keyboard controller, for a durable snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// Configuration byte.
    pub config: u8,
    /// Status bit: the last write was a command.
    pub last_was_command: bool,
    /// Command whose parameter is awaited.
    pub awaiting: Option<u8>,
    /// The keyboard's next byte is a parameter.
    pub keyboard_parameter: bool,
    /// Bytes for the guest.
    pub output: Vec<u8>,
}

/// The controller.
pub struct I8042 {
    state: I8042State,
    output: VecDeque<u8>,
    interrupt: InterruptSlot,
    doorbell: Arc<dyn Doorbell>,
    reset_requested: bool,
}

impl I8042 {
    /// A controller that interrupts by `interrupt` (IRQ 1), and rings `doorbell` when the guest asks for a
    /// reset.
    pub fn new(interrupt: Arc<dyn Interrupt>, doorbell: Arc<dyn Doorbell>) -> Self {
        let config = CONFIG_SYSTEM | CONFIG_KEYBOARD_INTERRUPT | CONFIG_AUX_OFF;
        Self {
            state: I8042State { config, ..I8042State::default() },
            output: VecDeque::new(),
            interrupt: InterruptSlot::new(interrupt),
            doorbell,
            reset_requested: false,
        }
    }

    /// Replaces interrupt and doorbell: for the child of a fork, before its vCPUs run.
    pub fn rewire(&mut self, interrupt: Arc<dyn Interrupt>, doorbell: Arc<dyn Doorbell>) {
        self.interrupt.replace(interrupt);
        self.doorbell = doorbell;
    }

    /// True if the guest has asked for a reset since this was asked last.
    pub fn take_reset_request(&mut self) -> bool {
        std::mem::take(&mut self.reset_requested)
    }

    /// Presses Ctrl+Alt+Del. Returns false, with nothing pressed, if the guest has not read what was
    /// typed before, or has the keyboard switched off.
    pub fn press_ctrl_alt_del(&mut self) -> bool {
        if self.state.config & CONFIG_KEYBOARD_OFF != 0
            || self.output.len() + CTRL_ALT_DEL.len() > MAX_OUTPUT
        {
            return false;
        }
        self.output.extend(CTRL_ALT_DEL);
        self.interrupt_if_output();
        true
    }

    /// State for a durable snapshot.
    pub fn save(&self) -> I8042State {
        I8042State { output: self.output.iter().copied().collect(), ..self.state.clone() }
    }

    /// Puts saved state back. Output beyond what a controller holds is dropped.
    pub fn restore(&mut self, state: &I8042State) {
        self.output = state.output.iter().copied().take(MAX_OUTPUT).collect();
        self.state = I8042State { output: Vec::new(), ..state.clone() };
    }

    fn interrupt_if_output(&self) {
        if !self.output.is_empty() && self.state.config & CONFIG_KEYBOARD_INTERRUPT != 0 {
            self.interrupt.trigger();
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        let room = MAX_OUTPUT - self.output.len();
        self.output.extend(bytes.iter().take(room));
        self.interrupt_if_output();
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_SYSTEM | STATUS_NOT_LOCKED;
        if !self.output.is_empty() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.state.last_was_command {
            status |= STATUS_LAST_WAS_COMMAND;
        }
        status
    }

    fn command(&mut self, command: u8) {
        self.state.last_was_command = true;
        self.state.awaiting = None;
        match command {
            0x20 => self.put(&[self.state.config]),
            // Write configuration or output port; loops and writes to the mouse also take a byte.
            0x60 | 0xd1..=0xd4 => self.state.awaiting = Some(command),
            0xa7 => self.state.config |= CONFIG_AUX_OFF,
            0xa8 => self.state.config &= !CONFIG_AUX_OFF,
            // Mouse port test: clock line stuck, that is, nothing there.
            0xa9 => self.put(&[0x01]),
            // Controller and keyboard port self-tests pass.
            0xaa => self.put(&[0x55]),
            0xab => self.put(&[0x00]),
            0xad => self.state.config |= CONFIG_KEYBOARD_OFF,
            0xae => self.state.config &= !CONFIG_KEYBOARD_OFF,
            0xd0 => self.put(&[OUTPUT_PORT]),
            0xfe => {
                self.reset_requested = true;
                self.doorbell.ring();
            }
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        self.state.last_was_command = false;
        match self.state.awaiting.take() {
            Some(0x60) => self.state.config = value,
            // "Write keyboard output": as if the keyboard had sent it.
            Some(0xd2) => self.put(&[value]),
            // Output port, mouse loop and mouse: no effect, no answer.
            Some(_) => {}
            None => self.keyboard(value),
        }
    }

    /// A byte sent to the keyboard. It acknowledges everything.
    fn keyboard(&mut self, value: u8) {
        const ACK: u8 = 0xfa;
        if std::mem::take(&mut self.state.keyboard_parameter) {
            return self.put(&[ACK]);
        }
        match value {
            // Identify: a standard keyboard.
            0xf2 => self.put(&[ACK, 0xab, 0x83]),
            // Reset: passed its test.
            0xff => self.put(&[ACK, 0xaa]),
            // Lights, scan code set, repeat rate: a parameter follows.
            0xed | 0xf0 | 0xf3 => {
                self.state.keyboard_parameter = true;
                self.put(&[ACK]);
            }
            _ => self.put(&[ACK]),
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(first) = data.first_mut() else { return };
        *first = match offset {
            DATA => {
                let byte = self.output.pop_front().unwrap_or(0);
                self.interrupt_if_output();
                byte
            }
            PORT_B => PORT_B_TIMER2,
            COMMAND => self.status(),
            _ => 0,
        };
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match offset {
            DATA => self.data(value),
            COMMAND => self.command(value),
            _ => {}
        }
    }
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("I8042").field("state", &self.save()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::interrupt::{DoorbellFn, NoInterrupt};

    fn controller() -> (I8042, Arc<AtomicUsize>) {
        let rings = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&rings);
        let bell: Arc<dyn Doorbell> = Arc::new(DoorbellFn(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        (I8042::new(Arc::new(NoInterrupt), bell), rings)
    }

    fn read(device: &mut I8042, offset: u64) -> u8 {
        let mut byte = [0];
        device.read(offset, &mut byte);
        byte[0]
    }

    fn drain(device: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        while read(device, COMMAND) & STATUS_OUTPUT_FULL != 0 {
            bytes.push(read(device, DATA));
        }
        bytes
    }

    #[test]
    fn reset_rings_once() {
        let (mut device, rings) = controller();
        device.write(COMMAND, &[0xfe]);
        assert_eq!(rings.load(Ordering::Relaxed), 1);
        assert!(device.take_reset_request());
        assert!(!device.take_reset_request());
    }

    #[test]
    fn answers_a_probing_driver() {
        let (mut device, _) = controller();
        device.write(COMMAND, &[0xaa]);
        assert_eq!(drain(&mut device), [0x55]);
        device.write(COMMAND, &[0x60]);
        device.write(DATA, &[0x05]);
        device.write(COMMAND, &[0x20]);
        assert_eq!(drain(&mut device), [0x05]);
        device.write(DATA, &[0xf2]);
        assert_eq!(drain(&mut device), [0xfa, 0xab, 0x83]);
        device.write(DATA, &[0xed]);
        device.write(DATA, &[0xff]);
        assert_eq!(drain(&mut device), [0xfa, 0xfa], "the second is a parameter, no reset");
    }

    #[test]
    fn ctrl_alt_del_is_all_or_nothing() {
        let (mut device, _) = controller();
        assert!(device.press_ctrl_alt_del());
        assert!(!device.press_ctrl_alt_del());
        assert_eq!(drain(&mut device), CTRL_ALT_DEL);
        device.write(COMMAND, &[0xad]);
        assert!(!device.press_ctrl_alt_del());
    }

    proptest! {
        /// No sequence of accesses makes the controller hold more than it may, and a restored one
        /// behaves as the original.
        #[test]
        fn restored_controller_behaves_as_the_original(
            before in prop::collection::vec((0u64..5, any::<u8>(), any::<bool>()), 0..80),
            after in prop::collection::vec((0u64..5, any::<u8>(), any::<bool>()), 0..80),
        ) {
            fn step(device: &mut I8042, &(port, value, write): &(u64, u8, bool)) -> u8 {
                if write { device.write(port, &[value]); 0 } else { read(device, port) }
            }
            let (mut original, _) = controller();
            for access in &before { step(&mut original, access); }
            prop_assert!(original.output.len() <= MAX_OUTPUT);
            let (mut restored, _) = controller();
            restored.restore(&original.save());
            for access in &after {
                prop_assert_eq!(step(&mut original, access), step(&mut restored, access));
            }
            prop_assert_eq!(original.save(), restored.save());
        }
    }
}
