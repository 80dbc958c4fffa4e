/* Rows of a table moved by all the steps that each has missed: the formula is in drift.py. Rows are changed where they are. */
#include <math.h>
#include "pieces.h"

enum { COLUMNS = 64, ROWS_AHEAD = 4, FEW = 4, MANY = 6 }; /* of a row at a time; rows fetched before they are read; numbers of nodes */

struct drift {
    float *parameter, *exp_avg, *exp_avg_sq;
    int64_t d;
    const int64_t *rows;
    int64_t n, first, step;
    int64_t *last;
    const float *nodes, *products, *kept, *kept_sq;
    int64_t count;
    struct pieces pieces;
};

static inline __attribute__((always_inline)) void columns(float *restrict parameter, float *restrict exp_avg, float *restrict exp_avg_sq, int64_t n,
                                                          const float *nodes, const float *products, int count, float kept, float kept_sq) {
    float x[MANY], wx[MANY];
    for (int i = 0; i < count; i++) {
        x[i] = nodes[i];
        wx[i] = products[i];
    }
    for (int64_t c = 0; c < n; c++) {
        float root = sqrtf(exp_avg_sq[c]), sum = 0;
        for (int i = 0; i < count; i++) sum += wx[i] / (root + x[i]);
        parameter[c] -= exp_avg[c] * sum;
        exp_avg[c] *= kept;
        exp_avg_sq[c] *= kept_sq;
    }
}

static void drift_work(void *data) {
    struct drift *w = data;
    const int64_t d = w->d;
    unsigned own = number_of(&w->pieces), helped = 0;
    for (int64_t piece; (piece = take(&w->pieces, own, &helped)) >= 0;) {
        int64_t end = (piece + 1) * ROWS < w->n ? (piece + 1) * ROWS : w->n;
        for (int64_t r = piece * ROWS; r < end; r++) {
            if (r + ROWS_AHEAD < w->n) {
                int64_t next = w->rows ? w->rows[r + ROWS_AHEAD] : r + ROWS_AHEAD;
                fetch(w->parameter + next * d, d);
                fetch(w->exp_avg + next * d, d);
                fetch(w->exp_avg_sq + next * d, d);
            }
            int64_t row = w->rows ? w->rows[r] : r, at = w->last[row] - w->first, missed = w->step - w->last[row];
            if (!missed) continue;
            const float *nodes = w->nodes + at * w->count, *products = w->products + at * w->count, kept = w->kept[missed], kept_sq = w->kept_sq[missed];
            for (int64_t c = 0; c < d; c += COLUMNS) {
                int64_t k = row * d + c, n = c + COLUMNS < d ? COLUMNS : d - c;
                if (w->count == FEW)
                    columns(w->parameter + k, w->exp_avg + k, w->exp_avg_sq + k, n, nodes, products, FEW, kept, kept_sq);
                else
                    columns(w->parameter + k, w->exp_avg + k, w->exp_avg_sq + k, n, nodes, products, MANY, kept, kept_sq);
            }
            w->last[row] = w->step;
        }
    }
}

/* Rows (n, or NULL for all) of a table and of its moments, `last` being after which step each row of the table is as it stands, from `first` to `step`, and
 * then `step`. nodes: times epsilon, and products: `count` of each, FEW or MANY, of each step from `first` on; kept: what k steps leave of each moment, by k. */
void ckd_drift(float *parameter, float *exp_avg, float *exp_avg_sq, int64_t d, const int64_t *rows, int64_t n, int64_t first, int64_t step, int64_t *last,
               const float *nodes, const float *products, int64_t count, const float *kept, const float *kept_sq, team parallel, member number,
               unsigned threads) {
    struct drift w = {parameter, exp_avg, exp_avg_sq, d, rows, n, first, step, last, nodes, products, kept, kept_sq, count, {0}};
    run(drift_work, &w, &w.pieces, (n + ROWS - 1) / ROWS, parallel, number, threads);
}
