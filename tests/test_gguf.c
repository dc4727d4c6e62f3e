/* The GGUF reader: what a good file says, and a status for each kind of bad one. */
#include <attn/gguf.h>

#include "gguf_build.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static void reads_golden(void **unused)
{
    (void)unused;
    attn_gguf *file;
    assert_int_equal(attn_gguf_open(&file, TEST_DATA "/golden/gguf/blocks.gguf"), ATTN_OK);
    assert_int_equal(attn_gguf_version(file), 3);
    int64_t number;
    double half;
    int yes;
    attn_gguf_string text, names[3];
    int64_t list[3];
    assert_int_equal(attn_gguf_get_int(file, "test.number", &number), ATTN_OK);
    assert_int_equal(number, -5);
    assert_int_equal(attn_gguf_get_float(file, "test.half", &half), ATTN_OK);
    assert_true(half == 0.5);
    assert_int_equal(attn_gguf_get_float(file, "test.number", &half), ATTN_OK);
    assert_true(half == -5);
    assert_int_equal(attn_gguf_get_bool(file, "test.yes", &yes), ATTN_OK);
    assert_int_equal(yes, 1);
    assert_int_equal(attn_gguf_get_string(file, "general.architecture", &text), ATTN_OK);
    assert_int_equal(text.bytes, 4);
    assert_memory_equal(text.text, "test", 4);
    assert_int_equal(attn_gguf_get_strings(file, "test.names", names, 3), ATTN_OK);
    assert_int_equal(names[1].bytes, 0);
    assert_int_equal(names[2].bytes, 16);
    assert_memory_equal(names[2].text, "three words here", 16);
    assert_int_equal(attn_gguf_get_ints(file, "test.list", list, 3), ATTN_OK);
    assert_int_equal(list[1], -1);
    const attn_gguf_metadata *entry = attn_gguf_metadata_find(file, "test.names");
    assert_int_equal(entry->type, ATTN_GGUF_ARRAY);
    assert_int_equal(entry->item_type, ATTN_GGUF_STRING);
    assert_int_equal(entry->count, 3);
    /* Wrong kinds and missing keys. */
    assert_int_equal(attn_gguf_get_int(file, "test.half", &number), ATTN_ERR_FORMAT);
    assert_non_null(strstr(attn_last_error(), "test.half"));
    assert_int_equal(attn_gguf_get_int(file, "test.none", &number), ATTN_ERR_FORMAT);
    assert_non_null(strstr(attn_last_error(), "test.none"));
    assert_int_equal(attn_gguf_get_ints(file, "test.list", list, 2), ATTN_ERR_FORMAT);
    assert_int_equal(attn_gguf_get_ints(file, "test.names", list, 3), ATTN_ERR_FORMAT);
    assert_int_equal(attn_gguf_get_string(file, "test.names", &text), ATTN_ERR_FORMAT);
    assert_int_equal(attn_gguf_tensor_count(file), 20);
    const attn_gguf_tensor *tensor = attn_gguf_tensor_find(file, "Q6_K");
    assert_int_equal(tensor->type, ATTN_GGUF_TENSOR_Q6_K);
    assert_int_equal(tensor->ndim, 2);
    assert_int_equal(tensor->shape[0], 256);
    assert_int_equal(tensor->shape[1], 3);
    assert_int_equal(tensor->bytes, 3 * 210);
    assert_ptr_equal(attn_gguf_tensor_at(file, 0), attn_gguf_tensor_find(file, "F16"));
    assert_null(attn_gguf_tensor_at(file, 20));
    assert_null(attn_gguf_tensor_find(file, "Q6_"));
    attn_gguf_close(file);
    assert_int_equal(attn_gguf_open(&file, TEST_DATA "/golden/gguf/none.gguf"), ATTN_ERR_IO);
    assert_null(file);
}

/* Opens a built file, expects a status, and (for errors) a part of the message. */
static void expect(gguf_build *b, attn_status status, const char *part)
{
    attn_gguf *file;
    attn_status got = attn_gguf_open_memory(&file, b->data, b->bytes);
    if (got != status || (part != NULL && strstr(attn_last_error(), part) == NULL)) {
        fail_msg("%s ('%s'), expected %s with '%s'", attn_status_name(got), attn_last_error(), attn_status_name(status),
                 part != NULL ? part : "");
    }
    attn_gguf_close(file);
    free(b->data);
    *b = (gguf_build){0};
}

