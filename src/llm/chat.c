/* Chat templates. Model files carry them as Jinja programs; the families that matter are few, so they are recognised by their marks
 * and rendered directly. */
#include "llm/tokenizer.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

typedef struct text_buffer {
    char *data;
    size_t length, room;
} text_buffer;

static attn_status append(text_buffer *b, const char *text, size_t length)
{
    if (length + 1 > b->room - b->length) {
        size_t room = (b->length + length + 1) * 2;
        char *grown = attn_realloc(b->data, b->length, room);
        if (grown == NULL) {
            return attn_fail_memory(room);
        }
        b->data = grown;
        b->room = room;
    }
    memcpy(b->data + b->length, text, length);
    b->length += length;
    b->data[b->length] = '\0';
    return ATTN_OK;
}

static attn_status append_all(text_buffer *b, const char *const *parts, int count)
{
    for (int i = 0; i < count; i++) {
        ATTN_TRY(append(b, parts[i], strlen(parts[i])));
    }
    return ATTN_OK;
}

#define APPEND(b, ...) append_all(b, (const char *const[]){__VA_ARGS__}, (int)(sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *)))

/* A piece of a template; where it is inside a Jinja string, without the backslashes. */
static attn_status append_literal(text_buffer *b, const char *text, const char *end, int escaped)
{
    for (; text < end; text++) {
        int escape = escaped && text[0] == '\\' && text + 1 < end;
        text += escape;
        ATTN_TRY(append(b, escape && text[0] == 'n' ? "\n" : text, 1));
    }
    return ATTN_OK;
}

/* The system message that a ChatML template adds when a chat has none: the text between the marks, in the first place
 * where there is text and not a variable. The line break may be written as \n inside a Jinja string. */
static attn_status default_system(text_buffer *b, const char *template)
{
    static const char mark[] = "<|im_start|>system";
    for (const char *at = strstr(template, mark); at != NULL; at = strstr(at, mark)) {
        at += strlen(mark);
        int escaped = at[0] == '\\' && at[1] == 'n';
        const char *text = at + 1 + escaped, *end = escaped || at[0] == '\n' ? strstr(text, "<|im_end|>") : NULL;
        if (end != NULL && end > text && strchr("'\"", text[0]) == NULL && memchr(text, '{', (size_t)(end - text)) == NULL) {
            ATTN_TRY(APPEND(b, mark, "\n"));
            ATTN_TRY(append_literal(b, text, end, escaped));
            return APPEND(b, "<|im_end|>\n");
        }
    }
    return ATTN_OK;
}

static attn_status chatml(text_buffer *b, const char *template, const attn_chat_message *messages, int count, int reply)
{
    if (count > 0 && strcmp(messages[0].role, "system") != 0) {
        ATTN_TRY(default_system(b, template));
    }
    for (int i = 0; i < count; i++) {
        ATTN_TRY(APPEND(b, "<|im_start|>", messages[i].role, "\n", messages[i].text, "<|im_end|>\n"));
    }
    return reply ? APPEND(b, "<|im_start|>assistant\n") : ATTN_OK;
}

/* Leading and trailing white space removed. */
static attn_status append_trimmed(text_buffer *b, const char *text)
{
    size_t start = strspn(text, " \t\r\n"), end = strlen(text);
    while (end > start && strchr(" \t\r\n", text[end - 1]) != NULL) {
        end--;
    }
    return append(b, text + start, end - start);
}

/* The system message goes in front of the first user message. */
static attn_status gemma(text_buffer *b, const attn_tokenizer *t, const attn_chat_message *messages, int count, int reply)
{
    int first = count > 0 && strcmp(messages[0].role, "system") == 0;
    if (t->bos >= 0) {
        size_t length;
        const char *bos = attn_token_text(t, t->bos, 1, &length);
        ATTN_TRY(append(b, bos, length));
    }
    for (int i = first; i < count; i++) {
        int model = strcmp(messages[i].role, "assistant") == 0;
        ATTN_TRY(APPEND(b, "<start_of_turn>", model ? "model" : "user", "\n"));
        if (i == first && first) {
            ATTN_TRY(APPEND(b, messages[0].text, "\n\n"));
        }
        ATTN_TRY(append_trimmed(b, messages[i].text));
        ATTN_TRY(APPEND(b, "<end_of_turn>\n"));
    }
    return reply ? APPEND(b, "<start_of_turn>model\n") : ATTN_OK;
}

/* From Llama 3.1 on there is a system message in any case, which starts with two dates. Today's is the one that those
 * templates have where no clock is given, so that the same chat is always the same text. */
static attn_status llama3(text_buffer *b, const char *template, const attn_chat_message *messages, int count, int reply)
{
    int dated = strstr(template, "Cutting Knowledge Date: December 2023") != NULL;
    int system = dated && count > 0 && strcmp(messages[0].role, "system") == 0;
    ATTN_TRY(APPEND(b, "<|begin_of_text|>"));
    if (dated) {
        ATTN_TRY(APPEND(b, "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
                           "Today Date: 26 Jul 2024\n\n"));
        ATTN_TRY(append_trimmed(b, system ? messages[0].text : ""));
        ATTN_TRY(APPEND(b, "<|eot_id|>"));
    }
    for (int i = system; i < count; i++) {
        ATTN_TRY(APPEND(b, "<|start_header_id|>", messages[i].role, "<|end_header_id|>\n\n"));
        ATTN_TRY(append_trimmed(b, messages[i].text));
        ATTN_TRY(APPEND(b, "<|eot_id|>"));
    }
    return reply ? APPEND(b, "<|start_header_id|>assistant<|end_header_id|>\n\n") : ATTN_OK;
}

attn_status attn_chat_render(const attn_tokenizer *t, const attn_chat_message *messages, int count, int reply, char **text)
{
    text_buffer b = {0};
    *text = NULL;
    for (int i = 0; i < count; i++) {
        if (strcmp(messages[i].role, "system") != 0 && strcmp(messages[i].role, "user") != 0 &&
            strcmp(messages[i].role, "assistant") != 0) {
            return attn_fail(ATTN_ERR_ARGUMENT, "chat: role '%.40s' (expected system, user or assistant)", messages[i].role);
        }
    }
    if (t->chat_template == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the model has no chat template: it continues text, so give it a text to continue");
    }
    attn_status status = append(&b, "", 0);
    if (status != ATTN_OK) {
        return status;
    }
    if (strstr(t->chat_template, "<|im_start|>") != NULL) {
        status = chatml(&b, t->chat_template, messages, count, reply);
    } else if (strstr(t->chat_template, "<start_of_turn>") != NULL) {
        status = gemma(&b, t, messages, count, reply);
    } else if (strstr(t->chat_template, "<|start_header_id|>") != NULL) {
        status = llama3(&b, t->chat_template, messages, count, reply);
    } else {
        status = attn_fail(ATTN_ERR_UNSUPPORTED,
                           "the model's chat template is of no known family (ChatML, Gemma, Llama 3): write the prompt out as plain text");
    }
    if (status != ATTN_OK) {
        attn_free(b.data);
        return status;
    }
    *text = b.data;
    return ATTN_OK;
}
