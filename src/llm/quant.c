/* Packing of weights into panels, and linear layers over them. */
#include "llm/quant.h"

#include "tensor/half.h"

#include <sys/mman.h>
#include <unistd.h>

#define ROWS ATTN_QUANT_ROWS
#define UNIT ATTN_QUANT_UNIT
#define GROUP ATTN_QUANT_GROUP
#define SLICE_BYTES (4 << 20)
#define PAIR (2 * ROWS) /* rows that a tile computes; matrices are padded to whole pairs of panels */

static const attn_quant_kernels *kernels(void)
{
    return ATTN_KERNEL_DOT_SELECT(attn_quant_kernels_table, attn_isa_current());
}

static int is_float(attn_quant_format format) { return format <= ATTN_QUANT_BF16; }

/* ---- Packing ---- */

static int format_of(attn_gguf_tensor_type type)
{
    switch (type) {
    case ATTN_GGUF_TENSOR_F32: return ATTN_QUANT_F32;
    case ATTN_GGUF_TENSOR_F16: return ATTN_QUANT_F16;
    case ATTN_GGUF_TENSOR_BF16: return ATTN_QUANT_BF16;
    case ATTN_GGUF_TENSOR_Q4_0: return ATTN_QUANT_Q4_0;
    case ATTN_GGUF_TENSOR_Q4_1: return ATTN_QUANT_Q4_1;
    case ATTN_GGUF_TENSOR_Q5_0: return ATTN_QUANT_Q5_0;
    case ATTN_GGUF_TENSOR_Q5_1: return ATTN_QUANT_Q5_1;
    case ATTN_GGUF_TENSOR_Q8_0: return ATTN_QUANT_Q8_0;
    case ATTN_GGUF_TENSOR_Q4_K: return ATTN_QUANT_Q4_K;
    case ATTN_GGUF_TENSOR_Q5_K: return ATTN_QUANT_Q5_K;
    case ATTN_GGUF_TENSOR_Q6_K: return ATTN_QUANT_Q6_K;
    default: return -1;
    }
}

/* Eight steps of four codes each, of one row and unit, into nibbles[4][16][4]. */
static void put_nibbles(unsigned char *nibbles, int row, const unsigned char codes[UNIT])
{
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 4; i++) {
            nibbles[64 * j + 4 * row + i] =
                (unsigned char)((codes[4 * j + i] & 15) | (codes[16 + 4 * j + i] & 15) << 4);
        }
    }
}

/* The fifth bits of a unit's codes into high[16][4]. */
static void put_fifth(unsigned char *high, int row, const unsigned char codes[UNIT])
{
    for (int i = 0; i < 4; i++) {
        int bits = 0;
        for (int s = 0; s < 8; s++) {
            bits |= (codes[4 * s + i] >> 4 & 1) << s;
        }
        high[4 * row + i] = (unsigned char)bits;
    }
}

static void put_upper(unsigned char *high, int row, const unsigned char codes[UNIT])
{
    for (int h = 0; h < 2; h++) {
        for (int i = 0; i < 4; i++) {
            int bits = 0;
            for (int t = 0; t < 4; t++) {
                bits |= (codes[16 * h + 4 * t + i] >> 4 & 3) << 2 * t;
            }
            high[64 * h + 4 * row + i] = (unsigned char)bits;
        }
    }
}

/* The codes of a block of 32 whose nibbles (after `at` bytes) may have fifth bits before them. */
static void get_codes(const unsigned char *block, int at, const unsigned char *fifth, unsigned char codes[UNIT])
{
    for (int i = 0; i < 16; i++) {
        codes[i] = block[at + i] & 15;
        codes[i + 16] = block[at + i] >> 4;
    }
    for (int i = 0; i < UNIT && fifth != NULL; i++) {
        codes[i] = (unsigned char)(codes[i] | (fifth[i / 8] >> i % 8 & 1) << 4);
    }
}

static void put_u16(unsigned char *to, const unsigned char *from) { memcpy(to, from, 2); }

