/* A short fuzz run without libFuzzer: mutates seed files and hands them to the target for some seconds. Not guided by coverage, but it
 * needs no special compiler.  NAME-driver SECONDS SEED... */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MOST (1 << 17)
#define SEEDS 256

typedef struct seed {
    uint8_t *data;
    size_t size;
} seed;

static uint64_t state = 88172645463325252u;

static size_t below(size_t bound)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return bound > 0 ? (size_t)(state % bound) : 0;
}

static int read_seed(const char *path, seed *s)
{
    FILE *file = fopen(path, "rb");
    s->data = malloc(MOST);
    if (file == NULL || s->data == NULL) {
        return 0;
    }
    s->size = fread(s->data, 1, MOST, file);
    return fclose(file) == 0;
}

/* One change: a bit, a byte, a small number over 8 bytes, a cut, a piece repeated, or a piece of another seed. */
static size_t mutate(uint8_t *data, size_t size, const seed *other)
{
    size_t at = below(size), length = 1 + below(16);
    switch (below(7)) {
    case 0: data[at] ^= (uint8_t)(1u << below(8)); return size;
    case 1: data[at] = (uint8_t)below(256); return size;
    case 2: {
        static const int64_t numbers[] = {0, 1, -1, INT32_MAX, INT64_MAX, INT64_MIN, 65535, 1 << 20};
        int64_t number = numbers[below(8)];
        memcpy(data + at, &number, size - at < 8 ? size - at : 8);
        return size;
    }
    case 3: return at > 0 ? at : size;
    case 4:
        length = length < size - at ? length : size - at;
        memmove(data + at, data + at + length, size - at - length);
        return size - length > 0 ? size - length : size;
    case 5:
        if (size + length <= MOST) {
            memmove(data + at + length, data + at, size - at);
            return size + length;
        }
        return size;
    default:
        length = other->size < length ? other->size : length;
        length = length < size - at ? length : size - at;
        memcpy(data + at, other->data + below(other->size - length + 1), length);
        return size;
    }
}

int main(int argc, char **argv)
{
    static seed seeds[SEEDS];
    static uint8_t data[MOST];
    int count = 0;
    long runs = 0;
    for (int i = 2; i < argc && count < SEEDS; i++) {
        if (read_seed(argv[i], &seeds[count]) && seeds[count].size > 0) {
            count++;
        }
    }
    if (argc < 3 || count == 0) {
        fprintf(stderr, "Usage: %s SECONDS SEED...\n", argv[0]);
        return 2;
    }
    time_t end = time(NULL) + atoi(argv[1]);
    for (int i = 0; i < count; i++, runs++) {
        LLVMFuzzerTestOneInput(seeds[i].data, seeds[i].size);
    }
    while (time(NULL) < end) {
        const seed *from = &seeds[below((size_t)count)];
        size_t size = from->size;
        memcpy(data, from->data, size);
        for (size_t changes = 1 + below(4); changes > 0 && size > 0; changes--) {
            size = mutate(data, size, &seeds[below((size_t)count)]);
        }
        /* A copy of exactly this size, so that sanitizers see reads past its end. */
        uint8_t *exact = malloc(size);
        if (exact == NULL) {
            return 1;
        }
        memcpy(exact, data, size);
        LLVMFuzzerTestOneInput(exact, size);
        free(exact);
        runs++;
    }
    printf("%ld executions of %d seeds\n", runs, count);
    return 0;
}