static const uint64_t small[2] = {32, 2}, huge[4] = {1u << 31, 1u << 31, 1u << 31, 1u << 31};

static void rejects_bad_headers(void **unused)
{
    (void)unused;
    gguf_build b = {0};
    put(&b, "GGUX", 4);
    put_uint(&b, 3, 8);
    expect(&b, ATTN_ERR_FORMAT, "GGUF");
    put(&b, "GG", 2);
    expect(&b, ATTN_ERR_FORMAT, "GGUF");
    put_header(&b, 1, 0, 0);
    expect(&b, ATTN_ERR_UNSUPPORTED, "version 1");
    put_header(&b, 3u << 24, 0, 0);
    expect(&b, ATTN_ERR_UNSUPPORTED, "big-endian");
    put_header(&b, 3, 0, 0);
    expect(&b, ATTN_OK, NULL);
    put_header(&b, 2, 0, 0);
    expect(&b, ATTN_OK, NULL);
    put_header(&b, 3, UINT64_MAX, 0);
    expect(&b, ATTN_ERR_FORMAT, "do not fit");
    put_header(&b, 3, 0, 1);
    expect(&b, ATTN_ERR_FORMAT, "do not fit");
}

static void rejects_bad_metadata(void **unused)
{
    (void)unused;
    gguf_build b = {0};
    put_header(&b, 3, 0, 1);
    put_key(&b, "a.b", 13);
    put_uint(&b, 0, 8);
    expect(&b, ATTN_ERR_FORMAT, "unknown type 13");
    put_header(&b, 3, 0, 1);
    put_key(&b, "text", 8);
    put_uint(&b, UINT64_MAX, 8); /* longer than the file */
    expect(&b, ATTN_ERR_FORMAT, "text");
    put_header(&b, 3, 0, 1);
    put_uint(&b, UINT64_MAX - 7, 8); /* a key that wraps around */
    put_uint(&b, 0, 8);
    expect(&b, ATTN_ERR_FORMAT, "metadata key");
    put_header(&b, 3, 0, 1);
    put_key(&b, "list", 9);
    put_uint(&b, 10, 4);
    put_uint(&b, UINT64_MAX / 8 + 2, 8); /* bytes overflow */
    expect(&b, ATTN_ERR_FORMAT, "list");
    put_header(&b, 3, 0, 1);
    put_key(&b, "nest", 9);
    put_uint(&b, 9, 4);
    put_uint(&b, 1, 8);
    expect(&b, ATTN_ERR_UNSUPPORTED, "nest");
    put_header(&b, 3, 0, 2);
    put_u32(&b, "twice", 1);
    put_u32(&b, "twice", 2);
    expect(&b, ATTN_ERR_FORMAT, "twice");
    put_header(&b, 3, 0, 1);
    put_uint(&b, 3, 8);
    put(&b, "a\0b", 3);
    put_uint(&b, 4, 4);
    put_uint(&b, 1, 4);
    expect(&b, ATTN_ERR_FORMAT, "zero byte");
    for (uint32_t alignment = 0; alignment <= 48; alignment += 48) {
        put_header(&b, 3, 0, 1);
        put_u32(&b, "general.alignment", alignment);
        expect(&b, ATTN_ERR_FORMAT, "alignment");
    }
}

static void one_tensor(int type, int ndim, const uint64_t *shape, uint64_t offset, size_t data, attn_status status,
                       const char *part)
{
    static const unsigned char zeros[4096];
    gguf_build b = {0};
    put_header(&b, 3, 1, 0);
    put_tensor(&b, "weights", type, ndim, shape, offset);
    put_padding(&b, 32);
    put(&b, zeros, data);
    expect(&b, status, part);
}