/* One row of a panel; `source` is the row in the file. */
static void pack_row(attn_quant_format format, unsigned char *panel, int row, const unsigned char *source,
                     int64_t units)
{
    unsigned char *scales = panel, *codes = panel + attn_quant_scale_bytes(format, units), plain[UNIT];
    size_t step = attn_quant_code_bytes(format);
    for (int64_t u = 0; u < units; u++, codes += step) {
        int j = (int)(u % 8);
        switch (format) {
        case ATTN_QUANT_Q4_0:
            put_u16(scales + 32 * u + 2 * row, source + 18 * u);
            get_codes(source + 18 * u, 2, NULL, plain);
            put_nibbles(codes, row, plain);
            break;
        case ATTN_QUANT_Q4_1:
            put_u16(scales + 64 * u + 2 * row, source + 20 * u);
            put_u16(scales + 64 * u + 32 + 2 * row, source + 20 * u + 2);
            get_codes(source + 20 * u, 4, NULL, plain);
            put_nibbles(codes, row, plain);
            break;
        case ATTN_QUANT_Q5_0:
            put_u16(scales + 32 * u + 2 * row, source + 22 * u);
            get_codes(source + 22 * u, 6, source + 22 * u + 2, plain);
            put_fifth(codes, row, plain);
            put_nibbles(codes + 64, row, plain);
            break;
        case ATTN_QUANT_Q5_1:
            put_u16(scales + 64 * u + 2 * row, source + 24 * u);
            put_u16(scales + 64 * u + 32 + 2 * row, source + 24 * u + 2);
            get_codes(source + 24 * u, 8, source + 24 * u + 4, plain);
            put_fifth(codes, row, plain);
            put_nibbles(codes + 64, row, plain);
            break;
        case ATTN_QUANT_Q8_0:
            put_u16(scales + 32 * u + 2 * row, source + 34 * u);
            for (int i = 0; i < UNIT; i++) {
                codes[64 * (i / 4) + 4 * row + i % 4] = source[34 * u + 2 + i] ^ 0x80;
            }
            break;
        case ATTN_QUANT_Q4_K:
        case ATTN_QUANT_Q5_K: {
            int five = format == ATTN_QUANT_Q5_K;
            const unsigned char *block = source + (five ? 176 : 144) * (u / 8), *nibbles = block + (five ? 48 : 16);
            unsigned char *group = scales + 256 * (u / 8);
            if (j == 0) {
                put_u16(group + 2 * row, block);
                put_u16(group + 32 + 2 * row, block + 2);
                for (int i = 0; i < 12; i++) {
                    group[64 + 16 * i + row] = block[4 + i];
                }
            }
            for (int i = 0; i < UNIT; i++) {
                int high = five ? (block[16 + i] >> j & 1) << 4 : 0;
                plain[i] = (unsigned char)((nibbles[32 * (j / 2) + i] >> 4 * (j % 2) & 15) | high);
            }
            if (five) {
                put_fifth(codes, row, plain);
            }
            put_nibbles(codes + (five ? 64 : 0), row, plain);
            break;
        }
        default: { /* Q6_K */
            const unsigned char *block = source + 210 * (u / 8);
            unsigned char *group = scales + 288 * (u / 8);
            if (j == 0) {
                put_u16(group + 2 * row, block + 208);
                for (int i = 0; i < 16; i++) {
                    group[32 + 16 * i + row] = block[192 + i];
                }
            }
            for (int i = 0; i < UNIT; i++) {
                plain[i] = (unsigned char)attn_quant_q6_k_code(block, 32 * j + i);
            }
            put_upper(codes, row, plain);
            put_nibbles(codes + 128, row, plain);
        }
        }
    }
}

static void pack_float_row(unsigned char *panel, int row, const unsigned char *source, int64_t columns, size_t bytes)
{
    for (int64_t k = 0; k < columns; k++) {
        memcpy(panel + ((size_t)k * ROWS + (size_t)row) * bytes, source + (size_t)k * bytes, bytes);
    }
}

