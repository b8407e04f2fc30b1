/* Instructions that are the kernel's, and every vector of INT. */
#define _GNU_SOURCE
#include "probes.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/wait.h>
#include <unistd.h>

struct instruction {
    const char *name;
    int right;
    unsigned char code[12]; /* the rest is 0; a RET is put behind */
    unsigned char size;
};

#define CODE(...) {__VA_ARGS__}, sizeof((unsigned char[]){__VA_ARGS__})
/* Not there, or not allowed: which of it is the CPU's and the host's matter. */
#define NO (SEGV | ILL)
/* Answers, without a secret, or is refused. */
#define HARMLESS (FINE | NO)

static const struct instruction instructions[] = {
    {"hlt", SEGV, CODE(0xf4)},
    {"cli", SEGV, CODE(0xfa)},
    {"sti", SEGV, CODE(0xfb)},
    {"in al, 0x60", SEGV, CODE(0xe4, 0x60)},
    {"in eax, dx", SEGV, CODE(0xed)},
    {"out 0xf4, al", SEGV, CODE(0xe6, 0xf4)},
    {"out dx, eax", SEGV, CODE(0xef)},
    {"insb", SEGV, CODE(0x6c)},
    {"outsb", SEGV, CODE(0x6e)},
    {"mov rax, cr0", SEGV, CODE(0x0f, 0x20, 0xc0)},
    {"mov rax, cr2", SEGV, CODE(0x0f, 0x20, 0xd0)},
    {"mov rax, cr3", SEGV, CODE(0x0f, 0x20, 0xd8)},
    {"mov rax, cr4", SEGV, CODE(0x0f, 0x20, 0xe0)},
    {"mov rax, cr8", SEGV, CODE(0x44, 0x0f, 0x20, 0xc0)},
    {"mov cr0, rax", SEGV, CODE(0x0f, 0x22, 0xc0)},
    {"mov cr3, rax", SEGV, CODE(0x0f, 0x22, 0xd8)},
    {"mov cr4, rax", SEGV, CODE(0x0f, 0x22, 0xe0)},
    {"mov rax, dr7", SEGV, CODE(0x0f, 0x21, 0xf8)},
    {"mov dr7, rax", SEGV, CODE(0x0f, 0x23, 0xf8)},
    {"rdmsr", SEGV, CODE(0xb9, 0x10, 0x4d, 0x56, 0x4b, 0x0f, 0x32)}, /* the control MSR of PVM */
    {"wrmsr", SEGV, CODE(0xb9, 0x10, 0x4d, 0x56, 0x4b, 0x0f, 0x30)},
    {"clts", SEGV, CODE(0x0f, 0x06)},
    {"invd", SEGV, CODE(0x0f, 0x08)},
    {"wbinvd", SEGV, CODE(0x0f, 0x09)},
    {"invlpg", SEGV, CODE(0x0f, 0x01, 0x3c, 0x24)},
    {"invpcid", NO, CODE(0x66, 0x0f, 0x38, 0x82, 0x04, 0x24)},
    {"swapgs", SEGV, CODE(0x0f, 0x01, 0xf8)},
    {"lgdt", SEGV, CODE(0x0f, 0x01, 0x54, 0x24, 0x80)},
    {"lidt", SEGV, CODE(0x0f, 0x01, 0x5c, 0x24, 0x80)},
    {"lldt", SEGV, CODE(0x0f, 0x00, 0xd0)},
    {"ltr", SEGV, CODE(0x0f, 0x00, 0xd8)},
    {"lmsw", SEGV, CODE(0x0f, 0x01, 0xf0)},
    {"sysret", NO, CODE(0x48, 0x0f, 0x07)},
    {"sysexit", NO, CODE(0x48, 0x0f, 0x35)},
    {"sysenter", NO, CODE(0x0f, 0x34)},
    {"xsetbv", SEGV, CODE(0x0f, 0x01, 0xd1)},
    {"stac", NO, CODE(0x0f, 0x01, 0xcb)},
    {"clac", NO, CODE(0x0f, 0x01, 0xca)},
    {"xsaves", NO, CODE(0x48, 0x0f, 0xc7, 0x6c, 0x24, 0x80)},
    {"xrstors", NO, CODE(0x48, 0x0f, 0xc7, 0x5c, 0x24, 0x80)},
    {"monitor", NO, CODE(0x0f, 0x01, 0xc8)},
    {"mwait", NO, CODE(0x0f, 0x01, 0xc9)},
    {"vmcall", HARMLESS, CODE(0x0f, 0x01, 0xc1)},
    {"vmmcall", HARMLESS, CODE(0x0f, 0x01, 0xd9)},
    {"vmlaunch", NO, CODE(0x0f, 0x01, 0xc2)},
    {"vmxoff", NO, CODE(0x0f, 0x01, 0xc4)},
    {"vmrun", NO, CODE(0x0f, 0x01, 0xd8)},
    {"stgi", NO, CODE(0x0f, 0x01, 0xdc)},
    {"skinit", NO, CODE(0x0f, 0x01, 0xde)},
    {"encls", NO, CODE(0x0f, 0x01, 0xcf)},
    {"enclu", NO, CODE(0x0f, 0x01, 0xd7)},
    {"rsm", NO, CODE(0x0f, 0xaa)},
    {"getsec", NO, CODE(0x0f, 0x37)},
    {"senduipi", NO, CODE(0xf3, 0x0f, 0xc7, 0xf0)},
    {"uiret", NO, CODE(0xf3, 0x0f, 0x01, 0xec)},
    {"rdpmc", SEGV, CODE(0x0f, 0x33)},
    {"wrpkru", HARMLESS, CODE(0x0f, 0x01, 0xef)},
    {"rdpkru", HARMLESS, CODE(0x0f, 0x01, 0xee)},
    {"sgdt", HARMLESS, CODE(0x0f, 0x01, 0x44, 0x24, 0x80)},
    {"sidt", HARMLESS, CODE(0x0f, 0x01, 0x4c, 0x24, 0x80)},
    {"sldt", HARMLESS, CODE(0x0f, 0x00, 0xc0)},
    {"str", HARMLESS, CODE(0x0f, 0x00, 0xc8)},
    {"smsw", HARMLESS, CODE(0x0f, 0x01, 0xe0)},
    {"rdtscp", HARMLESS, CODE(0x0f, 0x01, 0xf9)},
    {"rdpid", HARMLESS, CODE(0xf3, 0x0f, 0xc7, 0xf8)},
    {"umonitor", HARMLESS, CODE(0xf3, 0x0f, 0xae, 0xf4)},
    {"rdtsc", FINE, CODE(0x0f, 0x31)},
    {"cpuid", FINE, CODE(0x53, 0x0f, 0xa2, 0x5b)},
    {"xgetbv", FINE, CODE(0x0f, 0x01, 0xd0)},
    {"ud2", ILL, CODE(0x0f, 0x0b)},
    {"int3", TRAP, CODE(0xcc)},
    {"icebp", TRAP, CODE(0xf1)},
    {"into", ILL, CODE(0xce)},
    {"retf to 0:0", SEGV, CODE(0x6a, 0x00, 0x6a, 0x00, 0x48, 0xcb)},
    {"retf to the kernel's CS", SEGV, CODE(0x6a, 0x10, 0x6a, 0x00, 0x48, 0xcb)},
    {"iretq to the kernel's CS", SEGV, CODE(0x6a, 0x18, 0x54, 0x6a, 0x02, 0x6a, 0x10, 0x6a, 0x00, 0x48, 0xcf)},
};

