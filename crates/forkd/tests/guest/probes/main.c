#define _GNU_SOURCE
#include "probes.h"

#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

volatile uint64_t resume_at, resume_stack, caught_signal, caught_address;
static unsigned run_count, wrong_count;
/* Status of a probe that has found something wrong by itself. */
#define FAILED 99

void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    fflush(stdout);
    _exit(FAILED);
}

static int outcome_of(int status) {
    if (WIFEXITED(status)) return WEXITSTATUS(status) == 0 ? FINE : OTHER;
    switch (WTERMSIG(status)) {
    case SIGSEGV: return SEGV;
    case SIGBUS: return BUS;
    case SIGTRAP: return TRAP;
    case SIGILL: return ILL;
    case SIGALRM: return LATE;
    default: return OTHER;
    }
}

void run_probe(const char *name, int right, void (*run)(const void *), const void *argument) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) perror("fork"), exit(1);
    if (pid == 0) {
        alarm(20);
        run(argument);
        fflush(stdout);
        _exit(0);
    }
    int status;
    if (waitpid(pid, &status, 0) != pid) perror("waitpid"), exit(1);
    run_count++;
    if (outcome_of(status) & right) return;
    wrong_count++;
    if (WIFSIGNALED(status)) printf("WRONG %s: signal %d\n", name, WTERMSIG(status));
    else printf("WRONG %s: status %d\n", name, WEXITSTATUS(status));
}

static void run_plain(const void *probe) { ((const struct probe *)probe)->run(); }

void run_probes(const struct probe *probes, size_t count) {
    for (size_t i = 0; i < count; i++) run_probe(probes[i].name, probes[i].right, run_plain, probes + i);
}

static void caught(int signal, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    if (!resume_at) {
        /* Not within TRY: it comes again, and is fatal. */
        struct sigaction fatal = {.sa_handler = SIG_DFL};
        sigaction(signal, &fatal, NULL);
        return;
    }
    caught_signal = signal;
    caught_address = (uint64_t)info->si_addr;
    registers[REG_RIP] = resume_at;
    registers[REG_RSP] = resume_stack;
    registers[REG_EFL] &= ~(TF | AC | DF | NT);
}

void catch_faults(void) {
    /* On a stack of its own: what is tried may break the stack pointer. */
    stack_t stack = {.ss_size = 65536};
    stack.ss_sp = mmap(NULL, stack.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(stack.ss_sp != MAP_FAILED && !sigaltstack(&stack, NULL));
    struct sigaction action = {.sa_sigaction = caught, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) MUST(!sigaction(signals[i], &action, NULL));
}

unsigned char *code_page(void) {
    void *page = mmap((void *)0x10000000, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    MUST(page != MAP_FAILED);
    return page;
}

void bind_to(int cpu) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(cpu, &cpus);
    MUST(!sched_setaffinity(0, sizeof cpus, &cpus));
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(void);
    } groups[] = {
        {"memory", memory_probes},     {"frames", frame_probes}, {"instructions", instruction_probes},
        {"segments", segment_probes},  {"flags", flag_probes},   {"trace", trace_probes},
        {"tasks", task_probes},        {"stale", stale_probes},
    };
    if (argc == 2 && !strcmp(argv[1], "scan")) {
        scan_kernel();
        return 0;
    }
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        int wanted = argc < 2;
        for (int arg = 1; arg < argc; arg++) wanted |= !strcmp(argv[arg], groups[i].name);
        if (wanted) groups[i].run();
    }
    printf("%u probes, %u wrong\n", run_count, wrong_count);
    return wrong_count || !run_count;
}
