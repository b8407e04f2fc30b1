/* Signal frames that no kernel has made: sigreturn ends the process, or does what the frame says, and nothing worse. */
#define _GNU_SOURCE
#include "probes.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* What is written into a frame. CS and SS are in one word of it. */
enum field { RIP, RSP, FLAGS, CS, SS, FPSTATE, XFEATURES };

struct frame {
    const char *name;
    int right;
    enum field field;
    uint64_t value;
};

static const struct frame *wanted;

/* Offset of the XSAVE header's XSTATE_BV in the frame's FPU state: Intel SDM, volume 1, 13.4.2. */
#define XSTATE_BV 512

static void rewrite(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
    mcontext_t *machine = &((ucontext_t *)context)->uc_mcontext;
    uint16_t *selectors = (uint16_t *)&machine->gregs[REG_CSGSFS];
    switch (wanted->field) {
    case RIP: machine->gregs[REG_RIP] = wanted->value; break;
    case RSP: machine->gregs[REG_RSP] = wanted->value; break;
    case FLAGS: machine->gregs[REG_EFL] |= wanted->value; break;
    case CS: selectors[0] = wanted->value; break;
    case SS: selectors[3] = wanted->value; break;
    case FPSTATE: machine->fpregs = (void *)wanted->value; break;
    case XFEATURES: memcpy((char *)machine->fpregs + XSTATE_BV, &wanted->value, 8); break;
    }
}

static void return_by(const void *frame) {
    wanted = frame;
    struct sigaction action = {.sa_sigaction = rewrite, .sa_flags = SA_SIGINFO};
    MUST(!sigaction(SIGUSR1, &action, NULL));
    raise(SIGUSR1);
    if (wanted->field == FLAGS && wanted->value == AC) {
        char bytes[16] __attribute__((aligned(8)));
        asm volatile("movl $1, 1(%0)" : : "r"(bytes) : "memory");
    }
}

/* Which signal a stack pointer leads to is the CPU's matter: SIGBUS if the stack is used, SIGSEGV at the return. */
#define BAD_STACK (SEGV | BUS)

static const struct frame frames[] = {
    {"RIP not canonical", SEGV, RIP, NOT_CANONICAL},
    {"RIP in the kernel", SEGV, RIP, KERNEL_TEXT},
    {"RIP right behind user addresses", SEGV, RIP, BEYOND_USER},
    {"RIP at the last user address", SEGV, RIP, BEYOND_USER - 1},
    {"RIP in the vsyscall page", SEGV, RIP, 0xffffffffff600001ul},
    {"RIP all ones", SEGV, RIP, ~0ul},
    {"CS 0", SEGV, CS, 0},
    {"CS of the kernel", SEGV, CS, 0x10},
    {"CS of the kernel, with RPL 3", SEGV, CS, 0x13},
    {"CS for 32 bits", SEGV | ILL | BUS, CS, 0x23},
    {"CS is a data segment", SEGV, CS, 0x2b},
    {"CS in the LDT", SEGV, CS, 0x07},
    {"CS in the LDT, 2", SEGV, CS, 0x0f},
    {"CS is the TSS", SEGV, CS, 0x43},
    {"CS beyond the GDT", SEGV, CS, 0xfff3},
    {"SS 0", SEGV, SS, 0},
    {"SS 3", SEGV, SS, 3},
    {"SS is a code segment", SEGV, SS, 0x33},
    {"SS of the kernel", SEGV, SS, 0x18},
    {"SS in the LDT", SEGV, SS, 0x0f},
    {"SS is the segment of CPU numbers", SEGV, SS, 0x7b},
    {"SS beyond the GDT", SEGV, SS, 0xfff3},
    {"RSP not canonical", BAD_STACK, RSP, NOT_CANONICAL},
    {"RSP in the kernel", BAD_STACK, RSP, KERNEL_TEXT},
    {"RSP in the direct map", BAD_STACK, RSP, DIRECT_MAP + 0x1000000},
    {"RSP 0", BAD_STACK, RSP, 0},
    {"TF", TRAP, FLAGS, TF},
    {"AC", BUS, FLAGS, AC},
    {"NT", FINE, FLAGS, NT},
    {"IOPL 3, VM, VIF, VIP", FINE, FLAGS, 0x3000 | 0xe0000 * 2},
    {"all flags", TRAP | BUS, FLAGS, ~0ul},
    {"FPU state nowhere", SEGV, FPSTATE, 0x1000},
    {"FPU state in the kernel", SEGV, FPSTATE, DIRECT_MAP + 0x1000000},
    {"FPU state at an address that is not canonical", SEGV, FPSTATE, NOT_CANONICAL},
    {"FPU state with all components", SEGV | FINE, XFEATURES, ~0ul},
    {"FPU state with PKRU", SEGV | FINE, XFEATURES, 0x203},
};

/* rt_sigreturn with the stack pointer wherever. */
static void sigreturn_at(const void *address) {
    asm volatile("mov %0, %%rsp\n\tmov %1, %%eax\n\tsyscall\n\tud2" : : "r"(*(const uint64_t *)address), "i"(SYS_rt_sigreturn));
}

static volatile int came;
static void count(int signal) { (void)signal, came++; }

/* The kernel aligns a frame by itself, so an odd stack is as good as any. */
static void frame_on_odd_stacks(void) {
    char *room = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(room != MAP_FAILED);
    struct sigaction action = {.sa_handler = count, .sa_flags = SA_ONSTACK};
    MUST(!sigaction(SIGUSR1, &action, NULL));
    for (int odd = 1; odd < 64; odd += 2) {
        stack_t stack = {.ss_sp = room + odd, .ss_size = 32768 + odd};
        MUST(!sigaltstack(&stack, NULL));
        raise(SIGUSR1);
    }
    MUST(came == 32);
}

static void frame_on_a_stack_at(const void *address) {
    stack_t stack = {.ss_sp = (void *)*(const uint64_t *)address, .ss_size = 65536};
    struct sigaction action = {.sa_handler = count, .sa_flags = SA_ONSTACK};
    MUST(!sigaction(SIGUSR1, &action, NULL));
    if (sigaltstack(&stack, NULL)) raise(SIGSEGV); /* refused, as good as a fault */
    raise(SIGUSR1);
}

/* Three pages; the middle one is not there. */
static uint64_t room_with_a_hole(void) {
    char *room = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(room != MAP_FAILED && !munmap(room + 4096, 4096));
    return (uint64_t)room;
}

void frame_probes(void) {
    for (size_t i = 0; i < sizeof frames / sizeof *frames; i++)
        run_probe(frames[i].name, frames[i].right, return_by, frames + i);
    uint64_t room = room_with_a_hole();
    const uint64_t places[] = {0, 0x1001, room + 1, room + 4095, room + 4096 - 24, room + 4096 + 7, BEYOND_USER - 8, BEYOND_USER,
                               NOT_CANONICAL, KERNEL_TEXT, DIRECT_MAP + 0x1000003, 0xfffffe0000001000ul, ~0ul};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        char name[64];
        snprintf(name, sizeof name, "sigreturn with RSP %#lx", places[i]);
        run_probe(name, SEGV | BUS, sigreturn_at, places + i);
        snprintf(name, sizeof name, "a signal on a stack at %#lx", places[i]);
        /* A few KiB fit into the lowest page's neighbour or do not; what is sure is that the process is what ends. */
        run_probe(name, SEGV | BUS, frame_on_a_stack_at, places + i);
    }
    static const struct probe others[] = {{"signals on stacks at odd addresses", FINE, frame_on_odd_stacks}};
    RUN(others);
}
