/* Margins of triples and their gradients, in one pass over the rows that they read.
 *
 * Torch's operations lay out what they gather; at a step's sizes that is more traffic than the tables themselves. Numbers are summed in an
 * order that does not depend on the number of threads.
 */
#include "pieces.h"

/* TILE * LANES columns of a row's gradient are summed at once, AHEAD triples' rows are fetched before they are read, and threads take TRIPLES triples
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
            if (t + AHEAD < end) {
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
    const int64_t *rows, *starts, *places, *plus, *minus;
    const float *margin;
    float twice;
    int64_t d, n, triples, ranked;
    float *out;
    struct pieces pieces;
};

/* The end of a tile: most rows are in no ranked triple, and are then not read at all. */
static inline void store(const struct gradient *g, int64_t seen, const float *own, float *out, int64_t c, int lanes, vec *sum) {
    if (seen) {
        float by = g->twice * seen;
        for (int k = 0; k < lanes; k++) sum[k] += by * load(own + c + k * LANES);
    }
    for (int k = 0; k < lanes; k++) *(vec *)(out + c + k * LANES) = sum[k];
}

/* One tile of columns of one row's gradient. */
static inline void users_tile(const struct gradient *g, int64_t bag, const float *own, float *out, int64_t c, int lanes) {
    vec sum[TILE] = {{0}};
    int64_t seen = 0;
    for (int64_t p = g->starts[bag]; p < g->starts[bag + 1]; p++) {
        int64_t t = g->places[p];
        const float *i = g->other + g->plus[t] * g->d + c, *j = g->other + g->minus[t] * g->d + c;
        float by = g->margin[t];
        seen += t < g->ranked;
        for (int k = 0; k < lanes; k++) sum[k] += by * (load(i + k * LANES) - load(j + k * LANES));
    }
    store(g, seen, own, out, c, lanes, sum);
}

static inline void items_tile(const struct gradient *g, int64_t bag, const float *own, float *out, int64_t c, int lanes) {
    vec sum[TILE] = {{0}};
    int64_t seen = 0;
    for (int64_t p = g->starts[bag]; p < g->starts[bag + 1]; p++) {
        int64_t at = g->places[p], t = at < g->triples ? at : at - g->triples;
        const float *u = g->other + g->plus[t] * g->d + c;
        float by = at < g->triples ? g->margin[t] : -g->margin[t];
        seen += t < g->ranked;
        for (int k = 0; k < lanes; k++) sum[k] += by * load(u + k * LANES);
    }
    store(g, seen, own, out, c, lanes, sum);
}

static void gradient_work(void *data) {
    struct gradient *g = data;
    const int64_t d = g->d;
    unsigned own_range = number_of(&g->pieces), helped = 0;
    for (int64_t piece; (piece = take(&g->pieces, own_range, &helped)) >= 0;) {
        int64_t start = piece * ROWS, end = start + ROWS < g->n ? start + ROWS : g->n, last = g->starts[end];
        for (int64_t bag = start; bag < end; bag++) {
            const float *own = g->table + (g->rows ? g->rows[bag] : bag) * d;
            float *out = g->out + bag * d;
            for (int64_t p = g->starts[bag] + AHEAD; p < g->starts[bag + 1] + AHEAD && p < last; p++) {
                int64_t at = g->places[p], t = g->minus || at < g->triples ? at : at - g->triples;
                fetch(g->other + g->plus[t] * d, d);
                if (g->minus) fetch(g->other + g->minus[t] * d, d);
            }
            int64_t c = 0;
            for (; c + TILE * LANES <= d; c += TILE * LANES) (g->minus ? users_tile : items_tile)(g, bag, own, out, c, TILE);
            for (; c + LANES <= d; c += LANES) (g->minus ? users_tile : items_tile)(g, bag, own, out, c, 1);
            for (; c < d; c++) {
                float sum = 0;
                int64_t seen = 0;
                for (int64_t p = g->starts[bag]; p < g->starts[bag + 1]; p++) {
                    int64_t at = g->places[p], t = g->minus || at < g->triples ? at : at - g->triples;
                    float by = t == at ? g->margin[t] : -g->margin[t];
                    float of = g->other[g->plus[t] * d + c];
                    seen += t < g->ranked;
                    sum += by * (g->minus ? of - g->other[g->minus[t] * d + c] : of);
                }
                out[c] = seen ? sum + g->twice * seen * own[c] : sum;
            }
        }
    }
}

/* Gradients of one table's rows, of n bags of places. Of users: places are triples, plus and minus their items, other the items' table. Of
 * items: places are triples as first items and, from `triples` on, as second ones; plus are their users, minus is NULL. rows: of each bag, or
 * NULL for all. */
void ckd_gradient(const float *table, const float *other, int64_t d, const int64_t *rows, const int64_t *starts, const int64_t *places, int64_t n,
                  const int64_t *plus, const int64_t *minus, int64_t triples, int64_t ranked, const float *margin, float twice, float *out,
                  team parallel, member number, unsigned threads) {
    struct gradient g = {table, other, rows, starts, places, plus, minus, margin, twice, d, n, triples, ranked, out, {0}};
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

/* Places of an index in ascending order of what they name; starts: n + 1, where each of n rows' begin. 0, or -1 where one is not below n. */
int ckd_invert(const int64_t *index, int64_t k, int64_t n, int64_t *places, int64_t *starts) {
    for (int64_t r = 0; r <= n; r++) starts[r] = 0;
    for (int64_t p = 0; p < k; p++) {
        if (!within(index[p], n)) return -1;
        starts[index[p] + 1]++;
    }
    for (int64_t r = 1; r <= n; r++) starts[r] += starts[r - 1];
    for (int64_t p = 0; p < k; p++) places[starts[index[p]]++] = p;
    for (int64_t r = n; r > 0; r--) starts[r] = starts[r - 1];
    starts[0] = 0;
    return 0;
}
