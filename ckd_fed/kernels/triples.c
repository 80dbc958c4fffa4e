/* Margins of triples and their gradients, in one pass over the rows that they read.
 *
 * Torch's operations lay out what they gather; at a step's sizes that is more traffic than the tables themselves. Numbers are summed in an
 * order that does not depend on the number of threads.
 */
#include <string.h>
#include "pieces.h"

/* TILE * LANES columns of a row are summed at once, AHEAD triples' rows are fetched before they are read, and threads take TRIPLES triples
 * or ROWS rows at a time. */
enum { TILE = 8, AHEAD = 8, TRIPLES = 128 };

struct margins {
    const float *users, *items;
    const int64_t *user, *first, *second;
    int64_t n_users, n_items, d, n, ranked;
    float *margin;
    double *squares;
    atomic_int beyond;
    struct pieces pieces;
};

static inline int within(int64_t row, int64_t n) { return (uint64_t)row < (uint64_t)n; }

static inline float margin_of(const float *u, const float *i, const float *j, int64_t d) {
    vec sum = {0};
    int64_t c = 0;
    float rest = 0;
    for (; c + LANES <= d; c += LANES) sum += load(u + c) * (load(i + c) - load(j + c));
    for (; c < d; c++) rest += u[c] * (i[c] - j[c]);
    return total(sum) + rest;
}

static inline float squares_of(const float *u, const float *i, const float *j, int64_t d) {
    vec sum = {0};
    int64_t c = 0;
    float rest = 0;
    for (; c + LANES <= d; c += LANES) {
        vec a = load(u + c), b = load(i + c), e = load(j + c);
        sum += a * a + b * b + e * e;
    }
    for (; c < d; c++) rest += u[c] * u[c] + i[c] * i[c] + j[c] * j[c];
    return total(sum) + rest;
}

static void margins_work(void *data) {
    struct margins *m = data;
    const int64_t d = m->d;
    unsigned own = number_of(&m->pieces), helped = 0;
    for (int64_t chunk; (chunk = take(&m->pieces, own, &helped)) >= 0;) {
        int64_t start = chunk * TRIPLES, end = start + TRIPLES < m->n ? start + TRIPLES : m->n;
        double squares = 0;
        for (int64_t t = start; t < end; t++) {
            if (t + AHEAD < m->n) {
                fetch(m->users + m->user[t + AHEAD] * d, d);
                fetch(m->items + m->first[t + AHEAD] * d, d);
                fetch(m->items + m->second[t + AHEAD] * d, d);
            }
            if (!within(m->user[t], m->n_users) || !within(m->first[t], m->n_items) || !within(m->second[t], m->n_items)) {
                atomic_store_explicit(&m->beyond, 1, memory_order_relaxed);
                continue;
            }
            const float *u = m->users + m->user[t] * d, *i = m->items + m->first[t] * d, *j = m->items + m->second[t] * d;
            m->margin[t] = margin_of(u, i, j, d);
            if (t < m->ranked) squares += squares_of(u, i, j, d);
        }
        if (start < m->ranked) m->squares[chunk] = squares;
    }
}

/* margin[t] = users[user[t]] . (items[first[t]] - items[second[t]]); total: sum of squares of all rows that the first `ranked` triples read; squares: memory
 * for one number for each TRIPLES of these. 0, or -1 where a row is not in its table. */
int ckd_margins(const float *users, int64_t n_users, const float *items, int64_t n_items, int64_t d, const int64_t *user, const int64_t *first,
                const int64_t *second, int64_t n, int64_t ranked, float *margin, double *squares, float *total, team parallel, member number,
                unsigned threads) {
    struct margins m = {users, items, user, first, second, n_users, n_items, d, n, ranked, margin, squares, 0, {0}};
    run(margins_work, &m, &m.pieces, (n + TRIPLES - 1) / TRIPLES, parallel, number, threads);
    double sum = 0;
    for (int64_t chunk = 0; chunk * TRIPLES < ranked; chunk++) sum += squares[chunk];
    *total = (float)sum;
    return m.beyond ? -1 : 0;
}

struct gradient {
    const float *table, *other;
    const int64_t *rows, *starts, *places, *bags, *plus, *minus;
    const float *margin;
    float twice;
    int64_t d, n, triples, ranked;
    float *out;
    struct pieces pieces;
};

/* What one place adds to a row, of some columns: by * (plus - minus), or by * plus without a second row; and twice the row itself where it is ranked. */
static inline __attribute__((always_inline)) void add_columns(float *out, const float *plus, const float *minus, const float *own, float by, float twice,
                                                              int lanes) {
    for (int k = 0; k < lanes; k++) {
        vec of = load(plus + k * LANES);
        if (minus) of -= load(minus + k * LANES);
        vec sum = load(out + k * LANES) + by * of;
        if (own) sum += twice * load(own + k * LANES);
        *(vec *)(out + k * LANES) = sum;
    }
}

