/* What the parts of the guest's test program share. Linked statically, so that any root image runs it. */
#ifndef FORKD_TEST_GUEST_H
#define FORKD_TEST_GUEST_H

#include <stddef.h>
#include <stdint.h>

/* Ends the program with status 1 and one line on standard error that says what failed, and why (errno). */
__attribute__((noreturn, format(printf, 1, 2))) void die(const char *format, ...);
/* The same for something that came out wrong, without errno. */
__attribute__((noreturn, format(printf, 1, 2))) void wrong(const char *format, ...);

/* Maps a file that other processes map as well, made and grown as needed. */
void *share(const char *path, size_t size);
/* Milliseconds of CLOCK_MONOTONIC. */
uint64_t now_ms(void);
/* Sleeps for a millisecond: between looks at what another process writes into shared memory. */
void pause_ms(void);
/* Forks into the background: the caller returns in the background process, with its standard streams on /dev/null. The
 * foreground process ends with status 0 once `*ready` is not 0, or with 1 if that takes longer than 30 s. */
void into_background(volatile uint64_t *ready);
/* Number in decimal, or the program ends. */
uint64_t number(const char *text);

int ring_main(int argc, char **argv);
int count_main(int argc, char **argv);
int simd_main(int argc, char **argv);
int clock_main(int argc, char **argv);
int fill_main(int argc, char **argv);
int barrier_main(int argc, char **argv);
int orphans_main(int argc, char **argv);
int crash_init_main(int argc, char **argv);
int freeze_init_main(int argc, char **argv);
int sum_main(int argc, char **argv);
int clocks_main(int argc, char **argv);
int sleep_main(int argc, char **argv);
int now_main(int argc, char **argv);
int load_main(int argc, char **argv);

#endif
