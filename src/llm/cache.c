/* Caches of keys and values. */
#include "llm/context.h"

#include "kernel/rows.h"

static size_t row_bytes(const attn_kv *kv) { return (size_t)kv->width * attn_dtype_size(kv->dtype); }

attn_status attn_kv_make(attn_kv *kv, int64_t heads, int64_t width, int64_t capacity, int64_t window, attn_dtype dtype)
{
    *kv = (attn_kv){.heads = heads, .width = width, .capacity = capacity, .window = window, .dtype = dtype};
    size_t rows = (size_t)heads * (size_t)capacity; /* both below 2^31 */
    kv->counts = attn_calloc_array((size_t)heads, sizeof *kv->counts);
    kv->k = attn_alloc_array(rows, row_bytes(kv));
    kv->v = attn_alloc_array(rows, row_bytes(kv));
    if (dtype == ATTN_I8) {
        kv->k_scale = attn_alloc_array(rows, sizeof(float));
        kv->v_scale = attn_alloc_array(rows, sizeof(float));
    }
    if (kv->counts == NULL || kv->k == NULL || kv->v == NULL ||
        (dtype == ATTN_I8 && (kv->k_scale == NULL || kv->v_scale == NULL))) {
        return attn_fail(ATTN_ERR_MEMORY, "out of memory (cache of %lld tokens, %lld heads of width %lld)",
                         (long long)capacity, (long long)heads, (long long)width);
    }
    return ATTN_OK;
}

static void drop_positions(attn_kv *kv)
{
    for (int64_t h = 0; kv->positions != NULL && h < kv->heads; h++) {
        attn_free(kv->positions[h]);
    }
    attn_free(kv->positions);
    kv->positions = NULL;
}

void attn_kv_free(attn_kv *kv)
{
    drop_positions(kv);
    attn_free(kv->counts);
    attn_free(kv->k);
    attn_free(kv->v);
    attn_free(kv->k_scale);
    attn_free(kv->v_scale);
    *kv = (attn_kv){0};
}

/* Move `count` keys of a head within it. */
static void move_keys(attn_kv *kv, int64_t head, int64_t to, int64_t from, int64_t count)
{
    size_t bytes = row_bytes(kv), base = (size_t)(head * kv->capacity);
    memmove(kv->k + (base + (size_t)to) * bytes, kv->k + (base + (size_t)from) * bytes, (size_t)count * bytes);
    memmove(kv->v + (base + (size_t)to) * bytes, kv->v + (base + (size_t)from) * bytes, (size_t)count * bytes);
    if (kv->dtype == ATTN_I8) {
        memmove(kv->k_scale + base + to, kv->k_scale + base + from, (size_t)count * sizeof(float));
        memmove(kv->v_scale + base + to, kv->v_scale + base + from, (size_t)count * sizeof(float));
    }
    if (kv->positions != NULL) {
        memmove(kv->positions[head] + to, kv->positions[head] + from, (size_t)count * sizeof(int64_t));
    }
}

attn_status attn_kv_reserve(attn_kv *kv, int64_t n)
{
    for (int64_t h = 0; h < kv->heads; h++) {
        if (n > kv->capacity - kv->counts[h] && kv->window > 0) {
            /* The next query sees window - 1 keys before its own. */
            int64_t keep = attn_min_i64(kv->counts[h], kv->window - 1);
            move_keys(kv, h, 0, kv->counts[h] - keep, keep);
            kv->counts[h] = keep;
        }
        if (n > kv->capacity - kv->counts[h]) {
            return attn_fail(ATTN_ERR_ARGUMENT, "the cache holds %lld of %lld tokens, %lld more do not fit",
                             (long long)kv->counts[h], (long long)kv->capacity, (long long)n);
        }
    }
    return ATTN_OK;
}

static void store_row(const attn_kv *kv, char *rows, float *scales, int64_t row, const float *x)
{
    const attn_row_kernels *kernels = ATTN_KERNEL_SELECT(attn_row_kernels_table, attn_isa_current());
    void *to = rows + (size_t)row * row_bytes(kv);
    switch (kv->dtype) {
    case ATTN_F16: kernels->to_f16(x, kv->width, to); break;
    case ATTN_BF16: kernels->to_bf16(x, kv->width, to); break;
    case ATTN_I8: scales[row] = kernels->to_i8(x, kv->width, to); break;
    default: memcpy(to, x, row_bytes(kv));
    }
}

void attn_kv_store(attn_kv *kv, int64_t head, int64_t position, const float *k, const float *v)
{
    int64_t row = head * kv->capacity + kv->counts[head] + position - kv->seen;
    store_row(kv, kv->k, kv->k_scale, row, k);
    store_row(kv, kv->v, kv->v_scale, row, v);
}

void attn_kv_announce(attn_kv *kv, int64_t n)
{
    for (int64_t h = 0; h < kv->heads && kv->positions != NULL; h++) {
        for (int64_t i = 0; i < n; i++) {
            kv->positions[h][kv->counts[h] + i] = kv->seen + i;
        }
    }
}

