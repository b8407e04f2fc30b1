/* What user mode may do to its kernel, tried: `probes [GROUP...]`. Linked statically, so that any root image runs it.
 *
 * Each probe is a function that runs in a child of its own. How that child ends is the probe's outcome; a group is a table of
 * probes with the outcomes that are right. The program prints a line for each probe that came out otherwise, then how many
 * there were, and ends with status 1 if any was wrong. */
#ifndef FORKD_TEST_PROBES_H
#define FORKD_TEST_PROBES_H

#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/ucontext.h>

/* Outcomes, to be or-ed. */
enum {
    FINE = 1 << 0, /* the function returned */
    SEGV = 1 << 1,
    BUS = 1 << 2,
    TRAP = 1 << 3,
    ILL = 1 << 4,
    LATE = 1 << 5, /* SIGALRM: it took more than its time, 20 s */
    OTHER = 1 << 6,
};

struct probe {
    const char *name;
    int right; /* outcomes that are right */
    void (*run)(void);
};

/* Runs the probes of a group. */
void run_probes(const struct probe *probes, size_t count);
#define RUN(probes) run_probes(probes, sizeof(probes) / sizeof *(probes))
/* Runs one that has an argument. */
void run_probe(const char *name, int right, void (*run)(const void *), const void *argument);

/* In a probe: something came out wrong. */
__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...);
#define MUST(condition)                                                                                                        \
    do {                                                                                                                       \
        if (!(condition)) fail("%s:%d: %s (errno %d)", __FILE__, __LINE__, #condition, errno);                                 \
    } while (0)

/* Where the signal handler of catch_faults goes on, and with which stack. */
extern volatile uint64_t resume_at, resume_stack;
/* The signal that it has caught, and its address. */
extern volatile uint64_t caught_signal, caught_address;
/* From now on, a fault within TRY goes on behind it; any other is fatal. It does not need FS, so that can be broken. */
void catch_faults(void);

/* Runs instructions; true if they faulted. */
#define TRY(code, ...)                                                                                                         \
    ({                                                                                                                         \
        caught_signal = 0;                                                                                                     \
        asm volatile("lea 9f(%%rip), %%r11\n\t"                                                                                \
                     "mov %%r11, resume_at(%%rip)\n\t"                                                                         \
                     "mov %%rsp, resume_stack(%%rip)\n\t" code "\n"                                                            \
                     "9:\n\t"                                                                                                  \
                     "movq $0, resume_at(%%rip)"                                                                               \
                     :                                                                                                         \
                     : __VA_ARGS__                                                                                             \
                     : "rax", "rcx", "rdx", "r11", "memory", "cc");                                                            \
        caught_signal != 0;                                                                                                    \
    })

/* A system call without anything of the C library's. */
static inline long raw_syscall(long number, long a, long b, long c) {
    long result;
    asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

/* Flags. */
#define TF 0x100ul
#define DF 0x400ul
#define NT 0x4000ul
#define AC 0x40000ul
static inline void set_flags(uint64_t flags) {
    asm volatile("pushfq; orq %0, (%%rsp); popfq" : : "r"(flags) : "memory", "cc");
}
static inline void clear_flags(uint64_t flags) {
    asm volatile("pushfq; andq %0, (%%rsp); popfq" : : "r"(~flags) : "memory", "cc");
}

/* Some addresses of the kernel's, where Linux on x86-64 has them (Documentation/arch/x86/x86_64/mm.rst). */
#define KERNEL_TEXT 0xffffffff81000000ul
#define DIRECT_MAP 0xffff888000000000ul
#define NOT_CANONICAL 0x8000000000000000ul
#define BEYOND_USER 0x800000000000ul

/* A page with rights to all, in the lower 4 GiB. */
unsigned char *code_page(void);
/* Binds the thread to a CPU. */
void bind_to(int cpu);

/* The groups. */
void memory_probes(void);
void frame_probes(void);
void instruction_probes(void);
void segment_probes(void);
void flag_probes(void);
void trace_probes(void);
void task_probes(void);
void stale_probes(void);
/* `probes scan`, what memory_probes executes: reads, writes and jumps to kernel pages. */
void scan_kernel(void);

#endif
