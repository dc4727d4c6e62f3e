/* Plans in files; docs/plan-format.md describes the format. */
#include "plan/plan.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define VERSION 1

static const char magic[8] = {'A', 'T', 'T', 'N', 'P', 'L', 'A', 'N'};

typedef struct header {
    char magic[8];
    int64_t version;
    int64_t batch, heads, n, m, block_q, block_k;
    int64_t entries, bitmaps;
} header;

/* FNV-1a over 8 bytes at a time, then over the rest. */
static uint64_t checksum(uint64_t sum, const void *data, size_t bytes)
{
    const uint8_t *from = data;
    for (; bytes >= 8; from += 8, bytes -= 8) {
        uint64_t word;
        memcpy(&word, from, 8);
        sum = (sum ^ word) * 0x100000001b3u;
        sum ^= sum >> 29;
    }
    for (; bytes > 0; from++, bytes--) {
        sum = (sum ^ *from) * 0x100000001b3u;
    }
    return sum;
}
#define CHECKSUM_START 0xcbf29ce484222325u

typedef struct section {
    void *data;
    size_t bytes;
} section;

/* The five arrays of a plan, in file order. */
static void sections_of(const attn_plan *plan, section sections[5])
{
    const attn_plan_layout *y = &plan->layout;
    sections[0] = (section){plan->start, (size_t)(plan->lists * y->rows + 1) * sizeof *plan->start};
    sections[1] = (section){plan->rules, (size_t)plan->lists * sizeof *plan->rules};
    sections[2] = (section){plan->column, (size_t)plan->entries * sizeof *plan->column};
    sections[3] = (section){plan->mask, (size_t)plan->entries * sizeof *plan->mask};
    sections[4] = (section){plan->bits, (size_t)(y->bitmaps * y->bitmap_bytes)};
}

attn_status attn_plan_save(const attn_plan *plan, const char *path)
{
    const attn_plan_shape *s = &plan->layout.shape;
    header head = {.version = VERSION, .batch = s->batch, .heads = s->heads, .n = s->n, .m = s->m, .block_q = s->block_q,
                   .block_k = s->block_k, .entries = plan->entries, .bitmaps = plan->layout.bitmaps};
    memcpy(head.magic, magic, sizeof magic);
    section sections[5];
    sections_of(plan, sections);
    FILE *file = fopen(path, "wb");
    if (file == NULL) {
        return attn_fail(ATTN_ERR_IO, "cannot open %s for writing: %s", path, strerror(errno));
    }
    uint64_t sum = checksum(CHECKSUM_START, &head, sizeof head);
    int good = fwrite(&head, sizeof head, 1, file) == 1;
    for (int i = 0; i < 5; i++) {
        if (sections[i].bytes > 0) {
            sum = checksum(sum, sections[i].data, sections[i].bytes);
            good = good && fwrite(sections[i].data, sections[i].bytes, 1, file) == 1;
        }
    }
    good = good && fwrite(&sum, sizeof sum, 1, file) == 1;
    good = fclose(file) == 0 && good;
    return good ? ATTN_OK : attn_fail(ATTN_ERR_IO, "cannot write %s: %s", path, strerror(errno));
}

/* Everything that the executors rely on. */
static attn_status check_contents(const attn_plan *plan)
{
    const attn_plan_layout *y = &plan->layout;
    int64_t rows = plan->lists * y->rows;
    if (plan->start[0] != 0 || plan->start[rows] != plan->entries) {
        return attn_fail(ATTN_ERR_FORMAT, "plan: the rows do not hold the %lld entries", (long long)plan->entries);
    }
    for (int64_t i = 0; i < rows; i++) {
        if (plan->start[i + 1] < plan->start[i] || plan->start[i + 1] > plan->entries) {
            return attn_fail(ATTN_ERR_FORMAT, "plan: row %lld ends at entry %lld", (long long)i, (long long)plan->start[i + 1]);
        }
        int64_t before = -1;
        for (int64_t e = plan->start[i]; e < plan->start[i + 1]; e++) {
            if (plan->column[e] <= before || plan->column[e] >= y->columns) {
                return attn_fail(ATTN_ERR_FORMAT, "plan: block %d in row %lld, expected %lld ... %lld", (int)plan->column[e], (long long)i,
                                 (long long)(before + 1), (long long)(y->columns - 1));
            }
            if (plan->mask[e] < ATTN_PLAN_RULE || plan->mask[e] >= y->bitmaps) {
                return attn_fail(ATTN_ERR_FORMAT, "plan: mask %d of entry %lld, expected %d ... %lld", (int)plan->mask[e], (long long)e,
                                 ATTN_PLAN_RULE, (long long)(y->bitmaps - 1));
            }
            before = plan->column[e];
        }
    }
    for (int64_t i = 0; i < plan->lists; i++) {
        const attn_plan_rule *rule = &plan->rules[i];
        if ((rule->causal != 0 && rule->causal != 1) || rule->sinks < 0 || rule->left < -1 || rule->right < -1) {
            return attn_fail(ATTN_ERR_FORMAT, "plan: rule %lld is out of range", (long long)i);
        }
    }
    return ATTN_OK;
}

