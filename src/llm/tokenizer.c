/* Tokenizers: vocabulary, special tokens, and texts of tokens. How plain text is cut is in tokenizer_bpe.c and tokenizer_spm.c. */
#include "llm/tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT_LIMIT (INT64_C(1) << 24)
#define BYTES_LIMIT (UINT32_C(1) << 30)

/* ---- Small parts ---- */

attn_status attn_token_list_add(token_list *list, int32_t token)
{
    if (list->count == list->room) {
        int64_t room = list->room > 0 ? 2 * list->room : 64;
        int32_t *grown = attn_realloc(list->items, (size_t)list->room * sizeof *grown, (size_t)room * sizeof *grown);
        if (grown == NULL) {
            return attn_fail_memory((size_t)room * sizeof *grown);
        }
        list->items = grown;
        list->room = room;
    }
    list->items[list->count++] = token;
    return ATTN_OK;
}

static int better(const merge_candidate *a, const merge_candidate *b)
{
    return a->key < b->key || (!(a->key > b->key) && a->left < b->left);
}

attn_status attn_merge_heap_push(merge_heap *heap, merge_candidate candidate)
{
    if (heap->count == heap->room) {
        int64_t room = heap->room > 0 ? 2 * heap->room : 64;
        merge_candidate *grown = attn_realloc(heap->items, (size_t)heap->room * sizeof *grown, (size_t)room * sizeof *grown);
        if (grown == NULL) {
            return attn_fail_memory((size_t)room * sizeof *grown);
        }
        heap->items = grown;
        heap->room = room;
    }
    int64_t at = heap->count++;
    while (at > 0 && better(&candidate, &heap->items[(at - 1) / 2])) {
        heap->items[at] = heap->items[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap->items[at] = candidate;
    return ATTN_OK;
}

merge_candidate attn_merge_heap_pop(merge_heap *heap)
{
    merge_candidate top = heap->items[0], last = heap->items[--heap->count];
    int64_t at = 0;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= heap->count) {
            break;
        }
        child += child + 1 < heap->count && better(&heap->items[child + 1], &heap->items[child]);
        if (!better(&heap->items[child], &last)) {
            break;
        }
        heap->items[at] = heap->items[child];
        at = child;
    }
    if (heap->count > 0) {
        heap->items[at] = last;
    }
    return top;
}

