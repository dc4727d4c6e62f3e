/* Pictures of plans. */
#include "plan/plan.h"

#include <png.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static attn_status check_head(const attn_plan *plan, int64_t b, int64_t h)
{
    const attn_plan_shape *s = &plan->layout.shape;
    if (b < 0 || h < 0 || b >= s->batch || h >= s->heads) {
        return attn_fail(ATTN_ERR_ARGUMENT, "plan: batch item %lld, head %lld: expected below %lld and %lld", (long long)b, (long long)h,
                         (long long)s->batch, (long long)s->heads);
    }
    return ATTN_OK;
}

/* Add each entry's count of visible pairs to the cells of a picture of the blocks. */
static attn_status block_picture(const attn_plan *plan, int64_t list, int64_t high, int64_t wide, double *seen, double *pairs)
{
    const attn_plan_layout *y = &plan->layout;
    const attn_plan_shape *s = &y->shape;
    uint8_t *bits;
    ATTN_TRY(attn_plan_bitmaps(plan, 1, &bits));
    for (int64_t row = 0; row < y->rows; row++) {
        int64_t at = list * y->rows + row;
        for (int64_t c = 0; c < y->columns; c++) {
            pairs[row * high / y->rows * wide + c * wide / y->columns] += (double)(attn_plan_queries(s, row) * attn_plan_keys(s, c));
        }
        for (int64_t e = y->start[at]; e < y->start[at + 1]; e++) {
            int64_t count = 0;
            attn_plan_entry_bits(plan, list, row, e, bits);
            for (int64_t i = 0; i < y->bitmap_bytes; i++) {
                count += __builtin_popcount(bits[i]);
            }
            seen[row * high / y->rows * wide + y->column[e] * wide / y->columns] += (double)count;
        }
    }
    attn_free(bits);
    return ATTN_OK;
}

attn_status attn_plan_draw_text(const attn_plan *plan, int64_t b, int64_t h, int64_t width, char **text)
{
    const attn_plan_layout *y = &plan->layout;
    *text = NULL;
    ATTN_TRY(check_head(plan, b, h));
    if (width < 1 || width > 1 << 14) {
        return attn_fail(ATTN_ERR_ARGUMENT, "width = %lld, expected 1 ... %d", (long long)width, 1 << 14);
    }
    int64_t wide = attn_min_i64(width, y->columns);
    /* As many blocks to a line as to a column. */
    int64_t high = y->columns > 0 ? attn_max_i64(attn_min_i64(1, y->rows), attn_min_i64(attn_min_i64(y->rows, 1 << 14), y->rows * wide / y->columns)) : 0;
    double *cells = attn_calloc_array((size_t)(wide * high * 2) + 1, sizeof *cells);
    char *drawn = attn_alloc((size_t)(high * (wide + 1)) + 1);
    attn_status status = cells != NULL && drawn != NULL
                             ? block_picture(plan, attn_plan_list(plan, b, h), high, wide, cells, cells + wide * high)
                             : attn_fail_memory((size_t)(wide * high * 2) * sizeof *cells);
    char *to = drawn;
    for (int64_t i = 0; i < high * wide && status == ATTN_OK; i++) {
        double seen = cells[i], pairs = cells[wide * high + i];
        *to++ = seen == 0 ? '.' : seen < pairs ? '+' : '#';
        if (i % wide == wide - 1) {
            *to++ = '\n';
        }
    }
    attn_free(cells);
    if (status != ATTN_OK) {
        attn_free(drawn);
        return status;
    }
    *to = '\0';
    *text = drawn;
    return ATTN_OK;
}

void attn_plan_free_text(char *text) { attn_free(text); }

/* Token-level: each visible pair darkens the pixel that it falls in. */
static void token_picture(const attn_plan *plan, int64_t list, int64_t high, int64_t wide, uint8_t *bits, double *seen)
{
    const attn_plan_layout *y = &plan->layout;
    const attn_plan_shape *s = &y->shape;
    for (int64_t row = 0; row < y->rows; row++) {
        int64_t at = list * y->rows + row;
        for (int64_t e = y->start[at]; e < y->start[at + 1]; e++) {
            attn_plan_entry_bits(plan, list, row, e, bits);
            for (int64_t a = 0; a < attn_plan_queries(s, row); a++) {
                double *line = seen + (row * s->block_q + a) * high / s->n * wide;
                for (int64_t j = 0; j < attn_plan_keys(s, y->column[e]); j++) {
                    int64_t bit = a * s->block_k + j;
                    line[(y->column[e] * s->block_k + j) * wide / s->m] += bits[bit >> 3] >> (bit & 7) & 1;
                }
            }
        }
    }
}

attn_status attn_plan_draw_png(const attn_plan *plan, int64_t b, int64_t h, int64_t size, const char *path)
{
    const attn_plan_shape *s = &plan->layout.shape;
    ATTN_TRY(check_head(plan, b, h));
    if (size < 1 || size > 1 << 14 || s->n < 1 || s->m < 1) {
        return attn_fail(ATTN_ERR_ARGUMENT, "size = %lld, expected 1 ... %d, and a plan with queries and keys", (long long)size, 1 << 14);
    }
    int64_t wide = attn_min_i64(size, s->m), high = attn_min_i64(size, s->n);
    double *seen = attn_calloc_array((size_t)(wide * high), sizeof *seen);
    uint8_t *pixels = attn_alloc((size_t)(wide * high)), *bits = NULL;
    attn_status status = seen != NULL && pixels != NULL ? attn_plan_bitmaps(plan, 1, &bits)
                                                        : attn_fail_memory((size_t)(wide * high) * sizeof *seen);
    if (status == ATTN_OK) {
        token_picture(plan, attn_plan_list(plan, b, h), high, wide, bits, seen);
        for (int64_t i = 0; i < wide * high; i++) {
            int64_t py = i / wide, px = i % wide;
            double lines = (double)(attn_ceil_div((py + 1) * s->n, high) - attn_ceil_div(py * s->n, high));
            double keys = (double)(attn_ceil_div((px + 1) * s->m, wide) - attn_ceil_div(px * s->m, wide));
            pixels[i] = (uint8_t)(255 - (int)(255 * seen[i] / (lines * keys) + 0.5));
        }
        png_image image = {.version = PNG_IMAGE_VERSION, .width = (png_uint_32)wide, .height = (png_uint_32)high,
                           .format = PNG_FORMAT_GRAY};
        if (!png_image_write_to_file(&image, path, 0, pixels, 0, NULL)) {
            status = attn_fail(ATTN_ERR_IO, "cannot write %s: %s", path, image.message);
        }
        png_image_free(&image);
    }
    attn_free(seen);
    attn_free(pixels);
    attn_free(bits);
    return status;
}
