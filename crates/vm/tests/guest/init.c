/* The guest's init for the tests of this crate: one process per CPU counts; process 0 talks.
 *
 * It talks to the host by lines on the console: reports of "key=value" words, "@MARK F" to ask for a
 * fork, "@MARK E" at the end. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_CPUS 16
static volatile struct { unsigned long n; long last_ns; long backwards; char pad[40]; } *count;

static long ns(struct timespec t) { return t.tv_sec * 1000000000L + t.tv_nsec; }
static long vdso_ns(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return ns(t); }
static long kernel_ns(void) { struct timespec t; syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t); return ns(t); }

/* The furthest that user mode's and the kernel's clocks are out of order. */
static long disorder(void)
{
	long worst = 0;
	for (int i = 0; i < 20; i++) {
		long a = vdso_ns(), b = kernel_ns(), c = vdso_ns();
		if (a - b > worst) worst = a - b;
		if (b - c > worst) worst = b - c;
	}
	return worst;
}

/* What it costs user mode to read the clock: far less than a system call if it need not ask the kernel. */
static long clock_cost_ns(void)
{
	long start = vdso_ns();
	for (int i = 0; i < 99; i++) vdso_ns();
	return (vdso_ns() - start) / 100;
}

static void counter(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof set, &set);
	for (;;) {
		long t = vdso_ns();
		if (t < count[cpu].last_ns) count[cpu].backwards++;
		count[cpu].last_ns = t;
		count[cpu].n++;
		for (volatile int i = 0; i < 100000; i++) ;
	}
}

static void report(const char *when, int cpus)
{
	printf("@%s mono_us=%ld disorder_ns=%ld", when, vdso_ns() / 1000, disorder());
	for (int i = 0; i < cpus; i++) printf(" count%d=%lu back%d=%ld", i, count[i].n, i, count[i].backwards);
	printf("\n");
	fflush(stdout);
}

static void first_line(const char *path, const char *name)
{
	char line[80] = "?";
	FILE *f = fopen(path, "r");
	if (f) { if (fgets(line, sizeof line, f)) line[strcspn(line, "\n")] = 0; fclose(f); }
	printf(" %s=%s", name, line);
}

int main(void)
{
	int cpus = sysconf(_SC_NPROCESSORS_ONLN);
	mkdir("/sys", 0755);
	mount("sysfs", "/sys", "sysfs", 0, 0);
	printf("@BOOT cpus=%d mono_us=%ld", cpus, vdso_ns() / 1000);
	first_line("/sys/devices/system/clocksource/clocksource0/current_clocksource", "clock");
	printf(" clock_cost_ns=%ld", clock_cost_ns());
	printf(" acpi=%d", access("/sys/firmware/acpi/tables/DSDT", F_OK) == 0);
	printf("\n");
	fflush(stdout);
	count = mmap(0, MAX_CPUS * sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < cpus; i++)
		if (fork() == 0) counter(i);
	usleep(200000);
	report("BEFORE", cpus);
	puts("@MARK F");
	fflush(stdout);
	report("AFTER", cpus);
	usleep(300000);
	report("END", cpus);
	puts("@MARK E");
	fflush(stdout);
	reboot(RB_AUTOBOOT);
	return 0;
}
