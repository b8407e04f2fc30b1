//! vCPUs on this host's KVM, driven by a few bytes of machine code instead of a kernel.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use forkd_vm::boot::{BootEntry, Protocol};
use forkd_vm::clock::ClockShift;
use forkd_vm::pvm::native::{self, Choice, NotNative};
use forkd_vm::{
    Exit, ExitBus, GuestMode, Host, HostOptions, MemSlot, Vcpu, VcpuState, Vm, VmState,
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

const CODE: u64 = 0x10_0000;
/// Where the tests' page tables go: an identity map of the first GiB.
const PML4: u64 = forkd_vm::layout::BOOT_PML4;
/// Where guests that run natively on PVM have their VIF page.
const VIF: u64 = 0x20_0000;

/// Records the first hundred accesses and the last; reads give 0x5a.
#[derive(Default)]
struct Record {
    seen: Mutex<Vec<String>>,
    last: Mutex<String>,
    tell: Mutex<Option<Sender<()>>>,
}

impl Record {
    fn note(&self, text: String) {
        let mut seen = self.seen.lock().unwrap();
        if seen.len() < 100 {
            seen.push(text.clone());
        }
        *self.last.lock().unwrap() = text;
        if let Some(tell) = &*self.tell.lock().unwrap() {
            let _ = tell.send(());
        }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

impl ExitBus for Record {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(format!("in {port:#x} {}", data.len()));
        data.fill(0x5a);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.note(format!("out {port:#x} {data:02x?}"));
    }
    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        self.note(format!("read {addr:#x} {}", data.len()));
        data.fill(0x5a);
    }
    fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.note(format!("write {addr:#x} {data:02x?}"));
    }
}

fn machine(host: &Host, code: &[u8]) -> (GuestMemoryMmap, Vm, Vcpu) {
    machine_of(host, stock_mode(host), 3, code)
}

/// `rights` are the bits of page table entries.
fn machine_of(
    host: &Host,
    mode: GuestMode,
    rights: u64,
    code: &[u8],
) -> (GuestMemoryMmap, Vm, Vcpu) {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    ram.write_slice(code, GuestAddress(CODE)).unwrap();
    ram.write_obj((PML4 + 0x1000) | rights, GuestAddress(PML4)).unwrap();
    ram.write_obj((PML4 + 0x2000) | rights, GuestAddress(PML4 + 0x1000)).unwrap();
    // The fourth GiB too, as large pages need a directory: MMIO lies there.
    ram.write_obj((PML4 + 0x3000) | rights, GuestAddress(PML4 + 0x1018)).unwrap();
    for i in 0..512u64 {
        ram.write_obj((i << 21) | rights | 0x80, GuestAddress(PML4 + 0x2000 + i * 8)).unwrap();
        ram.write_obj((i << 21) | (3 << 30) | rights | 0x80, GuestAddress(PML4 + 0x3000 + i * 8))
            .unwrap();
    }
    let control = (mode == GuestMode::PvmNative).then_some(VIF | native::FEATURES);
    let vm = Vm::new(host, mode, &[slot(&ram)], 1).unwrap();
    let mut vcpu = vm.create_vcpu(0, &ram).unwrap();
    vcpu.configure_boot(&BootEntry { protocol: Protocol::Linux64, rip: CODE, control }).unwrap();
    (ram, vm, vcpu)
}

/// How a kernel that knows nothing of PVM runs here.
fn stock_mode(host: &Host) -> GuestMode {
    if host.is_pvm() { GuestMode::PvmEmulated } else { GuestMode::Hardware }
}

fn slot(ram: &GuestMemoryMmap) -> MemSlot {
    let region = ram.iter().next().unwrap();
    let host_addr = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
    MemSlot { slot: 0, gpa: 0, len: region.len(), host_addr, read_only: false }
}

/// Resets by the port that the tests' bus does not know; then loops.
const LOOP: [u8; 2] = [0xeb, 0xfe];

/// Runs until `count` accesses were seen, then kicks.
fn run_until(vcpu: &mut Vcpu, bus: &Record, count: usize) {
    let (send, receive) = channel();
    *bus.tell.lock().unwrap() = Some(send);
    let kick = vcpu.kick_handle();
    thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..count {
                receive.recv_timeout(Duration::from_secs(20)).expect("an access");
            }
            kick.kick();
        });
        assert_eq!(vcpu.run(bus).unwrap(), Exit::Kicked);
    });
}