static int64_t padded_panels(int64_t rows) { return attn_ceil_div(rows, PAIR) * 2; }

static size_t panel_bytes(attn_gguf_tensor_type type, int64_t columns)
{
    int format = format_of(type);
    return is_float((attn_quant_format)format) ? (size_t)columns * ROWS * (size_t)attn_gguf_block_bytes(type)
                                               : attn_quant_panel_bytes((attn_quant_format)format, columns / UNIT);
}

size_t attn_quant_packed_bytes(attn_gguf_tensor_type type, int64_t rows, int64_t columns)
{
    return format_of(type) < 0 ? 0 : (size_t)padded_panels(rows) * panel_bytes(type, columns);
}

/* The whole pages of the first `bytes` bytes. */
static void release_pages(const void *data, size_t bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)data + page - 1) / page * page, end = ((uintptr_t)data + bytes) / page * page;
    if (end > begin) {
        madvise((void *)begin, end - begin, MADV_DONTNEED);
    }
}

attn_status attn_quant_matrix_pack(attn_quant_matrix *matrix, attn_arena *arena, const attn_gguf_tensor *tensor,
                                   int64_t rows, int64_t columns,
                                   int64_t (*source_row)(const void *user, int64_t row), const void *user, int mapped,
                                   int threads)
{
    *matrix = (attn_quant_matrix){0};
    int format = format_of(tensor->type);
    if (format < 0) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "tensor '%.80s' is of type %s, which is not supported", tensor->name,
                         attn_gguf_tensor_type_name(tensor->type));
    }
    size_t width = (size_t)attn_gguf_block_bytes(tensor->type);
    size_t row_bytes = (size_t)columns / (size_t)attn_gguf_block_elements(tensor->type) * width;
    attn_quant_matrix made = {(attn_quant_format)format, rows, columns, panel_bytes(tensor->type, columns), NULL};
    int64_t panels = padded_panels(rows);
    made.data = attn_arena_array(arena, (size_t)panels, made.panel_bytes);
    if (made.data == NULL) {
        return attn_fail_memory((size_t)panels * made.panel_bytes);
    }
    /* In slices, so that the file's pages and their packed copy are not all in memory at the same time. */
    int64_t slice = attn_max_i64(PAIR, SLICE_BYTES / (int64_t)made.panel_bytes);
    for (int64_t first = 0; first < panels; first += slice) {
        int64_t end = attn_min_i64(panels, first + slice);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t p = first; p < end; p++) {
            unsigned char *panel = made.data + (size_t)p * made.panel_bytes;
            if (p * ROWS + ROWS > rows) {
                memset(panel, 0, made.panel_bytes);
            }
            for (int r = 0; r < ROWS && p * ROWS + r < rows; r++) {
                int64_t row = source_row != NULL ? source_row(user, p * ROWS + r) : p * ROWS + r;
                const unsigned char *source = (const unsigned char *)tensor->data + (size_t)row * row_bytes;
                if (is_float(made.format)) {
                    pack_float_row(panel, r, source, columns, width);
                } else {
                    pack_row(made.format, panel, r, source, columns / UNIT);
                }
            }
        }
        if (mapped && (source_row == NULL || end == panels)) {
            release_pages(tensor->data, (size_t)attn_min_i64(rows, end * ROWS) * row_bytes);
        }
    }
    *matrix = made;
    return ATTN_OK;
}

/* ---- One row, exactly ---- */

static float panel_f16(const unsigned char *at)
{
    uint16_t half;
    memcpy(&half, at, sizeof half);
    return attn_f16_to_f32(half);
}

static int get_code(attn_quant_format format, const unsigned char *unit, int row, int column)
{
    int step = column / 4, at = 4 * row + column % 4;
    if (format == ATTN_QUANT_Q8_0) {
        return unit[64 * step + at];
    }
    int high = (int)attn_quant_code_bytes(format) - 256;
    int code = unit[high + 64 * (step % 4) + at] >> (step < 4 ? 0 : 4) & 15;
    if (high == 64) {
        code |= (unit[at] >> step & 1) << 4;
    } else if (high == 128) {
        code |= (unit[64 * (step / 4) + at] >> 2 * (step % 4) & 3) << 4;
    }
    return code;
}

