/* Few query rows over many keys: memory is the limit, so the keys and values of a group are read once, as they lie, for all its rows. */
#include "exec/stairs_work.h"

#include <math.h>
#include <string.h>

#define STEP 256 /* keys of a step of the online softmax; a multiple of all vector widths */

int64_t attn_stairs_few_size(const stairs_problem *p)
{
    return STAIRS_FEW * (2 * p->d + p->dv_pad + 3 + STEP) + STEP;
}

/* s [count] += the relative terms of row r of a head and keys [low, low+count), from the tables as they lie. */
static void add_relative(const stairs_problem *p, const attn_stairs_head *head, int64_t r, const float *rel_q, int64_t low, int64_t count,
                         float *s, float *slice)
{
    int64_t at = head->zero + low - (head->first + r);
    p->decode->scores(slice, STEP, rel_q, p->d, 1, head->rel_emb + at * head->rel_stride, ATTN_F32, 0, head->rel_stride, count, p->d);
    p->kernels->axpy(s, slice, count, 1);
    for (int64_t j = 0; j < count && head->rel_bias != NULL; j++) {
        s[j] += p->factor * head->rel_bias[(at + j) * head->rel_bias_stride];
    }
}

void attn_stairs_few(const stairs_problem *p, const stairs_group *group, float *scratch)
{
    const attn_tile_kernels *kernels = p->kernels;
    const attn_stairs_head *first = &p->stairs->heads[group->head];
    float *q = scratch, *rel_q = q + STAIRS_FEW * p->d, *o = rel_q + STAIRS_FEW * p->d, *s = o + STAIRS_FEW * p->dv_pad;
    float *m = s + STAIRS_FEW * STEP, *l = m + STAIRS_FEW, *alpha = l + STAIRS_FEW, *slice = alpha + STAIRS_FEW;
    const attn_stairs_head *head[STAIRS_FEW];
    int64_t row[STAIRS_FEW], rows = 0;
    for (int64_t h = group->head; h < group->next; h++) {
        attn_stairs_begin_rows(p, h, 0, p->stairs->heads[h].rows, q + rows * p->d, o + rows * p->dv_pad, m + rows, l + rows);
        for (int64_t r = 0; r < p->stairs->heads[h].rows; r++, rows++) {
            head[rows] = &p->stairs->heads[h];
            row[rows] = r;
            if (p->relative) {
                kernels->load_row(rel_q + rows * p->d, head[rows]->q + r * p->d, ATTN_F32, p->d, p->factor);
            }
        }
    }
    for (int64_t low = 0; low < group->end; low += STEP) {
        int64_t keys = attn_min_i64(STEP, group->end - low), count = stairs_up(keys, kernels->vw);
        p->decode->scores(s, STEP, q, p->d, rows, first->k + low * p->d, ATTN_F32, 0, p->d, keys, p->d);
        for (int64_t i = 0; i < rows; i++) {
            int64_t seen = attn_max_i64(0, attn_min_i64(keys, head[i]->end[row[i]] - low));
            if (p->relative && seen > 0) {
                add_relative(p, head[i], row[i], rel_q + i * p->d, low, seen, s + i * STEP, slice);
            }
            stairs_mask_tail(s + i * STEP, 0, count, seen);
        }
        kernels->softmax(rows, s, STEP, count, m, l, alpha);
        for (int64_t i = 0; i < rows; i++) {
            if (alpha[i] != 1.0f) {
                kernels->scale(o + i * p->dv_pad, p->dv, alpha[i]);
            }
        }
        p->decode->values(o, p->dv_pad, s, STEP, rows, first->v + low * p->dv, ATTN_F32, 0, p->dv, keys, p->dv);
    }
    for (int64_t i = 0; i < rows; i++) {
        attn_stairs_finish_row(p, head[i], row[i], o + i * p->dv_pad, m[i], l[i]);
    }
}

attn_stairs_steps attn_stairs_steps_begin(const attn_stairs *stairs, attn_stairs_head *room)
{
    attn_stairs_steps steps = {*stairs, stairs->heads, room};
    for (int64_t h = 0; h < stairs->head_count; h++) {
        room[h] = stairs->heads[h];
        room[h].rows = 0;
    }
    steps.now.heads = room;
    return steps;
}

attn_status attn_stairs_steps_next(attn_stairs_steps *steps, int64_t end, attn_arena *arena, int threads)
{
    const attn_stairs *s = &steps->now;
    for (int64_t h = 0; h < s->head_count; h++) {
        attn_stairs_head *head = &steps->room[h];
        const attn_stairs_head *all = &steps->all[h];
        int64_t done = head->end - all->end + head->rows;
        *head = *all;
        head->rows = done < all->rows && all->end[done] <= end;
        head->q += all->q_row != NULL ? 0 : done * s->d;
        head->q_row = all->q_row != NULL ? all->q_row + done : NULL;
        head->end += done;
        head->own_k = all->own_k != NULL ? all->own_k + done * s->d : NULL;
        head->own_v = all->own_v != NULL ? all->own_v + done * s->dv : NULL;
        head->first += done;
        head->o += done * s->dv;
        head->lse = all->lse != NULL ? all->lse + done : NULL;
    }
    return attn_stairs_forward(s, arena, threads);
}