static attn_status fill(attn_plan *plan, const header *head, const uint8_t *from, size_t bytes)
{
    attn_plan_layout *y = &plan->layout;
    plan->entries = plan->entry_room = head->entries;
    y->bitmaps = plan->bitmap_room = head->bitmaps;
    plan->rows_done = plan->lists * y->rows;
    plan->column = attn_calloc_array((size_t)head->entries + 1, sizeof *plan->column);
    plan->mask = attn_calloc_array((size_t)head->entries + 1, sizeof *plan->mask);
    /* Not one bitmap more than the file holds: blocks may be huge. */
    plan->bits = attn_calloc_array((size_t)(head->bitmaps * y->bitmap_bytes) + 1, 1);
    if (plan->column == NULL || plan->mask == NULL || plan->bits == NULL) {
        return attn_fail_memory(bytes);
    }
    y->column = plan->column;
    y->mask = plan->mask;
    y->bits = plan->bits;
    section sections[5];
    sections_of(plan, sections);
    for (int i = 0; i < 5; i++) {
        memcpy(sections[i].data, from, sections[i].bytes);
        from += sections[i].bytes;
    }
    return check_contents(plan);
}

attn_status attn_plan_load_memory(attn_plan **out, const void *data, size_t bytes)
{
    header head;
    uint64_t sum;
    *out = NULL;
    if (bytes < sizeof head + sizeof sum) {
        return attn_fail(ATTN_ERR_FORMAT, "plan: %zu bytes are too few", bytes);
    }
    memcpy(&head, data, sizeof head);
    memcpy(&sum, (const char *)data + bytes - sizeof sum, sizeof sum);
    if (memcmp(head.magic, magic, sizeof magic) != 0) {
        return attn_fail(ATTN_ERR_FORMAT, "plan: this is not a plan file");
    }
    if (head.version != VERSION) {
        return attn_fail(ATTN_ERR_FORMAT, "plan: version %lld, expected %d", (long long)head.version, VERSION);
    }
    attn_plan_shape shape = {head.batch, head.heads, head.n, head.m, head.block_q, head.block_k};
    size_t left = bytes - sizeof head - sizeof sum;
    /* Before anything is allocated: the file must be as long as its header says, in terms that cannot overflow. */
    if (head.batch < 1 || head.heads < 1 || head.n < 0 || head.block_q < 1 || head.block_k < 1 || head.batch > 1 << 20 ||
        head.heads > 1 << 20 || head.n > (int64_t)1 << 31 || head.block_q > 1 << 20 || head.block_k > 1 << 20) {
        return attn_fail(ATTN_ERR_FORMAT, "plan: a shape out of range");
    }
    int64_t lists = head.batch * head.heads, rows = attn_ceil_div(head.n, head.block_q);
    int64_t bitmap_bytes = (head.block_q * head.block_k + 7) / 8;
    if (lists > (int64_t)(left / sizeof(attn_plan_rule)) || rows > (int64_t)(left / 8) / lists || head.entries < 0 ||
        head.entries > (int64_t)(left / 8) || head.bitmaps < 0 || head.bitmaps > (int64_t)left / bitmap_bytes ||
        head.bitmaps > INT32_MAX) {
        return attn_fail(ATTN_ERR_FORMAT, "plan: %zu bytes are too few for its shape", bytes);
    }
    size_t need = (size_t)(lists * rows + 1) * 8 + (size_t)lists * sizeof(attn_plan_rule) + (size_t)head.entries * 8 +
                  (size_t)(head.bitmaps * bitmap_bytes);
    if (need != left) {
        return attn_fail(ATTN_ERR_FORMAT, "plan: %zu bytes of data, expected %zu", left, need);
    }
    attn_plan *plan;
    attn_status status = attn_plan_create(&plan, &shape);
    if (status == ATTN_ERR_ARGUMENT) {
        return attn_fail(ATTN_ERR_FORMAT, "plan: a shape out of range");
    }
    ATTN_TRY(status);
    status = fill(plan, &head, (const uint8_t *)data + sizeof head, bytes);
    if (status == ATTN_OK) {
        section sections[5];
        sections_of(plan, sections);
        uint64_t found = checksum(CHECKSUM_START, &head, sizeof head);
        for (int i = 0; i < 5; i++) {
            found = checksum(found, sections[i].data, sections[i].bytes);
        }
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
        found = sum; /* which mutations would never get right */
#endif
        if (found != sum) {
            status = attn_fail(ATTN_ERR_FORMAT, "plan: the checksum does not match");
        }
    }
    if (status != ATTN_OK) {
        attn_plan_destroy(plan);
        return status;
    }
    *out = plan;
    return ATTN_OK;
}

attn_status attn_plan_load(attn_plan **plan, const char *path)
{
    *plan = NULL;
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return attn_fail(ATTN_ERR_IO, "cannot open %s: %s", path, strerror(errno));
    }
    size_t room = 1 << 16, bytes = 0, got = 0;
    char *data = attn_alloc(room);
    while (data != NULL && (got = fread(data + bytes, 1, room - bytes, file)) > 0) {
        bytes += got;
        if (bytes == room) {
            char *grown = attn_realloc(data, room, room * 2);
            if (grown == NULL) {
                attn_free(data);
            }
            data = grown;
            room *= 2;
        }
    }
    int bad = ferror(file);
    fclose(file);
    if (data == NULL) {
        return attn_fail_memory(room);
    }
    attn_status status = bad ? attn_fail(ATTN_ERR_IO, "cannot read %s: %s", path, strerror(errno))
                             : attn_plan_load_memory(plan, data, bytes);
    attn_free(data);
    return status;
}
