/* AMX for processors without it: each of its instructions traps, and is decoded and done here, as Intel's manual says.
   Anything unexpected ends the process. Tests compile this and load it into a process of their own. */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

static __thread uint8_t tiles[8][16][64];
static __thread int configured;
long counts[6]; /* ldtilecfg, tilerelease, tilezero, tileloadd, tilestored, tdpbf16ps */

static const int registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void check(int condition, const char *what, const uint8_t *code) {
    if (condition) return;
    fprintf(stderr, "%s:", what);
    for (int i = 0; i < 12; i++) fprintf(stderr, " %02x", code[i]);
    fprintf(stderr, "\n");
    abort();
}

static float number(const uint8_t *bytes) { /* a bfloat16 as float, subnormal ones as zero */
    uint32_t bits = (uint32_t)bytes[1] << 24 | (uint32_t)bytes[0] << 16;
    float found;
    if (!(bits & 0x7f800000)) bits &= 0x80000000;
    memcpy(&found, &bits, 4);
    return found;
}

static void configure(const uint8_t *memory, const uint8_t *code) {
    uint8_t expected[64] = {1}; /* palette 1; eight tiles of 64 bytes a row, 16 rows; all else zero */
    for (int tile = 0; tile < 8; tile++) {
        expected[16 + 2 * tile] = 64;
        expected[48 + tile] = 16;
    }
    check(memcmp(memory, expected, 64) == 0, "another configuration", code);
    memset(tiles, 0, sizeof tiles);
    configured = 1;
}

static void dot(uint8_t sums[16][64], uint8_t a[16][64], uint8_t b[16][64]) {
    for (int row = 0; row < 16; row++) {
        float even[16] = {0}, odd[16] = {0};
        for (int pair = 0; pair < 16; pair++)
            for (int column = 0; column < 16; column++) {
                even[column] = fmaf(number(&a[row][4 * pair]), number(&b[pair][4 * column]), even[column]);
                odd[column] = fmaf(number(&a[row][4 * pair + 2]), number(&b[pair][4 * column + 2]), odd[column]);
            }
        for (int column = 0; column < 16; column++) {
            float sum;
            memcpy(&sum, &sums[row][4 * column], 4);
            sum += even[column] + odd[column];
            memcpy(&sums[row][4 * column], &sum, 4);
        }
    }
}

static void trap(int signal_number, siginfo_t *info, void *context) {
    greg_t *values = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint8_t *code = (uint8_t *)values[REG_RIP];
    check(code[0] == 0xC4 && (code[1] & 31) == 2 && !(code[2] & 0x84), "not VEX.128.0F38.W0", code);
    int third = ~(code[2] >> 3) & 15, prefix = code[2] & 3, mode = code[4] >> 6; /* prefix 2: F3, 3: F2 */
    int first = (code[4] >> 3 & 7) | (code[1] & 0x80 ? 0 : 8), second = code[4] & 7, length = 5;
    uint8_t *address = NULL;
    int64_t stride = 0;
    if (mode != 3) {
        int base = second, far = code[1] & 0x20 ? 0 : 8;
        if (second == 4) {
            int index = (code[5] >> 3 & 7) | (code[1] & 0x40 ? 0 : 8);
            if (index != 4) stride = values[registers[index]] << (code[5] >> 6);
            base = code[5] & 7;
            length++;
        }
        check(mode != 0 || base != 5, "an address without a base", code);
        int32_t distance = 0;
        if (mode == 1) distance = (int8_t)code[length];
        if (mode == 2) memcpy(&distance, code + length, 4);
        length += mode == 1 ? 1 : mode == 2 ? 4 : 0;
        address = (uint8_t *)values[registers[base | far]] + distance;
    }
    if (code[3] == 0x49 && prefix == 0 && mode != 3 && first == 0) {
        configure(address, code);
        counts[0]++;
        values[REG_RIP] += length;
        return;
    }
    check(configured, "tiles are not configured", code);
    check(first < 8 && third < 16, "no such tile", code);
    if (code[3] == 0x49 && prefix == 0 && code[4] == 0xC0) {
        configured = 0;
        counts[1]++;
    } else if (code[3] == 0x49 && prefix == 3 && mode == 3 && second == 0) {
        memset(tiles[first], 0, sizeof tiles[first]);
        counts[2]++;
    } else if (code[3] == 0x4B && prefix >= 2 && mode != 3 && second == 4) {
        for (int row = 0; row < 16; row++)
            if (prefix == 3)
                memcpy(tiles[first][row], address + row * stride, 64);
            else
                memcpy(address + row * stride, tiles[first][row], 64);
        counts[prefix == 3 ? 3 : 4]++;
    } else {
        check(code[3] == 0x5C && prefix == 2 && mode == 3 && third < 8, "unknown", code);
        check(first != second && first != third && second != third, "tiles must differ", code);
        dot(tiles[first], tiles[second], tiles[third]);
        counts[5]++;
    }
    values[REG_RIP] += length;
}

void interpret(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = trap;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, NULL);
}
