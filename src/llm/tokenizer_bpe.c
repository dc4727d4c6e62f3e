/* Byte-level BPE: the text is cut into words by the model's patterns, and each word's bytes are merged pair by pair, lowest rank
 * first. */
#include "llm/tokenizer.h"

#include <string.h>

/* ---- Pre-tokenizers ---- */

/* Patterns are applied one after the other: each cuts every piece that the one before left into its matches and what lies between. */
typedef struct pre_tokenizer {
    const char *names; /* separated by spaces */
    int llama3; /* words that the vocabulary has are one token whatever the merges, and texts start with the begin token */
    const char *patterns[PATTERN_LIMIT];
} pre_tokenizer;

/* Unicode's White_Space; PCRE2's \s has U+180E too. */
#define SPACES "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define TRAILING "[" SPACES "]+(?![^" SPACES "])|[" SPACES "]+"
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACES "\\p{L}\\p{N}]+|" TRAILING
#define LLAMA3(digits)                                                                                                 \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" digits                                         \
    "| ?[^" SPACES "\\p{L}\\p{N}]+[\\r\\n]*|[" SPACES "]*[\\r\\n]+|" TRAILING

static const pre_tokenizer pre_tokenizers[] = {
    {" default gpt-2 gpt2 phi-2 jina-es jina-de mpt olmo jais roberta-bpe ", 0, {GPT2}},
    {" smollm starcoder refact command-r codeshell exaone minerva-7b ", 0, {"\\p{N}", GPT2}},
    {" llama-bpe llama3 llama-v3 falcon3 pixtral ", 1, {LLAMA3("{1,3}")}},
    {" smaug-bpe ", 0, {LLAMA3("{1,3}")}},
    {" qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez ", 0, {LLAMA3("")}},
};

static void *pattern_alloc(PCRE2_SIZE bytes, void *user)
{
    (void)user;
    return attn_alloc(bytes);
}

static void pattern_free(void *memory, void *user)
{
    (void)user;
    attn_free(memory);
}

static attn_status compile(attn_tokenizer *t, const char *const *patterns, pcre2_compile_context *context)
{
    for (int i = 0; i < PATTERN_LIMIT && patterns[i] != NULL; i++) {
        int code;
        PCRE2_SIZE offset;
        t->patterns[i] = pcre2_compile((PCRE2_SPTR)patterns[i], PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF,
                                       &code, &offset, context);
        if (t->patterns[i] == NULL) {
            return attn_fail(ATTN_ERR_MEMORY, "out of memory (pattern %d of a pre-tokenizer, code %d)", i, code);
        }
        t->pattern_count = i + 1;
        pcre2_jit_compile(t->patterns[i], PCRE2_JIT_COMPLETE); /* without it matching is slower, not different */
    }
    return ATTN_OK;
}

static const pre_tokenizer *find_pre_tokenizer(const char *pre)
{
    size_t length = strlen(pre);
    for (size_t i = 0; i < sizeof pre_tokenizers / sizeof pre_tokenizers[0]; i++) {
        for (const char *p = strstr(pre_tokenizers[i].names, pre); p != NULL && length > 0; p = strstr(p + 1, pre)) {
            if (p[-1] == ' ' && p[length] == ' ') {
                return &pre_tokenizers[i];
            }
        }
    }
    return NULL;
}

int attn_bpe_begins_texts(const char *pre)
{
    const pre_tokenizer *found = find_pre_tokenizer(pre);
    return found != NULL && found->llama3;
}

attn_status attn_bpe_patterns(attn_tokenizer *t, const char *pre)
{
    const pre_tokenizer *found = find_pre_tokenizer(pre);
    if (found == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "pre-tokenizer '%.40s' is not supported (default, gpt-2, smollm, starcoder, refact, "
                                               "llama-bpe, qwen2 and their relatives)", pre);
    }
    t->whole_words = found->llama3;
    pcre2_general_context *general = pcre2_general_context_create(pattern_alloc, pattern_free, NULL);
    pcre2_compile_context *context = general != NULL ? pcre2_compile_context_create(general) : NULL;
    attn_status status = context != NULL ? compile(t, found->patterns, context)
                                         : attn_fail(ATTN_ERR_MEMORY, "out of memory (pre-tokenizer)");
    pcre2_compile_context_free(context);
    pcre2_general_context_free(general);
    return status;
}

/* ---- Merging ---- */

#define SMALL_WORD 32

/* Short words: scan all pairs for the best, again and again. */
static attn_status merge_small(const attn_tokenizer *t, int32_t *symbols, int count, token_list *out)
{
    int32_t ranks[SMALL_WORD], merged[SMALL_WORD];
    for (int i = 0; i + 1 < count; i++) {
        const merge_entry *entry = attn_find_merge(t, symbols[i], symbols[i + 1]);
        ranks[i] = entry != NULL ? entry->rank : INT32_MAX;
        merged[i] = entry != NULL ? entry->merged : -1;
    }
    for (;;) {
        int best = -1;
        for (int i = 0; i + 1 < count; i++) {
            if (ranks[i] != INT32_MAX && (best < 0 || ranks[i] < ranks[best])) {
                best = i;
            }
        }
        if (best < 0) {
            break;
        }
        symbols[best] = merged[best];
        for (int i = best + 1; i + 1 < count; i++) {
            symbols[i] = symbols[i + 1];
            ranks[i] = ranks[i + 1];
            merged[i] = merged[i + 1];
        }
        count--;
        for (int i = best > 0 ? best - 1 : 0; i <= best && i + 1 < count; i++) {
            const merge_entry *entry = attn_find_merge(t, symbols[i], symbols[i + 1]);
            ranks[i] = entry != NULL ? entry->rank : INT32_MAX;
            merged[i] = entry != NULL ? entry->merged : -1;
        }
    }
    for (int i = 0; i < count; i++) {
        ATTN_TRY(attn_token_list_add(out, symbols[i]));
    }
    return ATTN_OK;
}

