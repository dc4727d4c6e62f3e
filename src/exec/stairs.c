/* Attention of lists of query rows with an end each, forward. Tasks are blocks of rows of a head, or the few rows of a group of heads. */
#include "exec/stairs_work.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define ROWS 48 /* rows that go through keys together which all of them see: a panel serves several tiles while it is in L1 */
#define PACKED 8388608 /* bytes of packed keys from which on heads take turns */
#define LDS (STAIRS_BLOCK_K + 16) /* of their scores: rows at a multiple of 2 KB would share the lines of the first-level cache */

/* ---- What all passes share ---- */

void attn_stairs_pack(const attn_tile_kernels *kernels, float *to, const float *from, int64_t stride, int64_t rows, int64_t padded,
                      int64_t width)
{
    int64_t nr = kernels->nr;
    for (int64_t j = 0; j < padded; j += nr, to += width * nr) {
        int64_t count = attn_max_i64(0, attn_min_i64(nr, rows - j));
        if (count < nr) {
            memset(to, 0, (size_t)(width * nr) * sizeof *to);
        }
        if (count > 0) {
            kernels->pack_transposed(to, nr, from + j * stride, ATTN_F32, stride, count, width);
        }
    }
}

void attn_stairs_pad(const attn_tile_kernels *kernels, float *to, const float *from, int64_t rows, int64_t width, int64_t pad, float factor)
{
    for (int64_t r = 0; r < rows; r++, to += pad, from += width) {
        kernels->load_row(to, from, ATTN_F32, width, factor);
        for (int64_t c = width; c < pad; c++) {
            to[c] = 0;
        }
    }
}

void attn_stairs_queries(const stairs_problem *p, const attn_stairs_head *head, int64_t first, int64_t rows, int64_t pad, float *to)
{
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = head->q_row != NULL ? head->q_row[first + r] : first + r;
        attn_stairs_pad(p->kernels, to + r * pad, head->q + at * p->d, 1, p->d, pad, p->factor);
    }
    for (int64_t r = 0; r < rows && head->q_bias != NULL; r++) {
        p->kernels->axpy(to + r * pad, head->q_bias, p->d, p->factor);
    }
}

/* Groups of heads, and the longest row of each. */
static void find_groups(stairs_problem *p, int backward)
{
    for (int64_t h = 0; h < p->stairs->head_count; h++) {
        const attn_stairs_head *head = &p->stairs->heads[h];
        if (h == 0 || head->kv != head[-1].kv) {
            p->groups[p->group_count++] = (stairs_group){.head = h, .few = !backward && p->d > 0 && p->dv > 0};
        }
        stairs_group *group = &p->groups[p->group_count - 1];
        group->next = h + 1;
        for (int64_t r = 0; r < head->rows; r++) {
            group->end = attn_max_i64(group->end, head->end[r]);
        }
    }
    for (int64_t g = 0; g < p->group_count; g++) {
        int64_t rows = 0;
        for (int64_t h = p->groups[g].head; h < p->groups[g].next; h++) {
            rows += p->stairs->heads[h].rows;
        }
        p->groups[g].few &= rows <= STAIRS_FEW;
    }
}

/* The tables, one for all heads that read the same. */
static void find_tables(stairs_problem *p)
{
    for (int64_t h = 0; h < p->stairs->head_count; h++) {
        const attn_stairs_head *head = &p->stairs->heads[h];
        int64_t t = 0, nr = p->kernels->nr, low = attn_max_i64(0, head->zero - (head->first + head->rows - 1)) / nr * nr, reach = low;
        while (t < p->table_count && p->stairs->heads[p->tables[t].head].rel_emb != head->rel_emb) {
            t++;
        }
        p->table[h] = t;
        for (int64_t r = 0; r < head->rows; r++) {
            reach = attn_max_i64(reach, head->zero + head->end[r] - (head->first + r));
        }
        if (t == p->table_count) {
            p->tables[p->table_count++] = (stairs_table){.head = h, .low = low};
        }
        /* A slice may reach a step and a panel past the keys. */
        int64_t end = attn_max_i64(p->tables[t].low + p->tables[t].rows, stairs_up(reach, nr) + STAIRS_BLOCK_K + 2 * nr);
        p->tables[t].low = attn_min_i64(low, p->tables[t].low);
        p->tables[t].rows = end - p->tables[t].low;
    }
}

