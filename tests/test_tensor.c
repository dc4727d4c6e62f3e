#include <attn/safetensors.h>
#include <attn/tensor.h>

#include "core/random.h"
#include "tensor/half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* Every finite half converts to float and back unchanged, and rounding picks the nearest of its neighbours. */
static void test_f16_round_trip(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000; h++) {
        float x = attn_f16_to_f32((uint16_t)h);
        if (isnan(x)) {
            assert_true(isnan(attn_f16_to_f32(attn_f32_to_f16(x))));
        } else if (attn_f32_to_f16(x) != h) {
            fail_msg("half %04x -> %g -> %04x", h, (double)x, attn_f32_to_f16(x));
        }
    }
    attn_random random;
    attn_random_seed(&random, 5);
    for (int i = 0; i < 200000; i++) {
        float x = (float)(attn_random_normal(&random) * pow(2, attn_random_uniform(&random) * 40 - 26));
        uint16_t h = attn_f32_to_f16(x);
        float near = attn_f16_to_f32(h);
        if (isinf(near)) {
            assert_true(fabsf(x) >= 65520);
            continue;
        }
        float error = fabsf(near - x);
        float up = attn_f16_to_f32((uint16_t)(h + 1)), down = (h & 0x7fff) ? attn_f16_to_f32((uint16_t)(h - 1)) : near;
        if (error > fabsf(up - x) || error > fabsf(down - x)) {
            fail_msg("%.9g became %.9g, between %.9g and %.9g", (double)x, (double)near, (double)down, (double)up);
        }
    }
}

static void test_bf16_rounding(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000; h++) {
        float x = attn_bf16_to_f32((uint16_t)h);
        if (!isnan(x)) {
            assert_int_equal(attn_f32_to_bf16(x), h);
        }
    }
    assert_int_equal(attn_f32_to_bf16(attn_bits_float(0x3f808000)), 0x3f80); /* tie to even */
    assert_int_equal(attn_f32_to_bf16(attn_bits_float(0x3f818000)), 0x3f82);
    assert_true(isnan(attn_bf16_to_f32(attn_f32_to_bf16(NAN))));
}

static void test_copy_converts_and_follows_strides(void **state)
{
    (void)state;
    float source[24];
    for (int i = 0; i < 24; i++) {
        source[i] = (float)i - 3.5f;
    }
    /* [2,3,4] read as its transpose [4,3,2] with the last axis reversed. */
    attn_tensor view = {source + 12, ATTN_F32, 3, {4, 3, 2}, {1, 4, -12}};
    int64_t whole[24];
    attn_tensor to = attn_tensor_make(whole, ATTN_I64, 3, (int64_t[]){4, 3, 2});
    assert_int_equal(attn_tensor_copy(&to, &view), ATTN_OK);
    for (int a = 0; a < 4; a++) {
        for (int b = 0; b < 3; b++) {
            for (int c = 0; c < 2; c++) {
                assert_int_equal(whole[(a * 3 + b) * 2 + c], (int64_t)source[(1 - c) * 12 + b * 4 + a]);
            }
        }
    }
    uint8_t truth[24];
    attn_tensor bools = attn_tensor_make(truth, ATTN_BOOL, 3, (int64_t[]){4, 3, 2});
    source[0] = 0;
    assert_int_equal(attn_tensor_copy(&bools, &view), ATTN_OK);
    assert_int_equal(truth[1], 0);
    assert_int_equal(truth[0], 1);
    attn_tensor other = attn_tensor_make(whole, ATTN_I64, 2, (int64_t[]){4, 6});
    assert_int_equal(attn_tensor_copy(&other, &view), ATTN_ERR_SHAPE);
}

static void test_contiguity(void **state)
{
    (void)state;
    attn_tensor t = attn_tensor_make(NULL, ATTN_F32, 3, (int64_t[]){2, 1, 4});
    t.stride[1] = 99; /* an axis of one element may have any stride */
    assert_true(attn_tensor_is_contiguous(&t));
    t.stride[0] = 5;
    assert_false(attn_tensor_is_contiguous(&t));
    t.shape[2] = 0;
    assert_true(attn_tensor_is_contiguous(&t));
    attn_dtype dtype;
    assert_int_equal(attn_dtype_parse("BF16", &dtype), ATTN_OK);
    assert_int_equal(dtype, ATTN_BF16);
    assert_int_equal(attn_dtype_parse("f8", &dtype), ATTN_ERR_DTYPE);
}

