/* The block formats of GGUF tensors, as the format defines them, converted to float32. Numbers are little-endian.
 *
 *     block    elements  bytes  fields
 *     Q4_0           32     18  f16 d; 16 bytes of nibbles                          w = d (q - 8)
 *     Q4_1           32     20  f16 d, m; 16 bytes of nibbles                       w = d q + m
 *     Q5_0           32     22  f16 d; u32 fifth bits; 16 bytes of nibbles          w = d (q - 16)
 *     Q5_1           32     24  f16 d, m; u32 fifth bits; 16 bytes of nibbles       w = d q + m
 *     Q8_0           32     34  f16 d; 32 int8                                      w = d q
 *     Q4_K          256    144  f16 d, dmin; 12 bytes of scales; 128 of nibbles     w = d s q - dmin m   (s, m per 32)
 *     Q5_K          256    176  f16 d, dmin; 12 of scales; 32 of fifth bits; 128    w = d s q - dmin m
 *     Q6_K          256    210  128 low nibbles; 64 of high bits; 16 int8 s; f16 d  w = d s (q - 32)     (s per 16)
 *
 * In blocks of 32, byte i holds element i in its low and element i + 16 in its high nibble. */
#include "llm/quant.h"

#include "tensor/half.h"

static uint16_t load_u16(const unsigned char *p) { return (uint16_t)(p[0] | p[1] << 8); }
static float load_f16(const unsigned char *p) { return attn_f16_to_f32(load_u16(p)); }
static uint32_t load_u32(const unsigned char *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void q4_0(const unsigned char *block, float *out)
{
    float d = load_f16(block);
    for (int i = 0; i < 16; i++) {
        out[i] = d * (float)((block[2 + i] & 15) - 8);
        out[i + 16] = d * (float)((block[2 + i] >> 4) - 8);
    }
}

static void q4_1(const unsigned char *block, float *out)
{
    float d = load_f16(block), m = load_f16(block + 2);
    for (int i = 0; i < 16; i++) {
        out[i] = d * (float)(block[4 + i] & 15) + m;
        out[i + 16] = d * (float)(block[4 + i] >> 4) + m;
    }
}

static int fifth_bit(uint32_t bits, int i) { return (int)(bits >> i & 1u) << 4; }

static void q5_0(const unsigned char *block, float *out)
{
    float d = load_f16(block);
    uint32_t high = load_u32(block + 2);
    for (int i = 0; i < 16; i++) {
        out[i] = d * (float)(((block[6 + i] & 15) | fifth_bit(high, i)) - 16);
        out[i + 16] = d * (float)(((block[6 + i] >> 4) | fifth_bit(high, i + 16)) - 16);
    }
}

static void q5_1(const unsigned char *block, float *out)
{
    float d = load_f16(block), m = load_f16(block + 2);
    uint32_t high = load_u32(block + 4);
    for (int i = 0; i < 16; i++) {
        out[i] = d * (float)((block[8 + i] & 15) | fifth_bit(high, i)) + m;
        out[i + 16] = d * (float)((block[8 + i] >> 4) | fifth_bit(high, i + 16)) + m;
    }
}

static void q8_0(const unsigned char *block, float *out)
{
    float d = load_f16(block);
    for (int i = 0; i < 32; i++) {
        out[i] = d * (float)(int8_t)block[2 + i];
    }
}

/* Scale and minimum of sub-block j = 0 ... 7 from the 12 packed bytes: 6 bits each. */
void attn_quant_k_scale(const unsigned char *packed, int j, int *scale, int *minimum)
{
    if (j < 4) {
        *scale = packed[j] & 63;
        *minimum = packed[j + 4] & 63;
    } else {
        *scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
        *minimum = packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
    }
}

/* Element i of sub-block j lies in byte 32 (j / 2) + i, in the low nibble for even j; its fifth bit is
 * bit j of byte i. */
static void q4_k(const unsigned char *block, float *out)
{
    float d = load_f16(block), dmin = load_f16(block + 2);
    for (int j = 0; j < 8; j++) {
        int scale, minimum;
        attn_quant_k_scale(block + 4, j, &scale, &minimum);
        float s = d * (float)scale, m = dmin * (float)minimum;
        for (int i = 0; i < 32; i++) {
            out[32 * j + i] = s * (float)(block[16 + 32 * (j / 2) + i] >> 4 * (j % 2) & 15) - m;
        }
    }
}

static void q5_k(const unsigned char *block, float *out)
{
    float d = load_f16(block), dmin = load_f16(block + 2);
    for (int j = 0; j < 8; j++) {
        int scale, minimum;
        attn_quant_k_scale(block + 4, j, &scale, &minimum);
        float s = d * (float)scale, m = dmin * (float)minimum;
        for (int i = 0; i < 32; i++) {
            int low = block[48 + 32 * (j / 2) + i] >> 4 * (j % 2) & 15;
            out[32 * j + i] = s * (float)(low | (block[16 + i] >> j & 1) << 4) - m;
        }
    }
}

int attn_quant_q6_k_code(const unsigned char *block, int index)
{
    int half = index / 128, part = index % 128 / 32, i = index % 32;
    int low = block[64 * half + 32 * (part % 2) + i] >> 4 * (part / 2) & 15;
    int high = block[128 + 32 * half + i] >> 2 * part & 3;
    return low | high << 4;
}

static void q6_k(const unsigned char *block, float *out)
{
    float d = load_f16(block + 208);
    for (int i = 0; i < 256; i++) {
        float s = d * (float)(int8_t)block[192 + i / 16];
        out[i] = s * (float)(attn_quant_q6_k_code(block, i) - 32);
    }
}

attn_status attn_gguf_dequantize(attn_gguf_tensor_type type, const void *data, int64_t count, float *out)
{
    void (*convert)(const unsigned char *block, float *out) = NULL;
    const unsigned char *block = data;
    switch (type) {
    case ATTN_GGUF_TENSOR_F32: memcpy(out, data, (size_t)count * sizeof *out); return ATTN_OK;
    case ATTN_GGUF_TENSOR_F16:
        for (int64_t i = 0; i < count; i++) {
            out[i] = load_f16(block + 2 * i);
        }
        return ATTN_OK;
    case ATTN_GGUF_TENSOR_BF16:
        for (int64_t i = 0; i < count; i++) {
            out[i] = attn_bf16_to_f32(load_u16(block + 2 * i));
        }
        return ATTN_OK;
    case ATTN_GGUF_TENSOR_Q4_0: convert = q4_0; break;
    case ATTN_GGUF_TENSOR_Q4_1: convert = q4_1; break;
    case ATTN_GGUF_TENSOR_Q5_0: convert = q5_0; break;
    case ATTN_GGUF_TENSOR_Q5_1: convert = q5_1; break;
    case ATTN_GGUF_TENSOR_Q8_0: convert = q8_0; break;
    case ATTN_GGUF_TENSOR_Q4_K: convert = q4_k; break;
    case ATTN_GGUF_TENSOR_Q5_K: convert = q5_k; break;
    case ATTN_GGUF_TENSOR_Q6_K: convert = q6_k; break;
    default:
        return attn_fail(ATTN_ERR_UNSUPPORTED, "tensors of type %s (%d) are not supported",
                         attn_gguf_tensor_type_name(type), (int)type);
    }
    int elements = attn_gguf_block_elements(type), bytes = attn_gguf_block_bytes(type);
    if (count % elements != 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%lld elements are not whole blocks of %d (%s)", (long long)count, elements,
                         attn_gguf_tensor_type_name(type));
    }
    for (int64_t i = 0; i < count / elements; i++) {
        convert(block + i * bytes, out + i * elements);
    }
    return ATTN_OK;
}
