/* Status codes and per-thread error messages.
 *
 * Every function of the library that can fail returns an attn_status. The library never prints, exits or
 * aborts: bad input of any kind is a status, and attn_last_error() says what was wrong with which argument.
 */
#ifndef ATTN_STATUS_H
#define ATTN_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define ATTN_API __declspec(dllexport)
#else
#define ATTN_API __attribute__((visibility("default")))
#endif

/* Version of the headers; attn_version() gives the version of the library that is linked. */
#define ATTN_VERSION_MAJOR 0
#define ATTN_VERSION_MINOR 1
#define ATTN_VERSION_PATCH 0

typedef enum attn_status {
    ATTN_OK = 0,
    ATTN_ERR_ARGUMENT = 1,    /* a parameter is unknown, malformed or out of range */
    ATTN_ERR_SHAPE = 2,       /* shapes do not agree with each other or with the parameters */
    ATTN_ERR_DTYPE = 3,       /* a data type that this input does not accept */
    ATTN_ERR_MEMORY = 4,      /* an allocation failed */
    ATTN_ERR_IO = 5,          /* a file cannot be opened, read or written */
    ATTN_ERR_FORMAT = 6,      /* a file's contents are malformed */
    ATTN_ERR_UNSUPPORTED = 7, /* well formed, but not something this build or mechanism does */
    ATTN_ERR_CANCELLED = 8    /* the caller's callback asked to stop */
} attn_status;

/* The name of a status ("ok", "argument", ...); never NULL. */
ATTN_API const char *attn_status_name(attn_status status);

/* What went wrong in the last failing call on this thread: the argument, its value and what was expected.
 * Valid until the next failing call on this thread; "" when nothing has failed. */
ATTN_API const char *attn_last_error(void);

/* "major.minor.patch" of the library. */
ATTN_API const char *attn_version(void);

#ifdef __cplusplus
}
#endif
#endif