#[test]
fn accesses_reach_the_bus_with_their_size_and_come_back() {
    let host = Host::open().unwrap();
    let mut code = vec![
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, // in al, dx
        0xee, // out dx, al
        0x66, 0xef, // out dx, ax
        0xbb, 0x00, 0x00, 0x00, 0xd0, // mov ebx, 0xd0000000
        0x8b, 0x03, // mov eax, [rbx]
        0x48, 0x89, 0x43, 0x08, // mov [rbx+8], rax
    ];
    code.extend(LOOP);
    let (_ram, _vm, mut vcpu) = machine(&host, &code);
    let bus = Record::default();
    run_until(&mut vcpu, &bus, 5);
    let expected = [
        "in 0x3f8 1",
        "out 0x3f8 [5a]",
        "out 0x3f8 [5a, 00]",
        "read 0xd0000000 4",
        "write 0xd0000008 [5a, 5a, 5a, 5a, 00, 00, 00, 00]",
    ];
    assert_eq!(bus.seen(), expected);
}

#[test]
fn string_output_arrives_element_by_element() {
    let host = Host::open().unwrap();
    let mut code = vec![
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xbe, 0x00, 0x00, 0x11, 0x00, // mov esi, 0x110000
        0xb9, 0x03, 0x00, 0x00, 0x00, // mov ecx, 3
        0xf3, 0x66, 0x6f, // rep outsw
    ];
    code.extend(LOOP);
    let (ram, _vm, mut vcpu) = machine(&host, &code);
    ram.write_slice(&[1, 2, 3, 4, 5, 6], GuestAddress(0x11_0000)).unwrap();
    let bus = Record::default();
    run_until(&mut vcpu, &bus, 3);
    assert_eq!(bus.seen(), ["out 0x3f8 [01, 02]", "out 0x3f8 [03, 04]", "out 0x3f8 [05, 06]"]);
}

#[test]
fn a_kick_before_run_is_not_lost_and_one_after_the_end_is_harmless() {
    let host = Host::open().unwrap();
    let (_ram, vm, mut vcpu) = machine(&host, &LOOP);
    let bus = Record::default();
    let kick = vcpu.kick_handle();
    kick.kick();
    assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked);
    for _ in 0..200 {
        let kick = kick.clone();
        let kicker = thread::spawn(move || kick.kick());
        assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked);
        kicker.join().unwrap();
    }
    drop(vcpu);
    kick.kick();
    drop(vm);
    kick.kick();
}

/// Counts in memory, and in a register that it writes out.
fn counter() -> Vec<u8> {
    let mut code = vec![
        0xbb, 0x00, 0x00, 0x11, 0x00, // mov ebx, 0x110000
        0x31, 0xc0, // xor eax, eax
        // next:
        0xff, 0xc0, // inc eax
        0x89, 0x03, // mov [rbx], eax
        0xe7, 0xf4, // out 0xf4, eax
    ];
    code.extend([0xeb, 0xf8]); // jmp next
    code
}

fn copy(ram: &GuestMemoryMmap) -> GuestMemoryMmap {
    let copy = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    let mut bytes = vec![0; 64 << 20];
    ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    copy.write_slice(&bytes, GuestAddress(0)).unwrap();
    copy
}

fn last_count(bus: &Record) -> u32 {
    let last = bus.last.lock().unwrap();
    let text = last.trim_start_matches("out 0xf4 [").trim_end_matches(']');
    let bytes: Vec<u8> = text.split(", ").map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
    u32::from_le_bytes(bytes.try_into().unwrap())
}

