/* Flags and stack pointers that user mode may have when the kernel is entered. Page faults, system calls and signals with
 * them: nothing of it reaches the kernel, and it is there again afterwards. */
#define _GNU_SOURCE
#include "probes.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile int came;
static void count(int signal) { (void)signal, came++; }

static uint64_t flags(void) {
    uint64_t value;
    asm volatile("pushfq; pop %0" : "=r"(value));
    return value;
}

static char *fresh_pages(void) {
    char *pages = mmap(NULL, 64 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(pages != MAP_FAILED);
    return pages;
}

/* The kernel works on bytes that are aligned to nothing; with AC it must not stumble over its own code. */
static void ac_and_system_calls(void) {
    int ends[2];
    char *bytes = malloc(256);
    MUST(bytes && !pipe(ends));
    struct iovec { void *base; size_t length; } parts = {bytes + 3, 7};
    set_flags(AC);
    long wrote = raw_syscall(SYS_write, ends[1], (long)bytes + 1, 7), got = raw_syscall(SYS_readv, ends[0], (long)&parts, 1);
    long told = raw_syscall(SYS_clock_gettime, CLOCK_MONOTONIC_RAW, (long)bytes + 5, 0);
    int kept = (flags() & AC) != 0;
    clear_flags(AC);
    MUST(wrote == 7 && got == 7 && told == 0 && kept);
}

static void ac_and_page_faults(void) {
    volatile char *pages = fresh_pages();
    set_flags(AC);
    for (int i = 0; i < 64; i++) pages[i * 4096 + 1] = 1;
    int kept = (flags() & AC) != 0;
    clear_flags(AC);
    MUST(kept);
}

static void ac_and_a_misaligned_access(void) {
    char bytes[16] __attribute__((aligned(8)));
    set_flags(AC);
    asm volatile("movl $1, 1(%0)" : : "r"(bytes) : "memory");
    clear_flags(AC);
}

static void ac_and_interrupts(void) {
    struct itimerval soon = {{0, 1000}, {0, 1000}};
    signal(SIGALRM, count);
    MUST(!setitimer(ITIMER_REAL, &soon, NULL));
    set_flags(AC);
    while (came < 50) asm volatile("pause");
    int kept = (flags() & AC) != 0;
    clear_flags(AC);
    MUST(kept);
}

static void ac_and_a_fork(void) {
    set_flags(AC);
    long pid = raw_syscall(SYS_fork, 0, 0, 0);
    if (pid == 0) raw_syscall(SYS_exit, flags() & AC ? 0 : 1, 0, 0);
    clear_flags(AC);
    int status;
    MUST(waitpid(pid, &status, 0) == pid && status == 0);
}

static void nt_df_and_system_calls(void) {
    volatile char *pages = fresh_pages();
    struct timespec nap = {0, 1000000};
    set_flags(NT | DF);
    long pid = raw_syscall(SYS_getpid, 0, 0, 0);
    raw_syscall(SYS_nanosleep, (long)&nap, 0, 0);
    for (int i = 0; i < 64; i++) pages[i * 4096] = 1;
    int kept = (flags() & DF) != 0;
    clear_flags(NT | DF);
    MUST(pid == getpid() && kept);
}

static void nt_df_and_a_signal(void) {
    signal(SIGUSR1, count);
    long pid = getpid();
    set_flags(NT | DF);
    raw_syscall(SYS_kill, pid, SIGUSR1, 0);
    clear_flags(NT | DF);
    MUST(came == 1);
}

/* The number of getpid, with another stack pointer; right answer, and the stack pointer as it was. */
static void system_call_with_stack(uint64_t stack) {
    uint64_t after;
    long pid;
    asm volatile("mov %%rsp, %%r15\n\t"
                 "mov %2, %%rsp\n\t"
                 "syscall\n\t"
                 "mov %%rsp, %1\n\t"
                 "mov %%r15, %%rsp"
                 : "=a"(pid), "=b"(after)
                 : "D"(stack), "a"(SYS_getpid)
                 : "rcx", "r11", "r15", "memory");
    if (pid != getpid() || after != stack) fail("with RSP %#lx: result %ld, then RSP %#lx", stack, pid, after);
}

static void system_calls_with_any_stack(void) {
    static const uint64_t stacks[] = {0, 1, 0x1000, BEYOND_USER - 8, KERNEL_TEXT, DIRECT_MAP, 0xfffffe0000001000ul, ~0ul};
    for (int round = 0; round < 100; round++)
        for (size_t i = 0; i < sizeof stacks / sizeof *stacks; i++) system_call_with_stack(stacks[i]);
}

/* The CPU has nothing against these, but PVM's return to user mode may. */
static void system_call_with_a_stack_behind_user_addresses(void) { system_call_with_stack(BEYOND_USER); }
static void system_call_with_a_stack_not_canonical(void) { system_call_with_stack(NOT_CANONICAL); }

/* An interrupt finds it as well: a timer's, for a hundred milliseconds. There is no signal, so no frame is put there. */
static void interrupts_with_a_stack_in_the_kernel(void) {
    asm volatile("mov %%rsp, %%r15\n\t"
                 "mov %0, %%rsp\n\t"
                 "mov $300000000, %%ecx\n\t"
                 "1: dec %%ecx\n\t"
                 "jnz 1b\n\t"
                 "mov %%r15, %%rsp"
                 :
                 : "r"(KERNEL_TEXT)
                 : "rcx", "r15", "cc");
}

static void ud2_with_a_stack_in_the_kernel(void) { asm volatile("mov %0, %%rsp\n\tud2" : : "r"(KERNEL_TEXT)); }
static void push_with_a_stack_in_the_kernel(void) { asm volatile("mov %0, %%rsp\n\tpush %%rax" : : "r"(KERNEL_TEXT)); }
static void push_with_a_stack_not_canonical(void) { asm volatile("mov %0, %%rsp\n\tpush %%rax" : : "r"(NOT_CANONICAL)); }

/* SYSCALL as the last bytes of user addresses: it would return to an address that is not canonical. */
static void system_call_at_the_end(void) {
    unsigned char *page = mmap((void *)(BEYOND_USER - 4096), 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (page == MAP_FAILED) raise(SIGSEGV); /* Linux does not give this page, for that reason */
    page[4094] = 0x0f, page[4095] = 0x05;
    asm volatile("call *%0" : : "r"(page + 4094), "a"(SYS_getpid) : "rcx", "r11", "memory");
}

static void system_calls_that_are_none(void) {
    const long numbers[] = {-1, 10000, 0x40000000, 0x40000027, 0x7fffffff, -4096, 0x100000000 | SYS_getpid};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        long result = raw_syscall(numbers[i], 0, 0, 0);
        MUST(result == -ENOSYS || result == getpid());
    }
}

void flag_probes(void) {
    static const struct probe probes[] = {
        {"AC and system calls", FINE, ac_and_system_calls},
        {"AC and page faults", FINE, ac_and_page_faults},
        {"AC and a misaligned access", BUS, ac_and_a_misaligned_access},
        {"AC and interrupts", FINE, ac_and_interrupts},
        {"AC and a fork", FINE, ac_and_a_fork},
        {"NT, DF, system calls and page faults", FINE, nt_df_and_system_calls},
        {"NT, DF and a signal", FINE, nt_df_and_a_signal},
        {"system calls with any stack pointer", FINE, system_calls_with_any_stack},
        {"a system call with a stack right behind user addresses", FINE | SEGV, system_call_with_a_stack_behind_user_addresses},
        {"a system call with a stack that is not canonical", FINE | SEGV, system_call_with_a_stack_not_canonical},
        {"interrupts with a stack in the kernel", FINE, interrupts_with_a_stack_in_the_kernel},
        {"ud2 with a stack in the kernel", SEGV | ILL, ud2_with_a_stack_in_the_kernel},
        {"a push onto the kernel", SEGV, push_with_a_stack_in_the_kernel},
        {"a push to an address that is not canonical", BUS | SEGV, push_with_a_stack_not_canonical},
        {"a system call at the end of user addresses", SEGV, system_call_at_the_end},
        {"system calls that are none", FINE, system_calls_that_are_none},
    };
    RUN(probes);
}
