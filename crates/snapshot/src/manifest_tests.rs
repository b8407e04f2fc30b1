use super::*;

fn platform() -> Platform {
    let cpu = CpuModel {
        vendor: "AuthenticAMD".into(),
        name: "AMD EPYC".into(),
        family: 25,
        model: 17,
        stepping: 1,
    };
    Platform { arch: "x86_64".into(), cpu, kvm: KvmFlavour::Pvm, page_size: 4096 }
}

fn manifest() -> Manifest {
    let small = SmallFile { bytes: 3, digest: Digest::of(b"abc") };
    let mut manifest = Manifest {
        format: FORMAT,
        root: Digest::ZERO,
        tag: "warm".into(),
        created_unix_ms: 1,
        forkd: "0.1.0".into(),
        platform: platform(),
        kernel: "k1".into(),
        image: ImageRef { digest: "i1".into(), tag: Some("py".into()) },
        vcpus: 1,
        mem_mib: 1,
        mode: Mode::Diff,
        parent: Some(Parent { tag: "base".into(), root: Digest::of(b"base") }),
        replaces: None,
        instant: None,
        state: small.clone(),
        extents: small,
        memory: PagedFile { bytes: 1 << 20, data_bytes: 4096, whole: false },
        disks: vec![],
    };
    manifest.root = manifest.root_of();
    manifest
}

fn read(text: &[u8]) -> Result<Manifest, SnapshotError> {
    Manifest::parse(text, Path::new("/s/warm/manifest.json"))
}

#[test]
fn any_flipped_bit_is_an_error_that_names_the_file() {
    let mut manifest = manifest();
    let text = manifest.seal();
    assert_eq!(read(&text).expect("sound"), manifest);
    for at in 0..text.len() {
        for bit in 0..8 {
            let mut flipped = text.clone();
            flipped[at] ^= 1 << bit;
            let error = read(&flipped).expect_err("flipped").to_string();
            assert!(error.contains(MANIFEST), "byte {at} bit {bit}: {error}");
        }
    }
}

#[test]
fn a_newer_format_is_refused_naming_both_even_if_nothing_else_is_known() {
    let error = read(br#"{"format": 7, "colour": "blue"}"#).expect_err("newer");
    assert!(matches!(error, SnapshotError::Format { found: 7, supported: 1, .. }));
    let text = error.to_string();
    assert!(text.contains("format 7") && text.contains("up to 1"), "{text}");
    assert!(matches!(read(br#"{"format": 0}"#), Err(SnapshotError::Damaged { .. })));
}

#[test]
fn a_host_that_differs_is_told_what_differs() {
    let manifest = manifest();
    let good =
        HostFacts { platform: platform(), kernels: vec!["k1".into()], images: vec!["i1".into()] };
    assert_eq!(check_host(&manifest, &good), Ok(()));
    let says = |host: &HostFacts| -> Vec<String> {
        let found = check_host(&manifest, host).expect_err("differs");
        found.iter().map(ToString::to_string).collect()
    };
    type Change = fn(&mut HostFacts);
    let cases: [(Change, &[&str]); 8] = [
        (|h| h.platform.arch = "aarch64".into(), &["architecture x86_64", "aarch64"]),
        (|h| h.platform.cpu.model = 18, &["CPU", "model 17", "model 18"]),
        (|h| h.platform.cpu.stepping = 2, &["CPU", "stepping 1", "stepping 2"]),
        (|h| h.platform.cpu.vendor = "GenuineIntel".into(), &["CPU", "GenuineIntel"]),
        (|h| h.platform.kvm = KvmFlavour::Vmx, &["KVM flavour pvm", "vmx"]),
        (|h| h.platform.page_size = 16384, &["page size 4096", "16384"]),
        (|h| h.kernels.clear(), &["kernel k1"]),
        (|h| h.images.clear(), &["root image i1 (py)"]),
    ];
    for (change, expected) in cases {
        let mut host = good.clone();
        change(&mut host);
        let said = says(&host);
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(expected.iter().all(|word| said[0].contains(word)), "{said:?}");
    }
    let mut other = good;
    other.platform.kvm = KvmFlavour::Svm;
    other.images.clear();
    assert_eq!(says(&other).len(), 2);
}

#[test]
fn of_the_two_kinds_of_pvm_one_runs_on_both() {
    use KvmFlavour::{Pvm, PvmNative, Svm, Vmx};
    for (taken, host, runs) in [
        (Pvm, Pvm, true),
        (Pvm, PvmNative, true),
        (PvmNative, PvmNative, true),
        (PvmNative, Pvm, false),
        (PvmNative, Vmx, false),
        (Pvm, Svm, false),
        (Vmx, PvmNative, false),
        (Vmx, Vmx, true),
    ] {
        let mut manifest = manifest();
        manifest.platform.kvm = taken;
        let kvm = host;
        let host = HostFacts {
            platform: Platform { kvm, ..platform() },
            kernels: vec!["k1".into()],
            images: vec!["i1".into()],
        };
        match check_host(&manifest, &host) {
            Ok(()) => assert!(runs, "{taken} on {kvm}"),
            Err(found) => {
                assert!(!runs && found.len() == 1, "{taken} on {kvm}");
                let text = found[0].to_string();
                assert!(text.contains(&taken.to_string()), "{text}");
                assert!(text.contains(&format!("this host has {kvm}")), "{text}");
            }
        }
        let mut text = manifest.seal();
        assert_eq!(read(&text).expect("sound").platform.kvm, taken);
        text.retain(|b| *b != b'\n');
        let text = String::from_utf8(text).expect("JSON");
        assert!(text.contains(&format!("\"kvm\": \"{taken}\"")), "{text}");
    }
}

#[test]
fn cpuinfo_is_read() {
    let text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 106\n\
                model name\t: Intel(R) Xeon(R): x\nstepping\t: 6\n\nprocessor\t: 1\nmodel\t: 9\n";
    let cpu = CpuModel::parse(text);
    assert_eq!(cpu.to_string(), "Intel(R) Xeon(R): x (GenuineIntel family 6 model 106 stepping 6)");
    assert!(!CpuModel::of_host().expect("this host's").vendor.is_empty());
}
