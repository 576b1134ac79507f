/* A CUDA driver without a card, so that every kernel is compiled where there is no GPU.
 *
 * It answers as a Hopper card (compute capability 9.0, 132 multiprocessors) and counts memory, but holds none: uploads are
 * dropped, downloads are ones, launches do nothing. The engine above it then chooses and writes its kernels as it would for
 * the card, the real NVRTC compiles them, and every module arrives here as PTX, which is kept:
 *
 *     cc -shared -fPIC -O1 -o libcuda.so driver.c
 *     LD_LIBRARY_PATH=folder CUDA_STUB_OUT=kept peft-limits ... --device cuda
 *
 * CUDA_STUB_OUT   folder that must exist: <hash>.ptx, and launches.txt (one line a process) at the end
 * CUDA_STUB_MIB   memory of the card in MiB, 81079 (an H100) by default; a further allocation fails as on the card
 * CUDA_STUB_NAME  its name
 *
 * tests/nvrtc/compile.py runs programs on it. Only what this crate's engine calls is here.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned long long launches, modules, used, peak, refused;

/* Memory: addresses that only grow, with their sizes in an open hash table. */
enum { SLOTS = 1 << 20 };
static CUdeviceptr at[SLOTS];
static size_t size_of_slot[SLOTS];
static CUdeviceptr next_address = 1ull << 40;

static unsigned long long total(void) {
    const char *text = getenv("CUDA_STUB_MIB");
    return (text ? strtoull(text, NULL, 10) : 81079ull) << 20;
}

static CUresult take(CUdeviceptr *out, size_t bytes) {
    CUresult result = OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    if (used + bytes <= total()) {
        size_t i = (next_address >> 9) % SLOTS, left = SLOTS;
        while (at[i] > 1 && left--) i = (i + 1) % SLOTS;
        if (at[i] <= 1) {
            at[i] = *out = next_address;
            size_of_slot[i] = bytes;
            next_address += (bytes + 1023) / 512 * 512;
            used += bytes;
            if (used > peak) peak = used;
            result = OK;
        }
    }
    if (result != OK) refused++;
    pthread_mutex_unlock(&lock);
    return result;
}

static CUresult give(CUdeviceptr address) {
    CUresult result = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (size_t i = (address >> 9) % SLOTS, left = SLOTS; at[i] && left--; i = (i + 1) % SLOTS) {
        if (at[i] == address) {
            used -= size_of_slot[i];
            at[i] = 1; /* was taken: a search goes on past it */
            result = OK;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemAllocAsync(CUdeviceptr *out, size_t bytes, void *stream) { (void)stream; return take(out, bytes); }
CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t bytes) { return take(out, bytes); }
CUresult cuMemFreeAsync(CUdeviceptr address, void *stream) { (void)stream; return give(address); }
CUresult cuMemFree_v2(CUdeviceptr address) { return give(address); }
CUresult cuMemAllocHost_v2(void **out, size_t bytes) { *out = malloc(bytes ? bytes : 1); return *out ? OK : OUT_OF_MEMORY; }
CUresult cuMemFreeHost(void *p) { free(p); return OK; }
CUresult cuMemGetInfo_v2(size_t *unused, size_t *all) { *all = total(); *unused = *all - used; return OK; }

static void ones(void *to, size_t bytes) {
    const float one = 1.0f;
    for (size_t i = 0; i + sizeof one <= bytes; i += sizeof one) memcpy((char *)to + i, &one, sizeof one);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, void *s) {
    (void)to; (void)from; (void)bytes; (void)s;
    return OK;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, void *s) {
    (void)from; (void)s;
    ones(to, bytes);
    return OK;
}

/* CUDA_MEMCPY2D as cuda.h lays it out. */
struct copy2d {
    size_t src_x, src_y; int src_type; const void *src_host; CUdeviceptr src_device; void *src_array; size_t src_pitch;
    size_t dst_x, dst_y; int dst_type; void *dst_host; CUdeviceptr dst_device; void *dst_array; size_t dst_pitch;
    size_t width, height;
};
CUresult cuMemcpy2DAsync_v2(const struct copy2d *c, void *s) {
    (void)s;
    if (c->dst_type == 1) /* host */
        for (size_t row = 0; row < c->height; row++) ones((char *)c->dst_host + row * c->dst_pitch, c->width);
    return OK;
}

CUresult cuInit(unsigned flags) { (void)flags; return OK; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return OK; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal == 0 ? OK : 101; }
CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = total(); return OK; }
CUresult cuDeviceGetName(char *name, int length, int device) {
    (void)device;
    const char *own = getenv("CUDA_STUB_NAME");
    snprintf(name, length, "%s", own ? own : "no card (kernels are compiled for sm_90a and not run)");
    return OK;
}
/* Numbers of cuda.h's CUdevice_attribute. */
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 1: *value = 1024; break;                       /* threads a block */
    case 2: case 3: *value = 1024; break;               /* block x, y */
    case 4: *value = 64; break;                         /* block z */
    case 5: *value = 2147483647; break;                 /* grid x */
    case 6: case 7: *value = 65535; break;              /* grid y, z */
    case 10: *value = 32; break;                        /* warp */
    case 16: *value = 132; break;                       /* multiprocessors */
    case 75: *value = 9; break;                         /* compute capability */
    case 76: *value = 0; break;
    case 97: *value = 232448; break;                    /* shared memory a block, opted in */
    case 115: *value = 1; break;                        /* memory pools */
    default:
        fprintf(stderr, "driver without a card: attribute %d is not known here\n", attribute);
        *value = 0;
        return INVALID_VALUE;
    }
    return OK;
}

