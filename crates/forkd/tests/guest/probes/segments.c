/* Segment registers: every selector is loaded into each of them; and code for 32 bits is entered. */
#define _GNU_SOURCE
#include "probes.h"

#include <asm/prctl.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

static long base_of(int which) {
    long base = 0;
    raw_syscall(SYS_arch_prctl, which, (long)&base, 0);
    return base;
}

/* The selectors that the GDT may have something for, all of them, and a spread of those beyond. */
static unsigned next_selector(unsigned selector) { return selector < 0x200 ? selector + 1 : selector + 0x3d; }

/* IRET makes a null selector 0, whatever its RPL was: Intel SDM, volume 2, IRET. */
static int is_same(unsigned now, unsigned loaded) { return now == loaded || (now == 0 && loaded < 4); }

/* What was loaded is still there when others have run, and the segment's base is no kernel address. */
#define CHECK_LOADED(name, selector, base)                                                                                     \
    do {                                                                                                                       \
        uint16_t now;                                                                                                          \
        raw_syscall(SYS_sched_yield, 0, 0, 0);                                                                                 \
        asm volatile("mov %%" name ", %0" : "=r"(now));                                                                        \
        if (!is_same(now, selector)) fail(name " was %#x and is %#x", selector, now);                                                \
        if ((uint64_t)(base) >= BEYOND_USER) fail(name " %#x has base %#lx", selector, (uint64_t)(base));                      \
    } while (0)

static void load_gs(void) {
    unsigned loaded = 0;
    catch_faults();
    for (unsigned selector = 0; selector < 0x10000; selector = next_selector(selector)) {
        if (TRY("mov %0, %%gs", "r"(selector))) continue;
        loaded++;
        CHECK_LOADED("gs", selector, base_of(ARCH_GET_GS));
        asm volatile("mov %0, %%gs" : : "r"(0));
    }
    MUST(loaded >= 5);
}

static void load_fs(void) {
    unsigned loaded = 0;
    catch_faults();
    const long mine = base_of(ARCH_GET_FS);
    for (unsigned selector = 0; selector < 0x10000; selector = next_selector(selector)) {
        uint16_t now = selector;
        long base = mine;
        int faulted = TRY("mov %0, %%fs", "r"(selector));
        if (!faulted) {
            base = base_of(ARCH_GET_FS);
            raw_syscall(SYS_sched_yield, 0, 0, 0);
            asm volatile("mov %%fs, %0" : "=r"(now));
            asm volatile("mov %0, %%fs" : : "r"(0));
            loaded++;
        }
        /* From here on, what the C library keeps below FS is there again. */
        raw_syscall(SYS_arch_prctl, ARCH_SET_FS, mine, 0);
        MUST(is_same(now, selector) && (uint64_t)base < BEYOND_USER);
    }
    MUST(loaded >= 5);
}

static void load_ds_and_es(void) {
    unsigned loaded = 0;
    catch_faults();
    for (unsigned selector = 0; selector < 0x10000; selector = next_selector(selector)) {
        if (TRY("mov %0, %%ds", "r"(selector))) continue;
        MUST(!TRY("mov %0, %%es", "r"(selector)));
        loaded++;
        CHECK_LOADED("ds", selector, 0);
        CHECK_LOADED("es", selector, 0);
    }
    MUST(loaded >= 5);
}

static void load_ss(void) {
    unsigned loaded = 0;
    catch_faults();
    for (unsigned selector = 0; selector < 0x10000; selector = next_selector(selector)) {
        if (TRY("mov %0, %%ss", "r"(selector))) continue;
        loaded++;
        if ((selector & 3) != 3) fail("SS is loaded with %#x", selector);
        raw_syscall(SYS_sched_yield, 0, 0, 0);
    }
    MUST(loaded >= 1);
}

/* Nothing that a selector leads to is a way to call the kernel. */
static void far_calls(void) {
    catch_faults();
    struct {
        uint32_t offset;
        uint16_t selector;
    } __attribute__((packed)) to = {0x81000000u, 0};
    for (unsigned selector = 0; selector < 0x10000; selector = next_selector(selector)) {
        to.selector = selector;
        MUST(TRY("lcall *(%0)", "r"(&to)));
    }
}

/* What the CPU tells of a selector without loading it; it may tell, and nothing may break by it. */
static void lar_lsl_verr_verw(void) {
    for (unsigned selector = 0; selector < 0x10000; selector = next_selector(selector)) {
        unsigned long told = 0;
        asm volatile("lar %1, %0\n\tlsl %1, %0\n\tverr %w1\n\tverw %w1" : "+r"(told) : "r"((unsigned long)selector) : "cc");
    }
}

static void jump_into_32_bits(const unsigned char *code, size_t size) {
    unsigned char *page = code_page();
    memcpy(page, code, size);
    struct {
        uint32_t offset;
        uint16_t selector;
    } __attribute__((packed)) to = {(uint32_t)(uint64_t)page, 0x23};
    alarm(1);
    asm volatile("ljmp *%0" : : "m"(to) : "memory");
}
#define IN_32_BITS(...)                                                                                                        \
    static const unsigned char code[] = {__VA_ARGS__};                                                                         \
    jump_into_32_bits(code, sizeof code)

static void system_call_in_32_bits(void) { IN_32_BITS(0xb8, 1, 0, 0, 0, 0xcd, 0x80, 0x0f, 0x0b); }
static void syscall_in_32_bits(void) { IN_32_BITS(0xb8, 1, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x0b); }
static void sysenter_in_32_bits(void) { IN_32_BITS(0xb8, 1, 0, 0, 0, 0x0f, 0x34, 0x0f, 0x0b); }
static void spin_in_32_bits(void) { IN_32_BITS(0xeb, 0xfe); }
static void fault_in_32_bits(void) { IN_32_BITS(0xa1, 0, 0, 0, 0x30, 0x0f, 0x0b); }
static void kernel_address_in_32_bits(void) { IN_32_BITS(0xa1, 0, 0, 0, 0x81, 0x0f, 0x0b); }

void segment_probes(void) {
    static const struct probe probes[] = {
        {"every selector into GS", FINE, load_gs},
        {"every selector into FS", FINE, load_fs},
        {"every selector into DS and ES", FINE, load_ds_and_es},
        {"every selector into SS", FINE, load_ss},
        {"far calls through every selector", FINE, far_calls},
        {"what LAR, LSL, VERR and VERW say of every selector", FINE, lar_lsl_verr_verw},
        {"code of 32 bits: int 0x80", SEGV | ILL, system_call_in_32_bits},
        {"code of 32 bits: syscall", SEGV | ILL, syscall_in_32_bits},
        {"code of 32 bits: sysenter", SEGV | ILL, sysenter_in_32_bits},
        {"code of 32 bits: an endless loop", LATE | SEGV | ILL, spin_in_32_bits},
        {"code of 32 bits: a page fault", SEGV | ILL, fault_in_32_bits},
        {"code of 32 bits: half an address of the kernel", SEGV | ILL, kernel_address_in_32_bits},
    };
    RUN(probes);
}
