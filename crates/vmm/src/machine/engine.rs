//! What drives a machine: the KVM VM and its vCPUs. fork(2) does not copy these; a child builds its own.

use std::sync::Arc;
use std::time::Duration;

use forkd_api::types::{Metrics, Timing, VmConfig};
use forkd_sys::clock::monotonic_ns;
use forkd_vm::{ExitBus, Vcpu, Vm, boot};

use super::{Machine, MachineError};
use crate::fork::{PauseClock, Quiesced, SavedKvm};
use crate::process::VmmError;
use crate::vcpus::{PARK_TIMEOUT, VcpuSet, VcpusError};

/// How often parking is tried where it has to be quick.
const PARK_ATTEMPTS: u32 = 5;

/// Why a VM could not be brought to stand still.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// Parking took longer than allowed, each time.
    #[error("vCPU {0} did not park within {1:?}, in {PARK_ATTEMPTS} attempts: the host is busy")]
    Slow(u8, Duration),
    /// A vCPU is stuck or gone.
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
    /// KVM's state can't be read.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// What was to be done last failed.
    #[error("{0}")]
    Last(String),
}

/// The KVM VM and its vCPUs.
#[derive(Debug)]
pub struct Engine {
    vm: Vm,
    /// The vCPU threads.
    pub vcpus: VcpuSet,
}

impl Engine {
    /// Loads a kernel and makes vCPUs that will start it; they are parked.
    ///
    /// # Errors
    /// The kernel can't be loaded, or KVM refuses.
    pub fn boot(
        machine: &Machine,
        config: &VmConfig,
        timing: &mut Timing,
    ) -> Result<Self, VmmError> {
        let (vm, mut vcpus) = create(machine, config.vcpus)?;
        timing.vm_created_ns = monotonic_ns();
        let virtio_slots: Vec<u8> = machine.virtio.iter().map(|d| d.slot).collect();
        // pmem comes up asynchronously: left to itself, the agent might find a scratch disk first.
        let words = format!("forkd.root=/dev/pmem0 {}", config.cmdline);
        let cmdline = forkd_vm::cmdline::build(machine.mode(), &words);
        let args = boot::LoadArgs {
            kernel: &config.kernel,
            initrd: Some(&config.initrd),
            cmdline: &cmdline,
            vcpus: config.vcpus,
            virtio_slots: &virtio_slots,
            vmgenid: true,
            entry: boot::ElfEntry::default(),
            mode: machine.mode(),
        };
        let entry = boot::load(machine.ram.guest(), &args).map_err(MachineError::from)?;
        for vcpu in &mut vcpus {
            vcpu.configure_boot(&entry).map_err(MachineError::from)?;
        }
        timing.restored_ns = monotonic_ns();
        Self::start(machine, vm, vcpus)
    }

