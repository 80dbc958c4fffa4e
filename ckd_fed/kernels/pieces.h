/* What the kernels share: vectors, fetching ahead, and a team of threads that takes work in pieces. */
#ifndef CKD_PIECES_H
#define CKD_PIECES_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias)); /* 8 numbers; the compiler splits it where registers are narrower */
enum { LANES = 8, LINE = 16, ROWS = 64 }; /* of a vector, numbers of a cache line, and rows that a thread takes at a time */

static inline vec load(const float *at) { return *(const vec *)at; }

/* What is read soon, into the cache. */
static inline void fetch(const float *from, int64_t n) {
    for (int64_t k = 0; k < n; k += LINE) __builtin_prefetch(from + k, 0, 2);
}

static inline float total(vec v) {
    float sum = 0;
    for (int k = 0; k < LANES; k++) sum += v[k];
    return sum;
}

/* OpenMP's GOMP_parallel, which calls work(data) on each of n threads, and omp_get_thread_num. Without them, or with n = 1, the caller does all. */
typedef void (*team)(void (*work)(void *), void *data, unsigned n, unsigned flags);
typedef int (*member)(void);

/* Work in pieces. Each thread has a range of them and then helps with the others': a table's rows are passed over by the same core in one operation
 * after the other, torch's own among them, since rows that another core has written last are far away. */
enum { THREADS = 64 };
struct pieces {
    int64_t n;
    unsigned threads;
    member number;
    struct {
        _Alignas(64) atomic_long next;
    } taken[THREADS];
};

static inline int64_t first_of(const struct pieces *p, unsigned thread) { return p->n * thread / p->threads; }

static inline void divide(struct pieces *p, int64_t n, unsigned threads, member number) {
    p->n = n;
    p->threads = threads;
    p->number = number;
    for (unsigned k = 0; k < threads; k++) p->taken[k].next = first_of(p, k);
}

/* Of the calling thread. */
static inline unsigned number_of(const struct pieces *p) { return p->threads > 1 ? (unsigned)p->number() : 0; }

/* The next piece for a thread that is at the range of `*at`, which starts as its own; -1 where all are taken. */
static inline int64_t take(struct pieces *p, unsigned own, unsigned *helped) {
    for (; *helped < p->threads; ++*helped) {
        unsigned at = (own + *helped) % p->threads;
        int64_t piece = atomic_fetch_add_explicit(&p->taken[at].next, 1, memory_order_relaxed);
        if (piece < first_of(p, at + 1)) return piece;
    }
    return -1;
}

static inline void run(void (*work)(void *), void *data, struct pieces *p, int64_t n, team parallel, member number, unsigned threads) {
    if (threads > THREADS) threads = THREADS;
    if ((int64_t)threads > n) threads = n > 0 ? n : 1;
    if (!parallel || !number) threads = 1;
    divide(p, n, threads, number);
    if (threads > 1)
        parallel(work, data, threads, 0);
    else
        work(data);
}

#endif
