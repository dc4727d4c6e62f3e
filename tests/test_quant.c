/* Block formats against the golden file, and quantised linear layers against float64 on every instruction set. */
#include "kernel/dispatch.h"
#include "llm/quant.h"

#include "tensor/half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

static const attn_gguf_tensor_type types[] = {
    ATTN_GGUF_TENSOR_F32,  ATTN_GGUF_TENSOR_F16,  ATTN_GGUF_TENSOR_BF16, ATTN_GGUF_TENSOR_Q4_0,
    ATTN_GGUF_TENSOR_Q4_1, ATTN_GGUF_TENSOR_Q5_0, ATTN_GGUF_TENSOR_Q5_1, ATTN_GGUF_TENSOR_Q8_0,
    ATTN_GGUF_TENSOR_Q4_K, ATTN_GGUF_TENSOR_Q5_K, ATTN_GGUF_TENSOR_Q6_K,
};
#define TYPES (sizeof types / sizeof types[0])

static uint32_t state = 12345;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u; }
static float uniform(void) { return (float)(next() >> 8) / 8388608.0f - 1.0f; }

/* Random blocks with finite scales of ordinary size. */
static unsigned char *random_blocks(attn_gguf_tensor_type type, int64_t rows, int64_t columns)
{
    int size = attn_gguf_block_bytes(type);
    int64_t blocks = rows * columns / attn_gguf_block_elements(type);
    unsigned char *data = malloc((size_t)(blocks * size));
    for (int64_t i = 0; i < blocks * size; i++) {
        data[i] = (unsigned char)(next() >> 24);
    }
    for (int64_t b = 0; b < blocks; b++) {
        unsigned char *block = data + b * size;
        uint16_t d = attn_f32_to_f16(uniform()), m = attn_f32_to_f16(uniform());
        float number = uniform();
        switch (type) {
        case ATTN_GGUF_TENSOR_F32: memcpy(block, &number, 4); break;
        case ATTN_GGUF_TENSOR_BF16: d = attn_f32_to_bf16(number); memcpy(block, &d, 2); break;
        case ATTN_GGUF_TENSOR_Q6_K: memcpy(block + 208, &d, 2); break;
        case ATTN_GGUF_TENSOR_Q4_1:
        case ATTN_GGUF_TENSOR_Q5_1:
        case ATTN_GGUF_TENSOR_Q4_K:
        case ATTN_GGUF_TENSOR_Q5_K: memcpy(block + 2, &m, 2); memcpy(block, &d, 2); break;
        default: memcpy(block, &d, 2);
        }
    }
    return data;
}

static void dequantize_golden(void **unused)
{
    (void)unused;
    attn_gguf *file;
    assert_int_equal(attn_gguf_open(&file, TEST_DATA "/golden/gguf/blocks.gguf"), ATTN_OK);
    for (size_t i = 1; i < TYPES; i++) {
        char name[32];
        const attn_gguf_tensor *tensor = attn_gguf_tensor_find(file, attn_gguf_tensor_type_name(types[i]));
        snprintf(name, sizeof name, "%s.f32", attn_gguf_tensor_type_name(types[i]));
        const attn_gguf_tensor *expected = attn_gguf_tensor_find(file, name);
        assert_non_null(tensor);
        assert_non_null(expected);
        float out[3 * 256], reference[3 * 256];
        memcpy(reference, expected->data, sizeof reference);
        assert_int_equal(attn_gguf_dequantize(tensor->type, tensor->data, 3 * 256, out), ATTN_OK);
        for (int j = 0; j < 3 * 256; j++) {
            /* Q4_K and Q5_K subtract two products: the reference rounds both to float32 as well. */
            if (!(fabsf(out[j] - reference[j]) <= 1e-6f * fabsf(reference[j]))) {
                fail_msg("%s[%d]: %.9g, expected %.9g", name, j, out[j], reference[j]);
            }
        }
    }
    attn_gguf_close(file);
    float one;
    assert_int_equal(attn_gguf_dequantize((attn_gguf_tensor_type)10, &one, 256, &one), ATTN_ERR_UNSUPPORTED);
    assert_int_equal(attn_gguf_dequantize(ATTN_GGUF_TENSOR_Q8_0, &one, 33, &one), ATTN_ERR_ARGUMENT);
}

static int64_t reversed(const void *user, int64_t row) { return *(const int64_t *)user - 1 - row; }

static void pack_keeps_rows(void **unused)
{
    (void)unused;
    enum { ROWS = 35, COLUMNS = 512 };
    for (size_t i = 0; i < TYPES; i++) {
        unsigned char *data = random_blocks(types[i], ROWS, COLUMNS);
        attn_gguf_tensor tensor = {"test", types[i], 2, {COLUMNS, ROWS, 1, 1}, data, 0};
        attn_quant_matrix matrix;
        int64_t rows = ROWS;
        attn_arena *arena;
        assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
        assert_int_equal(attn_quant_matrix_pack(&matrix, arena, &tensor, ROWS, COLUMNS, reversed, &rows, 0, 2),
                         ATTN_OK);
        float *expected = malloc(sizeof(float) * ROWS * COLUMNS), row[COLUMNS];
        assert_int_equal(attn_gguf_dequantize(types[i], data, ROWS * COLUMNS, expected), ATTN_OK);
        for (int r = 0; r < ROWS; r++) {
            attn_quant_matrix_row(&matrix, r, row);
            for (int c = 0; c < COLUMNS; c++) {
                float want = expected[(ROWS - 1 - r) * COLUMNS + c];
                if (!(fabsf(row[c] - want) <= 1e-6f * fabsf(want))) {
                    fail_msg("%s row %d column %d: %.9g, expected %.9g", attn_gguf_tensor_type_name(types[i]), r, c,
                             row[c], want);
                }
            }
        }
        free(expected);
        free(data);
        attn_arena_destroy(arena);
    }
}