#[test]
fn saved_state_goes_on_in_a_new_vm_over_copied_memory_after_serialisation() {
    let host = Host::open().unwrap();
    let (ram, vm, mut vcpu) = machine(&host, &counter());
    let bus = Record::default();
    run_until(&mut vcpu, &bus, 10);
    let state = vcpu.save().unwrap();
    let vm_state = vm.save().unwrap();
    let before = last_count(&bus);

    let bytes = postcard::to_stdvec(&(&state, &vm_state)).unwrap();
    let (state, vm_state): (VcpuState, VmState) = postcard::from_bytes(&bytes).unwrap();
    let ram2 = copy(&ram);
    let vm2 = Vm::new(&host, stock_mode(&host), &[slot(&ram2)], 1).unwrap();
    let mut vcpu2 = vm2.create_vcpu(0, &ram2).unwrap();
    vcpu2.restore(&state, vm_state.clock_shift()).unwrap();
    vm2.restore(&vm_state).unwrap();
    // To the last byte, but for time.
    let again = vcpu2.save().unwrap();
    assert_eq!(again.regs, state.regs);
    assert_eq!(again.sregs, state.sregs);
    assert_eq!(again.xsave, state.xsave);
    assert_eq!(again.msrs, state.msrs);
    assert_eq!(again.lapic.regs, state.lapic.regs);

    let bus2 = Record::default();
    run_until(&mut vcpu2, &bus2, 1);
    let first = bus2.seen()[0].clone();
    let next = (before + 1).to_le_bytes();
    assert_eq!(first, format!("out 0xf4 {next:02x?}"), "the child's next access follows {before}");
    // And the source goes on by itself.
    let bus3 = Record::default();
    run_until(&mut vcpu, &bus3, 1);
    assert_eq!(bus3.seen()[0], first);
}

#[test]
fn state_that_does_not_fit_is_refused_with_its_reason() {
    let host = Host::open().unwrap();
    let (_ram, _vm, mut vcpu) = machine(&host, &LOOP);
    let good = vcpu.save().unwrap();
    let refuse = |vcpu: &mut Vcpu, change: fn(&mut VcpuState)| {
        let mut state = good.clone();
        change(&mut state);
        vcpu.restore(&state, ClockShift::NONE).unwrap_err().to_string()
    };
    let text = refuse(&mut vcpu, |s| s.index = 3);
    assert!(text.contains("it is vCPU 3's"), "{text}");
    let text = refuse(&mut vcpu, |s| s.xsave.truncate(100));
    assert!(text.contains("XSAVE area of 100 bytes"), "{text}");
    let text = refuse(&mut vcpu, |s| s.msrs.push((0xdead_beef, 7)));
    assert_eq!(text, "vCPU 0: MSR 0xdeadbeef cannot be set to 0x7");
    let text = refuse(&mut vcpu, |s| s.msrs = vec![(0x10, 0); 300]);
    assert!(text.contains("too many MSRs"), "{text}");
}

#[test]
fn saving_takes_far_less_than_a_millisecond() {
    let host = Host::open().unwrap();
    let (_ram, vm, mut vcpu) = machine(&host, &counter());
    run_until(&mut vcpu, &Record::default(), 1);
    let least = (0..50).map(|_| {
        let start = Instant::now();
        vcpu.save().unwrap();
        vm.save().unwrap();
        start.elapsed()
    });
    // The least of fifty is free of the neighbours' noise. Rebuilding waits for the kernel's other work, so
    // examples/boot.rs prints it instead.
    let least = least.min().unwrap();
    assert!(least < Duration::from_micros(300), "saving takes {least:?}");
}

/// Writes its TSC out, low half first, again and again.
fn tsc_teller() -> Vec<u8> {
    let mut code = vec![
        0x0f, 0x31, // rdtsc
        0xe7, 0xf4, // out 0xf4, eax
        0x89, 0xd0, // mov eax, edx
        0xe7, 0xf8, // out 0xf8, eax
    ];
    code.extend([0xeb, 0xf6]);
    code
}

/// The guest's TSC, and the host's just before and after.
fn told_tsc(vcpu: &mut Vcpu) -> (u64, u64, u64) {
    let bus = Record::default();
    let before = forkd_vm::clock::host_tsc();
    run_until(vcpu, &bus, 4);
    let after = forkd_vm::clock::host_tsc();
    let half = |port: &str| {
        let seen = bus.seen();
        let line = seen.iter().rev().skip(1).find(|l| l.starts_with(port)).unwrap().clone();
        let bytes: Vec<u8> = line[line.find('[').unwrap() + 1..line.len() - 1]
            .split(", ")
            .map(|b| u8::from_str_radix(b, 16).unwrap())
            .collect();
        u64::from(u32::from_le_bytes(bytes.try_into().unwrap()))
    };
    (half("out 0xf4") | half("out 0xf8") << 32, before, after)
}