static attn_status push_pair(const attn_tokenizer *t, merge_heap *heap, const text_symbol *symbols, int32_t left, int32_t right)
{
    if (left < 0 || right < 0) {
        return ATTN_OK;
    }
    const merge_entry *entry = attn_find_merge(t, symbols[left].token, symbols[right].token);
    if (entry == NULL) {
        return ATTN_OK;
    }
    return attn_merge_heap_push(heap, (merge_candidate){entry->rank, left, right, entry->merged, symbols[left].size,
                                                        symbols[right].size});
}

/* Long ones: a linked list and a heap, n log n. */
static attn_status merge_long(const attn_tokenizer *t, text_symbol *symbols, int32_t count, token_list *out)
{
    merge_heap heap = {0};
    attn_status status = ATTN_OK;
    for (int32_t i = 0; i + 1 < count && status == ATTN_OK; i++) {
        status = push_pair(t, &heap, symbols, i, i + 1);
    }
    while (heap.count > 0 && status == ATTN_OK) {
        merge_candidate c = attn_merge_heap_pop(&heap);
        text_symbol *left = &symbols[c.left], *right = &symbols[c.right];
        if (left->size != c.left_size || right->size != c.right_size) {
            continue; /* one of them has merged with another since */
        }
        left->token = c.merged;
        left->size += right->size;
        right->size = 0;
        left->next = right->next;
        if (right->next >= 0) {
            symbols[right->next].previous = c.left;
        }
        status = push_pair(t, &heap, symbols, left->previous, c.left);
        if (status == ATTN_OK) {
            status = push_pair(t, &heap, symbols, c.left, left->next);
        }
    }
    for (int32_t i = 0; i >= 0 && status == ATTN_OK; i = symbols[i].next) {
        status = attn_token_list_add(out, symbols[i].token);
    }
    attn_free(heap.items);
    return status;
}

/* A word, by merging its bytes. Bytes that the vocabulary lacks are dropped, as the reference implementations do. */
static attn_status encode_word(const attn_tokenizer *t, const char *text, size_t length, token_list *out)
{
    int32_t small[SMALL_WORD], whole = t->whole_words ? attn_token_map_find(t, &t->map, text, length) : -1;
    if (whole >= 0) {
        return attn_token_list_add(out, whole);
    }
    if (length <= SMALL_WORD) {
        int count = 0;
        for (size_t i = 0; i < length; i++) {
            int32_t token = t->byte_tokens[(unsigned char)text[i]];
            if (token >= 0) {
                small[count++] = token;
            }
        }
        return merge_small(t, small, count, out);
    }
    text_symbol *symbols = attn_alloc_array(length, sizeof *symbols);
    if (symbols == NULL) {
        return attn_fail_memory(length * sizeof *symbols);
    }
    int32_t count = 0;
    for (size_t i = 0; i < length; i++) {
        int32_t token = t->byte_tokens[(unsigned char)text[i]];
        if (token >= 0) {
            symbols[count] = (text_symbol){(uint32_t)i, 1, count - 1, count + 1, token};
            count++;
        }
    }
    attn_status status = ATTN_OK;
    if (count > 0) {
        symbols[count - 1].next = -1;
        status = merge_long(t, symbols, count, out);
    }
    attn_free(symbols);
    return status;
}

/* ---- Cutting ---- */

static attn_status cut(const attn_tokenizer *t, int level, pcre2_match_data **matches, const char *text, size_t length,
                       token_list *out)
{
    if (length == 0) {
        return ATTN_OK;
    }
    if (level == t->pattern_count) {
        return encode_word(t, text, length, out);
    }
    size_t done = 0, at = 0;
    while (at < length) {
        int found = pcre2_match(t->patterns[level], (PCRE2_SPTR)text, length, at, 0, matches[level], NULL);
        if (found == PCRE2_ERROR_NOMATCH) {
            break;
        }
        if (found < 0) {
            return attn_fail(ATTN_ERR_MEMORY, "pre-tokenizer pattern failed (code %d)", found);
        }
        const PCRE2_SIZE *span = pcre2_get_ovector_pointer(matches[level]);
        size_t begin = span[0], end = span[1];
        if (end <= begin) { /* no pattern matches nothing; keep going in any case */
            at = begin + 1;
            continue;
        }
        ATTN_TRY(cut(t, level + 1, matches, text + done, begin - done, out));
        ATTN_TRY(cut(t, level + 1, matches, text + begin, end - begin, out));
        done = at = end;
    }
    return cut(t, level + 1, matches, text + done, length - done, out);
}

attn_status attn_bpe_encode(const attn_tokenizer *t, const char *text, size_t length, token_list *out)
{
    pcre2_match_data *matches[PATTERN_LIMIT] = {NULL};
    attn_status status = ATTN_OK;
    for (int i = 0; i < t->pattern_count && status == ATTN_OK; i++) {
        matches[i] = pcre2_match_data_create_from_pattern(t->patterns[i], NULL); /* with the pattern's allocator */
        if (matches[i] == NULL) {
            status = attn_fail(ATTN_ERR_MEMORY, "out of memory (pre-tokenizer)");
        }
    }
    if (status == ATTN_OK) {
        status = cut(t, 0, matches, text, length, out);
    }
    for (int i = 0; i < t->pattern_count; i++) {
        pcre2_match_data_free(matches[i]);
    }
    return status;
}
