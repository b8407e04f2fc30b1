/* Single steps and debuggers. */
#define _GNU_SOURCE
#include "probes.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile int traps;
static void count(int signal) { (void)signal, traps++; }

static void steps_over_code_and_system_calls(void) {
    signal(SIGTRAP, count);
    set_flags(TF);
    for (volatile int i = 0; i < 100; i++);
    long pid = raw_syscall(SYS_getpid, 0, 0, 0), parent = raw_syscall(SYS_getppid, 0, 0, 0);
    clear_flags(TF);
    int seen = traps;
    for (volatile int i = 0; i < 100; i++);
    MUST(seen > 300 && traps == seen && pid == getpid() && parent == getppid());
}

static void steps_over_page_faults(void) {
    volatile char *pages = mmap(NULL, 8 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(pages != MAP_FAILED);
    signal(SIGTRAP, count);
    set_flags(TF);
    for (int i = 0; i < 8; i++) pages[i * 4096] = i;
    clear_flags(TF);
    int seen = traps;
    for (int i = 0; i < 8; i++) MUST(pages[i * 4096] == i);
    MUST(seen >= 8 && traps == seen);
}

static void steps_over_a_fault(void) {
    catch_faults();
    /* The step is the first thing that comes; the handler clears TF. */
    int faulted = TRY("pushfq; orq $0x100, (%%rsp); popfq; nop; movb (%0), %%al", "r"(KERNEL_TEXT));
    MUST(faulted && caught_signal == SIGTRAP);
}

/* MOV SS holds a debug exception back until after INT3, which once led into kernels with a user's GS. */
static void mov_ss_and_int3(void) {
    asm volatile("mov %0, %%ss\n\tint3" : : "r"(0x2b));
}
static void step_over_mov_ss_and_syscall(void) {
    signal(SIGTRAP, count);
    set_flags(TF);
    asm volatile("mov %%ss, %%edx\n\tmov %%edx, %%ss\n\tsyscall" : : "a"(SYS_getpid) : "rcx", "rdx", "r11", "memory");
    clear_flags(TF);
    MUST(traps > 0);
}
static void step_over_mov_ss_and_int(void) {
    set_flags(TF);
    asm volatile("mov %%ss, %%edx\n\tmov %%edx, %%ss\n\tint $0x17" : : : "rdx", "memory");
}
static void step_over_mov_ss_and_fault(void) {
    set_flags(TF);
    asm volatile("mov %%ss, %%edx\n\tmov %%edx, %%ss\n\tmovb (%0), %%al" : : "r"(KERNEL_TEXT) : "rax", "rdx", "memory");
}

/* A child that stops at once, then works a little, and ends with status 5. */
static pid_t traced(void) {
    pid_t pid = fork();
    MUST(pid >= 0);
    if (pid == 0) {
        MUST(!ptrace(PTRACE_TRACEME, 0, NULL, NULL));
        raise(SIGSTOP);
        volatile long sum = 0;
        for (int i = 0; i < 50; i++) sum += raw_syscall(SYS_getpid, 0, 0, 0);
        volatile char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        page[1] = 1;
        _exit(sum == 50l * getpid() ? 5 : 6);
    }
    int status;
    MUST(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
    return pid;
}

static void ptrace_steps(void) {
    pid_t pid = traced();
    int status, steps = 0;
    for (; steps < 100000; steps++) {
        MUST(!ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL));
        MUST(waitpid(pid, &status, 0) == pid);
        if (!WIFSTOPPED(status)) break;
        MUST(WSTOPSIG(status) == SIGTRAP);
    }
    MUST(steps > 500 && WIFEXITED(status) && WEXITSTATUS(status) == 5);
}

static void ptrace_stops_at_system_calls(void) {
    pid_t pid = traced();
    int status, stops = 0;
    for (;; stops++) {
        MUST(!ptrace(PTRACE_SYSCALL, pid, NULL, NULL));
        MUST(waitpid(pid, &status, 0) == pid);
        if (!WIFSTOPPED(status)) break;
    }
    MUST(stops > 100 && WIFEXITED(status) && WEXITSTATUS(status) == 5);
}

/* Registers that no process may have are refused, or are this process's end. */
static void ptrace_registers(void) {
    const struct {
        size_t offset;
        uint64_t value;
    } bad[] = {
        {offsetof(struct user_regs_struct, rip), NOT_CANONICAL},
        {offsetof(struct user_regs_struct, rip), KERNEL_TEXT},
        {offsetof(struct user_regs_struct, rip), BEYOND_USER},
        {offsetof(struct user_regs_struct, cs), 0x10},
        {offsetof(struct user_regs_struct, cs), 0},
        {offsetof(struct user_regs_struct, cs), 0x23},
        {offsetof(struct user_regs_struct, cs), 0xfff3},
        {offsetof(struct user_regs_struct, ss), 0x18},
        {offsetof(struct user_regs_struct, ss), 0},
        {offsetof(struct user_regs_struct, ss), 0x7b},
        {offsetof(struct user_regs_struct, rsp), NOT_CANONICAL},
        {offsetof(struct user_regs_struct, rsp), KERNEL_TEXT},
        {offsetof(struct user_regs_struct, fs_base), NOT_CANONICAL},
        {offsetof(struct user_regs_struct, fs_base), DIRECT_MAP},
        {offsetof(struct user_regs_struct, gs_base), NOT_CANONICAL},
        {offsetof(struct user_regs_struct, gs_base), DIRECT_MAP},
        {offsetof(struct user_regs_struct, gs), 0x10},
        {offsetof(struct user_regs_struct, fs), 0x7b},
        {offsetof(struct user_regs_struct, eflags), ~0ul},
        {offsetof(struct user_regs_struct, eflags), 0},
        {offsetof(struct user_regs_struct, orig_rax), ~0ul},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        pid_t pid = traced();
        struct user_regs_struct registers;
        MUST(!ptrace(PTRACE_GETREGS, pid, NULL, &registers));
        *(uint64_t *)((char *)&registers + bad[i].offset) = bad[i].value;
        ptrace(PTRACE_SETREGS, pid, NULL, &registers);
        MUST(!ptrace(PTRACE_CONT, pid, NULL, NULL));
        int status;
        MUST(waitpid(pid, &status, 0) == pid);
        if (!WIFSTOPPED(status)) {
            MUST(WIFEXITED(status) && WEXITSTATUS(status) == 5);
            continue;
        }
        int signal = WSTOPSIG(status);
        if (signal != SIGSEGV && signal != SIGBUS && signal != SIGTRAP && signal != SIGILL)
            fail("register at %zu as %#lx: signal %d", bad[i].offset, bad[i].value, signal);
        kill(pid, SIGKILL);
        MUST(waitpid(pid, &status, 0) == pid);
    }
}

/* The kernel's addresses are refused for the debug registers. A watchpoint of one's own comes where it was set, or never:
 * PVM does not have them in user mode. */
static volatile long watched;
static void debug_registers(void) {
    const size_t registers = offsetof(struct user, u_debugreg);
    pid_t pid = fork();
    MUST(pid >= 0);
    if (pid == 0) {
        MUST(!ptrace(PTRACE_TRACEME, 0, NULL, NULL));
        raise(SIGSTOP);
        watched = 7;
        _exit(5);
    }
    int status;
    MUST(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
    MUST(ptrace(PTRACE_POKEUSER, pid, (void *)registers, (void *)KERNEL_TEXT) == -1);
    MUST(ptrace(PTRACE_POKEUSER, pid, (void *)registers, (void *)0xfffffe0000000000ul) == -1);
    /* Writes of 8 bytes: Intel SDM, volume 3, 18.2.4. */
    int set = !ptrace(PTRACE_POKEUSER, pid, (void *)registers, (void *)&watched) &&
              !ptrace(PTRACE_POKEUSER, pid, (void *)(registers + 7 * 8), (void *)0x90001ul);
    MUST(!ptrace(PTRACE_CONT, pid, NULL, NULL) && waitpid(pid, &status, 0) == pid);
    if (set && WIFSTOPPED(status)) {
        MUST(WSTOPSIG(status) == SIGTRAP);
        MUST(ptrace(PTRACE_PEEKDATA, pid, (void *)&watched, NULL) == 7);
        MUST(!ptrace(PTRACE_CONT, pid, NULL, NULL) && waitpid(pid, &status, 0) == pid);
    }
    MUST(WIFEXITED(status) && WEXITSTATUS(status) == 5);
}

void trace_probes(void) {
    static const struct probe probes[] = {
        {"single steps over code and system calls", FINE, steps_over_code_and_system_calls},
        {"single steps over page faults", FINE, steps_over_page_faults},
        {"a single step in front of a fault", FINE, steps_over_a_fault},
        {"mov ss; int3", TRAP, mov_ss_and_int3},
        {"a step over mov ss; syscall", FINE, step_over_mov_ss_and_syscall},
        {"a step over mov ss; int 0x17", SEGV | TRAP, step_over_mov_ss_and_int},
        {"a step over mov ss; a fault", SEGV | TRAP, step_over_mov_ss_and_fault},
        {"ptrace: single steps", FINE, ptrace_steps},
        {"ptrace: stops at system calls", FINE, ptrace_stops_at_system_calls},
        {"ptrace: registers that no process may have", FINE, ptrace_registers},
        {"ptrace: debug registers", FINE, debug_registers},
    };
    RUN(probes);
}