static inline __attribute__((always_inline)) void add_row(float *out, const float *plus, const float *minus, const float *own, float by, float twice,
                                                          int64_t d) {
    int64_t c = 0;
    for (; c + TILE * LANES <= d; c += TILE * LANES) add_columns(out + c, plus + c, minus ? minus + c : NULL, own ? own + c : NULL, by, twice, TILE);
    for (; c + LANES <= d; c += LANES) add_columns(out + c, plus + c, minus ? minus + c : NULL, own ? own + c : NULL, by, twice, 1);
    for (; c < d; c++) {
        out[c] += by * (minus ? plus[c] - minus[c] : plus[c]);
        if (own) out[c] += twice * own[c];
    }
}

/* Place by place and not row by row: most rows have few places, and a processor that guesses wrong where each row ends waits longer than it adds. */
static inline __attribute__((always_inline)) void add_places(const struct gradient *g, int64_t start, int64_t end, int of_users) {
    const int64_t d = g->d, first = g->starts[start], last = g->starts[end], all = g->starts[g->n];
    memset(g->out + start * d, 0, (end - start) * d * sizeof *g->out);
    for (int64_t p = first; p < last; p++) {
        if (p + AHEAD < all) {
            int64_t at = g->places[p + AHEAD], t = of_users || at < g->triples ? at : at - g->triples;
            fetch(g->other + g->plus[t] * d, d);
            if (of_users) fetch(g->other + g->minus[t] * d, d);
        }
        int64_t at = g->places[p], bag = g->bags[p], t = of_users || at < g->triples ? at : at - g->triples;
        const float by = t == at ? g->margin[t] : -g->margin[t];
        const float *plus = g->other + g->plus[t] * d, *minus = of_users ? g->other + g->minus[t] * d : NULL;
        if (t < g->ranked)
            add_row(g->out + bag * d, plus, minus, g->table + (g->rows ? g->rows[bag] : bag) * d, by, g->twice, d);
        else
            add_row(g->out + bag * d, plus, minus, NULL, by, 0, d);
    }
}

static void gradient_work(void *data) {
    struct gradient *g = data;
    unsigned own = number_of(&g->pieces), helped = 0;
    for (int64_t piece; (piece = take(&g->pieces, own, &helped)) >= 0;) {
        int64_t start = piece * ROWS, end = start + ROWS < g->n ? start + ROWS : g->n;
        if (g->minus)
            add_places(g, start, end, 1);
        else
            add_places(g, start, end, 0);
    }
}

/* Gradients of one table's rows, of n bags of places. Of users: places are triples, plus and minus their items, other the items' table. Of
 * items: places are triples as first items and, from `triples` on, as second ones; plus are their users, minus is NULL. bags: of each place; rows: of
 * each bag, or NULL for all. */
void ckd_gradient(const float *table, const float *other, int64_t d, const int64_t *rows, const int64_t *starts, const int64_t *places,
                  const int64_t *bags, int64_t n, const int64_t *plus, const int64_t *minus, int64_t triples, int64_t ranked, const float *margin,
                  float twice, float *out, team parallel, member number, unsigned threads) {
    struct gradient g = {table, other, rows, starts, places, bags, plus, minus, margin, twice, d, n, triples, ranked, out, {0}};
    run(gradient_work, &g, &g.pieces, (n + ROWS - 1) / ROWS, parallel, number, threads);
}

/* The distinct ones among k numbers, ascending, to `found`; how many there are, or -1 where one is not below n. `seen`: n bytes of 0. */
int64_t ckd_distinct(const int64_t *index, int64_t k, int64_t n, char *seen, int64_t *found) {
    int64_t count = 0;
    for (int64_t p = 0; p < k; p++) {
        if (!within(index[p], n)) return -1;
        seen[index[p]] = 1;
    }
    for (int64_t r = 0; r < n; r++) {
        found[count] = r;
        count += seen[r];
    }
    return count;
}

/* Places of an index in ascending order of what they name; rows: what each names; starts: n + 1, where each of n rows' begin. 0, or -1 where one is not
 * below n. */
int ckd_invert(const int64_t *index, int64_t k, int64_t n, int64_t *places, int64_t *rows, int64_t *starts) {
    for (int64_t r = 0; r <= n; r++) starts[r] = 0;
    for (int64_t p = 0; p < k; p++) {
        if (!within(index[p], n)) return -1;
        starts[index[p] + 1]++;
    }
    for (int64_t r = 1; r <= n; r++) starts[r] += starts[r - 1];
    for (int64_t p = 0; p < k; p++) {
        int64_t to = starts[index[p]]++;
        places[to] = p;
        rows[to] = index[p];
    }
    for (int64_t r = n; r > 0; r--) starts[r] = starts[r - 1];
    starts[0] = 0;
    return 0;
}
