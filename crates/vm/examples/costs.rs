//! Prints what each step of making a VM costs on this host, without booting anything.

#![allow(clippy::print_stdout, clippy::expect_used)]

use std::time::Instant;

use forkd_vm::boot::{BootEntry, Protocol};
use forkd_vm::{GuestMode, Host, MemSlot, Vm};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

fn main() {
    let host = Host::open().expect("KVM");
    let mode = if host.is_pvm() { GuestMode::PvmEmulated } else { GuestMode::Hardware };
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 512 << 20)]).expect("memory");
    let region = ram.iter().next().expect("one region");
    let slot = MemSlot {
        slot: 0,
        gpa: 0,
        len: region.len(),
        host_addr: region.get_host_address(MemoryRegionAddress(0)).expect("mapped") as u64,
        read_only: false,
    };
    let names = [
        "VM, slots, irqchip",
        "vCPU",
        "configure",
        "save vCPU",
        "save VM",
        "restore vCPU",
        "restore VM",
    ];
    let mut times = vec![Vec::new(); names.len()];
    for _ in 0..50 {
        let mut start = Instant::now();
        let mut step = 0;
        let mut lap = || {
            times[step].push(start.elapsed().as_secs_f64() * 1e6);
            start = Instant::now();
            step += 1;
        };
        let vm = Vm::new(&host, mode, &[slot], 1).expect("VM");
        lap();
        let mut vcpu = vm.create_vcpu(0, &ram).expect("vCPU");
        lap();
        let entry = BootEntry { protocol: Protocol::Linux64, rip: 0x100_0000, control: None };
        vcpu.configure_boot(&entry).expect("configure");
        lap();
        let state = vcpu.save().expect("save");
        lap();
        let vm_state = vm.save().expect("save");
        lap();
        vcpu.restore(&state, vm_state.clock_shift()).expect("restore");
        lap();
        vm.restore(&vm_state).expect("restore");
        lap();
        if times[0].len() == 1 {
            println!("{} MSRs, {} CPUID entries", state.msrs.len(), state.cpuid.len());
            for (i, v) in &state.msrs {
                print!("{i:x}={v:x} ");
            }
            println!();
        }
    }
    for (name, mut us) in names.iter().zip(times) {
        us.sort_by(f64::total_cmp);
        println!("{name}: p50 {:.0} us, max {:.0} us", us[us.len() / 2], us[us.len() - 1]);
    }
}
