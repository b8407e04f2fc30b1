/* Kernel pages: user mode neither reads nor writes nor executes one, whatever was done before. */
#define _GNU_SOURCE
#include "probes.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define VSYSCALL 0xffffffffff600000ul

static int reads(uint64_t at) { return !TRY("movb (%0), %%al", "r"(at)); }
/* An or with 0, so that a write that works does no harm. */
static int writes(uint64_t at) { return !TRY("lock orb $0, (%0)", "r"(at)); }
/* Whether it gets as far as to execute something there: any other fault than at the jump itself. */
static int executes(uint64_t at) {
    return !TRY("call *%0", "r"(at)) || caught_signal != SIGSEGV || (caught_address != at && caught_address != 0);
}

static unsigned tried;

static void check_page(uint64_t at) {
    tried++;
    if (reads(at)) fail("user mode reads %#lx", at);
    if (caught_signal != SIGSEGV) fail("reading %#lx: signal %lu", at, caught_signal);
    if (writes(at)) fail("user mode writes %#lx", at);
    /* The page of the three old system calls may be executed, and then it answers. */
    if ((at & ~0xffful) != VSYSCALL && executes(at)) fail("user mode jumps to %#lx, signal %lu", at, caught_signal);
}

static void check_range(uint64_t from, uint64_t size, uint64_t step) {
    for (uint64_t at = from; at - from < size; at += step) check_page(at);
}

/* Pages of the addresses in a file of the kernel's: the first word of each line, or both ends of a range. */
static void check_listed(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) return;
    char line[512];
    uint64_t last = 0;
    while (fgets(line, sizeof line, file)) {
        uint64_t at = strtoull(line + (line[0] == '0' && line[1] == 'x' ? 2 : 0), NULL, 16);
        if (at < NOT_CANONICAL || (at & ~0xffful) == (last & ~0xffful)) continue;
        check_page(at);
        last = at;
    }
    fclose(file);
}

/* A spread of all of the kernel's half. */
static void check_spread(unsigned pages_of_each_slot) {
    for (uint64_t slot = 256; slot < 512; slot++)
        for (unsigned i = 0; i < pages_of_each_slot; i++) {
            uint64_t within = 0;
            MUST(getrandom(&within, sizeof within, 0) == sizeof within);
            check_page((0xffff000000000000ul | slot << 39) + (i == 0 ? 0 : within & 0x7ffffff000ul));
        }
}

static void check_places(uint64_t coarse) {
    check_range(0xffffffff80000000ul, 64 << 20, coarse << 16); /* text, data, bss, and what lies around them */
    check_range(DIRECT_MAP, 512 << 20, coarse << 18);          /* RAM: all that the kernel has, per-CPU areas too */
    check_range(DIRECT_MAP + (16 << 20), 16 << 20, coarse << 14);
    check_range(0xffffc90000000000ul, 16 << 20, coarse << 14); /* vmalloc: stacks */
    check_range(0xffffea0000000000ul, 8 << 20, coarse << 16);  /* struct page */
    check_range(0xfffffe0000000000ul, 1 << 20, coarse << 12);  /* cpu_entry_area: IDT, GDT, TSS, entry stacks */
    check_range(0xffffffffff200000ul, 0xe00000, coarse << 13); /* fixmap: local APIC, early mappings, vsyscall */
    check_range(0xffffffffc0000000ul, 16 << 20, coarse << 18); /* modules */
    check_range(0xffff880000000000ul, 1 << 20, coarse << 14);  /* LDTs under page table isolation */
    check_range(0xffffff0000000000ul, 1 << 20, coarse << 14);  /* espfix stacks */
}

static void scan(void) {
    catch_faults();
    check_places(1);
    check_listed("/proc/kallsyms");
    check_listed("/proc/vmallocinfo");
    check_spread(4);
    MUST(tried > 5000);
}

void scan_kernel(void) {
    catch_faults();
    check_places(8);
    check_spread(1);
}

static void after_fork(void) {
    pid_t pid = fork();
    MUST(pid >= 0);
    scan_kernel();
    if (pid == 0) _exit(0);
    int status;
    MUST(waitpid(pid, &status, 0) == pid && status == 0);
}

static void after_exec(void) {
    execl("/proc/self/exe", "probes", "scan", NULL);
    fail("exec: errno %d", errno);
}

