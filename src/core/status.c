#include "core/internal.h"

#include <stdio.h>
#include <string.h>

static _Thread_local char last_error[1024];

const char *attn_status_name(attn_status status)
{
    switch (status) {
    case ATTN_OK: return "ok";
    case ATTN_ERR_ARGUMENT: return "argument";
    case ATTN_ERR_SHAPE: return "shape";
    case ATTN_ERR_DTYPE: return "dtype";
    case ATTN_ERR_MEMORY: return "memory";
    case ATTN_ERR_IO: return "io";
    case ATTN_ERR_FORMAT: return "format";
    case ATTN_ERR_UNSUPPORTED: return "unsupported";
    case ATTN_ERR_CANCELLED: return "cancelled";
    }
    return "unknown";
}

const char *attn_last_error(void) { return last_error; }

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

const char *attn_version(void)
{
    return TEXT(ATTN_VERSION_MAJOR) "." TEXT(ATTN_VERSION_MINOR) "." TEXT(ATTN_VERSION_PATCH);
}

attn_status attn_fail(attn_status status, const char *format, ...)
{
    /* Formatted aside first: an argument may point into the current message. */
    char text[sizeof last_error];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    memcpy(last_error, text, sizeof text);
    return status;
}

attn_status attn_fail_memory(size_t bytes)
{
    return attn_fail(ATTN_ERR_MEMORY, "out of memory (%zu bytes)", bytes);
}
