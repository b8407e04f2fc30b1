/* Checksum loops that live in vector registers for tens of milliseconds, so that context switches and forks hit them.
 *
 *   simd start FILE avx2|avx512   loops for ever, in the background; each round's sums are compared with scalar ones
 *   simd check FILE ROUNDS        waits for that many further rounds; fails if any round ever was wrong
 *
 * Register i is added its neighbour i + 1, in turn, over and over. AVX-512 rounds end with a look at the mask registers as
 * well, set before the loop. Every process has data of its own (its pid), so that registers of another one show. */
#include "guest.h"

#include <immintrin.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LOOPS 1000000u

struct state {
    volatile uint64_t rounds, bad, register_index, lane, found, expected;
};

/* The truth, in scalar code: one lane at a time. */
static void scalar(uint32_t *lanes, unsigned registers, unsigned width) {
    for (unsigned lane = 0; lane < width; lane++) {
        uint32_t r[32];
        for (unsigned i = 0; i < registers; i++) r[i] = lanes[i * width + lane];
        for (unsigned loop = 0; loop < LOOPS; loop++)
            for (unsigned i = 0; i < registers; i++) r[i] += r[(i + 1) % registers];
        for (unsigned i = 0; i < registers; i++) lanes[i * width + lane] = r[i];
    }
}

