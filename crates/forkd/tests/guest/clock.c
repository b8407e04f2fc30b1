/* Clocks that are watched without a pause.
 *
 *   clock watch FILE   watches CLOCK_MONOTONIC and CLOCK_BOOTTIME for ever, in the background
 *   clock check FILE   waits for a hundred more looks; fails if a clock ever went back; prints looks, longest gap in ns and
 *                      both clocks in ns */
#include "guest.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

struct watch {
    volatile uint64_t looks, back, gap, monotonic, boottime;
};

static uint64_t read_ns(clockid_t clock) {
    struct timespec now;
    if (clock_gettime(clock, &now)) die("clock_gettime");
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

int clock_main(int argc, char **argv) {
    if (argc < 2) wrong("clock watch|check FILE");
    struct watch *watch = share(argv[1], sizeof *watch);
    if (!strcmp(argv[0], "watch")) {
        watch->monotonic = read_ns(CLOCK_MONOTONIC);
        watch->boottime = read_ns(CLOCK_BOOTTIME);
        into_background(&watch->looks);
        for (;;) {
            uint64_t monotonic = read_ns(CLOCK_MONOTONIC), boottime = read_ns(CLOCK_BOOTTIME);
            if (monotonic < watch->monotonic || boottime < watch->boottime) watch->back++;
            else if (monotonic - watch->monotonic > watch->gap) watch->gap = monotonic - watch->monotonic;
            watch->monotonic = monotonic;
            watch->boottime = boottime;
            watch->looks++;
        }
    }
    uint64_t from = watch->looks, begin = now_ms();
    while (watch->looks < from + 100)
        if (now_ms() - begin > 30000) wrong("the watch stands still");
        else pause_ms();
    if (watch->back) wrong("a clock went back %lu times", watch->back);
    printf("%lu %lu %lu %lu\n", watch->looks, watch->gap, watch->monotonic, watch->boottime);
    return 0;
}
