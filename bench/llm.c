/* Speed of a language model: prompt processing and generation, by length of the context.
 *
 *     bench_llm MODEL.gguf [--threads N] [--cache f32|f16|bf16|i8] [--chunk N] [--lengths 512,2048,8000]
 *
 * The tokens are arbitrary (speed does not depend on which). Best of three for prompts, of runs of 16 tokens for
 * generation. */
#include <attn/model.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LENGTHS 8
#define RUN 16 /* tokens generated per measurement */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void check(attn_status status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        exit(1);
    }
}

static void measure(attn_context *context, const int32_t *tokens, int64_t length)
{
    double prompt = 1e30, generation = 1e30;
    attn_context_stats stats = {0};
    for (int repeat = 0; repeat < 3; repeat++) {
        check(attn_context_truncate(context, 0, 0));
        attn_context_reset_stats(context);
        attn_context_batch batch = {0, tokens, length};
        double start = now();
        check(attn_context_eval(context, &batch, 1, NULL, NULL));
        double seconds = now() - start;
        if (seconds < prompt) {
            prompt = seconds;
            stats = attn_context_get_stats(context);
        }
    }
    for (int repeat = 0; repeat < 5; repeat++) {
        double start = now();
        for (int i = 0; i < RUN; i++) {
            attn_context_batch batch = {0, tokens + i, 1};
            check(attn_context_eval(context, &batch, 1, NULL, NULL));
        }
        double seconds = (now() - start) / RUN;
        generation = seconds < generation ? seconds : generation;
    }
    printf("%8lld %10.0f %10.1f %12.0f%% %9.0f%% %12.1f %10.2f\n", (long long)length, (double)length / prompt,
           1 / generation, 100 * stats.attention_seconds / stats.seconds, 100 * stats.linear_seconds / stats.seconds,
           stats.attention_flops / stats.attention_seconds / 1e9, (double)stats.cache_bytes / 1048576);
    fflush(stdout);
}

int main(int count, char **arguments)
{
    attn_context_settings settings = {.cache = ATTN_F16};
    int64_t lengths[LENGTHS] = {128, 512, 2048, 8000}, most = 0;
    int length_count = 4;
    if (count < 2) {
        fprintf(stderr, "usage: bench_llm MODEL.gguf [--threads N] [--cache TYPE] [--chunk N] [--lengths A,B,...]\n");
        return 2;
    }
    for (int i = 2; i + 1 < count; i += 2) {
        char *value = arguments[i + 1];
        if (strcmp(arguments[i], "--threads") == 0) {
            settings.threads = atoi(value);
        } else if (strcmp(arguments[i], "--chunk") == 0) {
            settings.chunk = atoi(value);
        } else if (strcmp(arguments[i], "--cache") == 0) {
            check(attn_dtype_parse(value, &settings.cache));
        } else if (strcmp(arguments[i], "--lengths") == 0) {
            length_count = 0;
            for (char *part = strtok(value, ","); part != NULL && length_count < LENGTHS; part = strtok(NULL, ",")) {
                lengths[length_count++] = atoi(part);
            }
        }
    }
    for (int i = 0; i < length_count; i++) {
        most = lengths[i] > most ? lengths[i] : most;
    }
    double start = now();
    attn_model *model;
    check(attn_model_open(&model, arguments[1], NULL));
    const attn_model_info *info = attn_model_get_info(model);
    printf("%s: %lld layers, weights %.1f MiB, opened in %.2f s\n", info->architecture, (long long)info->layers,
           (double)info->weight_bytes / 1048576, now() - start);
    settings.length = most + 5 * RUN;
    attn_context *context;
    check(attn_context_create(&context, model, &settings));
    int32_t *tokens = malloc((size_t)(most + RUN) * sizeof *tokens);
    if (tokens == NULL) {
        return 1;
    }
    for (int64_t i = 0; i < most + RUN; i++) {
        tokens[i] = (int32_t)((i * 7919 + 13) % info->vocabulary);
    }
    printf("  length   prompt/s generate/s attention time   linear attn GFLOP/s  cache MiB\n");
    for (int i = 0; i < length_count; i++) {
        measure(context, tokens, lengths[i]);
    }
    free(tokens);
    attn_context_destroy(context);
    attn_model_close(model);
    return 0;
}