static void pack_table(const stairs_problem *p, const stairs_table *t, int64_t first)
{
    const attn_stairs_head *head = &p->stairs->heads[t->head];
    int64_t begin = t->low + first, rows = attn_min_i64(STAIRS_BLOCK_K, t->rows - first), there = attn_max_i64(0, head->rel_count - begin);
    if (t->emb != NULL) {
        const float *from = there > 0 ? head->rel_emb + begin * head->rel_stride : NULL;
        attn_stairs_pack(p->kernels, t->emb + first * p->d, from, head->rel_stride, there, rows, p->d);
    }
    for (int64_t i = 0; i < rows && t->bias != NULL; i++) {
        t->bias[first + i] = i < there ? p->factor * head->rel_bias[(begin + i) * head->rel_bias_stride] : 0.0f;
    }
}

/* Keys [first, end) of a head, where what is before them in a panel is packed. */
static void pack_keys(const stairs_problem *p, const attn_stairs_head *head, int64_t first, int64_t end)
{
    int64_t nr = p->kernels->nr;
    for (int64_t j = first, next; j < end; j = next) {
        int64_t column = j % nr;
        float *panel = p->k + (p->place[head->kv] * p->keys_pad + j - column) * p->d;
        next = attn_min_i64(end, j - column + nr);
        if (column == 0 && next - j < nr) {
            memset(panel, 0, (size_t)(p->d * nr) * sizeof *panel);
        }
        p->kernels->pack_transposed(panel + column, nr, head->k + j * p->d, ATTN_F32, p->d, next - j, p->d);
    }
    if (p->v != NULL && first < end) {
        attn_stairs_pad(p->kernels, p->v + (p->place[head->kv] * p->keys + first) * p->dv_pad, head->v + first * p->dv, end - first, p->dv, p->dv_pad, 1);
    }
}

attn_status attn_stairs_prepare(stairs_problem *p, const attn_stairs *s, int backward, attn_arena *arena, int threads)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    *p = (stairs_problem){.stairs = s, .kernels = kernels, .decode = attn_decode_kernels_get(), .d = s->d, .dv = s->dv,
                          .d_pad = stairs_up(s->d, kernels->vw), .dv_pad = stairs_up(s->dv, kernels->vw), .keys = s->keys,
                          .keys_pad = stairs_up(s->keys, kernels->nr), .factor = (float)(s->scale * ATTN_LOG2E)};
    p->groups = attn_arena_array(arena, (size_t)s->head_count, sizeof *p->groups);
    p->tables = attn_arena_array(arena, (size_t)s->head_count, sizeof *p->tables);
    p->table = attn_arena_array(arena, (size_t)s->head_count, sizeof *p->table);
    if (p->groups == NULL || p->tables == NULL || p->table == NULL) {
        return attn_fail_memory((size_t)s->head_count * sizeof *p->groups);
    }
    find_groups(p, backward);
    int packed = 0;
    for (int64_t g = 0; g < p->group_count; g++) {
        packed |= !p->groups[g].few;
        p->relative |= s->heads[p->groups[g].head].rel_emb != NULL;
    }
    if (p->relative && packed) {
        find_tables(p);
    }
    int64_t each = p->keys_pad * p->d * (int64_t)sizeof(float), turns = attn_ceil_div(p->group_count * each, PACKED);
    int64_t some = attn_max_i64(threads, attn_ceil_div(p->group_count, attn_max_i64(1, turns)));
    p->room = !packed ? 0 : backward || s->in_order ? s->kv_count : attn_min_i64(some, p->group_count);
    p->place = attn_arena_array(arena, (size_t)s->kv_count, sizeof *p->place);
    p->k = attn_arena_array(arena, (size_t)(p->room * p->keys_pad * p->d), sizeof(float));
    p->v = p->dv != p->dv_pad && !backward ? attn_arena_array(arena, (size_t)(p->room * p->keys * p->dv_pad), sizeof(float)) : NULL;
    if (p->place == NULL || p->k == NULL || (p->v == NULL && p->dv != p->dv_pad && !backward)) {
        return attn_fail_memory((size_t)(p->room * p->keys_pad * (p->d + p->dv_pad)) * sizeof(float));
    }
    for (int64_t t = 0; t < p->table_count; t++) {
        stairs_table *table = &p->tables[t];
        table->emb = attn_arena_array(arena, (size_t)(table->rows * (p->d + 1)), sizeof(float));
        if (table->emb == NULL) {
            return attn_fail_memory((size_t)(table->rows * (p->d + 1)) * sizeof(float));
        }
        table->bias = s->heads[table->head].rel_bias != NULL ? table->emb + table->rows * p->d : NULL;
    }
    return ATTN_OK;
}