#[test]
fn the_tsc_goes_on_where_it_was_or_is_the_hosts_on_pvm() {
    let host = Host::open().unwrap();
    let (ram, vm, mut vcpu) = machine(&host, &tsc_teller());
    let (told, before, after) = told_tsc(&mut vcpu);
    if host.is_pvm() {
        assert!((before..=after).contains(&told), "{before} {told} {after}");
    }
    let state = vcpu.save().unwrap();
    let vm_state = vm.save().unwrap();
    thread::sleep(Duration::from_millis(300));
    let vm2 = Vm::new(&host, stock_mode(&host), &[slot(&ram)], 1).unwrap();
    let mut vcpu2 = vm2.create_vcpu(0, &ram).unwrap();
    vcpu2.restore(&state, vm_state.clock_shift()).unwrap();
    let restored = Instant::now();
    vm2.restore(&vm_state).unwrap();
    let (told2, before, after) = told_tsc(&mut vcpu2);
    assert!(told2 > told, "the TSC never goes back");
    let passed = vm2.save().unwrap().clock_ns.checked_sub(vm_state.clock_ns);
    let passed = Duration::from_nanos(passed.expect("kvmclock never goes back"));
    assert!(passed < restored.elapsed(), "kvmclock went on by {passed:?} while nothing ran");
    if host.is_pvm() {
        assert!((before..=after).contains(&told2), "{before} {told2} {after}");
    } else {
        let slept = u64::from(state.tsc_khz) * 300;
        assert!(told2 - told < slept, "the guest does not see the time between save and restore");
    }
}

#[test]
fn the_command_line_fits_and_the_users_words_come_last() {
    for mode in [GuestMode::Hardware, GuestMode::PvmEmulated, GuestMode::PvmNative] {
        let line = forkd_vm::cmdline::build(mode, " foo=bar  ");
        assert!(line.ends_with(" foo=bar"), "{line}");
        assert!(line.len() < forkd_vm::layout::CMDLINE_MAX / 2, "{} bytes", line.len());
        assert_eq!(line.contains("clearcpuid="), mode.is_emulated(), "{line}");
    }
}

#[test]
fn an_interrupt_line_works_while_a_vm_is_connected_and_says_so_otherwise() {
    let host = Host::open().unwrap();
    let line = forkd_vm::IrqLine::unconnected();
    assert_eq!(line.pulse(5).unwrap_err().to_string(), "interrupt 5: no VM is connected");
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    let mut vm = Vm::new(&host, stock_mode(&host), &[slot(&ram)], 1).unwrap();
    vm.adopt(&line);
    let clone = line.clone();
    clone.pulse(5).unwrap();
    vm.irq_line().pulse(19).unwrap();
    let vm2 = {
        let mut vm2 = Vm::new(&host, stock_mode(&host), &[slot(&ram)], 1).unwrap();
        vm2.adopt(&line);
        vm2
    };
    drop(vm);
    line.pulse(5).unwrap();
    drop(vm2);
    assert!(line.pulse(5).is_err());
}

#[test]
fn impossible_vms_are_refused_with_the_reason() {
    let host = Host::open().unwrap();
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    let good = slot(&ram);
    let text = Vm::new(&host, stock_mode(&host), &[good], 0).unwrap_err().to_string();
    assert_eq!(text, "0 vCPUs: must be 1 to 16");
    let text = Vm::new(&host, stock_mode(&host), &[good], 17).unwrap_err().to_string();
    assert_eq!(text, "17 vCPUs: must be 1 to 16");
    let odd = MemSlot { slot: 7, gpa: 0x123, ..good };
    let text = Vm::new(&host, stock_mode(&host), &[good, odd], 1).unwrap_err().to_string();
    assert!(text.starts_with("memory slot 7 (0x4000000 bytes at guest address 0x123)"), "{text}");
}

