/* Adam's update of one tensor: torch's fused kernel number by number, rounded as it is, with another way to write the parameters.
 *
 * All threads have read them in the step, so a core that writes one must first have it taken from the others' caches. That stalls every store behind
 * it, of the moments too: 60 ns for a line of 16 numbers where cores have caches apart. Written past the caches it is 3 ns.
 */
#include <math.h>
#include <string.h>
#ifdef __SSE__
#include <immintrin.h>
#endif
#include "pieces.h"

enum { NUMBERS = 64 * ROWS, BLOCK = 256, ROWS_AHEAD = 4 }; /* that a thread takes at a time; of which the new ones are laid out; rows to fetch */

struct adam {
    float *parameter, *exp_avg, *exp_avg_sq;
    const float *gradient;
    int64_t n, d;
    const int64_t *rows;
    float of_avg, keep_sq, of_sq, step_size, correction, eps;
    struct pieces pieces;
};

static inline float multiply_add(float a, float b, float c) {
#ifdef FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline void update(const struct adam *a, const float *restrict parameter, const float *restrict gradient, float *restrict exp_avg,
                          float *restrict exp_avg_sq, float *restrict new, int64_t n) {
    const float of_avg = a->of_avg, keep_sq = a->keep_sq, of_sq = a->of_sq, step_size = a->step_size, correction = a->correction, eps = a->eps;
    for (int64_t k = 0; k < n; k++) {
        float g = gradient[k], m = multiply_add(of_avg, g - exp_avg[k], exp_avg[k]), v = multiply_add(of_sq * g, g, keep_sq * exp_avg_sq[k]);
        exp_avg[k] = m;
        exp_avg_sq[k] = v;
        new[k] = parameter[k] - step_size * m / (sqrtf(v) / correction + eps);
    }
}

/* Past the caches where all of `to` is of whole vectors. */
static inline void put(float *to, const float *from, int64_t n, int past) {
#ifdef __SSE__
    if (past && n % 4 == 0 && (uintptr_t)to % 16 == 0) {
        for (int64_t k = 0; k < n; k += 4) _mm_stream_ps(to + k, _mm_load_ps(from + k));
        return;
    }
#endif
    (void)past;
    memcpy(to, from, n * sizeof *to);
}

/* A row of the table, of which the gradient has one too. */
static void rows_work(void *data) {
    struct adam *a = data;
    const int past = a->pieces.threads > 1;
    unsigned own = number_of(&a->pieces), helped = 0;
    _Alignas(64) float new[BLOCK];
    for (int64_t piece; (piece = take(&a->pieces, own, &helped)) >= 0;) {
        int64_t end = (piece + 1) * ROWS < a->n ? (piece + 1) * ROWS : a->n;
        for (int64_t r = piece * ROWS; r < end; r++) {
            if (r + ROWS_AHEAD < a->n) {
                int64_t next = a->rows[r + ROWS_AHEAD] * a->d;
                fetch(a->parameter + next, a->d);
                fetch(a->exp_avg + next, a->d);
                fetch(a->exp_avg_sq + next, a->d);
            }
            for (int64_t c = 0; c < a->d; c += BLOCK) {
                int64_t k = a->rows[r] * a->d + c, n = a->d - c < BLOCK ? a->d - c : BLOCK;
                update(a, a->parameter + k, a->gradient + r * a->d + c, a->exp_avg + k, a->exp_avg_sq + k, new, n);
                put(a->parameter + k, new, n, past);
            }
        }
    }
#ifdef __SSE__
    _mm_sfence();
#endif
}

static void adam_work(void *data) {
    struct adam *a = data;
    const int past = a->pieces.threads > 1;
    unsigned own = number_of(&a->pieces), helped = 0;
    _Alignas(64) float new[BLOCK];
    for (int64_t piece; (piece = take(&a->pieces, own, &helped)) >= 0;) {
        int64_t end = (piece + 1) * NUMBERS < a->n ? (piece + 1) * NUMBERS : a->n;
        for (int64_t k = piece * NUMBERS; k < end; k += BLOCK) {
            int64_t n = end - k < BLOCK ? end - k : BLOCK;
            update(a, a->parameter + k, a->gradient + k, a->exp_avg + k, a->exp_avg_sq + k, new, n);
            put(a->parameter + k, new, n, past);
        }
    }
#ifdef __SSE__
    _mm_sfence();
#endif
}

/* The update of step number `step`, from 1: of n numbers; or of n rows of d numbers each, whose gradients are one behind the other. */
void ckd_adam(float *parameter, const float *gradient, float *exp_avg, float *exp_avg_sq, int64_t n, int64_t d, const int64_t *rows, double rate,
              double beta1, double beta2, double eps, double step, team parallel, member number, unsigned threads) {
    struct adam a = {parameter, exp_avg, exp_avg_sq, gradient, n, d, rows, 1 - beta1, beta2, 1 - beta2, rate / (1 - pow(beta1, step)),
                     sqrt(1 - pow(beta2, step)), eps, {0}};
    if (rows)
        run(rows_work, &a, &a.pieces, (n + ROWS - 1) / ROWS, parallel, number, threads);
    else
        run(adam_work, &a, &a.pieces, (n + NUMBERS - 1) / NUMBERS, parallel, number, threads);
}