void attn_stairs_pack_groups(stairs_problem *p, int64_t first, int64_t next, int threads)
{
    int64_t longest = p->keys, tables = first == 0 ? p->table_count : 0;
    for (int64_t g = first; g < next; g++) {
        p->place[p->stairs->heads[p->groups[g].head].kv] = g - first;
    }
    for (int64_t t = 0; t < tables; t++) {
        longest = attn_max_i64(longest, p->tables[t].rows);
    }
    int64_t chunks = attn_ceil_div(longest, STAIRS_BLOCK_K), all = p->room > 0 && !p->stairs->in_order ? next - first + tables : 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && all > 0)
    for (int64_t i = 0; i < all * chunks; i++) {
        int64_t which = i / chunks, at = i % chunks * STAIRS_BLOCK_K;
        if (which < next - first) {
            const stairs_group *group = &p->groups[first + which];
            pack_keys(p, &p->stairs->heads[group->head], at, group->few ? 0 : attn_min_i64(at + STAIRS_BLOCK_K, group->end));
        } else if (at < p->tables[which - (next - first)].rows) {
            pack_table(p, &p->tables[which - (next - first)], at);
        }
    }
}

void attn_stairs_add_relative(const stairs_problem *p, int64_t h, int64_t r, int64_t rows, const float *rel_q, int64_t low, int64_t count,
                              float *s, int64_t lds, float *slice)
{
    const attn_stairs_head *head = &p->stairs->heads[h];
    const stairs_table *table = &p->tables[p->table[h]];
    /* The first row of the slice, down to a whole panel, belongs to the last position and the first key. */
    int64_t nr = p->kernels->nr, zero = head->zero - table->low, begin = (zero + low - (head->first + r + rows - 1)) / nr * nr;
    int64_t width = stairs_up(zero + low + count - (head->first + r) - begin, p->kernels->vw);
    p->kernels->product(rows, width, p->d, rel_q, p->d, 1, table->emb + begin * p->d, nr, p->d * nr, slice, width, 0);
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = zero + low - (head->first + r + i);
        p->kernels->axpy(s + i * lds, slice + i * width + at - begin, count, 1);
        if (table->bias != NULL) {
            p->kernels->axpy(s + i * lds, table->bias + at, count, 1);
        }
    }
}

attn_status attn_stairs_workers(float **workers, const int64_t *sizes, int count, int threads, attn_arena *arena)
{
    for (int i = 0; i < count * threads; i++) {
        workers[i] = attn_arena_array(arena, (size_t)sizes[i % count], sizeof(float));
        if (workers[i] == NULL) {
            return attn_fail_memory((size_t)sizes[i % count] * sizeof(float));
        }
    }
    return ATTN_OK;
}

void attn_stairs_begin_rows(const stairs_problem *p, int64_t h, int64_t first, int64_t rows, float *q, float *o, float *m, float *l)
{
    const attn_stairs_head *head = &p->stairs->heads[h];
    int made = p->stairs->begin != NULL;
    if (made) {
        p->stairs->begin(p->stairs->user, h, first, rows, q, o, p->dv_pad, m);
    } else {
        attn_stairs_queries(p, head, first, rows, p->d, q);
    }
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = made ? p->dv : 0; c < p->dv_pad; c++) {
            o[r * p->dv_pad + c] = 0;
        }
        l[r] = made || head->own_k != NULL;
        m[r] = made ? m[r] : -INFINITY;
        if (!made && head->own_k != NULL) {
            m[r] = p->kernels->dot(q + r * p->d, head->own_k + (first + r) * p->d, p->d);
            memcpy(o + r * p->dv_pad, head->own_v + (first + r) * p->dv, (size_t)p->dv * sizeof *o);
        }
    }
}