static int handle; /* what every context, stream and event points to */
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &handle; return OK; }
CUresult cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return OK; }
CUresult cuCtxSetCurrent(void *context) { (void)context; return OK; }
CUresult cuCtxGetCurrent(void **context) { *context = &handle; return OK; }
CUresult cuCtxSynchronize(void) { return OK; }
CUresult cuStreamCreate(void **stream, unsigned flags) { (void)flags; *stream = &handle; return OK; }
CUresult cuStreamDestroy_v2(void *stream) { (void)stream; return OK; }
CUresult cuStreamSynchronize(void *stream) { (void)stream; return OK; }
CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags) { (void)stream; (void)event; (void)flags; return OK; }
CUresult cuEventCreate(void **event, unsigned flags) { (void)flags; *event = &handle; return OK; }
CUresult cuEventRecord(void *event, void *stream) { (void)event; (void)stream; return OK; }
CUresult cuEventSynchronize(void *event) { (void)event; return OK; }
CUresult cuEventDestroy_v2(void *event) { (void)event; return OK; }

/* A module is PTX text that ends with a zero. */
CUresult cuModuleLoadData(void **module, const void *image) {
    const char *text = image, *folder = getenv("CUDA_STUB_OUT");
    uint64_t hash = 14695981039346656037ull;
    for (const char *c = text; *c; c++) hash = (hash ^ (unsigned char)*c) * 1099511628211ull;
    if (folder) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%016llx.ptx", folder, (unsigned long long)hash);
        FILE *file = fopen(path, "w");
        if (!file) return INVALID_VALUE;
        fputs(text, file);
        fclose(file);
    }
    pthread_mutex_lock(&lock);
    modules++;
    pthread_mutex_unlock(&lock);
    *module = &handle;
    return OK;
}
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module; (void)name;
    *function = &handle;
    return OK;
}
CUresult cuModuleUnload(void *module) { (void)module; return OK; }
CUresult cuFuncSetAttribute(void *f, int attribute, int value) { (void)f; (void)attribute; (void)value; return OK; }
CUresult cuTensorMapEncodeTiled(void) { return OK; }
CUresult cuTensorMapEncodeIm2col(void) { return OK; }
CUresult cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void *stream, void **arguments, void **extra) {
    (void)f; (void)stream; (void)arguments; (void)extra;
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || (unsigned long long)bx * by * bz > 1024 || shared > 232448)
        return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    launches++;
    pthread_mutex_unlock(&lock);
    return OK;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == OK ? "CUDA_SUCCESS" : "CUDA_ERROR_INVALID_VALUE";
    return OK;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : error == OK ? "no error" : "invalid argument";
    return OK;
}

__attribute__((destructor)) static void tell(void) {
    const char *folder = getenv("CUDA_STUB_OUT");
    char path[4096];
    if (!folder || !modules) return;
    snprintf(path, sizeof path, "%s/launches.txt", folder);
    FILE *file = fopen(path, "a");
    if (!file) return;
    fprintf(file, "%llu modules, %llu launches, peak %llu MiB of %llu, %llu allocations refused\n", modules, launches,
            peak >> 20, total() >> 20, refused);
    fclose(file);
}