/* w = scale * code + minimum over columns begin ... end - 1 of a unit; formats with an offset subtract
 * it from the code instead. */
static void get_unit(attn_quant_format format, const unsigned char *unit, int row, int begin, int end, float scale,
                     float minimum, int offset, float *out)
{
    for (int i = begin; i < end; i++) {
        out[i] = scale * (float)(get_code(format, unit, row, i) - offset) + minimum;
    }
}

void attn_quant_matrix_row(const attn_quant_matrix *matrix, int64_t row, float *out)
{
    const unsigned char *panel = matrix->data + (size_t)(row / ROWS) * matrix->panel_bytes;
    int r = (int)(row % ROWS);
    attn_quant_format format = matrix->format;
    if (is_float(format)) {
        for (int64_t k = 0; k < matrix->columns; k++) {
            int64_t at = k * ROWS + r;
            uint16_t half = 0;
            if (format == ATTN_QUANT_F32) {
                memcpy(&out[k], panel + 4 * at, 4);
            } else {
                memcpy(&half, panel + 2 * at, 2);
                out[k] = format == ATTN_QUANT_F16 ? attn_f16_to_f32(half) : attn_bf16_to_f32(half);
            }
        }
        return;
    }
    int64_t units = matrix->columns / UNIT;
    const unsigned char *codes = panel + attn_quant_scale_bytes(format, units);
    for (int64_t u = 0; u < units; u++, codes += attn_quant_code_bytes(format), out += UNIT) {
        int j = (int)(u % 8);
        switch (format) {
        case ATTN_QUANT_Q4_0: get_unit(format, codes, r, 0, UNIT, panel_f16(panel + 32 * u + 2 * r), 0, 8, out); break;
        case ATTN_QUANT_Q5_0: get_unit(format, codes, r, 0, UNIT, panel_f16(panel + 32 * u + 2 * r), 0, 16, out); break;
        case ATTN_QUANT_Q8_0:
            get_unit(format, codes, r, 0, UNIT, panel_f16(panel + 32 * u + 2 * r), 0, 128, out);
            break;
        case ATTN_QUANT_Q4_1:
        case ATTN_QUANT_Q5_1:
            get_unit(format, codes, r, 0, UNIT, panel_f16(panel + 64 * u + 2 * r),
                     panel_f16(panel + 64 * u + 32 + 2 * r), 0, out);
            break;
        case ATTN_QUANT_Q6_K: {
            const unsigned char *group = panel + 288 * (u / 8);
            for (int h = 0; h < 2; h++) {
                float scale = panel_f16(group + 2 * r) * (float)(int8_t)group[32 + 16 * (2 * j + h) + r];
                get_unit(format, codes, r, 16 * h, 16 * h + 16, scale, 0, 32, out);
            }
            break;
        }
        default: { /* Q4_K, Q5_K */
            const unsigned char *group = panel + 256 * (u / 8);
            unsigned char packed[12];
            int scale, minimum;
            for (int i = 0; i < 12; i++) {
                packed[i] = group[64 + 16 * i + r];
            }
            attn_quant_k_scale(packed, j, &scale, &minimum);
            get_unit(format, codes, r, 0, UNIT, panel_f16(group + 2 * r) * (float)scale,
                     -panel_f16(group + 32 + 2 * r) * (float)minimum, 0, out);
        }
        }
    }
}

/* ---- Products ---- */

attn_status attn_quant_input_make(attn_quant_input *input, attn_arena *arena, int64_t tokens, int64_t columns)
{
    *input = (attn_quant_input){tokens, columns, columns / UNIT, NULL, NULL};
    size_t count = (size_t)tokens * (size_t)input->units;
    input->q = attn_arena_array(arena, count, sizeof *input->q);
    return input->q != NULL ? ATTN_OK : attn_fail_memory(count * sizeof *input->q);
}