int attn_utf8_length(const char *text, size_t length)
{
    const unsigned char *p = (const unsigned char *)text;
    if (length == 0) {
        return 0;
    }
    if (p[0] < 0x80) {
        return 1;
    }
    int bytes = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
    if (p[0] < 0xc2 || p[0] > 0xf4 || (size_t)bytes > length) {
        return 0;
    }
    for (int i = 1; i < bytes; i++) {
        if ((p[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    int overlong = (p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xf0 && p[1] < 0x90);
    int beyond = (p[0] == 0xed && p[1] > 0x9f) || (p[0] == 0xf4 && p[1] > 0x8f);
    return overlong || beyond ? 0 : bytes;
}

static uint64_t hash_bytes(const char *text, size_t length)
{
    uint64_t h = UINT64_C(1469598103934665603);
    for (size_t i = 0; i < length; i++) {
        h = (h ^ (unsigned char)text[i]) * UINT64_C(1099511628211);
    }
    return h ^ (h >> 29);
}

static const char *map_text(const attn_tokenizer *t, const token_map *map, int32_t id, size_t *length)
{
    const uint32_t *offsets = map == &t->map ? t->offsets : t->name_offsets;
    *length = offsets[id + 1] - offsets[id];
    return (map == &t->map ? t->bytes : t->names) + offsets[id];
}

int32_t attn_token_map_find(const attn_tokenizer *t, const token_map *map, const char *text, size_t length)
{
    for (uint64_t at = hash_bytes(text, length) & map->mask; map->slots[at] != 0; at = (at + 1) & map->mask) {
        size_t found;
        const char *name = map_text(t, map, map->slots[at] - 1, &found);
        if (found == length && memcmp(name, text, length) == 0) {
            return map->slots[at] - 1;
        }
    }
    return -1;
}

/* The first token of a text wins. */
static void map_add(attn_tokenizer *t, token_map *map, int32_t id)
{
    size_t length;
    const char *text = map_text(t, map, id, &length);
    if (length == 0 || attn_token_map_find(t, map, text, length) >= 0) {
        return;
    }
    uint64_t at = hash_bytes(text, length) & map->mask;
    while (map->slots[at] != 0) {
        at = (at + 1) & map->mask;
    }
    map->slots[at] = id + 1;
}

static attn_status map_create(token_map *map, int64_t count)
{
    uint64_t size = 64;
    while (size < (uint64_t)count * 2) {
        size *= 2;
    }
    map->slots = attn_calloc_array(size, sizeof *map->slots);
    map->mask = size - 1;
    return map->slots != NULL ? ATTN_OK : attn_fail_memory(size * sizeof *map->slots);
}

/* ---- Vocabulary ---- */

/* Byte-level vocabularies spell each byte as a printable character: itself where it is printable, else one from U+0100 on. */
static void byte_alphabet(int32_t byte_of[512])
{
    int next = 256;
    for (int i = 0; i < 512; i++) {
        byte_of[i] = -1;
    }
    for (int byte = 0; byte < 256; byte++) {
        int printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae);
        byte_of[printable ? byte : next++] = byte;
    }
}

/* What a byte-level spelling stands for; -1 when it uses characters outside the alphabet. Writes at most `length` bytes. */
static int64_t spelled_bytes(const char *text, size_t length, const int32_t byte_of[512], char *to)
{
    int64_t count = 0;
    for (size_t i = 0; i < length;) {
        int size = attn_utf8_length(text + i, length - i);
        const unsigned char *p = (const unsigned char *)text + i;
        int32_t code = size == 1 ? p[0] : size == 2 ? (p[0] & 0x1f) << 6 | (p[1] & 0x3f) : 512;
        if (size == 0 || code >= 512 || byte_of[code] < 0) {
            return -1;
        }
        to[count++] = (char)byte_of[code];
        i += (size_t)size;
    }
    return count;
}

/* U+2581 stands for a space in SentencePiece vocabularies. */
static int64_t unescaped_bytes(const char *text, size_t length, char *to)
{
    int64_t count = 0;
    for (size_t i = 0; i < length; i++) {
        if (length - i >= 3 && memcmp(text + i, "\xe2\x96\x81", 3) == 0) {
            to[count++] = ' ';
            i += 2;
        } else {
            to[count++] = text[i];
        }
    }
    return count;
}

static int hex_digit(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

/* "<0x0A>" */
static int byte_name(const attn_gguf_string *text)
{
    if (text->bytes != 6 || memcmp(text->text, "<0x", 3) != 0 || text->text[5] != '>') {
        return -1;
    }
    int high = hex_digit(text->text[3]), low = hex_digit(text->text[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

static attn_status read_texts(attn_tokenizer *t, const attn_tokenizer_data *data)
{
    size_t total = 0;
    for (int64_t i = 0; i < data->count; i++) {
        total += data->texts[i].bytes;
        if (data->texts[i].bytes > BYTES_LIMIT || total > BYTES_LIMIT) {
            return attn_fail(ATTN_ERR_FORMAT, "tokenizer: the texts of the tokens are too long");
        }
    }
    size_t n = (size_t)data->count;
    t->bytes = attn_alloc(total + 1), t->names = attn_alloc(total + 1);
    t->offsets = attn_alloc_array(n + 1, sizeof *t->offsets), t->name_offsets = attn_alloc_array(n + 1, sizeof *t->name_offsets);
    t->scores = attn_calloc_array(n, sizeof *t->scores), t->types = attn_alloc(n);
    if (t->bytes == NULL || t->names == NULL || t->offsets == NULL || t->name_offsets == NULL || t->scores == NULL || t->types == NULL) {
        return attn_fail_memory(2 * total + n * 16);
    }
    int32_t byte_of[512];
    byte_alphabet(byte_of);
    uint32_t at = 0, name_at = 0;
    for (int i = 0; i < 256; i++) {
        t->byte_tokens[i] = -1;
    }
    for (int64_t i = 0; i < data->count; i++) {
        const attn_gguf_string *text = &data->texts[i];
        int type = data->types != NULL ? data->types[i] : ATTN_TOKEN_NORMAL;
        t->types[i] = (uint8_t)(type >= ATTN_TOKEN_NORMAL && type <= ATTN_TOKEN_BYTE ? type : ATTN_TOKEN_NORMAL);
        t->scores[i] = data->scores != NULL && isfinite(data->scores[i]) ? data->scores[i] : 0;
        t->lowest_score = t->scores[i] < t->lowest_score ? t->scores[i] : t->lowest_score;
        t->offsets[i] = at, t->name_offsets[i] = name_at;
        int64_t count = -1;
        int byte = t->types[i] == ATTN_TOKEN_BYTE ? byte_name(text) : -1;
        if (byte >= 0) {
            t->bytes[at] = (char)byte;
            t->byte_tokens[byte] = (int32_t)i;
            count = 1;
        } else if (t->model != MODEL_BPE) {
            count = unescaped_bytes(text->text, text->bytes, t->bytes + at);
        } else if (t->types[i] == ATTN_TOKEN_NORMAL) {
            count = spelled_bytes(text->text, text->bytes, byte_of, t->bytes + at);
        }
        if (count < 0) {
            memcpy(t->bytes + at, text->text, text->bytes);
            count = (int64_t)text->bytes;
        }
        memcpy(t->names + name_at, text->text, text->bytes);
        at += (uint32_t)count, name_at += (uint32_t)text->bytes;
        t->longest = (size_t)count > t->longest ? (size_t)count : t->longest;
    }
    t->offsets[data->count] = at, t->name_offsets[data->count] = name_at;
    ATTN_TRY(map_create(&t->map, data->count));
    ATTN_TRY(map_create(&t->name_map, data->count));
    for (int32_t i = 0; i < (int32_t)data->count; i++) {
        map_add(t, &t->name_map, i);
        int plain = t->types[i] == ATTN_TOKEN_NORMAL || (t->model != MODEL_BPE && t->types[i] == ATTN_TOKEN_USER_DEFINED);
        if (plain) {
            map_add(t, &t->map, i);
        }
        if (t->model == MODEL_BPE && plain && token_length(t, i) == 1) {
            unsigned char byte = (unsigned char)token_bytes(t, i)[0];
            t->byte_tokens[byte] = t->byte_tokens[byte] < 0 ? i : t->byte_tokens[byte];
        }
    }
    return ATTN_OK;
}

const merge_entry *attn_find_merge(const attn_tokenizer *t, int32_t left, int32_t right)
{
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * UINT64_C(0x9e3779b97f4a7c15);
    for (uint64_t at = (h >> 20) & t->merge_mask; t->merges[at].rank >= 0; at = (at + 1) & t->merge_mask) {
        if (t->merges[at].left == left && t->merges[at].right == right) {
            return &t->merges[at];
        }
    }
    return NULL;
}

static attn_status read_merges(attn_tokenizer *t, const attn_tokenizer_data *data)
{
    uint64_t size = 64;
    if (data->merge_count > COUNT_LIMIT) {
        return attn_fail(ATTN_ERR_FORMAT, "tokenizer: %lld merges", (long long)data->merge_count);
    }
    while (size < (uint64_t)data->merge_count * 2) {
        size *= 2;
    }
    t->merges = attn_alloc_array(size, sizeof *t->merges);
    if (t->merges == NULL) {
        return attn_fail_memory(size * sizeof *t->merges);
    }
    memset(t->merges, 0xff, size * sizeof *t->merges);
    t->merge_mask = size - 1;
    int32_t byte_of[512];
    byte_alphabet(byte_of);
    char buffer[1024];
    for (int64_t i = 0; i < data->merge_count; i++) {
        const attn_gguf_string *text = &data->merges[i];
        const char *space = text->bytes > 1 ? memchr(text->text + 1, ' ', text->bytes - 1) : NULL;
        if (space == NULL || text->bytes > sizeof buffer) {
            return attn_fail(ATTN_ERR_FORMAT, "tokenizer: merge %lld is not two parts", (long long)i);
        }
        size_t left_bytes = (size_t)(space - text->text);
        int64_t left = spelled_bytes(text->text, left_bytes, byte_of, buffer);
        int64_t right = left < 0 ? -1 : spelled_bytes(space + 1, text->bytes - left_bytes - 1, byte_of, buffer + left);
        if (right < 0) {
            return attn_fail(ATTN_ERR_FORMAT, "tokenizer: merge %lld has characters outside the byte alphabet", (long long)i);
        }
        merge_entry entry = {attn_token_map_find(t, &t->map, buffer, (size_t)left),
                             attn_token_map_find(t, &t->map, buffer + left, (size_t)right), (int32_t)i,
                             attn_token_map_find(t, &t->map, buffer, (size_t)(left + right))};
        if (entry.left < 0 || entry.right < 0 || entry.merged < 0 ||
            attn_find_merge(t, entry.left, entry.right) != NULL) {
            continue; /* of tokens that the vocabulary lacks, or a repetition */
        }
        uint64_t h = ((uint64_t)(uint32_t)entry.left << 32 | (uint32_t)entry.right) * UINT64_C(0x9e3779b97f4a7c15);
        uint64_t at = (h >> 20) & t->merge_mask;
        while (t->merges[at].rank >= 0) {
            at = (at + 1) & t->merge_mask;
        }
        t->merges[at] = entry;
    }
    return ATTN_OK;
}

/* ---- Special tokens ---- */

static int by_first_byte_then_length(const attn_tokenizer *t, int32_t a, int32_t b)
{
    const char *x = token_bytes(t, a), *y = token_bytes(t, b);
    if (x[0] != y[0]) {
        return (unsigned char)x[0] < (unsigned char)y[0] ? -1 : 1;
    }
    size_t m = token_length(t, a), n = token_length(t, b);
    return m != n ? (m > n ? -1 : 1) : (a > b) - (a < b);
}

static attn_status read_specials(attn_tokenizer *t)
{
    int64_t count = 0;
    for (int64_t i = 0; i < t->count; i++) {
        count += (t->types[i] == ATTN_TOKEN_CONTROL || t->types[i] == ATTN_TOKEN_USER_DEFINED) && token_length(t, (int32_t)i) > 0;
    }
    t->specials = attn_alloc_array((size_t)count + 1, sizeof *t->specials);
    int32_t *other = attn_alloc_array((size_t)count + 1, sizeof *other);
    if (t->specials == NULL || other == NULL) {
        attn_free(other);
        return attn_fail_memory((size_t)count * sizeof *other);
    }
    int64_t n = 0;
    for (int64_t i = 0; i < t->count; i++) {
        if ((t->types[i] == ATTN_TOKEN_CONTROL || t->types[i] == ATTN_TOKEN_USER_DEFINED) && token_length(t, (int32_t)i) > 0) {
            t->specials[n++] = (int32_t)i;
        }
    }
    /* Merge sort: no global state, no recursion. */
    int32_t *from = t->specials, *to = other;
    for (int64_t width = 1; width < count; width *= 2) {
        for (int64_t start = 0; start < count; start += 2 * width) {
            int64_t middle = attn_min_i64(start + width, count), end = attn_min_i64(start + 2 * width, count);
            for (int64_t a = start, b = middle, at = start; at < end; at++) {
                int left = a < middle && (b >= end || by_first_byte_then_length(t, from[a], from[b]) <= 0);
                to[at] = left ? from[a++] : from[b++];
            }
        }
        int32_t *swap = from;
        from = to, to = swap;
    }
    t->specials = from;
    attn_free(to);
    int32_t at = 0;
    for (int byte = 0; byte <= 256; byte++) {
        while (at < count && (unsigned char)token_bytes(t, t->specials[at])[0] < byte) {
            at++;
        }
        t->special_first[byte] = at;
    }
    t->special_first[256] = (int32_t)count;
    return ATTN_OK;
}

/* The longest special token at the beginning of a text, -1 when there is none. */
static int32_t special_at(const attn_tokenizer *t, const char *text, size_t length, int parse)
{
    unsigned char first = (unsigned char)text[0];
    for (int32_t i = t->special_first[first]; i < t->special_first[first + 1]; i++) {
        int32_t id = t->specials[i];
        size_t n = token_length(t, id);
        if ((parse || t->types[id] == ATTN_TOKEN_USER_DEFINED) && n <= length && memcmp(token_bytes(t, id), text, n) == 0) {
            return id;
        }
    }
    return -1;
}

/* ---- Public ---- */

static int32_t checked_id(int64_t id, int64_t count) { return id >= 0 && id < count ? (int32_t)id : -1; }

static attn_status fill(attn_tokenizer *t, const attn_tokenizer_data *data)
{
    if (strcmp(data->model, "gpt2") == 0) {
        t->model = MODEL_BPE;
    } else if (strcmp(data->model, "llama") == 0) {
        t->model = MODEL_SPM;
    } else if (strcmp(data->model, "t5") == 0) {
        t->model = MODEL_UNIGRAM;
    } else {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "tokenizer model '%.40s' is not supported (gpt2, llama, t5)", data->model);
    }
    if (data->count < 1 || data->count > COUNT_LIMIT) {
        return attn_fail(ATTN_ERR_FORMAT, "tokenizer: %lld tokens (expected 1 ... %lld)", (long long)data->count, (long long)COUNT_LIMIT);
    }
    if (t->model != MODEL_BPE && data->scores == NULL) {
        return attn_fail(ATTN_ERR_FORMAT, "tokenizer: a vocabulary of model '%s' needs scores", data->model);
    }
    t->count = data->count;
    t->bos = checked_id(data->bos, t->count), t->eos = checked_id(data->eos, t->count);
    t->eot = checked_id(data->eot, t->count), t->unknown = checked_id(data->unknown, t->count);
    t->add_bos = data->add_bos, t->add_eos = data->add_eos, t->add_space_prefix = data->add_space_prefix;
    ATTN_TRY(read_texts(t, data));
    ATTN_TRY(read_specials(t));
    if (t->model == MODEL_BPE) {
        ATTN_TRY(read_merges(t, data));
        ATTN_TRY(attn_bpe_patterns(t, data->pre != NULL ? data->pre : "default"));
    }
    if (data->chat_template.text != NULL) {
        t->chat_template = attn_alloc(data->chat_template.bytes + 1);
        if (t->chat_template == NULL) {
            return attn_fail_memory(data->chat_template.bytes + 1);
        }
        memcpy(t->chat_template, data->chat_template.text, data->chat_template.bytes);
        t->chat_template[data->chat_template.bytes] = '\0';
    }
    return ATTN_OK;
}

attn_status attn_tokenizer_create(attn_tokenizer **tokenizer, const attn_tokenizer_data *data)
{
    *tokenizer = NULL;
    attn_tokenizer *made = attn_calloc_array(1, sizeof *made);
    if (made == NULL) {
        return attn_fail_memory(sizeof *made);
    }
    attn_status status = fill(made, data);
    if (status != ATTN_OK) {
        attn_tokenizer_destroy(made);
        return status;
    }
    *tokenizer = made;
    return ATTN_OK;
}

void attn_tokenizer_destroy(attn_tokenizer *t)
{
    if (t == NULL) {
        return;
    }
    for (int i = 0; i < t->pattern_count; i++) {
        pcre2_code_free(t->patterns[i]);
    }
    void *memory[] = {t->bytes, t->names, t->offsets, t->name_offsets, t->scores, t->types, t->map.slots, t->name_map.slots, t->merges,
                      t->specials, t->chat_template, t};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) {
        attn_free(memory[i]);
    }
}

static int64_t optional_int(const attn_gguf *file, const char *key, int64_t standard)
{
    int64_t value;
    return attn_gguf_metadata_find(file, key) != NULL && attn_gguf_get_int(file, key, &value) == ATTN_OK ? value : standard;
}

static char *terminated(attn_gguf_string text)
{
    char *copy = attn_alloc(text.bytes + 1);
    if (copy != NULL) {
        memcpy(copy, text.text, text.bytes);
        copy[text.bytes] = '\0';
    }
    return copy;
}

/* Arrays of the file, freed together. */
typedef struct file_arrays {
    attn_gguf_string *texts, *merges;
    float *scores;
    int32_t *types;
    int64_t *wide;
    char *model, *pre;
} file_arrays;

static attn_status read_arrays(const attn_gguf *file, file_arrays *a, attn_tokenizer_data *data)
{
    const attn_gguf_metadata *tokens = attn_gguf_metadata_find(file, "tokenizer.ggml.tokens");
    const attn_gguf_metadata *scores = attn_gguf_metadata_find(file, "tokenizer.ggml.scores");
    const attn_gguf_metadata *types = attn_gguf_metadata_find(file, "tokenizer.ggml.token_type");
    const attn_gguf_metadata *merges = attn_gguf_metadata_find(file, "tokenizer.ggml.merges");
    attn_gguf_string model, pre;
    ATTN_TRY(attn_gguf_get_string(file, "tokenizer.ggml.model", &model));
    if (tokens == NULL || tokens->count < 1 || tokens->count > COUNT_LIMIT) {
        return attn_fail(ATTN_ERR_FORMAT, "tokenizer.ggml.tokens is missing or of an impossible size");
    }
    data->count = tokens->count;
    a->model = terminated(model);
    a->texts = attn_alloc_array((size_t)tokens->count, sizeof *a->texts);
    if (a->model == NULL || a->texts == NULL) {
        return attn_fail_memory((size_t)tokens->count * sizeof *a->texts);
    }
    ATTN_TRY(attn_gguf_get_strings(file, "tokenizer.ggml.tokens", a->texts, tokens->count));
    if (attn_gguf_metadata_find(file, "tokenizer.ggml.pre") != NULL) {
        ATTN_TRY(attn_gguf_get_string(file, "tokenizer.ggml.pre", &pre));
        a->pre = terminated(pre);
        if (a->pre == NULL) {
            return attn_fail_memory(pre.bytes);
        }
    }
    if (scores != NULL) {
        a->scores = attn_alloc_array((size_t)tokens->count, sizeof *a->scores);
        if (a->scores == NULL) {
            return attn_fail_memory((size_t)tokens->count * sizeof *a->scores);
        }
        ATTN_TRY(attn_gguf_get_floats(file, "tokenizer.ggml.scores", a->scores, tokens->count));
    }
    if (types != NULL) {
        a->types = attn_alloc_array((size_t)tokens->count, sizeof *a->types);
        a->wide = attn_alloc_array((size_t)tokens->count, sizeof *a->wide);
        if (a->types == NULL || a->wide == NULL) {
            return attn_fail_memory((size_t)tokens->count * sizeof *a->wide);
        }
        ATTN_TRY(attn_gguf_get_ints(file, "tokenizer.ggml.token_type", a->wide, tokens->count));
        for (int64_t i = 0; i < tokens->count; i++) {
            a->types[i] = a->wide[i] >= 0 && a->wide[i] <= ATTN_TOKEN_BYTE ? (int32_t)a->wide[i] : 0;
        }
    }
    if (merges != NULL) {
        if (merges->count > COUNT_LIMIT) {
            return attn_fail(ATTN_ERR_FORMAT, "tokenizer.ggml.merges has %lld entries", (long long)merges->count);
        }
        a->merges = attn_alloc_array((size_t)merges->count + 1, sizeof *a->merges);
        if (a->merges == NULL) {
            return attn_fail_memory((size_t)merges->count * sizeof *a->merges);
        }
        ATTN_TRY(attn_gguf_get_strings(file, "tokenizer.ggml.merges", a->merges, merges->count));
        data->merge_count = merges->count;
    }
    return ATTN_OK;
}

attn_status attn_tokenizer_from_gguf(attn_tokenizer **tokenizer, const attn_gguf *file)
{
    *tokenizer = NULL;
    file_arrays a = {0};
    attn_tokenizer_data data = {0};
    attn_status status = read_arrays(file, &a, &data);
    if (status == ATTN_OK) {
        int spm = strcmp(a.model, "gpt2") != 0;
        data.model = a.model, data.pre = a.pre, data.texts = a.texts, data.scores = a.scores, data.types = a.types;
        data.merges = a.merges;
        data.bos = optional_int(file, "tokenizer.ggml.bos_token_id", spm ? 1 : -1);
        data.eos = optional_int(file, "tokenizer.ggml.eos_token_id", spm ? 2 : -1);
        data.eot = optional_int(file, "tokenizer.ggml.eot_token_id", -1);
        data.unknown = optional_int(file, "tokenizer.ggml.unknown_token_id", spm ? 0 : -1);
        int begins = spm || (a.pre != NULL && attn_bpe_begins_texts(a.pre));
        data.add_bos = (int)optional_int(file, "tokenizer.ggml.add_bos_token", begins);
        data.add_eos = (int)optional_int(file, "tokenizer.ggml.add_eos_token", 0);
        data.add_space_prefix = (int)optional_int(file, "tokenizer.ggml.add_space_prefix", spm);
        if (attn_gguf_metadata_find(file, "tokenizer.chat_template") != NULL) {
            status = attn_gguf_get_string(file, "tokenizer.chat_template", &data.chat_template);
        }
    }
    if (status == ATTN_OK) {
        status = attn_tokenizer_create(tokenizer, &data);
    }
    void *memory[] = {a.texts, a.merges, a.scores, a.types, a.wide, a.model, a.pre};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) {
        attn_free(memory[i]);
    }
    return status;
}

int64_t attn_tokenizer_count(const attn_tokenizer *t) { return t->count; }

int32_t attn_tokenizer_bos(const attn_tokenizer *t) { return t->bos; }

int32_t attn_tokenizer_eos(const attn_tokenizer *t) { return t->eos; }

int32_t attn_tokenizer_find(const attn_tokenizer *t, const char *text)
{
    return attn_token_map_find(t, &t->name_map, text, strlen(text));
}

int attn_tokenizer_is_end(const attn_tokenizer *t, int32_t token)
{
    static const char *const ends[] = {"<|im_end|>", "<|endoftext|>",   "<end_of_turn>", "<|eot_id|>",
                                       "<|eom_id|>", "<|end_of_text|>", "<eos>",         "</s>"};
    if (token < 0 || token >= t->count) {
        return 0;
    }
    if (token == t->eos || token == t->eot) {
        return 1;
    }
    int type = t->types[token], special = type == ATTN_TOKEN_CONTROL || type == ATTN_TOKEN_USER_DEFINED; /* converters differ */
    for (size_t i = 0; i < sizeof ends / sizeof ends[0] && special; i++) {
        size_t length = t->name_offsets[token + 1] - t->name_offsets[token];
        if (strlen(ends[i]) == length && memcmp(t->names + t->name_offsets[token], ends[i], length) == 0) {
            return 1;
        }
    }
    return 0;
}

const char *attn_token_text(const attn_tokenizer *t, int32_t token, int special, size_t *bytes)
{
    *bytes = 0;
    if (token < 0 || token >= t->count) {
        return "";
    }
    int hidden = t->types[token] == ATTN_TOKEN_CONTROL || t->types[token] == ATTN_TOKEN_UNKNOWN || t->types[token] == ATTN_TOKEN_UNUSED;
    if (hidden && !special) {
        return "";
    }
    *bytes = token_length(t, token);
    return token_bytes(t, token);
}

static attn_status encode_plain(const attn_tokenizer *t, const char *text, size_t length, int begin, token_list *out)
{
    if (length == 0) {
        return ATTN_OK;
    }
    return t->model == MODEL_BPE ? attn_bpe_encode(t, text, length, out) : attn_spm_encode(t, text, length, begin, out);
}

static attn_status encode(const attn_tokenizer *t, const char *text, size_t bytes, int flags, token_list *out)
{
    int parse = (flags & ATTN_TOKENIZE_PARSE) != 0;
    int begun = parse && bytes > 0 && special_at(t, text, bytes, 1) == t->bos;
    if ((flags & ATTN_TOKENIZE_SPECIAL) != 0 && t->add_bos && t->bos >= 0 && !begun) {
        ATTN_TRY(attn_token_list_add(out, t->bos));
    }
    size_t start = 0;
    int begin = 1;
    for (size_t i = 0; i < bytes;) {
        int32_t id = special_at(t, text + i, bytes - i, parse);
        if (id < 0) {
            i++;
            continue;
        }
        ATTN_TRY(encode_plain(t, text + start, i - start, begin, out));
        ATTN_TRY(attn_token_list_add(out, id));
        i += token_length(t, id);
        start = i;
        begin = t->types[id] == ATTN_TOKEN_CONTROL;
    }
    ATTN_TRY(encode_plain(t, text + start, bytes - start, begin, out));
    if ((flags & ATTN_TOKENIZE_SPECIAL) != 0 && t->add_eos && t->eos >= 0) {
        ATTN_TRY(attn_token_list_add(out, t->eos));
    }
    return ATTN_OK;
}

attn_status attn_tokenize(const attn_tokenizer *t, const char *text, size_t bytes, int flags, int32_t **tokens, int64_t *count)
{
    token_list list = {0};
    *tokens = NULL;
    *count = 0;
    if (bytes > BYTES_LIMIT) {
        return attn_fail(ATTN_ERR_ARGUMENT, "text of %zu bytes is too long (at most %u)", bytes, BYTES_LIMIT);
    }
    attn_status status = encode(t, text, bytes, flags, &list);
    if (status != ATTN_OK) {
        attn_free(list.items);
        return status;
    }
    *tokens = list.items;
    *count = list.count;
    return ATTN_OK;
}

void attn_tokens_free(int32_t *tokens) { attn_free(tokens); }

void attn_text_free(char *text) { attn_free(text); }