/* A tracer sees the child's signals first, and passes them on. It reaches no kernel page through the child either. */
static void under_ptrace(void) {
    pid_t pid = fork();
    MUST(pid >= 0);
    if (pid == 0) {
        MUST(!ptrace(PTRACE_TRACEME, 0, NULL, NULL));
        raise(SIGSTOP);
        scan_kernel();
        _exit(0);
    }
    int status;
    MUST(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
    const uint64_t places[] = {KERNEL_TEXT, DIRECT_MAP + 0x1000000, 0xfffffe0000000000ul, VSYSCALL, NOT_CANONICAL};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        errno = 0;
        long word = ptrace(PTRACE_PEEKDATA, pid, (void *)places[i], NULL);
        if (places[i] != VSYSCALL) MUST(word == -1 && errno);
        MUST(ptrace(PTRACE_POKEDATA, pid, (void *)places[i], (void *)0x90) == -1);
    }
    int signal = 0;
    while (!ptrace(PTRACE_CONT, pid, NULL, (void *)(long)signal)) {
        MUST(waitpid(pid, &status, 0) == pid);
        if (!WIFSTOPPED(status)) break;
        signal = WSTOPSIG(status);
    }
    MUST(status == 0);
}

/* A huge page is mapped, split by a change of rights, and half of it unmapped: what is gone is gone. */
static void after_a_huge_page(void) {
    const size_t huge = 2 << 20;
    char *room = mmap(NULL, 3 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(room != MAP_FAILED);
    char *page = (char *)(((uint64_t)room + huge - 1) & ~(huge - 1));
    madvise(page, huge, MADV_HUGEPAGE); /* a kernel without huge pages has the rest to show */
    memset(page, 0x5a, huge);
    MUST(!mprotect(page + huge / 4, 4096, PROT_READ));
    MUST(!munmap(page + huge / 2, huge / 2));
    catch_faults();
    for (size_t at = 0; at < huge; at += 4096) {
        uint64_t address = (uint64_t)page + at;
        MUST(reads(address) == (at < huge / 2));
        MUST(writes(address) == (at < huge / 2 && at != huge / 4));
        MUST(!executes(address));
        MUST(at >= huge / 2 || page[at] == 0x5a);
    }
    MUST(!munmap(room, 3 * huge));
    MUST(!reads((uint64_t)page));
    scan_kernel();
}

/* Without SMAP, nothing but the kernel's own checks keeps a system call off kernel addresses. */
static void by_system_calls(void) {
    int zero = open("/dev/zero", O_RDWR), pipes[2];
    MUST(zero >= 0 && !pipe(pipes) && write(pipes[1], "12345678", 8) == 8);
    char buffer[8];
    const uint64_t places[] = {KERNEL_TEXT, KERNEL_TEXT + 0xc00000, DIRECT_MAP + 0x1000000, 0xffffc90000000000ul,
                               0xfffffe0000000000ul, BEYOND_USER, NOT_CANONICAL, ~0ul, BEYOND_USER - 4};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        void *at = (void *)places[i];
        struct iovec mine = {buffer, 8}, theirs = {at, 8};
        MUST(raw_syscall(SYS_write, pipes[1], (long)at, 8) == -EFAULT);
        MUST(raw_syscall(SYS_read, pipes[0], (long)at, 8) == -EFAULT);
        MUST(raw_syscall(SYS_read, zero, (long)at, 8) == -EFAULT);
        MUST(raw_syscall(SYS_clock_gettime, CLOCK_REALTIME_COARSE, (long)at, 0) == -EFAULT);
        MUST(raw_syscall(SYS_open, (long)at, O_RDONLY, 0) == -EFAULT);
        MUST(raw_syscall(SYS_arch_prctl, 0x1004, (long)at, 0) == -EFAULT);
        MUST(process_vm_readv(getpid(), &mine, 1, &theirs, 1, 0) < 8);
        MUST(process_vm_writev(getpid(), &mine, 1, &theirs, 1, 0) < 8);
        MUST(mmap((void *)(places[i] & ~0xffful), 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
                 MAP_FAILED || places[i] == BEYOND_USER - 4);
        MUST(mprotect((void *)(places[i] & ~0xffful), 4096, PROT_READ | PROT_WRITE) || places[i] == BEYOND_USER - 4);
        /* Bases of segments are user addresses. */
        if (places[i] > BEYOND_USER) {
            MUST(raw_syscall(SYS_arch_prctl, 0x1001, (long)at, 0) == -EPERM);
            MUST(raw_syscall(SYS_arch_prctl, 0x1002, (long)at, 0) == -EPERM);
        }
    }
}

/* time(2) at its old address: it answers right, or is not there. */
static void vsyscall(void) {
    catch_faults();
    MUST(!writes(VSYSCALL));
    time_t before = time(NULL), told = 0;
    if (TRY("call *%0", "r"(VSYSCALL + 0x400), "D"(&told))) return;
    MUST(told >= before - 1 && told <= time(NULL) + 1);
}

void memory_probes(void) {
    static const struct probe probes[] = {
        {"a scan of the kernel's half", FINE, scan},
        {"the same after a fork", FINE, after_fork},
        {"the same after an exec", FINE, after_exec},
        {"the same under ptrace", FINE, under_ptrace},
        {"the same after a huge page", FINE, after_a_huge_page},
        {"kernel addresses for system calls", FINE, by_system_calls},
        {"the vsyscall page", FINE, vsyscall},
    };
    RUN(probes);
}
