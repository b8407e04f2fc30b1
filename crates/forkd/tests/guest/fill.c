/* Memory filled to the last page that can be had.
 *
 *   fill start FILE KEEP_MIB   fills all but KEEP_MIB of what is available, in the background; prints its pid
 *   fill check FILE            has every page verified by the process that holds them; prints pages and the highest
 *                              physical page frame among them
 *
 * Every page holds its own address and number. Its physical place is read from /proc/self/pagemap. */
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
    volatile uint64_t filled, ask, answered, bad, pages, highest;
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

/* The highest frame that holds one of these pages. */
static uint64_t highest_frame(uintptr_t memory, uint64_t pages) {
    static uint64_t entries[512];
    uint64_t highest = 0;
    int pagemap = open("/proc/self/pagemap", O_RDONLY);
    if (pagemap < 0) die("open /proc/self/pagemap");
    for (uint64_t page = 0; page < pages; page += 512) {
        uint64_t count = pages - page < 512 ? pages - page : 512;
        off_t at = (memory / PAGE + page) * 8;
        if (pread(pagemap, entries, count * 8, at) != (ssize_t)(count * 8)) die("read /proc/self/pagemap");
        for (uint64_t i = 0; i < count; i++) {
            uint64_t frame = entries[i] & ((1ull << 55) - 1);
            if (frame > highest) highest = frame;
        }
    }
    close(pagemap);
    return highest;
}

__attribute__((noreturn)) static void hold(struct fill *fill, uint64_t *memory, uint64_t pages) {
    const uint64_t words = PAGE / 8;
    uint64_t seen = 0;
    for (uint64_t page = 0; page < pages; page++) {
        memory[page * words] = page * 0x9e3779b97f4a7c15ull;
        memory[page * words + words - 1] = ~page;
    }
    fill->highest = highest_frame((uintptr_t)memory, pages);
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
    printf("%lu %lu\n", fill->pages, fill->highest);
    return 0;
}