void attn_stairs_finish_row(const stairs_problem *p, const attn_stairs_head *head, int64_t row, float *o, float m, float l)
{
    p->kernels->load_row(head->o + row * p->dv, o, ATTN_F32, p->dv, attn_softmax_inverse(l));
    if (head->lse != NULL) {
        head->lse[row] = attn_softmax_lse(m, l);
    }
}

/* ---- Forward ---- */

typedef struct worker {
    float *q, *rel_q, *o, *s, *slice, *m, *l, *alpha, *few;
} worker;

/* Rows [r, r+rows) of the block that starts at row `first` of head h, against keys [low, high), low a multiple of the panel width. */
static void attend(const stairs_problem *p, worker *w, int64_t h, int64_t first, int64_t r, int64_t rows, int64_t low, int64_t high)
{
    const attn_stairs_head *head = &p->stairs->heads[h];
    const attn_tile_kernels *kernels = p->kernels;
    int64_t nr = kernels->nr, count = stairs_up(high - low, kernels->vw);
    kernels->product(rows, count, p->d, w->q + r * p->d, p->d, 1, p->k + (p->place[head->kv] * p->keys_pad + low) * p->d, nr, p->d * nr, w->s,
                     LDS, 0);
    if (p->relative) {
        attn_stairs_add_relative(p, h, first + r, rows, w->rel_q + r * p->d, low, count, w->s, LDS, w->slice);
    }
    for (int64_t i = 0; i < rows; i++) {
        stairs_mask_tail(w->s + i * LDS, low, count, head->end[first + r + i]);
    }
    kernels->softmax(rows, w->s, LDS, count, w->m + r, w->l + r, w->alpha);
    for (int64_t i = 0; i < rows; i++) {
        if (w->alpha[i] != 1.0f) {
            kernels->scale(w->o + (r + i) * p->dv_pad, p->dv_pad, w->alpha[i]);
        }
    }
    const float *v = p->v != NULL ? p->v + (p->place[head->kv] * p->keys + low) * p->dv_pad : head->v + low * p->dv;
    kernels->product(rows, p->dv_pad, high - low, w->s, LDS, 1, v, p->dv_pad, nr, w->o + r * p->dv_pad, p->dv_pad, 1);
}

static void row_ends(const int64_t *end, int64_t rows, int64_t *least, int64_t *most)
{
    *least = INT64_MAX;
    *most = 0;
    for (int64_t i = 0; i < rows; i++) {
        *least = attn_min_i64(*least, end[i]);
        *most = attn_max_i64(*most, end[i]);
    }
}

/* Some rows against the keys of a step: what all of them see together, the rest by rows that see the same or (and with slices of relative
 * tables always) a tile's height at a time, which follows the ends more closely. */
static void attend_step(const stairs_problem *p, worker *w, int64_t h, int64_t first, int64_t r, int64_t rows, int64_t block)
{
    const int64_t *end = p->stairs->heads[h].end + first;
    int64_t limit = attn_min_i64(block + STAIRS_BLOCK_K, p->keys), nr = p->kernels->nr, least, most;
    row_ends(end + r, rows, &least, &most);
    int64_t whole = least >= limit ? limit : block + attn_max_i64(0, least - block) / nr * nr;
    if (p->relative) {
        whole = block;
    }
    if (whole > block) {
        attend(p, w, h, first, r, rows, block, whole);
    }
    for (int64_t i = r, some; i < r + rows && whole < attn_min_i64(most, limit); i += some) {
        int64_t unused, high;
        for (some = 1; !p->relative && i + some < r + rows && end[i + some] == end[i]; some++) {
        }
        some = attn_min_i64(attn_max_i64(p->kernels->mr, some), r + rows - i);
        row_ends(end + i, some, &unused, &high);
        high = attn_min_i64(high, limit);
        if (high > whole) {
            attend(p, w, h, first, i, some, whole, high);
        }
    }
}

