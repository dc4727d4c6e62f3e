#include "core/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

attn_status attn_map_file(const char *path, const char *kind, size_t least, void **map, size_t *bytes)
{
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (descriptor < 0 || fstat(descriptor, &info) != 0) {
        attn_status status = attn_fail(ATTN_ERR_IO, "cannot open '%s': %s", path, strerror(errno));
        if (descriptor >= 0) {
            close(descriptor);
        }
        return status;
    }
    if (!S_ISREG(info.st_mode) || (uint64_t)info.st_size < least) {
        close(descriptor);
        return attn_fail(ATTN_ERR_FORMAT, "'%s' is not a %s file", path, kind);
    }
    *bytes = (size_t)info.st_size;
    *map = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, descriptor, 0);
    int error = errno;
    close(descriptor);
    return *map != MAP_FAILED ? ATTN_OK : attn_fail(ATTN_ERR_IO, "cannot map '%s': %s", path, strerror(error));
}

void attn_unmap_file(void *map, size_t bytes)
{
    if (map != NULL) {
        munmap(map, bytes);
    }
}