    /// In a forked child: makes a VM over the inherited RAM and puts the saved state into it; its vCPUs
    /// are parked.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn rebuild(
        machine: &Machine,
        saved: &SavedKvm,
        timing: &mut Timing,
    ) -> Result<Self, VmmError> {
        let (vm, mut vcpus) = create(machine, saved.vcpus.len() as u8)?;
        timing.vm_created_ns = monotonic_ns();
        let shift = saved.vm.clock_shift();
        for (vcpu, state) in vcpus.iter_mut().zip(&saved.vcpus) {
            vcpu.restore(state, shift).map_err(MachineError::from)?;
        }
        vm.restore(&saved.vm).map_err(MachineError::from)?;
        machine.renew_generation()?;
        timing.restored_ns = monotonic_ns();
        Self::start(machine, vm, vcpus)
    }

    fn start(machine: &Machine, vm: Vm, vcpus: Vec<Vcpu>) -> Result<Self, VmmError> {
        let buses: Arc<dyn ExitBus + Send + Sync> = machine.buses.clone();
        let vcpus = VcpuSet::spawn(vcpus, &buses, machine.waker(), machine.mode().vcpu_slice())?;
        Ok(Self { vm, vcpus })
    }

    /// Stops all vCPUs and saves what KVM holds. With `patience`, parking may take no longer than that; it is tried a
    /// few times, with the vCPUs running in between. `last` is the last thing to do before the witness exists: the end
    /// of any helper thread. No RAM is written from its end until a fork.
    ///
    /// # Errors
    /// A vCPU does not stop, state can't be read, or `last` fails. The vCPUs are then to be resumed.
    #[expect(unsafe_code, reason = "vouching for a VM that stands still is this function's task")]
    pub fn quiesce<T>(
        &self,
        clock: &mut PauseClock,
        patience: Option<Duration>,
        last: impl FnOnce(&SavedKvm, &mut PauseClock) -> Result<T, String>,
    ) -> Result<(Quiesced, T), QuiesceError> {
        self.park(clock, patience)?;
        let vcpus = self.vcpus.take_saved()?;
        clock.quiesced();
        let vm = self.vm.save().map_err(MachineError::from)?;
        clock.saved();
        let saved = SavedKvm { mode: self.vm.mode(), vm, vcpus };
        let done = last(&saved, clock).map_err(QuiesceError::Last)?;
        // SAFETY: all vCPUs are parked, and only this thread, the event loop's, can resume them, which it
        // does after the witness is gone. It is here between two events and holds no lock. Other threads there
        // are none: what protects RAM ahead of a pause was joined by `last`, or is not there.
        Ok((unsafe { Quiesced::vouch(Arc::new(saved)) }, done))
    }

    fn park(&self, clock: &mut PauseClock, patience: Option<Duration>) -> Result<(), QuiesceError> {
        let Some(patience) = patience else {
            self.vcpus.request_park();
            return Ok(self.vcpus.wait_parked(PARK_TIMEOUT)?);
        };
        let mut attempt = 1;
        loop {
            clock.restart();
            self.vcpus.request_park();
            match self.vcpus.wait_parked(patience) {
                Err(VcpusError::Stuck(..)) if attempt < PARK_ATTEMPTS => {
                    self.vcpus.resume();
                    attempt += 1;
                }
                Err(VcpusError::Stuck(index, _)) => {
                    // At once: what `last` holds may take its time to be dropped.
                    self.vcpus.resume();
                    return Err(QuiesceError::Slow(index, patience));
                }
                other => return Ok(other?),
            }
        }
    }

    /// Ends the vCPU threads and the VM.
    ///
    /// # Errors
    /// A vCPU does not stop.
    pub fn stop(self) -> Result<(), VcpusError> {
        self.vcpus.stop()
    }

    /// In a forked child: lets go of the source's VM.
    pub fn abandon_in_child(self) {
        self.vm.abandon();
        self.vcpus.abandon_in_child();
    }

    /// Counters of KVM, which tell exits by kind, and of the remedies for PVM. Those that are zero are left out.
    pub fn metrics(&self) -> Metrics {
        let remedies = self.vm.pvm_metrics().map(|m| m.snapshot()).unwrap_or_default();
        let remedies = remedies.into_iter().map(|(name, value)| (format!("pvm.{name}"), value));
        let kvm = self.vcpus.counters().into_iter().filter(|(_, value)| *value > 0);
        remedies.chain(kvm.map(|(name, value)| (format!("kvm.{name}"), value))).collect()
    }

    /// Stops all vCPUs for good, and says where they were: for a guest that does not do what it should.
    pub fn stop_and_look(&self) -> String {
        self.vcpus.request_park();
        if let Err(error) = self.vcpus.wait_parked(PARK_TIMEOUT) {
            return error.to_string();
        }
        let views = self.vcpus.views();
        views
            .iter()
            .map(|(index, view)| format!("vCPU {index}: {view}"))
            .collect::<Vec<_>>()
            .join("; ")
    }
}

fn create(machine: &Machine, count: u8) -> Result<(Vm, Vec<Vcpu>), MachineError> {
    let mut vm = Vm::new(&machine.host, machine.mode(), &machine.slots(), count)?;
    vm.adopt(machine.wiring.line());
    let vcpus =
        (0..count).map(|i| vm.create_vcpu(i, machine.ram.guest())).collect::<Result<_, _>>()?;
    Ok((vm, vcpus))
}
