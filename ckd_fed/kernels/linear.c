/* A linear layer on some rows of a constant table, and its gradient.
 *
 * A thread has the same range of rows in both and in triples.c, so that what one kernel writes the next finds on the same core. The products themselves
 * are as fast as the processor multiplies: a tile of sums stays in registers. Sums do not depend on the number of threads.
 */
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#include "pieces.h"

/* Numbers of a vector. A tile is, forward, of FORWARD_ROWS rows and FORWARD_VECTORS vectors of columns, backward of BACKWARD_ROWS outputs and BACKWARD_VECTORS
 * vectors of inputs, in whole of fewer vectors than the processor has registers. */
#ifdef __AVX512F__
enum { WIDE = 16, FORWARD_ROWS = 6, FORWARD_VECTORS = 4, BACKWARD_ROWS = 8, BACKWARD_VECTORS = 2 };
#else
enum { WIDE = 8, FORWARD_ROWS = 6, FORWARD_VECTORS = 2, BACKWARD_ROWS = 4, BACKWARD_VECTORS = 2 };
#endif
enum { GROUPS = 16, CHUNK = 64, NUMBERS = 512 }; /* sums of gradients, each of a range of rows; rows of one that stay in the cache; numbers added up at a time */

typedef float wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

static inline wide load_wide(const float *at) { return *(const wide *)at; }

/* Past the caches: other cores have read what was there before, see adam.c. */
static inline void store_wide(float *at, wide value, int past) {
#if defined(__AVX512F__)
    if (past) {
        _mm512_stream_ps(at, (__m512)value);
        return;
    }
#elif defined(__AVX__)
    if (past) {
        _mm256_stream_ps(at, (__m256)value);
        return;
    }
#endif
    (void)past;
    *(wide *)at = value;
}

/* Features of 16 bits are multiplied in pairs, where the processor has an instruction for them: two products a number, summed in float. A pair is of two
 * inputs of a row forward, and of one input in two rows backward. */
#ifdef __AVX512BF16__
static inline wide add_pairs(wide sum, __m512i one, __m512i other) {
    return (wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)one, (__m512bh)other);
}

static inline __m512i widened(const uint16_t *at) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)); }

static inline __m512i paired(__m512i first, __m512i second) { return _mm512_or_si512(first, _mm512_slli_epi32(second, 16)); }

static inline __m512i rounded(const float *at) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(at))); }
#endif

/* Inputs and weight are of float, or inputs of bfloat16 and the weight of its pairs. */
struct linear {
    const void *inputs, *weight;
    const float *bias;
    const int64_t *rows;
    int64_t n, inner, d;
    float *outputs;
    int packed, past;
    struct pieces pieces;
};

typedef wide tile[FORWARD_ROWS][FORWARD_VECTORS];

static inline __attribute__((always_inline)) void products(const struct linear *l, const int64_t *rows, int64_t c, int n, int vectors, tile sum) {
    const float *inputs[FORWARD_ROWS], *weights = l->weight;
    for (int i = 0; i < n; i++) inputs[i] = (const float *)l->inputs + rows[i] * l->inner;
    for (int64_t k = 0; k < l->inner; k++) {
        wide weight[FORWARD_VECTORS];
        for (int v = 0; v < vectors; v++) weight[v] = load_wide(weights + k * l->d + c + v * WIDE);
        for (int i = 0; i < n; i++)
            for (int v = 0; v < vectors; v++) sum[i][v] += inputs[i][k] * weight[v];
    }
}

#ifdef __AVX512BF16__
static inline __attribute__((always_inline)) void narrow_products(const struct linear *l, const int64_t *rows, int64_t c, int n, int vectors, tile sum) {
    const uint16_t *inputs[FORWARD_ROWS];
    const uint32_t *weights = l->weight;
    for (int i = 0; i < n; i++) inputs[i] = (const uint16_t *)l->inputs + rows[i] * l->inner;
    for (int64_t k = 0; k < l->inner; k += 2) {
        __m512i weight[FORWARD_VECTORS];
        for (int v = 0; v < vectors; v++) weight[v] = _mm512_loadu_si512(weights + k / 2 * l->d + c + v * WIDE);
        for (int i = 0; i < n; i++) {
            int pair;
            memcpy(&pair, inputs[i] + k, sizeof pair);
            for (int v = 0; v < vectors; v++) sum[i][v] = add_pairs(sum[i][v], _mm512_set1_epi32(pair), weight[v]);
        }
    }
}
#else
#define narrow_products products /* never called, see ckd_narrow */
#endif

