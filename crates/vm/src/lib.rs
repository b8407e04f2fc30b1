//! KVM: host probe, VM, vCPU, boot protocol, and the remedies for PVM.