#[test]
fn the_pvh_protocol_starts_in_32_bit_mode_without_paging() {
    let host = Host::open().unwrap();
    // mov eax, ebx; out 0xf4, eax; then, only right in 32-bit mode: inc eax; out; loop
    let mut code = vec![0x89, 0xd8, 0xe7, 0xf4, 0x40, 0xe7, 0xf4];
    code.extend(LOOP);
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    ram.write_slice(&code, GuestAddress(CODE)).unwrap();
    let vm = Vm::new(&host, stock_mode(&host), &[slot(&ram)], 1).unwrap();
    let mut vcpu = vm.create_vcpu(0, &ram).unwrap();
    vcpu.configure_boot(&BootEntry { protocol: Protocol::Pvh, rip: CODE, control: None }).unwrap();
    let bus = Record::default();
    run_until(&mut vcpu, &bus, 2);
    let start_info = forkd_vm::layout::PVH_START_INFO as u32;
    let expected =
        [start_info, start_info + 1].map(|n| format!("out 0xf4 {:02x?}", n.to_le_bytes()));
    assert_eq!(bus.seen(), expected);
}

/// One answer for a host, whatever it is; and the same one again, from the file.
#[test]
fn native_pvm_is_verified_in_good_time_and_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let memo = dir.path().join("pvm-probe");
    let options = HostOptions { memo: Some(memo.clone()), ..HostOptions::default() };
    let host = Host::open_with(options.clone()).unwrap();
    let begin = Instant::now();
    let answer = host.native_pvm();
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    let found = if answer.is_ok() { "native" } else { "differs" };
    match &answer {
        Err(NotNative::NotPvm) => assert!(!host.is_pvm() && !memo.exists()),
        _ => assert!(host.is_pvm() && std::fs::read_to_string(&memo).unwrap().contains(found)),
    }
    // Of the host's own word for it, if it gives one.
    if std::fs::read_to_string("/sys/module/kvm_pvm/parameters/pvm_native")
        .is_ok_and(|t| t.starts_with('Y'))
    {
        assert_eq!(answer, Ok(()));
    }
    let begin = Instant::now();
    assert_eq!(Host::open_with(options.clone()).unwrap().native_pvm(), answer);
    let again = begin.elapsed();
    assert!(again < Duration::from_millis(100), "{again:?}, and {took:?} at first");
    let off = HostOptions { pvm: Choice::Emulated, ..options };
    let refused = Host::open_with(off).unwrap().native_pvm();
    assert!(matches!(refused, Err(NotNative::SwitchedOff | NotNative::NotPvm)), "{refused:?}");
}

/// A hundred times over: what the probe leaves behind would show.
#[test]
fn the_probe_leaves_nothing_behind() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let probe = || drop(Host::open().unwrap().native_pvm());
    probe();
    // Other tests open descriptors meanwhile.
    let least = |n: usize| {
        (0..n)
            .map(|_| {
                probe();
                count()
            })
            .min()
            .unwrap()
    };
    let before = least(5);
    let after = least(50);
    assert!(after < before + 20, "{before} descriptors, then {after}");
}

/// A guest whose kernel mode runs natively, with pages of these rights; none where the host cannot.
fn native_machine(rights: u64, code: &[u8]) -> Option<(GuestMemoryMmap, Vm, Vcpu)> {
    let host = Host::open().unwrap();
    host.native_pvm().is_ok().then(|| machine_of(&host, GuestMode::PvmNative, rights, code))
}

