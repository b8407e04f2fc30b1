/* A process that counts on one CPU, without system calls.
 *
 *   count start FILE CPU   counts for ever, in the background
 *   count advance FILE     waits until the count has grown by a million from now; prints it and the CPU
 *   count read FILE        prints the count and the CPU */
#define _GNU_SOURCE
#include "guest.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>

struct counter {
    volatile uint64_t count;
    volatile uint64_t cpu;
};

int count_main(int argc, char **argv) {
    if (argc < 2) wrong("count start FILE CPU, or count advance|read FILE");
    struct counter *counter = share(argv[1], sizeof *counter);
    if (!strcmp(argv[0], "start")) {
        if (argc < 3) wrong("which CPU?");
        cpu_set_t cpus;
        CPU_ZERO(&cpus);
        CPU_SET(number(argv[2]), &cpus);
        into_background(&counter->count);
        if (sched_setaffinity(0, sizeof cpus, &cpus)) die("sched_setaffinity");
        for (;;) {
            counter->cpu = sched_getcpu();
            for (int i = 0; i < 1000; i++) counter->count++;
        }
    }
    if (!strcmp(argv[0], "advance")) {
        uint64_t from = counter->count, begin = now_ms();
        while (counter->count < from + 1000000)
            if (now_ms() - begin > 30000) wrong("%s stands still at %lu", argv[1], counter->count);
            else pause_ms();
    }
    printf("%lu %lu\n", counter->count, counter->cpu);
    return 0;
}