static void avx2(uint32_t *data) {
    unsigned loops = LOOPS;
    __asm__ volatile(
        ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
        "vmovdqu 32*\\i(%1), %%ymm\\i\n"
        ".endr\n"
        "1:\n"
        "vpaddd %%ymm1, %%ymm0, %%ymm0\n"
        "vpaddd %%ymm2, %%ymm1, %%ymm1\n"
        "vpaddd %%ymm3, %%ymm2, %%ymm2\n"
        "vpaddd %%ymm4, %%ymm3, %%ymm3\n"
        "vpaddd %%ymm5, %%ymm4, %%ymm4\n"
        "vpaddd %%ymm6, %%ymm5, %%ymm5\n"
        "vpaddd %%ymm7, %%ymm6, %%ymm6\n"
        "vpaddd %%ymm8, %%ymm7, %%ymm7\n"
        "vpaddd %%ymm9, %%ymm8, %%ymm8\n"
        "vpaddd %%ymm10, %%ymm9, %%ymm9\n"
        "vpaddd %%ymm11, %%ymm10, %%ymm10\n"
        "vpaddd %%ymm12, %%ymm11, %%ymm11\n"
        "vpaddd %%ymm13, %%ymm12, %%ymm12\n"
        "vpaddd %%ymm14, %%ymm13, %%ymm13\n"
        "vpaddd %%ymm15, %%ymm14, %%ymm14\n"
        "vpaddd %%ymm0, %%ymm15, %%ymm15\n"
        "dec %0\n"
        "jnz 1b\n"
        ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
        "vmovdqu %%ymm\\i, 32*\\i(%1)\n"
        ".endr\n"
        "vzeroupper\n"
        : "+r"(loops)
        : "r"(data)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

/* The mask registers as they are after the loop go to `masks`. */
__attribute__((target("avx512f,avx512bw"))) static void avx512(uint32_t *data, uint64_t *masks) {
    unsigned loops = LOOPS;
    __asm__ volatile(
        ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
        "vmovdqu32 64*\\i(%1), %%zmm\\i\n"
        ".endr\n"
        ".irp k,1,2,3,4,5,6,7\n"
        "kmovq 8*\\k(%2), %%k\\k\n"
        ".endr\n"
        "1:\n"
        "vpaddd %%zmm1, %%zmm0, %%zmm0\n"
        "vpaddd %%zmm2, %%zmm1, %%zmm1\n"
        "vpaddd %%zmm3, %%zmm2, %%zmm2\n"
        "vpaddd %%zmm4, %%zmm3, %%zmm3\n"
        "vpaddd %%zmm5, %%zmm4, %%zmm4\n"
        "vpaddd %%zmm6, %%zmm5, %%zmm5\n"
        "vpaddd %%zmm7, %%zmm6, %%zmm6\n"
        "vpaddd %%zmm8, %%zmm7, %%zmm7\n"
        "vpaddd %%zmm9, %%zmm8, %%zmm8\n"
        "vpaddd %%zmm10, %%zmm9, %%zmm9\n"
        "vpaddd %%zmm11, %%zmm10, %%zmm10\n"
        "vpaddd %%zmm12, %%zmm11, %%zmm11\n"
        "vpaddd %%zmm13, %%zmm12, %%zmm12\n"
        "vpaddd %%zmm14, %%zmm13, %%zmm13\n"
        "vpaddd %%zmm15, %%zmm14, %%zmm14\n"
        "vpaddd %%zmm16, %%zmm15, %%zmm15\n"
        "vpaddd %%zmm17, %%zmm16, %%zmm16\n"
        "vpaddd %%zmm18, %%zmm17, %%zmm17\n"
        "vpaddd %%zmm19, %%zmm18, %%zmm18\n"
        "vpaddd %%zmm20, %%zmm19, %%zmm19\n"
        "vpaddd %%zmm21, %%zmm20, %%zmm20\n"
        "vpaddd %%zmm22, %%zmm21, %%zmm21\n"
        "vpaddd %%zmm23, %%zmm22, %%zmm22\n"
        "vpaddd %%zmm24, %%zmm23, %%zmm23\n"
        "vpaddd %%zmm25, %%zmm24, %%zmm24\n"
        "vpaddd %%zmm26, %%zmm25, %%zmm25\n"
        "vpaddd %%zmm27, %%zmm26, %%zmm26\n"
        "vpaddd %%zmm28, %%zmm27, %%zmm27\n"
        "vpaddd %%zmm29, %%zmm28, %%zmm28\n"
        "vpaddd %%zmm30, %%zmm29, %%zmm29\n"
        "vpaddd %%zmm31, %%zmm30, %%zmm30\n"
        "vpaddd %%zmm0, %%zmm31, %%zmm31\n"
        "dec %0\n"
        "jnz 1b\n"
        ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
        "vmovdqu32 %%zmm\\i, 64*\\i(%1)\n"
        ".endr\n"
        ".irp k,1,2,3,4,5,6,7\n"
        "kmovq %%k\\k, 8*\\k(%2)\n"
        ".endr\n"
        "vzeroupper\n"
        : "+r"(loops)
        : "r"(data), "r"(masks)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
          "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5",
          "k6", "k7");
}

static void fill(uint32_t *lanes, unsigned count, uint32_t seed) {
    for (unsigned i = 0; i < count; i++) seed = seed * 1664525u + 1013904223u, lanes[i] = seed ^ (seed >> 15);
}

static void compare(struct state *state, const uint32_t *found, const uint32_t *expected, unsigned count, unsigned width) {
    for (unsigned i = 0; i < count; i++) {
        if (found[i] == expected[i]) continue;
        state->register_index = i / width;
        state->lane = i % width;
        state->found = found[i];
        state->expected = expected[i];
        state->bad++;
        return;
    }
}

__attribute__((noreturn)) static void loop_for_ever(struct state *state, int wide) {
    const unsigned registers = wide ? 32 : 16, width = wide ? 16 : 8, count = registers * width;
    uint32_t expected[512], lanes[512], seed = getpid() * 2654435761u;
    fill(expected, count, seed);
    scalar(expected, registers, width);
    for (;;) {
        fill(lanes, count, seed);
        if (wide) {
            uint64_t masks[8], before[8];
            for (int k = 0; k < 8; k++) before[k] = masks[k] = (seed * 0x100000001ull) ^ (k * 0x0123456789abcdefull);
            avx512(lanes, masks);
            if (memcmp(masks, before, sizeof masks)) {
                state->register_index = 100;
                state->bad++;
            }
        } else {
            avx2(lanes);
        }
        compare(state, lanes, expected, count, width);
        state->rounds++;
    }
}

int simd_main(int argc, char **argv) {
    if (argc < 3) wrong("simd start FILE avx2|avx512, or simd check FILE ROUNDS");
    struct state *state = share(argv[1], sizeof *state);
    if (!strcmp(argv[0], "start")) {
        into_background(&state->rounds);
        loop_for_ever(state, !strcmp(argv[2], "avx512"));
    }
    uint64_t from = state->rounds, begin = now_ms(), more = number(argv[2]);
    while (state->rounds < from + more && !state->bad)
        if (now_ms() - begin > 60000) wrong("%s stands still at round %lu", argv[1], state->rounds);
        else pause_ms();
    if (state->bad)
        wrong("%s: %lu of %lu rounds are wrong; register %lu lane %lu was %#lx, not %#lx", argv[1], state->bad,
              state->rounds, state->register_index, state->lane, state->found, state->expected);
    printf("%lu\n", state->rounds);
    return 0;
}
