/* The distillation loss of a step: counterfactual weights, both losses, and their derivatives, in one pass over pairs and one over samples.
 *
 * Of torch's own operations it takes about a hundred, each of which costs more to call than what it computes. Formulas are those of effects.py and
 * losses.py, number by number. Sums do not depend on the number of threads.
 */
#include <math.h>
#include <string.h>
#include "pieces.h"

enum { SAMPLES = 256 }; /* that a thread takes at a time */

/* What is asked, of m modalities, b samples and k pairs. A mask is NULL where a teacher was asked about all. */
struct step {
    int64_t m, b, k;
    float rho, kappa, temperature;
    int reweight, specific, generic;
    const float *joint, *const *without, *const *only, *const *taught, *const *only_pairs, *const *taught_pairs;
    const char *const *asked, *const *asked_pairs;
    float *margin, *h, *effect, *weight, *slope, *slope_pairs, *g, *per_sample, *kd;
    double *sums; /* memory: of each modality and piece of pairs, g; then of each piece of samples, the weights of each modality, and per_sample */
};

struct distil {
    struct step step;
    struct pieces pieces;
};

static const float EPSILON = 1e-8f, LOWEST = 1e-8f, HIGHEST = 10;

static inline int64_t pieces_of(int64_t n) { return (n + SAMPLES - 1) / SAMPLES; }

static inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

/* slope_pairs: the derivative of the sum of g's terms, which the mean has yet to divide. */
static void pairs_work(void *data) {
    struct distil *work = data;
    const struct step *d = &work->step;
    const int64_t each = pieces_of(d->k);
    unsigned own = number_of(&work->pieces), helped = 0;
    for (int64_t piece; (piece = take(&work->pieces, own, &helped)) >= 0;) {
        int64_t m = piece / each, start = piece % each * SAMPLES, end = start + SAMPLES < d->k ? start + SAMPLES : d->k;
        double sum = 0;
        for (int64_t n = start; n < end; n++) {
            float *slope = d->slope_pairs + m * d->k + n;
            if (d->asked_pairs[m] && !d->asked_pairs[m][n]) {
                *slope = 0;
                continue;
            }
            float p = sigmoid(d->taught_pairs[m][n] / d->temperature), q = sigmoid(d->only_pairs[m][n] / d->temperature);
            float sure = q + EPSILON, unsure = 1 - q + EPSILON;
            sum -= p * logf(sure) + (1 - p) * logf(unsure);
            *slope = ((1 - p) / unsure - p / sure) * (q * (1 - q)) / d->temperature;
        }
        d->sums[piece] = sum;
    }
}

/* The effects of some samples, and of each sample their sum over the modalities that were asked and the number of these. */
static inline void effects(const struct step *d, int64_t at, int64_t n, float *total, float *asked) {
    memset(total, 0, n * sizeof *total);
    memset(asked, 0, n * sizeof *asked);
    for (int64_t m = 0; m < d->m; m++) {
        const float *joint = d->joint + at, *without = d->without[m] + at, *only = d->only[m] + at;
        const char *mask = d->asked[m] ? d->asked[m] + at : NULL;
        float *effect = d->effect + m * d->b + at;
        for (int64_t k = 0; k < n; k++) {
            float c = only[k] == 0 ? 0 : (joint[k] - without[k]) / only[k];
            c = c < LOWEST ? LOWEST : c;
            effect[k] = c > HIGHEST ? HIGHEST : c;
        }
        for (int64_t k = 0; k < n; k++) {
            float counts = mask ? mask[k] : 1;
            total[k] += counts * effect[k];
            asked[k] += counts;
        }
    }
}

static void samples_work(void *data) {
    struct distil *work = data;
    const struct step *d = &work->step;
    unsigned own = number_of(&work->pieces), helped = 0;
    float total[SAMPLES], asked[SAMPLES];
    for (int64_t piece; (piece = take(&work->pieces, own, &helped)) >= 0;) {
        int64_t at = piece * SAMPLES, n = at + SAMPLES < d->b ? SAMPLES : d->b - at;
        double *sums = d->sums + d->m * pieces_of(d->k) + piece * (d->m + 1), sum = 0;
        effects(d, at, n, total, asked);
        float *per_sample = d->per_sample + at;
        memset(per_sample, 0, n * sizeof *per_sample);
        for (int64_t m = 0; m < d->m; m++) {
            const float *only = d->only[m] + at, *taught = d->taught[m] + at, *effect = d->effect + m * d->b + at;
            const char *mask = d->asked[m] ? d->asked[m] + at : NULL;
            float *weight = d->weight + m * d->b + at, *h = d->h + m * d->b + at, *slope = d->slope + m * d->b + at;
            const float by = -d->rho / d->b, g = d->generic ? d->kappa * d->g[m] : 0;
            memcpy(d->margin + m * d->b + at, only, n * sizeof *only);
            for (int64_t k = 0; k < n; k++) {
                float w = d->reweight && asked[k] > 1 ? asked[k] / (asked[k] - 1) * (1 - effect[k] / total[k]) : 1;
                weight[k] = mask && !mask[k] ? 0 : w;
            }
            for (int64_t k = 0; k < n; k++) {
                float behind = taught[k] - only[k];
                h[k] = behind < 0 ? 0 : behind;
                slope[k] = d->specific && behind >= 0 ? by * weight[k] : 0;
                per_sample[k] += weight[k] * ((d->specific ? h[k] : 0) + g);
            }
            double of_weights = 0;
            for (int64_t k = 0; k < n; k++) of_weights += weight[k];
            sums[m] = of_weights;
        }
        for (int64_t k = 0; k < n; k++) sum += per_sample[k];
        sums[d->m] = sum;
    }
}

/* Over how many pairs a modality's g is a mean. */
static inline int64_t counted(const struct step *d, int64_t m) {
    int64_t asked = 0;
    if (!d->asked_pairs[m]) return d->k;
    for (int64_t n = 0; n < d->k; n++) asked += d->asked_pairs[m][n];
    return asked > 0 ? asked : 1;
}

/* Everything from `margin` on. slope and slope_pairs: derivatives of kd by the margins. At least one sample and one pair. */
void ckd_distil(const struct step *d, team parallel, member number, unsigned threads) {
    struct distil work = {*d, {0}};
    const int64_t of_pairs = pieces_of(d->k), of_samples = pieces_of(d->b);
    run(pairs_work, &work, &work.pieces, d->m * of_pairs, parallel, number, threads);
    for (int64_t m = 0; m < d->m; m++) {
        double sum = 0;
        for (int64_t piece = 0; piece < of_pairs; piece++) sum += d->sums[m * of_pairs + piece];
        d->g[m] = (float)(sum / counted(d, m));
    }
    run(samples_work, &work, &work.pieces, of_samples, parallel, number, threads);
    const double *sums = d->sums + d->m * of_pairs;
    double kd = 0;
    for (int64_t piece = 0; piece < of_samples; piece++) kd += sums[piece * (d->m + 1) + d->m];
    *d->kd = (float)(d->rho * kd / d->b);
    for (int64_t m = 0; m < d->m; m++) {
        double weights = 0;
        for (int64_t piece = 0; piece < of_samples; piece++) weights += sums[piece * (d->m + 1) + m];
        const float by = d->generic ? (float)((double)d->rho * d->kappa * weights / d->b / counted(d, m)) : 0;
        for (int64_t n = 0; n < d->k; n++) d->slope_pairs[m * d->k + n] *= by;
    }
}