/* The activations as the kernels see them. */
static void dequantize_input(const attn_quant_input *input, int is_float, double *x)
{
    for (int64_t t = 0; t < input->tokens; t++) {
        int64_t first = t / ATTN_QUANT_GROUP * ATTN_QUANT_GROUP;
        int64_t group = attn_min_i64(ATTN_QUANT_GROUP, input->tokens - first);
        for (int64_t c = 0; c < input->columns; c++) {
            const attn_quant_x *q = input->q + first * input->units + c / 32 * group + (t - first);
            x[t * input->columns + c] = is_float ? input->x[t * input->columns + c]
                                                 : (double)q->scale * (128 * q->high[c % 32] + q->low[c % 32]);
        }
    }
}

static void multiply(const attn_quant_input *input, const attn_quant_product *products, int count, int threads)
{
    size_t bytes = attn_quant_scratch_bytes(input->columns);
    for (int i = 0; i < threads; i++) {
        void *scratch = attn_alloc(bytes);
        attn_quant_multiply(input, products, count, scratch, i, threads);
        attn_free(scratch);
    }
}

static void one_product(attn_gguf_tensor_type type, int64_t tokens, int64_t rows, int64_t columns)
{
    unsigned char *data = random_blocks(type, rows, columns);
    attn_gguf_tensor tensor = {"test", type, 2, {columns, rows, 1, 1}, data, 0};
    attn_quant_matrix matrix;
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    assert_int_equal(attn_quant_matrix_pack(&matrix, arena, &tensor, rows, columns, NULL, NULL, 0, 1), ATTN_OK);
    float *w = malloc(sizeof *w * (size_t)(rows * columns)), *x = malloc(sizeof *x * (size_t)(tokens * columns));
    float *out = malloc(sizeof *out * (size_t)(tokens * rows)),
          *again = malloc(sizeof *again * (size_t)(tokens * rows));
    double *seen = malloc(sizeof *seen * (size_t)(tokens * columns));
    assert_int_equal(attn_gguf_dequantize(type, data, rows * columns, w), ATTN_OK);
    for (int64_t i = 0; i < tokens * columns; i++) {
        x[i] = uniform() * (i % 97 == 0 ? 20.0f : 1.0f);
    }
    memset(x, 0, 32 * sizeof *x); /* a block of zeros */
    attn_quant_input input;
    assert_int_equal(attn_quant_input_make(&input, arena, tokens, columns), ATTN_OK);
    input.x = x;
    for (int64_t t = 0; t < tokens; t++) {
        attn_quant_input_row(&input, t);
    }
    dequantize_input(&input, matrix.format <= ATTN_QUANT_BF16, seen);
    for (int64_t i = 0; i < tokens * columns; i++) {
        float limit = matrix.format <= ATTN_QUANT_BF16 ? 0.0f : 20.0f / 32512.0f * 1.01f;
        assert_true(fabs(seen[i] - x[i]) <= limit);
    }
    attn_quant_product product = {&matrix, out, rows};
    multiply(&input, &product, 1, 1);
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t r = 0; r < rows; r++) {
            double sum = 0, size = 0;
            for (int64_t c = 0; c < columns; c++) {
                double term = seen[t * columns + c] * w[r * columns + c];
                sum += term;
                size += fabs(term);
            }
            if (!(fabs(out[t * rows + r] - sum) <= 3e-6 * size + 1e-6)) {
                fail_msg("%s %s, %lld tokens: [%lld][%lld] is %.9g, expected %.9g", attn_isa_name(attn_isa_current()),
                         attn_gguf_tensor_type_name(type), (long long)tokens, (long long)t, (long long)r,
                         out[t * rows + r], sum);
            }
        }
    }
    for (int threads = 2; threads <= 7; threads += 5) {
        product.out = again;
        memset(again, 0, sizeof *again * (size_t)(tokens * rows));
        multiply(&input, &product, 1, threads);
        assert_memory_equal(out, again, sizeof *out * (size_t)(tokens * rows));
    }
    attn_arena_destroy(arena);
    free(data);
    free(w);
    free(x);
    free(out);
    free(again);
    free(seen);
}

static void products_match(void **unused)
{
    (void)unused;
    static const int64_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 9, 24, 31};
    for (int isa = ATTN_ISA_LEVEL_SCALAR; isa <= ATTN_ISA_LEVEL_AVX512VNNI; isa++) {
        if (!attn_isa_available((attn_isa)isa)) {
            continue;
        }
        attn_isa_force((attn_isa)isa);
        for (size_t i = 0; i < TYPES; i++) {
            for (size_t t = 0; t < sizeof tokens / sizeof tokens[0]; t++) {
                int64_t rows[] = {64, 16, 33, 100};
                one_product(types[i], tokens[t], rows[t % 4], attn_gguf_block_elements(types[i]) == 256 ? 512 : 96);
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dequantize_golden),
        cmocka_unit_test(pack_keeps_rows),
        cmocka_unit_test(products_match),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
