/* All CPUs of the guest at once.
 *
 *   sum N            a thread bound to each CPU adds up its share of 1 to N; prints CPUs and sum
 *   clocks MS        threads on all CPUs read CLOCK_MONOTONIC; fails if one reads less than another has read before; prints
 *                    CPUs and looks
 *   sleep MS         sleeps by clock_nanosleep; prints how long that was in us by CLOCK_MONOTONIC
 *   now              prints CLOCK_REALTIME in us */
#define _GNU_SOURCE
#include "guest.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define MAX_CPUS 64

struct worker {
    pthread_t thread;
    int cpu;
    uint64_t from, to, sum, looks;
};

static unsigned cpu_count;
/* What any thread has read, in ns. */
static uint64_t latest, until;

static uint64_t read_ns(clockid_t clock) {
    struct timespec now;
    if (clock_gettime(clock, &now)) die("clock_gettime");
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void bind_to(int cpu) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(cpu, &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus)) die("sched_setaffinity to %d", cpu);
    if (sched_getcpu() != cpu) wrong("bound to CPU %d and on %d", cpu, sched_getcpu());
}

static void *add_up(void *argument) {
    struct worker *worker = argument;
    bind_to(worker->cpu);
    for (volatile uint64_t i = worker->from; i < worker->to; i++) worker->sum += i;
    if (sched_getcpu() != worker->cpu) wrong("CPU %d is left", worker->cpu);
    return NULL;
}

static void *read_clock(void *argument) {
    struct worker *worker = argument;
    bind_to(worker->cpu);
    for (;; worker->looks++) {
        uint64_t seen = __atomic_load_n(&latest, __ATOMIC_SEQ_CST), now = read_ns(CLOCK_MONOTONIC);
        if (now < seen) wrong("CPU %d reads %lu after another has read %lu", worker->cpu, now, seen);
        while (seen < now && !__atomic_compare_exchange_n(&latest, &seen, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        if (now >= until) return NULL;
    }
}

static struct worker workers[MAX_CPUS];

static void on_all_cpus(void *(*run)(void *)) {
    for (unsigned i = 0; i < cpu_count; i++) {
        workers[i].cpu = i;
        if (pthread_create(&workers[i].thread, NULL, run, workers + i)) wrong("no thread %u", i);
    }
    for (unsigned i = 0; i < cpu_count; i++)
        if (pthread_join(workers[i].thread, NULL)) wrong("thread %u", i);
}

static void count_cpus(void) {
    cpu_count = sysconf(_SC_NPROCESSORS_ONLN);
    if (cpu_count < 1 || cpu_count > MAX_CPUS) wrong("%u CPUs", cpu_count);
}

int sum_main(int argc, char **argv) {
    if (argc < 1) wrong("sum N");
    uint64_t all = number(argv[0]), sum = 0;
    count_cpus();
    for (unsigned i = 0; i < cpu_count; i++) {
        workers[i].from = all * i / cpu_count + 1;
        workers[i].to = all * (i + 1) / cpu_count + 1;
    }
    on_all_cpus(add_up);
    for (unsigned i = 0; i < cpu_count; i++) sum += workers[i].sum;
    printf("%u %lu\n", cpu_count, sum);
    return 0;
}

int clocks_main(int argc, char **argv) {
    if (argc < 1) wrong("clocks MS");
    uint64_t looks = 0;
    count_cpus();
    until = read_ns(CLOCK_MONOTONIC) + number(argv[0]) * 1000000;
    on_all_cpus(read_clock);
    for (unsigned i = 0; i < cpu_count; i++) looks += workers[i].looks;
    printf("%u %lu\n", cpu_count, looks);
    return 0;
}

int sleep_main(int argc, char **argv) {
    if (argc < 1) wrong("sleep MS");
    uint64_t ms = number(argv[0]), begun = read_ns(CLOCK_MONOTONIC);
    struct timespec nap = {ms / 1000, ms % 1000 * 1000000};
    if (clock_nanosleep(CLOCK_MONOTONIC, 0, &nap, NULL)) wrong("clock_nanosleep");
    printf("%lu\n", (read_ns(CLOCK_MONOTONIC) - begun) / 1000);
    return 0;
}

int now_main(int argc, char **argv) {
    (void)argc, (void)argv;
    printf("%lu\n", read_ns(CLOCK_REALTIME) / 1000);
    return 0;
}