static void rejects_bad_tensors(void **unused)
{
    (void)unused;
    static const uint64_t odd[2] = {33, 2}, empty[2] = {0, 2}, five[4] = {1, 1, 1, 1};
    one_tensor(8, 2, small, 0, 68, ATTN_OK, NULL);
    one_tensor(8, 2, small, 0, 67, ATTN_ERR_FORMAT, "weights");
    one_tensor(8, 2, small, 16, 200, ATTN_ERR_FORMAT, "alignment");
    one_tensor(8, 2, small, 64, 100, ATTN_ERR_FORMAT, "outside");
    one_tensor(8, 2, small, UINT64_MAX - 31, 100, ATTN_ERR_FORMAT, "outside");
    one_tensor(8, 2, odd, 0, 200, ATTN_ERR_FORMAT, "blocks");
    one_tensor(8, 2, empty, 0, 200, ATTN_ERR_FORMAT, "extent 0");
    one_tensor(0, 4, huge, 0, 200, ATTN_ERR_FORMAT, "extent");
    one_tensor(0, 1, huge, 0, 200, ATTN_ERR_FORMAT, "larger than the file");
    one_tensor(0, 2, huge, 0, 200, ATTN_ERR_FORMAT, "extent");
    one_tensor(4, 2, small, 0, 200, ATTN_ERR_UNSUPPORTED, "type 4");
    one_tensor(-1, 2, small, 0, 200, ATTN_ERR_UNSUPPORTED, "type");
    one_tensor(0, 0, small, 0, 200, ATTN_ERR_FORMAT, "dimensions");
    one_tensor(0, 4, five, 0, 4, ATTN_OK, NULL);
    static const unsigned char zeros[256];
    for (int overlap = 0; overlap < 2; overlap++) {
        gguf_build b = {0};
        put_header(&b, 3, 2, 0);
        put_tensor(&b, "a", 8, 2, small, 0);
        put_tensor(&b, "b", 8, 2, small, overlap ? 64 : 96);
        put_padding(&b, 32);
        put(&b, zeros, sizeof zeros);
        expect(&b, overlap ? ATTN_ERR_FORMAT : ATTN_OK, overlap ? "overlap" : NULL);
    }
    gguf_build b = {0};
    put_header(&b, 3, 2, 0);
    put_tensor(&b, "same", 8, 2, small, 0);
    put_tensor(&b, "same", 8, 2, small, 96);
    put_padding(&b, 32);
    put(&b, zeros, sizeof zeros);
    expect(&b, ATTN_ERR_FORMAT, "same");
}

/* Every shorter file is an error (or, where only padding is missing, fine), and no changed byte crashes the reader. */
static void survives_damage(void **unused)
{
    (void)unused;
    gguf_build b = {0};
    static const unsigned char zeros[256];
    put_header(&b, 3, 1, 4);
    put_text(&b, "general.architecture", "llama");
    put_f32(&b, "f", 1.5f);
    put_key(&b, "names", 9);
    put_uint(&b, 8, 4);
    put_uint(&b, 2, 8);
    put_string(&b, "x");
    put_string(&b, "yz");
    put_u32(&b, "general.alignment", 32);
    put_tensor(&b, "w", 8, 2, small, 0);
    put_padding(&b, 32);
    put(&b, zeros, 68);
    for (size_t length = 0; length < b.bytes; length++) {
        unsigned char *copy = malloc(length + 1); /* so that tools see reads past the end */
        memcpy(copy, b.data, length);
        attn_gguf *file;
        assert_int_not_equal(attn_gguf_open_memory(&file, copy, length), ATTN_OK);
        free(copy);
    }
    for (size_t i = 0; i < b.bytes; i++) {
        for (int bit = 0; bit < 8; bit++) {
            b.data[i] ^= (unsigned char)(1 << bit);
            attn_gguf *file;
            if (attn_gguf_open_memory(&file, b.data, b.bytes) == ATTN_OK) {
                attn_gguf_string names[2], text;
                double number;
                attn_gguf_get_strings(file, "names", names, 2);
                attn_gguf_get_string(file, "general.architecture", &text);
                attn_gguf_get_float(file, "f", &number);
            }
            attn_gguf_close(file);
            b.data[i] ^= (unsigned char)(1 << bit);
        }
    }
    free(b.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_golden),         cmocka_unit_test(rejects_bad_headers),
        cmocka_unit_test(rejects_bad_metadata), cmocka_unit_test(rejects_bad_tensors),
        cmocka_unit_test(survives_damage),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
