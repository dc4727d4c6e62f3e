/* Writes a seed for the GGUF and model fuzzers: a tiny model.  seeds FILE */
#include "../tests/gguf_build.h"

int main(int argc, char **argv)
{
    gguf_build b = {0};
    if (argc != 2) {
        return 2;
    }
    put_tiny_llama(&b);
    FILE *file = fopen(argv[1], "wb");
    int ok = file != NULL && fwrite(b.data, 1, b.bytes, file) == b.bytes;
    if (file != NULL) {
        ok = fclose(file) == 0 && ok;
    }
    free(b.data);
    return !ok;
}