static void test_safetensors_round_trip(void **state)
{
    (void)state;
    char path[] = "/tmp/attn-test-XXXXXX";
    int descriptor = mkstemp(path);
    assert_true(descriptor >= 0);
    close(descriptor);
    uint8_t flags[3] = {1, 0, 1};
    float values[6] = {1, 2, 3, 4, 5, 6};
    const char *names[] = {"flags", "odd \"name\"\n", "none"};
    attn_tensor tensors[] = {attn_tensor_make(flags, ATTN_BOOL, 1, (int64_t[]){3}),
                             {values, ATTN_F32, 2, {3, 2}, {1, 3}},
                             attn_tensor_make(NULL, ATTN_I64, 2, (int64_t[]){0, 5})};
    const char *keys[] = {"mechanism"}, *metadata[] = {"dense"};
    assert_int_equal(attn_safetensors_write(path, 3, names, tensors, 1, keys, metadata), ATTN_OK);
    attn_safetensors *file;
    assert_int_equal(attn_safetensors_open(&file, path), ATTN_OK);
    assert_int_equal(attn_safetensors_count(file), 3);
    assert_string_equal(attn_safetensors_metadata(file, "mechanism"), "dense");
    assert_null(attn_safetensors_metadata(file, "nothing"));
    attn_tensor got;
    assert_int_equal(attn_safetensors_get(file, attn_safetensors_find(file, names[1]), &got), ATTN_OK);
    assert_int_equal((uintptr_t)got.data % 4, 0); /* stored unaligned, behind three bytes */
    for (int i = 0; i < 6; i++) {
        assert_true(((float *)got.data)[i] == values[i % 2 * 3 + i / 2]);
    }
    assert_int_equal(attn_safetensors_get(file, 2, &got), ATTN_OK);
    assert_int_equal(got.shape[1], 5);
    attn_safetensors_close(file);
    unlink(path);
    assert_int_equal(attn_safetensors_open(&file, path), ATTN_ERR_IO);
}

static void bad_header(const char *header, uint64_t length, size_t data_bytes, const char *words)
{
    size_t text = strlen(header);
    unsigned char *memory = calloc(8 + text + data_bytes, 1);
    for (int i = 0; i < 8; i++) {
        memory[i] = (unsigned char)(length >> (8 * i));
    }
    memcpy(memory + 8, header, text);
    attn_safetensors *file;
    attn_status status = attn_safetensors_open_memory(&file, memory, 8 + text + data_bytes);
    if (status != ATTN_ERR_FORMAT || strstr(attn_last_error(), words) == NULL) {
        fail_msg("header %s: got '%s' (%s), expected a format error with '%s'", header, attn_status_name(status),
                 attn_last_error(), words);
    }
    free(memory);
}

static void test_safetensors_lies(void **state)
{
    (void)state;
#define BAD(header, data_bytes, words) bad_header(header, sizeof(header) - 1, data_bytes, words)
    bad_header("{}", 1000, 0, "header length");
    bad_header("{}", UINT64_MAX, 0, "header length");
    BAD("[1]", 0, "JSON object");
    BAD("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4, "holds more");
    BAD("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 8, "do not agree");
    BAD("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, "outside");
    BAD("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 8, "whole number");
    BAD("{\"a\":{\"dtype\":\"F32\",\"shape\":[1e18,1e18,0.5],\"data_offsets\":[0,4]}}", 8, "whole number");
    BAD("{\"a\":{\"dtype\":\"F32\",\"shape\":[1000000000000,1000000000000],\"data_offsets\":[0,4]}}", 8, "holds more");
    BAD("{\"a\":{\"dtype\":\"F8\",\"shape\":[1],\"data_offsets\":[0,4]}}", 8, "data type");
    BAD("{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 8, "dimensions");
    BAD("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
        "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}", 8, "overlap");
    BAD("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
        "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, "two of that name");
    BAD("{\"a\":3}", 8, "missing");
    BAD("{\"__metadata__\":3}", 8, "__metadata__");
#undef BAD
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f16_round_trip),
        cmocka_unit_test(test_bf16_rounding),
        cmocka_unit_test(test_copy_converts_and_follows_strides),
        cmocka_unit_test(test_contiguity),
        cmocka_unit_test(test_safetensors_round_trip),
        cmocka_unit_test(test_safetensors_lies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