static void forward_block(const stairs_problem *p, worker *w, int64_t h, int64_t first)
{
    const attn_stairs_head *head = &p->stairs->heads[h];
    int64_t rows = attn_min_i64(STAIRS_BLOCK_Q, head->rows - first), unused, last;
    attn_stairs_begin_rows(p, h, first, rows, w->q, w->o, w->m, w->l);
    if (p->relative) {
        attn_stairs_pad(p->kernels, w->rel_q, head->q + first * p->d, rows, p->d, p->d, p->factor);
    }
    row_ends(head->end + first, rows, &unused, &last);
    if (p->stairs->in_order) {
        pack_keys(p, head, first > 0 ? head->end[first - 1] : 0, last);
    }
    for (int64_t block = 0; block < last; block += STAIRS_BLOCK_K) {
        for (int64_t r = 0; r < rows; r += ROWS) {
            attend_step(p, w, h, first, r, attn_min_i64(ROWS, rows - r), block);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        attn_stairs_finish_row(p, head, first + r, w->o + r * p->dv_pad, w->m[r], w->l[r]);
    }
}

typedef struct task {
    int64_t head, first; /* a block of rows of a head, in order all of them; first -1: the group of few rows at `head` */
} task;

/* Of groups [first, next). The last blocks of a head see most keys: they come first. */
static int64_t list_tasks(const stairs_problem *p, int64_t first, int64_t next, task *tasks)
{
    int64_t count = 0;
    for (int64_t g = first; g < next; g++) {
        if (p->groups[g].few) {
            tasks[count++] = (task){g, -1};
        }
        for (int64_t h = p->groups[g].head; h < p->groups[g].next && !p->groups[g].few; h++) {
            int64_t blocks = attn_ceil_div(p->stairs->heads[h].rows, STAIRS_BLOCK_Q);
            for (int64_t b = p->stairs->in_order ? 0 : blocks - 1; b >= 0; b--) {
                tasks[count++] = (task){h, b * STAIRS_BLOCK_Q};
            }
        }
    }
    return count;
}

static attn_status forward(const attn_stairs *s, attn_arena *arena, int threads)
{
    stairs_problem p;
    ATTN_TRY(attn_stairs_prepare(&p, s, 0, arena, threads));
    int64_t mr = p.kernels->mr, slice = mr * (STAIRS_BLOCK_K + mr + 3 * p.kernels->nr), blocks = p.group_count;
    int few = 0, many = 0;
    for (int64_t g = 0; g < p.group_count; g++) {
        few |= p.groups[g].few;
        many |= !p.groups[g].few;
    }
    int64_t rows = many ? STAIRS_BLOCK_Q : 0;
    int64_t sizes[] = {rows * p.d, p.relative ? rows * p.d : 0, rows * p.dv_pad, many ? ROWS * LDS : 0,
                       p.relative && many ? slice : 0, rows, rows, ROWS, few ? attn_stairs_few_size(&p) : 0};
    for (int64_t h = 0; h < s->head_count; h++) {
        blocks += attn_ceil_div(s->heads[h].rows, STAIRS_BLOCK_Q);
    }
    worker *workers = attn_arena_array(arena, (size_t)threads, sizeof *workers);
    task *tasks = attn_arena_array(arena, (size_t)blocks, sizeof *tasks);
    if (workers == NULL || tasks == NULL) {
        return attn_fail_memory((size_t)blocks * sizeof *tasks);
    }
    ATTN_TRY(attn_stairs_workers((float **)workers, sizes, (int)(sizeof(worker) / sizeof(float *)), threads, arena));
    int64_t turn = p.room > 0 ? p.room : p.group_count;
    for (int64_t g = 0, next; g < p.group_count; g = next) {
        next = attn_min_i64(g + turn, p.group_count);
        attn_stairs_pack_groups(&p, g, next, threads);
        blocks = list_tasks(&p, g, next, tasks);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < blocks; t++) {
            worker *w = &workers[omp_get_thread_num()];
            if (tasks[t].first < 0) {
                attn_stairs_few(&p, &p.groups[tasks[t].head], w->few);
                continue;
            }
            int64_t end = s->in_order ? s->heads[tasks[t].head].rows : tasks[t].first + 1;
            for (int64_t first = tasks[t].first; first < end; first += STAIRS_BLOCK_Q) {
                forward_block(&p, w, tasks[t].head, first);
            }
        }
    }
    return ATTN_OK;
}

attn_status attn_stairs_forward(const attn_stairs *stairs, attn_arena *arena, int threads)
{
    attn_arena_mark mark = attn_arena_get_mark(arena);
    attn_status status = forward(stairs, arena, threads);
    attn_arena_release(arena, mark);
    return status;
}
