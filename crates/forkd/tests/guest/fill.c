/* Memory filled, as far as the kernel lets a process have it.
 *
 *   fill start FILE KEEP_MIB   fills all but KEEP_MIB of what is available, in the background; prints its pid
 *   fill check FILE            has every page verified by the process that holds them; prints how many they are
 *
 * Every page holds its own number. */
#define _GNU_SOURCE
#include "guest.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ul
#define HUGE (2ul << 20)

struct fill {
    volatile uint64_t filled, ask, answered, bad, pages;
};

static uint64_t available_kib(void) {
    FILE *file = fopen("/proc/meminfo", "r");
    char line[128];
    uint64_t kib = 0;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %lu", &kib) == 1) break;
    if (file) fclose(file);
    if (!kib) wrong("/proc/meminfo tells no MemAvailable");
    return kib;
}

__attribute__((noreturn)) static void hold(struct fill *fill, uint64_t *memory, uint64_t pages) {
    const uint64_t words = PAGE / 8;
    uint64_t seen = 0;
    for (uint64_t page = 0; page < pages; page++) {
        memory[page * words] = page * 0x9e3779b97f4a7c15ull;
        memory[page * words + words - 1] = ~page;
    }
    fill->pages = pages;
    fill->filled = 1;
    for (;;) {
        while (fill->ask == seen) pause_ms();
        seen = fill->ask;
        for (uint64_t page = 0; page < pages; page++)
            if (memory[page * words] != page * 0x9e3779b97f4a7c15ull || memory[page * words + words - 1] != ~page)
                fill->bad++;
        fill->answered = seen;
    }
}

int fill_main(int argc, char **argv) {
    if (argc < 2) wrong("fill start FILE KEEP_MIB, or fill check FILE");
    struct fill *fill = share(argv[1], sizeof *fill);
    if (!strcmp(argv[0], "start")) {
        if (argc < 3) wrong("how much is to be kept?");
        uint64_t keep = number(argv[2]) << 10, have = available_kib();
        if (have <= keep) wrong("only %lu KiB are available", have);
        uint64_t bytes = ((have - keep) << 10) / HUGE * HUGE;
        char *raw = mmap(NULL, bytes + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (raw == MAP_FAILED) die("map %lu bytes", bytes);
        char *memory = (char *)(((uintptr_t)raw + HUGE - 1) / HUGE * HUGE);
        if (madvise(memory, bytes, MADV_HUGEPAGE)) die("madvise");
        /* Not into_background: filling may take minutes where page faults are emulated. */
        if (fork() > 0) {
            while (!fill->filled) pause_ms();
            return 0;
        }
        setsid();
        for (int fd = 0; fd < 3; fd++) close(fd);
        hold(fill, (uint64_t *)memory, bytes / PAGE);
    }
    uint64_t ask = ++fill->ask;
    while (fill->answered != ask) pause_ms();
    if (fill->bad) wrong("%lu of %lu pages are not what was written", fill->bad, fill->pages);
    printf("%lu\n", fill->pages);
    return 0;
}