static void execute(const void *argument) {
    const struct instruction *instruction = argument;
    unsigned char *page = code_page();
    memcpy(page, instruction->code, instruction->size);
    page[instruction->size] = 0xc3;
    asm volatile("call *%0"
                 :
                 : "r"(page), "a"(0), "c"(0), "d"(0), "D"(page + 1024), "S"(page + 1024)
                 : "r8", "r9", "r10", "r11", "memory", "cc");
}

/* RAX is the number of getpid, should a vector lead to system calls. */
static void interrupt(const void *argument) {
    unsigned char *page = code_page();
    page[0] = 0xcd;
    page[1] = *(const int *)argument;
    page[2] = 0xc3;
    asm volatile("push %%rbx; call *%0; pop %%rbx"
                 :
                 : "S"(page), "a"(SYS_getpid), "c"(0), "d"(0)
                 : "rdi", "r8", "r9", "r10", "r11", "memory", "cc");
}

static void every_interrupt(void) {
    for (int vector = 0; vector < 256; vector++) {
        int right = SEGV;
        if (vector == 3) right = TRAP;
        /* Vectors of PVM's own: CPUID, and a hypercall that user mode does not have. */
        if (vector == 0x1a) right |= FINE;
        if (vector == 0x1b) right |= ILL;
        char name[16];
        snprintf(name, sizeof name, "int %#x", vector);
        run_probe(name, right, interrupt, &vector);
    }
}

static void modify_ldt(void) {
    char descriptor[16] = {0};
    for (long function = 0; function < 3; function++) MUST(raw_syscall(SYS_modify_ldt, function, (long)descriptor, 16) < 0);
    MUST(raw_syscall(SYS_modify_ldt, 0x11, (long)descriptor, 16) == -ENOSYS);
}

/* iopl(2) may be granted to root; what it gives is in and out at the most. */
static void cli_after_iopl(void) {
    if (iopl(3)) return;
    asm volatile("cli");
    fail("user mode has switched interrupts off");
}

static void ports_after_ioperm(void) {
    if (!ioperm(0x80, 1, 1)) asm volatile("outb %%al, $0x80" : : "a"(0));
    asm volatile("inb $0x60, %%al" : : : "rax");
}

void instruction_probes(void) {
    for (size_t i = 0; i < sizeof instructions / sizeof *instructions; i++)
        run_probe(instructions[i].name, instructions[i].right, execute, instructions + i);
    every_interrupt();
    static const struct probe others[] = {
        {"modify_ldt", FINE, modify_ldt},
        {"cli after iopl", FINE | SEGV, cli_after_iopl},
        {"a port that ioperm has not given", SEGV, ports_after_ioperm},
    };
    RUN(others);
}