#[test]
fn a_native_guest_is_saved_with_its_vif_page_and_goes_on_in_another_vm() {
    // inc eax; out 0xf4, eax; loop
    let code = [0xff, 0xc0, 0xe7, 0xf4, 0xeb, 0xfa];
    let Some((ram, vm, mut vcpu)) = native_machine(7, &code) else { return };
    run_until(&mut vcpu, &Record::default(), 3);
    let state = vcpu.save().unwrap();
    let vm_state = vm.save().unwrap();
    let control = state.msrs.iter().find(|(index, _)| *index == native::MSR_CONTROL);
    // A bit that always reads 1 may be added.
    let control = control.expect("is part of the state").1;
    assert_eq!(control & (native::VIF_MASK | native::FEATURES), VIF | native::FEATURES);
    let told = state.regs.rax;
    let host = Host::open().unwrap();
    let vm2 = Vm::new(&host, GuestMode::PvmNative, &[slot(&ram)], 1).unwrap();
    let mut vcpu2 = vm2.create_vcpu(0, &ram).unwrap();
    vcpu2.restore(&state, vm_state.clock_shift()).unwrap();
    vm2.restore(&vm_state).unwrap();
    let bus = Record::default();
    run_until(&mut vcpu2, &bus, 1);
    let value = (told + 1) as u32;
    let repeated = format!("out 0xf4 {:02x?}", (told as u32).to_le_bytes());
    let next = format!("out 0xf4 {:02x?}", value.to_le_bytes());
    let first = bus.seen()[0].clone();
    assert!(first == next || first == repeated, "{first} after {told:#x}");
    // Neither kind goes on as the other.
    let emulated = Vm::new(&host, GuestMode::PvmEmulated, &[slot(&ram)], 1).unwrap();
    let mut vcpu3 = emulated.create_vcpu(0, &ram).unwrap();
    let text = vcpu3.restore(&state, ClockShift::NONE).unwrap_err().to_string();
    assert!(text.contains("saved state does not fit"), "{text}");
    let mut other = state;
    other.msrs.retain(|(index, _)| *index != native::MSR_CONTROL);
    let text = vcpu2.restore(&other, ClockShift::NONE).unwrap_err().to_string();
    assert!(text.contains("did not run natively"), "{text}");
}

#[test]
fn what_the_host_cannot_do_in_native_mode_is_told_with_all_registers() {
    let Some((_ram, _vm, mut vcpu)) = native_machine(7, &[0xcd, 0x50]) else { return };
    let bus = Record::default();
    let text = vcpu.run(&bus).unwrap_err().to_string();
    for word in
        ["vCPU 0: KVM_EXIT_", "kernel mode, rip 0x100000 ", "cr3 0xa000", "bytes at rip cd 50"]
    {
        assert!(text.contains(word), "{word}: {text}");
    }
}

/// Kernel pages that are not the user's to the CPU: the host faults them in for ever.
#[test]
fn a_livelock_in_the_host_can_be_stopped_and_looked_at() {
    let Some((_ram, _vm, mut vcpu)) = native_machine(3, &LOOP) else { return };
    let kick = vcpu.kick_handle();
    let begin = Instant::now();
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(300));
            kick.kick();
        });
        vcpu.run(&Record::default())
    });
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    match result {
        Ok(Exit::Kicked) => {
            let view = vcpu.view().to_string();
            assert!(view.contains("kernel mode, rip 0x100000 "), "{view}");
        }
        // A host may give up by itself, too.
        Err(error) => assert!(error.to_string().contains("rip 0x100000 "), "{error}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn counters_tell_exits_by_kind_while_the_guest_runs_and_when_it_does_not() {
    let host = Host::open().unwrap();
    // out 0xf4, al; loop
    let (_ram, _vm, mut vcpu) = machine(&host, &[0xe6, 0xf4, 0xeb, 0xfc]);
    let kick = vcpu.kick_handle();
    let (send, receive) = channel();
    let bus = Record::default();
    *bus.tell.lock().unwrap() = Some(send);
    let counters = thread::scope(|scope| {
        let handle = kick.clone();
        let reader = scope.spawn(move || {
            for _ in 0..10 {
                receive.recv_timeout(Duration::from_secs(20)).expect("an access");
            }
            let counters = handle.counters(Duration::from_secs(20));
            handle.kick();
            counters
        });
        assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked);
        reader.join().unwrap()
    });
    // Linux 5.14 and later.
    let Some(counters) = counters else { return };
    let of = |name: &str, all: &[(String, u64)]| {
        all.iter().find(|(n, _)| n == name).map(|(_, value)| *value)
    };
    let running = of("exits", &counters).expect("every kernel counts exits");
    let stopped = kick.counters(Duration::ZERO).expect("they are open");
    assert!(of("exits", &stopped) >= Some(running));
    drop(vcpu);
    assert_eq!(kick.counters(Duration::ZERO), None, "the vCPU is gone");
    let (_ram, _vm, never_run) = machine(&host, &LOOP);
    assert!(never_run.kick_handle().counters(Duration::ZERO).is_some());
}
