/* What is a task's own when CPUs go from one to the next: bases of FS and GS; and the number of its CPU. */
#define _GNU_SOURCE
#include "probes.h"

#include <asm/prctl.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define SWITCHES 10000

static uint64_t word_at_gs(void) {
    uint64_t word;
    asm volatile("mov %%gs:0, %0" : "=r"(word));
    return word;
}
static uint64_t word_at_fs(void) {
    uint64_t word;
    asm volatile("mov %%fs:0, %0" : "=r"(word)); /* the C library's pointer to itself: the base */
    return word;
}

/* Sends a byte to the other and waits for its answer, so that each turn is a switch. */
static void take_turns(int in, int out, int first, uint64_t *mine) {
    char byte = 0;
    const uint64_t fs = word_at_fs();
    MUST(!raw_syscall(SYS_arch_prctl, ARCH_SET_GS, (long)mine, 0));
    for (int i = 0; i < SWITCHES; i++) {
        if (first || i) MUST(write(out, &byte, 1) == 1);
        MUST(read(in, &byte, 1) == 1);
        if (word_at_gs() != *mine) fail("GS leads to %#lx instead of %#lx after %d turns", word_at_gs(), *mine, i);
        if (word_at_fs() != fs) fail("FS leads to %#lx instead of %#lx after %d turns", word_at_fs(), fs, i);
        uint64_t base;
        if (i % 100 == 0) MUST(!raw_syscall(SYS_arch_prctl, ARCH_GET_GS, (long)&base, 0) && base == (uint64_t)mine);
        if (i % 100 == 1) MUST(!raw_syscall(SYS_arch_prctl, ARCH_GET_FS, (long)&base, 0) && base == fs);
    }
    if (!first) MUST(write(out, &byte, 1) == 1);
}

static void bases_of_two_processes(void) {
    static uint64_t words[2] = {0x1111, 0x2222};
    int there[2], back[2];
    MUST(!pipe(there) && !pipe(back));
    bind_to(0);
    pid_t pid = fork();
    MUST(pid >= 0);
    if (pid == 0) {
        /* Another address as well as another word there. */
        static uint64_t room[1024];
        room[1000] = words[1];
        take_turns(there[0], back[1], 0, room + 1000);
        _exit(0);
    }
    take_turns(back[0], there[1], 1, words);
    int status;
    MUST(waitpid(pid, &status, 0) == pid && status == 0);
}

/* One process has a base in GS, the other none: it must not inherit the first's. */
static void no_base_beside_a_base(void) {
    static uint64_t word = 0x3333;
    bind_to(0);
    pid_t pid = fork();
    MUST(pid >= 0);
    if (pid) MUST(!raw_syscall(SYS_arch_prctl, ARCH_SET_GS, (long)&word, 0));
    for (int i = 0; i < 1000; i++) {
        uint64_t base;
        raw_syscall(SYS_sched_yield, 0, 0, 0);
        MUST(!raw_syscall(SYS_arch_prctl, ARCH_GET_GS, (long)&base, 0) && base == (pid ? (uint64_t)&word : 0));
        if (pid) MUST(word_at_gs() == 0x3333);
    }
    if (pid == 0) {
        catch_faults();
        MUST(TRY("mov %%gs:0, %%rax", "r"(0)));
        _exit(0);
    }
    int status;
    MUST(waitpid(pid, &status, 0) == pid && status == 0);
}

/* A base that user mode sets by itself where the CPU lets it; in a child of fork as well. */
static void base_of_a_child(void) {
    static uint64_t words[2] = {0x4444, 0x5555};
    MUST(!raw_syscall(SYS_arch_prctl, ARCH_SET_GS, (long)&words[0], 0));
    pid_t pid = fork();
    MUST(pid >= 0 && word_at_gs() == 0x4444);
    if (pid == 0) MUST(!raw_syscall(SYS_arch_prctl, ARCH_SET_GS, (long)&words[1], 0));
    for (int i = 0; i < 200; i++) {
        raw_syscall(SYS_sched_yield, 0, 0, 0);
        MUST(word_at_gs() == words[pid == 0]);
    }
    if (pid == 0) _exit(0);
    int status;
    MUST(waitpid(pid, &status, 0) == pid && status == 0);
}

static int has_flag(const char *name) {
    static char text[1 << 16];
    FILE *file = fopen("/proc/cpuinfo", "r");
    MUST(file);
    size_t size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = 0;
    char *flags = strstr(text, "\nflags"), *end = flags ? strchr(flags + 1, '\n') : NULL;
    MUST(end);
    *end = 0;
    char word[32];
    snprintf(word, sizeof word, " %s ", name);
    *end = ' ', end[1] = 0;
    return strstr(flags, word) != NULL;
}

static void numbers_of_cpus(void) {
    const int cpus = sysconf(_SC_NPROCESSORS_ONLN), rdtscp = has_flag("rdtscp"), rdpid = has_flag("rdpid");
    for (int round = 0; round < 200; round++) {
        unsigned cpu = round % cpus, by_vdso = 99, by_call = 99, by_tscp = cpu, node = 99;
        uint64_t by_pid = cpu;
        bind_to(cpu);
        MUST(!getcpu(&by_vdso, &node) && node == 0);
        MUST(!raw_syscall(SYS_getcpu, (long)&by_call, 0, 0));
        if (rdtscp) asm volatile("rdtscp" : "=c"(by_tscp) : : "rax", "rdx");
        if (rdpid) asm volatile("rdpid %0" : "=r"(by_pid));
        if (by_vdso != cpu || by_call != cpu || (by_tscp & 0xfff) != cpu || (by_pid & 0xfff) != cpu)
            fail("CPU %u is %u by the vDSO, %u by the system call, %u by RDTSCP, %lu by RDPID", cpu, by_vdso, by_call,
                 by_tscp & 0xfff, by_pid & 0xfff);
    }
}

void task_probes(void) {
    static const struct probe probes[] = {
        {"bases of FS and GS of two processes", FINE, bases_of_two_processes},
        {"a process with a base in GS and one without", FINE, no_base_beside_a_base},
        {"base of GS of a child", FINE, base_of_a_child},
        {"the number of each CPU", FINE, numbers_of_cpus},
    };
    RUN(probes);
}