/* Tokens of the group that starts at `first`. */
static int group_tokens(const attn_quant_input *input, int64_t first)
{
    return (int)attn_min_i64(GROUP, input->tokens - first);
}

void attn_quant_input_row(const attn_quant_input *input, int64_t row)
{
    int64_t first = row / GROUP * GROUP;
    kernels()->quantize(input->x + row * input->columns, input->units, input->q + first * input->units + (row - first),
                        group_tokens(input, first));
}

size_t attn_quant_scratch_bytes(int64_t columns)
{
    return 2 * ((attn_quant_unpacked_bytes(columns / UNIT) + 63) & ~(size_t)63) +
           (size_t)GROUP * PAIR * sizeof(float);
}

/* Two panels (rows 32 * pair ...) times the groups of tokens from `begin` to `end`. */
static void multiply_pair(const attn_quant_input *input, const attn_quant_product *product, int64_t pair, int64_t begin,
                          int64_t end, void *scratch)
{
    const attn_quant_kernels *k = kernels();
    const attn_quant_matrix *matrix = product->matrix;
    attn_quant_format format = matrix->format;
    const unsigned char *panels = matrix->data + (size_t)(2 * pair) * matrix->panel_bytes;
    int64_t row = pair * PAIR, rows = attn_min_i64(PAIR, matrix->rows - row);
    float *rest = scratch; /* results of a pair that is not whole */
    size_t room = (attn_quant_unpacked_bytes(input->units) + 63) & ~(size_t)63;
    char *unpacked = (char *)scratch + (size_t)GROUP * PAIR * sizeof(float);
    attn_quant_panel two[2];
    int few = end - begin <= 3 && !is_float(format);
    for (int i = 0; i < 2 && !few && !is_float(format); i++) {
        k->unpack[format](panels + (size_t)i * matrix->panel_bytes, input->units, unpacked + (size_t)i * room, &two[i]);
    }
    for (int64_t first = begin; first < end; first += GROUP) {
        int tokens = group_tokens(input, first);
        const attn_quant_x *q = input->q + first * input->units;
        float *out = rows == PAIR ? product->out + first * product->stride + row : rest;
        int64_t stride = rows == PAIR ? product->stride : PAIR;
        if (few) {
            for (int t = 0; t < tokens; t++) {
                k->vector[format](panels, input->units, q + t, tokens, out + t * stride);
                k->vector[format](panels + matrix->panel_bytes, input->units, q + t, tokens, out + t * stride + ROWS);
            }
        } else if (is_float(format)) {
            k->float_tile[format](panels, input->columns, input->x + first * input->columns, tokens, out, stride);
        } else {
            k->tile[format](two, input->units, q, tokens, out, stride);
        }
        for (int t = 0; t < tokens && rows != PAIR; t++) {
            memcpy(product->out + (first + t) * product->stride + row, rest + t * PAIR, (size_t)rows * sizeof(float));
        }
    }
}

void attn_quant_multiply(const attn_quant_input *input, const attn_quant_product *products, int count, void *scratch,
                         int thread, int threads)
{
    int64_t pairs = 0;
    for (int i = 0; i < count; i++) {
        pairs += attn_ceil_div(products[i].matrix->rows, PAIR);
    }
    /* With few pairs of panels for each thread, the tokens are split too. */
    int64_t groups = attn_ceil_div(input->tokens, GROUP);
    int64_t parts = attn_min_i64(groups, attn_ceil_div(4 * (int64_t)(threads - 1), pairs) + 1);
    int64_t tasks = pairs * parts;
    for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) {
        int64_t pair = task / parts, part = task % parts;
        int i = 0;
        while (pair >= attn_ceil_div(products[i].matrix->rows, PAIR)) {
            pair -= attn_ceil_div(products[i++].matrix->rows, PAIR);
        }
        int64_t begin = groups * part / parts * GROUP;
        int64_t end = attn_min_i64(groups * (part + 1) / parts * GROUP, input->tokens);
        multiply_pair(input, &products[i], pair, begin, end, scratch);
    }
}
