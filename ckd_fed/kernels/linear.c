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

struct linear {
    const float *inputs, *weight, *bias;
    const int64_t *rows;
    int64_t n, inner, d;
    float *outputs;
    int packed, past;
    struct pieces pieces;
};

static inline __attribute__((always_inline)) void outputs_tile(const struct linear *l, int64_t at, int64_t c, int n, int vectors) {
    const int64_t *rows = l->rows + at;
    wide sum[FORWARD_ROWS][FORWARD_VECTORS];
    const float *inputs[FORWARD_ROWS];
    for (int i = 0; i < n; i++) {
        inputs[i] = l->inputs + rows[i] * l->inner;
        for (int v = 0; v < vectors; v++) sum[i][v] = load_wide(l->bias + c + v * WIDE);
    }
    for (int64_t k = 0; k < l->inner; k++) {
        wide weight[FORWARD_VECTORS];
        for (int v = 0; v < vectors; v++) weight[v] = load_wide(l->weight + k * l->d + c + v * WIDE);
        for (int i = 0; i < n; i++)
            for (int v = 0; v < vectors; v++) sum[i][v] += inputs[i][k] * weight[v];
    }
    for (int i = 0; i < n; i++)
        for (int v = 0; v < vectors; v++) store_wide(l->outputs + (l->packed ? at + i : rows[i]) * l->d + c + v * WIDE, sum[i][v], l->past);
}

static inline __attribute__((always_inline)) void outputs_rows(const struct linear *l, int64_t at, int n) {
    int64_t c = 0;
    for (; c + FORWARD_VECTORS * WIDE <= l->d; c += FORWARD_VECTORS * WIDE) outputs_tile(l, at, c, n, FORWARD_VECTORS);
    for (; c < l->d; c += WIDE) outputs_tile(l, at, c, n, 1);
}

static void linear_work(void *data) {
    struct linear *l = data;
    unsigned own = number_of(&l->pieces), helped = 0;
    for (int64_t piece; (piece = take(&l->pieces, own, &helped)) >= 0;) {
        int64_t at = piece * ROWS, end = at + ROWS < l->n ? at + ROWS : l->n;
        for (; at + FORWARD_ROWS <= end; at += FORWARD_ROWS) {
            for (int64_t next = at + FORWARD_ROWS; next < at + 2 * FORWARD_ROWS && next < l->n; next++) fetch(l->inputs + l->rows[next] * l->inner, l->inner);
            outputs_rows(l, at, FORWARD_ROWS);
        }
        for (; at < end; at++) outputs_rows(l, at, 1);
    }
#ifdef __AVX__
    _mm_sfence();
#endif
}

/* outputs[row] = inputs[row] weight (inner, d) + bias (d) for n rows, d a multiple of 16; packed: outputs are one behind the other. past: whether they are
 * read one by one, by all cores, rather than each again by the core that wrote it. */
void ckd_linear(const float *inputs, const float *weight, const float *bias, const int64_t *rows, int64_t n, int64_t inner, int64_t d, float *outputs,
                int packed, int past, team parallel, member number, unsigned threads) {
    struct linear l = {inputs, weight, bias, rows, n, inner, d, outputs, packed, past && threads > 1 && (uintptr_t)outputs % (4 * WIDE) == 0, {0}};
    run(linear_work, &l, &l.pieces, (n + ROWS - 1) / ROWS, parallel, number, threads);
}

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
