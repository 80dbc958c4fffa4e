/* The triple stream: draws of one step, number for number those of ckd_fed/data/triples.py, which says what they are. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static const uint64_t GAMMA = 0x9E3779B97F4A7C15u, MIX_1 = 0xBF58476D1CE4E5B9u, MIX_2 = 0x94D049BB133111EBu;
enum { USERS, POSITIVE, NEGATIVE, KD_USERS, KD_FIRST, KD_SECOND, MORE_USERS = 16 }; /* lanes of a step */
enum { DIGIT = 11, BINS = 1 << DIGIT };

static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * MIX_1;
    x = (x ^ (x >> 27)) * MIX_2;
    return x ^ (x >> 31);
}

static inline uint64_t lane_of(uint64_t base, uint64_t lane) { return mix(base ^ (lane + 1) * MIX_1); }

static inline uint64_t word_of(uint64_t key, uint64_t k) { return mix(key + (k + 1) * GAMMA); }

static inline int64_t below(uint64_t word, int64_t bound) { return (int64_t)(((word >> 32) * (uint64_t)bound) >> 32); }

/* In ascending order; `other`: as much memory. */
static void sort(uint64_t *numbers, uint64_t *other, int64_t n) {
    uint64_t all = 0, *from = numbers, *to = other;
    for (int64_t k = 0; k < n; k++) all |= numbers[k];
    for (int shift = 0; shift < 64 && all >> shift; shift += DIGIT) {
        int64_t starts[BINS + 1] = {0};
        for (int64_t k = 0; k < n; k++) starts[(from[k] >> shift) % BINS + 1]++;
        for (int bin = 0; bin < BINS; bin++) starts[bin + 1] += starts[bin];
        for (int64_t k = 0; k < n; k++) to[starts[(from[k] >> shift) % BINS]++] = from[k];
        uint64_t *swapped = from;
        from = to;
        to = swapped;
    }
    if (from != numbers) memcpy(numbers, from, n * sizeof *numbers);
}

/* Positions of the n smallest of p words, all different, ascending. `words`: memory for 3 p. */
static void smallest(uint64_t key, int64_t p, int64_t n, uint64_t *words, uint64_t *found) {
    int64_t counts[BINS] = {0}, before = 0, near = 0, bin = 0, k = 0;
    for (int64_t w = 0; w < p; w++) words[w] = word_of(key, w);
    for (int64_t w = 0; w < p; w++) counts[words[w] >> (64 - DIGIT)]++;
    while (before + counts[bin] < n) before += counts[bin++]; /* the n-th is in this bin */
    for (int64_t w = 0; w < p; w++)
        if ((int64_t)(words[w] >> (64 - DIGIT)) == bin) words[p + near++] = words[w];
    sort(words + p, words + 2 * p, near);
    const uint64_t last = words[p + n - 1 - before];
    for (int64_t w = 0; k < n; w++) { /* without a jump that nobody could foretell */
        found[k] = w;
        k += words[w] <= last;
    }
}

/* The n distinct ones of p that occur first in the draws, ascending. `table`: memory for `size`, a power of two and 4 n at least. */
static void first_distinct(uint64_t base, uint64_t lane, int64_t p, int64_t n, uint64_t *table, uint64_t size, uint64_t *found) {
    memset(table, 0xFF, size * sizeof *table);
    for (int64_t count = 0;; lane += MORE_USERS) {
        const uint64_t key = lane_of(base, lane);
        for (int64_t k = 0; k < n + n / 4 + 8; k++) {
            uint64_t drawn = below(word_of(key, k), p), at = drawn * GAMMA >> 32 & (size - 1);
            while (table[at] != UINT64_MAX && table[at] != drawn) at = (at + 1) & (size - 1);
            if (table[at] == drawn) continue;
            table[at] = found[count++] = drawn;
            if (count == n) {
                sort(found, table, n);
                return;
            }
        }
    }
}

/* Numbers of n users among p, ascending: distinct where there are as many. -1 without memory. */
static int draw(uint64_t base, uint64_t lane, int64_t p, int64_t n, uint64_t *found) {
    uint64_t size = 1, key = lane_of(base, lane);
    while (size < 4 * (uint64_t)n) size *= 2;
    const int dense = n <= p && 4 * n >= p;
    uint64_t *memory = malloc((dense ? 3 * (uint64_t)p : size) * sizeof *memory);
    if (!memory) return -1;
    if (n > p) {
        for (int64_t k = 0; k < n; k++) found[k] = below(word_of(key, k), p);
        sort(found, memory, n);
    } else if (dense)
        smallest(key, p, n, memory, found);
    else
        first_distinct(base, lane, p, n, memory, size, found);
    free(memory);
    return 0;
}

/* The rank-th item, from 0, that is not among a user's: `rank` and as many more as there are items of theirs before it. */
static inline int64_t outside(const int64_t *items, int64_t degree, int64_t rank) {
    int64_t low = 0, high = degree;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (items[middle] - middle <= rank)
            low = middle + 1;
        else
            high = middle;
    }
    return rank + low;
}

/* Triples of a step: ranking (3, b) and distillation (3, k), rows user, first and second item. `pool`: the p users who have items. 0, or -1 without
 * memory. */
int ckd_triples(uint64_t base, const int64_t *indptr, const int64_t *items, int64_t n_items, const int64_t *pool, int64_t p, int64_t b, int64_t k,
                int32_t *ranking, int32_t *distillation) {
    const int64_t n = b > k ? b : k;
    uint64_t *drawn = malloc((n + 1) * sizeof *drawn);
    int failed = !drawn || draw(base, USERS, p, b, drawn);
    if (!failed) {
        const uint64_t positive = lane_of(base, POSITIVE), negative = lane_of(base, NEGATIVE);
        for (int64_t t = 0; t < b; t++) {
            const int64_t user = pool[drawn[t]], degree = indptr[user + 1] - indptr[user], *own = items + indptr[user];
            ranking[t] = (int32_t)user;
            ranking[b + t] = (int32_t)own[below(word_of(positive, t), degree)];
            ranking[2 * b + t] = (int32_t)outside(own, degree, below(word_of(negative, t), n_items - degree));
        }
        failed = k && draw(base, KD_USERS, p, k, drawn);
    }
    if (!failed) {
        const uint64_t first = lane_of(base, KD_FIRST), second = lane_of(base, KD_SECOND);
        for (int64_t t = 0; t < k; t++) {
            distillation[t] = (int32_t)pool[drawn[t]];
            distillation[k + t] = (int32_t)below(word_of(first, t), n_items);
            distillation[2 * k + t] = (int32_t)below(word_of(second, t), n_items);
        }
    }
    free(drawn);
    return failed ? -1 : 0;
}
