/* SentencePiece-style vocabularies: pairs of neighbouring symbols merged by the score of what results, or the best path through the
 * vocabulary (unigram, Viterbi). Characters that the vocabulary lacks become their bytes. */
#include "llm/tokenizer.h"

#include <float.h>
#include <string.h>

/* A text that no token covers: its bytes, or the unknown token. */
static attn_status add_bytes(const attn_tokenizer *t, const char *text, size_t length, token_list *out)
{
    int all = 1;
    for (size_t i = 0; i < length; i++) {
        all &= t->byte_tokens[(unsigned char)text[i]] >= 0;
    }
    if (!all) {
        return t->unknown >= 0 ? attn_token_list_add(out, t->unknown) : ATTN_OK;
    }
    for (size_t i = 0; i < length; i++) {
        ATTN_TRY(attn_token_list_add(out, t->byte_tokens[(unsigned char)text[i]]));
    }
    return ATTN_OK;
}

static attn_status push_pair(const attn_tokenizer *t, merge_heap *heap, const text_symbol *symbols, const char *text, int32_t left,
                             int32_t right)
{
    if (left < 0 || right < 0) {
        return ATTN_OK;
    }
    size_t length = symbols[left].size + symbols[right].size;
    int32_t token = length <= t->longest ? attn_token_map_find(t, &t->map, text + symbols[left].start, length) : -1;
    if (token < 0) {
        return ATTN_OK;
    }
    return attn_merge_heap_push(heap, (merge_candidate){-(double)t->scores[token], left, right, token, symbols[left].size,
                                                        symbols[right].size});
}

static attn_status merge_pairs(const attn_tokenizer *t, const char *text, text_symbol *symbols, int32_t count, token_list *out)
{
    merge_heap heap = {0};
    attn_status status = ATTN_OK;
    for (int32_t i = 0; i + 1 < count && status == ATTN_OK; i++) {
        status = push_pair(t, &heap, symbols, text, i, i + 1);
    }
    while (heap.count > 0 && status == ATTN_OK) {
        merge_candidate c = attn_merge_heap_pop(&heap);
        text_symbol *left = &symbols[c.left], *right = &symbols[c.right];
        if (left->size != c.left_size || right->size != c.right_size) {
            continue;
        }
        left->token = c.merged;
        left->size += right->size;
        right->size = 0;
        left->next = right->next;
        if (right->next >= 0) {
            symbols[right->next].previous = c.left;
        }
        status = push_pair(t, &heap, symbols, text, left->previous, c.left);
        if (status == ATTN_OK) {
            status = push_pair(t, &heap, symbols, text, c.left, left->next);
        }
    }
    for (int32_t i = 0; i >= 0 && status == ATTN_OK; i = symbols[i].next) {
        status = symbols[i].token >= 0 ? attn_token_list_add(out, symbols[i].token)
                                       : add_bytes(t, text + symbols[i].start, symbols[i].size, out);
    }
    attn_free(heap.items);
    return status;
}

static attn_status by_merging(const attn_tokenizer *t, const char *text, size_t length, token_list *out)
{
    text_symbol *symbols = attn_alloc_array(length, sizeof *symbols);
    if (symbols == NULL) {
        return attn_fail_memory(length * sizeof *symbols);
    }
    int32_t count = 0;
    for (size_t i = 0; i < length;) {
        int size = attn_utf8_length(text + i, length - i);
        size = size > 0 ? size : 1;
        symbols[count] = (text_symbol){(uint32_t)i, (uint32_t)size, count - 1, count + 1,
                                       attn_token_map_find(t, &t->map, text + i, (size_t)size)};
        count++;
        i += (size_t)size;
    }
    symbols[count - 1].next = -1;
    attn_status status = merge_pairs(t, text, symbols, count, out);
    attn_free(symbols);
    return status;
}

#define UNKNOWN_PENALTY 10.0

/* The path of highest total score; a character outside the vocabulary costs more than any token. */
static attn_status by_viterbi(const attn_tokenizer *t, const char *text, size_t length, token_list *out)
{
    double *best = attn_alloc_array(length + 1, sizeof *best);
    int32_t *token = attn_alloc_array(length + 1, sizeof *token);
    uint32_t *from = attn_alloc_array(length + 1, sizeof *from);
    attn_status status = best != NULL && token != NULL && from != NULL ? ATTN_OK : attn_fail_memory((length + 1) * 16);
    for (size_t i = 0; status == ATTN_OK && i <= length; i++) {
        best[i] = i == 0 ? 0 : -DBL_MAX;
    }
    for (size_t i = 0; status == ATTN_OK && i < length; i++) {
        if (best[i] == -DBL_MAX) {
            continue;
        }
        int size = attn_utf8_length(text + i, length - i);
        size = size > 0 ? size : 1;
        double single = best[i] + (double)t->lowest_score - UNKNOWN_PENALTY;
        if (single > best[i + (size_t)size]) {
            best[i + (size_t)size] = single, token[i + (size_t)size] = -1, from[i + (size_t)size] = (uint32_t)i;
        }
        for (size_t n = 1; n <= t->longest && i + n <= length; n++) {
            int32_t id = attn_token_map_find(t, &t->map, text + i, n);
            if (id >= 0 && best[i] + (double)t->scores[id] > best[i + n]) {
                best[i + n] = best[i] + (double)t->scores[id], token[i + n] = id, from[i + n] = (uint32_t)i;
            }
        }
    }
    /* Backwards along the path, then forwards. */
    size_t end = length, steps = 0;
    while (status == ATTN_OK && end > 0) {
        size_t start = from[end];
        best[length - steps] = (double)end; /* reuse: the ends of the path's pieces, last first from the back */
        steps++;
        end = start;
    }
    for (size_t i = 0; status == ATTN_OK && i < steps; i++) {
        size_t stop = (size_t)best[length - steps + 1 + i], start = from[stop];
        status = token[stop] >= 0 ? attn_token_list_add(out, token[stop])
                                  : add_bytes(t, text + start, stop - start, out);
    }
    attn_free(best);
    attn_free(token);
    attn_free(from);
    return status;
}

attn_status attn_spm_encode(const attn_tokenizer *t, const char *text, size_t length, int begin, token_list *out)
{
    char *prefixed = NULL;
    if (t->add_space_prefix && begin) {
        prefixed = attn_alloc(length + 1);
        if (prefixed == NULL) {
            return attn_fail_memory(length + 1);
        }
        prefixed[0] = ' ';
        memcpy(prefixed + 1, text, length);
        text = prefixed;
        length++;
    }
    attn_status status = t->model == MODEL_SPM ? by_merging(t, text, length, out) : by_viterbi(t, text, length, out);
    attn_free(prefixed);
    return status;
}