void attn_kv_advance(attn_kv *kv, int64_t length)
{
    int64_t n = length - kv->seen;
    attn_kv_announce(kv, n);
    for (int64_t h = 0; h < kv->heads; h++) {
        kv->counts[h] += n;
    }
    kv->seen = length;
}

attn_status attn_kv_truncate(attn_kv *kv, int64_t length, int only_check)
{
    int64_t seen = kv->seen;
    for (int64_t h = 0; h < kv->heads; h++) {
        int64_t count = kv->counts[h];
        if (kv->positions != NULL) {
            /* What was evicted stays away, so only a clear start is the same as never having gone on. */
            if (length > 0 && length < seen) {
                return attn_fail(ATTN_ERR_ARGUMENT,
                                 "keys were evicted: the sequence can only be cut to 0 tokens, not %lld",
                                 (long long)length);
            }
        } else if (kv->window > 0 && length > 0) {
            int64_t first = seen - count, needed = attn_max_i64(0, length - (kv->window - 1));
            if (first > needed) {
                return attn_fail(ATTN_ERR_ARGUMENT,
                                 "a layer with a sliding window of %lld holds the tokens from %lld on: the "
                                 "sequence cannot be cut to %lld tokens",
                                 (long long)kv->window, (long long)first, (long long)length);
            }
        }
        if (!only_check) {
            kv->counts[h] = attn_max_i64(0, count - (seen - length));
        }
    }
    if (!only_check && length == 0) {
        drop_positions(kv);
        memset(kv->counts, 0, (size_t)kv->heads * sizeof *kv->counts);
    }
    kv->seen = only_check ? seen : length;
    return ATTN_OK;
}

static attn_status make_positions(attn_kv *kv)
{
    kv->positions = attn_calloc_array((size_t)kv->heads, sizeof *kv->positions);
    int ok = kv->positions != NULL;
    for (int64_t h = 0; ok && h < kv->heads; h++) {
        kv->positions[h] = attn_alloc_array((size_t)kv->capacity, sizeof **kv->positions);
        ok = kv->positions[h] != NULL;
        for (int64_t i = 0; ok && i < kv->counts[h]; i++) {
            kv->positions[h][i] = kv->seen - kv->counts[h] + i;
        }
    }
    if (!ok) {
        drop_positions(kv);
        return attn_fail(ATTN_ERR_MEMORY, "out of memory (positions of %lld tokens)", (long long)kv->capacity);
    }
    return ATTN_OK;
}

attn_status attn_kv_keep(attn_kv *kv, int64_t head, const int64_t *indices, int64_t count)
{
    if (kv->window > 0) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "keys of a layer with a sliding window cannot be evicted");
    }
    for (int64_t i = 0; i < count; i++) {
        if (indices[i] < 0 || indices[i] >= kv->counts[head] || (i > 0 && indices[i] <= indices[i - 1])) {
            return attn_fail(ATTN_ERR_ARGUMENT, "indices[%lld] is %lld: they must ascend and be below %lld",
                             (long long)i, (long long)indices[i], (long long)kv->counts[head]);
        }
    }
    if (count == kv->counts[head]) {
        return ATTN_OK;
    }
    if (kv->positions == NULL) {
        ATTN_TRY(make_positions(kv));
    }
    /* In runs of neighbours. */
    for (int64_t i = 0, run; i < count; i += run) {
        for (run = 1; i + run < count && indices[i + run] == indices[i] + run; run++) {
        }
        if (indices[i] != i) {
            move_keys(kv, head, i, indices[i], run);
        }
    }
    kv->counts[head] = count;
    return ATTN_OK;
}

attn_status attn_kv_copy(attn_kv *to, const attn_kv *from)
{
    drop_positions(to);
    memset(to->counts, 0, (size_t)to->heads * sizeof *to->counts);
    if (from->positions != NULL) {
        ATTN_TRY(make_positions(to));
    }
    to->seen = from->seen;
    size_t bytes = row_bytes(from);
    for (int64_t h = 0; h < from->heads; h++) {
        size_t base = (size_t)(h * from->capacity), count = (size_t)from->counts[h];
        memcpy(to->k + base * bytes, from->k + base * bytes, count * bytes);
        memcpy(to->v + base * bytes, from->v + base * bytes, count * bytes);
        if (from->dtype == ATTN_I8) {
            memcpy(to->k_scale + base, from->k_scale + base, count * sizeof(float));
            memcpy(to->v_scale + base, from->v_scale + base, count * sizeof(float));
        }
        if (from->positions != NULL) {
            memcpy(to->positions[h], from->positions[h], count * sizeof(int64_t));
        }
        to->counts[h] = from->counts[h];
    }
    return ATTN_OK;
}

size_t attn_kv_bytes(const attn_kv *kv)
{
    size_t keys = 0;
    for (int64_t h = 0; h < kv->heads; h++) {
        keys += (size_t)kv->counts[h];
    }
    return 2 * keys * (row_bytes(kv) + (kv->dtype == ATTN_I8 ? sizeof(float) : 0));
}