static inline __attribute__((always_inline)) void outputs_tile(const struct linear *l, int64_t at, int64_t c, int n, int vectors, int narrow) {
    const int64_t *rows = l->rows + at;
    tile sum;
    for (int i = 0; i < n; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = load_wide(l->bias + c + v * WIDE);
    if (narrow)
        narrow_products(l, rows, c, n, vectors, sum);
    else
        products(l, rows, c, n, vectors, sum);
    for (int i = 0; i < n; i++)
        for (int v = 0; v < vectors; v++) store_wide(l->outputs + (l->packed ? at + i : rows[i]) * l->d + c + v * WIDE, sum[i][v], l->past);
}

static inline __attribute__((always_inline)) void outputs_rows(const struct linear *l, int64_t at, int n, int narrow) {
    int64_t c = 0;
    for (; c + FORWARD_VECTORS * WIDE <= l->d; c += FORWARD_VECTORS * WIDE) outputs_tile(l, at, c, n, FORWARD_VECTORS, narrow);
    for (; c < l->d; c += WIDE) outputs_tile(l, at, c, n, 1, narrow);
}

static inline __attribute__((always_inline)) void outputs_work(struct linear *l, int narrow) {
    const int64_t size = narrow ? l->inner / 2 : l->inner; /* of a row, in float */
    unsigned own = number_of(&l->pieces), helped = 0;
    for (int64_t piece; (piece = take(&l->pieces, own, &helped)) >= 0;) {
        int64_t at = piece * ROWS, end = at + ROWS < l->n ? at + ROWS : l->n;
        for (; at + FORWARD_ROWS <= end; at += FORWARD_ROWS) {
            for (int64_t next = at + FORWARD_ROWS; next < at + 2 * FORWARD_ROWS && next < l->n; next++)
                fetch((const float *)l->inputs + l->rows[next] * size, size);
            outputs_rows(l, at, FORWARD_ROWS, narrow);
        }
        for (; at < end; at++) outputs_rows(l, at, 1, narrow);
    }
#ifdef __AVX__
    _mm_sfence();
#endif
}

static void linear_work(void *data) { outputs_work(data, 0); }

/* outputs[row] = inputs[row] weight (inner, d) + bias (d) for n rows, d a multiple of 16; packed: outputs are one behind the other. past: whether they are
 * read one by one, by all cores, rather than each again by the core that wrote it. */
void ckd_linear(const float *inputs, const float *weight, const float *bias, const int64_t *rows, int64_t n, int64_t inner, int64_t d, float *outputs,
                int packed, int past, team parallel, member number, unsigned threads) {
    struct linear l = {inputs, weight, bias, rows, n, inner, d, outputs, packed, past && threads > 1 && (uintptr_t)outputs % (4 * WIDE) == 0, {0}};
    run(linear_work, &l, &l.pieces, (n + ROWS - 1) / ROWS, parallel, number, threads);
}

/* Whether there are ckd_linear_narrow and its gradient. */
int ckd_narrow(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512BF16__
static void narrow_work(void *data) { outputs_work(data, 1); }

/* As ckd_linear, of inputs in bfloat16; memory: inner * d numbers of 16 bits for the weight, which is rounded to it. inner a multiple of 16. */
void ckd_linear_narrow(const uint16_t *inputs, const float *weight, const float *bias, const int64_t *rows, int64_t n, int64_t inner, int64_t d,
                       float *outputs, int packed, int past, uint32_t *memory, team parallel, member number, unsigned threads) {
    for (int64_t k = 0; k < inner; k += 2)
        for (int64_t c = 0; c < d; c += WIDE)
            _mm512_storeu_si512(memory + k / 2 * d + c, paired(rounded(weight + k * d + c), rounded(weight + (k + 1) * d + c)));
    struct linear l = {inputs, memory, bias, rows, n, inner, d, outputs, packed, past && threads > 1 && (uintptr_t)outputs % (4 * WIDE) == 0, {0}};
    run(narrow_work, &l, &l.pieces, (n + ROWS - 1) / ROWS, parallel, number, threads);
}
#endif

struct linear_gradient {
    const float *inputs, *gradient;
    const int64_t *rows;
    int64_t n, inner, d;
    int packed;
    float *sums;
    struct pieces pieces;
};

static inline int64_t numbers_of(const struct linear_gradient *l) { return l->d * (l->inner + 1); } /* the weight's, then the bias' */

/* Where a row's inputs are and its gradient. */
struct place {
    const float *inputs, *gradient;
};

static inline __attribute__((always_inline)) void weight_tile(const struct place *places, int64_t n, int64_t inner, int64_t c, int64_t o, float *out,
                                                              int vectors) {
    wide sum[BACKWARD_ROWS][BACKWARD_VECTORS];
    out += o * inner + c;
    for (int i = 0; i < BACKWARD_ROWS; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = load_wide(out + i * inner + v * WIDE);
    for (int64_t r = 0; r < n; r++) {
        const float *inputs = places[r].inputs + c, *gradient = places[r].gradient + o;
        wide input[BACKWARD_VECTORS];
        for (int v = 0; v < vectors; v++) input[v] = load_wide(inputs + v * WIDE);
        for (int i = 0; i < BACKWARD_ROWS; i++)
            for (int v = 0; v < vectors; v++) sum[i][v] += gradient[i] * input[v];
    }
    for (int i = 0; i < BACKWARD_ROWS; i++)
        for (int v = 0; v < vectors; v++) store_wide(out + i * inner + v * WIDE, sum[i][v], 0);
}

static void sums_work(void *data) {
    struct linear_gradient *l = data;
    unsigned own = number_of(&l->pieces), helped = 0;
    struct place places[2 * CHUNK]; /* of the rows of this chunk, and of the next, which are fetched meanwhile */
    for (int64_t group; (group = take(&l->pieces, own, &helped)) >= 0;) {
        int64_t start = l->n * group / GROUPS, end = l->n * (group + 1) / GROUPS;
        float *weight = l->sums + group * numbers_of(l), *bias = weight + l->d * l->inner;
        memset(weight, 0, numbers_of(l) * sizeof *weight);
        for (int64_t at = start; at < end; at += CHUNK) {
            int64_t n = at + CHUNK < end ? CHUNK : end - at, fetched = n;
            int64_t known = at + 2 * CHUNK < end ? 2 * CHUNK : end - at;
            for (int64_t r = 0; r < known; r++) {
                int64_t row = l->rows[at + r];
                places[r] = (struct place){l->inputs + row * l->inner, l->gradient + (l->packed ? at + r : row) * l->d};
            }
            for (int64_t c = 0, step; c < l->inner; c += step * WIDE) {
                step = c + BACKWARD_VECTORS * WIDE <= l->inner ? BACKWARD_VECTORS : 1;
                for (int64_t o = 0; o < l->d; o += BACKWARD_ROWS) {
                    for (int64_t to = n + (known - n) * (c * l->d + o * step * WIDE) / (l->inner * l->d); fetched <= to && fetched < known; fetched++) {
                        fetch(places[fetched].inputs, l->inner);
                        fetch(places[fetched].gradient, l->d);
                    }
                    if (step == BACKWARD_VECTORS)
                        weight_tile(places, n, l->inner, c, o, weight, BACKWARD_VECTORS);
                    else
                        weight_tile(places, n, l->inner, c, o, weight, 1);
                }
            }
            for (int64_t r = 0; r < n; r++)
                for (int64_t o = 0; o < l->d; o++) bias[o] += places[r].gradient[o];
        }
    }
}

#ifdef __AVX512BF16__
struct narrow_gradient {
    const uint16_t *inputs;
    struct linear_gradient to; /* all else */
};

static inline __attribute__((always_inline)) void pairs_tile(const uint32_t *inputs, const uint32_t *gradient, int64_t pairs, int64_t inner, int64_t d,
                                                             int64_t c, int64_t o, float *out, int vectors) {
    wide sum[BACKWARD_ROWS][BACKWARD_VECTORS];
    out += o * inner + c;
    for (int i = 0; i < BACKWARD_ROWS; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = load_wide(out + i * inner + v * WIDE);
    for (int64_t r = 0; r < pairs; r++) {
        __m512i input[BACKWARD_VECTORS];
        for (int v = 0; v < vectors; v++) input[v] = _mm512_loadu_si512(inputs + r * inner + c + v * WIDE);
        for (int i = 0; i < BACKWARD_ROWS; i++)
            for (int v = 0; v < vectors; v++) sum[i][v] = add_pairs(sum[i][v], _mm512_set1_epi32((int)gradient[r * d + o + i]), input[v]);
    }
    for (int i = 0; i < BACKWARD_ROWS; i++)
        for (int v = 0; v < vectors; v++) store_wide(out + i * inner + v * WIDE, sum[i][v], 0);
}

static void narrow_sums_work(void *data) {
    struct narrow_gradient *w = data;
    struct linear_gradient *l = &w->to;
    const int64_t inner = l->inner, d = l->d;
    unsigned own = number_of(&l->pieces), helped = 0;
    _Alignas(64) uint32_t inputs[CHUNK / 2 * NUMBERS], gradient[CHUNK / 2 * NUMBERS]; /* of a chunk, in pairs */
    static const uint16_t no_inputs[NUMBERS];
    static const float no_gradient[NUMBERS];
    for (int64_t group; (group = take(&l->pieces, own, &helped)) >= 0;) {
        int64_t start = l->n * group / GROUPS, end = l->n * (group + 1) / GROUPS;
        float *weight = l->sums + group * numbers_of(l), *bias = weight + d * inner;
        memset(weight, 0, numbers_of(l) * sizeof *weight);
        for (int64_t at = start; at < end; at += CHUNK) {
            int64_t n = at + CHUNK < end ? CHUNK : end - at, pairs = (n + 1) / 2;
            for (int64_t r = at; r < at + n; r += 2) {
                int two = r + 1 < at + n;
                int64_t pair = (r - at) / 2, one_row = l->rows[r], other_row = two ? l->rows[r + 1] : 0;
                const uint16_t *one = w->inputs + one_row * inner, *other = two ? w->inputs + other_row * inner : no_inputs;
                const float *of_one = l->gradient + (l->packed ? r : one_row) * d;
                const float *of_other = two ? l->gradient + (l->packed ? r + 1 : other_row) * d : no_gradient;
                for (int64_t next = r + CHUNK; next < r + CHUNK + 2 && next < end; next++) {
                    fetch((const float *)(w->inputs + l->rows[next] * inner), inner / 2);
                    fetch(l->gradient + (l->packed ? next : l->rows[next]) * d, d);
                }
                for (int64_t c = 0; c < inner; c += WIDE) _mm512_storeu_si512(inputs + pair * inner + c, paired(widened(one + c), widened(other + c)));
                for (int64_t c = 0; c < d; c += WIDE) {
                    _mm512_storeu_si512(gradient + pair * d + c, paired(rounded(of_one + c), rounded(of_other + c)));
                    store_wide(bias + c, load_wide(bias + c) + load_wide(of_one + c) + load_wide(of_other + c), 0);
                }
            }
            for (int64_t c = 0, step; c < inner; c += step * WIDE) {
                step = c + BACKWARD_VECTORS * WIDE <= inner ? BACKWARD_VECTORS : 1;
                for (int64_t o = 0; o < d; o += BACKWARD_ROWS) {
                    if (step == BACKWARD_VECTORS)
                        pairs_tile(inputs, gradient, pairs, inner, d, c, o, weight, BACKWARD_VECTORS);
                    else
                        pairs_tile(inputs, gradient, pairs, inner, d, c, o, weight, 1);
                }
            }
        }
    }
}
#endif

static void add_work(void *data) {
    struct linear_gradient *l = data;
    const int64_t size = numbers_of(l);
    unsigned own = number_of(&l->pieces), helped = 0;
    for (int64_t piece; (piece = take(&l->pieces, own, &helped)) >= 0;) {
        int64_t start = piece * NUMBERS, end = start + NUMBERS < size ? start + NUMBERS : size;
        for (int group = 1; group < GROUPS; group++)
            for (int64_t k = start; k < end; k++) l->sums[k] += l->sums[group * size + k];
    }
}

/* Gradients of weight (d, inner) and bias (d), one behind the other at the start of `sums` (16, d * (inner + 1)), from those of n rows of the outputs; d
 * and inner multiples of 16; packed: these are one behind the other. */
void ckd_linear_gradient(const float *inputs, const float *gradient, const int64_t *rows, int64_t n, int64_t inner, int64_t d, int packed, float *sums,
                         team parallel, member number, unsigned threads) {
    struct linear_gradient l = {inputs, gradient, rows, n, inner, d, packed, sums, {0}};
    run(sums_work, &l, &l.pieces, GROUPS, parallel, number, threads);
    run(add_work, &l, &l.pieces, (numbers_of(&l) + NUMBERS - 1) / NUMBERS, parallel, number, threads);
}

#ifdef __AVX512BF16__
/* As ckd_linear_gradient, of inputs in bfloat16; the gradient of the outputs is rounded to it for the weight. inner and d at most 512. */
void ckd_linear_gradient_narrow(const uint16_t *inputs, const float *gradient, const int64_t *rows, int64_t n, int64_t inner, int64_t d, int packed,
                                float *sums, team parallel, member number, unsigned threads) {
    struct narrow_gradient w = {inputs, {NULL, gradient, rows, n, inner, d, packed, sums, {0}}};
    run(narrow_sums_work, &w, &w.to.pieces, GROUPS, parallel, number, threads);
    run(add_work, &w.to, &w.to.pieces, (numbers_of(&w.to) + NUMBERS - 1) / NUMBERS, parallel, number, threads);
}
#endif
